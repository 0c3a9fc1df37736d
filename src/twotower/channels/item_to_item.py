"""Candidates of `item_cf` and `swing`: the nearest items of a user's latest clicks.

The two channels differ in how similar two items are. N items, B users.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.lists import LookUps, WeighedLists, latest_clicks, owners, top_of_groups, top_sums
from twotower.channels.retriever import Candidates, Queries
from twotower.features.columns import Bag, pointers, ranges
from twotower.samples.columns_file import map_columns, write_table
from twotower.schema.files import read_json, write_json

FILE = "neighbours.arrow"
SETTINGS = "answering.json"


@dataclass(frozen=True)
class Answering:
    """How clicks become candidates."""

    latest: int
    """This many latest clicks of a user are looked up."""
    recency: float
    """A click followed by c later ones counts (1 + c)^-recency."""
    repeats: bool = False
    """An item that occurs c times among them counts 1 + ln c times; otherwise once."""


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
    """The nearest items of each item (N lists), best first; a candidate's score is the sum of its similarities."""

    def __init__(self, name: str, nearest: WeighedLists, answering: Answering) -> None:
        self.name = name
        self._nearest = nearest
        self._answering = answering

    @classmethod
    def of(cls, name: str, nearest: Nearest, items: int, answering: Answering, *, normalise: bool) -> Self:
        """The channel from the result of a job on N items.

        `normalise` divides the similarities of an item's neighbours by their sum, so that each click has one vote,
        whether its item is popular or not (Deshpande and Karypis 2004, section 4.2).
        """
        similarity = nearest.similarity
        if normalise:
            similarity = similarity / np.bincount(nearest.item, similarity, items)[nearest.item]
        lists = Bag(pointers(np.bincount(nearest.item, minlength=items)), nearest.neighbour)
        return cls(name, WeighedLists(lists, similarity.astype(np.float32)), answering)

    @classmethod
    def load(cls, name: str, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        nearest = WeighedLists.of(map_columns(folder / FILE), "neighbours", "similarity")
        return cls(name, nearest, Answering(**read_json(folder / SETTINGS)))

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        write_table(folder / FILE, pa.table(self._nearest.columns("neighbours", "similarity")))
        write_json(folder / SETTINGS, asdict(self._answering))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        return top_sums(self._clicked(queries.clicks), self._nearest, queries.exclude, len(self._nearest.lists), k)

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: the stored neighbours."""
        lists = self._nearest.lists
        counts = np.diff(lists.indptr)[rows]
        entries, owner = ranges(lists.indptr[rows], counts), np.repeat(np.arange(len(rows)), counts)
        neighbours = lists.rows[entries].astype(np.int64)
        return top_of_groups(owner, neighbours, self._nearest.values[entries], len(rows), k)

    def _clicked(self, clicks: Bag) -> LookUps:
        """The distinct items among the latest clicks of each user, and how much each counts."""
        latest, size = latest_clicks(clicks, self._answering.latest), len(self._nearest.lists)
        owner = owners(latest)
        since = latest.indptr[1:][owner] - 1 - np.arange(len(owner))
        key = owner * size + latest.rows
        # Backwards, the first of equal clicks is the latest.
        distinct, last, repeats = np.unique(key[::-1], return_index=True, return_counts=True)
        interest = np.power(1.0 + since[::-1][last], -self._answering.recency, dtype=np.float64)
        if self._answering.repeats:
            interest *= 1 + np.log(repeats)
        return LookUps(distinct // size, distinct % size, interest)
