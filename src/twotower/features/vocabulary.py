"""From raw values to rows of an embedding table.

Row 0 stands for a missing value, row 1 for an unknown one; known values follow in ascending order, so that a vocabulary
does not depend on the order in which values were seen. After them a table may have spare rows for new values.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.schema.errors import DataError, shown
from twotower.schema.tables import is_text, undictionaried

MISSING = 0
UNKNOWN = 1
FIRST = 2
"""Row of the first known value."""

IDS_SCHEMA = pa.schema([("table", pa.string()), ("number", pa.int64()), ("text", pa.string()), ("row", pa.int32())])
"""How ids are stored with their rows: integers as `number`, strings as `text`."""
_FEW = 64
_FEW_SHARE = 0.01
"""Up to this many values, or this share of the vocabulary, one binary search per value is faster than building Arrow's
hash table of the whole vocabulary."""


def as_values(column: pa.ChunkedArray | pa.Array, where: str) -> pa.Array:
    """A column of categories as int64 or string; booleans and whole floats count as integers, NaN and infinity as null.

    Raises:
        DataError: floats with a fraction, integers beyond int64, or a type that has no categories.

    >>> as_values(pa.array([1.0, None, 7.0]), "code").to_pylist()
    [1, None, 7]
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    column = undictionaried(column)
    kind = column.type
    if is_text(kind):
        return column.cast(pa.string())
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(f"{where} holds integers that do not fit int64: write them as strings") from None
    if pa.types.is_floating(kind):
        finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
        try:
            return finite.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataError(
                f"{where} holds numbers with a fraction, or beyond 2^53: use kind = 'numeric', or write them as strings"
            ) from None
    raise DataError(f"{where} is of type {kind}: categories are integers, booleans or strings")


@dataclass(frozen=True)
class Positions:
    """Distinct values in ascending order, and where in that order a value stands."""

    values: pa.Array
    """(V,) int64 or string, ascending, distinct; may be memory-mapped."""

    def find(self, values: pa.Array) -> npt.NDArray[np.int64]:
        """The position of each value, -1 where it is null or not among ours.

        Raises:
            DataError: integers are looked up among strings, or the other way round.

        >>> Positions(pa.array([5, 8, 13])).find(pa.array([8, 9, None, 5])).tolist()
        [1, -1, -1, 0]
        """
        if len(self.values) == 0 or values.null_count == len(values):
            return np.full(len(values), -1, np.int64)
        if values.type != self.values.type:
            seen = shown(values[:2].to_pylist())
            raise DataError(f"values are of type {values.type} where {self.values.type} is known, such as {seen}")
        if self.values.type == pa.int64():
            known = self.values.to_numpy(zero_copy_only=True)
            asked = values.fill_null(0).to_numpy(zero_copy_only=False)
            found = np.minimum(np.searchsorted(known, asked), len(known) - 1)
            hit = (known[found] == asked) & values.is_valid().to_numpy(zero_copy_only=False)
            return np.where(hit, found, -1).astype(np.int64)
        if len(values) <= max(_FEW, _FEW_SHARE * len(self.values)):
            return np.array([self._find_string(value) for value in values.to_pylist()], np.int64)
        found = pc.index_in(values, self.values).fill_null(-1)
        hit = values.is_valid().to_numpy(zero_copy_only=False)
        return np.where(hit, found.to_numpy(zero_copy_only=False), -1).astype(np.int64)

    def _find_string(self, value: str | None) -> int:
        """A binary search: UTF-8 bytes and code points have the same order."""
        if value is None:
            return -1
        position = bisect_left(range(len(self.values)), value, key=lambda place: self.values[place].as_py())
        return position if position < len(self.values) and self.values[position].as_py() == value else -1


@dataclass(frozen=True)
class Vocabulary:
    """Values with their rows in one embedding table."""

    table: str
    """Name of the table; sequences of items share that of `item_id`."""
    values: pa.Array
    """(V,) ascending; value i has row i + 2."""
    capacity: int
    """Rows of the table: missing, unknown, the values, and room."""

    def rows(self, values: pa.Array) -> npt.NDArray[np.int32]:
        """The row of each value (N,): 0 where it is null, 1 where it is unknown.

        >>> Vocabulary("city", pa.array(["Bern", "Rome"]), 4).rows(pa.array(["Rome", None, "Oslo"])).tolist()
        [3, 0, 1]
        """
        position = Positions(self.values).find(values)
        rows = np.where(position >= 0, position + FIRST, UNKNOWN)
        if values.null_count:
            rows[values.is_null().to_numpy(zero_copy_only=False)] = MISSING
        return rows.astype(np.int32)


def fit_vocabulary(table: str, values: pa.Array, room: float = 0.0) -> Vocabulary:
    """The vocabulary of all values that occur, with `room` (a share of them) for more.

    >>> fit_vocabulary("age", pa.array([25, 18, None, 25])).values.to_pylist()
    [18, 25]
    """
    distinct = pc.drop_null(pc.unique(values))
    ordered = distinct.take(pc.sort_indices(distinct))
    return Vocabulary(table, ordered, FIRST + len(ordered) + int(np.ceil(room * len(ordered))))


def id_rows(table: str, ids: pa.Array, rows: pa.Array) -> pa.Table:
    """The ids of one embedding table with their rows, as they are stored.

    >>> id_rows("city", pa.array(["Bern"]), pa.array([2], pa.int32())).to_pylist()
    [{'table': 'city', 'number': None, 'text': 'Bern', 'row': 2}]
    """
    number, count = ids.type == pa.int64(), len(ids)
    absent = pa.nulls(count, pa.string() if number else pa.int64())
    columns = [pa.array([table] * count, pa.string()), *((ids, absent) if number else (absent, ids)), rows]
    return pa.table(columns, schema=IDS_SCHEMA)
