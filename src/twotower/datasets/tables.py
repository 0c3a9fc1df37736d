"""From what an importer read to the tables of a workspace: every check and every count of dropped rows, in one place.

An importer only names columns: it gives a `Source`, and `assemble` makes `Tables` of it. The result does not depend on
the order of rows or files, because events are put in an order in which only equal rows are equal.
"""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import (
    as_ids,
    check_entities,
    check_milliseconds,
    check_outcomes,
    joined_events,
    require_columns,
)
from twotower.schema.tables import holdout as holdout_schema

DAY: Final = "day"
"""A day (date32) of the source's own calendar beside its clock; hold-outs by date read it, no file keeps it."""
DAY_MS: Final = 86_400_000


def end_of_day(day: str) -> int:
    """The last millisecond of a day of UTC.

    >>> end_of_day("1970-01-02")
    172799999
    """
    return DAY_MS * (1 + (datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)).days) - 1


SOURCE_COLUMNS: Final = (c.USER_ID, c.ITEM_ID, c.TS_MS, c.REQUEST_ID, c.OUTCOME, c.WEIGHT, DAY)
"""The columns of `Source.events` with a meaning here; the others are for the order, or context."""
RESERVED: Final = frozenset({c.EVENT_SEQ, c.REQUEST_TS_MS, c.CLICK_TS_MS, c.DATE})
"""Columns of `events/` that are computed here."""

# Why rows are dropped.
NULL_ID: Final = "null_id"
NULL_TIME: Final = "null_time"
BAD_RATING: Final = "bad_rating"
UNKNOWN_USER: Final = "unknown_user"
UNKNOWN_ITEM: Final = "unknown_item"
DUPLICATE_EVENT: Final = "duplicate_event"
AFTER_UNTIL: Final = "after_until"
HELD_OUT_NOT_POSITIVE: Final = "held_out_not_positive"


@dataclass(frozen=True)
class Source:
    """What an importer found, under the names of this system, unchecked."""

    name: str
    """Of the data set."""
    events: pa.Table
    """`user_id`, `item_id`; where known `ts_ms`, `request_id`, `outcome`, `weight`, `day`; those of `order`; further
    columns are context. Without `outcome` every row is a click, or with `minimum` those of at least that weight."""
    users: pa.Table | None = None
    """`user_id` and features; absent = the distinct users of the events."""
    items: pa.Table | None = None
    """`item_id` and features; absent = the distinct items of the events."""
    test: pa.Table | None = None
    """Held-out events given by the user: `user_id`, `item_id`, where known `ts_ms`, `outcome`, `weight`."""
    minimum: float | None = None
    """Least weight of a positive; absent = all."""
    order: tuple[str, ...] = ()
    """Columns that order a user's events more finely than the clock does."""
    requests_have_rows: bool = False
    """Rows of one user with the same `request_id` and `ts_ms` are one request and keep one time."""


@dataclass(frozen=True)
class Tables:
    """The tables of a workspace, checked."""

    source: str
    """Name of the data set."""
    users: pa.Table
    """`user_id` and features, by id."""
    items: pa.Table
    """`item_id` and features, by id."""
    events: pa.Table
    """Joined events in the order of `event_seq`, then context columns."""
    days: pa.ChunkedArray | None = None
    """The source's own calendar day (date32) of each event; absent = the day of UTC."""
    test: pa.Table | None = None
    """Held-out positives given by the user: `user_id`, `item_id`, `ts_ms`."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many rows of the source's events and of the test file were left out, by reason."""


def parse_positive(text: str) -> float | None:
    """Read `--positive`: the least rating of a positive, or None for `all`.

    Raises:
        ConfigError: neither `all` nor a finite number.

    >>> parse_positive("all"), parse_positive("4")
    (None, 4.0)
    """
    if text == "all":
        return None
    try:
        minimum = float(text)
    except ValueError:
        minimum = np.nan
    if not np.isfinite(minimum):
        raise ConfigError(f"--positive {text}: give `all`, or the least rating of a positive, such as 4")
    return minimum


