"""The tables of a workspace: their Arrow schemas, and the checks made where data enters.

A workspace is a folder with `users.parquet`, `items.parquet` and `events/date=YYYY-MM-DD/*.parquet`. Ids are int64 or
string at this border and become dense rows inside.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.schema import columns as c
from twotower.schema.errors import DataError

EARLIEST_MS = 315_532_800_000
"""1980-01-01. Smaller values are no milliseconds since 1970 of any log: seconds end at 4.1e9 in the year 2100."""
LATEST_MS = 4_102_444_800_000
"""2100-01-01. Larger values are microseconds or nanoseconds."""
MAX_WEIGHT = 1000.0
"""Largest weight of a click: squares of far larger ones overflow the optimizer's accumulators."""
MAX_TRAINING_WEIGHT = 1e9
"""Largest weight of a positive in training, such as eleven days in milliseconds. Weights of a batch sum to one, and a
larger one would leave nothing of the others in float32."""


def joined_events(user_id: pa.DataType, item_id: pa.DataType) -> pa.Schema:
    """The schema of joined events, the columns that every data set has. Context columns follow them."""
    return pa.schema(
        [
            pa.field(c.EVENT_SEQ, pa.int64(), nullable=False),
            pa.field(c.REQUEST_ID, pa.string()),
            pa.field(c.USER_ID, user_id, nullable=False),
            pa.field(c.ITEM_ID, item_id, nullable=False),
            pa.field(c.REQUEST_TS_MS, pa.int64()),
            pa.field(c.CLICK_TS_MS, pa.int64()),
            pa.field(c.OUTCOME, pa.string(), nullable=False),
            pa.field(c.WEIGHT, pa.float32()),
        ]
    )


def holdout(user_id: pa.DataType, item_id: pa.DataType) -> pa.Schema:
    """The schema of `holdout.parquet`; `holdout_cold.parquet` adds `reason`."""
    return pa.schema([(c.USER_ID, user_id), (c.ITEM_ID, item_id), (c.TS_MS, pa.int64())])


def recommendations(user_id: pa.DataType, item_id: pa.DataType) -> pa.Schema:
    """The schema of the file that `retrieve` writes."""
    return pa.schema(
        [
            (c.USER_ID, user_id),
            (c.ITEM_ID, item_id),
            (c.RANK, pa.int32()),
            (c.SCORE, pa.float32()),
            (c.CHANNEL, pa.string()),
        ]
    )


def require_columns(table: pa.Table | pa.Schema, names: Iterable[str], where: str) -> None:
    """Refuse a table without some columns.

    Raises:
        DataError: columns are missing; the message lists them and what was there.
    """
    schema = table if isinstance(table, pa.Schema) else table.schema
    if missing := [name for name in names if name not in schema.names]:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {', '.join(schema.names) or 'none'}")


def check_distinct(names: Sequence[str], where: str) -> None:
    """Refuse a table with two columns of one name.

    Raises:
        DataError: with the name.
    """
    if len(set(names)) < len(names):
        name = next(name for name in sorted(names) if names.count(name) > 1)
        raise DataError(f"{where} has the column {name} {names.count(name)} times: give each its own name")


