import datetime
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from twotower.datasets.holdout import HoldoutRule, parse_holdout, split, split_given
from twotower.datasets.tables import Source, assemble
from twotower.schema.errors import ConfigError, DataError

DAY = 86_400_000
T = 17_000 * DAY  # 2016-07-18


def tables(rows, **more):
    """Rows of user, item, time, clicked."""
    user, item, ts_ms, clicked = zip(*rows, strict=True)
    outcome = ["clicked" if click else "impressed" for click in clicked]
    times = {"ts_ms": [T + t for t in ts_ms]} if ts_ms[0] is not None else {}
    return assemble(Source("shop", pa.table({"user_id": user, "item_id": item, "outcome": outcome, **times}), **more))


def pairs(table):
    return list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


def test_a_quantile_of_time_is_taken_over_all_events_and_holds_out_from_there_on():
    # 0.6 of five events is the third
    got = split(
        tables([(1, 1, 0, 1), (1, 2, 1, 1), (1, 9, 2, 0), (1, 3, 3, 1), (1, 2, 4, 1)]), HoldoutRule("time", 0.6)
    )
    assert pairs(got.events) == [(1, 1), (1, 2)]
    assert got.holdout.to_pydict() == {"user_id": [1], "item_id": [2], "ts_ms": [T + 4]}
    assert got.holdout_cold.to_pydict() == {"user_id": [1], "item_id": [3], "ts_ms": [T + 3], "reason": ["new_item"]}
    assert got.dropped == {"held_out_not_positive": 1}


def test_every_event_is_somewhere():
    rows = [(u, i, 10 * i + u, (u + i) % 2) for u in range(5) for i in range(8)]
    for rule in (HoldoutRule("time", 0.7), HoldoutRule("leave-one-out")):
        whole = tables(rows)
        got = split(whole, rule)
        parts = got.events.num_rows + got.holdout.num_rows + got.holdout_cold.num_rows + sum(got.dropped.values())
        assert parts == whole.events.num_rows


def test_since_holds_out_a_day_of_utc_from_its_first_millisecond():
    whole = tables([(1, 1, 0, 1), (1, 2, DAY - 1, 1), (1, 1, DAY, 1)])
    got = split(whole, HoldoutRule("since", day=datetime.date(2016, 7, 19)))
    assert pairs(got.events) == [(1, 1), (1, 2)]
    assert got.holdout["ts_ms"].to_pylist() == [T + DAY]


def test_since_goes_by_the_sources_own_day():
    rows = {
        "user_id": [1, 1, 1],
        "item_id": [1, 2, 1],
        "ts_ms": [T, T + 1, T + 2],
        "day": pa.array([5, 6, 5], pa.date32()),
    }
    whole = assemble(Source("shop", pa.table(rows), day="day"))
    got = split(whole, HoldoutRule("since", day=datetime.date(1970, 1, 7)))
    assert pairs(got.events) == [(1, 1), (1, 1)]
    assert got.holdout_cold["item_id"].to_pylist() == [2]


def test_leave_one_out_takes_the_last_positive_and_what_follows_it():
    rows = [(1, 1, 0, 1), (1, 2, 1, 1), (1, 3, 2, 0), (2, 2, 0, 1), (2, 1, 5, 1), (3, 1, 0, 0)]
    got = split(tables(rows), HoldoutRule("leave-one-out"))
    assert sorted(pairs(got.events)) == [(1, 1), (2, 2), (3, 1)]
    assert pairs(got.holdout) == [(1, 2), (2, 1)]
    assert got.dropped == {"held_out_not_positive": 1}
    assert got.events["event_seq"].to_pylist() == [0, 1, 2]


def test_leave_one_out_follows_the_sources_order_within_a_second():
    rows = {"user_id": [1, 1, 2, 2], "item_id": [2, 1, 1, 2], "ts_ms": [T] * 4, "seq": [0, 1, 0, 1]}
    got = split(assemble(Source("shop", pa.table(rows), order=("seq",))), HoldoutRule("leave-one-out"))
    assert pairs(got.holdout) == [(1, 1), (2, 2)]


def test_cold_positives_say_why_and_a_new_user_wins():
    rows = [
        (1, 1, 0, 1),
        (1, 2, 1, 1),
        (2, 9, 2, 0),
        (1, 3, 5, 1),
        (2, 1, 6, 1),
        (3, 4, 7, 1),
        (1, 9, 8, 1),
        (1, 2, 9, 1),
    ]
    got = split(tables(rows), HoldoutRule("time", 0.5))
    assert pairs(got.train_positives) == [(1, 1), (1, 2)]
    # user 2 and item 9 were only shown in training: no training positive
    assert list(zip(pairs(got.holdout_cold), got.holdout_cold["reason"].to_pylist(), strict=True)) == [
        ((1, 3), "new_item"),
        ((1, 9), "new_item"),
        ((2, 1), "new_user"),
        ((3, 4), "new_user"),
    ]
    assert pairs(got.holdout) == [(1, 2)]


