"""Lines of values without quotes, and lines of JSON, as columns; lines of another form are counted, not an error."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import pyarrow as pa
import pyarrow.csv as pa_csv

from twotower.datasets.sources import FileColumns
from twotower.datasets.tables import EXAMPLE_CHARACTERS, Dropped
from twotower.datasets.text_file import COMPRESSIONS
from twotower.schema.errors import DataError

BAD_LINE: Final = "bad_line"
_BLOCK_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Lines:
    """Values without quotes, in lines without a heading."""

    columns: tuple[str, ...]
    """Their names, in the order of the values."""
    separator: str = "\t"
    heading: str = ""
    """A first line that begins like this holds names, and is passed over."""
    encoding: str = "utf-8"


def read_plain_lines(path: Path, names: Sequence[str], form: Lines, dropped: Dropped) -> FileColumns:
    """Columns of text by name. A line with another number of values is dropped as `bad_line`.

    Raises:
        DataError: the file is empty, damaged, or in another encoding.
    """
    data = _unpacked(path)
    if not data.strip() or b"\0" in data:
        raise DataError(f"{path} is {'cut or damaged: it has zero bytes' if data.strip() else 'empty'}")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode(form.encoding).encode()
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}, line {line}: not in {form.encoding}, in which it is published") from None

    def judge(row: pa_csv.InvalidRow) -> str:
        _count(row.text, dropped)
        return "skip"

    skipped = 1 if form.heading and text.startswith(form.heading.encode()) else 0
    try:
        rows = pa_csv.read_csv(
            pa.BufferReader(text),
            pa_csv.ReadOptions(
                column_names=form.columns, skip_rows=skipped, block_size=_BLOCK_BYTES, use_threads=False
            ),
            pa_csv.ParseOptions(delimiter=form.separator, quote_char=False, invalid_row_handler=judge),
            pa_csv.ConvertOptions(
                column_types=dict.fromkeys(form.columns, pa.string()),
                include_columns=list(names),
                strings_can_be_null=True,
                null_values=[""],
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not of the form {form.separator.join(form.columns)}: {error}") from None
    columns = {name: rows[name] for name in rows.column_names}
    return FileColumns(dict.fromkeys(form.columns, "text"), columns, frozenset(columns))


def read_json_lines(path: Path, names: Sequence[str], dropped: Dropped) -> FileColumns:
    """Values of some keys by name, null where an object lacks them. A line that is no object is dropped as `bad_line`.

    Raises:
        DataError: the file is damaged, has no object, or the values of a key have several types.
    """
    parts: list[pa.Table] = []
    keys: dict[str, str] = {}
    for lines in _blocks(path):
        objects = [one for line in lines if (one := _object(line, dropped)) is not None]
        keys |= dict.fromkeys((key for one in objects[:1000] for key in one), "JSON")
        try:
            arrays = [pa.array([one.get(name) for one in objects]) for name in names]
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"{path}: a key has values of several types: {error}") from None
        parts.append(pa.table(arrays, names=list(names)))
    if not keys:
        raise DataError(f"{path} has no line with a JSON object")
    try:
        rows = pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{path}: a key has values of several types: {error}") from None
    columns = {name: rows[name] for name in names if name in keys}
    return FileColumns(keys | {name: str(column.type) for name, column in columns.items()}, columns, frozenset())


def _unpacked(path: Path) -> bytes:
    return b"".join(_bytes(path))


def _bytes(path: Path) -> Iterator[bytes]:
    """A file in blocks, unpacked."""
    try:
        with pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower())) as stream:
            while block := stream.read(_BLOCK_BYTES):
                yield block
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read, it is cut or damaged: {error}") from None


def _blocks(path: Path) -> Iterator[list[bytes]]:
    """The lines of a file, in lists of about a block."""
    rest = b""
    for block in _bytes(path):
        *lines, rest = (rest + block).split(b"\n")
        yield lines
    yield [rest]


def _object(line: bytes, dropped: Dropped) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        _count(line.decode("utf-8", "replace"), dropped)
        return None
    return value


def _count(line: str, dropped: Dropped) -> None:
    dropped.counts[BAD_LINE] += 1
    dropped.examples.setdefault(BAD_LINE, {"line": line[:EXAMPLE_CHARACTERS]})
