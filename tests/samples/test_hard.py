from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.features.bloom import is_held_out
from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import HotOptions, NegativesOptions, SamplesOptions
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError

World = Callable[..., Path]
Build = Callable[..., Samples]
USERS = {c.USER_ID: [1, 2, 3]}
ITEMS = {c.ITEM_ID: list(range(10, 22))}
START_MS, DAY_MS = 1_704_067_200_000, 86_400_000
DAY1, DAY2 = "date=2024-01-01/a.parquet", "date=2024-01-02/a.parquet"


def rows(*requests: tuple[int, int, dict[str, list[int]]], first_seq: int = 0) -> list[dict[str, Any]]:
    """Events of requests (user, time, items by outcome)."""
    found = []
    for user, at, outcomes in requests:
        for outcome, items in outcomes.items():
            for item in items:
                found.append(
                    {
                        c.EVENT_SEQ: first_seq + len(found),
                        c.USER_ID: user,
                        c.ITEM_ID: item,
                        c.REQUEST_TS_MS: START_MS + at,
                        c.CLICK_TS_MS: START_MS + at + 1 if outcome == c.CLICKED else None,
                        c.OUTCOME: outcome,
                    }
                )
    return found


def hard(samples: Samples) -> dict[tuple[int, int], dict[str, list[int]]]:
    """By user and item of a positive, its hard negatives of each source."""
    users, items = samples.users.ids.to_pylist(), samples.items.ids.to_pylist()
    return {
        (users[user], items[item]): {
            source: [items[k] for k in bag.rows[bag.indptr[place] : bag.indptr[place + 1]]]
            for source, bag in samples.positives.hard.items()
        }
        for place, (user, item) in enumerate(zip(samples.positives.user_row, samples.positives.item_row, strict=True))
    }


FUNNEL = rows(
    (1, 100, {c.CLICKED: [10], c.IMPRESSED: [11], c.RANK_REJECTED: [14, 13], c.PRE_RANK_REJECTED: [16, 15, 17]}),
    (1, 200, {c.IMPRESSED: [13], c.PRE_RANK_REJECTED: [18]}),
    (2, 100, {c.CLICKED: [11, 12], c.RANKED_NOT_SHOWN: [20], c.RANK_REJECTED: [13, 13], c.PRE_RANK_REJECTED: [10]}),
    (2, 300, {c.CLICKED: [10]}),
)


def test_hard_negatives_are_what_was_rejected_in_the_request_of_the_positive(world: World, build: Build) -> None:
    """User 1 was shown 13 and user 2 clicked 10 elsewhere; 18 was rejected where nothing was clicked."""
    assert hard(build(world(USERS, ITEMS, {DAY1: FUNNEL}))) == {
        (1, 10): {c.PRE_RANK_REJECTED: [15, 16, 17], c.RANK_REJECTED: [14]},
        (2, 11): {c.PRE_RANK_REJECTED: [], c.RANK_REJECTED: [13]},
        (2, 12): {c.PRE_RANK_REJECTED: [], c.RANK_REJECTED: [13]},
        (2, 10): {c.PRE_RANK_REJECTED: [], c.RANK_REJECTED: []},
    }


def test_the_report_says_what_the_rows_of_each_outcome_became(world: World) -> None:
    workspace = world(USERS, ITEMS, {DAY1: FUNNEL})
    report = build_samples(workspace, workspace / "samples", Features(), 8)
    assert report.used == {
        c.PRE_RANK_REJECTED: {"hard_negative": 3, "no_positive_in_its_request": 1, "shown_or_clicked": 1},
        c.RANK_REJECTED: {"hard_negative": 2, "repeated": 1, "shown_or_clicked": 1},
        c.RANKED_NOT_SHOWN: {"not_used": 1},
        c.IMPRESSED: {"not_used": 2},
        c.CLICKED: {"positive": 4},
    }
    assert report.with_hard == 0.75
    assert {outcome: sum(parts.values()) for outcome, parts in report.used.items()} == report.outcomes


def test_no_more_than_asked_for_are_kept_of_a_request_and_they_are_chosen_by_the_seed(world: World) -> None:
    many = rows((1, 100, {c.CLICKED: [10, 11], c.RANK_REJECTED: list(range(12, 22))}))
    workspace = world(USERS, ITEMS, {DAY1: many})
    chosen = set()
    for seed in range(12):
        report = build_samples(
            workspace,
            workspace / "samples",
            Features(),
            8,
            SamplesOptions(seed=seed, negatives=NegativesOptions(hard_most=4)),
        )
        assert report.used[c.RANK_REJECTED] == {"hard_negative": 4, "beyond_hard_most": 6}
        from twotower.samples.read import open_samples

        (one, other) = (found[c.RANK_REJECTED] for found in hard(open_samples(workspace / "samples")).values())
        assert one == other
        assert one == sorted(one)
        assert len(set(one)) == 4
        chosen.add(tuple(one))
    assert len(chosen) > 6


def test_the_order_of_rows_changes_no_byte(world: World, build: Build) -> None:
    shuffled = [FUNNEL[place] for place in np.random.default_rng(0).permutation(len(FUNNEL))]
    some = {"negatives": NegativesOptions(hard_most=2), "hot": HotOptions("sqrt", 0.5)}
    one = build(world(USERS, ITEMS, {DAY1: FUNNEL}, "one"), **some)
    other = build(world(USERS, ITEMS, {DAY1: shuffled}, "other"), **some)
    assert one.manifest["files"] == other.manifest["files"]


