import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.features.bloom import is_held_out
from twotower.features.columns import Bag
from twotower.features.options import Categorical, Feature, Features, MultiCategorical, Numeric, Vector
from twotower.samples import build as job
from twotower.samples import fitting
from twotower.samples.build import SamplesReport, build_samples
from twotower.samples.options import SamplesOptions
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import check_listing
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

DAY_MS = 86_400_000
START_MS = 1_704_067_200_000
"""2024-01-01"""
CATEGORY = Categorical("categorical")
Rows = Sequence[Mapping[str, Any]]
World = Callable[..., Path]
Build = Callable[..., Samples]


def event(
    seq: int, user: Any, item: Any, request: int | None, click: int | None = None, outcome: str = c.CLICKED, **rest: Any
) -> dict[str, Any]:
    """A joined event; times in milliseconds since 2024-01-01."""
    return {
        c.EVENT_SEQ: seq,
        c.USER_ID: user,
        c.ITEM_ID: item,
        c.REQUEST_TS_MS: None if request is None else START_MS + request,
        c.CLICK_TS_MS: None if click is None else START_MS + click,
        c.OUTCOME: outcome,
        **rest,
    }


USERS = {c.USER_ID: ["u1", "u2", "u3"]}
ITEMS = {c.ITEM_ID: [10, 20, 30]}
DAY1, DAY2, DAY3 = ("date=2024-01-01/a.parquet", "date=2024-01-02/a.parquet", "date=2024-01-03/a.parquet")


def random_log(seed: int, count: int = 60) -> list[dict[str, Any]]:
    """Events of three users within a second of each other, with ties and clicks that come after later requests."""
    rng = random.Random(seed)
    rows = []
    for seq in range(count):
        request = rng.randrange(20)
        clicked = rng.random() < 0.7
        click = request + rng.randrange(8) if clicked else None
        user = rng.choice(USERS[c.USER_ID])
        outcome = c.CLICKED if clicked else c.IMPRESSED
        rows.append(event(seq, user, rng.choice(ITEMS[c.ITEM_ID]), request, click, outcome))
    return rows


def histories(samples: Samples) -> list[tuple[str, int, int, list[int]]]:
    """User, item, time and the items clicked before, of every positive in order."""
    rows, clicks = samples.positives, samples.clicks
    users, items = samples.users.ids.to_pylist(), samples.items.ids.to_pylist()
    found = []
    for user, item, count, ts in zip(rows.user_row, rows.item_row, rows.history, rows.ts_ms, strict=True):
        start = clicks.indptr[user]
        before = [items[row] for row in clicks.item_row[start : start + count]]
        found.append((users[user], items[item], int(ts) - START_MS, before))
    return found


def brute_force(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int, int, list[int]]]:
    clicks = [row for row in rows if row[c.OUTCOME] == c.CLICKED]
    by_click = sorted(clicks, key=lambda row: (row[c.CLICK_TS_MS], row[c.EVENT_SEQ]))
    found = []
    for row in sorted(clicks, key=lambda row: (row[c.REQUEST_TS_MS], row[c.EVENT_SEQ])):
        ts = row[c.REQUEST_TS_MS]
        before = [e[c.ITEM_ID] for e in by_click if e[c.USER_ID] == row[c.USER_ID] and e[c.CLICK_TS_MS] < ts]
        found.append((row[c.USER_ID], row[c.ITEM_ID], ts - START_MS, before))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_history_is_what_the_user_clicked_before_the_request(world: World, build: Build, seed: int) -> None:
    rows = random_log(seed)
    assert histories(build(world(USERS, ITEMS, {DAY1: rows}))) == brute_force(rows)


def test_a_click_that_came_after_the_next_request_is_not_in_its_history(world: World, build: Build) -> None:
    rows = [
        event(0, "u1", 10, 0, 50),
        event(1, "u1", 20, 50, 51),
        event(2, "u1", 30, 51, 60),
        event(3, "u1", 10, 90, 90),
    ]
    assert [before for *_, before in histories(build(world(USERS, ITEMS, {DAY1: rows})))] == [
        [],
        [],
        [10],
        [10, 20, 30],
    ]


