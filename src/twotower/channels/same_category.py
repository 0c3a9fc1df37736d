"""The most clicked items of the categories, authors or other attributes that a user clicked.

A category is a value of one of the chosen item features. A category has a share of the user's latest clicks, and an
item a share of the category's clicks. A candidate's score is the sum over categories of the product of both: the chance
that a click on a category of the user is a click on the item.
"""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.lists import LookUps, WeighedLists, as_bag, as_lists, latest_clicks, owners, top_sums
from twotower.channels.options import SameCategoryOptions
from twotower.channels.retriever import Candidates, Queries
from twotower.features.columns import Bag, pointers, take
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
        categories: of each item (N bags); a missing value is no category.
        items: the most clicked items of each category, best first, with the share of each among its clicks.
        last: a user's latest clicks that count.
    """

    name = "same_category"

    def __init__(self, categories: Bag, items: WeighedLists, last: int) -> None:
        self._categories = categories
        self._items = items
        self._last = last

    @classmethod
    def fit(cls, samples: Samples, options: SameCategoryOptions) -> Self:
        """Count the clicks of every category.

        Raises:
            ConfigError: as of `check_attributes`.
        """
        categories = _categories(samples, options)
        kinds = int(categories.rows.max(initial=-1)) + 1
        item = owners(categories)
        clicks = samples.item_positives[item]
        clicked = clicks > 0
        item, category, clicks = item[clicked], categories.rows[clicked].astype(np.int64), clicks[clicked]
        order = np.lexsort((item, -clicks, category))
        item, category, clicks = item[order], category[order], clicks[order]
        counts = np.bincount(category, minlength=kinds)
        kept = np.arange(len(item)) - pointers(counts)[category] < options.items
        share = clicks / np.maximum(np.bincount(category, clicks, kinds), 1)[category]
        lists = Bag(pointers(np.minimum(counts, options.items)), item[kept].astype(np.int32))
        return cls(categories, WeighedLists(lists, share[kept].astype(np.float32)), options.last)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        categories, items = map_columns(folder / ITEMS), map_columns(folder / CATEGORIES)
        last = int(items.schema.metadata[b"last"])
        return cls(as_bag(categories.column("categories")), WeighedLists.of(items, "items", "share"), last)

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        write_table(folder / ITEMS, pa.table({"categories": as_lists(self._categories, self._categories.rows)}))
        lists = pa.table(self._items.columns("items", "share"))
        write_table(folder / CATEGORIES, lists.replace_schema_metadata({"last": str(self._last)}))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        return self._alike(latest_clicks(queries.clicks, self._last), queries.exclude, k)

    def similar(self, rows: npt.NDArray[np.int64], k: int) -> Candidates:
        """See `SimilarItems.similar`: the candidates of a user who clicked the item alone."""
        itself = Exclusions.each(rows)
        return self._alike(Bag(itself.indptr, rows.astype(np.int32)), itself, k)

    def _alike(self, clicks: Bag, exclude: Exclusions, k: int) -> Candidates:
        categories = take(self._categories, clicks.rows)
        assert isinstance(categories, Bag)
        owner = owners(clicks)[owners(categories)]
        kinds = max(1, len(self._items.lists))
        distinct, times = np.unique(owner * kinds + categories.rows, return_counts=True)
        owner, category = distinct // kinds, distinct % kinds
        share = times / np.bincount(owner, times, len(clicks))[owner]
        return top_sums(LookUps(owner, category, share), self._items, exclude, len(self._categories), k)


def check_attributes(samples: Samples, options: SameCategoryOptions) -> dict[str, Bucket | Category | Categories]:
    """The item features whose values are categories, by name.

    Raises:
        ConfigError: no attribute, or one that is no categorical feature of items.
    """
    fit = {f.name: f for f in samples.features.item if isinstance(f, Category | Categories | Bucket)}
    wrong = [name for name in options.attributes if name not in fit]
    if wrong or not options.attributes:
        raise ConfigError(
            f"models.same_category.attributes = {options.attributes}: "
            + (f"{wrong[0]} is no categorical feature of items" if wrong else "the channel needs at least one")
            + f"; there are {', '.join(fit) or 'none'}"
        )
    return {name: fit[name] for name in options.attributes}


def _categories(samples: Samples, options: SameCategoryOptions) -> Bag:
    """The categories of each item, numbered through all attributes."""
    owner, category = [], []
    first = 0
    for name, feature in check_attributes(samples, options).items():
        column = samples.items.features[name]
        bag = column if isinstance(column, Bag) else Bag(np.arange(len(column) + 1), column.astype(np.int32))
        there = bag.rows != MISSING
        owner.append(owners(bag)[there])
        category.append(first + bag.rows[there].astype(np.int64))
        first += feature.capacity if isinstance(feature, Bucket) else feature.vocabulary.capacity
    size = len(samples.items)
    every, rows = np.concatenate(owner), np.concatenate(category)
    order = np.argsort(every, kind="stable")
    return Bag(pointers(np.bincount(every, minlength=size)), rows[order].astype(np.int32))
