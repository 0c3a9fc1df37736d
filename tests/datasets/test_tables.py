import datetime
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.datasets.sources import UNTYPED
from twotower.datasets.tables import Source, assemble, parse_positive, plain, tie_hash
from twotower.schema.errors import ConfigError, DataError

T = 1_500_000_000_000


def tie(user_id, item_id):
    """The hash that orders the items of one time."""
    return int(tie_hash(pa.chunked_array([[user_id]]), pa.chunked_array([[item_id]]))[0])


CLICKED = ["clicked"]


def source(**columns):
    return Source("shop", pa.table(columns))


def three():
    return source(user_id=[1, 1, 2], item_id=[7, 8, 7], ts_ms=[T, T + 5, T + 3])


def test_the_common_form_of_plain_clicks():
    tables = assemble(three())
    assert tables.events.to_pydict() == {
        "event_seq": [0, 1, 2],
        "request_id": [None, None, None],
        "user_id": [1, 2, 1],
        "item_id": [7, 7, 8],
        "request_ts_ms": [T, T + 3, T + 5],
        "click_ts_ms": [T, T + 3, T + 5],
        "outcome": ["clicked"] * 3,
        "weight": [None, None, None],
    }
    assert tables.users.to_pydict() == {"user_id": [1, 2]}
    assert tables.items.to_pydict() == {"item_id": [7, 8]}
    assert tables.dropped == {}


def test_only_clicked_rows_have_a_click_time():
    events = assemble(source(user_id=[1, 1], item_id=[7, 8], ts_ms=[T, T + 1], outcome=["impressed", "clicked"])).events
    assert events["click_ts_ms"].to_pylist() == [None, T + 1]


def test_without_a_time_the_times_are_null_and_the_order_is_that_of_the_ids():
    events = assemble(source(user_id=["b", "a", "a"], item_id=[1, 2, 1])).events
    assert events.select(["user_id", "item_id"]).to_pydict() == {"user_id": ["a", "a", "b"], "item_id": [1, 2, 1]}
    assert events["request_ts_ms"].null_count == events["click_ts_ms"].null_count == 3


def test_tied_times_of_a_user_rise_by_a_millisecond_in_the_sources_order():
    tied = source(user_id=[1, 1, 1, 1, 2], item_id=[1, 2, 3, 4, 1], ts_ms=[T, T, T, T + 1, T], seq=[2, 1, 0, 3, 0])
    events = assemble(replace(tied, order=("seq",))).events
    assert "seq" not in events.column_names
    mine = events.filter(pa.array(np.asarray(events["user_id"]) == 1))
    assert mine["item_id"].to_pylist() == [3, 2, 1, 4]
    assert mine["request_ts_ms"].to_pylist() == [T, T + 1, T + 2, T + 3]
    assert events.filter(pa.array(np.asarray(events["user_id"]) == 2))["request_ts_ms"].to_pylist() == [T]


def test_without_a_finer_order_ties_are_broken_by_a_hash_so_that_no_item_is_always_the_last():
    user, item = (a.ravel() for a in np.meshgrid(np.arange(400), np.arange(4), indexing="ij"))
    for ids in (item, np.array(["a", "b", "c", "d"])[item]):
        events = assemble(source(user_id=user, item_id=ids, ts_ms=np.full(len(user), T))).events
        assert np.array_equal(events["request_ts_ms"], T + np.arange(4).repeat(400))
        last = np.unique(events["item_id"].to_numpy()[-400:], return_counts=True)[1]
        assert ((last - 100) ** 2 / 100).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_rows_of_one_request_keep_one_time_and_the_next_request_is_later():
    pages = source(user_id=[1, 1, 1, 1], item_id=[4, 5, 6, 7], ts_ms=[T, T, T, T], request_id=["p", "p", "q", None])
    events = assemble(replace(pages, requests_have_rows=True)).events
    by_item = dict(zip(events["item_id"].to_pylist(), events["request_ts_ms"].to_pylist(), strict=True))
    # the order of ties is that of items: p, p, q, and the row without a request is one of its own
    assert by_item == {4: T, 5: T, 6: T + 1, 7: T + 2}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=30),
    seed=st.integers(0, 5),
)
def test_times_rise_within_a_user_as_in_the_recursion_and_row_order_does_not_matter(rows, seed):
    rows = [*rows, (9, 100, 0), (9, 101, 0)]  # at least two items
    user, item, ts_ms = (np.array(column) for column in zip(*rows, strict=True))
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    events = assemble(source(user_id=user, item_id=item, ts_ms=ts_ms + T)).events
    again = assemble(source(user_id=user[shuffled], item_id=item[shuffled], ts_ms=ts_ms[shuffled] + T)).events
    assert events.equals(again)
    expected = []
    for u in sorted(set(user.tolist())):
        last = -1
        for t, _, i in sorted({(int(t), tie(int(u), int(i)), int(i)) for who, i, t in rows if who == u}):
            last = max(t, last + 1)
            expected.append((last + T, u, i))
    got = zip(*(events[name].to_pylist() for name in ("request_ts_ms", "user_id", "item_id")), strict=True)
    assert list(got) == sorted(expected)


