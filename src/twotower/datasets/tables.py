"""From what an importer read to the tables of a workspace: every check and every count of dropped rows, in one place.

An importer only names columns: it gives a `Source`, and `assemble` makes `Tables` of it. The result does not depend on
the order of rows or files, because only equal rows tie in the order of events.
"""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.sources import UNTYPED, SourceColumn
from twotower.features.bloom import mixed
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import (
    EARLIEST_MS,
    as_ids,
    check_distinct,
    check_entities,
    check_outcomes,
    is_list,
    is_number,
    is_text,
    joined_events,
    mistaken_time,
    require_columns,
    value_type,
)
from twotower.schema.tables import holdout as holdout_schema


def end_of_day(day: str) -> int:
    """The last millisecond of a day of UTC.

    >>> end_of_day("1970-01-02")
    172799999
    """
    return DAY_MS * (1 + (datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)).days) - 1


SOURCE_COLUMNS: Final = (c.USER_ID, c.ITEM_ID, c.TS_MS, c.REQUEST_ID, c.OUTCOME, c.WEIGHT)
"""The columns of `Source.events` with a meaning here; the others are for the day, the order, or context."""
KNOWN_TYPES: Final = {
    c.POSITION: pa.int32(),
    c.SCORE: pa.float32(),
    c.CHANNEL: pa.string(),
    c.PROBABILITY: pa.float32(),
    c.PROPENSITY: pa.float32(),
}
"""Types of columns that later stages read where they are there."""
RESERVED: Final = frozenset({c.EVENT_SEQ, c.REQUEST_TS_MS, c.CLICK_TS_MS})
"""Columns of `events/` that are computed here."""

# Reasons of dropped rows that more than one place names.
DUPLICATE_EVENT: Final = "duplicate_event"
HELD_OUT_NOT_POSITIVE: Final = "held_out_not_positive"

TIE: Final = "twotower:tie"
"""A temporary column: a hash that orders a user's events of one time."""
EXAMPLE_COLUMNS: Final = 12
EXAMPLE_CHARACTERS: Final = 80


@dataclass
class Dropped:
    """Rows that were left out, by reason: how many, and one of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, table: pa.Table, bad: pa.ChunkedArray | pa.Array, reason: str) -> pa.Table:
        """The rows that are not `bad`; the others are counted under their reason, which is there only if any are."""
        count = pc.sum(bad).as_py() or 0
        if not count:
            return table
        self.counts[reason] += count
        self.examples.setdefault(reason, example_of(table.filter(bad)))
        return table.filter(pc.invert(bad))


@dataclass(frozen=True)
class Source:
    """What an importer found, under the names of this system, unchecked."""

    name: str
    """Of the data set."""
    events: pa.Table
    """`user_id`, `item_id`; where known `ts_ms`, `request_id`, `outcome`, `weight`; those of `day` and `order`; further
    columns are context. Without `outcome` every row is a click, or with `minimum` those of at least that weight."""
    users: pa.Table | None = None
    """`user_id` and features; absent = the distinct users of the events."""
    items: pa.Table | None = None
    """`item_id` and features; absent = the distinct items of the events."""
    test: pa.Table | None = None
    """Held-out events given by the user: `user_id`, `item_id`, where known `ts_ms`, `outcome`, `weight`."""
    minimum: float | None = None
    """Lowest weight of a positive; absent = all."""
    order: tuple[str, ...] = ()
    """Columns that order a user's events more finely than the clock does."""
    day: str | None = None
    """A column of days (date32) of the source's own calendar; hold-outs by date read it, no file keeps it."""
    requests_have_rows: bool = False
    """Rows of one user with the same `request_id` and `ts_ms` are one request and keep one time."""
    columns: Mapping[str, Sequence[SourceColumn]] = field(default_factory=dict)
    """What the files of `events`, `users`, `items` and `test` had; absent = the columns of the tables here."""
    not_read: tuple[str, ...] = ()
    """Files beside those of the source that are of no kind that is read."""
    dropped: Dropped = field(default_factory=Dropped)
    """Rows that the importer left out."""


