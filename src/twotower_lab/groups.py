"""Groups of held-out clicks that are judged apart: known users and items, rare items, new users, thirds, scenes.

B users or requests, N items of the catalogue.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from twotower.datasets.workspace import HOLDOUT_COLD, HOLDOUT_IMPRESSIONS
from twotower.evaluate.holdout import Truth, asked_first, cold_truth, first_requests, held_out
from twotower.features.columns import Bag, pointers, take
from twotower.samples.read import Samples
from twotower.schema import columns as c

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RARE: Final = 0.5
"""An item is rare if it is among the least clicked ones that together have this share of the held-out clicks."""
SCENE: Final = "tab"
"""The column of the impressions that says in which scene a user asked."""
LEAST_REQUESTS: Final = 100
"""A scene with fewer requests is not judged apart."""


@dataclass(frozen=True)
class Group:
    """Some held-out clicks."""

    name: str
    """Before the measures' names; empty = those of known users and items."""
    truth: Truth
    wanted: Bools | None = None
    """(N,) the items that are looked for; None = all of them."""
    part_of: str | None = None
    """The name of a group before it whose requests include these, so that no user is asked twice."""
    places: Ints | None = None
    """Which requests of that group these are."""

    def part(self, name: str, chosen: Bools) -> "Group":
        """Some of the requests, by a mask (B,)."""
        places = np.flatnonzero(chosen)
        return Group(name, some_users(self.truth, places), part_of=self.name, places=places)


def main_groups(samples: Samples, workspace: Path, context: bool) -> Iterator[Group]:
    """The held-out clicks of known users and items, then of rare items, of new users and of new items.

    With `context`, users are asked in the context of their first held-out request.
    """
    warm = held_out(workspace, samples, context)
    yield Group("", warm)
    clicks = samples.item_positives
    rare = clicks <= np.quantile(clicks[warm.items.rows], RARE)
    if (few := _clicks_on(warm, rare)) is not None:
        yield Group("rare ", few, rare)
    first = first_requests(workspace / HOLDOUT_IMPRESSIONS, samples) if context else None
    for reason in (c.NEW_USER, c.NEW_ITEM):
        if (cold := cold_truth(workspace / HOLDOUT_COLD, reason, samples)) is not None:
            yield Group(f"{reason} ", asked_first(cold, first), clicks == 0 if reason == c.NEW_ITEM else None)


def some_users(truth: Truth, rows: npt.NDArray[np.integer]) -> Truth:
    """The held-out clicks of some users, by their places in a truth."""
    context = {name: take(column, rows) for name, column in truth.context.items()}
    return Truth(truth.user_rows[rows], take(truth.items, rows), context)


def _clicks_on(truth: Truth, wanted: Bools) -> Truth | None:
    """The held-out clicks on some items alone; None where there are none."""
    owner = np.repeat(np.arange(len(truth.user_rows)), np.diff(truth.items.indptr))
    kept = wanted[truth.items.rows]
    users, place = np.unique(owner[kept], return_inverse=True)
    if not len(users):
        return None
    items = Bag(pointers(np.bincount(place)), truth.items.rows[kept])
    return Truth(truth.user_rows[users], items, some_users(truth, users).context)


def thirds(samples: Samples, warm: Group) -> Iterator[Group]:
    """The users by thirds: by their number of clicks, and by how far these spread."""
    users = warm.truth.user_rows
    counts = np.diff(samples.clicks.indptr)[users]
    for name, value in (("clicks", counts.astype(np.float64)), ("spread", spread(samples)[users])):
        third = np.digitize(value, np.quantile(value, [1 / 3, 2 / 3]), right=True)
        for place, word in enumerate(("least", "middle", "most")):
            yield warm.part(f"{word} {name} ", third == place)


def spread(samples: Samples) -> Floats:
    """How far each user's clicks spread, (U,): 1 minus the length of the mean of their items' vectors.

    An item's vector has a number for each user who clicked it, and length 1: no model decides what is alike.
    """
    clicks, shape = samples.clicks, (len(samples.users), len(samples.items))
    clicked = sparse.csr_matrix((np.ones(len(clicks.item_row)), clicks.item_row, clicks.indptr), shape, copy=True)
    clicked.sum_duplicates()
    clicked.data[:] = 1
    of_item, of_user = (np.maximum(np.asarray(clicked.sum(axis=axis)).ravel(), 1) for axis in (0, 1))
    vectors = clicked @ sparse.diags(1 / np.sqrt(of_item))
    means = sparse.diags(1 / of_user) @ clicked
    squares: Floats = np.asarray((means @ (vectors.T @ vectors)).multiply(means).sum(axis=1)).ravel()
    return 1 - np.sqrt(squares)


def scenes(samples: Samples, workspace: Path, warm: Group, context: bool) -> Iterator[Group]:
    """Users who come to another scene than most first; each user and scene; each scene with enough of these requests.

    A user is asked once for each scene in which they have a held-out click, as in their first impression there, and
    judged by the clicks there.
    """
    table = pq.read_table(workspace / HOLDOUT_IMPRESSIONS)
    table = table.take(pa.array(np.argsort(table[c.REQUEST_TS_MS].to_numpy(), kind="stable")))
    user = samples.users.positions.find(table[c.USER_ID].combine_chunks())
    item = samples.items.positions.find(table[c.ITEM_ID].combine_chunks())
    scene, size = table[SCENE].to_numpy(), len(samples.items)
    users, at = np.unique(user, return_index=True)
    truth = warm.truth
    first = scene[at[np.searchsorted(users, truth.user_rows)]]
    yield warm.part("elsewhere ", first != np.bincount(first).argmax())
    judged = np.repeat(truth.user_rows, np.diff(truth.items.indptr)) * size + truth.items.rows
    clicked = pc.equal(table[c.OUTCOME], c.CLICKED).to_numpy() & np.isin(user * size + item, judged)
    count = int(scene.max()) + 1
    asked, at = np.unique(user * count + scene, return_index=True)
    pairs = np.unique((user[clicked] * count + scene[clicked]) * size + item[clicked])
    requests, owner = np.unique(pairs // size, return_inverse=True)
    rows = table.take(pa.array(at[np.searchsorted(asked, requests)]))
    features = samples.features.context if context else ()
    columns = {feature.name: feature.encode(rows[feature.name].combine_chunks()) for feature in features}
    items = Bag(pointers(np.bincount(owner)), (pairs % size).astype(np.int32))
    each = Group("each scene ", Truth(requests // count, items, columns))
    yield each
    for number, requests_there in zip(*np.unique(requests % count, return_counts=True), strict=True):
        if requests_there >= LEAST_REQUESTS:
            yield each.part(f"scene {number} ", requests % count == number)