def test_what_users_did_after_they_came_back_is_held_out():
    def clicks(user, before, pause, after):
        """Clicks a millisecond apart, with one pause."""
        return [(user, n, n + pause * (n >= before), 1) for n in range(before + after)]

    rows = [
        *clicks(1, 6, 3 * DAY, 10),
        *clicks(2, 6, 3 * DAY - 2, 10),  # not quite so long
        *clicks(3, 4, 3 * DAY, 10),  # too few before
        *clicks(4, 6, 3 * DAY, 9),  # too few after
        (1, 20, 3 * DAY + 8, 0),
        (1, 21, 9 * DAY, 1),  # after another pause
    ]
    got = split(tables(rows), HoldoutRule("pause", 3))
    assert pairs(got.holdout) == [(1, n) for n in range(6, 16)]
    assert pairs(got.holdout_cold) == [(1, 21)]  # nobody else clicked it
    assert got.dropped == {"held_out_not_positive": 1}
    assert got.train_positives.num_rows == 6 + 16 + 14 + 15


def test_a_pair_that_was_clicked_before_stays_in_the_hold_out():
    got = split(tables([(1, 1, 0, 1), (1, 2, 1, 1), (1, 1, 9, 1)]), HoldoutRule("time", 0.9))
    assert pairs(got.holdout) == [(1, 1)]


def test_a_given_test_is_parted_by_what_training_knows():
    whole = tables([(1, 1, None, 1), (2, 2, None, 1)], test=pa.table({"user_id": [1, 1, 3], "item_id": [2, 4, 1]}))
    got = split_given(whole)
    assert pairs(got.holdout) == [(1, 2)]
    assert got.holdout["ts_ms"].to_pylist() == [None]
    assert got.holdout_cold["reason"].to_pylist() == ["new_item", "new_user"]
    assert got.train_positives.num_rows == 2


def test_events_that_a_test_names_are_no_training_events():
    rows = [(1, 1, 0, 1), (1, 2, 1, 1), (1, 1, 2, 1), (2, 1, 3, 1)]
    by_pair = split_given(tables(rows, test=pa.table({"user_id": [1], "item_id": [1]})))
    assert pairs(by_pair.events) == [(1, 2), (2, 1)]
    assert by_pair.dropped == {"in_test": 2}
    by_time = split_given(tables(rows, test=pa.table({"user_id": [1], "item_id": [1], "ts_ms": [T + 2]})))
    assert pairs(by_time.events) == [(1, 1), (1, 2), (2, 1)]
    assert by_time.dropped == {"in_test": 1}
    assert pairs(by_time.holdout) == [(1, 1)]


def test_a_test_with_times_leaves_out_its_pairs_where_the_events_have_none():
    test = pa.table({"user_id": [1], "item_id": [1], "ts_ms": [T]})
    got = split_given(tables([(1, 1, None, 1), (1, 2, None, 1), (2, 1, None, 1)], test=test))
    assert pairs(got.events) == [(1, 2), (2, 1)]


@pytest.mark.parametrize("rule", ["time:0.5", "since:2016-07-18", "leave-one-out", "pause:3"])
def test_hold_outs_by_time_are_refused_without_one(rule):
    with pytest.raises(ConfigError, match="shop has no time; give the held-out pairs as a file with --test"):
        split(tables([(1, 1, None, 1), (1, 2, None, 1)]), parse_holdout(rule))


@pytest.mark.parametrize("day", ["2016-07-18", "2016-07-20"])
def test_a_day_that_parts_nothing_is_refused(day):
    with pytest.raises(DataError, match="the events are of 2016-07-18 to 2016-07-19"):
        split(tables([(1, 1, 0, 1), (1, 2, DAY, 1)]), parse_holdout(f"since:{day}"))


def test_a_hold_out_without_a_positive_on_both_sides_is_refused():
    with pytest.raises(DataError, match="leaves no positive to learn from"):
        split(tables([(1, 1, 0, 0), (1, 2, 1, 1)]), HoldoutRule("time", 0.9))
    with pytest.raises(DataError, match="holds no positive"):
        split(tables([(1, 1, 0, 1), (1, 2, 1, 0)]), HoldoutRule("time", 0.9))


def test_rules_are_read():
    assert parse_holdout("time:0.9") == HoldoutRule("time", 0.9)
    assert parse_holdout("since:2022-05-03") == HoldoutRule("since", day=datetime.date(2022, 5, 3))
    assert parse_holdout("leave-one-out") == HoldoutRule("leave-one-out")
    assert parse_holdout("pause:0.5") == HoldoutRule("pause", 0.5)


NO_RULES = [
    "time:1.5",
    "time:abc",
    "time:0",
    "time:nan",
    "time",
    "since:2022-13-01",
    "since:20220503",
    "last",
    "leave-one-out:2",
    "pause",
    "pause:0",
    "pause:inf",
]


