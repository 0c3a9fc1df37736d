import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.options import PopularOptions
from twotower.channels.popular import Popular
from twotower.channels.retriever import Candidates, Queries
from twotower.evaluate import holdout
from twotower.evaluate.channels import evaluate_channels
from twotower.evaluate.holdout import evaluate, read_truth
from twotower.evaluate.options import EvaluateOptions
from twotower.features.fitted import Category
from twotower.features.options import Categorical, Features
from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError

Write = Callable[..., None]


def options(*k: int, **others: Any) -> EvaluateOptions:
    return EvaluateOptions(k=list(k), **others)


def test_channels_are_judged_on_the_same_users_without_what_they_clicked(
    samples: Samples, tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (0, 3), (0, 3), (2, 1)])
    channels = [fit_item_cf(samples.clicks, 6), Popular.fit(samples)]
    result = evaluate(samples, tmp_path, channels, options(1, 2, bootstrap=50))
    # Popular: 0, 1, then 2 and 3 by row. User 0 has 0 and 1: sees 2, 3. User 2 has 0 and 3: sees 1, 2.
    assert (result["users"], result["channel"]) == (2, "item_cf")
    assert result["popular"]["recall@1"]["value"] == 0.75
    assert result["popular"]["recall@2"]["value"] == 1
    difference = result["recall@1"]["value"] - result["popular"]["recall@1"]["value"]
    assert result["popular"]["recall@1"]["difference"]["value"] == difference
    assert result["popular"]["coverage@2"] == {"value": 3 / 4, "ci95": None}
    assert result["cold"] == {}


def test_cold_users_and_items_are_judged_apart(
    samples: Samples, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2)])
    reasons = [c.NEW_USER, c.NEW_USER, c.NEW_USER, c.NEW_ITEM]
    write(tmp_path / "holdout_cold.parquet", [(3, 0), (3, 3), (99, 1), (1, 5)], reason=reasons)
    with caplog.at_level(logging.WARNING):
        result = evaluate(samples, tmp_path, [Popular.fit(samples)], options(2, bootstrap=10))
    assert set(result["cold"]) == {c.NEW_USER, c.NEW_ITEM}
    assert result["cold"][c.NEW_USER]["users"] == 1
    assert result["cold"][c.NEW_USER]["popular"]["recall@2"]["value"] == 0.5
    assert result["cold"][c.NEW_ITEM]["popular"]["recall@2"]["value"] == 0
    assert "holdout_cold.parquet, new_user: 1 of 3 rows are not of a known user and item and left out" in caplog.text


def test_cold_rows_that_are_all_unknown_do_not_end_the_evaluation(
    samples: Samples, tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2)])
    write(tmp_path / "holdout_cold.parquet", [(99, 1)], reason=[c.NEW_USER])
    assert evaluate(samples, tmp_path, [Popular.fit(samples)], options(2, bootstrap=10))["cold"] == {}


def test_few_users_at_a_time_give_the_same(
    samples: Samples, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (1, 3), (2, 1)])
    whole = evaluate(samples, tmp_path, [Popular.fit(samples)], options(2, bootstrap=10))
    monkeypatch.setattr(holdout, "BATCH", 2)
    assert evaluate(samples, tmp_path, [Popular.fit(samples)], options(2, bootstrap=10)) == whole


def test_the_truth_is_distinct_pairs_by_user(samples: Samples, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "holdout.parquet", [(2, 5), (0, 3), (2, 1), (0, 3), (77, 0)])
    truth = read_truth(tmp_path / "holdout.parquet", samples)
    assert truth.user_rows.tolist() == [0, 2]
    assert (truth.items.indptr.tolist(), truth.items.rows.tolist()) == ([0, 1, 3], [3, 1, 5])


def test_without_a_hold_out_there_is_nothing_to_evaluate(samples: Samples, tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="import the data with --holdout or --test"):
        read_truth(tmp_path / "holdout.parquet", samples)
    write(tmp_path / "holdout.parquet", [(77, 0), (0, 88)])
    with pytest.raises(DataError, match="has 2 rows, none of them of a user and an item of the workspace"):
        read_truth(tmp_path / "holdout.parquet", samples)


def test_held_out_rows_that_are_later_than_now_are_counted_and_left_out(
    samples: Samples, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (1, 3), (2, 1)], ts_ms=[1_700_000_000_000, 3_900_000_000_000, None])
    with caplog.at_level(logging.WARNING):
        result = evaluate(samples, tmp_path, [Popular.fit(samples)], options(2, bootstrap=10))
    assert (result["users"], result["dropped"]) == (2, {"beyond_now": 1})
    assert "holdout.parquet: 1 of 3 rows are later than now and left out" in caplog.text


def test_a_cut_off_above_the_catalogue_judges_the_whole_of_it(samples: Samples, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (0, 3), (2, 1)])
    result = evaluate(samples, tmp_path, [fit_item_cf(samples.clicks, 6)], options(6, 10**6, bootstrap=10))
    for metric in ("recall", "ndcg", "hit", "coverage", "pop_pct"):
        assert result[f"{metric}@6"] == result[f"{metric}@{10**6}"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("ts_ms", ["today"], "column ts_ms is of type string, where int64 milliseconds since 1970 is needed"),
        ("position", ["top"], "column position is of type string, where int32 is needed"),
        ("position", [2**40], "column position does not fit int32"),
        ("outcome", [1], "column outcome is of type int64, where string is needed"),
    ],
)
def test_a_held_out_column_of_another_type_is_refused(
    column: str, values: list[object], message: str, samples: Samples, tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2)], **{column: values})
    with pytest.raises(DataError, match=message):
        read_truth(tmp_path / "holdout.parquet", samples)


