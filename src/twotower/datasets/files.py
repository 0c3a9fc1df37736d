"""Your own files as the section `[import]` of a configuration describes them: columns under other names, times in any
form, clicks as values, and users and items split off from one joined table.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.holdout import parse_holdout, split
from twotower.datasets.interactions import UNITS, with_time, with_weight
from twotower.datasets.options import EventTime, ImportSection, TableFiles, Unit
from twotower.datasets.sources import FoundFiles, Read, SourceColumn, find_files, read_tables, renamed
from twotower.datasets.tables import Source, assemble, parse_positive, replaced
from twotower.datasets.text_file import TextForm
from twotower.datasets.workspace import ImportReport, check_vacant, write_workspace
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError

NAME: Final = "files"
TIME: Final = "twotower:time"
"""A temporary name of the column of times: under `ts_ms` text would be read as numbers."""
_MARK: Final = "twotower:outcome"
"""A temporary name of the column of outcomes."""
_FOREIGN: Final = r"[^0-9.,\-]"
_DECIMAL_COMMA: Final = r",[0-9]{1,2}$"


def import_files(section: ImportSection, out: Path, clock_ms: ClockMs = now_ms) -> ImportReport:
    """Make a workspace of the files of a section; `out` is empty or absent.

    Raises:
        ConfigError: names or rules that do not fit each other; something stands at `out`.
        DataError: a file is not what the section says.
    """
    rule = None if section.holdout is None else parse_holdout(section.holdout)
    check_vacant(out)
    tables = assemble(read_files(section), None, clock_ms)
    arguments: dict[str, Any] = {
        "files": {
            name: table.files for name in ("events", "users", "items") if (table := getattr(section, name)) is not None
        },
        "timezone": section.timezone,
        "time_unit": section.time_unit,
        "time_format": section.time_format,
        "positive": section.positive,
        "holdout": section.holdout,
    }
    return write_workspace(out, tables, None if rule is None else split(tables, rule), arguments)


def read_files(section: ImportSection) -> Source:
    """Events, users and items of a section, unchecked.

    Raises:
        ConfigError: two columns get one name, or a name that is needed is missing.
        DataError: a file is missing or damaged, or a time cannot be read.
    """
    minimum = parse_positive(section.positive)
    where = ", ".join(section.events.files)
    events = _events(section, where)
    if minimum is not None and c.OUTCOME in events.rows.column_names:
        raise ConfigError(f"import.positive = {section.positive}: {where} has outcomes, which say what is a positive")
    tables = {"events": events}
    for name, key in (("users", c.USER_ID), ("items", c.ITEM_ID)):
        table = getattr(section, name)
        if table is not None:
            tables[name] = _entities(table, key, name)
    tables = {name: _with_ids(table, section.ids) for name, table in tables.items()}
    return Source(
        name=NAME,
        **{name: table.rows for name, table in tables.items()},
        minimum=minimum,
        requests_have_rows=c.REQUEST_ID in events.rows.column_names,
        columns={name: _told_elsewhere(name, table, section) for name, table in tables.items()},
        not_read=tuple(sorted({str(path) for one in tables.values() for path in one.not_read})),
    )


def read_raw(table: TableFiles, columns: dict[str, str] | None = None) -> Read:
    """The rows of the files of a table: with the names of `columns`, or all under their own."""
    parts = [find_files(Path(file), any_name=True) for file in table.files]
    together = FoundFiles(
        tuple(file for part in parts for file in part.files), tuple(path for part in parts for path in part.not_read)
    )
    return read_tables(together, columns, TextForm(table.encoding, table.delimiter, table.heading))


def _named(table: TableFiles, needed: tuple[str, ...], name: str) -> dict[str, str]:
    """The columns that are read, with their new names.

    Raises:
        ConfigError: two columns get one name, or a needed name is missing.
    """
    named = {column: to for column, to in table.columns.items() if to}
    names = list(named.values())
    if twice := sorted({to for to in names if names.count(to) > 1}):
        raise ConfigError(f"import.{name}.columns: {twice[0]} is the name of more than one column")
    if missing := [to for to in needed if to not in names]:
        raise ConfigError(f"import.{name}.columns: no column is {missing[0]}: write COLUMN = {missing[0]!r}")
    return named


def _events(section: ImportSection, where: str) -> Read:
    named = _named(section.events, (c.USER_ID, c.ITEM_ID), "events")
    marks = {c.TS_MS: TIME} | ({c.OUTCOME: _MARK} if section.clicked else {})
    read = with_weight(read_raw(section.events, {name: marks.get(to, to) for name, to in named.items()}), where)
    if section.clicked and _MARK in read.rows.column_names:
        outcome = _outcomes(read.rows[_MARK], section.clicked, where)
        read = renamed(replace(read, rows=replaced(read.rows, _MARK, outcome)), _MARK, c.OUTCOME)
    if TIME not in read.rows.column_names:
        return with_time(read, EventTime(absent=True), where)
    read = replace(read, rows=replaced(read.rows, TIME, _zoned(read.rows[TIME], section, where)))
    name = next(name for name, to in section.events.columns.items() if to == c.TS_MS)
    if name in read.rows.column_names:  # another column has this name now
        name = TIME
    return with_time(renamed(read, TIME, name), EventTime(name, section.time_unit), where)


def _outcomes(column: pa.ChunkedArray, clicked: list[str], where: str) -> pa.ChunkedArray:
    """`clicked` where a value is one of these, else `impressed`.

    Raises:
        ConfigError: no row has such a value.
        DataError: a row has no value.
    """
    text = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string())))
    if text.null_count:
        raise DataError(f"{where}: {text.null_count} of {len(text)} rows do not say whether the item was clicked")
    is_click = pc.is_in(text, pa.array([value.lower() for value in clicked]))
    if not pc.any(is_click).as_py():
        seen = ", ".join(sorted(map(str, pc.unique(text).to_pylist()))[:5])
        raise ConfigError(f"import.clicked = {clicked}: no row of {where} has such a value; there are {seen}")
    return pc.if_else(is_click, c.CLICKED, c.IMPRESSED)


def _zoned(column: pa.ChunkedArray, section: ImportSection, where: str) -> pa.ChunkedArray:
    """Times as instants where they are text, dates or timestamps; numbers as they are.

    Raises:
        ConfigError: an unknown zone.
        DataError: text that is not of the format.
    """
    if section.time_format is not None:
        try:
            text = pc.utf8_trim_whitespace(column.cast(pa.string()))
            column = pc.strptime(text, format=section.time_format, unit="us")
        except pa.ArrowException as error:
            raise DataError(f"{where}: a time is not of import.time_format {section.time_format!r}: {error}") from None
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type) or column.type.tz is not None or section.timezone == "UTC":
        return column
    try:
        ZoneInfo(section.timezone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ConfigError(f"import.timezone {section.timezone}: write UTC or a name such as Asia/Shanghai") from None
    return pc.assume_timezone(column, section.timezone, ambiguous="earliest", nonexistent="latest")


def _entities(table: TableFiles, key: str, name: str) -> Read:
    read = read_raw(table, _named(table, (key,), name))
    rows = read.rows
    for column in table.numbers:
        rows = replaced(rows, column, as_numbers(_column(rows, column, f"import.{name}.numbers"), column))
    for column in table.days:
        rows = replaced(rows, column, _days(_column(rows, column, f"import.{name}.days"), column))
    read = replace(read, rows=rows)
    return _merged(read, key) if table.merge else read


def _column(rows: pa.Table, name: str, key: str) -> pa.ChunkedArray:
    if name not in rows.column_names:
        raise ConfigError(f"{key}: there is no column {name}; there are {', '.join(rows.column_names)}")
    return rows[name]


def as_numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Text such as `¥1,299.00` or `12,50 EUR` as numbers; a comma before one or two last digits is a decimal one.

    Raises:
        DataError: a value is no number.

    >>> as_numbers(pa.chunked_array([["$1,299.00", None, "-3"]]), "price").to_pylist()
    [1299.0, None, -3.0]
    >>> as_numbers(pa.chunked_array([["1.299,50 EUR"]]), "price").to_pylist()
    [1299.5]
    """
    if not pa.types.is_string(column.type):
        return column
    plain = pc.replace_substring_regex(column, _FOREIGN, "")
    if pc.any(pc.match_substring_regex(plain, _DECIMAL_COMMA)).as_py():
        plain = pc.replace_substring(pc.replace_substring(plain, ".", ""), ",", ".")
    else:
        plain = pc.replace_substring(plain, ",", "")
    try:
        return plain.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} holds a value that is no number: {error}") from None