def test_clicks_are_packed_by_user_in_the_order_of_time(world: World, build: Build) -> None:
    rows = [event(0, "u3", 10, 0, 9), event(1, "u3", 20, 1, 5), event(2, "u1", 30, 2, 2), event(3, "u3", 30, 3, 5)]
    clicks = build(world(USERS, ITEMS, {DAY1: rows})).clicks
    assert clicks.indptr.tolist() == [0, 1, 1, 4]
    assert clicks.item_row.tolist() == [2, 1, 2, 0]
    assert (clicks.ts_ms - START_MS).tolist() == [2, 5, 5, 9]


def test_positives_stand_in_the_order_of_time_then_event(world: World, build: Build) -> None:
    rows = [event(5, "u1", 10, 7, 7), event(3, "u2", 20, 7, 7), event(9, "u3", 30, 1, 1)]
    positives = build(world(USERS, ITEMS, {DAY1: rows})).positives
    assert positives.user_row.tolist() == [2, 1, 0]
    assert (positives.ts_ms - START_MS).tolist() == [1, 7, 7]


def days() -> dict[str, list[dict[str, Any]]]:
    return {
        DAY1: [event(0, "u1", 10, 0, 1)],
        DAY2: [event(1, "u1", 20, DAY_MS, DAY_MS + 1), event(2, "u2", 10, DAY_MS, DAY_MS + 1)],
        DAY3: [event(3, "u1", 30, 2 * DAY_MS, 2 * DAY_MS + 1)],
    }


def test_histories_reach_back_before_the_first_day_and_end_with_the_last(world: World, build: Build) -> None:
    samples = build(world(USERS, ITEMS, days()), first_day="2024-01-02", last_day="2024-01-02")
    assert histories(samples) == [("u1", 20, DAY_MS, [10]), ("u2", 10, DAY_MS, [])]
    assert samples.clicks.indptr.tolist() == [0, 2, 3, 3]
    assert samples.item_positives.tolist() == [1, 1, 0]
    assert samples.manifest["watermark_ms"] == START_MS + DAY_MS + 1
    assert samples.manifest["events"] == 3


def test_only_users_and_items_with_a_positive_in_the_range_have_rows_of_their_own(world: World, build: Build) -> None:
    samples = build(world(USERS, ITEMS, days()), first_day="2024-01-03")
    vocabularies = samples.features.vocabularies
    assert vocabularies["user_id"].values.to_pylist() == ["u1"]
    assert vocabularies["item_id"].values.to_pylist() == [30]
    assert [samples.manifest[name] for name in ("users", "items", "positives")] == [1, 1, 1]
    user_ids, item_ids = samples.users.features["user_id"], samples.items.features["item_id"]
    assert np.asarray(user_ids).tolist() == [2, 1, 1]
    assert np.asarray(item_ids).tolist() == [1, 1, 2]


def test_the_report_counts_every_event_once(world: World) -> None:
    rows = [
        event(0, "u1", 10, 0, 1),
        event(1, "u1", 20, 0, None, c.IMPRESSED),
        event(2, "u1", 30, 0, None, c.PRE_RANK_REJECTED),
        event(3, "nobody", 10, 0, 1),
        event(4, "nobody", 99, 0, 1),
        event(5, "u2", 99, 5, 8),
        event(6, None, 10, 5, 8),
        event(7, "u2", 20, 5, 7),
    ]
    workspace = world(USERS, ITEMS, {DAY1: rows})
    report = build_samples(workspace, workspace / "samples", Features(), 8)
    assert report == SamplesReport(
        path=str(workspace / "samples"),
        events=8,
        outcomes={c.PRE_RANK_REJECTED: 1, c.IMPRESSED: 1, c.CLICKED: 6},
        positives=2,
        users=2,
        items=2,
        rows_fed=2,
        with_hard=0.5,
        used={
            c.PRE_RANK_REJECTED: {"hard_negative": 1},
            c.IMPRESSED: {"not_used": 1},
            c.CLICKED: {"unknown_user": 2, "unknown_item": 1, "null_id": 1, "positive": 2},
        },
        deciles={"before": [1, 1, *[0] * 8], "after": [1, 1, *[0] * 8]},
        held_out={"users": 0, "clicks": 0},
        dropped={"null_id": 1, "unknown_item": 1, "unknown_user": 2},
        watermark_ms=START_MS + 8,
        last_day="2024-01-01",
    )


