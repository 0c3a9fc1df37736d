"""Encoded columns: the form of a feature before a table or a network reads it.

N rows; W numbers a row. A column is one of

- `(N,) int32`: a row of an embedding table each (categories, buckets);
- `Bag`: several rows each (multi-valued categories, sequences);
- `(N, W) float32`: numbers (numeric features, ready-made vectors).

They are stored as Arrow columns of int32, list<int32> and fixed_size_list<float32>, and read back without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Rows = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Bag:
    """Several rows of an embedding table for each of N rows, packed."""

    indptr: npt.NDArray[np.int64]
    """(N + 1,) where each one begins in `rows`."""
    rows: Rows
    """(nnz,) rows of a table."""

    def __len__(self) -> int:
        return len(self.indptr) - 1


Column = Rows | Numbers | Bag


@dataclass(frozen=True)
class Beginnings:
    """Each of N rows is the beginning of one of S lists, so that rows share what they have in common."""

    lists: Bag
    """(S)"""
    row: npt.NDArray[np.int64]
    """(N,) the list of each row."""
    length: npt.NDArray[np.int64]
    """(N,) how many entries of it; 0 = none."""


def ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers start, start + 1, ... (count of them) of every range, one after the other.

    >>> ranges(np.array([10, 50]), np.array([3, 2])).tolist()
    [10, 11, 12, 50, 51]
    """
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    offsets: npt.NDArray[np.int64] = np.repeat(starts - (ends - counts), counts)
    offsets += np.arange(total, dtype=np.int64)
    return offsets


def pointers(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts (N,) as the offsets (N + 1,) of a packed layout.

    >>> pointers(np.array([2, 0, 1])).tolist()
    [0, 2, 2, 3]
    """
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def padded(lists: Bag) -> npt.NDArray[np.int64]:
    """Where the entries of each list stand in `rows`, (S, L) with L at least 1; -1 behind the end of a list.

    >>> padded(Bag(np.array([0, 2, 2, 3]), np.array([7, 8, 9], np.int32))).tolist()
    [[0, 1], [-1, -1], [2, -1]]
    """
    counts = np.diff(lists.indptr)
    column = np.arange(max(1, int(counts.max(initial=0))))
    return np.where(column < counts[:, None], lists.indptr[:-1, None] + column, -1)


@overload
def take(column: Bag, index: npt.NDArray[np.integer]) -> Bag: ...
@overload
def take(column: Column, index: npt.NDArray[np.integer]) -> Column: ...
def take(column: Column, index: npt.NDArray[np.integer]) -> Column:
    """The rows `index` (B,) of a column, in that order; a gather, never a loop.

    >>> take(Bag(np.array([0, 2, 2, 3]), np.array([7, 8, 9], np.int32)), np.array([2, 0])).rows.tolist()
    [9, 7, 8]
    """
    if isinstance(column, Bag):
        starts = column.indptr[index]
        counts = column.indptr[index + 1] - starts
        return Bag(pointers(counts), column.rows[ranges(starts, counts)])
    taken: Rows | Numbers = column[index]
    return taken


@overload
def concatenate(parts: Sequence[Bag]) -> Bag: ...
@overload
def concatenate(parts: Sequence[Column]) -> Column: ...
def concatenate(parts: Sequence[Column]) -> Column:
    """Columns of one kind below each other."""
    if isinstance(parts[0], Bag):
        bags = [part for part in parts if isinstance(part, Bag)]
        counts = np.concatenate([np.diff(bag.indptr) for bag in bags])
        return Bag(pointers(counts), np.concatenate([bag.rows for bag in bags]))
    return np.concatenate([part for part in parts if not isinstance(part, Bag)])


def to_arrow(column: Column) -> pa.Array:
    """A column as Arrow, sharing its memory."""
    if isinstance(column, Bag):
        if len(column.rows) > np.iinfo(np.int32).max:
            return pa.LargeListArray.from_arrays(column.indptr, column.rows)
        return pa.ListArray.from_arrays(column.indptr.astype(np.int32), column.rows)
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1), pa.float32()), column.shape[1])
    return pa.array(column, pa.int32())


def from_arrow(array: pa.Array) -> Column:
    """The column of an Arrow array made by `to_arrow`, sharing its memory."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        offsets = array.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
        return Bag(offsets - offsets[0], array.flatten().to_numpy(zero_copy_only=True))
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        numbers: Numbers = array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), width)
        return numbers
    rows: Rows = array.to_numpy(zero_copy_only=True)
    return rows