def plain(table: pa.Table, where: str) -> pa.Table:
    """A table with few types: int64, float64, string, other scalars as they are, and lists of these; NaN becomes null.

    Raises:
        DataError: two columns of one name, or an integer beyond int64.

    >>> plain(pa.table({"size": pa.array([1.0, float("nan")], pa.float32())}), "items").to_pydict()
    {'size': [1.0, None]}
    """
    if len(set(table.column_names)) < table.num_columns:
        raise DataError(f"{where} has two columns of one name: {', '.join(table.column_names)}")
    try:
        columns = [column.cast(_plain_type(column.type)) for column in table.columns]
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} holds a value that does not fit int64 ({error}): write it as a string") from None
    nothing = [
        pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
        if pa.types.is_floating(column.type)
        else column
        for column in columns
    ]
    return pa.table(nothing, names=table.column_names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def assemble(source: Source, until: datetime.date | None = None) -> Tables:
    """Check what an importer found and bring it into the common form.

    Rows of events that cannot be used are dropped and counted; anything wrong with a whole column, with the users or
    with the items is an error, because it would make every row wrong.

    Args:
        source: what an importer found.
        until: the last day to keep; later events are dropped before users and items are collected from them.

    Raises:
        ConfigError: `until` for events without a time.
        DataError: columns are missing or of a wrong type, times are no milliseconds, ids are null or duplicate among
            users or items, ids are integers in one table and strings in another, there are fewer than two items, or
            no event or no positive is left.
    """
    dropped: Counter[str] = Counter()
    where = f"{source.name} events"
    rows = _usable(source.events, source, where, dropped)
    if until is not None:
        rows = _until(rows, until, source.name, dropped)
    test = None if source.test is None else _usable(source.test, source, "the test file", dropped)
    given = [rows] if test is None else [rows, test]
    users = _entities(source.users, c.USER_ID, given, f"{source.name} users")
    items = _entities(source.items, c.ITEM_ID, given, f"{source.name} items")
    if items.num_rows == 1:
        raise DataError(f"{source.name} has one item only: retrieval needs at least two")
    rows = _known(rows, users, items, where, dropped)
    _refuse_empty(rows, where, dropped)

    rows = _ordered(rows, source.order, where, dropped)
    timed = c.TS_MS in rows.column_names
    if timed:
        ts_ms = _rising(rows, source.requests_have_rows)
        rows = rows.set_column(rows.schema.get_field_index(c.TS_MS), c.TS_MS, pa.array(ts_ms))
        rows = rows.take(pa.array(np.argsort(ts_ms, kind="stable")))  # rows are by user: ties of users stay in order
    if not pc.any(pc.equal(rows[c.OUTCOME], c.CLICKED)).as_py():
        least = "" if source.minimum is None else f" with --positive {source.minimum:g}"
        raise DataError(f"{where}: none of {rows.num_rows} rows is a positive{least}")
    return Tables(
        source=source.name,
        users=users,
        items=items,
        events=_joined(rows, source.order),
        days=rows.column(DAY) if DAY in rows.column_names else None,
        test=None if test is None else _test_positives(_known(test, users, items, "the test file", dropped), dropped),
        dropped=dict(sorted(dropped.items())),
    )


def drop(table: pa.Table, bad: pa.ChunkedArray | pa.Array, reason: str, dropped: Counter[str]) -> pa.Table:
    """The rows that are not `bad`; the others are counted under their reason, which is there only if there are any."""
    count = pc.sum(bad).as_py() or 0
    if not count:
        return table
    dropped[reason] += count
    return table.filter(pc.invert(bad))


def number(events: pa.Table) -> pa.Table:
    """Events with `event_seq` = 0, 1, ... in the order in which they stand."""
    sequence = pa.array(np.arange(events.num_rows, dtype=np.int64))
    return events.set_column(events.schema.get_field_index(c.EVENT_SEQ), events.schema.field(c.EVENT_SEQ), sequence)


def calendar_days(ts_ms: pa.ChunkedArray, days: pa.ChunkedArray | None) -> npt.NDArray[np.datetime64]:
    """(N,) the day of each event: that of the source's own calendar, or else of UTC.

    Args:
        ts_ms: (N,) milliseconds, none null.
        days: (N,) date32, or absent.
    """
    if days is not None:
        return np.asarray(days.to_numpy(), "datetime64[D]")
    return np.asarray(ts_ms.to_numpy() // DAY_MS, "datetime64[D]")


def codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Small integers, equal where values are equal; null and NaN count as values.

    >>> codes(pa.chunked_array([["b", None, "b"]])).tolist()
    [0, 1, 0]
    """
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    result: npt.NDArray[np.int64] = encoded.indices.to_numpy().astype(np.int64)
    return result


def _usable(table: pa.Table, source: Source, where: str, dropped: Counter[str]) -> pa.Table:
    """Rows with ids, a time if there is a time column, a finite weight and an outcome; columns in their inner types."""
    require_columns(table, [c.USER_ID, c.ITEM_ID], where)
    _refuse_empty(table, where, {})
    reserved = RESERVED.intersection(table.column_names)
    if reserved:
        raise DataError(f"{where}: the name {', '.join(sorted(reserved))} is taken by this system: rename the column")
    table = plain(table, where)
    table = drop(table, pc.or_(pc.is_null(table[c.USER_ID]), pc.is_null(table[c.ITEM_ID])), NULL_ID, dropped)
    _refuse_empty(table, where, dropped)
    for name in (c.USER_ID, c.ITEM_ID):
        table = _replace(table, name, as_ids(table[name], f"{where}, column {name}"))
    if c.TS_MS in table.column_names:
        if not pa.types.is_integer(table.schema.field(c.TS_MS).type):
            kind = table.schema.field(c.TS_MS).type
            raise DataError(f"{where}, column {c.TS_MS} is of type {kind}: write integer milliseconds since 1970 (UTC)")
        table = drop(table, pc.is_null(table[c.TS_MS]), NULL_TIME, dropped)
        check_milliseconds(table[c.TS_MS], f"{where}, column {c.TS_MS}")
    table = _with_weight(table, source.minimum, where, dropped)
    _refuse_empty(table, where, dropped)
    return _with_outcome(table, source.minimum, where)


def _refuse_empty(table: pa.Table, where: str, dropped: Mapping[str, int]) -> None:
    if not table.num_rows:
        raise DataError(f"{where}: no rows" + (f" are left, dropped were {dict(dropped)}" if dropped else ""))


def _with_weight(table: pa.Table, minimum: float | None, where: str, dropped: Counter[str]) -> pa.Table:
    """The table with `weight` as float32: null where the source has none, never NaN or infinite."""
    if c.WEIGHT not in table.column_names:
        if minimum is not None and c.OUTCOME not in table.column_names:
            raise DataError(f"{where} has no rating to compare with --positive {minimum:g}: use `--positive all`")
        return table.append_column(c.WEIGHT, pa.nulls(table.num_rows, pa.float32()))
    kind = table.schema.field(c.WEIGHT).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: the weight or rating is of type {kind}, a number is due")
    table = _replace(table, c.WEIGHT, table[c.WEIGHT].cast(pa.float32(), safe=False))
    finite = pc.fill_null(pc.is_finite(table[c.WEIGHT]), False)
    return drop(table, pc.invert(finite), BAD_RATING, dropped)


def _with_outcome(table: pa.Table, minimum: float | None, where: str) -> pa.Table:
    if c.OUTCOME in table.column_names:
        check_outcomes(table[c.OUTCOME], f"{where}, column {c.OUTCOME}")
        return table
    if minimum is None:
        return table.append_column(c.OUTCOME, pa.array([c.CLICKED]).take(pa.array(np.zeros(table.num_rows, np.int64))))
    enough = pc.greater_equal(table[c.WEIGHT], pa.scalar(minimum, pa.float32()))
    return table.append_column(c.OUTCOME, pc.if_else(enough, c.CLICKED, c.IMPRESSED))


def _until(rows: pa.Table, until: datetime.date, name: str, dropped: Counter[str]) -> pa.Table:
    if c.TS_MS not in rows.column_names:
        raise ConfigError(f"--until {until}: {name} has no time")
    days = calendar_days(rows[c.TS_MS], rows[DAY] if DAY in rows.column_names else None)
    late = days > np.datetime64(until, "D")
    if late.all():
        raise DataError(f"--until {until}: all {len(late)} events of {name} are later; the first is of {days.min()}")
    return drop(rows, pa.array(late), AFTER_UNTIL, dropped)


def _entities(table: pa.Table | None, name: str, given: Sequence[pa.Table], where: str) -> pa.Table:
    """Users or items with features, or else the distinct ids of events and test."""
    if table is not None:
        require_columns(table, [name], where)
        return check_entities(plain(table, where), name, where)
    _same_type([rows.schema.field(name).type for rows in given], name, "the events and the test file")
    ids = pc.unique(pa.chunked_array([chunk for rows in given for chunk in rows[name].chunks]))
    return pa.table({name: ids.take(pc.sort_indices(ids))})


def _known(rows: pa.Table, users: pa.Table, items: pa.Table, where: str, dropped: Counter[str]) -> pa.Table:
    """The rows whose user and item have a row of their own."""
    for name, table, reason in ((c.USER_ID, users, UNKNOWN_USER), (c.ITEM_ID, items, UNKNOWN_ITEM)):
        _same_type([rows.schema.field(name).type, table.schema.field(name).type], name, f"{where} and its own table")
        known = pc.is_in(rows[name], value_set=table[name].combine_chunks())
        rows = drop(rows, pc.invert(known), reason, dropped)
    return rows


def _same_type(types: Sequence[pa.DataType], name: str, where: str) -> None:
    if len(set(types)) > 1:
        raise DataError(f"{name} is {' and '.join(map(str, types))} in {where}: write it in one type in every file")


def _ordered(rows: pa.Table, order: Sequence[str], where: str, dropped: Counter[str]) -> pa.Table:
    """Rows by user, then time, then the source's finer order, then everything else; equal rows are one event.

    Without a time a user and an item are one interaction: a row that is a click stays, of these that of most weight.
    """
    require_columns(rows, order, where)
    nested = [name for name in rows.column_names if pa.types.is_nested(rows.schema.field(name).type)]
    if nested:
        raise DataError(f"{where}: column {nested[0]} is a list or a struct; events take single values only")
    timed = c.TS_MS in rows.column_names
    keys = [c.USER_ID, c.TS_MS, *order, c.ITEM_ID] if timed else [c.USER_ID, c.ITEM_ID]
    # `clicked` comes first in the alphabet of outcomes
    keys += [name for name in (c.OUTCOME, c.WEIGHT) if name not in keys]
    keys += sorted(set(rows.column_names) - set(keys))
    rows = rows.sort_by([(key, "descending" if key == c.WEIGHT else "ascending") for key in keys]).combine_chunks()
    same = np.ones(max(rows.num_rows - 1, 0), np.bool_)
    for name in keys if timed else [c.USER_ID, c.ITEM_ID]:
        if not same.any():
            break
        code = codes(rows[name])
        same &= code[1:] == code[:-1]
    return drop(rows, pa.array(np.append([False] * min(rows.num_rows, 1), same), pa.bool_()), DUPLICATE_EVENT, dropped)


def _rising(rows: pa.Table, requests_have_rows: bool) -> npt.NDArray[np.int64]:
    """Request times that rise strictly within a user, in milliseconds: a time that does not is the one before plus 1.

    That is t'[k] = max(t[k], t'[k-1] + 1), so t'[k] - k is the running maximum of t[k] - k within a user; it is taken
    over ranks, where the number of the user can be added without overflow.

    Args:
        rows: N events by user and time.
        requests_have_rows: events with the same user, time and request id count as one.

    Returns:
        (N,) times in the order of `rows`.
    """
    user, ts_ms = codes(rows[c.USER_ID]), rows[c.TS_MS].to_numpy()
    if not len(user):
        return np.zeros(0, np.int64)
    begins = np.ones(len(user), np.bool_)
    if requests_have_rows:
        request = codes(rows[c.REQUEST_ID])
        known = rows[c.REQUEST_ID].is_valid().to_numpy()
        same = (user[1:] == user[:-1]) & (ts_ms[1:] == ts_ms[:-1]) & (request[1:] == request[:-1]) & known[1:]
        begins[1:] = ~same
    place = np.arange(np.count_nonzero(begins))
    levels, rank = np.unique(ts_ms[begins] - place, return_inverse=True)
    highest = np.maximum.accumulate(user[begins] * len(levels) + rank) % len(levels)
    rising: npt.NDArray[np.int64] = (levels[highest] + place)[np.cumsum(begins) - 1]
    return rising


def _joined(rows: pa.Table, order: Sequence[str]) -> pa.Table:
    """Rows in their final order as joined events; a click without a time of its own has that of its request."""
    size = rows.num_rows
    ts_ms = rows[c.TS_MS] if c.TS_MS in rows.column_names else pa.nulls(size, pa.int64())
    request_id = rows[c.REQUEST_ID] if c.REQUEST_ID in rows.column_names else pa.nulls(size, pa.string())
    clicked = pc.equal(rows[c.OUTCOME], c.CLICKED)
    schema = joined_events(rows.schema.field(c.USER_ID).type, rows.schema.field(c.ITEM_ID).type)
    columns = {
        c.EVENT_SEQ: pa.array(np.arange(size, dtype=np.int64)),
        c.REQUEST_ID: request_id.cast(pa.string()),
        c.USER_ID: rows[c.USER_ID],
        c.ITEM_ID: rows[c.ITEM_ID],
        c.REQUEST_TS_MS: ts_ms,
        c.CLICK_TS_MS: pc.if_else(clicked, ts_ms, pa.scalar(None, pa.int64())),
        c.OUTCOME: rows[c.OUTCOME],
        c.WEIGHT: rows[c.WEIGHT],
    }
    table = pa.table([columns[name] for name in schema.names], schema=schema)
    for name in rows.column_names:
        if name not in SOURCE_COLUMNS and name not in order:
            table = table.append_column(name, rows[name])
    return table


def _test_positives(test: pa.Table, dropped: Counter[str]) -> pa.Table:
    test = drop(test, pc.not_equal(test[c.OUTCOME], c.CLICKED), HELD_OUT_NOT_POSITIVE, dropped)
    if not test.num_rows:
        raise DataError(f"the test file has no positive that can be used; dropped: {dict(dropped)}")
    ts_ms = test[c.TS_MS] if c.TS_MS in test.column_names else pa.nulls(test.num_rows, pa.int64())
    schema = holdout_schema(test.schema.field(c.USER_ID).type, test.schema.field(c.ITEM_ID).type)
    pairs = pa.table([test[c.USER_ID], test[c.ITEM_ID], ts_ms], schema=schema)
    distinct = pairs.group_by(pairs.column_names).aggregate([]).select(pairs.column_names)
    if distinct.num_rows < pairs.num_rows:
        dropped[DUPLICATE_EVENT] += pairs.num_rows - distinct.num_rows
    return distinct


def _replace(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)