@pytest.mark.parametrize("timed", [True, False])
def test_the_order_of_rows_and_files_changes_no_byte(world: World, build: Build, timed: bool) -> None:
    rng = random.Random(1)
    rows = [
        {**row, "hour": rng.choice([1, 2, None]), "price": rng.random(), "tags": rng.choice(["a|b", "c", None])}
        for row in random_log(2)
    ]
    if not timed:
        rows = [{**row, c.REQUEST_TS_MS: None, c.CLICK_TS_MS: None} for row in rows]
    context: dict[str, Feature] = {
        "hour": CATEGORY,
        "price": Numeric("numeric"),
        "tags": MultiCategorical("multi_categorical", "|"),
    }
    day = DAY1 if timed else "date=unknown/a.parquet"
    shuffled = rng.sample(rows, len(rows))
    one = build(world(USERS, ITEMS, {day: rows}, "one"), Features(context=context))
    files = {day.replace("a.p", "z.p"): shuffled[:20], day: shuffled[20:30], day.replace("a.p", "b.p"): shuffled[30:]}
    users, items = ({name: column[::-1] for name, column in table.items()} for table in (USERS, ITEMS))
    two = build(world(users, items, files, "two"), Features(context=context))
    assert one.manifest == two.manifest
    assert {path.name for path in one.path.iterdir()} == {*one.manifest["files"], "manifest.json"}
    for path in one.path.iterdir():
        assert path.read_bytes() == (two.path / path.name).read_bytes(), path.name


def test_without_time_positives_and_clicks_stand_in_one_order_and_have_no_history(world: World, build: Build) -> None:
    rows = [event(0, "u3", 20, None), event(1, "u1", 30, None), event(2, "u3", 10, None), event(3, "u3", 20, None)]
    samples = build(world(USERS, ITEMS, {"date=unknown/a.parquet": rows}))
    assert not samples.timed
    assert samples.positives.history.tolist() == [-1] * 4
    assert samples.positives.user_row.tolist() == [0, 2, 2, 2]
    assert samples.positives.item_row.tolist() == samples.clicks.item_row.tolist() == [2, 0, 1, 1]
    assert samples.clicks.indptr.tolist() == [0, 1, 1, 4]
    assert samples.manifest["watermark_ms"] is None


def test_context_of_every_kind_is_stored_as_it_is_encoded(world: World, build: Build) -> None:
    rows = [
        event(0, "u1", 10, 0, 0, hour=3, price=1.0, level=5, tags="a|b", likes=["x"], face=[1.0, 2.0], seen=[9]),
        event(1, "u1", 20, 1, 1, hour=None, price=None, level=None, tags=None, likes=None, face=None, seen=[9]),
        event(2, "u2", 10, 2, 2, hour=8, price=3.0, level=7, tags="b", likes=[], face=[3.0, 4.0], seen=[9]),
    ]
    context: dict[str, Feature] = {
        "hour": CATEGORY,
        "price": Numeric("numeric"),
        "level": Numeric("numeric", "buckets", 2),
        "tags": MultiCategorical("multi_categorical", "|"),
        "likes": MultiCategorical("multi_categorical"),
        "face": Vector("vector", 2),
    }
    samples = build(world(USERS, ITEMS, {DAY1: rows}), Features(context=context))
    found = samples.positives.context
    assert np.asarray(found["hour"]).tolist() == [2, 0, 3]
    assert np.asarray(found["price"]).tolist() == [[-1, 0], [0, 1], [1, 0]]
    assert np.asarray(found["level"]).tolist() == [2, 0, 3]
    assert np.asarray(found["face"]).tolist() == [[1, 2, 0], [0, 0, 1], [3, 4, 0]]
    tags, likes = found["tags"], found["likes"]
    assert isinstance(tags, Bag)
    assert isinstance(likes, Bag)
    assert (tags.indptr.tolist(), tags.rows.tolist()) == ([0, 2, 3, 4], [2, 3, 0, 3])
    assert (likes.indptr.tolist(), likes.rows.tolist()) == ([0, 1, 2, 3], [2, 0, 0])


OURS = ["user_row", "item_row", "at", "ts_ms", "history", "day", "rank", "rows", "in_range", "weighed_by", "copies"]
"""Names that the job uses inside."""
ODD = ["a.b", "two words", 'say "hi"', "`tick`", "über", "__x", "events_file", "events_file_", "_metadata"]