@dataclass(frozen=True)
class ColumnReport:
    """What became of a column of a source."""

    table: str
    """`events`, `users`, `items` or `test`."""
    column: str
    """Its name in the source."""
    type: str
    missing: int | None
    """Empty values; None where it was not read."""
    became: str
    """A column of the workspace, or why it is left out."""
    note: str = ""


def example_of(rows: pa.Table) -> dict[str, Any]:
    """The first row by user, item and all other columns, as values of JSON: the same in any order of the rows."""
    scalar = [name for name in rows.column_names if not pa.types.is_nested(rows.schema.field(name).type)]
    first = [name for name in (c.USER_ID, c.ITEM_ID, c.TS_MS, c.REQUEST_TS_MS) if name in scalar]
    keys = [*first, *(name for name in sorted(scalar) if name not in first and name != TIE)]
    row = rows.take(pc.sort_indices(rows, sort_keys=[(name, "ascending") for name in keys])[:1])
    return {name: _as_json(row[name][0].as_py()) for name in keys[:EXAMPLE_COLUMNS]}


def _as_json(value: object) -> Any:
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and np.isfinite(value)):
        return value
    text = str(value)
    return text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "..."


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
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """One of these rows, by reason."""
    instants: pa.ChunkedArray | None = None
    """When each event happened by the source's clock (ms), before times of a user that are equal were parted; absent =
    `request_ts_ms`. Hold-outs by time read it: what happened at once stays together."""
    columns: tuple[ColumnReport, ...] = ()
    """Every column of the source and what became of it."""
    not_read: tuple[str, ...] = ()
    """Files of the source that were not read."""


