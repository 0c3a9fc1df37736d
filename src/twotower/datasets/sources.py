"""Reading what users have: Parquet and delimited text, alone or in folders, as one table; errors name the file.

A folder is read as Spark and DuckDB read one: folders that are named `column=value` are columns, names that begin with
`_` or `.` are left out, and every other file is read or named as not read.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from twotower.datasets.text_file import (
    COMPRESSIONS,
    PLAIN_TEXT,
    Kind,
    TextForm,
    read_text,
    read_type,
    word_among_numbers,
)
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.schema.tables import check_distinct, is_text, require_columns, undictionaried

PARQUET: Final = (".parquet", ".pq", ".parq")
TEXT: Final = (".csv", ".tsv", ".txt")
LINES: Final = (".jsonl", ".ndjson")
"""JSON lines: an object a line."""
ARROW: Final = (".arrow", ".feather")
ATOMIC: Final = (".inter", ".user", ".item")
"""RecBole's atomic files: text with tabs, whose heading has `name:type`."""
_JSON_BLOCK: Final = 64 << 20
NULL_FOLDER: Final = "__HIVE_DEFAULT_PARTITION__"
"""The value of a folder that stands for a missing one."""
UNTYPED: Final = {b"twotower": b"untyped"}
"""Metadata of a column that was text: its integers may be taken for text again, because they are written alike."""
RATING: Final = "rating"

_KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys((c.USER_ID, c.ITEM_ID, c.REQUEST_ID), "id"),
    **dict.fromkeys((c.OUTCOME, c.CHANNEL), "text"),
    **dict.fromkeys((c.TS_MS, c.WEIGHT, RATING, c.POSITION, c.SCORE, c.PROBABILITY, c.PROPENSITY), "number"),
}
"""What the text of our own columns becomes; that of all others whatever it looks like."""


@dataclass(frozen=True)
class FileColumns:
    """Columns of a file."""

    names: Mapping[str, str]
    """Types of all columns, by name in the file."""
    columns: Mapping[str, pa.ChunkedArray]
    """Those that were read."""
    untyped: frozenset[str]
    """Columns that are text without a type."""


@dataclass(frozen=True)
class SourceFile:
    """A file, and the columns that the names of its folders are."""

    path: Path
    folders: Mapping[str, str | None] = field(default_factory=dict)
    """Values as text, by column."""
    read: Callable[[Path, Sequence[str]], FileColumns] | None = None
    """Reads the named columns of a file that is neither Parquet nor delimited text with a heading."""


@dataclass(frozen=True)
class FoundFiles:
    """The files of a table."""

    files: tuple[SourceFile, ...]
    not_read: tuple[Path, ...] = ()
    """Files below the folder that are of no kind that is read."""


@dataclass(frozen=True)
class SourceColumn:
    """A column of a source."""

    name: str
    """In the files."""
    type: str
    """In the files, or as their text was read."""
    missing: int | None
    """Empty values; None where the column was not read."""
    to: str | None
    """Its name in the rows that were read; None = left out."""
    note: str = ""
    """Why it is left out, or has this type."""


@dataclass(frozen=True)
class Read:
    """The rows of files, and what was in the files."""

    rows: pa.Table
    columns: tuple[SourceColumn, ...]
    not_read: tuple[Path, ...] = ()


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> Read:
    """The rows of a file, or of all files below a folder; errors and columns are those of `read_tables`."""
    return read_tables(find_files(path), columns)


