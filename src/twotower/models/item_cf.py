"""Item-based collaborative filtering: items clicked by the same users.

Similarity of two items: the sum of the weights of the users who clicked both, over the root of the product of their
numbers of users, where a user of n distinct items weighs 1 / log(2 + n), because a click of someone who clicks
everything says little (Sarwar et al. 2001; Breese et al. 1998 for the damping). A candidate's score is the sum of its
similarities to the user's latest clicks.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ibis import _

from twotower.config import settings as spec
from twotower.features.columns import Bag, pointers, ranges
from twotower.models.retriever import Candidates, Queries, top_of_groups
from twotower.samples.columns_file import map_columns, write_table
from twotower.samples.engine import open_engine
from twotower.samples.read import Clicks
from twotower.schema.files import TEMPORARY

FILE = "neighbours.arrow"
NEIGHBOURS = 100
"""Neighbours kept of each item."""
LATEST = 500
"""Clicks of a user that are looked up."""
MOST_ITEMS = 500
"""Distinct items of a user that count, the latest: pairs grow with the square, and one crawler must not end a job."""

_UNITS = 2.0**30
_ENTRIES = 1 << 21
"""Neighbours summed at a time."""


class ItemCF:
    """Two tables: user -> latest clicks (the query's), item -> nearest items.

    Args:
        neighbours: the nearest items of each item, best first (N bags of catalogue rows).
        similarity: (nnz,) float32.
    """

    name = "item_cf"

    def __init__(self, neighbours: Bag, similarity: npt.NDArray[np.float32]) -> None:
        self._neighbours = neighbours
        self._similarity = similarity

    @classmethod
    def fit(
        cls,
        clicks: Clicks,
        items: int,
        engine: spec.Engine = spec.Engine(),  # noqa: B008  frozen
        scratch: Path | None = None,
    ) -> "ItemCF":
        """Compute the nearest items of each from all users' clicks, out of core.

        Args:
            clicks: every user's clicks.
            items: N, size of the catalogue.
            engine: what runs the job; every engine gives the same bytes.
            scratch: folder below which the engine keeps what does not fit in memory; None = the system's.
        """
        users = np.repeat(np.arange(len(clicks.indptr) - 1, dtype=np.int32), np.diff(clicks.indptr))
        place = np.arange(len(users), dtype=np.int64)
        counts = np.zeros(items, np.int64)
        rows, similarity = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        with TemporaryDirectory(prefix=TEMPORARY, dir=scratch) as folder, open_engine(engine, Path(folder)) as opened:
            pairs = opened.put("clicks", pa.table({"user": users, "item": pa.array(clicks.item_row), "place": place}))
            for batch in opened.batches(_nearest(opened.keep("edges", _edges(pairs)))):
                counts += np.bincount(batch.column("item").to_numpy(), minlength=items)
                rows.append(batch.column("neighbour").to_numpy().astype(np.int32))
                similarity.append(batch.column("similarity").to_numpy().astype(np.float32))
        return cls(Bag(pointers(counts), np.concatenate(rows)), np.concatenate(similarity))

    @classmethod
    def load(cls, folder: Path) -> "ItemCF":
        """Read what `save` wrote, memory-mapped."""
        stored = map_columns(folder / FILE)
        lists = stored.column("neighbours")
        rows, similarity = lists.flatten(), stored.column("similarity").flatten()
        indptr = lists.offsets.to_numpy().astype(np.int64)
        return cls(Bag(indptr, rows.to_numpy()), similarity.to_numpy())

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        offsets = pa.array(self._neighbours.indptr)
        columns = {"neighbours": self._neighbours.rows, "similarity": self._similarity}
        lists = {name: pa.LargeListArray.from_arrays(offsets, pa.array(values)) for name, values in columns.items()}
        write_table(folder / FILE, pa.table(lists))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        count = len(queries)
        latest = np.minimum(np.diff(queries.clicks.indptr), LATEST)
        per_user = max(1, int(latest.max(initial=1)) * NEIGHBOURS)
        step = max(1, _ENTRIES // per_user)
        parts = [self._part(queries, start, min(count, start + step), k) for start in range(0, max(1, count), step)]
        return Candidates(np.concatenate([p.rows for p in parts]), np.concatenate([p.scores for p in parts]))

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: the stored neighbours, of which there are at most `NEIGHBOURS`."""
        begin = self._neighbours.indptr[rows]
        counts = self._neighbours.indptr[rows + 1] - begin
        entries = ranges(begin, counts)
        owner = np.repeat(np.arange(len(rows)), counts)
        neighbours = self._neighbours.rows[entries].astype(np.int64)
        return top_of_groups(owner, neighbours, self._similarity[entries], len(rows), k)

    def _part(self, queries: Queries, start: int, stop: int, k: int) -> Candidates:
        """The candidates of users start..stop-1."""
        clicks, exclude = queries.clicks, queries.exclude
        ends = clicks.indptr[start + 1 : stop + 1]
        latest = np.minimum(ends - clicks.indptr[start:stop], LATEST)
        owner = np.repeat(np.arange(stop - start), latest)
        clicked = clicks.rows[ranges(ends - latest, latest)]
        size = len(self._neighbours)
        # A click that is repeated counts once.
        clicked_once = np.unique(owner * size + clicked)
        owner, clicked = clicked_once // size, clicked_once % size
        begin = self._neighbours.indptr[clicked]
        counts = self._neighbours.indptr[clicked + 1] - begin
        entries = ranges(begin, counts)
        key = np.repeat(owner, counts) * size + self._neighbours.rows[entries]
        distinct, place = np.unique(key, return_inverse=True)
        scores = np.bincount(place, weights=self._similarity[entries], minlength=len(distinct)).astype(np.float32)
        bounds = exclude.indptr[start : stop + 1]
        left_out = np.repeat(np.arange(stop - start), np.diff(bounds)) * size + exclude.rows[bounds[0] : bounds[-1]]
        kept = ~np.isin(distinct, left_out)
        return top_of_groups(distinct[kept] // size, distinct[kept] % size, scores[kept], stop - start, k)


def _edges(clicks: Any) -> Any:
    """Distinct (user, item) with the user's weight in units of 1 / _UNITS; of a user of very many items, the latest.

    Whole numbers are added, so that similarities do not depend on the order in which an engine adds.
    """
    distinct = clicks.group_by(["user", "item"]).aggregate(place=_.place.max())
    ranked = distinct.mutate(
        newest=ibis.row_number().over(ibis.window(group_by="user", order_by=[ibis.desc("place"), "item"]))
    )
    kept = ranked.filter(_.newest < MOST_ITEMS)
    counted = kept.mutate(size=_.count().over(ibis.window(group_by="user")))
    return counted.select("user", "item", weight=(_UNITS / (2 + _.size).log()).round().cast("int64"))


def _nearest(edges: Any) -> Any:
    """For each item its most similar others: item, neighbour, similarity; best first, ties by row."""
    other = edges.view()
    pairs = (
        edges.join(other, [edges.user == other.user, edges.item < other.item])
        .select(first=edges.item, second=other.item, weight=edges.weight)
        .group_by(["first", "second"])
        .aggregate(both=_.weight.sum().cast("float64") / _UNITS)
    )
    alone = edges.group_by("item").aggregate(norm=_.count().cast("float64"))
    first, second = alone.rename(first="item", first_norm="norm"), alone.rename(second="item", second_norm="norm")
    scored = (
        pairs.join(first, "first")
        .join(second, "second")
        .mutate(similarity=_.both / (_.first_norm * _.second_norm).sqrt())
    )
    forward = scored.select(item="first", neighbour="second", similarity="similarity")
    backward = scored.select(item="second", neighbour="first", similarity="similarity")
    ranked = ibis.union(forward, backward).mutate(
        place=ibis.row_number().over(ibis.window(group_by="item", order_by=[ibis.desc("similarity"), "neighbour"]))
    )
    return ranked.filter(_.place < NEIGHBOURS).order_by(["item", "place"])
