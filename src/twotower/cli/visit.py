"""`visit`: the users of a workspace's simulated world meet a running server for a day, over HTTP."""

import logging
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from twotower.config.settings import Settings
from twotower.pipeline.places import places
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError, TwotowerError
from twotower.worlds.arrays import Ints
from twotower.worlds.simulate import add_arrivals, world_of
from twotower.worlds.visit import VisitClicks, visit
from twotower.worlds.world import NOTHING, SCENES, Requests, World, date_of

log = logging.getLogger(__name__)

TIMEOUT_S = 30
EVERY = 500
"""Requests between two lines of progress."""


@dataclass(frozen=True)
class VisitReport:
    """What a visit did; counts of this visit."""

    day: int
    date: str
    requests: int
    impressions: int
    clicks: int
    expected_clicks: float
    """Expected clicks on these pages by the world's truth: what `clicks` is on average."""
    unknown_items: int
    """Shown items that the world does not have; nobody clicks them."""
    new_users: int
    """Rows that the visit added to the workspace's tables."""
    new_items: int
    put_items: int
    """Items of the day that were put to the server."""


class UnreachableError(TwotowerError):
    """No server answers, or it answers with an error."""


@dataclass
class ServerSite:
    """A running server as the world's users see it."""

    server: httpx.Client
    world: World
    page: int
    """Items asked for."""
    features: list[str]
    """User features that a request carries, of users who came after the first log."""
    context: list[str]
    """Context features that a request carries."""
    request_ids: dict[int, str] = field(default_factory=dict)
    """The server's, by the world's numbers of requests."""
    unknown_items: int = 0

    def put(self, items: pa.Table) -> None:
        """Put items, so that they are found from their features without another version."""
        for item in items.to_pylist():
            name = urllib.parse.quote(item.pop(c.ITEM_ID), safe="")
            self._send("PUT", f"/v1/items/{name}", {"features": item})

    def answer(self, requests: Requests) -> Ints:
        """Ask for a page for each request, one after another."""
        pages = np.full((len(requests), self.page), NOTHING)
        users = self.world.users(self.world.horizon - 1).take(pa.array(requests.user)).to_pylist()
        for place, user in enumerate(users):
            number, row = int(requests.number[place]), int(requests.user[place])
            came_later = self.world.truth.people.start_day[row] >= self.world.options.days
            values = {"hour": int(requests.hour[place]), "scene": SCENES[requests.scene[place]]}
            answered = self._send(
                "POST",
                "/v1/recommend",
                {
                    c.USER_ID: user[c.USER_ID],
                    "ts_ms": int(requests.ts_ms[place]),
                    "features": {name: user[name] for name in self.features} if came_later else {},
                    "context": {name: values[name] for name in self.context},
                    "k": self.page,
                },
            )
            self.request_ids[number] = answered[c.REQUEST_ID]
            pages[place] = self._page(answered["items"])
            if len(self.request_ids) % EVERY == 0:
                log.info("%d requests", len(self.request_ids))
        return pages

    def tell(self, clicks: VisitClicks) -> None:
        """Post clicks as events."""
        user_id, item_id = self.world.user_ids(clicks.user).to_pylist(), self.world.item_ids(clicks.item).to_pylist()
        events = [
            {
                "event_id": f"{self.request_ids[number]}-{position}",
                "type": "click",
                c.REQUEST_ID: self.request_ids[number],
                c.USER_ID: user,
                c.ITEM_ID: item,
                c.TS_MS: ts_ms,
            }
            for number, position, user, item, ts_ms in zip(
                clicks.request.tolist(), clicks.position.tolist(), user_id, item_id, clicks.ts_ms.tolist(), strict=True
            )
        ]
        self._send("POST", "/v1/events", {"events": events})

    def _page(self, items: list[Mapping[str, Any]]) -> Ints:
        page = np.full(self.page, NOTHING)
        if not items:
            return page
        positions = [int(item[c.POSITION]) for item in items]
        if sorted(positions) != list(range(1, len(items) + 1)) or len(items) > self.page:
            raise DataError(
                f"the server answered {len(items)} items at positions {positions}, and at most {self.page} are expected"
            )
        rows = self.world.item_rows(pa.array([item[c.ITEM_ID] for item in items]))
        self.unknown_items += int((rows == NOTHING).sum())
        page[np.array(positions) - 1] = rows
        return page

    def _send(self, method: str, path: str, document: Any) -> Any:
        url = str(self.server.base_url).rstrip("/")
        try:
            response = self.server.request(method, path, json=document)
        except httpx.TransportError as error:
            raise UnreachableError(f"nothing answers at {url} ({error}): start `twotower serve`") from None
        if response.is_error:
            raise UnreachableError(f"{response.url} answered {response.status_code}: {response.text[:500]}")
        return response.json()


def visit_server(
    settings: Settings, url: str, day: int, requests: int | None, page: int, put: bool = False
) -> VisitReport:
    """Visit a running server for a day of the workspace's world.

    The users and items of that day are added to the workspace's tables first. Clicks are posted before the first
    request that is made after them.

    Args:
        settings: of the workspace that the server serves.
        url: of the server.
        day: from 0; it may lie after the simulated log.
        requests: only this many requests; None = all of the day.
        page: items that a user is shown.
        put: put the items that appear on that day to the server before any request.

    Raises:
        ConfigError: the workspace holds no simulated world, or a number is too small.
        UnreachableError: no server answers, or it answers with an error.
    """
    workspace = places(settings).workspace
    if day < 0 or page < 1:
        raise ConfigError(f"day={day}, page={page}: a day is counted from 0, a page has at least one item")
    world = world_of(workspace, day + 1)
    if world is None:
        raise ConfigError(f"{workspace} was imported: only a world made by `twotower simulate` can visit a server")
    arrivals = add_arrivals(workspace, world, day)
    features = [name for name in settings.features.user if name in world.users(0).column_names and name != c.USER_ID]
    context = [name for name in settings.features.context if name in ("hour", "scene")]
    born = world.items(day).slice(world.items(max(day - 1, world.options.days - 1)).num_rows)
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as server:
        site = ServerSite(server, world, page, features, context)
        if put:
            site.put(born)
        visited = visit(world, day, site.answer, site.tell, requests=requests, window_ms=1)
    return VisitReport(
        day=day,
        date=str(date_of(day)),
        requests=len(visited.requests),
        impressions=visited.impressions + site.unknown_items,
        clicks=len(visited.clicks),
        expected_clicks=round(float(world.chances(visited.requests, visited.pages).sum()), 1),
        unknown_items=site.unknown_items,
        new_users=arrivals.users,
        new_items=arrivals.items,
        put_items=born.num_rows if put else 0,
    )
