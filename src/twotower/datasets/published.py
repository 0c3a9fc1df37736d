"""Public data sets from their published files: a description says which files and columns, one reader reads them all.

The descriptions are in `published_sets.py`. What no description can say is a function that changes the tables which
were read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.archive import ARCHIVES, opened
from twotower.datasets.options import ImportOptions
from twotower.datasets.plain_lines import Lines, read_json_lines, read_plain_lines
from twotower.datasets.sources import FileColumns, FoundFiles, SourceColumn, SourceFile, files_below, read_tables
from twotower.datasets.tables import Dropped, Source, parse_positive, replaced
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import EARLIEST_MS, is_number, is_text

UNITS_MS: Final[Mapping[str, int]] = {"s": 1000, "ms": 1}
"""Milliseconds in each unit of numbers."""
_LARGEST_TIME: Final = 10**15
"""Larger numbers are no times; they would not fit int64 in milliseconds."""
EVENT_TYPES: Final = ("view", "click", "like", "cart", "purchase", "dislike")
"""What a user did, the values of the column `event_type`."""

Rows = dict[str, pa.Table]
"""Tables that were read, by their name in the description."""


@dataclass(frozen=True)
class PublishedTable:
    """The files of one table."""

    files: str
    """Pattern of their names, such as `*.csv`; also with `.gz`, `.zst` or `.bz2` at the end."""
    columns: Mapping[str, str]
    """Columns that are read, and the name of each here."""
    form: Lines | Literal["csv", "json"] = "csv"
    """Plain lines, CSV with a heading, or one JSON object in each line."""
    without: str = ""
    """Pattern of files that are another table's."""
    needed: bool = True
    """Without its files the import is refused."""


@dataclass(frozen=True)
class PublishedDataset:
    """A public data set, as its files are published."""

    name: str
    tables: Mapping[str, tuple[PublishedTable, ...]]
    """`events`, where published `users` and `items`, and tables that `finish` needs. Of several forms of a table, the
    first that has files is read."""
    time: str | None
    """The unit of the times, `s` or `ms`, or the form of their text, such as `%Y-%m-%d`; None = events have none."""
    rated: bool = False
    """The events have a weight that `--positive` is compared with."""
    types: Mapping[str, str] = field(default_factory=dict)
    """The values of `event_type` in the files, and here."""
    of_items: tuple[str, ...] = ()
    """Columns of the events that say something about the item: the first known value becomes its feature."""
    requests_have_rows: bool = False
    """Rows of one user with the same request and time are one request."""
    finish: Callable[[Rows, Dropped], Rows] | None = None
    """Changes the tables right after they are read."""


def read_published(dataset: PublishedDataset, src: Path, options: ImportOptions) -> Source:
    """Read a data set from its folder, its archive, or the file of its events.

    Rows that cannot be used are dropped and counted: `bad_line` (not of the form of the file), `bad_time` (no time, or
    one before 1980), `unknown_event_type`, `repeated_id` (a second row of one user or item).

    Raises:
        ConfigError: `positive` is a number where there is no rating.
        DataError: files or columns are missing, or are not of their form.
    """
    minimum = parse_positive(options.positive)
    if minimum is not None and not dataset.rated:
        raise ConfigError(f"--positive {options.positive}: {dataset.name} has no ratings; use `all`")
    dropped = Dropped()
    with opened(src, partial(_is_wanted, dataset)) as (folder, others):
        rows, columns, not_read = _read(dataset, folder, src, dropped)
    if dataset.finish is not None:
        rows = dataset.finish(rows, dropped)
    events = _with_types(_with_times(rows["events"], dataset, str(src), dropped), dataset, dropped)
    if c.WEIGHT in events.column_names and is_text(events.schema.field(c.WEIGHT).type):
        events = replaced(events, c.WEIGHT, _numbers(events[c.WEIGHT]))  # null is a `bad_rating`
    if dataset.of_items:
        rows["items"] = first_known(events, c.ITEM_ID, dataset.of_items)
        events = events.drop_columns(list(dataset.of_items))
    rows["events"] = events
    for name, key in (("users", c.USER_ID), ("items", c.ITEM_ID)):
        if name in rows:
            rows[name] = _distinct(rows[name], key, dropped)
    return Source(
        name=dataset.name,
        **rows,
        minimum=minimum,
        requests_have_rows=dataset.requests_have_rows,
        columns={name: [_told(column, name, rows) for column in seen] for name, seen in columns.items()},
        not_read=tuple(sorted((*others, *not_read))),
        dropped=dropped,
    )


