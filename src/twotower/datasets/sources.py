"""Reading what users have: Parquet and CSV files, alone or in folders, as one table with errors that name the file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from twotower.schema.errors import DataError
from twotower.schema.tables import require_columns

SUFFIXES = (".parquet", ".csv")


def read_table(path: Path, columns: Mapping[str, str] | None = None) -> pa.Table:
    """The rows of a Parquet or CSV file, or of all such files below a folder.

    Args:
        path: a file or a folder.
        columns: columns to read, with the names that they get; absent = all under their own names.

    Raises:
        DataError: nothing there, a damaged file, a missing column, or files that do not go together.
    """
    return read_tables(find_files(path), columns)


def find_files(path: Path, without: Collection[Path] = (), pattern: str = "*") -> list[Path]:
    """A file itself, or the Parquet and CSV files below a folder in the order of their names.

    Args:
        path: a file or a folder.
        without: files to leave out.
        pattern: that names below a folder match.

    Raises:
        DataError: nothing there, or a file of another kind.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is neither {' nor '.join(SUFFIXES)}")
        return [path]
    left_out = {other.resolve() for other in without}
    files = sorted(
        file
        for file in path.rglob(pattern)
        if file.suffix in SUFFIXES and not file.name.startswith((".", "_")) and file.resolve() not in left_out
    )
    if not files:
        raise DataError(f"{path} has no file {pattern} that ends in {' or '.join(SUFFIXES)}")
    return files


def read_tables(files: Sequence[Path], columns: Mapping[str, str] | None = None) -> pa.Table:
    """The rows of several Parquet or CSV files with the same columns.

    Raises:
        DataError: a damaged file, a missing column, or columns or types that do not go together.
    """
    tables = [_read_file(file, columns) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise DataError(
                f"{file} has the columns {', '.join(table.column_names)}, "
                f"{files[0]} has {', '.join(tables[0].column_names)}: they must be the same"
            )
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise DataError(f"the files of {files[0].parent} hold different types ({error}): write one type") from None


def read_lines(path: Path, columns: Mapping[str, pa.DataType]) -> pa.Table:
    """A file of GroupLens: Latin-1, no heading, values parted by `::`.

    Args:
        path: the file.
        columns: names and types of its columns in their order.

    Raises:
        DataError: the file is missing, or a line is not of this form.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    # Arrow splits at one character only: a control character that no title holds stands for `::`
    text = path.read_bytes().replace(b"::", b"\x1f").decode("latin-1").encode()
    try:
        return pa_csv.read_csv(
            pa.BufferReader(text),
            pa_csv.ReadOptions(column_names=list(columns)),
            pa_csv.ParseOptions(delimiter="\x1f", quote_char=False),
            pa_csv.ConvertOptions(column_types=dict(columns), strings_can_be_null=True),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not of the form {'::'.join(columns)}: {error}") from None


def _read_file(path: Path, columns: Mapping[str, str] | None) -> pa.Table:
    try:
        if path.suffix == ".csv":
            table = pa_csv.read_csv(path, convert_options=pa_csv.ConvertOptions(strings_can_be_null=True))
            if columns is None:
                return table
            require_columns(table, columns, str(path))
            return table.select(list(columns)).rename_columns(list(columns.values()))
        with pq.ParquetFile(path) as file:
            if columns is None:
                return file.read()
            require_columns(file.schema_arrow, columns, str(path))
            return file.read(list(columns)).select(list(columns)).rename_columns(list(columns.values()))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
