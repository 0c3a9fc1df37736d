from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.samples.options import ColdOptions, HotOptions
from twotower.samples.read import Samples
from twotower.samples.sampling import by_decile, expected_copies
from twotower.schema import columns as c

World = Callable[..., Path]
Build = Callable[..., Samples]
CLICKS = np.array([1600, 400, 100, 25, 0])
"""531.25 is the mean of those that were clicked."""
NONE = HotOptions(), ColdOptions()


def test_without_sampling_every_row_is_fed_once() -> None:
    assert expected_copies(CLICKS, *NONE).tolist() == [1] * 5


@pytest.mark.parametrize(
    ("hot", "expected"),
    [
        (HotOptions("sqrt", 100 / 531.25), [0.25, 0.5, 1, 1, 1]),
        (HotOptions("power", 100 / 531.25, 1.0), [1 / 16, 0.25, 1, 1, 1]),
        (HotOptions("power", 100 / 531.25, 0.75), [1 / 8, 4**-0.75, 1, 1, 1]),
        (HotOptions("word2vec", 100 / 531.25), [0.25 + 1 / 16, 0.75, 1, 1, 1]),
    ],
)
def test_hot_items_are_kept_less_the_more_they_are_clicked(hot: HotOptions, expected: list[float]) -> None:
    np.testing.assert_allclose(expected_copies(CLICKS, hot, ColdOptions()), expected)


@pytest.mark.parametrize(
    ("cold", "expected"),
    [
        (ColdOptions("sqrt", 400 / 531.25, most=10), [1, 1, 2, 4, 1]),
        (ColdOptions("power", 400 / 531.25, 1.0, most=10), [1, 1, 4, 10, 1]),
    ],
)
def test_cold_items_are_repeated_up_to_a_limit(cold: ColdOptions, expected: list[float]) -> None:
    np.testing.assert_allclose(expected_copies(CLICKS, HotOptions(), cold), expected)


def log(timed: bool) -> list[dict[str, Any]]:
    """20 items with 5 to 2000 clicks, of 50 users."""
    generator = np.random.default_rng(0)
    item = generator.permutation(np.repeat(np.arange(20), np.geomspace(5, 2000, 20).astype(int)))
    return [
        {
            c.EVENT_SEQ: seq,
            c.USER_ID: int(generator.integers(50)),
            c.ITEM_ID: int(i),
            c.REQUEST_TS_MS: 1_704_067_200_000 + seq if timed else None,
            c.CLICK_TS_MS: 1_704_067_200_000 + seq if timed else None,
            c.OUTCOME: c.CLICKED,
        }
        for seq, i in enumerate(item)
    ]


@pytest.mark.parametrize("timed", [True, False])
def test_rows_are_drawn_as_often_as_they_should_be_and_none_is_lost(world: World, build: Build, timed: bool) -> None:
    day = "date=2024-01-01" if timed else "date=unknown"
    workspace = world({c.USER_ID: np.arange(50)}, {c.ITEM_ID: np.arange(20)}, {f"{day}/a.parquet": log(timed)})
    hot, cold = HotOptions("sqrt", 1.0), ColdOptions("power", 0.5, 0.7, 3.5)
    samples = build(workspace, hot=hot, cold=cold)
    plain = build(workspace)
    clicks = samples.item_positives
    assert clicks.tolist() == plain.item_positives.tolist()
    assert samples.clicks.item_row.tolist() == plain.clicks.item_row.tolist()
    assert samples.positives.history.tolist() == plain.positives.history.tolist()
    expected = expected_copies(clicks, hot, cold)
    copies, item = samples.positives.copies, samples.positives.item_row
    assert set(copies[item == 19].tolist()) == {0, 1}
    assert set(copies[item == 0].tolist()) <= {3, 4}
    fed = np.bincount(item, copies, 20)
    chance = expected - np.floor(expected)
    error = (fed - clicks * expected) / np.sqrt(np.maximum(clicks * chance * (1 - chance), 1e-9))
    assert np.abs(error[(chance > 0)]).max() < 4
    assert np.abs(error[(chance > 0)]).mean() > 0.2  # drawn, not rounded
    assert plain.positives.copies.tolist() == [1] * len(plain.positives)
    other = build(workspace, hot=hot, cold=cold, seed=1)
    assert other.positives.copies.tolist() != copies.tolist()


def test_the_report_shows_the_effect_by_decile(world: World, build: Build) -> None:
    events = {"date=2024-01-01/a.parquet": log(True)}
    workspace = world({c.USER_ID: np.arange(50)}, {c.ITEM_ID: np.arange(20)}, events)
    samples = build(workspace, hot=HotOptions("power", 1.0, 1.0))
    before, after = samples.manifest["deciles"]["before"], samples.manifest["deciles"]["after"]
    assert sum(before) == int(samples.item_positives.sum())
    assert sum(after) == samples.manifest["rows_fed"] == int(samples.positives.copies.sum())
    assert before[:6] == after[:6]
    assert after[9] < before[9] / 3


def test_deciles_are_of_items_that_were_clicked() -> None:
    clicks = np.array([0, 0, 0, 5, *range(10, 19)])
    assert by_decile(clicks, clicks) == [5, 10, 11, 12, 13, 14, 15, 16, 17, 18]
