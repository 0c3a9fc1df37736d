"""The closed loop in one process: serve from the published version, the world clicks, learn from it, publish, again.

The first log comes from the simulation's own recommender. From the day after it this system shows everything, and after
a few days it has learned from nothing else. Arms differ in what keeps it from showing the same items again and again.

R requests of a day, P positions of a page, N available items, U users, K candidates.
"""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from twotower.config.settings import Settings
from twotower.datasets.workspace import EVENTS, open_workspace
from twotower.evaluate.metrics import score_lists
from twotower.features.columns import Bag, pointers
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import DataError
from twotower.schema.files import whole_file
from twotower.serve.funnel import recommend
from twotower.serve.options import FunnelOptions
from twotower.serve.request import Request, impressed_window
from twotower.serve.users import ItemId, Recent
from twotower.update.gate import spaced
from twotower.worlds.simulate import add_arrivals, world_of
from twotower.worlds.truth import page_clicks, true_recall
from twotower.worlds.visit import VisitClicks, Visited, visit
from twotower.worlds.world import NOTHING, SCENES, Requests, World, date_of
from twotower_lab.score import K
from twotower_lab.stages import published

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PAGE: Final = 8
EDGE_DAYS: Final = 3
"""Days at the beginning and at the end that are compared."""
JUDGED: Final = 400
"""Recall of a day is measured on at most this many of its users."""
SEQUENCE: Final = 10**9
"""Distance between the event numbers of two days of the loop: more than the events of a day."""


@dataclass
class LoopSite:
    """A recommender as the users of a world see it: the served version, and their clicks and impressions since."""

    world: World
    funnel: FunnelOptions
    window_ms: int
    """How long an impression is left out."""
    version: Version
    clicks: dict[int, list[tuple[int, ItemId]]] = field(default_factory=dict)
    shown: dict[int, list[tuple[int, ItemId]]] = field(default_factory=dict)

    def answer(self, requests: Requests) -> Ints:
        """A page for each request, one after another: (R, P) rows of the world's items."""
        pages = np.full((len(requests), PAGE), NOTHING)
        users = self.world.user_ids(requests.user).to_pylist()
        known = {feature.name for feature in self.version.features.context}
        for place, (user, user_id) in enumerate(zip(requests.user.tolist(), users, strict=True)):
            ts_ms = int(requests.ts_ms[place])
            values = {"hour": int(requests.hour[place]), "scene": SCENES[requests.scene[place]]}
            context = {name: value for name, value in values.items() if name in known}
            recent = Recent(tuple(self.clicks.get(user, ())), tuple(self.shown.get(user, ())))
            served = recommend(
                self.version,
                Request(PAGE, "impressed", user_id, context=context),
                recent,
                impressed_window(ts_ms, self.window_ms),
                self.funnel,
                now_ms=ts_ms,
                request_id=f"{self.world.options.seed}/{requests.number[place]}",
            )
            items = [item.item_id for item in served.page.items]
            self.shown.setdefault(user, []).extend((ts_ms, item) for item in items)
            pages[place, : len(items)] = self.world.item_rows(pa.array(items, self.version.item_ids.type))
        return pages

    def tell(self, clicks: VisitClicks) -> None:
        """Remember clicks."""
        items = self.world.item_ids(clicks.item).to_pylist()
        for user, item, ts_ms in zip(clicks.user.tolist(), items, clicks.ts_ms.tolist(), strict=True):
            self.clicks.setdefault(user, []).append((ts_ms, item))

    def next_day(self, version: Version, now_ms: int) -> None:
        """Serve a new version, which knows all clicks so far, and forget impressions that are no longer excluded."""
        self.version = version
        self.clicks.clear()
        since_ms = now_ms - self.window_ms
        for user, shown in self.shown.items():
            self.shown[user] = [impression for impression in shown if impression[0] >= since_ms]


def feed_back(settings: Settings, days: int) -> tuple[dict[str, Floats], dict[str, Any]]:
    """Serve a simulated workspace day after day, from its held-out day on; its log grows by what happens.

    Returns:
        Measures of the last days, and how much each grew since the first ones, a single number each (see `measure`);
        and the series of all days.

    Raises:
        DataError: the workspace is not simulated.
    """
    workspace = Path(settings.workspace.path)
    begun = world_of(workspace)
    if begun is None:
        raise DataError(f"{workspace} holds no simulated world, and only such a world can be served again")
    first = begun.options.days - 1
    world = world_of(workspace, first + days)
    assert world is not None
    window_ms = round(1000 * settings.serve.impressed_window_s)
    schema = open_workspace(workspace).events().schema
    site: LoopSite | None = None
    series: dict[str, list[float]] = {}
    for day in range(first, first + days):
        add_arrivals(workspace, world, day)
        version = published(settings)  # it has learned from everything up to yesterday
        begin_ms = int(world.requests(day).ts_ms[0]) // DAY_MS * DAY_MS
        if site is None:
            site = LoopSite(world, settings.funnel, window_ms, version)
        site.next_day(version, begin_ms)
        visited = visit(world, day, site.answer, site.tell)
        # What this system does not record is null.
        recorded = visited.events(world, day * SEQUENCE)
        recorded = recorded.select([name for name in schema.names if name in recorded.column_names])
        events = pa.concat_tables([schema.empty_table(), recorded], promote_options="default")
        with whole_file(workspace / EVENTS / f"{c.DATE}={date_of(day)}" / "part-0.parquet") as temporary:
            pq.write_table(events, temporary, compression="zstd")
        measured = measure(world, day, visited, version)
        for name, value in measured.items():
            series.setdefault(name, []).append(round(value, 6))
        log.info("day %d: %s", day, "  ".join(f"{name} {value:.3f}" for name, value in measured.items()))
    values = {}
    for name, of_days in series.items():
        begin, end = float(np.mean(of_days[:EDGE_DAYS])), float(np.mean(of_days[-EDGE_DAYS:]))
        values[f"{name}, last days"] = np.array([end])
        values[f"{name}, growth"] = np.array([end - begin])
    return values, {"series": series}


