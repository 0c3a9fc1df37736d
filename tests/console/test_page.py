import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from twotower.console.page import add_page, describe, shown_attributes
from twotower.features.store import LmdbFeatureStore
from twotower.logs import LocalEventLog
from twotower.publish.catalogue import Attributes, ItemKeys
from twotower.publish.version import Version
from twotower.serve.app import make_app
from twotower.serve.databases import DatabaseWatch
from twotower.serve.options import ServeOptions
from twotower.serve.parts import ServerParts
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import RecentUsers

ATTRIBUTES = ["category", "tags", "author", "price", "age_days"]
STRANGER = 2**62 + 1


class Client:
    """Asks the application without a port."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def get(self, path: str) -> httpx.Response:
        return asyncio.run(self._send("GET", path))

    def post(self, path: str, json: Any) -> httpx.Response:
        return asyncio.run(self._send("POST", path, json))

    async def _send(self, method: str, path: str, json: Any = None) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self._app), base_url="http://test") as client:
            return await client.request(method, path, json=json)


@pytest.fixture(scope="module")
def snapshots(workspace: Path) -> Snapshots:
    return Snapshots(workspace / "versions")


@pytest.fixture
def version(snapshots: Snapshots) -> Version:
    return snapshots.version


@pytest.fixture
def client(snapshots: Snapshots, tmp_path: Path) -> Iterator[Client]:
    log = LocalEventLog.open(tmp_path / "log", 1)
    store = LmdbFeatureStore(tmp_path / "store")
    users = RecentUsers(log, store)
    options = ServeOptions(exclude="clicked", channel_timeout_ms=60_000)
    parts = ServerParts(snapshots, log, users, DatabaseWatch(snapshots), options)
    app = make_app(parts)
    add_page(app, parts)
    yield Client(app)
    store.close()
    log.close()


def click(client: Client, user_id: int, item_id: str, ts_ms: int) -> None:
    event = {"event_id": f"{item_id}/{ts_ms}", "type": "click", "user_id": user_id, "item_id": item_id, "ts_ms": ts_ms}
    assert client.post("/v1/events", json={"events": [event]}).status_code == 202


def stored_clicks(version: Version, user_id: int) -> list[tuple[str, int]]:
    """(item, time) of a user's clicks in the version, newest first."""
    row = version.users.ids.to_pylist().index(user_id)
    part = slice(*version.clicks.indptr[row : row + 2].tolist())
    ids = version.item_ids.take(pa.array(version.clicks.item_row[part])).to_pylist()
    return list(zip(ids, version.clicks.ts_ms[part].tolist(), strict=True))[::-1]


