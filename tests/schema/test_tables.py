import datetime
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from twotower.schema import columns as c
from twotower.schema import tables as t
from twotower.schema.errors import DataError

MS = 1_704_067_200_000
"""2024-01-01"""


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pa.array([3, 1], pa.uint64()), [3, 1]),
        (pa.array([3, 1], pa.int8()), [3, 1]),
        (pa.array(["7", "é"]), ["7", "é"]),
        (pa.array(["7", "é"], pa.large_string()), ["7", "é"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.chunked_array([["a"], ["b"]]), ["a", "b"]),
        (pa.array([1, 2, 3]).slice(1), [2, 3]),
    ],
)
def test_ids_are_int64_or_string(column: pa.Array, values: list[Any]) -> None:
    ids = t.as_ids(column, "x")
    assert ids.to_pylist() == values
    assert ids.type == (pa.int64() if isinstance(values[0], int) else pa.string())


def test_entities_come_out_in_the_order_of_their_ids_with_their_columns() -> None:
    users = pa.table({"age": [30, 20], "tags": [["a"], None], "user_id": pa.array([2, 1], pa.int16())})
    checked = t.check_entities(users, c.USER_ID, "users.parquet")
    assert checked.to_pylist() == [
        {"age": 20, "tags": None, "user_id": 1},
        {"age": 30, "tags": ["a"], "user_id": 2},
    ]


def test_one_entity_is_a_table() -> None:
    assert t.check_entities(pa.table({"user_id": ["a"]}), c.USER_ID, "users.parquet").num_rows == 1


def test_times_of_every_year_of_a_log_are_milliseconds() -> None:
    t.check_milliseconds(pa.array([t.EARLIEST_MS, MS, None, t.LATEST_MS]), "x")
    t.check_milliseconds(pa.nulls(3, pa.int64()), "x")
    t.check_milliseconds(pa.array([], pa.int64()), "x")


def entities(**columns: Any) -> Callable[[], object]:
    return lambda: t.check_entities(pa.table(columns), c.USER_ID, "users.parquet")


def times(*values: int) -> Callable[[], object]:
    return lambda: t.check_milliseconds(pa.array(values), "ts_ms")


REFUSED: list[tuple[Callable[[], object], str]] = [
    (entities(id=[1], age=[2]), "users.parquet has no column user_id; it has id, age"),
    (lambda: t.check_entities(pa.table({}), c.USER_ID, "users.parquet"), "has no column user_id; it has none"),
    (entities(user_id=pa.array([], pa.int64())), "users.parquet has no rows"),
    (entities(user_id=[1, None]), "users.parquet, column user_id has 1 null ids of 2"),
    (entities(user_id=[2, 1, 2, 2]), "users.parquet has 1 ids more than once, such as [2]: keep one row of each"),
    (entities(user_id=["b", "b", "a", "a"]), "has 2 ids more than once, such as ['a', 'b']"),
    (entities(user_id=[1.0]), "column user_id is of type double: an id is an integer or a string"),
    (entities(user_id=[True]), "is of type bool: an id is"),
    (entities(user_id=[datetime.date(2024, 1, 1)]), "is of type date32[day]: an id is"),
    (entities(user_id=pa.array([2**63], pa.uint64())), "holds integers that do not fit int64"),
    (times(MS, MS // 1000), "holds 1704067200, where milliseconds since 1970 are expected; it looks like seconds"),
    (times(MS * 1000), "it looks like microseconds: divide by 1000"),
    (times(MS * 1_000_000, MS), "it looks like nanoseconds: divide by 1000000"),
    (times(0, MS), "ts_ms holds 0, where milliseconds since 1970 are expected; it lies outside 1980 to 2100"),
    (times(-5), "ts_ms holds -5, where milliseconds since 1970 are expected; it lies outside 1980 to 2100"),
    (times(157_766_400_000, MS), "157766400000, where milliseconds since 1970 are expected; it lies outside 1980"),
    (lambda: t.check_outcomes(pa.array(["clicked", "seen", None]), "outcome"), "outcome holds ['seen', None]; an"),
    (lambda: t.require_columns(pa.schema([("a", "int8")]), ["a", "b", "d"], "x"), "x has no column b, d; it has a"),
]


@pytest.mark.parametrize(("check", "message"), REFUSED)
def test_what_is_refused_says_what_was_seen(check: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError) as error:
        check()
    assert message in str(error.value)


def test_every_outcome_of_the_funnel_is_known() -> None:
    t.check_outcomes(pa.array(c.OUTCOMES), "outcome")


def test_the_tables_that_others_read_have_the_ids_they_are_asked_for() -> None:
    ids = (pa.string(), pa.int64())
    for schema in (t.joined_events(*ids), t.holdout(*ids), t.recommendations(*ids)):
        assert (schema.field(c.USER_ID).type, schema.field(c.ITEM_ID).type) == ids