def test_a_context_column_may_have_a_name_of_ours(world: World, build: Build) -> None:
    names = [*OURS, *ODD]
    own = {name: place % 2 for place, name in enumerate(names)}
    rows = [event(0, "u1", 10, 0, 0, weight=4.0, **own), event(1, "u2", 20, 5, 5, weight=2.0, **own)]
    features = Features({"age": CATEGORY}, context=dict.fromkeys(names, CATEGORY))
    samples = build(world({**USERS, "age": [1, 2, 3]}, ITEMS, {DAY1: rows}), features, weight="weight")
    assert sorted(samples.positives.context) == sorted(names)
    assert samples.positives.weight.tolist() == [4.0, 2.0]
    assert samples.positives.item_row.tolist() == [0, 1]
    assert samples.positives.user_row.tolist() == [0, 1]
    assert samples.manifest["items"] == 2
    assert all(len(np.unique(np.asarray(column))) == 1 for column in samples.positives.context.values())


def test_columns_that_are_not_configured_change_no_sample(world: World, build: Build) -> None:
    rows = [event(0, "u1", 10, 0, 0), event(1, "u2", 20, 5, 5)]
    plain = build(world(USERS, ITEMS, {DAY1: rows}))
    own = {name: [1, 2, 3] for name in [*OURS, *ODD, "Foo", "foo"]}
    more = [{**row, **dict.fromkeys(own, 7), "score": "high", c.POSITION: "top"} for row in rows]
    users = {**USERS, **own, "User_ID": [1, 1, 1], c.OUTCOME: ["x"] * 3}
    other = build(world(users, {**ITEMS, **own, "ITEM_ID": ["a"] * 3}, {DAY1: more[:1], DAY2: more[1:]}, "other"))
    assert histories(plain) == histories(other)
    assert plain.manifest["files"]["users.arrow"] == other.manifest["files"]["users.arrow"]


@pytest.mark.parametrize("days", [1, 2])
def test_columns_that_an_engine_takes_for_one_are_refused(days: int, world: World, build: Build) -> None:
    rows = [event(0, "u1", 10, 0, 0, User_ID=3), event(1, "u2", 20, DAY_MS, DAY_MS, User_ID=3)]
    with pytest.raises(DataError, match=r"has the columns user_id and User_ID, which engines take for one"):
        build(world(USERS, ITEMS, {DAY1: rows}))
    rows = [event(0, "u1", 10, 0, 0, scene=3), event(1, "u2", 20, DAY_MS, DAY_MS, Scene=3)]
    with pytest.raises(DataError, match=r"events has the columns Scene and scene, which"):
        build(world(USERS, ITEMS, {DAY1: rows[:1], DAY2: rows[1:]}, "b"), Features(context={"scene": CATEGORY}))


FUTURE = 3473 * DAY_MS
"""2033-07-05"""
NOW = START_MS + 3 * DAY_MS


def test_a_time_beyond_now_is_counted_and_rules_nothing(world: World, build: Build) -> None:
    poison = [
        event(100, "u3", 30, FUTURE, FUTURE),
        event(101, "u1", 20, DAY_MS + 1, FUTURE),
        event(102, "u3", 30, FUTURE + 5, None, c.IMPRESSED),
        event(103, "u3", 30, FUTURE + 9, 5),
    ]
    files = days()
    plain = build(world(USERS, ITEMS, files), days=2, clock_ms=lambda: NOW)
    files[DAY2] = [*files[DAY2], poison[1]]
    files["date=2033-07-05/a.parquet"] = [poison[0], *poison[2:]]
    samples = build(world(USERS, ITEMS, files, "poisoned"), days=2, clock_ms=lambda: NOW)
    assert samples.manifest["dropped"] == {"beyond_now": 4}
    assert samples.manifest["used"][c.IMPRESSED] == {"beyond_now": 1}
    assert (
        histories(samples)
        == histories(plain)
        == [
            ("u1", 20, DAY_MS, [10]),
            ("u2", 10, DAY_MS, []),
            ("u1", 30, 2 * DAY_MS, [10, 20]),
        ]
    )
    for name in ("watermark_ms", "last_day", "positives", "items"):
        assert samples.manifest[name] == plain.manifest[name], name
    assert samples.manifest["last_day"] == "2024-01-03"


