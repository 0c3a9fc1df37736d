"""Answering from two tables: the user's latest clicks, and the nearest items of each item.

What `item_cf` and `swing` share: they differ in what makes two items near. N items, B users.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import Candidates, Queries, top_of_groups, top_sums
from twotower.features.columns import Bag, pointers, ranges
from twotower.samples.columns_file import map_columns, write_table
from twotower.schema.files import read_json, write_json

FILE = "neighbours.arrow"
SETTINGS = "answering.json"


@dataclass(frozen=True)
class Answering:
    """How clicks become candidates."""

    latest: int
    """A user's latest clicks that are looked up."""
    recency: float
    """A click that c later ones followed counts (1 + c)^-recency."""
    repeats: bool = False
    """An item that was clicked c times among them counts 1 + ln c times; otherwise once."""


@dataclass(frozen=True)
class Nearest:
    """The nearest items of each, a row each, items in ascending order, best neighbour first."""

    item: npt.NDArray[np.int64]
    """(n,) catalogue rows."""
    neighbour: npt.NDArray[np.int32]
    """(n,) catalogue rows."""
    similarity: npt.NDArray[np.float64]
    """(n,) above 0."""

    @classmethod
    def of(cls, batches: Iterable[pa.RecordBatch]) -> "Nearest":
        """The rows of a job's result, with columns of these names."""
        parts = [batch.select(NEAREST.names).cast(NEAREST) for batch in batches]
        columns = pa.Table.from_batches(parts, NEAREST).combine_chunks()
        return cls(*(columns.column(name).to_numpy() for name in NEAREST.names))


NEAREST = pa.schema([("item", pa.int64()), ("neighbour", pa.int32()), ("similarity", pa.float64())])


class ItemToItem:
    """Two tables: user -> latest clicks (the query's), item -> nearest items. A score is the sum of similarities.

    Args:
        neighbours: the nearest items of each item, best first (N bags of catalogue rows).
        similarity: (nnz,) float32.
        answering: how clicks become candidates.
    """

    def __init__(self, neighbours: Bag, similarity: npt.NDArray[np.float32], answering: Answering) -> None:
        self._neighbours = neighbours
        self._similarity = similarity
        self._answering = answering

    @classmethod
    def of(cls, nearest: Nearest, items: int, answering: Answering, *, normalise: bool) -> "ItemToItem":
        """The tables of what a job has found.

        Args:
            nearest: the neighbours of all items.
            items: N, size of the catalogue.
            answering: how clicks become candidates.
            normalise: the similarities of an item's neighbours are divided by their sum, so that each click has one
                vote to give, whether its item is popular or not (Deshpande and Karypis 2004, section 4.2).
        """
        counts = np.bincount(nearest.item, minlength=items)
        similarity = nearest.similarity
        if normalise:
            similarity = similarity / np.bincount(nearest.item, similarity, items)[nearest.item]
        return cls(Bag(pointers(counts), nearest.neighbour), similarity.astype(np.float32), answering)

    @classmethod
    def load(cls, folder: Path) -> "ItemToItem":
        """Read what `save` wrote, memory-mapped."""
        stored = map_columns(folder / FILE)
        lists = stored.column("neighbours")
        rows, similarity = lists.flatten(), stored.column("similarity").flatten()
        neighbours = Bag(lists.offsets.to_numpy().astype(np.int64), rows.to_numpy())
        return cls(neighbours, similarity.to_numpy(), Answering(**read_json(folder / SETTINGS)))

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        offsets = pa.array(self._neighbours.indptr)
        columns = {"neighbours": self._neighbours.rows, "similarity": self._similarity}
        lists = {name: pa.LargeListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        write_table(folder / FILE, pa.table(lists))
        write_json(folder / SETTINGS, asdict(self._answering))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        owner, clicked, interest = self._clicked(queries.clicks)
        lists, size = self._neighbours, len(self._neighbours)
        return top_sums(owner, clicked, interest, lists, self._similarity, queries.exclude, size, len(queries), k)

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: the stored neighbours."""
        counts = np.diff(self._neighbours.indptr)[rows]
        entries = ranges(self._neighbours.indptr[rows], counts)
        neighbours = self._neighbours.rows[entries].astype(np.int64)
        owner = np.repeat(np.arange(len(rows)), counts)
        return top_of_groups(owner, neighbours, self._similarity[entries], len(rows), k)

    def _clicked(self, clicks: Bag) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The distinct items that users clicked lately: whose, which, and how much each counts."""
        ends = clicks.indptr[1:]
        latest = np.minimum(np.diff(clicks.indptr), self._answering.latest)
        owner = np.repeat(np.arange(len(clicks)), latest)
        since = np.repeat(np.cumsum(latest), latest) - 1 - np.arange(len(owner))
        key = owner * len(self._neighbours) + clicks.rows[ranges(ends - latest, latest)]
        # Backwards, the first of equal clicks is the latest.
        distinct, last, repeats = np.unique(key[::-1], return_index=True, return_counts=True)
        interest = np.power(1.0 + since[::-1][last], -self._answering.recency, dtype=np.float64)
        if self._answering.repeats:
            interest *= 1 + np.log(repeats)
        return distinct // len(self._neighbours), distinct % len(self._neighbours), interest
