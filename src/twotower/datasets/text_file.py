"""Delimited text (CSV, TSV) as columns of text, and the types that text has.

A text file has no types: they are read off the values of all files of a table together. Only the empty field is
missing, quoted or not; `null`, `NaN` or `NA` are words like any other. A number that text says in another way than
this system would write it (`007`, `+5`, an integer beyond int64) stays text: as a number it would become another id.
"""

import codecs
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from twotower.schema.errors import DataError
from twotower.schema.tables import check_distinct

COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}

Kind = Literal["id", "number", "text", "any"]
"""What values of a column may become: an id is an integer or text, a number is one in whatever way it is written."""

_BLOCK_BYTES: Final = 16 << 20
_LARGEST_BLOCK: Final = (1 << 31) - 1
_HEAD_BYTES: Final = 1 << 20
_HEAD_LINES: Final = 200
_ALL_DELIMITERS: Final = ("\t", ",", ";", "|", "::", "\x01", "^", " ")
_DELIMITERS: Final = (",", "\t", ";", "|")
_ENCODINGS: Final = ("gb18030", "shift_jis", "euc_kr", "windows-1251", "windows-1252")
"""Encodings that spreadsheets write, to be named where a file is not UTF-8; the last ones fit nearly every file."""
_NO_NUMBER: Final = r"[^0-9eE+\-. ]|^\s*[+]|^\s*-?0[0-9]|^\s*-?[0-9]{16,}\s*$"
"""Text that Arrow would read as a number, but that is not how this number is written."""
_BOOLEANS: Final = ("true", "false", "True", "False", "TRUE", "FALSE")


@dataclass(frozen=True)
class TextForm:
    """How a text file is written; absent = found out from its name and heading."""

    encoding: str | None = None
    """Absent = UTF-8, or UTF-16 with a byte order mark."""
    delimiter: str | None = None
    """Between values, one character or more; absent = see `read_text`."""
    heading: bool = True
    """The first line has the names of the columns; without it they are `column_1`, `column_2`, ..."""


PLAIN_TEXT: Final = TextForm()
_STANDS_FOR_DELIMITER: Final = "\x1f"
"""Arrow splits at one character only: this control character stands for a longer delimiter."""


def read_text(path: Path, form: TextForm = PLAIN_TEXT) -> dict[str, pa.ChunkedArray]:
    """The columns of a delimited text file, every value as text, by name.

    A column without a name (pandas writes its index like that) has the empty name; of several, the last is given.
    The text is UTF-8, or UTF-16 with a byte order mark. The delimiter is a tab in `.tsv`, else the first of comma, tab,
    semicolon and bar that the heading has.

    Raises:
        DataError: an empty file, another encoding, a zero byte, a line with other columns than the heading, a quote
            that is never closed, a name that is there twice, or a damaged packed file; the message names the line.
    """
    data = _bytes_of(path, form.encoding)
    delimiter = form.delimiter or _delimiter(data, path)
    if len(delimiter) > 1:
        data, delimiter = data.replace(delimiter.encode(), _STANDS_FOR_DELIMITER.encode()), _STANDS_FOR_DELIMITER
    names, begin = _heading(data, delimiter, path)
    if not form.heading:
        names, begin = [f"column_{place}" for place in range(1, len(names) + 1)], 0
    check_distinct([name for name in names if name], str(path))
    return dict(zip(names, _parse(data, begin, names, delimiter, path), strict=True))


def text_form(path: Path) -> TextForm:
    """How a text file is written, judged by its content: encoding, delimiter, and whether it has a heading.

    Raises:
        DataError: the encoding cannot be told, or the file is empty or damaged.
    """
    head = _unpacked(path)
    encoding = "gb18030" if not _fits(head.removeprefix(b"\xff\xfe"), "utf-8") and _is_chinese(head) else None
    lines = [line for line in _bytes_of(path, encoding)[:_HEAD_BYTES].decode("utf-8", "ignore").splitlines() if line]
    lines = lines[:_HEAD_LINES]
    counts = {delimiter: {line.count(delimiter) for line in lines[:-1] or lines} for delimiter in _ALL_DELIMITERS}
    even = {delimiter: max(seen) for delimiter, seen in counts.items() if len(seen) == 1 and max(seen)}
    found = max(even, key=lambda delimiter: even[delimiter] * len(delimiter)) if even else None
    if found == " " and max((len(line.split(found)) for line in lines), default=0) < 2:
        found = None
    delimiter = found or _delimiter("\n".join(lines).encode(), path)
    first = [value.strip().strip('"') for value in lines[0].split(delimiter)]
    return TextForm(encoding, delimiter, heading=not all(re.fullmatch(r"-?[0-9.]+", value) for value in first[:2]))