def _is_wanted(dataset: PublishedDataset, name: str) -> bool:
    return any(_matches(table, name) for forms in dataset.tables.values() for table in forms)


def _matches(table: PublishedTable, name: str) -> bool:
    """A file of this name belongs to the table; in small and capital letters alike."""
    name = name.lower()
    for packed in ("", ".gz", ".zst", ".bz2"):
        if fnmatchcase(name, table.files.lower() + packed):
            return not (table.without and fnmatchcase(name, table.without.lower()))
    return False


def _read(
    dataset: PublishedDataset, folder: Path, src: Path, dropped: Dropped
) -> tuple[Rows, dict[str, list[SourceColumn]], list[str]]:
    """The tables of a data set, what was in their files, and the files of the folder that are no table's."""
    files = [folder] if folder.is_file() else sorted(files_below(folder, set()))
    left = set(files)
    rows: Rows = {}
    columns: dict[str, list[SourceColumn]] = {}
    for name, forms in dataset.tables.items():
        table, found = next(((form, own) for form in forms if (own := _own(form, files))), (forms[0], []))
        if folder.is_file() and name == "events" and not found:
            table, found = forms[0], files  # one file of any name is that of the events
        if not found:
            if any(form.needed for form in forms):
                raise DataError(_missing(dataset, forms, src))
            continue
        left -= set(found)
        source_files = tuple(SourceFile(path, read=_reader(table, dropped)) for path in found)
        read = read_tables(FoundFiles(source_files), table.columns)
        rows[name] = read.rows
        reported = name if name in ("events", "users") else "items"  # tables beside them describe items
        columns.setdefault(reported, []).extend(read.columns)
    others = [] if folder != src else [str(path) for path in left]
    return rows, columns, others


def _own(table: PublishedTable, files: list[Path]) -> list[Path]:
    return [path for path in files if _matches(table, path.name)]


def _missing(dataset: PublishedDataset, forms: tuple[PublishedTable, ...], src: Path) -> str:
    names = " or ".join(form.files for form in forms)
    archives = [] if src.is_file() else [path.name for path in src.iterdir() if path.name.lower().endswith(ARCHIVES)]
    hint = f"; give the archive {sorted(archives)[0]} itself" if archives else ""
    return f"{src} has no file {names}, which {dataset.name} is made of{hint}"


def _reader(table: PublishedTable, dropped: Dropped) -> Callable[[Path, Sequence[str]], FileColumns] | None:
    if isinstance(table.form, Lines):
        return partial(read_plain_lines, form=table.form, dropped=dropped)
    return partial(read_json_lines, dropped=dropped) if table.form == "json" else None


def _with_times(events: pa.Table, dataset: PublishedDataset, where: str, dropped: Dropped) -> pa.Table:
    """The events with whole milliseconds; a value that is no time, or is before 1980, is dropped."""
    if dataset.time is None:
        return events
    column = events[c.TS_MS]
    times = milliseconds(column, dataset.time, f"{where}, the times")
    unreadable = pc.and_(pc.is_null(times), pc.is_valid(column))  # one that is missing is `null_time`
    bad = pc.or_(unreadable, pc.fill_null(pc.less(times, EARLIEST_MS), False))
    kept = dropped.drop(events.append_column("twotower:ms", times), bad, "bad_time")
    return replaced(kept.drop_columns(["twotower:ms"]), c.TS_MS, kept["twotower:ms"])