@pytest.mark.parametrize(
    ("path", "kind"), [("/", "text/html"), ("/console/page.css", "text/css"), ("/console/page.js", "text/javascript")]
)
def test_static_files_may_load_nothing_from_elsewhere(client: Client, path: str, kind: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    assert response.headers["content-security-policy"].startswith("default-src 'self';")
    assert response.headers["cache-control"] == "no-cache"
    assert "//" not in response.text.replace("http://www.w3.org/2000/svg", "") or kind == "text/javascript"


def test_meta_tells_types_channels_and_attributes(client: Client, version: Version) -> None:
    response = client.get("/console/meta")
    assert response.headers["cache-control"] == "no-store"
    assert response.json() == {
        "version": version.id,
        "users": len(version.users),
        "items": len(version.item_ids),
        "user_id_type": "int",
        "item_id_type": "string",
        "channels": ["two_tower", "item_cf", "popular"],
        "attributes": ATTRIBUTES,
    }


def test_users_to_begin_with_have_clicks_and_are_spread_over_all(client: Client, version: Version) -> None:
    busy = version.users.ids.filter(pa.array(np.diff(version.clicks.indptr) >= 5)).to_pylist()
    assert client.get("/console/users?n=2").json() == {"users": [busy[0], busy[-1]]}
    assert client.get("/console/users?n=100").json() == {"users": busy[:100]} or len(busy) > 100


def test_a_history_is_newest_first_with_titles_and_attributes(client: Client, version: Version) -> None:
    [user_id] = client.get("/console/users?n=1").json()["users"]
    answer = client.get(f"/console/history?user_id={user_id}").json()
    expected = stored_clicks(version, user_id)
    assert [(item["item_id"], item["ts_ms"]) for item in answer["items"]] == expected
    assert (answer["known"], answer["clicks"], answer["since_version"]) == (True, len(expected), 0)
    catalogue = {row["item_id"]: row for row in version.catalogue.to_pylist()}
    for item in answer["items"]:
        assert item["title"] == catalogue[item["item_id"]]["title"]
        assert item["attributes"] == {name: catalogue[item["item_id"]][name] for name in ATTRIBUTES}
        assert not item["since_version"]


def test_clicks_after_the_watermark_come_first_and_are_marked(client: Client, version: Version) -> None:
    [user_id] = client.get("/console/users?n=1").json()["users"]
    before = stored_clicks(version, user_id)
    watermark = version.watermark_ms
    assert watermark is not None
    click(client, user_id, "i000007", watermark)  # the version knows of everything up to here
    click(client, user_id, "i000008", watermark + 1)
    click(client, user_id, "gone", watermark + 2)
    answer = client.get(f"/console/history?user_id={user_id}&n=3").json()
    assert [(item["item_id"], item["since_version"]) for item in answer["items"]] == [
        ("gone", True),
        ("i000008", True),
        (before[0][0], False),
    ]
    assert answer["items"][0] == {
        "item_id": "gone",
        "title": None,
        "attributes": None,
        "ts_ms": watermark + 2,
        "since_version": True,
    }
    assert (answer["clicks"], answer["since_version"]) == (len(before) + 2, 2)
    only_live = client.get(f"/console/history?user_id={user_id}&n=1").json()
    assert [item["item_id"] for item in only_live["items"]] == ["gone"]


def test_someone_never_seen_has_an_empty_history(client: Client, version: Version) -> None:
    answer = client.get(f"/console/history?user_id={STRANGER}").json()
    assert answer == {"version": version.id, "known": False, "clicks": 0, "since_version": 0, "items": []}


def test_the_click_of_someone_unknown_is_their_history(client: Client, version: Version) -> None:
    assert version.watermark_ms is not None
    click(client, STRANGER, "i000008", version.watermark_ms + 1)
    answer = client.get(f"/console/history?user_id={STRANGER}").json()
    assert (answer["known"], answer["clicks"]) == (False, 1)
    assert answer["items"][0]["title"] == version.catalogue.column("title")[8].as_py()


def test_an_id_of_the_wrong_type_is_refused_with_a_sentence(client: Client) -> None:
    response = client.get("/console/history?user_id=abc")
    assert response.status_code == 422
    assert response.json() == {"error": "'abc' is no id: ids are integers here"}


def test_items_come_in_the_order_asked_and_unknown_ones_are_empty(client: Client, version: Version) -> None:
    answer = client.post("/console/items", json={"ids": ["i000009", 3, "i000002", "i000009"]}).json()
    titles = version.catalogue.column("title")
    assert answer["version"] == version.id
    assert [(item["item_id"], item["title"]) for item in answer["items"]] == [
        ("i000009", titles[9].as_py()),
        (3, None),
        ("i000002", titles[2].as_py()),
        ("i000009", titles[9].as_py()),
    ]
    assert answer["items"][1]["attributes"] is None


def test_any_catalogue_can_be_shown(version: Version) -> None:
    """No title, values that are missing, lists, and vectors, which nobody can read."""
    catalogue = pa.record_batch(
        {
            "item_id": pa.array([4, 7]),
            "genres": pa.array([["Drama", "War"], None]),
            "year": pa.array([1994, None]),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array([0.0, 1.0, 2.0, 3.0]), 2),
            "vector": pa.array([[0.5], [0.25]]),
            "brand": pa.array(["a", "b"]).dictionary_encode(),
            "blob": pa.array([b"x", b"y"]),
        }
    )
    other = replace(version, attributes=Attributes(catalogue), items=ItemKeys(catalogue.column("item_id")))
    assert shown_attributes(other) == ["genres", "year", "brand"]
    assert describe(other, [7, 4]) == [
        {"item_id": 7, "title": None, "attributes": {"genres": None, "year": None, "brand": "b"}},
        {"item_id": 4, "title": None, "attributes": {"genres": ["Drama", "War"], "year": 1994, "brand": "a"}},
    ]
