"""What every recall channel does: from users to candidates.

B users, k candidates each. A *row* is an item's place in the version's catalogue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag, Column
from twotower.index.protocol import PADDING, Exclusions


@dataclass(frozen=True)
class Queries:
    """B users as every channel sees them."""

    features: Mapping[str, Column]
    """Encoded features of users and context, a row each; the click history is not among them."""
    clicks: Bag
    """Catalogue rows of each user's clicks, oldest first."""
    exclude: Exclusions
    """Catalogue rows that a user is not offered."""

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
