import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.cli.visit import UnreachableError, visit_server
from twotower.config import Settings, load
from twotower.schema.errors import ConfigError, DataError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower.worlds.visit import visit
from twotower.worlds.world import FIRST_DAY_MS, Requests, World

DAY = 4
"""Two days after the log."""


class Shop:
    """A small recommender over real HTTP: eight items by a rule of the user and the time, and a list of events."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.put: dict[str, Any] = {}
        self.order: list[tuple[str, int]] = []
        self.status = 200
        self.scramble = False

    def rows(self, user: np.ndarray, ts_ms: np.ndarray) -> np.ndarray:
        return self.world.top(user, ts_ms, 8)

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/events":
            self.events += body["events"]
            self.order += [("click", event["ts_ms"]) for event in body["events"]]
            return {"accepted": len(body["events"]), "duplicates": 0}
        if path.startswith("/v1/items/"):
            assert not self.asked, "put before anybody asks"
            self.put[path.removeprefix("/v1/items/")] = body["features"]
            return {}
        self.asked.append(body)
        self.order.append(("request", body["ts_ms"]))
        user = self.world.user_rows(pa.array([body["user_id"]]))
        ids = self.world.item_ids(self.rows(user, np.array([body["ts_ms"]]))[0]).to_pylist()
        ids[2] = "i999999"  # an item that somebody else put there
        items = [{"item_id": item, "position": place + 1, "score": 0.5} for place, item in enumerate(ids)]
        if self.scramble:
            items[0]["position"] = 3
        return {"request_id": f"q{len(self.asked)}", "items": items[::-1]}


@contextmanager
def serving(shop: Shop) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = json.dumps(shop.answer(self.path, body) if shop.status == 200 else {"error": "busy"}).encode()
            self.send_response(shop.status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_PUT = do_POST

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    simulate_workspace(tmp_path / "w", WorldOptions(users=120, items=150, days=3, seed=1))
    return load(Path(__file__).parents[2] / "examples" / "demo.toml", [f"workspace.path={tmp_path / 'w'}"])


@pytest.fixture
def made(settings: Settings) -> World:
    world = world_of(Path(settings.workspace.path), DAY + 1)
    assert world is not None
    return world


def test_a_visit_over_http_is_that_of_the_world_in_this_process(settings: Settings, made: World) -> None:
    shop = Shop(made)

    def same(requests: Requests) -> np.ndarray:
        pages = shop.rows(requests.user, requests.ts_ms)
        pages[:, 2] = -1
        return pages

    with serving(shop) as url:
        report = visit_server(settings, url + "/", DAY, requests=60, page=8)
    visited = visit(made, DAY, same, requests=60)
    assert report.requests == len(shop.asked) == 60
    assert report.impressions == 60 * 8
    assert report.unknown_items == 60
    assert report.clicks == len(visited.clicks) == len(shop.events) > 20
    assert report.expected_clicks == pytest.approx(made.chances(visited.requests, visited.pages).sum(), abs=0.06)
    assert report.date == "2026-01-09"
    numbers = visited.requests.number.tolist()
    clicks = visited.clicks
    for event, number, item, ts_ms in zip(
        shop.events,
        clicks.request.tolist(),
        made.item_ids(clicks.item).to_pylist(),
        clicks.ts_ms.tolist(),
        strict=True,
    ):
        request = numbers.index(number)
        assert event["request_id"] == f"q{request + 1}"
        assert (event["type"], event["item_id"], event["ts_ms"]) == ("click", item, ts_ms)
        assert event["user_id"] == shop.asked[request]["user_id"]
    assert len({event["event_id"] for event in shop.events}) == len(shop.events)
    times = [ts_ms for _, ts_ms in shop.order]
    assert times == sorted(times), "clicks are known to the first request after them"


def test_requests_carry_their_context_and_new_users_their_features(settings: Settings, made: World) -> None:
    shop = Shop(made)
    with serving(shop) as url:
        report = visit_server(settings, url, DAY, None, 8)
    assert report.requests == len(made.requests(DAY))
    late = {1000 + 7 * row for row in np.flatnonzero(made.truth.people.start_day >= 3).tolist()}
    assert {body["user_id"] for body in shop.asked} & late
    for body in shop.asked:
        assert body["context"]["hour"] == body["ts_ms"] // 3_600_000 % 24
        assert body["context"]["scene"] in ("home", "detail", "search")
        assert body["k"] == 8
        assert FIRST_DAY_MS + DAY * 86_400_000 <= body["ts_ms"] < FIRST_DAY_MS + (DAY + 1) * 86_400_000
        assert set(body["features"]) == ({"age", "gender", "city", "device"} if body["user_id"] in late else set())


def test_users_and_items_of_later_days_come_into_the_tables_once(settings: Settings, made: World) -> None:
    workspace = Path(settings.workspace.path)
    before = pq.read_table(workspace / "items.parquet")
    with serving(Shop(made)) as url:
        first = visit_server(settings, url, DAY, 5, 8)
        again = visit_server(settings, url, DAY, 5, 8)
        earlier = visit_server(settings, url, 1, 5, 8)
    users, items = (pq.read_table(workspace / f"{name}.parquet") for name in ("users", "items"))
    assert users.equals(made.users(DAY))
    assert items.equals(made.items(DAY))
    assert (first.new_users, first.new_items) == (users.num_rows - 120, items.num_rows - 150)
    assert first.new_items > 0
    assert (again.new_users, again.new_items, earlier.new_users, earlier.new_items) == (0, 0, 0, 0)
    assert items.slice(0, 150).drop_columns("age_days").equals(before.drop_columns("age_days"))
    remade = world_of(workspace)
    assert remade is not None
    assert remade.horizon == DAY + 1


def test_the_items_of_the_day_are_put_with_their_features(settings: Settings, made: World) -> None:
    shop = Shop(made)
    with serving(shop) as url:
        report = visit_server(settings, url, DAY, 5, 8, put=True)
    born = np.flatnonzero(made.truth.catalogue.birth_day == DAY)
    table = made.items(DAY).take(pa.array(born))
    assert report.put_items == len(born) > 0
    assert list(shop.put) == table["item_id"].to_pylist()
    assert list(shop.put.values()) == table.drop_columns("item_id").to_pylist()


def test_a_server_that_does_not_answer_as_it_should_is_named(settings: Settings, made: World) -> None:
    shop = Shop(made)
    with serving(shop) as url:
        shop.status = 503
        with pytest.raises(UnreachableError, match=r'/v1/recommend answered 503: \{"error": "busy"\}'):
            visit_server(settings, url, 0, 5, 8)
        shop.status, shop.scramble = 200, True
        with pytest.raises(DataError, match="answered 8 items at positions"):
            visit_server(settings, url, 0, 5, 8)
    with pytest.raises(UnreachableError, match=r"nothing answers at http://127.0.0.1:9 .*start `twotower serve`"):
        visit_server(settings, "http://127.0.0.1:9", 0, 5, 8)


def test_only_a_simulated_world_can_visit(settings: Settings) -> None:
    manifest = Path(settings.workspace.path) / "workspace.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**document, "arguments": {"users": 1}}))
    with pytest.raises(DataError, match="was simulated by another release: simulate it again"):
        visit_server(settings, "http://127.0.0.1:9", 0, 5, 8)
    manifest.write_text(json.dumps({**document, "source": "globo"}))
    with pytest.raises(ConfigError, match="was imported: only a world made by `twotower simulate` can visit a server"):
        visit_server(settings, "http://127.0.0.1:9", 0, 5, 8)
    with pytest.raises(ConfigError, match="day=-1, page=8"):
        visit_server(settings, "http://127.0.0.1:9", -1, 5, 8)