def test_a_later_clock_gives_the_rows_that_have_come_to_pass(world: World, build: Build) -> None:
    workspace = world(USERS, ITEMS, days())
    before = build(workspace, clock_ms=lambda: START_MS + DAY_MS + 1)
    assert (before.manifest["positives"], before.manifest["dropped"]) == (3, {"beyond_now": 1})
    assert (before.manifest["watermark_ms"], before.manifest["last_day"]) == (START_MS + DAY_MS + 1, "2024-01-02")
    after = build(workspace, clock_ms=lambda: NOW)
    assert (after.manifest["positives"], after.manifest["dropped"]) == (4, {})


def test_events_that_are_all_beyond_now_are_refused(world: World, build: Build) -> None:
    with pytest.raises(DataError, match=r"all 4 rows are later than now, 2023-12-31 23:59:59 UTC: mend their times"):
        build(world(USERS, ITEMS, days()), days=1, clock_ms=lambda: START_MS - 1)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (["top", "2"], "events: column position is of type string, where rankers need int32"),
        ([[1], [2]], "events: column position is of type list<element: int64>, where rankers need int32"),
        ([1.5, 2.0], "events: 1 rows have a position that is no whole number"),
        ([-1, 2], "events: 1 rows have a position that is no whole number"),
        ([2**40, 2], "events: 1 rows have a position that is no whole number"),
        ([float("inf"), None], "events: 1 rows have a position that is no whole number"),
    ],
)
def test_positions_of_another_type_are_refused_where_rankers_read_them(
    positions: list[Any], message: str, world: World, build: Build
) -> None:
    rows = [
        event(0, "u1", 10, 0, 0, position=positions[0]),
        event(1, "u1", 20, 0, None, c.IMPRESSED, position=positions[1]),
    ]
    workspace = world(USERS, ITEMS, {DAY1: rows})
    assert build(workspace).manifest["positives"] == 1
    with pytest.raises(DataError) as error:
        build(workspace, impressions=True)
    assert message in str(error.value)


def test_positions_of_whole_numbers_with_a_point_are_read(world: World, build: Build) -> None:
    rows = [event(0, "u1", 10, 0, 0, position=2.0), event(1, "u1", 20, 0, None, c.IMPRESSED, position=None)]
    shown = build(world(USERS, ITEMS, {DAY1: rows}), impressions=True).impressions
    assert shown is not None
    assert shown.position.tolist() == [0, 2]


def test_a_context_column_may_be_absent_from_some_days_but_not_from_all(world: World, build: Build) -> None:
    files = {DAY1: [event(0, "u1", 10, 0, 0)], DAY2: [event(1, "u1", 20, DAY_MS, DAY_MS, scene="home")]}
    workspace = world(USERS, ITEMS, files)
    samples = build(workspace, Features(context={"scene": CATEGORY}))
    assert np.asarray(samples.positives.context["scene"]).tolist() == [0, 2]
    with pytest.raises(
        ConfigError, match=r"features\.context\.scenes: no such column in events/; there are click_ts_ms"
    ):
        build(workspace, Features(context={"scenes": CATEGORY}))


