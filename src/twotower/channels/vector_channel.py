"""A vector channel: the user's vector, or the vectors of their interests, then the nearest item vectors.

B users, K interests, D vector, k candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from twotower.channels.lists import best_of, latest_clicks, nearest
from twotower.channels.retriever import Candidates, Queries
from twotower.features.columns import Bag, Column, Rows, pointers, ranges
from twotower.features.feature_set import FeatureSet
from twotower.index.protocol import Exclusions, VectorIndex
from twotower.schema.errors import ConfigError
from twotower.towers.two_tower import Floats, Table

UserEncoder = Callable[[Mapping[str, Column]], Floats]
"""From encoded columns of B users, history included, to unit vectors (B, D), or (B, K, D) of their interests."""


@dataclass(eq=False)
class VectorChannel:
    """A user encoder and an index of item vectors: `two_tower`, `mf` and `mind`.

    A user of whom the encoder knows nothing, and whose vector is zero, has no candidates.
    """

    name: str
    features: FeatureSet
    """The fitted features that the encoder reads."""
    item_tokens: Rows
    """(N,) vocabulary index of each catalogue item."""
    encode_users: UserEncoder
    """The user tower, whichever engine runs it."""
    index: VectorIndex
    """Of the item vectors, by catalogue row."""
    item_vectors: Table | None = None
    """(N, D) of the catalogue; None = the channel has no similar items."""

    def user_vectors(self, queries: Queries) -> Floats:
        """The vectors of users (B, D), or of their interests (B, K, D); made once for queries, with those of `over`."""
        return queries.vectors.once(self.encode_users, self.item_tokens, lambda: self._encoded(queries))

    def _encoded(self, queries: Queries) -> Floats:
        columns = dict(queries.features)
        if (history := self.features.history) is not None:
            columns[history.name] = latest(queries.clicks, self.item_tokens, history.last)
        return self.encode_users(columns)

    def cosines(self, queries: Queries, rows: npt.NDArray[np.int64]) -> Floats:
        """The cosine of some items (n,) with one user, (n,); of several interests the nearest counts.

        Raises:
            ConfigError: the channel was made without item vectors.
        """
        if self.item_vectors is None:
            raise ConfigError(f"the channel {self.name} has no item vectors: it cannot score items one by one")
        interests = self.user_vectors(queries).reshape(-1, self.item_vectors.shape[1])
        best: Floats = (np.asarray(self.item_vectors[rows]) @ interests.T).max(axis=1)
        return best

    def over(self, name: str, index: VectorIndex) -> Self:
        """A channel with this one's user vectors over another index."""
        return replace(self, name=name, index=index, item_vectors=None)

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        vectors, exclude = self.user_vectors(queries), queries.exclude
        if vectors.ndim == 2:
            return nearest(self.index, vectors, k, exclude)
        users, count, width = vectors.shape
        counts = np.repeat(np.diff(exclude.indptr), count)
        left_out = Exclusions(pointers(counts), exclude.rows[ranges(np.repeat(exclude.indptr[:-1], count), counts)])
        neighbours = nearest(self.index, vectors.reshape(-1, width), k, left_out)
        return best_of(neighbours.rows.reshape(users, count * k), neighbours.scores.reshape(users, count * k), k)

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates | None:
        """See `SimilarItems.similar`: the nearest item vectors."""
        if self.item_vectors is None:
            return None
        known = rows < self.item_vectors.shape[0]  # an item may have been put since, and this channel not know it
        vectors = np.array(self.item_vectors[np.where(known, rows, 0)], np.float32)
        vectors[~known] = 0
        return nearest(self.index, vectors, k, Exclusions.each(rows))


def latest(clicks: Bag, item_tokens: Rows, last: int) -> Bag:
    """The last clicks of each user as vocabulary indexes.

    >>> latest(Bag(np.array([0, 3]), np.array([5, 6, 7], np.int32)), np.arange(9, dtype=np.int32) + 2, 2).rows.tolist()
    [8, 9]
    """
    kept = latest_clicks(clicks, last)
    return Bag(kept.indptr, item_tokens[kept.rows])