def read_parquet(path: Path, missing: str = "") -> pa.Table:
    """The rows of a Parquet file; `missing` ends the error where there is none.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist{missing}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None


def is_text(kind: pa.DataType) -> bool:
    """A type of Arrow holds text, however it is stored."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: pa.DataType) -> bool:
    """A type of Arrow holds lists, of one length or of any."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_number(kind: pa.DataType) -> bool:
    """A type of Arrow holds integers, floats, or nothing at all."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column; a dictionary is a way to store them."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def undictionaried(column: Any) -> Any:
    """A dictionary column as its values; any other as it is."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def as_ids(column: pa.ChunkedArray | pa.Array, where: str) -> pa.ChunkedArray:
    """An id column as int64 or string, the two types an id has inside the system.

    Raises:
        DataError: another type (floats, dates, ...), or nulls.

    >>> as_ids(pa.array([3, 1], pa.uint16()), "items").type
    DataType(int64)
    """
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    column = undictionaried(column)
    if column.null_count:
        raise DataError(
            f"{where} has {column.null_count} null ids of {len(column)}: drop these rows or give them an id"
        )
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{where} holds integers that do not fit int64 ({error}): write them as strings") from None
    if is_text(column.type):
        return column.cast(pa.string())
    raise DataError(f"{where} is of type {column.type}: an id is an integer or a string, convert it first")


def is_id(value: object, kind: pa.DataType) -> bool:
    """A value can be an id of a type, int64 or string.

    >>> is_id(7, pa.int64()), is_id("7", pa.int64()), is_id(True, pa.int64()), is_id(2**63, pa.int64())
    (True, False, False, False)
    """
    if kind == pa.int64():
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is str


def column_of(value: Any, kind: pa.DataType) -> pa.Array | None:
    """A value as a column of one row, None where it is not of the type.

    Arrow takes more than is meant: a string for a list of its characters, a number beyond float32 for infinity.

    >>> column_of(["rain"], pa.list_(pa.string())).to_pylist(), column_of("rain", pa.list_(pa.string()))
    ([['rain']], None)
    """
    plain = value_type(kind)
    several = is_list(plain)
    if value is not None and isinstance(value, list | tuple) != several:
        return None
    entry_type = plain.value_type if several else plain
    if not all(_is_of(entry, entry_type) for entry in (value if isinstance(value, list | tuple) else [value])):
        return None
    try:
        column = pa.array([value], plain).cast(kind)
        column.to_pylist()  # a time that Python cannot show would fail in every answer
        if pa.types.is_floating(entry_type):
            numbers = (column.flatten() if several else column).fill_null(0).to_numpy(zero_copy_only=False)
            if not np.isfinite(np.asarray(numbers, np.float64)).all():
                return None
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError, ValueError):
        return None
    return column


def _is_of(value: Any, kind: pa.DataType) -> bool:
    """Arrow would cut a fraction, and take true for 1."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        whole = not isinstance(value, float) or value.is_integer() or pa.types.is_floating(kind)
        return not isinstance(value, bool) and whole
    return True


def check_entities(table: pa.Table, id_column: str, where: str) -> pa.Table:
    """A table of users or items with its ids in their inner type, ordered by id.

    Raises:
        DataError: no id column, no rows, null or duplicate ids, an id of another type.
    """
    require_columns(table, [id_column], where)
    if not table.num_rows:
        raise DataError(f"{where} has no rows")
    ids = as_ids(table[id_column], f"{where}, column {id_column}")
    table = table.set_column(table.schema.get_field_index(id_column), id_column, ids).sort_by(id_column)
    ordered = table[id_column].combine_chunks()
    repeated = pc.equal(ordered.slice(1), ordered.slice(0, len(ordered) - 1))
    if pc.any(repeated).as_py():
        examples = pc.unique(ordered.slice(1).filter(repeated)).to_pylist()
        raise DataError(
            f"{where} has {len(examples)} ids more than once, such as {examples[:3]}: keep one row of each {id_column}"
        )
    return table


def mistaken_time(ts_ms: int, latest_ms: int = LATEST_MS) -> str | None:
    """What a number seems to be that is no time in milliseconds from 1980 to a latest one; None if it is one.

    >>> mistaken_time(1_700_000_000), mistaken_time(157_766_400_000)
    ('it looks like seconds: multiply by 1000', 'it lies outside 1980 to 2100')
    """
    if EARLIEST_MS <= ts_ms <= latest_ms:
        return None
    if EARLIEST_MS <= ts_ms * 1000 <= latest_ms:
        return "it looks like seconds: multiply by 1000"
    for unit, factor in (("microseconds", 1000), ("nanoseconds", 1_000_000)):
        if EARLIEST_MS <= ts_ms // factor <= latest_ms:
            return f"it looks like {unit}: divide by {factor}"
    return "it lies outside 1980 to 2100" if not EARLIEST_MS <= ts_ms <= LATEST_MS else "it lies in the future"


def check_milliseconds(column: pa.ChunkedArray | pa.Array, where: str) -> None:
    """Refuse times that are not milliseconds since 1970: the usual slip is seconds.

    Raises:
        DataError: values outside 1980 to 2100, with the unit that they look like.
    """
    extent = pc.min_max(column).as_py()
    for value in (extent["min"], extent["max"]):
        likely = None if value is None else mistaken_time(value)
        if likely:
            raise DataError(f"{where} holds {value}, where milliseconds since 1970 are expected; {likely}")


def check_outcomes(column: pa.ChunkedArray | pa.Array, where: str) -> None:
    """Refuse outcomes that the funnel does not have.

    Raises:
        DataError: unknown values or nulls, listed.
    """
    unknown = [value for value in pc.unique(column).to_pylist() if value not in c.OUTCOMES]
    if unknown:
        raise DataError(f"{where} holds {unknown[:3]}; an outcome is one of {', '.join(c.OUTCOMES)}")