def find_files(path: Path, without: Collection[Path] = (), pattern: str = "*", any_name: bool = False) -> FoundFiles:
    """A file itself, or the files below a folder in the order of their names.

    Left out are the files and folders of `without`, and files whose name does not match `pattern`: those are another
    table's. With `any_name` a single file of any other name is text.

    Raises:
        DataError: nothing there, or a file of a kind that is not read.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    kinds = ", ".join((*PARQUET[:1], *TEXT, LINES[0], ARROW[0]))
    packed = ", ".join(COMPRESSIONS)
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder")
        if not any_name and not _is_read(path):
            raise DataError(f"{path} ends in none of {kinds} (text also with {packed}): write one of these")
        return FoundFiles((SourceFile(path),))
    left_out = {other.resolve() for other in without}
    files, not_read = [], []
    for file in sorted(files_below(path, left_out)):
        if not fnmatchcase(file.name, pattern):
            continue
        if file.is_file() and _is_read(file):
            files.append(SourceFile(file, _folder_columns(file.relative_to(path).parts[:-1])))
        else:
            not_read.append(file)
    if not files:
        other = f"; there is {not_read[0].name}" if not_read else ""
        raise DataError(f"{path} has no file {pattern} that ends in one of {kinds} (text also with {packed}){other}")
    return FoundFiles(tuple(files), tuple(not_read))


def read_tables(found: FoundFiles, columns: Mapping[str, str] | None = None, form: TextForm = PLAIN_TEXT) -> Read:
    """The rows of several files with the same columns: some, with the names that they get, or all under their own.

    Text has no types of its own. It gets the type of the Parquet files among them, else one that all its values have.

    Raises:
        DataError: a damaged file, a missing column, or columns or types that do not go together.
    """
    parts = [_read_file(file, columns, form) for file in found.files]
    first = parts[0]
    for part in parts:
        if set(part.names) != set(first.names):
            raise DataError(
                f"{part.path} has the columns {', '.join(part.names)}, {first.path} has {', '.join(first.names)}: "
                "they must be the same. A file that is no part of the table goes elsewhere, or its name begins with _"
            )
    kept = list(first.names) if columns is None else list(columns)
    arrays, fields, seen = [], [], []
    for name in kept:
        to = name if columns is None else columns[name]
        if not name or name.startswith("__index_level_"):
            seen.append(SourceColumn(name, "", None, None, "left out: an index without a name"))
            continue
        column, untyped = _together([(part, part.columns[name]) for part in parts], name, to)
        arrays.append(column)
        fields.append(pa.field(to, column.type, metadata=UNTYPED if untyped else None))
        seen.append(SourceColumn(name, str(column.type), column.null_count, to, _note(column, untyped, to)))
    others = sorted(set(first.names) - set(kept))
    seen += [SourceColumn(name, first.names[name], None, None, "left out: not used") for name in others]
    return Read(pa.table(arrays, schema=pa.schema(fields)), tuple(seen), found.not_read)


def renamed(read: Read, name: str, to: str) -> Read:
    """The rows with another name of a column, if they have it."""
    columns = tuple(replace(column, to=to) if column.to == name else column for column in read.columns)
    names = [to if other == name else other for other in read.rows.column_names]
    return replace(read, rows=read.rows.rename_columns(names), columns=columns)


def read_lines(path: Path, columns: Mapping[str, pa.DataType]) -> Read:
    """A file of GroupLens: Latin-1, no heading, values separated by `::`; `columns` are names and types in order.

    Raises:
        DataError: the file is missing, or a line is not of this form.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    data = path.read_bytes()
    if not data.strip() or b"\0" in data:
        raise DataError(f"{path} is {'cut or damaged: it has zero bytes' if data.strip() else 'empty'}")
    # Arrow splits at one character only: a control character that no title holds stands for `::`
    text = data.replace(b"::", b"\x1f").decode("latin-1").encode()
    try:
        rows = pa_csv.read_csv(
            pa.BufferReader(text),
            pa_csv.ReadOptions(column_names=list(columns)),
            pa_csv.ParseOptions(delimiter="\x1f", quote_char=False),
            pa_csv.ConvertOptions(column_types=dict(columns), strings_can_be_null=True, null_values=[""]),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not of the form {'::'.join(columns)}: {error}") from None
    seen = [SourceColumn(name, str(rows[name].type), rows[name].null_count, name) for name in rows.column_names]
    return Read(rows, tuple(seen))


@dataclass(frozen=True)
class _ReadFile:
    """A file that was read."""

    path: Path
    names: Mapping[str, str]
    """Types of all columns, those of folders too, by name in the file."""
    columns: Mapping[str, pa.ChunkedArray]
    """Those that are wanted, by name in the file."""
    untyped: frozenset[str]
    """Columns that are text without a type."""


def _is_read(path: Path) -> bool:
    if path.suffix.lower() in COMPRESSIONS:
        return path.with_suffix("").suffix.lower() in (*TEXT, *LINES, *ATOMIC, "")
    return path.suffix.lower() in (*PARQUET, *TEXT, *LINES, *ARROW, *ATOMIC)


def is_delimited(path: Path) -> bool:
    """The file is text of values and delimiters, not Parquet, Arrow or JSON lines, by its name."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return suffix.lower() not in (*PARQUET, *LINES, *ARROW)


def files_below(folder: Path, left_out: Collection[Path]) -> Iterator[Path]:
    """Files below a folder that are not hidden; a link to a folder above it is not followed."""
    entered = {folder.resolve()}
    for root, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):
            inner = Path(root, name).resolve()
            if not _hidden(name) and inner not in entered and inner not in left_out:
                entered.add(inner)
                kept.append(name)
        folders[:] = kept
        for name in names:
            path = Path(root, name)
            if not _hidden(name) and path.resolve() not in left_out:
                yield path


def _hidden(name: str) -> bool:
    """As Spark has it: `_name=value` is a column."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _folder_columns(folders: Sequence[str]) -> dict[str, str | None]:
    """The columns that folders named `column=value` are.

    >>> _folder_columns(["2025", "outcome=clicked", "city=New%20York", "shop=__HIVE_DEFAULT_PARTITION__"])
    {'outcome': 'clicked', 'city': 'New York', 'shop': None}
    """
    pairs = [folder.partition("=") for folder in folders if "=" in folder]
    return {unquote(name): None if value in (NULL_FOLDER, "") else unquote(value) for name, _, value in pairs if name}


def _read_file(file: SourceFile, columns: Mapping[str, str] | None, form: TextForm) -> _ReadFile:
    path = file.path
    if file.read is not None and columns is not None:
        own = file.read(path, list(columns))
        require_columns(pa.schema([(name, pa.null()) for name in own.columns]), columns, str(path))
        return _ReadFile(path, own.names, own.columns, own.untyped)
    if path.suffix.lower() in PARQUET:
        names, read = _read_parquet(path, columns)
        untyped: set[str] = set()
    elif not is_delimited(path):
        table = _read_whole(path)
        names = {entry.name: str(entry.type) for entry in table.schema}
        read = {name: _decoded(table[name], f"{path}, column {name}") for name in table.column_names}
        untyped = set()
    else:
        tabs = path.suffix.lower() in ATOMIC or path.with_suffix("").suffix.lower() in ATOMIC
        read = read_text(path, replace(form, delimiter=form.delimiter or "\t") if tabs else form)
        names = dict.fromkeys(read, "text")
        untyped = set(read)
    rows = len(next(iter(read.values()))) if read else 0
    for name, value in file.folders.items():
        if name in read:
            _check_folder(name, value, read[name], path)
        elif name not in names:
            names[name] = "folder"
            read[name] = pa.chunked_array([pa.repeat(pa.scalar(value, pa.string()), rows)])
            untyped.add(name)
    if columns is not None:
        require_columns(pa.schema([(name, pa.null()) for name in names]), columns, str(path))
        read = {name: read[name] for name in columns}
    return _ReadFile(path, names, read, frozenset(untyped))


def _read_whole(path: Path) -> pa.Table:
    """A file of JSON lines or Arrow."""
    try:
        with pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower())) as stream:
            if path.suffix.lower() not in ARROW:
                table = pa_json.read_json(stream, pa_json.ReadOptions(use_threads=False, block_size=_JSON_BLOCK))
            else:
                data = stream.read()
                is_file = data.startswith(b"ARROW1")
                opened = pa.ipc.open_file(data) if is_file else pa.ipc.open_stream(data)
                table = opened.read_all()
        check_distinct(table.column_names, str(path))
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read, it is cut, damaged or of another kind: {error}") from None
    return table