def milliseconds(column: pa.ChunkedArray, time: str, where: str) -> pa.ChunkedArray:
    """Times as whole milliseconds since 1970; null where a value is no time.

    Raises:
        DataError: the column is neither of numbers nor of text.

    >>> milliseconds(pa.chunked_array([["11/15/2019 8:55:22 AM"]]), "%m/%d/%Y %I:%M:%S %p", "").to_pylist()
    [1573808122000]
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
    if time not in UNITS_MS:
        if pa.types.is_null(kind):
            return column.cast(pa.int64())
        if not is_text(kind):
            raise DataError(f"{where} are of type {kind}, expected text like {time}")
        # `%p` reads capital letters only on some systems
        parsed = pc.strptime(
            pc.utf8_upper(column) if "%p" in time else column, format=time, unit="ms", error_is_null=True
        )
        return parsed.cast(pa.int64())
    numbers = _numbers(column) if is_text(kind) else column
    if not is_number(numbers.type):
        raise DataError(f"{where} are of type {kind}, expected numbers")
    within = pc.and_(pc.greater(numbers, -_LARGEST_TIME), pc.less(numbers, _LARGEST_TIME))
    numbers = pc.if_else(pc.fill_null(within, False), numbers, pa.scalar(None, numbers.type))
    return pc.round(pc.multiply(numbers, UNITS_MS[time])).cast(pa.int64())


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as float64, null where it is no number."""
    number = pc.match_substring_regex(column, r"^\s*[+-]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)\s*$")
    text = pc.if_else(number, pc.utf8_trim_whitespace(column), pa.scalar(None, pa.string()))
    return pc.replace_substring_regex(text, r"^\+", "").cast(pa.float64())


def _with_types(events: pa.Table, dataset: PublishedDataset, dropped: Dropped) -> pa.Table:
    """The events with the common words for what a user did; other words are dropped."""
    if not dataset.types:
        return events
    place = pc.index_in(events[c.EVENT_TYPE].cast(pa.string()), value_set=pa.array(list(dataset.types)))
    types = pa.array(list(dataset.types.values())).take(place.combine_chunks())
    events = dropped.drop(events, pc.is_null(place), "unknown_event_type")
    return replaced(events, c.EVENT_TYPE, pa.chunked_array([types.drop_null()]))


def _told(column: SourceColumn, name: str, rows: Rows) -> SourceColumn:
    """What became of a column that its own table does not keep."""
    if column.to is None or column.to in rows[name].column_names:
        return column
    other = next((other for other, table in rows.items() if column.to in table.column_names), None)
    note = "read to make other columns" if other is None else f"{column.to} of {other}"
    return replace(column, to=None, note=note)


def _distinct(table: pa.Table, name: str, dropped: Dropped) -> pa.Table:
    """Users or items with the first row of each id."""
    table = dropped.drop(table, pc.is_null(table[name]), "null_id")
    place = pc.index_in(table[name], value_set=pc.unique(table[name])).to_numpy()
    repeated = np.ones(table.num_rows, np.bool_)
    repeated[np.unique(place, return_index=True)[1]] = False
    return dropped.drop(table, pa.array(repeated), "repeated_id")


def first_known(events: pa.Table, name: str, columns: Sequence[str]) -> pa.Table:
    """A row for each id, with the first known value of some columns by time."""
    by_time = [name, *([c.TS_MS] if c.TS_MS in events.column_names else []), *columns]
    rows = events.select(by_time).filter(pc.is_valid(events[name]))
    rows = rows.sort_by([(column, "ascending") for column in by_time])
    first = rows.group_by(name, use_threads=False).aggregate([(column, "first") for column in columns])
    arrays = [first[name], *(first[f"{column}_first"] for column in columns)]
    return pa.table(arrays, schema=pa.schema([events.schema.field(column) for column in (name, *columns)]))