def test_times_far_apart_of_many_users_do_not_overflow():
    users = np.repeat(np.arange(300_000), 2)
    times = np.where(np.arange(len(users)) % 2, 4_000_000_000_000, 400_000_000_000)
    rows = source(user_id=users, item_id=np.arange(len(users)) % 2, ts_ms=times)
    events = assemble(rows, clock_ms=lambda: 4_000_000_000_000).events
    assert sorted(set(events["request_ts_ms"].to_pylist())) == [400_000_000_000, 4_000_000_000_000]


def test_a_minimum_makes_lower_ratings_impressions_and_the_rating_is_the_weight():
    rated = Source("shop", pa.table({"user_id": [1, 1], "item_id": [1, 2], "weight": [3, 4]}), minimum=4.0)
    events = assemble(rated).events
    assert events["outcome"].to_pylist() == ["impressed", "clicked"]
    assert events["weight"].to_pylist() == [3.0, 4.0]
    assert events.schema.field("weight").type == pa.float32()


def test_context_columns_follow_and_are_of_plain_types():
    scene = pa.array(["a", "b"]).dictionary_encode()
    events = assemble(source(user_id=[1, 2], item_id=[1, 2], hour=pa.array([3, 4], pa.int8()), scene=scene)).events
    assert events.column_names[-2:] == ["hour", "scene"]
    assert events.schema.field("hour").type == pa.int64()
    assert events.schema.field("scene").type == pa.string()


def test_every_unusable_row_is_dropped_under_its_reason():
    shop = source(
        user_id=[1, None, 1, 1, 1, 1, 5, 1, 1],
        item_id=[1, 1, 2, 2, 2, 2, 1, 9, 2],
        ts_ms=[T, T, None, T, T, T, T, T, T + 1],
        weight=[1.0, 1.0, 1.0, float("nan"), float("inf"), None, 1.0, 1.0, 1.0],
    )
    shop = replace(shop, users=pa.table({"user_id": [1, 2]}), items=pa.table({"item_id": [1, 2]}))
    tables = assemble(shop)
    assert tables.dropped == {"null_id": 1, "null_time": 1, "bad_rating": 3, "unknown_user": 1, "unknown_item": 1}
    assert tables.events.num_rows + sum(tables.dropped.values()) == shop.events.num_rows
    assert tables.users["user_id"].to_pylist() == [1, 2]


def test_exact_duplicates_are_one_event_and_a_difference_anywhere_is_none():
    tables = assemble(source(user_id=[1] * 4, item_id=[1, 1, 1, 2], ts_ms=[T] * 4, hour=[None, None, 2, 2]))
    assert tables.dropped == {"duplicate_event": 1}
    assert tables.events["hour"].to_pylist() == [2, None, 2]


def test_without_a_time_a_pair_is_one_interaction_and_the_positive_of_most_weight_stays():
    shop = source(user_id=[1, 1, 1, 2], item_id=[1, 1, 1, 2], weight=[9, 2, 3, 1], outcome=["impressed", *CLICKED * 3])
    tables = assemble(shop)
    assert tables.dropped == {"duplicate_event": 2}
    assert tables.events["weight"].to_pylist() == [3.0, 1.0]


def test_without_own_tables_users_and_items_are_those_of_events_and_test_together():
    tables = assemble(replace(three(), test=pa.table({"user_id": [3], "item_id": [9]})))
    assert tables.users["user_id"].to_pylist() == [1, 2, 3]
    assert tables.items["item_id"].to_pylist() == [7, 8, 9]
    assert tables.test.to_pydict() == {"user_id": [3], "item_id": [9], "ts_ms": [None]}


