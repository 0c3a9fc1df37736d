"""Where the held-out tables of a workspace are opened: their columns and types, and no row that is later than now.

A workspace may be written by somebody's own job, so that a table can be of any shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms, until_now
from twotower.schema.errors import DataError
from twotower.schema.tables import require_columns

_TIMES = (c.TS_MS, c.REQUEST_TS_MS, c.CLICK_TS_MS)
_OURS = {**dict.fromkeys(_TIMES, pa.int64()), c.POSITION: pa.int32(), c.OUTCOME: pa.string(), c.REASON: pa.string()}


@dataclass(frozen=True)
class HeldOut:
    """A held-out table."""

    rows: pa.Table
    beyond_now: int
    """Rows that are left out, because one of their times is later than now."""


def read_held_out(path: Path, needed: Sequence[str], clock_ms: ClockMs = now_ms) -> HeldOut:
    """The rows of a held-out table.

    Args:
        path: a Parquet file.
        needed: columns that it must have.
        clock_ms: milliseconds since 1970.

    Raises:
        DataError: no such file, a damaged one, a missing column, one that is there twice, or one of another type.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            require_columns(schema, needed, path.name)
            if repeated := sorted({name for name in schema.names if schema.names.count(name) > 1}):
                raise DataError(f"{path} has the column {repeated[0]} more than once: give each its own name")
            rows = file.read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: import the data with --holdout or --test to evaluate") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None
    for name, kind in _OURS.items():
        if name in schema.names:
            rows = rows.set_column(schema.get_field_index(name), name, _as(kind, rows.column(name), path, name))
    kept, beyond_now = until_now(rows, _TIMES, clock_ms(), path.name)
    return HeldOut(kept, beyond_now)


def _as(kind: pa.DataType, column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """A column in the type that it has in the schema.

    Raises:
        DataError: it is of another one, with the column, its type and the one that is needed.
    """
    seen = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    text = pa.types.is_string(seen) or pa.types.is_large_string(seen)
    if pa.types.is_null(seen) or (text if kind == pa.string() else pa.types.is_integer(seen)):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: column {name} does not fit {kind}: {error}") from None
    unit = " milliseconds since 1970" if name in _TIMES else ""
    raise DataError(f"{path}: column {name} is of type {column.type}, where {kind}{unit} is needed: write it as such")
