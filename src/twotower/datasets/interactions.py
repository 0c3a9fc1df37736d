"""Your own interactions: a file of Parquet or text (CSV, TSV), or a folder of them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.options import EventTime, ImportOptions
from twotower.datasets.sources import RATING, Read, find_files, read_table, read_tables, renamed
from twotower.datasets.tables import Source, first_shown, parse_positive, replaced
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import mistaken_time

NAME: Final = "interactions"

UNITS: Final = {"s": 1000, "ms": 1, "us": 1 / 1000, "ns": 1 / 1_000_000}
"""Milliseconds in each."""

_TIMES: Final = re.compile(
    r"((event|click)_)?(time|timestamp|ts)|(event_)?date|datetime|when|day|created(_at)?|clicked_at|unix_?time|epoch|"
    r"(time|timestamp)_ms"
)
"""Names of times, whatever the values are."""
_LIKE_TIME: Final = re.compile(r"(^|_)(time|timestamp|date|datetime|ts|epoch)(_|$)|_(at|on|day)$")
"""Names that a time may have, if its values are of one."""


def read_interactions(src: Path, options: ImportOptions) -> Source:
    """Read `user_id`, `item_id`, where known `ts_ms`, `weight` or `rating`, `outcome`, `request_id`, and context.

    Rows of a user with the same request and time are one request: a page of impressions. The files of `users`, `items`
    and `test` may lie in the folder of the interactions.

    Raises:
        ConfigError: `positive` is a number, but the rows have outcomes; there is no such column of times.
        DataError: a file is missing or damaged, or a column looks like a time that nobody named.
    """
    minimum = parse_positive(options.positive)
    beside = [path for path in (options.users, options.items, options.test) if path is not None]
    found = read_tables(find_files(src, without=beside))
    read = with_time(with_weight(found, str(src)), options.event_time, str(src))
    if minimum is not None and c.OUTCOME in read.rows.column_names:
        raise ConfigError(
            f"--positive {options.positive}: {src} has a column {c.OUTCOME}, which says what is a positive"
        )
    tables = {"events": read}
    for name, path in (("users", options.users), ("items", options.items)):
        if path is not None:
            tables[name] = read_table(path)
    return Source(
        name=NAME,
        **{name: table.rows for name, table in tables.items()},
        minimum=minimum,
        requests_have_rows=c.REQUEST_ID in read.rows.column_names,
        columns={name: one.columns for name, one in tables.items()},
        not_read=tuple(sorted(str(path) for one in tables.values() for path in one.not_read)),
    )


def read_test(path: Path, options: ImportOptions) -> Read:
    """Read held-out interactions: `user_id`, `item_id`, where known `ts_ms`, `weight` or `rating`, `outcome`.

    Without a weight and an outcome every row counts as a positive, whatever the lowest rating of training is. The test
    may lack the column of times.

    Raises:
        DataError: the file is missing or damaged, or a column looks like a time that nobody named.
    """
    event_time = options.event_time
    read = with_weight(read_table(path), str(path))
    if event_time.column is None or event_time.column in read.rows.column_names:
        read = with_time(read, event_time, str(path))
    test = read.rows
    kept = [name for name in (c.USER_ID, c.ITEM_ID, c.TS_MS, c.WEIGHT, c.OUTCOME) if name in test.column_names]
    seen = [
        one if one.to in kept or one.to is None else replace(one, to=None, note="left out: not used")
        for one in read.columns
    ]
    test = test.select(kept)
    if options.positive != "all" and c.WEIGHT not in kept and c.OUTCOME not in kept:
        test = test.append_column(c.OUTCOME, pa.array([c.CLICKED] * test.num_rows, pa.string()))
    return replace(read, rows=test, columns=tuple(seen))


def with_weight(read: Read, where: str) -> Read:
    """The table with its `rating` under the name `weight`.

    Raises:
        DataError: it has both.
    """
    if RATING not in read.rows.column_names:
        return read
    if c.WEIGHT in read.rows.column_names:
        raise DataError(f"{where} has both {RATING} and {c.WEIGHT}, which are one thing here: keep one")
    return renamed(read, RATING, c.WEIGHT)


def with_time(read: Read, event_time: EventTime, where: str) -> Read:
    """The table with its times as `ts_ms`.

    Raises:
        ConfigError: the named column is absent, or one is named where there is to be none.
        DataError: the named column holds no times, or none is named and a column looks like one.
    """
    names = read.rows.column_names
    if event_time.absent:
        if event_time.column is not None:
            raise ConfigError(f"--time-column {event_time.column} and --without-time exclude each other")
        if c.TS_MS in names:
            raise ConfigError(f"--without-time: {where} has a column {c.TS_MS}: leave the option out")
        return read
    column = event_time.column or c.TS_MS
    if column in names:
        if column != c.TS_MS and c.TS_MS in names:
            raise ConfigError(f"--time-column {column}: {where} has a column {c.TS_MS} as well: rename or remove it")
        if column == c.TS_MS and event_time.column is None:
            return read
        times = _milliseconds(read.rows[column], event_time.unit, f"{where}, column {column}")
        _check_unit(read.rows[column], times, event_time.unit, f"{where}, column {column}")
        return renamed(replace(read, rows=replaced(read.rows, column, times)), column, c.TS_MS)
    if event_time.column is not None:
        raise ConfigError(f"--time-column {column}: {where} has no such column; it has {', '.join(names)}")
    likely = [name for name in names if _looks_like_time(name, read.rows[name])]
    if likely:
        raise DataError(
            f"{where} has no column {c.TS_MS}, but {likely[0]} ({read.rows[likely[0]].type}) looks like a time: give "
            f"--time-column {likely[0]} (of numbers also --time-unit s, ms, us or ns), or --without-time if events "
            "have none"
        )
    return read


def _milliseconds(column: pa.ChunkedArray, unit: str, where: str) -> pa.ChunkedArray:
    """Times as integer milliseconds since 1970, rounded down."""
    if unit not in UNITS:
        raise ConfigError(f"--time-unit {unit}: give one of {', '.join(UNITS)}")
    kind = column.type
    try:
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return column.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        if pa.types.is_integer(kind):
            column = column.cast(pa.int64())
            factor = UNITS[unit]
            return pc.multiply_checked(column, int(factor)) if factor >= 1 else pc.divide(column, round(1 / factor))
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            return pc.floor(pc.multiply(column.cast(pa.float64()), float(UNITS[unit]))).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} holds a time that is none in --time-unit {unit}: {error}") from None
    raise DataError(
        f"{where} is of type {kind}, such as {first_shown(column)}: a time is a number, or text like "
        "2025-01-31T12:00:00"
    )


def _check_unit(column: pa.ChunkedArray, times: pa.ChunkedArray, unit: str, where: str) -> None:
    """Refuse a unit in which most numbers are no time of a log, where another unit makes them one."""
    middle = _median(times)
    if middle is None or mistaken_time(middle) is None:
        return
    for other, factor in UNITS.items():
        if mistaken_time(int(middle / UNITS[unit] * factor)) is None:
            shown = pc.drop_null(column)[0].as_py()
            raise DataError(f"{where} holds {shown}, which is no time in --time-unit {unit}: give --time-unit {other}")


def _median(column: pa.ChunkedArray) -> int | None:
    middle = pc.quantile(column, 0.5, interpolation="lower")[0].as_py()
    return None if middle is None or not -1e30 < middle < 1e30 else int(middle)


def _looks_like_time(name: str, column: pa.ChunkedArray) -> bool:
    """A column of dates or timestamps, or one with such a name and, where it may mean something else, such values."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return True
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(" ", "_")
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if _TIMES.fullmatch(words) and not (words == "day" and number):
        return True
    middle = _median(column) if number and _LIKE_TIME.search(words) else None
    return middle is not None and (mistaken_time(middle) is None or "looks like" in str(mistaken_time(middle)))