def parse_positive(text: str) -> float | None:
    """Read `--positive`: the lowest rating of a positive, or None for `all`.

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
        raise ConfigError(f"--positive {text}: give `all`, or the lowest rating of a positive, such as 4")
    return minimum


def plain(table: pa.Table, where: str) -> pa.Table:
    """A table with few types: int64, float64, string, other scalars as they are, and lists of these; NaN becomes null.

    Raises:
        DataError: an integer that does not fit int64, or two columns of one name.
    """
    check_distinct(table.column_names, where)
    columns, fields = [], []
    for entry in table.schema:
        kind = _plain_type(entry.type)
        try:
            column = table[entry.name].cast(kind)
        except pa.ArrowInvalid as error:
            what = f"{where}, column {entry.name}, holds a value that does not fit {kind} ({error})"
            raise DataError(f"{what}: write it as a string") from None
        if pa.types.is_floating(kind):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        columns.append(column)
        fields.append(entry.with_type(kind))
    return pa.table(columns, schema=pa.schema(fields))


def check_codes(table: pa.Table, names: Sequence[str], where: str, text: bool = False) -> None:
    """Refuse columns of other values than integers, or with `text` than integers and text.

    Raises:
        DataError: a column of another type that has a value.
    """
    for name in names:
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_null(kind) or (text and pa.types.is_string(kind))):
            expected = "integers or text" if text else "integers"
            raise DataError(f"{where}, column {name} is of type {kind}, expected {expected}")


def _plain_type(kind: pa.DataType) -> pa.DataType:
    kind = value_type(kind)
    if pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0):
        return pa.int64()
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return pa.float64()
    if is_text(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _representable(kind: pa.DataType) -> bool:
    """A feature or a context can have this type: a scalar that is no duration or time of day, or a list of such."""
    kind = value_type(kind)
    if is_list(kind):
        return not pa.types.is_nested(kind.value_type) and _representable(kind.value_type)
    if pa.types.is_time(kind) or pa.types.is_duration(kind) or pa.types.is_interval(kind):
        return False
    return bool(is_text(kind) or pa.types.is_decimal(kind) or pa.types.is_primitive(kind) or pa.types.is_null(kind))


def assemble(source: Source, until: datetime.date | None = None, clock_ms: ClockMs = now_ms) -> Tables:
    """Check what an importer found and bring it into the common form.

    Rows of events that cannot be used are dropped and counted; anything wrong with a whole column, with the users or
    with the items is an error, because it would make every row wrong. A row later than the clock is dropped, because
    the latest event decides which days are learned. So are events after the day `until`, before users and items are
    collected from the events.

    Raises:
        ConfigError: `until` for events without a time.
        DataError: columns are missing or of a wrong type, times are no milliseconds, ids are null or duplicate among
            users or items, ids are integers in one table and strings in another, there are fewer than two items, or
            no event or no positive is left.
    """
    dropped = Dropped(Counter(source.dropped.counts), dict(source.dropped.examples))
    now_ms, where = clock_ms(), f"{source.name} events"
    original = source
    source, left_out = _without_unusable_columns(_with_agreed_ids(source))
    rows = _usable(source.events, source, where, now_ms, dropped)
    if until is not None:
        rows = _until(rows, until, source, dropped)
    test = None if source.test is None else _usable(source.test, source, "the test file", now_ms, dropped)
    given = [rows] if test is None else [rows, test]
    users = _entities(source.users, c.USER_ID, given, f"{source.name} users")
    items = _entities(source.items, c.ITEM_ID, given, f"{source.name} items")
    if items.num_rows == 1:
        raise DataError(f"{source.name} has one item only: retrieval needs at least two")
    rows = _known(rows, users, items, where, dropped)
    _refuse_empty(rows, where, dropped)

    rows, instants = _by_time(_ordered(rows, source, where, dropped), source.requests_have_rows)
    if not pc.any(pc.equal(rows[c.OUTCOME], c.CLICKED)).as_py():
        least = "" if source.minimum is None else f" with --positive {source.minimum:g}"
        raise DataError(f"{where}: none of {rows.num_rows} rows is a positive{least}")
    events = _joined(rows, source)
    for table, name in ((users, "users"), (items, "items"), (events, "events")):
        _refuse_alike(table.column_names + ([c.DATE] if name == "events" else []), f"{source.name} {name}")
    pairs = None if test is None else _test_positives(_known(test, users, items, "the test file", dropped), dropped)
    return Tables(
        source=source.name,
        users=users,
        items=items,
        events=events,
        days=None if source.day is None else rows.column(source.day),
        test=pairs,
        dropped=dict(sorted(dropped.counts.items())),
        examples=dict(sorted(dropped.examples.items())),
        instants=instants,
        columns=_columns_report(original, source, left_out),
        not_read=source.not_read,
    )


def _by_time(rows: pa.Table, requests_have_rows: bool) -> tuple[pa.Table, pa.ChunkedArray | None]:
    """Rows by time, with times that rise within each user, and the times of the source, if it has any."""
    if c.TS_MS not in rows.column_names:
        return rows, None
    ts_ms = _rising(rows, requests_have_rows)
    order = pa.array(np.argsort(ts_ms, kind="stable"))  # rows are by user: ties of users stay in order
    return replaced(rows, c.TS_MS, pa.chunked_array([ts_ms])).take(order), rows[c.TS_MS].take(order)


def _with_agreed_ids(source: Source) -> Source:
    """The source with ids of one type in all tables where that loses nothing: ids of text files have no type.

    Integers that were read from text become that text again where another table has ids such as `007`.
    """
    tables = {name: getattr(source, name) for name in ("events", "users", "items", "test")}
    for column in (c.USER_ID, c.ITEM_ID):
        fields = {
            name: table.schema.field(column)
            for name, table in tables.items()
            if table is not None and table.column_names.count(column) == 1
        }
        if not any(pa.types.is_string(entry.type) for entry in fields.values()):
            continue
        for name, entry in fields.items():
            if pa.types.is_integer(entry.type) and entry.metadata == UNTYPED:
                text = pa.field(column, pa.string(), metadata=UNTYPED)
                place = tables[name].schema.get_field_index(column)
                tables[name] = tables[name].set_column(place, text, tables[name][column].cast(pa.string()))
    return replace(source, **tables)


def _without_unusable_columns(source: Source) -> tuple[Source, dict[tuple[str, str], str]]:
    """The source without columns that no feature can be made of, and why they are left out, by table and name.

    Events keep lists and structs: they are refused there, in place of being passed over.
    """
    left_out: dict[tuple[str, str], str] = {}
    kept = {}
    for name in ("events", "users", "items"):
        table, is_events = getattr(source, name), name == "events"
        if table is None:
            continue
        taken = (*SOURCE_COLUMNS, *source.order, source.day) if is_events else (c.USER_ID, c.ITEM_ID)
        for entry in table.schema:
            refused_later = entry.name in taken or (is_events and pa.types.is_nested(entry.type))
            if not refused_later and not _representable(entry.type):
                left_out[name, entry.name] = f"left out: no feature is of type {entry.type}"
        if is_events and c.DATE in table.column_names:
            left_out[name, c.DATE] = "left out: the workspace has the day of UTC under this name; rename it to keep it"
        kept[name] = table.drop_columns([column for of, column in left_out if of == name])
    return replace(source, **kept), left_out


def _columns_report(given: Source, source: Source, left_out: Mapping[tuple[str, str], str]) -> tuple[ColumnReport, ...]:
    """What became of the columns of a source as it was given."""
    report = []
    for table in ("events", "users", "items", "test"):
        rows, before = getattr(source, table), getattr(given, table)
        seen = source.columns.get(table)
        if seen is None and before is not None:
            seen = [
                SourceColumn(entry.name, str(entry.type), column.null_count, entry.name)
                for entry, column in zip(before.schema, before.columns, strict=True)
            ]
        for column in seen or ():
            became = column.note if column.to is None else _became(source, table, column.to, left_out)
            note = "" if column.to is None else column.note
            if column.to in (c.USER_ID, c.ITEM_ID) and rows is not None and column.type == "int64":
                kind = rows.schema.field(column.to).type
                note = "text, as in another table" if pa.types.is_string(kind) else note
            report.append(ColumnReport(table, column.name, column.type, column.missing, became, note))
    return tuple(report)


def _became(source: Source, table: str, name: str, left_out: Mapping[tuple[str, str], str]) -> str:
    """What a column of the rows became: a name in the workspace, or what is done with it."""
    if (table, name) in left_out:
        return left_out[table, name]
    if table != "events":
        return name
    roles = {c.TS_MS: f"{c.REQUEST_TS_MS}, {c.CLICK_TS_MS}"} | dict.fromkeys(source.order, "the order within one time")
    if source.day is not None:
        roles[source.day] = "the day of --until and --holdout since"
    return roles.get(name, name if name in (*SOURCE_COLUMNS, *KNOWN_TYPES) else f"{name} (context)")


def _refuse_alike(names: Sequence[str], where: str) -> None:
    """Refuse names that a database cannot tell from each other."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name or names.count(name) > 1:
            raise DataError(f"{where}: the names {other} and {name} differ only in case: rename one column")