def _is_chinese(data: bytes) -> bool:
    """Bytes that are GB18030 and no other usual encoding: most characters are of the common ones of GB 2312.

    Korean has its letters among the first of these rows, so some characters must lie beyond them.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or not _fits(data, "gb18030"):
        return False
    leads = re.findall(rb"([\x81-\xfe])[\x40-\xfe]", data)
    common = [lead for lead in leads if b"\xa1" <= lead <= b"\xd7"]
    beyond = [lead for lead in common if lead > b"\xc8"]
    return len(common) >= 0.9 * len(leads) > 0 and (len(beyond) >= 0.1 * len(leads) or not _fits(data, "euc_kr"))


def read_type(column: pa.ChunkedArray, kind: Kind = "any") -> pa.ChunkedArray:
    """Text as integers, numbers, booleans, days or times if every value is one, else as it is.

    >>> read_type(pa.chunked_array([["7", None, "12"]])).type, read_type(pa.chunked_array([["7", "007"]])).type
    (DataType(int64), DataType(string))
    """
    if kind == "text":
        return column
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column))])
    whole = _cast(column, pa.int64())
    if whole is not None and pc.all(pc.equal(whole.cast(pa.string()), column)).as_py():
        return whole
    read = None
    if kind == "number":
        trimmed = pc.utf8_trim_whitespace(column)
        read = _first_that_fits(pc.replace_substring_regex(trimmed, r"^\+", ""), pa.int64(), pa.float64())
    elif kind == "any":
        if not pc.any(pc.match_substring_regex(column, _NO_NUMBER)).as_py():
            read = _first_that_fits(pc.utf8_trim_whitespace(column), pa.int64(), pa.float64())
        if read is None and pc.all(pc.or_(pc.is_null(column), pc.is_in(column, pa.array(_BOOLEANS)))).as_py():
            read = pc.equal(pc.utf8_lower(column), "true")
        if read is None:
            read = _first_that_fits(
                column, pa.date32(), pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us", "UTC")
            )
    return column if read is None else read


def word_among_numbers(column: pa.ChunkedArray) -> str | None:
    """The first value that is no number, of a column of text in which most values are; else None."""
    numbers = pc.match_substring_regex(column, r"^\s*-?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?\s*$")
    if 2 * (pc.sum(numbers).as_py() or 0) <= len(column) - column.null_count:
        return None
    words = column.filter(pc.fill_null(pc.invert(numbers), False))
    return pc.min(words).as_py() if len(words) else None


def _first_that_fits(column: pa.ChunkedArray, *kinds: pa.DataType) -> pa.ChunkedArray | None:
    return next((read for kind in kinds if (read := _cast(column, kind)) is not None), None)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    try:
        return pc.cast(column, kind)
    except pa.ArrowException:
        return None


def _unpacked(path: Path) -> bytes:
    try:
        with pa.input_stream(str(path), compression=COMPRESSIONS.get(path.suffix.lower())) as stream:
            data: bytes = stream.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read, it is cut or damaged: {error}") from None
    return data


def _bytes_of(path: Path, encoding: str | None = None) -> bytes:
    """The file in UTF-8, unpacked, without a byte order mark."""
    data = _unpacked(path)
    if encoding is not None:
        try:
            data = data.decode(encoding).encode()
        except (LookupError, UnicodeError) as error:
            raise DataError(f"{path} cannot be read in the encoding {encoding}: {error}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeError as error:
            raise DataError(f"{path} begins as UTF-16 but is not whole: {error}. Save it as UTF-8") from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(f"{path} is empty: it needs a line with the names of its columns")
    zero = data.find(b"\0")
    if zero >= 0:
        line = 1 + data.count(b"\n", 0, zero)
        raise DataError(
            f"{path}, line {line}: a zero byte, which no text has. It was cut or damaged, or "
            "is in UTF-16 or UTF-32 without a mark: save it as UTF-8"
        )
    _check_utf8(data, path)
    return data


def _check_utf8(data: bytes, path: Path) -> None:
    """Refuse another encoding, and say which one it may be; blocks keep the memory of a large file small."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for begin in range(0, len(data), _BLOCK_BYTES):
            decoder.decode(data[begin : begin + _BLOCK_BYTES], begin + _BLOCK_BYTES >= len(data))
        return
    except UnicodeDecodeError:
        pass
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line, byte = 1 + data.count(b"\n", 0, error.start), data[error.start]
        fits = [name for name in _ENCODINGS if _fits(data, name)]
        likely = f"it may be {' or '.join(fits[:3])}. " if fits else ""
        raise DataError(
            f"{path}, line {line}: the byte 0x{byte:02X} is not UTF-8; {likely}Save the file as UTF-8: `CSV UTF-8` in "
            f"a spreadsheet, or iconv -f {fits[0] if fits else 'ENCODING'} -t UTF-8"
        ) from None


