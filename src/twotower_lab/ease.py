"""EASE, a linear model of items in closed form: a strong baseline without training (Steck 2019, eq. 8).

B users, N items.
"""

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates, Queries
from twotower.samples.read import Samples

Floats = npt.NDArray[np.float32]


def weights(clicked: Floats, regularisation: float) -> Floats:
    """The weight of a click on one item for another item (N, N), from who clicked what (U, N).

    >>> weights(np.array([[1, 1], [1, 1], [0, 1]], np.float32), 1.0).round(2)
    array([[0.  , 0.67],
           [0.5 , 0.  ]], dtype=float32)
    """
    inverse = np.linalg.inv(clicked.T @ clicked + regularisation * np.eye(clicked.shape[1], dtype=np.float32))
    weighed: Floats = (inverse / -np.diag(inverse)).astype(np.float32)
    np.fill_diagonal(weighed, 0)
    return weighed


class Ease:
    """EASE over the items with a training positive; `regularisation` is added to the diagonal."""

    name = "ease"

    def __init__(self, samples: Samples, regularisation: float = 500.0) -> None:
        self._items = np.flatnonzero(samples.item_positives)
        self._size = len(samples.items)
        clicks = samples.clicks
        clicked = self._clicked(len(samples.users), clicks.indptr, clicks.item_row)
        self._weights = weights(clicked, regularisation)

    def _clicked(self, users: int, indptr: npt.NDArray[np.int64], rows: npt.NDArray[np.integer]) -> Floats:
        clicked = np.zeros((users, self._size), np.float32)
        clicked[np.repeat(np.arange(users), np.diff(indptr)), rows] = 1
        return clicked[:, self._items]

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`; a user without clicks has no candidates."""
        clicked = self._clicked(len(queries), queries.clicks.indptr, queries.clicks.rows)
        scores = clicked @ self._weights
        scores[clicked > 0] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        rows, values = self._items[best], np.take_along_axis(scores, best, axis=1)
        rows[(np.diff(queries.clicks.indptr) == 0)[:, None] | np.isneginf(values)] = -1
        return Candidates(rows, values)
