"""Lists of items with a number for each entry, and the best entries: what counted channels answer from.

B users, k candidates each, N items.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import Candidates
from twotower.features.columns import Bag, pointers, ranges
from twotower.index.protocol import PADDING, Exclusions, VectorIndex

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

ENTRIES = 1 << 21
"""Entries of lists that are summed at a time."""


@dataclass(frozen=True)
class WeighedLists:
    """Lists of catalogue rows, with a number for each entry."""

    lists: Bag
    values: Floats
    """(nnz,)"""

    def columns(self, rows: str, values: str) -> dict[str, pa.Array]:
        """Two columns for a file, by their names."""
        return {rows: as_lists(self.lists, self.lists.rows), values: as_lists(self.lists, self.values)}

    @classmethod
    def of(cls, stored: pa.RecordBatch, rows: str, values: str) -> Self:
        """The two columns of a file."""
        return cls(as_bag(stored.column(rows)), stored.column(values).flatten().to_numpy())


def as_lists(bag: Bag, values: npt.NDArray[np.int32] | Floats) -> pa.Array:
    """The entries of a bag, or their values (nnz,), as a column of lists for a file."""
    return pa.LargeListArray.from_arrays(pa.array(bag.indptr), pa.array(values))


def as_bag(lists: pa.Array) -> Bag:
    """The bag of a column of lists of int32."""
    return Bag(lists.offsets.to_numpy().astype(np.int64), lists.flatten().to_numpy())


def latest_clicks(clicks: Bag, last: int) -> Bag:
    """The last clicks of each user, at most `last`.

    >>> latest_clicks(Bag(np.array([0, 3, 4]), np.array([5, 6, 7, 8], np.int32)), 2).rows.tolist()
    [6, 7, 8]
    """
    ends = clicks.indptr[1:]
    counts = np.minimum(np.diff(clicks.indptr), last)
    return Bag(pointers(counts), clicks.rows[ranges(ends - counts, counts)])


def owners(bag: Bag) -> Longs:
    """(nnz,) the list that each entry of a bag belongs to."""
    return np.repeat(np.arange(len(bag)), np.diff(bag.indptr))


def nearest(index: VectorIndex, vectors: Floats, k: int, exclude: Exclusions) -> Candidates:
    """The k items nearest to each vector (B, D); none for a zero vector, which stands for an unknown user."""
    neighbours = index.search(np.ascontiguousarray(vectors), k, exclude)
    unknown = ~vectors.any(axis=1)
    neighbours.rows[unknown], neighbours.scores[unknown] = PADDING, -np.inf
    return Candidates(neighbours.rows, neighbours.scores)


def top_of_groups(
    owner: Longs, rows: Longs, scores: Floats | npt.NDArray[np.float64], count: int, k: int
) -> Candidates:
    """The k best entries of each owner (n,) in 0..count-1, by descending score, ties by row.

    Rows (n,) are distinct within an owner; scores (n,) are compared as they are, and returned as float32.

    >>> top = top_of_groups(np.array([0, 0, 1]), np.array([4, 2, 9]), np.array([1, 1, 3], np.float32), 2, 2)
    >>> top.rows.tolist()
    [[2, 4], [9, -1]]
    """
    order = np.lexsort((rows, -scores, owner))
    owner = owner[order]
    starts = np.searchsorted(owner, np.arange(count))
    place = np.arange(len(owner)) - starts[owner]
    kept = place < k
    best = np.full((count, k), PADDING, np.int64)
    score = np.full((count, k), -np.inf, np.float32)
    best[owner[kept], place[kept]] = rows[order][kept]
    score[owner[kept], place[kept]] = scores[order][kept]
    return Candidates(best, score)


def best_of(rows: Longs, scores: Floats, k: int) -> Candidates:
    """The k best of each user's entries (B, n); an item that occurs several times counts once, with its best score.

    >>> best_of(np.array([[4, 7, 4, -1]]), np.array([[0.5, 0.4, 0.9, -np.inf]], np.float32), 3).rows.tolist()
    [[4, 7, -1]]
    """
    owner, place = np.nonzero(rows != PADDING)
    size = int(rows.max(initial=0)) + 1
    distinct, entry = np.unique(owner * size + rows[owner, place], return_inverse=True)
    best = np.full(len(distinct), -np.inf, np.float32)
    np.maximum.at(best, entry, scores[owner, place])
    return top_of_groups(distinct // size, distinct % size, best, len(rows), k)


@dataclass(frozen=True)
class LookUps:
    """Which lists are looked up for which users."""

    owner: Longs
    """(n,) the user, ascending."""
    key: Longs
    """(n,) the list."""
    weight: npt.NDArray[np.float64]
    """(n,) of the list for the user."""


def top_sums(looked_up: LookUps, lists: WeighedLists, exclude: Exclusions, size: int, k: int) -> Candidates:
    """The k rows of the greatest sums for each of B users: the user's lists, times their weights, added up.

    `exclude` are the rows that each user is not offered, `size` is that of the catalogue.

    >>> lists = WeighedLists(Bag(np.array([0, 2, 3]), np.array([5, 6, 6], np.int32)), np.array([1, 2, 4], np.float32))
    >>> both = LookUps(np.zeros(2, int), np.arange(2), np.array([1.0, 0.5]))
    >>> found = top_sums(both, lists, Exclusions.of([[]]), 9, 2)
    >>> found.rows.tolist(), found.scores.tolist()
    ([[6, 5]], [[4.0, 1.0]])
    """
    owner, key, indptr = looked_up.owner, looked_up.key, lists.lists.indptr
    count = len(exclude.indptr) - 1
    entries = indptr[key + 1] - indptr[key]
    before = np.concatenate([[0], np.cumsum(entries)])[np.searchsorted(owner, np.arange(count + 1))]
    parts: list[Candidates] = []
    start = 0
    while start < count or not parts:
        stop = max(start + 1, int(np.searchsorted(before, before[start] + ENTRIES, side="right")) - 1)
        stop = min(stop, count)
        mine = slice(*np.searchsorted(owner, [start, stop]))
        places = ranges(indptr[key[mine]], entries[mine])
        keys = np.repeat(owner[mine] - start, entries[mine]) * size + lists.lists.rows[places]
        distinct, place = np.unique(keys, return_inverse=True)
        weight = np.repeat(looked_up.weight[mine], entries[mine])
        sums = np.bincount(place, weight * lists.values[places], len(distinct))
        bounds = exclude.indptr[start : stop + 1]
        left_out = np.repeat(np.arange(stop - start), np.diff(bounds)) * size + exclude.rows[bounds[0] : bounds[-1]]
        kept = ~np.isin(distinct, left_out)
        scores = sums[kept].astype(np.float32)
        parts.append(top_of_groups(distinct[kept] // size, distinct[kept] % size, scores, stop - start, k))
        start = stop
    return end_to_end(parts)


def end_to_end(parts: list[Candidates]) -> Candidates:
    """The candidates of several groups of users, one group after the other."""
    return Candidates(np.concatenate([part.rows for part in parts]), np.concatenate([part.scores for part in parts]))
