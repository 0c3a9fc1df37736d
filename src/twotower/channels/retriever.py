"""The protocol of every channel: from users to candidates.

B users, k candidates each. A *row* is an item's place in the version's catalogue.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag, Column
from twotower.index.protocol import PADDING, Exclusions


class UserVectors:
    """The vectors of the users of some queries, by user tower: made once, by the channel that asks first."""

    def __init__(self) -> None:
        self._made: dict[object, tuple[threading.Lock, list[npt.NDArray[np.float32]], object]] = {}

    def once(
        self, tower: object, item_tokens: object, encode: Callable[[], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """The vectors of a tower that reads the history by these vocabulary indexes; other threads wait for them."""
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
    """Encoded features of users and context, a row each, without the click history."""
    clicks: Bag
    """Catalogue rows of each user's clicks, oldest first."""
    exclude: Exclusions
    """Catalogue rows that each user is not offered."""
    vectors: UserVectors = field(default_factory=UserVectors, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.clicks)


@dataclass(frozen=True)
class Candidates:
    """The candidates of B users, best first."""

    rows: npt.NDArray[np.int64]
    """(B, k) catalogue rows, -1 where a channel has no more candidates."""
    scores: npt.NDArray[np.float32]
    """(B, k) the channel's own scores, minus infinity at padding."""


class Retriever(Protocol):
    """A recall channel: trained and immutable, it gives the candidates of users.

    Any object of this shape is a channel: evaluation, fusion and its choice take it beside the others. It may be called
    from several threads at once. The same queries give the same answer; equal scores are ordered by catalogue row.
    """

    name: str
    """The name in configurations and answers, such as `two_tower`."""

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """At most k (1 or more) candidates of each user, none excluded; fewer only where the channel knows no more."""
        ...


@runtime_checkable
class SimilarItems(Protocol):
    """What a `Retriever` may also have: it can say which items are similar to an item."""

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """At most k (1 or more) items similar to each of the items in some catalogue rows (B,), never the item itself.

        Equal scores are ordered by catalogue row. None where the channel cannot say after all.
        """
        ...


def similar_items(channel: Retriever, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
    """At most k items similar to each of some items (B,); None from a channel that cannot say."""
    return channel.similar(rows, k) if isinstance(channel, SimilarItems) else None


class WithoutItems:
    """A channel without some items (`out` (N,) is True for them), such as those that are not available.

    It requests more candidates than needed and drops these items, and requests more still while a list is short. Unlike
    the exclusions of queries, this costs nothing where few of these items would have been retrieved.
    """

    def __init__(self, channel: Retriever, out: npt.NDArray[np.bool_]) -> None:
        self.name = channel.name
        self.channel = channel
        self._out = out
        self._most = int(out.sum())

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        kept = self._enough(lambda more: self.channel.retrieve(queries, more), k)
        assert kept is not None
        return kept

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """See `SimilarItems.similar`."""
        return self._enough(lambda more: similar_items(self.channel, rows, more), k)

    def _enough(self, retrieve: Callable[[int], Candidates | None], k: int) -> Candidates | None:
        """The k best that are not left out, from as many candidates as that takes."""
        extra = min(k, self._most)
        while (candidates := retrieve(k + extra)) is not None:
            if (kept := self._kept(candidates, k)) is not None:
                return kept
            extra = min(4 * extra, self._most)
        return None

    def _kept(self, candidates: Candidates, k: int) -> Candidates | None:
        """The k best that are not left out; None where there are too few, but the channel may know more."""
        kept = (candidates.rows != PADDING) & ~self._out[candidates.rows]
        short = (kept.sum(axis=1) < k) & (candidates.rows[:, -1] != PADDING)
        if candidates.rows.shape[1] < k + self._most and short.any():
            return None
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(kept, order, axis=1)
        rows = np.where(kept, np.take_along_axis(candidates.rows, order, axis=1), PADDING)
        scores = np.where(kept, np.take_along_axis(candidates.scores, order, axis=1), np.float32(-np.inf))
        return Candidates(rows, scores)
