"""A few newer vectors over an index that stays as it is: what a server searches between two versions.

D vector, M newer vectors.
"""

from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from twotower.index.checks import FORMAT, INDEX_JSON
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions, Neighbours, VectorIndex
from twotower.schema.files import whole_folder, write_json

BASE, NEWER = "base", "newer"


class OverlaidIndex:
    """A base without the rows that are newer, merged with an exact search of those.

    The base is neither copied nor changed, so making one costs only what the newer vectors cost. (FAISS allows no add
    beside a search, and aborts the process on a removal from a mapped file.)
    """

    def __init__(self, base: VectorIndex, newer: ExactIndex) -> None:
        """Use `over`, or give a base that is `without` the newer rows."""
        self._base = base
        self._newer = newer

    @classmethod
    def over(cls, base: VectorIndex, rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> Self:
        """Newer vectors (M, D) under rows (M,) over a base, whose own vectors of these rows are no longer found.

        Raises:
            DataError: as of `ExactIndex.build`.

        >>> base = ExactIndex.build(np.arange(2), np.eye(2, dtype=np.float32))
        >>> newer = OverlaidIndex.over(base, np.array([1, 7]), np.array([[2, 0], [0, 1]], np.float32))
        >>> newer.search(np.array([[1, 0.5]], np.float32), k=3).rows
        array([[1, 0, 7]])
        """
        return cls(base.without(rows), ExactIndex.build(rows, vectors))

    @property
    def rows(self) -> NDArray[np.int64]:  # noqa: D102
        return np.union1d(self._base.rows, self._newer.rows)

    def count(self) -> int:  # noqa: D102
        return self._base.count() + self._newer.count()

    def search(self, queries: NDArray[np.float32], k: int, exclude: Exclusions | None = None) -> Neighbours:  # noqa: D102
        base, newer = self._base.search(queries, k, exclude), self._newer.search(queries, k, exclude)
        rows = np.concatenate([base.rows, newer.rows], axis=1)
        scores = np.concatenate([base.scores, newer.scores], axis=1)
        order = np.lexsort((rows, -scores))[:, :k]  # padding has minus infinity
        return Neighbours(np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1))

    def without(self, rows: NDArray[np.int64]) -> Self:  # noqa: D102
        return type(self)(self._base.without(rows), self._newer.without(rows))

    def save(self, folder: Path) -> None:  # noqa: D102
        with whole_folder(folder) as temporary:
            self._base.save(temporary / BASE)
            self._newer.save(temporary / NEWER)
            write_json(temporary / INDEX_JSON, {"format": FORMAT, "kind": "overlaid"})

    def close(self) -> None:  # noqa: D102
        self._base.close()