def _days(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Dates and timestamps as days since 1970."""
    if not (pa.types.is_date(column.type) or pa.types.is_timestamp(column.type)):
        raise DataError(f"{where} is of type {column.type}, and its values are no dates: remove it from days")
    return column.cast(pa.date32(), safe=False).cast(pa.int32()).cast(pa.int64())


def _merged(read: Read, key: str) -> Read:
    """One row of each id, which does not depend on the order of the rows."""
    rows = read.rows.filter(pc.is_valid(read.rows[key]))
    others = [name for name in rows.column_names if name != key]
    for name in others:
        if pa.types.is_nested(rows.schema.field(name).type):
            raise DataError(f"column {name} holds lists: rows of one {key} cannot be merged; leave it out")
    sums = [(name, how) for name in others for how in ("min", "count_distinct")]
    merged = rows.group_by(key, use_threads=False).aggregate(sums)
    notes = {name: pc.sum(pc.greater(merged[f"{name}_count_distinct"], 1)).as_py() or 0 for name in others}
    names = [key, *(f"{name}_min" for name in others)]
    result = merged.select(names).rename_columns([key, *others])
    fields = [rows.schema.field(name).with_type(result.schema.field(name).type) for name in result.column_names]
    columns = tuple(
        replace(column, note=f"{count} ids have several values: the smallest is kept")
        if column.to is not None and (count := notes.get(column.to, 0))
        else column
        for column in read.columns
    )
    return replace(read, rows=result.cast(pa.schema(fields)), columns=columns)


def _with_ids(read: Read, ids: str) -> Read:
    """The rows with ids of the type that is asked for."""
    rows = read.rows
    for key in (c.USER_ID, c.ITEM_ID) if ids != "auto" else ():
        if key not in rows.column_names:
            continue
        try:
            rows = replaced(rows, key, rows[key].cast(pa.string() if ids == "string" else pa.int64()))
        except pa.ArrowException as error:
            raise DataError(f'import.ids = "int": a {key} is no integer ({error}); use "string"') from None
    return replace(read, rows=rows)


def _told_elsewhere(name: str, read: Read, section: ImportSection) -> tuple[SourceColumn, ...]:
    """The columns of a table; those that another table takes from the same files are told once, under `events`."""
    own = getattr(section, name)
    others = {
        other: {column for column, to in table.columns.items() if to}
        for other in ("events", "users", "items")
        if other != name and (table := getattr(section, other)) is not None and table.files == own.files
    }
    told = []
    for column in read.columns:
        taken = [other for other, columns in others.items() if column.name in columns]
        if column.to is not None or not taken:
            told.append(column)
        elif name == "events":
            told.append(replace(column, note=f"in {taken[0]}"))
    return tuple(told)


def unit_of(middle: float) -> str | None:
    """The unit in which a number is a time from 1980 to 2100; the units are too far apart for two of them."""
    return next(
        (unit for unit, factor in UNITS.items() if 315_532_800_000 <= middle * factor < 4_102_444_800_000), None
    )


@dataclass(frozen=True)
class Overrides:
    """What options say in place of a section."""

    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    unit: Unit | None = None
    timezone: str | None = None
    positive: str | None = None
    holdout: str | None = None


def overridden(section: ImportSection, options: Overrides) -> ImportSection:
    """The section with other columns of ids and time, and other rules; the column that had the name becomes context."""
    columns = dict(section.events.columns)
    for key, column in (
        (c.USER_ID, options.user_column),
        (c.ITEM_ID, options.item_column),
        (c.TS_MS, options.time_column),
    ):
        if column is not None and columns.get(column) != key:
            columns = {name: f"source_{name}" if to == key else to for name, to in columns.items()} | {column: key}
    given = {"time_unit": options.unit, "timezone": options.timezone, "positive": options.positive}
    given["holdout"] = options.holdout
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.time_column is not None:
        changed["time_format"] = None
    return replace(section, events=replace(section.events, columns=columns), **changed)