def number(events: pa.Table) -> pa.Table:
    """Events with `event_seq` = 0, 1, ... in the order in which they stand."""
    sequence = pa.array(np.arange(events.num_rows, dtype=np.int64))
    return events.set_column(events.schema.get_field_index(c.EVENT_SEQ), events.schema.field(c.EVENT_SEQ), sequence)


def calendar_days(ts_ms: pa.ChunkedArray, days: pa.ChunkedArray | None) -> npt.NDArray[np.datetime64]:
    """(N,) the day of each event: that of the source's own calendar (date32), or else the day of UTC of its time."""
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


def _usable(table: pa.Table, source: Source, where: str, now_ms: int, dropped: Dropped) -> pa.Table:
    """Rows with ids, a time if there is a time column, a finite weight and an outcome; columns in their inner types."""
    require_columns(table, [c.USER_ID, c.ITEM_ID], where)
    _refuse_empty(table, where, Dropped())
    reserved = RESERVED.intersection(table.column_names)
    if reserved:
        raise DataError(f"{where}: the name {', '.join(sorted(reserved))} is taken by this system: rename the column")
    nested = [entry.name for entry in table.schema if pa.types.is_nested(entry.type)]
    if nested:
        raise DataError(f"{where}: column {nested[0]} is a list or a struct; events take single values only")
    table = plain(table, where)
    table = dropped.drop(table, pc.or_(_no_id(table[c.USER_ID]), _no_id(table[c.ITEM_ID])), "null_id")
    _refuse_empty(table, where, dropped)
    for name in (c.USER_ID, c.ITEM_ID):
        table = replaced(table, name, as_ids(table[name], f"{where}, column {name}"))
    if c.TS_MS in table.column_names:
        table = _with_times(table, source.day, where, now_ms, dropped)
    table = _with_weight(table, source.minimum, where, dropped)
    _refuse_empty(table, where, dropped)
    for name, kind in KNOWN_TYPES.items():
        if name in table.column_names:
            table = replaced(table, name, _as_known(table[name], kind, f"{where}, column {name}"))
    return _with_outcome(table, source.minimum, where)