def _heading(data: bytes, delimiter: str, path: Path) -> tuple[list[str], int]:
    """The names of the columns, and where the lines after them begin."""
    consumed = 0

    def decoded() -> Iterator[str]:
        nonlocal consumed
        for line in _lines(data):
            consumed += len(line)
            yield line.decode()

    try:
        for row in csv.reader(decoded(), delimiter=delimiter):
            if row:
                return [name.strip() for name in row], consumed
    except csv.Error as error:
        raise DataError(f"{path}, line 1: the names of the columns cannot be read: {error}") from None
    raise DataError(f"{path} has no line with the names of its columns")


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines with their ends: line feed, carriage return, or both."""
    return (line.group() for line in re.finditer(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+$", data))


def _delimiter(data: bytes, path: Path) -> str:
    if any(suffix.lower() == ".tsv" for suffix in path.suffixes[-2:]):
        return "\t"
    first = next(line for line in _lines(data) if line.strip()).decode("utf-8", "replace")
    return next((delimiter for delimiter in _DELIMITERS if delimiter in first), ",")


def _parse(data: bytes, begin: int, names: list[str], delimiter: str, path: Path) -> list[pa.ChunkedArray]:
    """Every column as text, of the lines from `begin` on.

    Arrow would take a quote that is never closed for a value that holds all lines after it. So a line of too many
    columns is put at the end: if Arrow reports this line, no quote was open.
    """
    last = delimiter * (len(names) + 1)
    closed = False
    ragged: list[pa_csv.InvalidRow] = []

    def judge(row: pa_csv.InvalidRow) -> str:
        nonlocal closed
        if row.text == last:
            closed = True
            return "skip"
        ragged.append(row)
        return "error"

    text = b"".join([memoryview(data)[begin:], b"\n", last.encode(), b"\n"])
    options = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=judge)
    try:
        columns = _read_csv(text, len(names), options)
    except pa.ArrowException as error:
        if ragged:
            raise _ragged(ragged[0], data, names, delimiter, path) from None
        raise DataError(f"{path} cannot be read: {error}") from None
    if not closed:
        raise DataError(
            f"{path}, {_open_quote(data, delimiter)}: a quote is opened and never closed: close or remove it"
        )
    return columns


def _read_csv(text: bytes, count: int, options: pa_csv.ParseOptions) -> list[pa.ChunkedArray]:
    keys = [str(place) for place in range(count)]
    types = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(keys, pa.string()), null_values=[""], strings_can_be_null=True
    )
    # one thread: with more, a command that ends soon after has been seen to abort at its exit
    blocks = pa_csv.ReadOptions(column_names=keys, block_size=_BLOCK_BYTES, use_threads=False)
    try:
        table = pa_csv.read_csv(pa.BufferReader(text), blocks, options, types)
    except pa.ArrowInvalid as error:
        if "straddl" not in str(error):  # a value that is larger than a block
            raise
        blocks.block_size = _LARGEST_BLOCK
        table = pa_csv.read_csv(pa.BufferReader(text), blocks, options, types)
    columns: list[pa.ChunkedArray] = table.columns
    return columns


def _fits(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _ragged(row: pa_csv.InvalidRow, data: bytes, names: list[str], delimiter: str, path: Path) -> DataError:
    """The error for a line of too many or too few values; Arrow does not tell its number, so it is looked for again."""
    where, count, text = "a line", row.actual_columns, row.text
    reader = csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline=""), delimiter=delimiter)
    try:
        for values in reader:
            if values and len(values) != len(names):
                where, count, text = f"line {reader.line_num}", len(values), delimiter.join(values)
                break
    except csv.Error:
        pass  # the line stays unnamed
    return DataError(
        f"{path}, {where}: {count} values where the heading names {len(names)} columns: {text[:80]!r}. A value that "
        "holds the delimiter must stand in quotes"
    )


def _open_quote(data: bytes, delimiter: str) -> str:
    """The line in which the last row begins."""
    reader = csv.reader(io.StringIO(data.decode("utf-8", "replace"), newline=""), delimiter=delimiter)
    begin = 1
    try:
        for _ in reader:
            last, begin = begin, reader.line_num + 1
        return f"line {last}"
    except csv.Error:
        return f"line {begin} or after"
