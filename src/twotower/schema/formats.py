"""Tables of users and of recommendations as files: Parquet, CSV or JSON lines, as the end of the name says."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import TEMPORARY, whole_file
from twotower.schema.tables import check_distinct

PARQUET, CSV, JSON_LINES = ".parquet", ".csv", ".jsonl"
FORMATS = (PARQUET, CSV, JSON_LINES)
ARRAY = ".npy"
"""The end of a file of vectors alone."""


def format_of(path: Path, option: str, formats: Sequence[str] = FORMATS) -> str:
    """The format of a file by the end of its name, upper or lower case.

    Raises:
        ConfigError: another end, with those that are known.

    >>> format_of(Path("lists.CSV"), "--out")
    '.csv'
    """
    if (end := path.suffix.lower()) not in formats:
        raise ConfigError(f"{option} {path}: the name of the file ends in {' or '.join(formats)}, which is its format")
    return end


def check_writable(path: Path, option: str, formats: Sequence[str] = FORMATS) -> None:
    """Refuse a file that cannot be written, before there is anything to write.

    Raises:
        ConfigError: another end of its name; a folder has this name; a parent is a file; no permission.
    """
    format_of(path, option, formats)
    try:
        if path.is_dir():
            raise ConfigError(f"{option} {path}: a folder stands there: give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f"{TEMPORARY}try-{path.name}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}") from None


@contextmanager
def write_rows(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that writes tables one below the other into a file, which is whole in the end or absent."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        match format_of(path, "--out"):
            case ".csv":
                with pa_csv.CSVWriter(file, schema) as rows:
                    yield rows.write_table
            case ".jsonl":
                yield lambda table: file.writelines(orjson.dumps(row) + b"\n" for row in table.to_pylist())
            case _:
                with pq.ParquetWriter(file, schema, compression="zstd") as columns:
                    yield columns.write_table


def read_rows(path: Path, types: Mapping[str, pa.DataType], option: str) -> pa.Table:
    """The rows of a file that an option names.

    CSV has no types: its columns get those of `types`, or else are text. Only an empty field is missing.

    Raises:
        ConfigError: another end of its name.
        DataError: it is missing, damaged, or holds text that is not of its column's type.
    """
    end = format_of(path, option)
    try:
        if end == PARQUET:
            with pq.ParquetFile(path) as stored:
                table = stored.read()
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                table = _of_text(file, types) if end == CSV else _of_json(file)
    except (OSError, pa.ArrowException, UnicodeError, ValueError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{option} {path} cannot be read: {told}") from None
    check_distinct(table.column_names, f"{option} {path}")
    return table


def _of_text(file: IO[str], types: Mapping[str, pa.DataType]) -> pa.Table:
    rows = csv.reader(file, strict=True)
    names = next(rows, [])
    columns: list[list[str | None]] = [[] for _ in names]
    for row in rows:
        if not row:
            continue
        if len(row) != len(names):
            raise ValueError(
                f"line {rows.line_num} has {len(row)} fields, and the first one names {len(names)} columns"
            )
        for column, value in zip(columns, row, strict=True):
            column.append(value or None)
    arrays = []
    for name, column in zip(names, columns, strict=True):
        kind = types.get(name, pa.string())
        if not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise ValueError(f"column {name} holds {kind}, which CSV cannot hold: write {PARQUET} or {JSON_LINES}")
        try:
            arrays.append(pa.array(column, pa.string()).cast(kind))
        except pa.ArrowInvalid as error:
            raise ValueError(f"column {name} holds text that is no {kind}: {error}") from None
    return pa.table(arrays, names=names)


def _of_json(file: io.TextIOBase | IO[str]) -> pa.Table:
    rows = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} is no object such as {{"user_id": 7}}')
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
            raise ValueError(f"column {name} holds values of more than one type: {error}") from None
    return pa.table(columns)
