"""The two-tower model as a recall channel: the user's vector, then its nearest item vectors."""

from collections.abc import Callable, Mapping

import numpy as np

from twotower.features.columns import Bag, Column, Rows, pointers, ranges
from twotower.features.feature_set import FeatureSet
from twotower.index.protocol import VectorIndex
from twotower.models.retriever import Candidates, Queries
from twotower.models.two_tower import Floats

UserEncoder = Callable[[Mapping[str, Column]], Floats]
"""Encoded columns of B users, history included, to unit vectors (B, D)."""


class TwoTowerChannel:
    """A user encoder and an index of item vectors.

    Args:
        features: the fitted features.
        item_tokens: (N,) row of each catalogue item in the table of item ids.
        encode_users: the user tower, whichever engine runs it.
        index: of the item vectors, by catalogue row.
    """

    name = "two_tower"

    def __init__(
        self,
        features: FeatureSet,
        item_tokens: Rows,
        encode_users: UserEncoder,
        index: VectorIndex,
    ) -> None:
        self._features = features
        self._item_tokens = item_tokens
        self._encode_users = encode_users
        self.index = index

    def user_vectors(self, queries: Queries) -> Floats:
        """The vectors (B, D) of users."""
        columns = dict(queries.features)
        if (history := self._features.history) is not None:
            columns[history.name] = latest(queries.clicks, self._item_tokens, history.last)
        return self._encode_users(columns)

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        found = self.index.search(self.user_vectors(queries), k, queries.exclude)
        return Candidates(found.rows, found.scores)


def latest(clicks: Bag, item_tokens: Rows, last: int) -> Bag:
    """The last clicks of each user as rows of the table of item ids.

    >>> latest(Bag(np.array([0, 3]), np.array([5, 6, 7], np.int32)), np.arange(9, dtype=np.int32) + 2, 2).rows.tolist()
    [8, 9]
    """
    ends = clicks.indptr[1:]
    counts = np.minimum(ends - clicks.indptr[:-1], last)
    return Bag(pointers(counts), item_tokens[clicks.rows[ranges(ends - counts, counts)]])