def test_numbers_of_a_large_log_are_fitted_to_a_fair_sample(
    world: World, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_FITTED_NUMBERS", 500)
    rows = [event(seq, "u1", 10, seq, seq, price=float(seq % 10)) for seq in range(5000)]
    samples = build(world(USERS, ITEMS, {DAY1: rows}), Features(context={"price": Numeric("numeric")}))
    [price] = samples.features.context
    assert vars(price)["mean"] == pytest.approx(4.5, abs=3 * 2.9 / 500**0.5)
    assert vars(price)["mean"] != 4.5


def test_a_weight_column_weighs_positives(world: World, build: Build) -> None:
    rows = [
        event(0, "u1", 10, 0, 0, stars=5),
        event(1, "u1", 20, 1, 1, stars=0),
        event(2, "u2", 20, 2, None, c.IMPRESSED, stars=None),
    ]
    workspace = world(USERS, ITEMS, {DAY1: rows})
    assert build(workspace, weight="stars").positives.weight.tolist() == [5, 0]
    assert build(workspace).positives.weight.tolist() == [1, 1]


def test_string_ids_that_look_like_integers_stay_strings(world: World, build: Build) -> None:
    users, items = {c.USER_ID: ["10", "9", "1"]}, {c.ITEM_ID: pa.array(["2", "10"], pa.large_string())}
    samples = build(world(users, items, {DAY1: [event(0, "9", "10", 0, 0)]}))
    assert samples.users.ids.to_pylist() == ["1", "10", "9"]
    assert samples.positives.user_row.tolist() == [2]
    assert samples.positives.item_row.tolist() == [0]


def test_folders_above_the_workspace_are_no_partitions(world: World, build: Build) -> None:
    workspace = world(USERS, ITEMS, days(), "date=1999-01-01/user_id=5/w [v2] *?")
    samples = build(workspace, first_day="2024-01-03")
    assert histories(samples) == [("u1", 30, 2 * DAY_MS, [10, 20])]


def test_a_column_named_date_in_the_files_is_not_the_partition(world: World, build: Build) -> None:
    rows = [event(0, "u1", 10, 0, 0, date="1999-01-01", filename="x")]
    samples = build(world(USERS, ITEMS, {DAY1: rows}), first_day="2024-01-01")
    assert len(samples.positives) == 1


def test_columns_are_mapped_contiguous_and_never_copied(world: World, build: Build) -> None:
    workspace = world(USERS, ITEMS, {DAY1: random_log(3)})
    build(workspace)
    before = pa.total_allocated_bytes()
    samples = open_samples(workspace / "samples")
    assert pa.total_allocated_bytes() == before
    rows, clicks = samples.positives, samples.clicks
    for column in (rows.user_row, rows.item_row, rows.history, rows.weight, rows.ts_ms, clicks.item_row, clicks.ts_ms):
        assert column.flags.c_contiguous
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_an_interrupted_build_leaves_the_old_samples_whole(
    world: World, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = world(USERS, ITEMS, {DAY1: random_log(4)})
    old = build(workspace)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_clicks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(workspace)
    assert check_listing(old.path, old.manifest["files"]) == []
    assert histories(open_samples(old.path)) == brute_force(random_log(4))
    assert sorted(path.name for path in workspace.iterdir()) == ["events", "items.parquet", "samples", "users.parquet"]


def test_the_manifest_tells_a_flipped_byte(world: World, build: Build) -> None:
    samples = build(world(USERS, ITEMS, {DAY1: random_log(5)}))
    listing = json.loads((samples.path / "manifest.json").read_text())["files"]
    assert check_listing(samples.path, listing) == []
    damaged = bytearray((samples.path / "positives.arrow").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (samples.path / "positives.arrow").write_bytes(damaged)
    assert check_listing(samples.path, listing) == ["positives.arrow does not have the SHA-256 of the manifest"]


GOOD = event(0, "u1", 10, 0, 1)
LATER = {**event(1, "u1", 20, DAY_MS, DAY_MS + 1)}
SECONDS = START_MS // 1000
REFUSED: list[tuple[str, list[dict[str, Any]], str]] = [
    ("seconds", [{**GOOD, c.REQUEST_TS_MS: SECONDS, c.CLICK_TS_MS: SECONDS}], "column request_ts_ms holds 1704067200"),
    ("seconds of clicks", [GOOD, {**LATER, c.CLICK_TS_MS: SECONDS}], "column click_ts_ms holds 1704067200, where"),
    ("microseconds", [{**GOOD, c.CLICK_TS_MS: START_MS * 1000}], "looks like microseconds: divide by 1000"),
    ("some without time", [GOOD, event(1, "u1", 20, None)], "1 of 2 rows have no request_ts_ms: give all a time, or"),
    ("a click without time", [GOOD, event(1, "u1", 20, 5)], "events: 1 clicked rows have no click_ts_ms"),
    ("a click of untimed data with time", [event(0, "u1", 10, None, 5)], "1 rows have a click_ts_ms and no request_ts"),
    ("a click before its request", [event(0, "u1", 10, 5, 4)], "1 rows have a click_ts_ms before their request_ts_ms"),
    ("no number of the event", [{**GOOD, c.EVENT_SEQ: None}], "events: 1 clicked rows have no event_seq"),
    (
        "a file twice",
        [GOOD, GOOD, LATER, LATER],
        "2 clicks are there more than once, by user, item and event_seq, such",
    ),
    ("an outcome that is none", [{**GOOD, c.OUTCOME: "seen"}], "events, column outcome holds ['seen']; an outcome is"),
    ("no outcome", [GOOD, {**LATER, c.OUTCOME: None}], "events, column outcome holds [None]"),
    ("no click", [event(0, "u1", 10, 0, None, c.IMPRESSED)], "no positive in 1 events (outcomes: {'impressed': 1}"),
    ("unknown users alone", [event(0, "x", 10, 0, 1)], "dropped: {'unknown_user': 1}"),
    (
        "numbers as user ids",
        [{**GOOD, c.USER_ID: 5}],
        "events: user_id is of type int64, in users.parquet it is string",
    ),
    ("fractions as item ids", [{**GOOD, c.ITEM_ID: 1.5}], "events: item_id is of type double, in items.parquet it is"),
    (
        "a missing column",
        [{k: v for k, v in GOOD.items() if k != c.OUTCOME}],
        "a.parquet has no column outcome; it has",
    ),
    ("a weight of null", [{**GOOD, "weight": None}], "events: 1 clicked rows have no weight that is a finite number"),
    ("a weight of nan", [{**GOOD, "weight": float("nan")}], "1 clicked rows have no weight that is a finite number"),
    ("a negative weight", [{**GOOD, "weight": -1.0}], "1 clicked rows have no weight that is a finite number"),
    (
        "a weight that is text",
        [{**GOOD, "weight": "5"}],
        "events: column weight is of type string, where numbers are expected",
    ),
]


@pytest.mark.parametrize(("rows", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_events_that_are_wrong_are_refused(
    world: World, build: Build, rows: list[dict[str, Any]], message: str
) -> None:
    types = {} if any(isinstance(row.get("weight"), str | float) for row in rows) else {"weight": pa.float32()}
    weight = "weight" if "weight" in rows[0] else None
    with pytest.raises(DataError) as error:
        build(world(USERS, ITEMS, {DAY1: rows}, types=types), weight=weight)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        (
            c.REQUEST_TS_MS,
            pa.timestamp("ms"),
            "column request_ts_ms is of type timestamp[ms], where int64 millis",
        ),
        (c.CLICK_TS_MS, pa.float64(), "column click_ts_ms is of type double, where int64 milliseconds"),
        (c.EVENT_SEQ, pa.string(), "column event_seq is of type string, where int64 is expected"),
        (c.OUTCOME, pa.int64(), "column outcome is of type int64, where strings are expected"),
    ],
)
def test_columns_of_another_type_are_refused(
    world: World, build: Build, column: str, kind: pa.DataType, message: str
) -> None:
    workspace = world(USERS, ITEMS, {DAY1: [GOOD]})
    table = pq.ParquetFile(workspace / "events" / DAY1).read()
    values = pa.array([5]).cast(kind)
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, workspace / "events" / DAY1)
    with pytest.raises(DataError) as error:
        build(workspace)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("first_day", "last_day", "message"),
    [
        (
            "2024-01-04",
            None,
            "no events from samples.first_day = 2024-01-04 to samples.last_day = 2024-01-03: there are",
        ),
        (None, "2023-12-31", "there are days from 2024-01-01 to 2024-01-03"),
        ("2024-01-03", "2024-01-02", "samples.first_day = 2024-01-03 is after samples.last_day = 2024-01-02"),
    ],
)
def test_days_that_the_log_does_not_have_are_refused(
    world: World, build: Build, first_day: str | None, last_day: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(world(USERS, ITEMS, days()), first_day=first_day, last_day=last_day)


def test_the_last_days_are_counted_back_from_the_last(world: World, build: Build) -> None:
    workspace = world(USERS, ITEMS, days())
    for some, same in (
        ({"days": 1}, {"first_day": "2024-01-03"}),
        ({"days": 2}, {"first_day": "2024-01-02"}),
        ({"days": 1, "last_day": "2024-01-02"}, {"first_day": "2024-01-02", "last_day": "2024-01-02"}),
        ({"days": 9}, {"first_day": "2023-12-26"}),
    ):
        assert histories(build(workspace, **some)) == histories(build(workspace, **same))


def test_two_beginnings_are_refused(world: World, build: Build) -> None:
    with pytest.raises(ValueError, match="both choose a beginning: give one"):
        build(world(USERS, ITEMS, days()), first_day="2024-01-03", days=1)


def test_the_last_days_of_data_without_time_are_refused(world: World, build: Build) -> None:
    with pytest.raises(ConfigError, match=r"samples\.days chooses by time, but the events have none"):
        build(world(USERS, ITEMS, {"date=unknown/a.parquet": [event(0, "u1", 10, None)]}), days=1)


def test_days_around_the_whole_log_are_the_whole_log(world: World, build: Build) -> None:
    samples = build(world(USERS, ITEMS, days()), first_day="2020-01-01", last_day="2030-01-01")
    assert len(samples.positives) == 4


@pytest.mark.parametrize("path", ["date=unknown/a.parquet", DAY1])
@pytest.mark.parametrize("day", ["first_day", "last_day"])
def test_days_of_data_without_time_are_refused(world: World, build: Build, path: str, day: str) -> None:
    workspace = world(USERS, ITEMS, {path: [event(0, "u1", 10, None)]})
    with pytest.raises(ConfigError, match="choose by time, but the events have none: leave them out"):
        build(workspace, **{day: "2024-01-01"})


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"events has no date=\*/\*\.parquet"),
        ({"date=2024-1-5/a.parquet": [GOOD]}, "has a partition date=2024-1-5: a day is written YYYY-MM-DD, or unknown"),
        (
            {DAY1: [GOOD], "date=unknown/a.parquet": [GOOD]},
            "has days and date=unknown: give all events a time, or none",
        ),
    ],
)
def test_partitions_that_are_no_days_are_refused(
    world: World, build: Build, files: dict[str, list[dict[str, Any]]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build(world(USERS, ITEMS, files))


def test_files_that_are_no_parquet_are_refused(world: World, build: Build, tmp_path: Path) -> None:
    workspace = world(USERS, ITEMS, {DAY1: [GOOD]})
    (workspace / "events" / DAY1).write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a\.parquet is no readable Parquet file"):
        build(workspace)
    (workspace / "users.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"users\.parquet is no readable Parquet file"):
        build(workspace)
    (workspace / "users.parquet").unlink()
    with pytest.raises(DataError, match=r"users\.parquet does not exist: import or simulate a workspace first"):
        build(workspace)


def test_a_catalogue_of_one_item_is_refused_and_a_single_user_is_enough(world: World, build: Build) -> None:
    one = {c.ITEM_ID: [10]}
    with pytest.raises(DataError, match=r"items\.parquet has one item: there is nothing to choose from"):
        build(world(USERS, one, {DAY1: [GOOD]}, "one_item"))
    assert len(build(world({c.USER_ID: ["u1"]}, ITEMS, {DAY1: [GOOD]}, "one_user")).positives) == 1


def test_a_folder_without_samples_is_refused(tmp_path: Path, world: World, build: Build) -> None:
    with pytest.raises(DataError, match=r"manifest\.json does not exist"):
        open_samples(tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "samples", "format": 0}')
    with pytest.raises(DataError, match="holds no samples of format 3: build them again"):
        open_samples(tmp_path)
    samples = build(world(USERS, ITEMS, {DAY1: [GOOD]}))
    (samples.path / "clicks.arrow").unlink()
    with pytest.raises(DataError, match=r"clicks\.arrow does not exist"):
        open_samples(samples.path)


def test_held_out_users_have_histories_and_no_positives_and_are_counted(tmp_path: Path) -> None:
    simulate_workspace(tmp_path / "world", WorldOptions(users=100, items=100, days=2, seed=3))
    features = Features(
        user={"user_id": Categorical(kind="categorical")}, item={"item_id": Categorical(kind="categorical")}
    )
    for share in (0.0, 0.3):
        options = SamplesOptions(held_out_users=share)
        report = build_samples(tmp_path / "world", tmp_path / "samples", features, 8, options)
        samples = open_samples(tmp_path / "samples")
        out = is_held_out(samples.users.ids, share)
        trained = np.isin(np.arange(len(samples.users)), samples.positives.user_row)
        assert not (out & trained).any()
        clicks = np.diff(samples.clicks.indptr)
        assert (clicks[out] > 0).any() == bool(share)
        assert report.held_out == {"users": out.sum(), "clicks": clicks[out].sum()}
        of_clicked = {"positive": report.positives} | ({"held_out": clicks[out].sum()} if share else {})
        assert report.used["clicked"] == of_clicked
        known = samples.features.vocabularies["user_id"].values
        assert not pc.any(pc.is_in(known, samples.users.ids.filter(pa.array(out)))).as_py()