def measure(world: World, day: int, visited: Visited, version: Version) -> dict[str, float]:
    """What a day was like.

    Returns:
        About impressions by item: `gini`, `entropy` (1 = even), `top 1 %` (share of the most shown hundredth of the
        available items), `coverage` (share of them that was shown). About pages: the expected `page_clicks`, and the
        mean `utility` of the shown items. About the two towers, for users who clicked that day: `recall@50` of what
        they clicked, and `true_recall@50` of what they like best.
    """
    alive = world.alive(day)
    shown = visited.pages[visited.pages != NOTHING]
    exposure = np.bincount(shown, minlength=int(alive.max()) + 1)[alive].astype(np.float64)
    asked, place = np.nonzero(visited.pages != NOTHING)
    requests = visited.requests
    utility = world.truth.utility(
        requests.user[asked], visited.pages[asked, place], requests.ts_ms[asked], requests.scene[asked]
    )
    most = np.sort(exposure)[::-1][: max(1, len(alive) // 100)]
    return {
        "gini": gini(exposure),
        "entropy": entropy(exposure),
        "top 1 %": float(most.sum() / exposure.sum()),
        "coverage": float((exposure > 0).mean()),
        "page_clicks": float(page_clicks(world, requests, visited.pages).mean()),
        "utility": float(utility.mean()),
        **_recalls(world, visited.clicks, version),
    }


def gini(exposure: Floats) -> float:
    """The Gini coefficient of exposures (N,): 0 = all alike, towards 1 = one has all.

    >>> gini(np.array([1.0, 1.0, 1.0])), gini(np.array([0.0, 0.0, 0.0, 8.0]))
    (0.0, 0.75)
    """
    ordered = np.sort(exposure)
    size = len(ordered)
    return float(((2 * np.arange(1, size + 1) - size - 1) * ordered).sum() / (size * ordered.sum()))


def entropy(exposure: Floats) -> float:
    """The entropy of exposures (N,) over that of an even one: 1 = all alike, 0 = one has all.

    >>> entropy(np.array([2.0, 2.0])), entropy(np.array([0.0, 3.0]))
    (1.0, 0.0)
    """
    return float(stats.entropy(exposure)) / math.log(len(exposure))


def _recalls(world: World, clicks: VisitClicks, version: Version) -> dict[str, float]:
    """Recall of the version's two towers against the day's clicks, and against what the same users like best."""
    user, at = np.unique(clicks.user, return_index=True)
    first_ms = clicks.ts_ms[at]
    chosen = spaced(len(user), JUDGED)
    user, first_ms = user[chosen], first_ms[chosen]
    rows = version.users.positions.find(world.user_ids(user))
    stored = version.clicks
    queries = version.queries(rows, exclude=stored.items)
    retrieved = version.two_tower.retrieve(queries, K).rows
    item = world.item_rows(version.item_ids)
    row_of = np.full(int(item.max()) + 1, NOTHING)
    row_of[item] = np.arange(len(item))
    of_chosen = np.isin(clicks.user, user)
    pairs = np.unique(np.searchsorted(user, clicks.user[of_chosen]) * len(item) + row_of[clicks.item[of_chosen]])
    owner = pairs // len(item)
    truth = Bag(pointers(np.bincount(owner, minlength=len(user))), (pairs % len(item)).astype(np.int32))
    logged = score_lists(retrieved, truth, np.ones(len(item), np.int64), [K]).values[f"recall@{K}"]
    clicked = np.zeros((len(world.truth.people.taste), len(world.truth.catalogue.vector)), np.bool_)
    known = np.repeat(world.user_rows(version.users.ids), np.diff(stored.indptr))
    clicked[known, item[stored.item_row]] = True
    listed = np.where(retrieved == NOTHING, NOTHING, item[retrieved])
    true = true_recall(world, user, first_ms, listed, [K], K, clicked)[f"true_recall@{K}"]
    return {f"recall@{K}": float(logged.mean()), f"true_recall@{K}": float(true.mean())}
