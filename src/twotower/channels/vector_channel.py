"""A vector channel: the user's vector, or those of their interests, then the nearest item vectors.

B users, K interests, D vector, k candidates.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates, Queries, top_of_groups
from twotower.features.columns import Bag, Column, Rows, pointers, ranges
from twotower.features.feature_set import FeatureSet
from twotower.index.protocol import PADDING, Exclusions, VectorIndex
from twotower.schema.errors import ConfigError
from twotower.towers.two_tower import Floats, Table

UserEncoder = Callable[[Mapping[str, Column]], Floats]
"""Encoded columns of B users, history included, to unit vectors (B, D), or (B, K, D) of their interests."""


class VectorChannel:
    """A user encoder and an index of item vectors: `two_tower`, `mf` and `mind` are such.

    A user of whom the encoder knows nothing at all, whose vector is zero, has no candidates.

    Args:
        name: of the channel.
        features: the fitted features that the encoder reads.
        item_tokens: (N,) row of each catalogue item in the table of item ids.
        encode_users: the user tower, whichever engine runs it.
        index: of the item vectors, by catalogue row.
        item_vectors: (N, D) of the catalogue; None = the channel cannot say what is like an item.
    """

    def __init__(
        self,
        name: str,
        features: FeatureSet,
        item_tokens: Rows,
        encode_users: UserEncoder,
        index: VectorIndex,
        item_vectors: Table | None = None,
    ) -> None:
        self.name = name
        self._features = features
        self._item_tokens = item_tokens
        self._encode_users = encode_users
        self.index = index
        self._item_vectors = item_vectors

    def user_vectors(self, queries: Queries) -> Floats:
        """The vectors of users (B, D), or of their interests (B, K, D); made once for queries, also of `over`."""
        return queries.vectors.once(self._encode_users, self._item_tokens, lambda: self._encoded(queries))

    def _encoded(self, queries: Queries) -> Floats:
        columns = dict(queries.features)
        if (history := self._features.history) is not None:
            columns[history.name] = latest(queries.clicks, self._item_tokens, history.last)
        return self._encode_users(columns)

    def cosines(self, queries: Queries, rows: npt.NDArray[np.int64]) -> Floats:
        """How near some items (n,) are to one user (n,); of several interests the nearest counts.

        Raises:
            ConfigError: the channel was made without item vectors.
        """
        if self._item_vectors is None:
            raise ConfigError(f"the channel {self.name} has no item vectors: it cannot score items one by one")
        interests = self.user_vectors(queries).reshape(-1, self._item_vectors.shape[1])
        nearest: Floats = (np.asarray(self._item_vectors[rows]) @ interests.T).max(axis=1)
        return nearest

    def over(self, name: str, index: VectorIndex) -> Self:
        """A channel with this one's user vectors over another index."""
        other = copy.copy(self)
        other.name, other.index, other._item_vectors = name, index, None
        return other

    def newer(
        self, item_tokens: Rows, index: VectorIndex, item_vectors: Table | None, encode_users: UserEncoder | None = None
    ) -> Self:
        """The same channel with what changed since; see the class. None = the same encoder."""
        return type(self)(
            self.name, self._features, item_tokens, encode_users or self._encode_users, index, item_vectors
        )

    @property
    def item_tokens(self) -> Rows:
        """(N,) row of each catalogue item in the table of item ids."""
        return self._item_tokens

    @property
    def item_vectors(self) -> Table | None:
        """(N, D) of the catalogue, where the channel has them."""
        return self._item_vectors

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        vectors = self.user_vectors(queries)
        interests = vectors if vectors.ndim == 3 else vectors[:, None]
        found = _search(self.index, interests, k, queries.exclude)
        unknown = ~interests.any(axis=(1, 2))
        found.rows[unknown], found.scores[unknown] = PADDING, -np.inf
        return found

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """See `SimilarItems.similar`: the nearest item vectors."""
        if self._item_vectors is None:
            return None
        itself = Exclusions(np.arange(len(rows) + 1), rows)
        known = rows < self._item_vectors.shape[0]  # an item may have been put since, and this channel not know it
        vectors = np.array(self._item_vectors[np.where(known, rows, 0)], np.float32)
        vectors[~known] = 0
        found = self.index.search(np.ascontiguousarray(vectors), k, itself)
        unknown = ~vectors.any(axis=1)
        found.rows[unknown], found.scores[unknown] = PADDING, -np.inf
        return Candidates(found.rows, found.scores)


def _search(index: VectorIndex, interests: Floats, k: int, exclude: Exclusions) -> Candidates:
    """The k best items of each user, where an item is as near as the nearest of the interests (B, K, D)."""
    users, count, width = interests.shape
    if count == 1:
        found = index.search(interests[:, 0], k, exclude)
        return Candidates(found.rows, found.scores)
    counts = np.repeat(np.diff(exclude.indptr), count)
    left_out = Exclusions(pointers(counts), exclude.rows[ranges(np.repeat(exclude.indptr[:-1], count), counts)])
    found = index.search(np.ascontiguousarray(interests.reshape(-1, width)), k, left_out)
    return best_of(found.rows.reshape(users, count * k), found.scores.reshape(users, count * k), k)


def best_of(rows: npt.NDArray[np.int64], scores: Floats, k: int) -> Candidates:
    """The k best of each user's entries (B, n), an item that stands there several times once, with its best score.

    >>> best_of(np.array([[4, 7, 4, -1]]), np.array([[0.5, 0.4, 0.9, -np.inf]], np.float32), 3).rows.tolist()
    [[4, 7, -1]]
    """
    owner, place = np.nonzero(rows != PADDING)
    size = int(rows.max(initial=0)) + 1
    distinct, entry = np.unique(owner * size + rows[owner, place], return_inverse=True)
    best = np.full(len(distinct), -np.inf, np.float32)
    np.maximum.at(best, entry, scores[owner, place])
    return top_of_groups(distinct // size, distinct % size, best, len(rows), k)


def latest(clicks: Bag, item_tokens: Rows, last: int) -> Bag:
    """The last clicks of each user as rows of the table of item ids.

    >>> latest(Bag(np.array([0, 3]), np.array([5, 6, 7], np.int32)), np.arange(9, dtype=np.int32) + 2, 2).rows.tolist()
    [8, 9]
    """
    ends = clicks.indptr[1:]
    counts = np.minimum(ends - clicks.indptr[:-1], last)
    return Bag(pointers(counts), item_tokens[clicks.rows[ranges(ends - counts, counts)]])
