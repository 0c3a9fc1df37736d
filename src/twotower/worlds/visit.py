"""A day of a world with a recommender, as a closed loop: it answers requests, and is told of the clicks on its pages.

`answer` may be a model in this process or a server across a network.

Dimensions: R requests, P places of a page, n clicks.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError
from twotower.schema.tables import joined_events
from twotower.worlds.arrays import Ints, joined, taken
from twotower.worlds.inhabitants import strings
from twotower.worlds.world import CONTEXT, FIRST_DAY_MS, NOTHING, SCENES, Requests, World, uniform

MINUTE_MS: Final = 60_000
_CHOICE: Final = 200
"""What is drawn, beside the parts of the world and of `simulate`."""


@dataclass(frozen=True)
class VisitClicks:
    """Clicks in the order of time."""

    request: Ints
    """(n,) number of the request."""
    user: Ints
    """(n,) rows of users."""
    item: Ints
    """(n,) rows of items."""
    position: Ints
    """(n,) from 1."""
    ts_ms: Ints
    """(n,) of the click."""

    def __len__(self) -> int:
        return len(self.request)


Answer = Callable[[Requests], Ints]
"""Gives a page for each request, (R, P) rows of items from the first position on, -1 = nothing."""
Tell = Callable[[VisitClicks], None]
"""Hears of clicks."""


@dataclass(frozen=True)
class Visited:
    """What was shown on a day, and what came of it."""

    requests: Requests
    pages: Ints
    """(R, P) rows of items, -1 = nothing."""
    delays: Ints
    """(R, P) milliseconds from the request to the click, 0 = no click."""

    @property
    def impressions(self) -> int:
        """How many items were shown."""
        return int((self.pages != NOTHING).sum())

    @property
    def clicks(self) -> VisitClicks:
        """What was clicked, in the order of time."""
        return _clicks(self.requests, self.pages, self.delays)

    def events(self, world: World, first_seq: int = 0) -> pa.Table:
        """Joined events of all impressions, then `position` and the context `hour`, `scene`, as `simulate` has them."""
        request, place = np.nonzero(self.pages != NOTHING)
        user_id, item_id = world.user_ids(self.requests.user[request]), world.item_ids(self.pages[request, place])
        delay, ts_ms = self.delays[request, place], self.requests.ts_ms[request]
        further = pa.schema({c.POSITION: pa.int32(), **CONTEXT})
        schema = pa.schema([*joined_events(user_id.type, item_id.type), *further])
        return pa.table(
            {
                c.EVENT_SEQ: np.arange(first_seq, first_seq + len(request)),
                c.REQUEST_ID: pa.array(
                    [f"r{number}" for number in self.requests.number[request].tolist()], pa.string()
                ),
                c.USER_ID: user_id,
                c.ITEM_ID: item_id,
                c.REQUEST_TS_MS: ts_ms,
                c.CLICK_TS_MS: pa.array(ts_ms + delay, pa.int64(), mask=delay == 0),
                c.OUTCOME: strings((c.IMPRESSED, c.CLICKED), (delay > 0).astype(np.int64)),
                c.WEIGHT: pa.nulls(len(request), pa.float32()),
                c.POSITION: pa.array(place + 1, pa.int32()),
                "hour": self.requests.hour[request],
                "scene": strings(SCENES, self.requests.scene[request]),
            },
            schema=schema,
        )


def visit(
    world: World,
    day: int,
    answer: Answer,
    tell: Tell | None = None,
    *,
    requests: int | None = None,
    window_ms: int = MINUTE_MS,
) -> Visited:
    """Let the users of a day meet a recommender, in the order of time.

    Requests are answered window by window. Before each window `tell` gets the clicks before its beginning, and after
    the last window all others: what a recommender knows is late by at most a window, and never early.

    Args:
        world: with a horizon beyond the day.
        day: from 0; it may lie after the first log.
        answer: gives the pages, always of the same number of places.
        tell: gets the clicks; absent = they are not told.
        requests: this many requests only (see `some`); absent = all.
        window_ms: length of a window; 1 = every request by itself.
    """
    asking = world.requests(day)
    if requests is not None:
        asking = some(asking, requests, world.options.seed)
    window = (asking.ts_ms - FIRST_DAY_MS - day * DAY_MS) // window_ms
    edges = np.append(np.flatnonzero(np.diff(window, prepend=-1)), len(asking)).tolist()
    pending = _clicks(asking.take(np.arange(0)), np.empty((0, 1), np.int64), np.empty((0, 1), np.int64))
    pages, delays = [], []
    for begin, end in itertools.pairwise(edges):
        if tell is not None:
            beginning_ms = FIRST_DAY_MS + day * DAY_MS + int(window[begin]) * window_ms
            pending = _told(pending, beginning_ms, tell)
        now = asking.take(np.arange(begin, end))
        pages.append(answer(now))
        delays.append(world.clicks(now, pages[-1]))
        pending = _merged(pending, _clicks(now, pages[-1], delays[-1]))
    if tell is not None and len(pending):
        tell(pending)
    nothing = np.empty((0, 0), np.int64)
    return Visited(asking, np.concatenate(pages or [nothing]), np.concatenate(delays or [nothing]))


def some(requests: Requests, count: int, seed: int) -> Requests:
    """The requests of some users, drawn evenly, as many as make `count`, in the order of time; all if there are fewer.

    Users are drawn rather than requests, so that sessions stay whole; those of the last user may be cut.

    Raises:
        ConfigError: a count below 1.
    """
    if count < 1:
        raise ConfigError(f"requests={count}: a visit takes at least 1")
    order = np.lexsort((requests.ts_ms, requests.user, uniform(seed, _CHOICE, requests.user)))
    return requests.take(np.sort(order[:count]))


def _clicks(requests: Requests, pages: Ints, delays: Ints) -> VisitClicks:
    request, place = np.nonzero(delays)
    ts_ms = requests.ts_ms[request] + delays[request, place]
    order = np.lexsort((place, requests.number[request], ts_ms))
    request, place = request[order], place[order]
    return VisitClicks(requests.number[request], requests.user[request], pages[request, place], place + 1, ts_ms[order])


def _merged(first: VisitClicks, second: VisitClicks) -> VisitClicks:
    both = joined([first, second])
    return taken(both, np.argsort(both.ts_ms, kind="stable"))


def _told(pending: VisitClicks, before_ms: int, tell: Tell) -> VisitClicks:
    """Tell of the clicks before a time; gives the others."""
    count = int(np.searchsorted(pending.ts_ms, before_ms))
    if count:
        tell(taken(pending, slice(count)))
    return taken(pending, slice(count, None))
