"""Item-based collaborative filtering: items clicked by the same users (Sarwar et al. 2001).

Similarity of a clicked item i to a candidate j: the sum over the users u of both of w_u l_ui l_uj, over
n_i^(1 - popularity) n_j^popularity. Here l is the user's interest in an item, n_i the sum of l_ui^2 over the users of i
(with an interest of 1 their number), and w_u = 1 / (items of u)^activity, because a click of a user who clicks
everything says little (Breese et al. 1998). popularity = 0.5 is the damped cosine; below it popular items come more
often, above it less.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from ibis import _

from twotower.channels.item_to_item import Answering, ItemToItem, Nearest
from twotower.channels.options import ItemCFOptions
from twotower.samples.engine import open_engine
from twotower.samples.options import EngineOptions
from twotower.samples.read import Clicks, Positives
from twotower.schema.files import TEMPORARY

ITEM_CF = "item_cf"

_UNITS = 2.0**30
"""Unit of the weights that are added: whole numbers, so that a sum does not depend on the order of addition."""
_DEGREES = 2.0**20
"""Unit of an interest other than 1."""
_DAMPING = 2.0**30
"""Unit of an item's share in the denominator: engines differ in the last bit of a power, not after rounding. Operands
of a division are cast to float64, because Spark takes 1024.0 for a decimal and would divide by it as decimals."""


def fit_item_cf(
    clicks: Clicks,
    items: int,
    options: ItemCFOptions = ItemCFOptions(),  # noqa: B008  frozen
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    scratch: Path | None = None,
    *,
    positives: Positives | None = None,
) -> ItemToItem:
    """The channel: the nearest of each of N items from all users' clicks, computed out of core.

    Every engine gives the same bytes; it keeps what does not fit in memory below `scratch` (None = the system's).
    With `interest = "weight"`, the positives are counted instead of the clicks.
    """
    if options.interest == "weight":
        assert positives is not None
        rows = {"user": positives.user_row, "item": positives.item_row, "weight": positives.weight}
    else:
        rows = {"user": clicks.owners.astype(np.int32), "item": clicks.item_row}
    table = pa.table({**rows, "place": np.arange(len(rows["user"]), dtype=np.int64)})
    folder = TemporaryDirectory(prefix=TEMPORARY, dir=scratch)
    with folder as spill, open_engine(engine, Path(spill)) as opened:
        edges = opened.keep("edges", _edges(opened.put("clicks", table), options))
        pairs = opened.keep("pairs", _pairs(edges, options))
        nearest = Nearest.of(opened.batches(_nearest(pairs, edges, options)))
    answering = Answering(options.latest, options.recency, repeats=options.interest == "clicks")
    return ItemToItem.of(ITEM_CF, nearest, items, answering, normalise=options.normalise)


def _edges(clicks: Any, options: ItemCFOptions) -> Any:
    """Distinct (user, item) with the user's weight in units of 1 / _UNITS, and the interest in units of 1 / _DEGREES.

    Of a user with very many items, the latest are kept.
    """
    if options.interest == "clicks":
        degree = (_DEGREES * (1 + _.count().log())).round()
    elif options.interest == "weight":
        degree = (_DEGREES * _.weight.cast("float64")).round().cast("int64").sum()
    else:
        degree = ibis.literal(int(_DEGREES))
    distinct = clicks.group_by(["user", "item"]).aggregate(place=_.place.max(), degree=degree.cast("int64"))
    ranked = distinct.filter(_.degree > 0).mutate(
        newest=ibis.row_number().over(ibis.window(group_by="user", order_by=[ibis.desc("place"), "item"]))
    )
    kept = ranked.filter(_.newest < options.items)
    counted = kept.mutate(size=_.count().over(ibis.window(group_by="user")))
    weight = (_UNITS / _.size.cast("float64").pow(options.activity)).round()
    return counted.select("user", "item", "degree", weight=weight.cast("int64"))


def _pairs(edges: Any, options: ItemCFOptions) -> Any:
    """Pairs of different items of a user, once each, with the weights of the users of both."""
    other = edges.view()
    weight = edges.weight
    if options.interest != "clicked":
        weight = (
            (edges.weight * (edges.degree.cast("float64") / _DEGREES) * (other.degree.cast("float64") / _DEGREES))
            .round()
            .cast("int64")
        )
    return (
        edges.join(other, [edges.user == other.user, edges.item < other.item])
        .select(first=edges.item, second=other.item, weight=weight)
        .group_by(["first", "second"])
        .aggregate(both=_.weight.sum().cast("float64") / _UNITS)
    )


def _nearest(pairs: Any, edges: Any, options: ItemCFOptions) -> Any:
    """For each item its most similar others: item, neighbour, similarity; best first, ties by row."""
    degree = _.degree.cast("float64") / _DEGREES
    users = (degree * degree * _UNITS).round().cast("int64").sum().cast("float64") / _UNITS
    alone = edges.group_by("item").aggregate(users=users)
    damped = alone.select(
        "item",
        clicked=(_DAMPING / _.users.pow(1 - options.popularity)).round().cast("float64") / _DAMPING,
        candidate=(_DAMPING / _.users.pow(options.popularity)).round().cast("float64") / _DAMPING,
    )
    first = damped.rename(first="item", first_clicked="clicked", first_candidate="candidate")
    second = damped.rename(second="item", second_clicked="clicked", second_candidate="candidate")
    both = pairs.join(first, "first").join(second, "second")
    forward = both.select(item="first", neighbour="second", similarity=_.both * (_.first_clicked * _.second_candidate))
    backward = both.select(item="second", neighbour="first", similarity=_.both * (_.second_clicked * _.first_candidate))
    ranked = ibis.union(forward, backward).mutate(
        place=ibis.row_number().over(ibis.window(group_by="item", order_by=[ibis.desc("similarity"), "neighbour"]))
    )
    return ranked.filter(_.place < options.neighbours).order_by(["item", "place"])
