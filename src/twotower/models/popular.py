"""The most clicked items: the channel that always has an answer, and the baseline of every evaluation."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.index.protocol import PADDING
from twotower.models.retriever import Candidates, Queries
from twotower.samples.columns_file import map_columns, write_table

FILE = "popular.arrow"


class Popular:
    """Items by falling number of clicks, ties by row; the same for everyone but for what is excluded.

    Args:
        rows: (n,) catalogue rows in that order.
        clicks: (n,) their clicks.
    """

    name = "popular"

    def __init__(self, rows: npt.NDArray[np.int32], clicks: npt.NDArray[np.int64]) -> None:
        self._rows = rows
        self._clicks = clicks

    @classmethod
    def fit(cls, item_positives: npt.NDArray[np.int64]) -> "Popular":
        """Order the catalogue by positives (N,); items without any are left out."""
        order = np.argsort(-item_positives, kind="stable")
        order = order[item_positives[order] > 0]
        return cls(order.astype(np.int32), item_positives[order])

    @classmethod
    def load(cls, folder: Path) -> "Popular":
        """Read what `save` wrote, memory-mapped."""
        stored = map_columns(folder / FILE)
        return cls(stored.column("item_row").to_numpy(), stored.column("clicks").to_numpy())

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        write_table(folder / FILE, pa.table({"item_row": pa.array(self._rows), "clicks": pa.array(self._clicks)}))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        rows = np.full((len(queries), k), PADDING, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        exclude = queries.exclude
        for user in range(len(queries)):
            left_out = exclude.rows[exclude.indptr[user] : exclude.indptr[user + 1]]
            head = self._rows[: k + len(left_out)]
            place = np.flatnonzero(~np.isin(head, left_out))[:k]
            rows[user, : len(place)] = head[place]
            scores[user, : len(place)] = self._clicks[place]
        return Candidates(rows, scores)
