"""Every query against every vector: the oracle of all other indexes, and the index of small catalogues."""

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from twotower.index.checks import (
    FORMAT,
    INDEX_JSON,
    ROWS,
    check_search,
    checked_build,
    excluded_positions,
    hidden_with,
    map_array,
    map_rows,
    read_description,
)
from twotower.index.protocol import Exclusions, Neighbours
from twotower.schema.files import whole_folder, write_json

VECTORS = "vectors.npy"
SCORES_AT_ONCE = 1 << 23
"""Scores (32 MB) computed together, at least those of one query."""
GATHERED = 0.1
"""Share of the vectors up to which gathering them costs less than a scan of all."""
RESCORED_AT_ONCE = 1 << 16
"""Vectors gathered together to be scored again."""


class ExactIndex:
    """Exact search with a matrix product, then an exact order.

    A matrix product adds in an order that depends on the shape of the batch and on a vector's position in it, so that
    equal vectors get scores that differ in the last bit. Therefore the product only makes a shortlist: everything that
    rounding could have pushed out of the first k. The shortlist is scored again, each vector in the same order of
    additions. So equal vectors have equal scores, and an answer does not depend on the batch.
    """

    def __init__(
        self, rows: NDArray[np.int64], vectors: NDArray[np.float32], longest: float, hidden: NDArray[np.int64]
    ) -> None:
        """Use `build` or `load`: rows (N,) rising, vectors (N, D), the largest norm, hidden positions rising."""
        self._rows = rows
        self._vectors = vectors
        self._longest = longest
        self._hidden = hidden

    @classmethod
    def build(cls, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> Self:
        """An index of vectors (N, D) float32 under rows (N,) int64, N = 0 included.

        Raises:
            DataError: other shapes or types, duplicate or negative rows, values that are not finite.

        >>> index = ExactIndex.build(np.array([7, 3]), np.eye(2, dtype=np.float32))
        >>> index.search(np.array([[1, 0.5]], np.float32), k=3).rows
        array([[ 7,  3, -1]])
        """
        rows, vectors = checked_build(rows, vectors)
        squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
        return cls(rows, vectors, float(np.sqrt(squares.max(initial=0.0))), np.empty(0, np.int64))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Map a saved index into memory.

        Raises:
            DataError: files are missing or not what `index.json` says.
        """
        description = read_description(folder, "exact", {"count": int, "dimension": int, "longest": (int, float)})
        count, longest = description["count"], float(description["longest"])
        vectors = map_array(folder / VECTORS, (count, description["dimension"]), np.float32)
        return cls(map_rows(folder, count), vectors, longest, np.empty(0, np.int64))

    @property
    def rows(self) -> NDArray[np.int64]:  # noqa: D102
        return self._rows

    def __len__(self) -> int:
        """Vectors, hidden ones included."""
        return len(self._rows)

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self._vectors.shape[1])

    def best_of(self, query: NDArray[np.float32], left: NDArray[np.bool_], k: int) -> Neighbours:
        """The k nearest to a query (D,) among the vectors that are left (N,), hidden ones included; a row of an answer.

        Where few are left, they are gathered; many are left out of a scan of all.
        """
        positions = np.flatnonzero(left)
        if len(positions) <= GATHERED * len(left):
            few = type(self)(self._rows[positions], self._vectors[positions], self._longest, np.empty(0, np.int64))
            return few.search(query[None], k)
        answer, wanted = Neighbours.none(1, k), min(k, len(positions))
        scores = self._vectors @ query
        scores[~left] = -np.inf
        answer.rows[0, :wanted], answer.scores[0, :wanted] = self._best(query, scores, wanted)
        return answer

    def scored(self, query: NDArray[np.float32], positions: NDArray[np.int64]) -> Neighbours:
        """Some vectors by their positions (n,), as neighbours of a query (D,), with the scores that a search gives."""
        scores = (self._vectors[positions] * query).sum(axis=1)
        order = np.lexsort((positions, -scores))
        return Neighbours(self._rows[positions[order]][None], scores[order][None])

    def count(self) -> int:  # noqa: D102
        return len(self._rows) - len(self._hidden)

    def without(self, rows: NDArray[np.int64]) -> Self:  # noqa: D102
        hidden = hidden_with(self._hidden, rows, self._rows)
        return type(self)(self._rows, self._vectors, self._longest, hidden)

    def search(self, queries: NDArray[np.float32], k: int, exclude: Exclusions | None = None) -> Neighbours:  # noqa: D102
        check_search(queries, k, exclude, self._vectors.shape[1])
        answer = Neighbours.none(len(queries), k)
        excluded = excluded_positions(exclude, len(queries), self._rows, self._hidden)
        step = max(1, SCORES_AT_ONCE // max(1, len(self._rows)))
        for start in range(0, len(queries), step):
            scores = queries[start : start + step] @ self._vectors.T
            scores[:, self._hidden] = -np.inf
            for query, row_scores in enumerate(scores, start):
                out = excluded.rows[excluded.indptr[query] : excluded.indptr[query + 1]]
                row_scores[out] = -np.inf
                wanted = min(k, self.count() - len(out))
                if wanted > 0:
                    best = self._best(queries[query], row_scores, wanted)
                    answer.rows[query, :wanted], answer.scores[query, :wanted] = best
        return answer

    def _best(
        self, query: NDArray[np.float32], scores: NDArray[np.float32], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows and scores of the best of scores (N,), of which at least `count` are finite."""
        last = len(scores) - count
        # Two sums of the same D products, in any order, differ by at most 2 D u |q| |v| with u = 2^-24 (Higham 2002,
        # 3.1); this holds for the n-th score as well as for each candidate, hence twice that.
        slack = 4 * len(query) * 2.0**-24 * float(np.linalg.norm(query)) * self._longest
        shortlist = np.flatnonzero(scores >= np.partition(scores, last)[last] - np.float32(slack))
        pieces = np.split(shortlist, range(RESCORED_AT_ONCE, len(shortlist), RESCORED_AT_ONCE))
        rescored = np.concatenate([(self._vectors[piece] * query).sum(axis=1) for piece in pieces])
        best = np.argsort(-rescored, kind="stable")[:count]  # stable: equal scores stay in the order of rows
        return self._rows[shortlist[best]], rescored[best]

    def save(self, folder: Path) -> None:  # noqa: D102
        with whole_folder(folder) as temporary:
            np.save(temporary / ROWS, self._rows, allow_pickle=False)
            np.save(temporary / VECTORS, self._vectors, allow_pickle=False)
            description = {
                "format": FORMAT,
                "kind": "exact",
                "count": len(self._rows),
                "dimension": self._vectors.shape[1],
                "longest": self._longest,
            }
            write_json(temporary / INDEX_JSON, description)

    def close(self) -> None:  # noqa: D102
        pass
