"""Opens the held-out tables of a workspace, which any job may have written: checks columns, types and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms, until_now
from twotower.schema.errors import DataError
from twotower.schema.tables import check_distinct, is_text, read_parquet, require_columns, value_type

_TIMES = (c.TS_MS, c.REQUEST_TS_MS, c.CLICK_TS_MS)
_OURS = {**dict.fromkeys(_TIMES, pa.int64()), c.POSITION: pa.int32(), c.OUTCOME: pa.string(), c.REASON: pa.string()}


@dataclass(frozen=True)
class HeldOut:
    """A held-out table."""

    rows: pa.Table
    beyond_now: int
    """Rows that are left out, because one of their times is later than now."""


def read_held_out(path: Path, needed: Sequence[str], clock_ms: ClockMs = now_ms) -> HeldOut:
    """The rows of a held-out table, a Parquet file, up to now.

    Raises:
        DataError: no such file, a damaged one, a missing column, one that is there twice, or one of another type.
    """
    rows = read_parquet(path, ": import the data with --holdout or --test to evaluate")
    require_columns(rows, needed, path.name)
    check_distinct(rows.column_names, str(path))
    for name, kind in _OURS.items():
        if name in rows.column_names:
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, name, _as(kind, rows.column(name), path, name))
    kept, beyond_now = until_now(rows, _TIMES, clock_ms(), path.name)
    return HeldOut(kept, beyond_now)


def _as(kind: pa.DataType, column: pa.ChunkedArray, path: Path, name: str) -> pa.ChunkedArray:
    """A column in the type that it has in the schema; one of another type is a `DataError`."""
    seen = value_type(column.type)
    if pa.types.is_null(seen) or (is_text(seen) if kind == pa.string() else pa.types.is_integer(seen)):
        try:
            return column.cast(kind)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: column {name} does not fit {kind}: {error}") from None
    unit = " milliseconds since 1970" if name in _TIMES else ""
    raise DataError(f"{path}: column {name} is of type {column.type}, where {kind}{unit} is needed: write it as such")
