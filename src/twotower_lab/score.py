"""What an arm's lists find: of the log's held-out clicks, and of what users like by the truth of a simulated world.

B users, K candidates of a list, N items of the catalogue.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.datasets.workspace import HOLDOUT, HOLDOUT_COLD
from twotower.evaluate.holdout import Truth, cold_truth, read_truth
from twotower.evaluate.metrics import score_lists
from twotower.features.columns import Bag, pointers, take
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.worlds.truth import PAGE, clicked_by, first_times, page_clicks, true_recall
from twotower.worlds.world import NOTHING, Requests, World

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

K: Final = 50
"""Length of the lists."""
FEW: Final = 20
"""The first so many, whose order counts."""
WANTED: Final = 10
"""Of new and of rare items, how many of those that a user likes best are looked for; of all items, 50."""
RARE: Final = 0.5
"""An item is rare if it is among the least clicked ones that together have this share of the held-out clicks."""

Lists = Callable[[Ints], Ints]
"""The catalogue rows (B, K) found for users by row (B,), without what they clicked; -1 = no more."""


@dataclass(frozen=True)
class Group:
    """Some held-out clicks."""

    name: str
    """Before the measures' names; empty = those of known users and items."""
    truth: Truth
    wanted: Bools
    """(N,) the items that are looked for."""
    most: int
    """How many of them, by the truth of a world."""


def groups(samples: Samples, workspace: Path, most: int | None = None) -> Iterator[Group]:
    """The held-out clicks of known users and items, then of rare items, of new users and of new items.

    With `most` those of so many users at most, of the first group alone.
    """
    every = np.ones(len(samples.items), np.bool_)
    warm = read_truth(workspace / HOLDOUT, samples)
    if most is not None:
        some = np.unique(np.linspace(0, len(warm.user_rows) - 1, most).astype(np.int64))
        items = take(warm.items, some)
        assert isinstance(items, Bag)
        yield Group("", Truth(warm.user_rows[some], items), every, K)
        return
    yield Group("", warm, every, K)
    clicks = samples.item_positives
    rare = clicks <= np.quantile(clicks[warm.items.rows], RARE)
    if (few := _only(warm, rare)) is not None:
        yield Group("rare ", few, rare, WANTED)
    for reason in (c.NEW_USER, c.NEW_ITEM):
        cold = cold_truth(workspace / HOLDOUT_COLD, reason, samples)
        if cold is not None:
            new = reason == c.NEW_ITEM
            yield Group(f"{reason} ", cold, clicks == 0 if new else every, WANTED if new else K)


def _only(truth: Truth, wanted: Bools) -> Truth | None:
    """Held-out clicks on some items alone; None where there are none."""
    owner = np.repeat(np.arange(len(truth.user_rows)), np.diff(truth.items.indptr))
    kept = wanted[truth.items.rows]
    users, place = np.unique(owner[kept], return_inverse=True)
    if not len(users):
        return None
    return Truth(truth.user_rows[users], Bag(pointers(np.bincount(place)), truth.items.rows[kept]))


def score(
    samples: Samples, workspace: Path, lists: Lists, world: World | None, most: int | None = None
) -> dict[str, Floats]:
    """All measures by user: those of arms on the same workspace are of the same users, in the same order.

    Args:
        samples: what the arm was trained on.
        workspace: with a hold-out.
        lists: of the arm.
        world: in which the workspace was simulated; None = of a real log nobody knows the truth.
        most: see `groups`.

    Returns:
        `recall@50`, `ndcg@20`, `pop_pct@50`, and of a world `true_recall@50` and `page_clicks`; recall also of `rare`
        items, of a `new_user` and of a `new_item`, as `rare recall@50`. (B,) each.
    """
    values: dict[str, Floats] = {}
    for group in groups(samples, workspace, most):
        found = lists(group.truth.user_rows)
        logged = score_lists(found, group.truth.items, samples.item_positives, [FEW, K]).values
        values[f"{group.name}recall@{K}"] = logged[f"recall@{K}"]
        if not group.name:
            values |= {name: logged[name] for name in (f"ndcg@{FEW}", f"pop_pct@{K}")}
        if world is not None:
            values |= _by_truth(samples, workspace, world, group, found)
    return values


def _by_truth(samples: Samples, workspace: Path, world: World, group: Group, found: Ints) -> dict[str, Floats]:
    """The same against the truth, when each user first clicks something held out."""
    item = world.item_rows(samples.items.ids)
    user = world.user_rows(samples.users.ids.take(pa.array(group.truth.user_rows)))
    first = first_times(workspace / HOLDOUT, world)
    if (workspace / HOLDOUT_COLD).exists():
        first = np.minimum(first, first_times(workspace / HOLDOUT_COLD, world))
    ts_ms = first[user]
    left_out = clicked_by(samples, world, item)
    left_out[:, item[~group.wanted]] = True
    listed = np.where(found == NOTHING, NOTHING, item[found])
    true = true_recall(world, user, ts_ms, listed, [K], group.most, left_out)[f"true_recall@{K}"]
    values = {f"{group.name}true_recall@{K}": true}
    if not group.name:
        requests = Requests(np.arange(len(user)), user, ts_ms, np.zeros(len(user), np.int64))
        values["page_clicks"] = page_clicks(world, requests, listed[:, :PAGE])
    return values