@pytest.fixture
def scenes(tmp_path: Path) -> Samples:
    """Users 0 to 3 and items 0 to 5; in scene `home` all but user 3 click items 0 and 1, in `search` item 2."""
    events = tmp_path / "events" / "date=2023-11-14"
    events.mkdir(parents=True)
    pq.write_table(pa.table({c.USER_ID: np.arange(4)}), tmp_path / "users.parquet")
    pq.write_table(pa.table({c.ITEM_ID: np.arange(6)}), tmp_path / "items.parquet")
    clicks = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)]
    times = 1_700_000_000_000 + np.arange(len(clicks))
    columns = {
        c.EVENT_SEQ: np.arange(len(clicks)),
        c.USER_ID: [user for user, _ in clicks],
        c.ITEM_ID: [item for _, item in clicks],
        c.REQUEST_TS_MS: times,
        c.CLICK_TS_MS: times + 1,
        c.OUTCOME: [c.CLICKED] * len(clicks),
        "scene": ["home"] * 5 + ["search"],
    }
    pq.write_table(pa.table(columns), events / "0.parquet")
    features = Features(context={"scene": Categorical(kind="categorical")})
    build_samples(tmp_path, tmp_path / "samples", features, 4)
    return open_samples(tmp_path / "samples")


def write_impressions(folder: Path, *shown: tuple[int, int, str, str]) -> None:
    """Held-out impressions of a user, at a time, in a scene, with an outcome."""
    user, ts_ms, scene, outcome = zip(*shown, strict=True)
    columns = {c.USER_ID: user, c.ITEM_ID: [5] * len(user), c.REQUEST_TS_MS: ts_ms, c.OUTCOME: outcome, "scene": scene}
    pq.write_table(pa.table(columns), folder / "holdout_impressions.parquet")


class Listening:
    """A channel without answers that keeps the scenes it was asked in."""

    name = "listening"

    def __init__(self, samples: Samples) -> None:
        (feature,) = samples.features.context
        assert isinstance(feature, Category)
        self.names = {int(feature.encode(pa.array([one]))[0]): one for one in ("home", "search", None)}
        self.asked: list[str | None] = []

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        self.asked += [self.names[int(token)] for token in queries.features["scene"]]  # type: ignore[union-attr]
        return Candidates(np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, np.float32))


def test_users_are_asked_in_the_context_of_their_first_held_out_impression(
    scenes: Samples, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in that of the click, which only a later request ends in."""
    monkeypatch.setattr(holdout, "BATCH", 2)
    write(tmp_path / "holdout.parquet", [(0, 2), (1, 2), (2, 1)])
    write(tmp_path / "holdout_cold.parquet", [(3, 0), (0, 5)], reason=[c.NEW_USER, c.NEW_ITEM])
    write_impressions(
        tmp_path,
        (0, 70, "home", c.CLICKED),
        (1, 90, "home", c.CLICKED),
        (0, 60, "search", c.IMPRESSED),
        (2, 80, "home", c.IMPRESSED),
        (2, 80, "search", c.CLICKED),
        (3, 99, "search", c.CLICKED),
        (44, 1, "search", c.CLICKED),
    )
    channel = Listening(scenes)
    result = evaluate(scenes, tmp_path, [channel], options(1, bootstrap=10))
    assert channel.asked == [
        "search",
        "home",
        "home",
        "search",
        "search",
    ]  # then the new user, and who has a new item
    assert result["context"] == {"features": ["scene"], "users": 3}
    other = Listening(scenes)
    report = evaluate_channels(
        scenes,
        tmp_path,
        {"one": other},
        lambda lists, k: lists["one"],
        EvaluateOptions(channels_k=[1], bootstrap=10),
        depth=1,
    )
    assert (other.asked, report["context"]) == (channel.asked, result["context"])


def test_a_channel_that_knows_the_scene_answers_by_it(scenes: Samples, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "holdout.parquet", [(3, 2)])
    write_impressions(tmp_path, (3, 60, "search", c.IMPRESSED))
    popular = Popular.fit(scenes, PopularOptions(segment="scene"))
    assert evaluate(scenes, tmp_path, [popular], options(1, bootstrap=10))["recall@1"]["value"] == 1
    assert evaluate(scenes, tmp_path, [popular], options(1, bootstrap=10, context=False))["recall@1"]["value"] == 0


def test_whoever_has_no_held_out_impression_is_asked_without_a_context_and_counted(
    scenes: Samples, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (2, 1)])
    write_impressions(tmp_path, (2, 60, "search", c.IMPRESSED))
    channel = Listening(scenes)
    result = evaluate(scenes, tmp_path, [channel], options(1, bootstrap=10))
    assert (channel.asked, result["context"]) == ([None, "search"], {"features": ["scene"], "users": 1})
    assert "1 of 2 users have no held-out impression: asked without a context" in caplog.text


def test_without_impressions_or_by_choice_requests_carry_no_context(
    scenes: Samples, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (2, 1)])
    channel = Listening(scenes)
    result = evaluate(scenes, tmp_path, [channel], options(1, bootstrap=10))
    assert (channel.asked, result["context"]) == ([None, None], {"features": [], "users": 0})
    assert "held-out users are asked without their context (scene)" in caplog.text
    write_impressions(tmp_path, (0, 60, "search", c.IMPRESSED), (2, 60, "search", c.IMPRESSED))
    by_choice = evaluate(scenes, tmp_path, [channel], options(1, bootstrap=10, context=False))
    assert (channel.asked[2:], by_choice) == ([None, None], result)
    table = pq.read_table(tmp_path / "holdout_impressions.parquet").drop_columns(["scene"])
    pq.write_table(table, tmp_path / "holdout_impressions.parquet")
    with pytest.raises(DataError, match="scene"):
        evaluate(scenes, tmp_path, [channel], options(1, bootstrap=10))