@pytest.mark.parametrize("text", NO_RULES)
def test_a_rule_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--holdout"):
        parse_holdout(text)


def test_a_split_does_not_depend_on_the_order_of_rows():
    rows = [(u, i, (7 * u + 3 * i) % 11, (u * i) % 3 != 1) for u in range(6) for i in range(6)]
    for rule in (HoldoutRule("time", 0.6), HoldoutRule("leave-one-out")):
        one, other = split(tables(rows), rule), split(tables(rows[::-1]), rule)
        assert all(
            getattr(one, name).equals(getattr(other, name))
            for name in ("events", "holdout", "holdout_cold", "train_positives")
        )


def test_what_was_shown_in_the_held_out_period_is_kept_for_rankers():
    whole = tables([(1, 1, 0, 1), (1, 2, 1, 0), (1, 1, 2, 1), (1, 3, 3, 0), (2, 3, 4, 0)])
    got = split(whole, HoldoutRule("time", 0.6))
    assert got.holdout_impressions.num_rows == 3
    assert pairs(got.holdout_impressions) == [(1, 1), (1, 3), (2, 3)]
    assert got.holdout_impressions["outcome"].to_pylist() == ["clicked", "impressed", "impressed"]
    assert "event_seq" not in got.holdout_impressions.column_names
    assert got.dropped == {"held_out_not_positive": 2}


def test_without_anything_shown_in_vain_there_are_no_held_out_impressions():
    clicks = [(1, 1, 0, 1), (1, 2, 1, 1), (1, 1, 2, 1)]
    assert split(tables(clicks), HoldoutRule("time", 0.9)).holdout_impressions is None
    rejected = tables([*clicks, (1, 3, 3, 1)])
    outcome = pa.array(["clicked", "clicked", "clicked", "rank_rejected"])
    place = rejected.events.schema.get_field_index("outcome")
    rejected = replace(rejected, events=rejected.events.set_column(place, "outcome", outcome))
    assert split(rejected, HoldoutRule("time", 0.6)).holdout_impressions is None


def at_once(items=4, users=60):
    """Every user clicks every item at one time; then one more click each."""
    user, item = (a.ravel() for a in np.meshgrid(np.arange(users), np.arange(items), indexing="ij"))
    rows = {"user_id": user, "item_id": item, "ts_ms": np.full(len(user), T)}
    later = {"user_id": np.arange(users), "item_id": np.arange(users) % items, "ts_ms": np.full(users, T + 2)}
    return pa.table(rows), pa.table(later)


def test_leave_one_out_of_what_happened_at_once_holds_out_each_item_alike():
    got = split(assemble(Source("shop", at_once(users=400)[0])), HoldoutRule("leave-one-out"))
    held = np.bincount(got.holdout["item_id"].to_numpy(), minlength=4)
    assert held.sum() == 400
    assert ((held - 100) ** 2 / 100).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_leave_one_out_of_a_user_depends_on_no_other_user():
    few, many = (
        split(assemble(Source("shop", at_once(users=n)[0])), HoldoutRule("leave-one-out")).holdout for n in (3, 60)
    )
    assert few.to_pylist() == many.slice(0, 3).to_pylist()


@pytest.mark.parametrize("share", [0.5, 0.81, 0.9])
def test_a_cut_by_time_never_parts_events_of_one_instant(share):
    whole = assemble(Source("shop", pa.concat_tables(at_once())))
    if share == 0.5:  # the quantile is the first instant: all of it is held out
        with pytest.raises(DataError, match="leaves no positive to learn from, and 300 held out"):
            split(whole, HoldoutRule("time", share))
        return
    got = split(whole, HoldoutRule("time", share))
    assert got.events.num_rows == 240
    assert got.instants.to_pylist() == [T] * 240
    assert got.holdout.num_rows == 60


def test_a_day_keeps_what_happened_at_its_last_instant():
    rows = {"user_id": [1, 1, 1, 1], "item_id": [1, 2, 3, 1], "ts_ms": [T + DAY - 1] * 3 + [T + 2 * DAY]}
    got = split(assemble(Source("shop", pa.table(rows))), HoldoutRule("since", day=datetime.date(2016, 7, 19)))
    assert (got.events.num_rows, got.holdout.num_rows) == (3, 1)


def test_a_test_names_events_by_the_time_of_their_source():
    rows = pa.table({"user_id": [1] * 4 + [2], "item_id": [1, 2, 3, 4, 1], "ts_ms": [T] * 5})
    for item in (1, 2, 3, 4):
        test = pa.table({"user_id": [1], "item_id": [item], "ts_ms": [T]})
        got = split_given(assemble(Source("shop", rows, test=test)))
        assert got.dropped == {"in_test": 1}
        assert got.examples["in_test"]["item_id"] == item
        assert (1, item) not in pairs(got.events)