def test_a_test_row_below_the_minimum_is_no_positive():
    rated = Source(
        "shop",
        pa.table({"user_id": [1, 1], "item_id": [1, 2], "weight": [4, 5]}),
        test=pa.table({"user_id": [1, 1, 1], "item_id": [3, 4, 4], "weight": [2, 4, 4]}),
        minimum=4.0,
    )
    tables = assemble(rated)
    assert tables.test["item_id"].to_pylist() == [4]
    assert tables.dropped == {"held_out_not_positive": 1, "duplicate_event": 1}


def test_until_drops_later_days_before_users_and_items_are_collected():
    day = 86_400_000
    tables = assemble(
        source(user_id=[1, 1, 2], item_id=[1, 2, 3], ts_ms=[17_000 * day, 17_001 * day - 1, 17_001 * day]),
        until=datetime.date(2016, 7, 18),
    )
    assert tables.dropped == {"after_until": 1}
    assert tables.items["item_id"].to_pylist() == [1, 2]


def test_until_goes_by_the_sources_own_day():
    rows = source(user_id=[1, 1, 1], item_id=[1, 2, 3], ts_ms=[T, T + 1, T + 2], day=pa.array([1, 2, 1], pa.date32()))
    tables = assemble(replace(rows, day="day"), until=datetime.date(1970, 1, 2))
    assert tables.events["item_id"].to_pylist() == [1, 3]
    assert tables.days.to_pylist() == [datetime.date(1970, 1, 2)] * 2


def test_until_without_a_time_is_refused():
    with pytest.raises(ConfigError, match="shop has no time"):
        assemble(source(user_id=[1, 1], item_id=[1, 2]), until=datetime.date(2020, 1, 1))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": [1]}, "has no column item_id; it has user_id"),
        ({"user_id": pa.array([], pa.int64()), "item_id": pa.array([], pa.int64())}, "no rows"),
        ({"user_id": [1.5, 2.0], "item_id": [1, 2]}, "column user_id is of type double"),
        ({"user_id": [1, 1], "item_id": [7, 7], "ts_ms": [T, T + 1]}, "one item only"),
        ({"user_id": [1, 1], "item_id": [1, 2], "ts_ms": [1_500_000_000, 1_500_000_001]}, "looks like seconds"),
        ({"user_id": [1, 1], "item_id": [1, 2], "ts_ms": [T * 1000, T * 1000]}, "looks like microseconds"),
        ({"user_id": [1, 1], "item_id": [1, 2], "ts_ms": [1.5, 2.5]}, "ts_ms is of type double"),
        ({"user_id": [1, 1], "item_id": [1, 2], "outcome": ["seen", "clicked"]}, "holds \\['seen'\\]"),
        ({"user_id": [1, 1], "item_id": [1, 2], "outcome": ["impressed"] * 2}, "none of 2 rows is a positive"),
        ({"user_id": [1, 1], "item_id": [1, 2], "weight": ["good", "bad"]}, "weight or rating is of type string"),
        ({"user_id": [1, 1], "item_id": [1, 2], "weight": [float("nan")] * 2}, "no rows are left.*'bad_rating': 2"),
        ({"user_id": pa.nulls(2), "item_id": [1, 2]}, "no rows are left.*'null_id': 2"),
        ({"user_id": [1, 1], "item_id": [1, 2], "event_seq": [1, 2]}, "name event_seq is taken"),
        ({"user_id": [1, 1], "item_id": [1, 2], "tags": [[1], [2]]}, "column tags is a list"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(columns, message):
    with pytest.raises(DataError, match=message):
        assemble(Source("shop", pa.table(columns), items=None))


def test_a_minimum_without_ratings_is_refused():
    with pytest.raises(DataError, match="no rating to compare with --positive 4"):
        assemble(replace(three(), minimum=4.0))


def test_a_minimum_that_no_rating_reaches_is_refused():
    with pytest.raises(DataError, match="none of 2 rows is a positive with --positive 6"):
        assemble(Source("shop", pa.table({"user_id": [1, 1], "item_id": [1, 2], "weight": [4, 5]}), minimum=6.0))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([7, 8, 8], "1 ids more than once"),
        ([7, 8, None], "1 null ids of 3"),
        (["7", "8", "9"], "one type in every file"),
    ],
)
def test_items_with_bad_ids_are_refused(ids, message):
    with pytest.raises(DataError, match=message):
        assemble(replace(three(), items=pa.table({"item_id": ids})))


