"""What every vector index does, and the arrays that go in and come out.

Dimensions: N vectors, D their length, B queries, k neighbours each. Similarity is the inner product; vectors of towers
have unit length, so it is the cosine. A *row* is an int64, 0 or more, chosen by the caller (the dense row of an item,
say); rows need not be contiguous or in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from twotower.schema.errors import DataError

PADDING = -1
"""The row of a place that has no neighbour; its score is minus infinity."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest vectors of every query, best first, equal scores by row ascending.

    Attributes:
        rows: (B, k) int64, padded at the end with -1.
        scores: (B, k) float32 inner products, padded with minus infinity.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]

    @classmethod
    def none(cls, queries: int, k: int) -> Self:
        """Padding alone, to be filled."""
        return cls(np.full((queries, k), PADDING, np.int64), np.full((queries, k), -np.inf, np.float32))


@dataclass(frozen=True)
class Exclusions:
    """Rows to leave out of each query: `rows[indptr[b]:indptr[b + 1]]` are those of query `b`.

    Rows that the index does not hold, and repeated ones, change nothing.

    Attributes:
        indptr: (B + 1,) int64, from 0, never falling.
        rows: (nnz,) int64.

    Raises:
        DataError: `indptr` does not cut `rows` into pieces.
    """

    indptr: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        indptr, rows = self.indptr, self.rows
        if indptr.dtype != np.int64 or rows.dtype != np.int64 or indptr.ndim != 1 or rows.ndim != 1:
            raise DataError(
                f"exclusions are indptr {indptr.dtype}{indptr.shape} and rows {rows.dtype}{rows.shape}: "
                "give int64 arrays of one dimension"
            )
        if not indptr.size or indptr[0] != 0 or indptr[-1] != rows.size or np.any(indptr[1:] < indptr[:-1]):
            raise DataError(f"indptr of exclusions must rise from 0 to {rows.size}, the number of rows; it is {indptr}")

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | NDArray[np.int64]]) -> Self:
        """One list of rows for each query.

        >>> Exclusions.of([[3, 1], [], [7]]).indptr
        array([0, 2, 2, 3])
        """
        parts = [np.asarray(rows, np.int64) for rows in lists]
        indptr = np.cumsum([0, *(part.size for part in parts)], dtype=np.int64)
        return cls(indptr, np.concatenate([np.empty(0, np.int64), *parts]))

    @classmethod
    def none(cls, queries: int) -> Self:
        """Nothing is left out of any query."""
        return cls(np.zeros(queries + 1, np.int64), np.zeros(0, np.int64))

    @classmethod
    def each(cls, rows: NDArray[np.int64]) -> Self:
        """One row (B,) for each query: an item that is asked about is not like itself."""
        return cls(np.arange(len(rows) + 1), rows)


class VectorIndex(Protocol):
    """An immutable set of vectors that finds the nearest ones of a query.

    Nothing is ever added to an index or removed from it: newer vectors are laid over it (`overlaid.py`). Every method
    may be called from several threads at once, and the same call gives the same answer.

    How an index is made is not part of the protocol: each implementation has the class methods
    `build(rows, vectors, ...)`, which refuses duplicate rows and vectors that are not finite, and `load(folder)`.
    """

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) all rows, rising; those taken out by `without` are among them."""
        ...

    def count(self) -> int:
        """How many vectors can be found; rows taken out by `without` do not count."""
        ...

    def search(self, queries: NDArray[np.float32], k: int, exclude: Exclusions | None = None) -> Neighbours:
        """The k nearest vectors of each query, without the rows that are excluded for it.

        A result is padded only where fewer than k vectors are left; an approximate index never returns a list that is
        short because it looked in too few places.

        Args:
            queries: (B, D) float32.
            k: neighbours of each query, at least 1; may exceed the number of vectors.
            exclude: rows to leave out, for B queries.

        Returns:
            Rows and scores (B, k).

        Raises:
            DataError: queries of another length, shape or type, or not finite; k below 1; exclusions for another number
                of queries.
        """
        ...

    def without(self, rows: NDArray[np.int64]) -> Self:
        """The same index, except that it never returns some rows (n,): overridden, deleted or unavailable items.

        It shares the memory of this one. Make it once, when the set of rows changes, not in every request. Repeated
        calls add up, and rows that the index does not hold are ignored.

        Raises:
            DataError: an array of another shape or type.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the index into a folder, whole or not at all, in place of what is there.

        Rows that `without` took out are saved too.
        """
        ...

    def close(self) -> None:
        """Give back connections to an outside system; embedded indexes have nothing to close.

        Memory is freed with the last reference, so that a search in another thread ends well.
        """
        ...
