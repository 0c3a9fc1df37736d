"""What an arm's lists find: of the log's held-out clicks, and of what users like by the truth of a simulated world.

B users or requests, K candidates of a list, N items of the catalogue.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.datasets.workspace import HOLDOUT, HOLDOUT_COLD
from twotower.evaluate.holdout import Truth
from twotower.evaluate.metrics import score_lists
from twotower.samples.read import Samples
from twotower.update.gate import spaced
from twotower.worlds.truth import PAGE, clicked_by, first_times, page_clicks, true_recall
from twotower.worlds.world import NOTHING, Requests, World
from twotower_lab.groups import Group, main_groups, scenes, some_users, thirds

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

K: Final = 50
"""Length of the lists, where an experiment has no longer ones."""
FEW: Final = 20
"""The first items of a list, whose order counts."""
WANTED: Final = 10
"""Number of new or rare items that a user likes best and that are looked for; of all items, 50."""

Lists = Callable[[Truth], Ints]
"""The catalogue rows (B, K) found for the users of a truth, without what they clicked; -1 = no more."""


@dataclass(frozen=True)
class Judge:
    """Judges the lists of an experiment."""

    workspace: Path
    """With a hold-out."""
    world: World | None = None
    """The world in which the workspace was simulated; None = a real log, whose truth is unknown."""
    ks: tuple[int, ...] = (K,)
    """Cut-offs of recall."""
    kinds: tuple[str, ...] = ()
    """Further groups: `thirds`, `scenes`."""
    context: bool = False
    """Users are asked in the context of their first held-out request."""
    most: int | None = None
    """Only this many users are asked, and only of known users and items; None = all of all groups."""

    def groups(self, samples: Samples) -> Iterator[Group]:
        """The held-out clicks that are judged apart."""
        every = main_groups(samples, self.workspace, self.context)
        warm = next(every)
        if self.most is not None:
            yield Group("", some_users(warm.truth, spaced(len(warm.truth.user_rows), self.most)))
            return
        yield warm
        yield from every
        if "thirds" in self.kinds:
            yield from thirds(samples, warm)
        if "scenes" in self.kinds:
            yield from scenes(samples, self.workspace, warm, self.context)

    def score(self, samples: Samples, lists: Lists) -> dict[str, Floats]:
        """All measures by user: those of arms on the same workspace are of the same users, in the same order.

        They are `recall@50`, `ndcg@20`, `pop_pct@50`, and in a world `true_recall@50` and `page_clicks`, (B,) each;
        recall also of the other groups, as `rare recall@50`. `samples` are what the arm was trained on.
        """
        values: dict[str, Floats] = {}
        asked: dict[str, Ints] = {}
        for group in self.groups(samples):
            retrieved = lists(group.truth) if group.part_of is None else asked[group.part_of][group.places]
            asked[group.name] = retrieved
            logged = score_lists(retrieved, group.truth.items, samples.item_positives, sorted({FEW, *self.ks})).values
            values |= {f"{group.name}recall@{k}": logged[f"recall@{k}"] for k in self.ks}
            if not group.name:
                values |= {name: logged[name] for name in (f"ndcg@{FEW}", f"pop_pct@{K}")}
            if self.world is not None:
                values |= self._by_truth(samples, self.world, group, retrieved)
        return values

    def _by_truth(self, samples: Samples, world: World, group: Group, retrieved: Ints) -> dict[str, Floats]:
        """The same against the truth, when each user first clicks something held out."""
        item = world.item_rows(samples.items.ids)
        user = world.user_rows(samples.users.ids.take(pa.array(group.truth.user_rows)))
        first = first_times(self.workspace / HOLDOUT, world)
        if (self.workspace / HOLDOUT_COLD).exists():
            first = np.minimum(first, first_times(self.workspace / HOLDOUT_COLD, world))
        ts_ms = first[user]
        left_out = clicked_by(samples, world, item)
        if group.wanted is not None:
            left_out[:, item[~group.wanted]] = True
        listed = np.where(retrieved == NOTHING, NOTHING, item[retrieved])
        wanted = K if group.wanted is None else WANTED
        true = true_recall(world, user, ts_ms, listed, list(self.ks), wanted, left_out)
        values = {f"{group.name}{name}": of_users for name, of_users in true.items()}
        if not group.name:
            requests = Requests(np.arange(len(user)), user, ts_ms, np.zeros(len(user), np.int64))
            values["page_clicks"] = page_clicks(world, requests, listed[:, :PAGE])
        return values