def test_what_was_shown_before_the_first_day_counts_and_rows_before_it_do_not(world: World, build: Build) -> None:
    later = rows(
        (1, DAY_MS + 100, {c.CLICKED: [12], c.RANK_REJECTED: [11, 19], c.PRE_RANK_REJECTED: [10, 18]}), first_seq=100
    )
    workspace = world(USERS, ITEMS, {DAY1: FUNNEL, DAY2: later})
    samples = build(workspace, first_day="2024-01-02")
    assert hard(samples) == {(1, 12): {c.PRE_RANK_REJECTED: [18], c.RANK_REJECTED: [19]}}
    used = samples.manifest["used"]
    assert used[c.CLICKED] == {"positive": 1, "before_the_first_day": 4}
    assert used[c.RANK_REJECTED] == {"hard_negative": 1, "shown_or_clicked": 1, "before_the_first_day": 4}


def test_a_log_without_a_funnel_has_no_hard_negatives(world: World, build: Build) -> None:
    samples = build(world(USERS, ITEMS, {DAY1: rows((1, 100, {c.CLICKED: [10], c.IMPRESSED: [11]}))}))
    assert samples.positives.hard == {}


def test_rejected_rows_without_time_are_no_hard_negatives(world: World, build: Build) -> None:
    timeless = [{**row, c.REQUEST_TS_MS: None, c.CLICK_TS_MS: None} for row in FUNNEL]
    samples = build(world(USERS, ITEMS, {"date=unknown/a.parquet": timeless}))
    assert samples.positives.hard == {}
    assert samples.manifest["used"][c.RANK_REJECTED] == {"no_time": 4}


def test_a_rejected_row_with_a_position_is_refused_because_it_was_shown(world: World, build: Build) -> None:
    shown = [{**row, c.POSITION: 3 if row[c.OUTCOME] == c.RANK_REJECTED else None} for row in FUNNEL]
    with pytest.raises(DataError, match="4 rejected rows have a position, so they were shown: a shown item is no neg"):
        build(world(USERS, ITEMS, {DAY1: shown}))


def test_shown_items_are_hard_negatives_only_where_they_are_forced_in(
    world: World, build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = world(USERS, ITEMS, {DAY1: FUNNEL})
    assert c.IMPRESSED not in build(workspace).positives.hard
    assert not caplog.records
    forced = build(workspace, negatives=NegativesOptions(impressed_as_negatives_for_experiments=True))
    assert hard(forced)[1, 10][c.IMPRESSED] == [11]
    assert "impressed_as_negatives_for_experiments says: it was good enough to be shown" in caplog.text
    assert forced.manifest["used"][c.IMPRESSED] == {"hard_negative": 1, "no_positive_in_its_request": 1}


def test_a_held_out_user_has_no_weak_positives_either(world: World, build: Build) -> None:
    """User 1 is held out by the hash of the id."""
    shown = rows((1, 100, {c.CLICKED: [10], c.IMPRESSED: [11]}), (2, 100, {c.CLICKED: [11], c.IMPRESSED: [12]}))
    samples = build(world(USERS, ITEMS, {DAY1: shown}), impressed_weight=0.25, held_out_users=0.5)
    users, items = samples.users.ids.to_pylist(), samples.items.ids.to_pylist()
    assert is_held_out(samples.users.ids, 0.5)[users.index(1)]
    trained = zip(samples.positives.user_row, samples.positives.item_row, strict=True)
    assert [(users[user], items[item]) for user, item in trained] == [(2, 11), (2, 12)]
    assert len(samples.clicks.item_row) == 2


def test_a_shown_item_is_a_weak_positive_with_its_weight_and_history(world: World, build: Build) -> None:
    workspace = world(USERS, ITEMS, {DAY1: FUNNEL})
    samples = build(workspace, impressed_weight=0.25)
    rows, users, items = samples.positives, samples.users.ids.to_pylist(), samples.items.ids.to_pylist()
    found = [
        (users[user], items[item], float(weight), int(history))
        for user, item, weight, history in zip(rows.user_row, rows.item_row, rows.weight, rows.history, strict=True)
    ]
    assert found == [
        (1, 10, 1.0, 0),
        (1, 11, 0.25, 0),
        (2, 11, 1.0, 0),
        (2, 12, 1.0, 0),
        (1, 13, 0.25, 1),
        (2, 10, 1.0, 2),
    ]
    assert samples.clicks.item_row.tolist() == [0, 1, 2, 0]
    assert samples.item_positives.tolist()[:4] == [2, 1, 1, 0]
    assert samples.manifest["rows_fed"] == 6
    assert samples.manifest["used"][c.IMPRESSED] == {"weak_positive": 2}
    assert hard(samples)[1, 11] == {c.PRE_RANK_REJECTED: [15, 16, 17], c.RANK_REJECTED: [14]}
    assert hard(samples)[1, 13] == {c.PRE_RANK_REJECTED: [18], c.RANK_REJECTED: []}


def test_weak_positives_without_time_are_refused(world: World, build: Build) -> None:
    timeless = [{**row, c.REQUEST_TS_MS: None, c.CLICK_TS_MS: None} for row in FUNNEL]
    with pytest.raises(ConfigError, match=r"samples.impressed_weight = 0.5, but the events have no time"):
        build(world(USERS, ITEMS, {"date=unknown/a.parquet": timeless}), impressed_weight=0.5)