def _no_id(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where an id is missing or an empty text."""
    if not pa.types.is_string(column.type):
        return pc.is_null(column)
    return pc.fill_null(pc.equal(column, ""), True)


def _with_times(table: pa.Table, day: str | None, where: str, now_ms: int, dropped: Dropped) -> pa.Table:
    """Rows with a time, none later than now.

    Raises:
        DataError: times are no integers, look like another unit, or lie before 1980.
    """
    column = table[c.TS_MS]
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{where}, column {c.TS_MS} is of type {column.type}, such as {first_shown(column)}: write integer "
            f"milliseconds since 1970 (UTC), or give --time-column {c.TS_MS}"
        )
    table = dropped.drop(table, pc.is_null(column), "null_time")
    times = table[c.TS_MS]
    beyond = pc.greater(times, now_ms)
    wrong = pc.unique(times.filter(pc.or_(beyond, pc.less(times, EARLIEST_MS))))
    for value in sorted(wrong.to_pylist()):
        likely = mistaken_time(value, now_ms)
        if value < EARLIEST_MS or "looks like" in str(likely):
            raise DataError(f"{where}, column {c.TS_MS} holds {value}, expected milliseconds since 1970; {likely}")
    if day is not None and day in table.column_names:
        tomorrow = pa.scalar(now_ms // DAY_MS + 1, pa.int32()).cast(pa.date32())  # no calendar is a day ahead of UTC
        beyond = pc.or_(beyond, pc.fill_null(pc.greater(table[day], tomorrow), False))
    if len(beyond) and pc.all(beyond).as_py():
        now = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC).isoformat(timespec="seconds")
        raise DataError(
            f"{where}: all {len(beyond)} times are later than now, {now} by the clock of this machine; the first is "
            f"{pc.min(times).as_py()}: mend the clock, or the column {c.TS_MS}"
        )
    return dropped.drop(table, beyond, "future_time")


def _as_known(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.ChunkedArray:
    """A column that later stages read, in their type; any other content is a `DataError`."""
    if is_text(kind) or is_number(column.type):
        try:
            return column.cast(kind, safe=not pa.types.is_floating(kind))
        except pa.ArrowException:
            pass
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    expected = {pa.int32(): "whole numbers", pa.float32(): "numbers"}.get(kind, "text")
    raise DataError(
        f"{where} is of type {column.type}, such as {first_shown(column)}, expected {expected}: mend it, or rename it "
        "if it is something else"
    )


def first_shown(column: pa.ChunkedArray) -> str:
    """The first value, short enough for a sentence."""
    values = pc.drop_null(column)
    return repr(str(values[0].as_py())[:EXAMPLE_CHARACTERS]) if len(values) else "none"


def _refuse_empty(table: pa.Table, where: str, dropped: Dropped) -> None:
    if not table.num_rows:
        counts = dict(dropped.counts)
        raise DataError(f"{where}: no rows" + (f" are left, dropped were {counts}" if counts else ""))


def _with_weight(table: pa.Table, minimum: float | None, where: str, dropped: Dropped) -> pa.Table:
    """The table with `weight` as float32: null where the source has none, never NaN or infinite."""
    if c.WEIGHT not in table.column_names:
        if minimum is not None and c.OUTCOME not in table.column_names:
            raise DataError(f"{where} has no rating to compare with --positive {minimum:g}: use `--positive all`")
        return table.append_column(c.WEIGHT, pa.nulls(table.num_rows, pa.float32()))
    kind = table.schema.field(c.WEIGHT).type
    if not is_number(kind):
        shown = first_shown(table[c.WEIGHT])
        raise DataError(f"{where}: the weight or rating is of type {kind}, such as {shown}; expected a number")
    table = replaced(table, c.WEIGHT, table[c.WEIGHT].cast(pa.float32(), safe=False))
    finite = pc.fill_null(pc.is_finite(table[c.WEIGHT]), False)
    return dropped.drop(table, pc.invert(finite), "bad_rating")


def _with_outcome(table: pa.Table, minimum: float | None, where: str) -> pa.Table:
    if c.OUTCOME in table.column_names:
        check_outcomes(table[c.OUTCOME], f"{where}, column {c.OUTCOME}")
        return table
    if minimum is None:
        return table.append_column(c.OUTCOME, pa.repeat(c.CLICKED, table.num_rows))
    enough = pc.greater_equal(table[c.WEIGHT], pa.scalar(minimum, pa.float32()))
    return table.append_column(c.OUTCOME, pc.if_else(enough, c.CLICKED, c.IMPRESSED))


def _until(rows: pa.Table, until: datetime.date, source: Source, dropped: Dropped) -> pa.Table:
    if c.TS_MS not in rows.column_names:
        raise ConfigError(f"--until {until}: {source.name} has no time")
    days = calendar_days(rows[c.TS_MS], None if source.day is None else rows[source.day])
    late = days > np.datetime64(until, "D")
    if late.all():
        raise DataError(
            f"--until {until}: all {len(late)} events of {source.name} are later; the first is of {days.min()}"
        )
    return dropped.drop(rows, pa.array(late), "after_until")


def _entities(table: pa.Table | None, name: str, given: Sequence[pa.Table], where: str) -> pa.Table:
    """Users or items with features, or else the distinct ids of events and test."""
    if table is not None:
        require_columns(table, [name], where)
        table = plain(table, where)
        if pa.types.is_string(table.schema.field(name).type) and pc.any(pc.equal(table[name], "")).as_py():
            raise DataError(f"{where} has a {name} that is an empty text: drop the row or give it an id")
        return check_entities(table, name, where)
    _same_type([rows.schema.field(name).type for rows in given], name, "the events and the test file")
    ids = pc.unique(pa.chunked_array([chunk for rows in given for chunk in rows[name].chunks]))
    return pa.table({name: ids.take(pc.sort_indices(ids))})


def _known(rows: pa.Table, users: pa.Table, items: pa.Table, where: str, dropped: Dropped) -> pa.Table:
    """The rows whose user and item have a row of their own."""
    for name, table, reason in ((c.USER_ID, users, "unknown_user"), (c.ITEM_ID, items, "unknown_item")):
        _same_type([rows.schema.field(name).type, table.schema.field(name).type], name, f"{where} and its own table")
        known = pc.is_in(rows[name], value_set=table[name].combine_chunks())
        rows = dropped.drop(rows, pc.invert(known), reason)
    return rows


def _same_type(types: Sequence[pa.DataType], name: str, where: str) -> None:
    if len(set(types)) > 1:
        raise DataError(f"{name} is {' and '.join(map(str, types))} in {where}: write it in one type in every file")


def _ordered(rows: pa.Table, source: Source, where: str, dropped: Dropped) -> pa.Table:
    """Rows by user, then time, then the source's finer order, then a hash, then everything else; equal rows are one.

    The hash is of user and item: an order by ids would make the newest item the last one of every tie. Rows of a
    request stand together. Without a time a user and an item are one interaction: a click stays before other rows, and
    the one of most weight before other clicks.
    """
    require_columns(rows, source.order, where)
    timed = c.TS_MS in rows.column_names
    keys = [c.USER_ID, c.ITEM_ID]
    if timed:
        requests = [c.REQUEST_ID] if source.requests_have_rows else []
        keys = [c.USER_ID, c.TS_MS, *source.order, *requests, TIE, c.ITEM_ID]
        rows = rows.append_column(TIE, pa.array(tie_hash(rows[c.USER_ID], rows[c.ITEM_ID])))
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
    if timed:
        rows = rows.drop_columns([TIE])
    return dropped.drop(rows, pa.array(np.append([False] * min(rows.num_rows, 1), same), pa.bool_()), DUPLICATE_EVENT)


def tie_hash(user_id: pa.ChunkedArray, item_id: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A number (N,) for each pair of ids, which depends on nothing else and follows no order of ids."""
    value = mixed(_numbers(user_id)) + _numbers(item_id)
    return (mixed(value) >> np.uint64(1)).astype(np.int64)


def _numbers(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Integers as they are, text by its bytes."""
    if pa.types.is_integer(ids.type):
        whole: npt.NDArray[np.uint64] = ids.to_numpy().astype(np.int64).view(np.uint64)
        return whole
    encoded = ids.combine_chunks().dictionary_encode()
    numbers = [
        int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) for text in encoded.dictionary.to_pylist()
    ]
    hashed: npt.NDArray[np.uint64] = np.array(numbers, np.uint64)[encoded.indices.to_numpy()]
    return hashed


def _rising(rows: pa.Table, requests_have_rows: bool) -> npt.NDArray[np.int64]:
    """Request times (N,) that rise strictly within a user, in milliseconds: a time that does not is moved.

    That is t'[k] = max(t[k], t'[k-1] + 1), so t'[k] - k is the running maximum of t[k] - k within a user; it is taken
    over ranks, where the number of the user can be added without overflow. Rows are by user and time. With
    `requests_have_rows`, those of one user, time and request id count as one event.
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


def _joined(rows: pa.Table, source: Source) -> pa.Table:
    """Rows in their final order as joined events; a click without a time of its own has that of its request."""
    size = rows.num_rows
    ts_ms = rows[c.TS_MS] if c.TS_MS in rows.column_names else pa.nulls(size, pa.int64())
    request_id = rows[c.REQUEST_ID] if c.REQUEST_ID in rows.column_names else pa.nulls(size, pa.string())
    clicked = pc.equal(rows[c.OUTCOME], c.CLICKED)
    schema = joined_events(rows.schema.field(c.USER_ID).type, rows.schema.field(c.ITEM_ID).type)
    columns = {
        c.EVENT_SEQ: np.arange(size),
        c.REQUEST_ID: request_id.cast(pa.string()),
        c.USER_ID: rows[c.USER_ID],
        c.ITEM_ID: rows[c.ITEM_ID],
        c.REQUEST_TS_MS: ts_ms,
        c.CLICK_TS_MS: pc.if_else(clicked, ts_ms, pa.scalar(None, pa.int64())),
        c.OUTCOME: rows[c.OUTCOME],
        c.WEIGHT: rows[c.WEIGHT],
    }
    table = pa.table(columns, schema=schema)
    for name in rows.column_names:
        if name not in (*SOURCE_COLUMNS, *source.order, source.day):
            table = table.append_column(name, rows[name])
    return table


def _test_positives(test: pa.Table, dropped: Dropped) -> pa.Table:
    test = dropped.drop(test, pc.not_equal(test[c.OUTCOME], c.CLICKED), HELD_OUT_NOT_POSITIVE)
    if not test.num_rows:
        raise DataError(f"the test file has no positive that can be used; dropped: {dict(dropped.counts)}")
    ts_ms = test[c.TS_MS] if c.TS_MS in test.column_names else pa.nulls(test.num_rows, pa.int64())
    schema = holdout_schema(test.schema.field(c.USER_ID).type, test.schema.field(c.ITEM_ID).type)
    pairs = pa.table([test[c.USER_ID], test[c.ITEM_ID], ts_ms], schema=schema)
    pairs = pairs.sort_by([(name, "ascending") for name in pairs.column_names])
    same = np.zeros(pairs.num_rows, np.bool_)
    same[1:] = np.all([np.diff(codes(column)) == 0 for column in pairs.columns], axis=0)
    return dropped.drop(pairs, pa.array(same), DUPLICATE_EVENT)


def replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """The table with another column in the place of that name."""
    return table.set_column(table.schema.get_field_index(name), name, column)