def test_ids_of_two_types_in_events_and_test_are_refused():
    with pytest.raises(DataError, match="user_id is int64 and string"):
        assemble(replace(three(), test=pa.table({"user_id": ["1"], "item_id": [7]})))


def test_plain_types():
    given = {
        "a": pa.array([1], pa.uint8()),
        "b": pa.array(["x"], pa.large_string()),
        "c": pa.array([[1]], pa.large_list(pa.int8())),
    }
    table = plain(pa.table(given), "items")
    assert table.schema.types == [pa.int64(), pa.string(), pa.list_(pa.int64())]
    with pytest.raises(DataError, match="does not fit int64"):
        plain(pa.table({"a": pa.array([2**64 - 1], pa.uint64())}), "items")


@pytest.mark.parametrize("text", ["four", "nan", "", "inf"])
def test_a_positive_that_is_no_number_is_refused(text):
    with pytest.raises(ConfigError, match="--positive"):
        parse_positive(text)


def test_times_beyond_now_are_dropped_and_counted_and_rule_nothing():
    rows = source(user_id=[1, 1, 2, 2], item_id=[7, 8, 7, 9], ts_ms=[T, T + 5, T + 3, 1_893_456_000_000])
    tables = assemble(
        replace(rows, test=pa.table({"user_id": [1, 1], "item_id": [7, 8], "ts_ms": [T + 9, T + 11]})),
        clock_ms=lambda: T + 10,
    )
    assert tables.dropped == {"future_time": 2}
    assert tables.examples == {"future_time": {"user_id": 2, "item_id": 9, "ts_ms": 1_893_456_000_000}}
    assert tables.events["request_ts_ms"].to_pylist() == [T, T + 3, T + 5]
    assert tables.items["item_id"].to_pylist() == [7, 8]
    assert tables.test["item_id"].to_pylist() == [7]


def test_a_time_of_now_is_kept_and_a_far_one_is_no_other_unit():
    far = [253_402_300_799_000, 2**63 - 1]
    tables = assemble(
        source(user_id=[1, 1, 1, 1], item_id=[1, 2, 3, 4], ts_ms=[T, T + 1, *far]), clock_ms=lambda: T + 1
    )
    assert tables.events["request_ts_ms"].to_pylist() == [T, T + 1]
    assert tables.dropped == {"future_time": 2}


def test_a_day_of_the_sources_calendar_beyond_now_is_dropped():
    day = pa.array([17361, 30000], pa.date32())
    rows = replace(
        source(user_id=[1, 1, 1], item_id=[1, 2, 3], ts_ms=[T] * 3, day=pa.concat_arrays([day, day[:1]])), day="day"
    )
    assert assemble(rows).dropped == {"future_time": 1}


def test_a_clock_that_lags_behind_all_events_is_told():
    with pytest.raises(DataError, match="all 3 times are later than now, 2001-09-09T01:46:40"):
        assemble(three(), clock_ms=lambda: 1_000_000_000_000)


def test_the_time_of_the_source_is_kept_where_ties_are_parted():
    tables = assemble(source(user_id=[1, 1, 2], item_id=[1, 2, 1], ts_ms=[T, T, T]))
    assert tables.events["request_ts_ms"].to_pylist() == [T, T, T + 1]
    assert tables.instants.to_pylist() == [T] * 3


def test_rows_of_a_request_stand_together_whatever_else_happened_then():
    user, item = np.ones(40, np.int64), np.arange(40)
    request = [f"r{n % 4}" for n in item]
    pages = replace(source(user_id=user, item_id=item, ts_ms=[T] * 40, request_id=request), requests_have_rows=True)
    events = assemble(pages).events
    assert events["request_ts_ms"].to_pylist() == [T + n for n in range(4) for _ in range(10)]
    assert events["request_id"].to_pylist() == [f"r{n}" for n in range(4) for _ in range(10)]


def test_a_column_named_day_is_context():
    tables = assemble(source(user_id=[1, 1], item_id=[1, 2], ts_ms=[T, T + 1], day=[3, 4]))
    assert tables.events["day"].to_pylist() == [3, 4]
    assert tables.days is None


