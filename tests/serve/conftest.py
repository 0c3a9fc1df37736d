import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from twotower.config import Settings
from twotower.features.store import LmdbFeatureStore
from twotower.logs import LocalEventLog
from twotower.pipeline.places import places
from twotower.publish.version import Version
from twotower.serve.app import make_app
from twotower.serve.databases import DatabaseWatch
from twotower.serve.health import Health
from twotower.serve.metrics import Metrics
from twotower.serve.options import FunnelOptions, ServeOptions
from twotower.serve.parts import ServerParts
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import RecentUsers

FUNNEL = FunnelOptions(retrieve=120, pre_rank=60, rank=30, explore_share=0.5, logged=7)
NOW_MS = 1_800_000_000_000


class Http:
    """Sends requests to an application in this process; a defect of it is a 500, as over a socket."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


@dataclass
class Server:
    """A server in this process; its clock stands still."""

    http: Http
    snapshots: Snapshots
    log: LocalEventLog
    users: RecentUsers
    store: LmdbFeatureStore
    health: Health
    databases: DatabaseWatch
    now_ms: int = NOW_MS

    @property
    def version(self) -> Version:
        return self.snapshots.version

    def close(self) -> None:
        """Let another server take the log and the store."""
        self.log.close()
        self.store.close()

    def retrieve(self, **body: Any) -> Any:
        response = self.http.post("/v1/retrieve", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def items(self, **body: Any) -> list[Any]:
        return [item["item_id"] for item in self.retrieve(**body)["items"]]

    def event(self, kind: str, user_id: Any, *, status: int = 202, **fields: Any) -> Any:
        place = sum(self.log.ends())
        event = {"event_id": f"e{place}", "type": kind, "user_id": user_id, "ts_ms": self.now_ms, **fields}
        response = self.http.post("/v1/events", json={"events": [event]})
        assert response.status_code == status, response.text
        return response.json()

    def metric(self, line: str) -> float:
        found = [one for one in self.http.get("/metrics").text.splitlines() if one.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Settings], Server]]:
    """Starts servers on the same log and store, one after the other."""
    with ExitStack() as opened:

        def started(settings: Settings, channel_timeout_ms: float = 60_000) -> Server:
            metrics, health = Metrics(), Health()
            log = LocalEventLog.open(tmp_path / "log", sync="never", clock_ms=lambda: server.now_ms)
            opened.callback(log.close)
            store = LmdbFeatureStore(tmp_path / "store")
            opened.callback(store.close)
            users = RecentUsers(log, store, passed_over=lambda reason: metrics.passed_over.labels(reason).inc())
            users.catch_up()
            where = places(settings)
            snapshots = Snapshots(where.versions, metrics.switched, where.deltas, lambda: users.entities)
            options = ServeOptions(channel_timeout_ms=channel_timeout_ms)
            databases = DatabaseWatch(snapshots)
            parts = ServerParts(
                snapshots, log, users, databases, options, FUNNEL, metrics, health, lambda: server.now_ms
            )
            server = Server(Http(make_app(parts)), snapshots, log, users, store, health, databases)
            return server

        yield started


@pytest.fixture
def server(start: Callable[[Settings], Server], world: Settings) -> Server:
    return start(world)


@pytest.fixture
def odd_server(start: Callable[[Settings], Server], odd_world: Settings) -> Server:
    return start(odd_world)