def _read_parquet(path: Path, columns: Mapping[str, str] | None) -> tuple[dict[str, str], dict[str, pa.ChunkedArray]]:
    """The types of all columns, and the values of those that are wanted, as plain strings and without dictionaries."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_distinct(schema.names, str(path))
            # without a wanted column, one other tells the number of rows
            wanted = schema.names if columns is None else [name for name in columns if name in schema.names]
            table = file.read(wanted or schema.names[:1])
            table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read, it is cut, damaged or no Parquet: {error}") from None
    read = {name: _decoded(table[name], f"{path}, column {name}") for name in table.column_names}
    return {entry.name: str(entry.type) for entry in schema}, read


def _decoded(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """A column without dictionaries and with one type of text; bytes that are no text are a `DataError`."""
    column = undictionaried(column)
    kind = column.type
    if is_text(kind):
        return column.cast(pa.string())
    if pa.types.is_fixed_size_binary(kind) or kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        try:
            return column.cast(pa.binary()).cast(pa.string())
        except pa.ArrowException:
            raise DataError(f"{where} is of type {kind} and holds bytes that are not UTF-8: write it as text") from None
    return column


def _check_folder(name: str, value: str | None, column: pa.ChunkedArray, path: Path) -> None:
    """Refuse a file that says something else than its folder."""
    try:
        expected = pa.scalar(value, pa.string()).cast(column.type)
        same = pc.all(column.is_null() if value is None else pc.fill_null(pc.equal(column, expected), False)).as_py()
    except pa.ArrowException:
        same = False
    if same is False:
        raise DataError(
            f"{path}: the folder says {name}={value}, the column {name} of the file holds "
            f"{pc.unique(column).to_pylist()[:3]}: rename the folder or the column"
        )


def _together(parts: Sequence[tuple[_ReadFile, pa.ChunkedArray]], name: str, to: str) -> tuple[pa.ChunkedArray, bool]:
    """A column of all files, and whether none of them says its type."""
    typed = [column for part, column in parts if name not in part.untyped]
    texts = [column for part, column in parts if name in part.untyped]
    types = {column.type for column in typed if not pa.types.is_null(column.type)}
    text = pa.chunked_array([chunk for column in texts for chunk in column.chunks], pa.string())
    if texts and types != {pa.string()}:
        text = read_type(text, _KINDS.get(to, "any"))
    columns, begin = [], 0
    for part, column in parts:
        columns.append(text.slice(begin, len(column)) if name in part.untyped else column)
        begin += len(column) if name in part.untyped else 0
    try:
        tables = [pa.table([column], names=[name]) for column in columns]
        together = pa.concat_tables(tables, promote_options="permissive").column(0)
    except pa.ArrowException:
        paths = {str(column.type): part.path for (part, _), column in zip(parts, columns, strict=True)}
        seen = " and ".join(f"{kind} in {path}" for kind, path in sorted(paths.items()))
        raise DataError(f"the files hold different types in column {name}, {seen}: write one type") from None
    return together, not types and bool(texts)


def _note(column: pa.ChunkedArray, untyped: bool, to: str) -> str:
    """Why text of numbers is no number."""
    if not untyped or not pa.types.is_string(column.type) or _KINDS.get(to, "any") == "text":
        return ""
    word = word_among_numbers(column)
    return "" if word is None else f"text, because it holds {word!r}"
