"""Implicit ALS: matrix factorisation in which items that a user did not click count a little (Hu et al. 2008).

The factors come from the library `implicit`. A user's vector is computed from their clicks at request time, so that a
click counts at once and a new user needs no training. N items, F factors, B users.
"""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from twotower.channels.lists import nearest
from twotower.channels.options import ALSOptions
from twotower.channels.retriever import Candidates, Queries
from twotower.features.columns import Bag
from twotower.index.build import load_index
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions, VectorIndex
from twotower.samples.read import Clicks
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import read_json, write_json

FACTORS = "factors.safetensors"
SETTINGS = "als.json"
ITERATIONS = 15
"""Rounds in which users and items are solved for in turn."""

Floats = npt.NDArray[np.float32]


class ALS:
    """Item factors, and an index over them.

    Items are retrieved by the inner product. So each factor is scaled to length at most 1 and extended to a unit vector
    by one more number (Bachrach et al. 2014): the nearest by cosine are then those of the greatest product.

    Args:
        factors: (N, F) of the items; zero for an item that nobody clicked.
        options: what they were made with.
        index: of these unit vectors, by catalogue row; None = an exact one is built.
    """

    name = "als"

    def __init__(self, factors: Floats, options: ALSOptions, index: VectorIndex | None = None) -> None:
        self._factors = factors
        self._options = options
        self._longest = float(np.linalg.norm(factors, axis=1).max(initial=1e-12))
        exact = factors.astype(np.float64)
        self._gram = exact.T @ exact + options.regularization * np.eye(factors.shape[1])
        self.index = index or ExactIndex.build(*self.unit_vectors)

    @classmethod
    def fit(cls, clicks: Clicks, items: int, options: ALSOptions, *, threads: int, seed: int) -> Self:
        """Factorise all users' distinct clicks on N items; the seed is that of the first factors.

        Raises:
            ConfigError: the library is not installed.
            DataError: the factors are not finite.
        """
        try:
            from implicit.cpu.als import AlternatingLeastSquares  # an extra
            from scipy.sparse import csr_matrix
            from threadpoolctl import threadpool_limits
        except ImportError:
            raise ConfigError("the channel als needs a library: pip install 'twotower[als]'") from None
        users = len(clicks.indptr) - 1
        pairs = np.unique(clicks.owners * items + clicks.item_row)
        clicked = csr_matrix((np.ones(len(pairs), np.float32), (pairs // items, pairs % items)), (users, items))
        model = AlternatingLeastSquares(
            options.factors,
            options.regularization,
            options.confidence,
            iterations=ITERATIONS,
            num_threads=threads,
            random_state=seed,
        )
        with threadpool_limits(1, "blas"):  # the library has threads of its own
            model.fit(clicked, show_progress=False)
        factors: Floats = np.asarray(model.item_factors, np.float32).copy()
        factors[np.bincount(pairs % items, minlength=items) == 0] = 0
        if not np.isfinite(factors).all():
            raise DataError("als: the factors are not finite: raise models.als.regularization")
        return cls(factors, options)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote."""
        options = ALSOptions(**read_json(folder / SETTINGS))
        return cls(load_file(folder / FACTORS)["factors"], options, load_index(folder / "index"))

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        save_file({"factors": self._factors}, folder / FACTORS)
        write_json(folder / SETTINGS, asdict(self._options))
        self.index.save(folder / "index")

    def with_index(self, index: VectorIndex) -> Self:
        """The same factors with another index of the vectors that `unit_vectors` gives."""
        return type(self)(self._factors, self._options, index)

    @property
    def unit_vectors(self) -> tuple[npt.NDArray[np.int64], Floats]:
        """The content of its index: the rows (n,) of clicked items, and their unit vectors (n, F + 1)."""
        rows = np.flatnonzero(self._factors.any(axis=1))
        scaled = self._factors[rows] / np.float32(self._longest)
        rest = np.sqrt(np.maximum(0, 1 - np.einsum("nf,nf->n", scaled, scaled)))
        return rows, np.concatenate([scaled, rest[:, None]], axis=1)

    def user_vectors(self, clicks: Bag) -> Floats:
        """Queries (B, F + 1) from the catalogue rows that users clicked (eq. 4 of the paper); zero without clicks.

        The product with an item's vector is the predicted preference, about 1 for a clicked item.
        """
        vectors = np.zeros((len(clicks), self._factors.shape[1] + 1), np.float32)
        for user in range(len(clicks)):
            rows = np.unique(clicks.rows[clicks.indptr[user] : clicks.indptr[user + 1]])
            clicked = self._factors[rows].astype(np.float64)
            weighed = self._gram + (self._options.confidence - 1) * clicked.T @ clicked
            preferred = np.linalg.solve(weighed, self._options.confidence * clicked.sum(axis=0))
            vectors[user, :-1] = preferred * self._longest
        return vectors

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        return nearest(self.index, self.user_vectors(queries.clicks), k, queries.exclude)

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: by the cosine of the factors, because their length is an item's popularity."""
        return nearest(self._alike, _unit(self._factors[rows]), k, Exclusions.each(rows))

    @cached_property
    def _alike(self) -> ExactIndex:
        """Index of the factors at unit length, built for the first request."""
        rows = np.flatnonzero(self._factors.any(axis=1))
        return ExactIndex.build(rows, _unit(self._factors[rows]))


def _unit(factors: Floats) -> Floats:
    scaled: Floats = factors / np.maximum(np.linalg.norm(factors, axis=1, keepdims=True), np.float32(1e-12))
    return scaled
