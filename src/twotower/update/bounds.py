"""Bounds on what one user and one item can change within a window of event time: on positives, and on rising in lists.

Everybody who can click can train. Real news comes from many users, beside clicks on everything else. Somebody who
pushes an item has few accounts, clicks far more often than others, or clicks when nobody else does. So repeats of a
pair and of a user are counted and not trained, and so are positives of an item beyond a share of all others'.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.logs.events import EntityId
from twotower.update.options import BoundsOptions

PAIR: Final = "pair"
USER: Final = "user"
ITEM: Final = "item"
RISEN: Final = "risen"
WINDOW_MS: Final = 3_600_000
"""Event time within which positives are counted together."""
WINDOWS: Final = 4
"""Windows whose counts are kept: clicks of an hour may be joined after those of the next one."""

Longs = npt.NDArray[np.int64]


@dataclass
class WindowCounts:
    """What was trained in one window."""

    pairs: Counter[tuple[EntityId, EntityId]] = field(default_factory=Counter)
    """Positives by user and item."""
    users: Counter[EntityId] = field(default_factory=Counter)
    items: Counter[EntityId] = field(default_factory=Counter)
    distinct: Counter[EntityId] = field(default_factory=Counter)
    """By item, how many users clicked it."""
    risen: Counter[EntityId] = field(default_factory=Counter)
    """By item, in how many more lists of the sampled users it is than at the beginning, by learning."""

    def add(self, user: EntityId, item: EntityId, count: int) -> None:
        """Note positives of a pair."""
        self.distinct[item] += not self.pairs[user, item]
        self.pairs[user, item] += count
        self.users[user] += count
        self.items[item] += count


@dataclass(frozen=True)
class Rise:
    """How far an item rose by learning."""

    lists: int
    """In how many more lists of the sampled users it is."""
    positives: int
    """Its positives that were trained."""
    explained: float
    """The share of lists of k items that its users explain: 1 where it has as many users as the item that is k-th by
    the number of users. Positives that only the fixed bound allows explain nothing: there was hardly anything else in
    these windows."""


class ClickWindows:
    """Counts of the latest windows of a chain; they are read from its deltas again.

    >>> windows = ClickWindows(BoundsOptions(pair=2))
    >>> windows.admit(["ann"] * 3 + ["bob"], ["song"] * 4, [0, 1, 2, 3]).tolist()
    ['', '', 'pair', '']
    >>> windows.admit(["ann"], ["song"], [3_600_000]).tolist()
    ['']
    """

    def __init__(self, options: BoundsOptions) -> None:
        self._options = options
        self._counts: dict[int, WindowCounts] = {}

    def _use(self, window: int) -> WindowCounts:
        self._counts[window] = self._counts.pop(window, WindowCounts())
        for old in list(self._counts)[:-WINDOWS]:
            del self._counts[old]
        return self._counts[window]

    def admit(self, users: Sequence[EntityId], items: Sequence[EntityId], ts_ms: Sequence[int]) -> npt.NDArray[np.str_]:
        """Which positives may be trained, in their order: '' = yes, else the bound that holds it back (B,).

        Nothing is counted yet: `restore` does that once they are trained.
        """
        why = np.full(len(items), "", dtype="<U5")
        by_window: dict[int, list[int]] = {}
        for place, ts in enumerate(ts_ms):
            by_window.setdefault(ts // WINDOW_MS, []).append(place)
        for window, places in by_window.items():
            self._admit(self._counts.get(window, WindowCounts()), users, items, places, why)
        return why

    def _admit(
        self,
        before: WindowCounts,
        users: Sequence[EntityId],
        items: Sequence[EntityId],
        places: Sequence[int],
        why: npt.NDArray[np.str_],
    ) -> None:
        bounds, pairs, of_users = self._options, Counter[tuple[EntityId, EntityId]](), Counter[EntityId]()
        asked = Counter[EntityId]()
        left = []
        for place in places:
            user, item = users[place], items[place]
            if before.pairs[user, item] + pairs[user, item] >= bounds.pair:
                why[place] = PAIR
            elif before.users[user] + of_users[user] >= bounds.user:
                why[place] = USER
            else:
                pairs[user, item] += 1
                of_users[user] += 1
                asked[item] += 1
                left.append(place)
        total = before.items.total() + len(left)
        taken = Counter[EntityId]()
        for place in left:
            item = items[place]
            others = total - before.items[item] - asked[item]
            if before.items[item] + taken[item] >= max(bounds.item, bounds.item_share * others):
                why[place] = ITEM
            else:
                taken[item] += 1

    def counted(self, users: Sequence[EntityId], items: Sequence[EntityId], ts_ms: Sequence[int]) -> list[list[Any]]:
        """Positives that are trained, as `restore` counts them: columns of windows, users, items and positives."""
        counts = Counter((ts // WINDOW_MS, *pair) for *pair, ts in zip(users, items, ts_ms, strict=True))
        return [[key[place] for key in counts] for place in range(3)] + [list(counts.values())]

    def risen(self, ts_ms: int, changes: Iterable[tuple[EntityId, int]]) -> list[list[Any]]:
        """In how many more lists items are, as `restore` counts it: rows of window, item and lists."""
        return [[ts_ms // WINDOW_MS, item, change] for item, change in sorted(changes) if change]

    def restore(self, counted: Sequence[Sequence[Any]], risen: Sequence[Sequence[Any]]) -> None:
        """Count what a delta notes: columns of windows, users, items and positives; rows of window, item and lists."""
        for window, user, item, count in zip(*counted, strict=True):
            self._use(window).add(user, item, count)
        for window, item, change in risen:
            self._counts.setdefault(window, WindowCounts()).risen[item] += change

    def folded(self) -> dict[str, list[list[Any]]]:
        """All counts, in the order in which their windows were used."""
        counted = [
            (window, *pair, count)
            for window, counts in self._counts.items()
            for pair, count in sorted(counts.pairs.items())
        ]
        return {
            "counted": [[row[place] for row in counted] for place in range(4)],
            "risen": [
                [window, item, change]
                for window, counts in self._counts.items()
                for item, change in sorted(counts.risen.items())
                if change
            ],
        }

    def rises(self, items: Iterable[EntityId], ts_ms: Iterable[int], k: int) -> dict[EntityId, Rise]:
        """How far items rose in the windows of some times, and how far their users explain that of lists of k items."""
        windows = {ts // WINDOW_MS for ts in ts_ms}
        counts = [self._counts[window] for window in windows if window in self._counts]
        distinct = sum((window.distinct for window in counts), Counter[EntityId]())
        total, listed = distinct.total(), min(heapq.nlargest(k, distinct.values()), default=1)
        rises = {}
        for item in items:
            own = min(distinct[item], self._options.item_share * (total - distinct[item]))
            lists, positives = (
                sum(window.risen[item] for window in counts),
                sum(window.items[item] for window in counts),
            )
            rises[item] = Rise(lists, positives, own / listed)
        return rises