def test_an_empty_text_is_no_id():
    tables = assemble(source(user_id=["", "a", "a"], item_id=["x", "x", "y"]))
    assert tables.dropped == {"null_id": 1}
    assert tables.examples["null_id"]["user_id"] == ""
    with pytest.raises(DataError, match="has a item_id that is an empty text"):
        assemble(replace(source(user_id=["a"], item_id=["x"]), items=pa.table({"item_id": ["x", ""]})))


def untyped(**columns):
    """Columns as a text file gives them."""
    fields = [pa.field(name, values.type, metadata=UNTYPED) for name, values in columns.items()]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def test_ids_of_text_files_become_text_where_another_table_has_text():
    events = untyped(user_id=pa.array([7, 8]), item_id=pa.array([1, 2]))
    users = untyped(user_id=pa.array(["7", "08"]))
    tables = assemble(Source("shop", events, users=users))
    assert tables.events["user_id"].to_pylist() == ["7"]
    assert tables.dropped == {"unknown_user": 1}
    assert tables.columns[0].note == "text, as in another table"
    with pytest.raises(DataError, match="user_id is int64 and string in shop events and its own table"):
        assemble(Source("shop", pa.table({"user_id": [7, 8], "item_id": [1, 2]}), users=users))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("position", pa.array([1.0, None]), pa.int32()),
        ("score", pa.array([1, None]), pa.float32()),
        ("channel", pa.array([1, 2]), pa.string()),
        ("probability", pa.nulls(2), pa.float32()),
        ("propensity", pa.nulls(2, pa.string()), pa.float32()),
    ],
)
def test_columns_that_later_stages_read_have_their_type(name, values, expected):
    events = assemble(source(user_id=[1, 1], item_id=[1, 2], **{name: values})).events
    assert events.schema.field(name).type == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"position": ["top", "1"]}, "column position is of type string, such as 'top', expected whole numbers"),
        ({"position": [1.5, 2.0]}, "column position is of type double, such as '1.5', expected whole numbers"),
        ({"score": ["good", "bad"]}, "column score is of type string, such as 'good', expected numbers"),
        ({"weight": ["good", "bad"]}, "the weight or rating is of type string, such as 'good'"),
        ({"ts_ms": ["today", "now"]}, "ts_ms is of type string, such as 'today'"),
        ({"Weight": [1, 2]}, "the names weight and Weight differ only in case"),
        ({"Hour": [1, 2], "hour": [1, 2]}, "the names Hour and hour differ only in case"),
        ({"ts_ms": [T, 157_766_400_000]}, "holds 157766400000, .*it lies outside 1980 to 2100"),
    ],
)
def test_a_column_of_another_meaning_is_refused_with_a_value(columns, message):
    with pytest.raises(DataError, match=message):
        assemble(source(user_id=[1, 1], item_id=[1, 2], **columns))


def test_what_no_feature_can_be_made_of_is_left_out_and_told():
    items = pa.table(
        {
            "item_id": [1, 2],
            "owner": [{"name": "x"}, None],
            "length": pa.array([1, 2], pa.duration("s")),
            "lists": [[[1]], None],
            "price": pa.array(["1.50", None], pa.string()).cast(pa.decimal128(9, 2)),
            "code": pa.array([1, 2], pa.decimal128(38, 0)),
        }
    )
    tables = assemble(Source("shop", pa.table({"user_id": [1, 1], "item_id": [1, 2]}), items=items))
    assert tables.items.to_pydict() == {"item_id": [1, 2], "price": [1.5, None], "code": [1, 2]}
    told = {one.column: one.became for one in tables.columns if one.table == "items"}
    assert told["owner"] == "left out: no feature is of type struct<name: string>"
    assert told["length"] == "left out: no feature is of type duration[s]"
    assert told["lists"].startswith("left out: no feature is of type list<")
    assert told["price"] == "price"


def test_the_example_of_dropped_rows_does_not_depend_on_their_order():
    rows = {"user_id": [1, 1, None, None], "item_id": [1, 2, 4, 3], "note": ["a", "b", "x" * 200, "y" * 200]}
    one = assemble(Source("shop", pa.table(rows))).examples
    other = assemble(Source("shop", pa.table(rows).take([3, 2, 1, 0]))).examples
    assert one == other == {"null_id": {"user_id": None, "item_id": 3, "note": "y" * 80 + "..."}}
