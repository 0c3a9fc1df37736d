"""The most clicked items of the categories, authors or whatever else a user's clicks have in common.

A category is a value of one of the chosen item features. A user's share of a category is its part in the user's latest
clicks, an item's is its part in the category's clicks; a candidate's score is the sum over categories of their product:
the chance that a click of the user's kind of category is a click of the item.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import Candidates, Queries, top_sums
from twotower.features.columns import Bag, pointers, ranges
from twotower.features.fitted import Bucket, Categories, Category
from twotower.features.vocabulary import MISSING
from twotower.index.protocol import Exclusions
from twotower.samples.columns_file import map_columns, write_table
from twotower.samples.read import Samples
from twotower.schema.errors import ConfigError

ITEMS = "items.arrow"
CATEGORIES = "categories.arrow"


class SameCategory:
    """Two tables: item -> categories, category -> its most clicked items.

    Args:
        categories: of each item (N bags); what is missing is none.
        items: the most clicked items of each category, best first, as catalogue rows.
        share: (nnz,) of each among the category's clicks.
        last: a user's latest clicks that count.
    """

    name = "same_category"

    def __init__(self, categories: Bag, items: Bag, share: npt.NDArray[np.float32], last: int) -> None:
        self._categories = categories
        self._items = items
        self._share = share
        self._last = last

    @classmethod
    def fit(cls, samples: Samples, attributes: Sequence[str], last: int, most: int) -> "SameCategory":
        """Count the clicks of every category.

        Args:
            samples: with the items' encoded features and their positives.
            attributes: item features whose values are categories.
            last: a user's latest clicks that count.
            most: items kept of each category.

        Raises:
            ConfigError: no attribute, or one that is no categorical feature of items.
        """
        categories = _categories(samples, attributes)
        size, kinds = len(samples.items), int(categories.rows.max(initial=-1)) + 1
        item = np.repeat(np.arange(size), np.diff(categories.indptr))
        clicks = samples.item_positives[item]
        clicked = clicks > 0
        item, category, clicks = item[clicked], categories.rows[clicked].astype(np.int64), clicks[clicked]
        order = np.lexsort((item, -clicks, category))
        item, category, clicks = item[order], category[order], clicks[order]
        counts = np.bincount(category, minlength=kinds)
        kept = np.arange(len(item)) - pointers(counts)[category] < most
        share = clicks / np.maximum(np.bincount(category, clicks, kinds), 1)[category]
        lists = Bag(pointers(np.minimum(counts, most)), item[kept].astype(np.int32))
        return cls(categories, lists, share[kept].astype(np.float32), last)

    @classmethod
    def load(cls, folder: Path) -> "SameCategory":
        """Read what `save` wrote, memory-mapped."""
        categories, items = map_columns(folder / ITEMS), map_columns(folder / CATEGORIES)
        share = items.column("share").flatten().to_numpy()
        last = int(items.schema.metadata[b"last"])
        return cls(_bag(categories.column("categories")), _bag(items.column("items")), share, last)

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        write_table(folder / ITEMS, pa.table({"categories": _lists(self._categories, self._categories.rows)}))
        lists = {"items": _lists(self._items, self._items.rows), "share": _lists(self._items, self._share)}
        write_table(folder / CATEGORIES, pa.table(lists).replace_schema_metadata({"last": str(self._last)}))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        ends = queries.clicks.indptr[1:]
        latest = np.minimum(np.diff(queries.clicks.indptr), self._last)
        return self._alike(
            Bag(pointers(latest), queries.clicks.rows[ranges(ends - latest, latest)]), queries.exclude, k
        )

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: what someone would be brought who clicked the item alone."""
        each = np.arange(len(rows) + 1)
        return self._alike(Bag(each, rows.astype(np.int32)), Exclusions(each, rows), k)

    def _alike(self, clicks: Bag, exclude: Exclusions, k: int) -> Candidates:
        counts = np.diff(self._categories.indptr)[clicks.rows]
        category = self._categories.rows[ranges(self._categories.indptr[clicks.rows], counts)]
        owner = np.repeat(np.repeat(np.arange(len(clicks)), np.diff(clicks.indptr)), counts)
        kinds = max(1, len(self._items))
        distinct, times = np.unique(owner * kinds + category, return_counts=True)
        owner, category = distinct // kinds, distinct % kinds
        share = times / np.bincount(owner, times, len(clicks))[owner]
        return top_sums(
            owner, category, share, self._items, self._share, exclude, len(self._categories), len(clicks), k
        )


def check_attributes(samples: Samples, attributes: Sequence[str]) -> None:
    """Refuse attributes that have no categories.

    Raises:
        ConfigError: no attribute, or one that is no categorical feature of items.
    """
    fitted = {f.name: f for f in samples.features.item}
    fit = [name for name, f in fitted.items() if isinstance(f, Category | Categories | Bucket)]
    wrong = [name for name in attributes if name not in fit]
    if wrong or not attributes:
        raise ConfigError(
            f"models.same_category.attributes = {list(attributes)}: "
            + (f"{wrong[0]} is no categorical feature of items" if wrong else "the channel needs at least one")
            + f"; there are {', '.join(fit) or 'none'}"
        )


def _categories(samples: Samples, attributes: Sequence[str]) -> Bag:
    """The categories of each item, numbered through all attributes."""
    check_attributes(samples, attributes)
    fitted = {f.name: f for f in samples.features.item}
    owner, category = [], []
    first = 0
    for name in attributes:
        column, feature = samples.items.features[name], fitted[name]
        bag = column if isinstance(column, Bag) else Bag(np.arange(len(column) + 1), column.astype(np.int32))
        there = bag.rows != MISSING
        owner.append(np.repeat(np.arange(len(bag)), np.diff(bag.indptr))[there])
        category.append(first + bag.rows[there].astype(np.int64))
        first += feature.capacity if isinstance(feature, Bucket) else feature.vocabulary.capacity  # type: ignore[union-attr]
    size = len(samples.items)
    owners, rows = np.concatenate(owner), np.concatenate(category)
    order = np.argsort(owners, kind="stable")
    return Bag(pointers(np.bincount(owners, minlength=size)), rows[order].astype(np.int32))


def _lists(bag: Bag, values: npt.NDArray[np.int32] | npt.NDArray[np.float32]) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(bag.indptr), pa.array(values))


def _bag(lists: pa.Array) -> Bag:
    return Bag(lists.offsets.to_numpy().astype(np.int64), lists.flatten().to_numpy())
