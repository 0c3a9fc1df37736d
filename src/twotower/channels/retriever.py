"""What every recall channel does: from users to candidates.

B users, k candidates each. A *row* is an item's place in the version's catalogue.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag, Column, ranges
from twotower.index.protocol import PADDING, Exclusions


class UserVectors:
    """The vectors of the users of some queries, by user tower: made once, by whichever channel asks first."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[threading.Lock, list[npt.NDArray[np.float32]], object]] = {}

    def once(
        self, tower: object, item_tokens: object, encode: Callable[[], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """The vectors of a tower that reads the history by some tokens; a second thread waits for the first."""
        key = (tower, id(item_tokens))  # the entry holds the array, so that no other one gets its id
        lock, vectors, _ = self._made.setdefault(key, (threading.Lock(), [], item_tokens))
        with lock:
            if not vectors:
                vectors.append(encode())
        return vectors[0]


@dataclass(frozen=True)
class Queries:
    """B users as every channel sees them."""

    features: Mapping[str, Column]
    """Encoded features of users and context, a row each; the click history is not among them."""
    clicks: Bag
    """Catalogue rows of each user's clicks, oldest first."""
    exclude: Exclusions
    """Catalogue rows that a user is not offered."""
    vectors: UserVectors = field(default_factory=UserVectors, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.clicks)


@dataclass(frozen=True)
class Candidates:
    """The candidates of B users, best first."""

    rows: npt.NDArray[np.int64]
    """(B, k) catalogue rows, -1 where a channel has no more."""
    scores: npt.NDArray[np.float32]
    """(B, k) the channel's own scores, minus infinity at padding."""


class Retriever(Protocol):
    """A recall channel: a trained, immutable thing that answers who might like what.

    It may be called from several threads at once. The same queries give the same answer; equal scores are ordered by
    catalogue row.
    """

    name: str
    """The name in configurations and answers, such as `two_tower`."""

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """At most k candidates of each user, none of them excluded; fewer only where the channel knows no more.

        Args:
            queries: B users.
            k: candidates of each, at least 1.
        """
        ...


@runtime_checkable
class SimilarItems(Protocol):
    """What a `Retriever` may have besides: it can say which items are like an item."""

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """At most k items like each of some items, never the item itself; None where the channel cannot say after all.

        Equal scores are ordered by catalogue row.

        Args:
            rows: (B,) catalogue rows.
            k: items like each, at least 1.
        """
        ...


def similar_items(channel: Retriever, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
    """At most k items like each of some items (B,), None from a channel that cannot say."""
    return channel.similar(rows, k) if isinstance(channel, SimilarItems) else None


class WithoutItems:
    """A channel that never brings some items, such as those that are not available.

    It asks for more than is wanted and drops them, and for more still while a list is short: unlike the exclusions of
    queries, this costs nothing where few of them would have come.

    Args:
        channel: what it asks.
        out: (N,) True for the catalogue rows that are left out.
    """

    def __init__(self, channel: Retriever, out: npt.NDArray[np.bool_]) -> None:
        self.name = channel.name
        self.channel = channel
        self._out = out
        self._most = int(out.sum())

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        extra = min(k, self._most)
        found = self.channel.retrieve(queries, k + extra)
        while (kept := self._kept(found, k)) is None:
            extra = min(4 * extra, self._most)
            found = self.channel.retrieve(queries, k + extra)
        return kept

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """See `SimilarItems.similar`."""
        extra = min(k, self._most)
        found = similar_items(self.channel, rows, k + extra)
        while found is not None and (kept := self._kept(found, k)) is None:
            extra = min(4 * extra, self._most)
            found = similar_items(self.channel, rows, k + extra)
        return None if found is None else kept

    def _kept(self, found: Candidates, k: int) -> Candidates | None:
        """The k best that are not left out; None where there are too few, but the channel may know more."""
        kept = (found.rows != PADDING) & ~self._out[found.rows]
        short = (kept.sum(axis=1) < k) & (found.rows[:, -1] != PADDING)
        if found.rows.shape[1] < k + self._most and short.any():
            return None
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(kept, order, axis=1)
        rows = np.where(kept, np.take_along_axis(found.rows, order, axis=1), PADDING)
        scores = np.where(kept, np.take_along_axis(found.scores, order, axis=1), np.float32(-np.inf))
        return Candidates(rows, scores)


def top_of_groups(
    owner: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32] | npt.NDArray[np.float64],
    count: int,
    k: int,
) -> Candidates:
    """The k best entries of each owner, by score falling and row rising.

    Args:
        owner: (n,) in 0..count-1.
        rows: (n,) catalogue rows, distinct within an owner.
        scores: (n,), compared as they are, returned as float32.
        count: number of owners.
        k: entries to keep.

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


ENTRIES = 1 << 21
"""Entries of lists that are summed at a time."""


def top_sums(
    owner: npt.NDArray[np.int64],
    key: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float64],
    lists: Bag,
    values: npt.NDArray[np.float32],
    exclude: Exclusions,
    size: int,
    count: int,
    k: int,
) -> Candidates:
    """The k rows of the greatest sums: each owner's lists, times their weights, added up and cut.

    Args:
        owner: (n,) in 0..count-1, ascending.
        key: (n,) which list.
        weight: (n,) of the list for its owner.
        lists: catalogue rows.
        values: (nnz,) of each entry.
        exclude: rows that an owner is not offered.
        size: of the catalogue.
        count: number of owners.
        k: rows to keep.

    >>> lists, values = Bag(np.array([0, 2, 3]), np.array([5, 6, 6], np.int32)), np.array([1, 2, 4], np.float32)
    >>> nothing = Exclusions.of([[]])
    >>> found = top_sums(np.zeros(2, int), np.arange(2), np.array([1.0, 0.5]), lists, values, nothing, 9, 1, 2)
    >>> found.rows.tolist(), found.scores.tolist()
    ([[6, 5]], [[4.0, 1.0]])
    """
    entries = lists.indptr[key + 1] - lists.indptr[key]
    before = np.concatenate([[0], np.cumsum(entries)])[np.searchsorted(owner, np.arange(count + 1))]
    parts: list[Candidates] = []
    start = 0
    while start < count or not parts:
        stop = max(start + 1, int(np.searchsorted(before, before[start] + ENTRIES, side="right")) - 1)
        stop = min(stop, count)
        mine = slice(*np.searchsorted(owner, [start, stop]))
        places = ranges(lists.indptr[key[mine]], entries[mine])
        keys = np.repeat(owner[mine] - start, entries[mine]) * size + lists.rows[places]
        distinct, place = np.unique(keys, return_inverse=True)
        sums = np.bincount(place, np.repeat(weight[mine], entries[mine]) * values[places], len(distinct))
        bounds = exclude.indptr[start : stop + 1]
        left_out = np.repeat(np.arange(stop - start), np.diff(bounds)) * size + exclude.rows[bounds[0] : bounds[-1]]
        kept = ~np.isin(distinct, left_out)
        scores = sums[kept].astype(np.float32)
        parts.append(top_of_groups(distinct[kept] // size, distinct[kept] % size, scores, stop - start, k))
        start = stop
    return Candidates(np.concatenate([p.rows for p in parts]), np.concatenate([p.scores for p in parts]))
