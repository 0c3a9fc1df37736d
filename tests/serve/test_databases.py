"""A server whose vector database goes away and comes back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from twotower.config import Settings
from twotower.index.build import connect
from twotower.pipeline.line import publish_version
from twotower.pipeline.places import places
from twotower.publish.publish import promote
from twotower.schema.errors import UnavailableError
from twotower.serve.databases import DatabaseWatch
from twotower.serve.snapshots import Snapshots


class Gate:
    """Stands before a database and lets nothing through while it is shut."""

    def __init__(self, database: Any) -> None:
        self.shut = False
        self._database = database

    def __getattr__(self, name: str) -> Any:
        if self.shut and name != "most":
            raise UnavailableError("PostgreSQL at somewhere: connection refused")
        return getattr(self._database, name)


@pytest.fixture
def gate(database_world: Settings, monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(connect("pgvector", database_world.index.url or ""))
    for name in ("twotower.index.build", "twotower.publish.collections", "twotower.serve.databases"):
        monkeypatch.setattr(f"{name}.connect", lambda *_: gate)
    return gate


def test_a_server_goes_on_without_the_database_and_finds_it_again(
    database_world: Settings, gate: Gate, start: Callable[[Settings], Any]
) -> None:
    versions = places(database_world).versions
    promote(versions, publish_version(database_world)["version"])
    server = start(database_world)
    server.databases.look()
    assert server.http.get("/readyz").json()["unavailable_channels"] == {}
    gate.shut = True
    server.databases.look()
    answer = server.retrieve(user_id=server.version.users.ids[0].as_py(), k=20)
    assert sorted(answer["failed_channels"]) == ["new_items", "two_tower"]
    assert {name for item in answer["items"] for name in item["channels"]} == {"popular"}
    ready = server.http.get("/readyz")
    assert ready.status_code == 200
    assert sorted(ready.json()["unavailable_channels"]) == ["new_items", "two_tower"]
    assert server.metric('twotower_channel_unavailable{channel="two_tower"}') == 1
    alone = server.http.post("/v1/retrieve", json={"user_id": None, "k": 5, "channels": ["two_tower"]})
    assert alone.status_code == 503
    similar = server.http.get(f"/v1/items/{server.version.item_ids[0].as_py()}/similar")
    assert (similar.status_code, "connection refused" in similar.json()["error"]) == (503, True)
    gate.shut = False
    server.databases.look()
    assert server.retrieve(user_id=server.version.users.ids[0].as_py(), k=20)["failed_channels"] == []
    assert server.http.get("/readyz").json()["unavailable_channels"] == {}
    assert server.metric('twotower_channel_unavailable{channel="two_tower"}') == 0


def test_a_server_starts_without_the_database_only_if_told_so(database_world: Settings, gate: Gate) -> None:
    versions = places(database_world).versions
    promote(versions, publish_version(database_world)["version"])
    gate.shut = True
    with pytest.raises(UnavailableError, match="connection refused"):
        Snapshots(versions)
    snapshots = Snapshots(versions, without_index=True)
    watch = DatabaseWatch(snapshots)
    watch.look()
    assert sorted(watch.problems) == ["new_items", "two_tower"]
    assert not watch.nothing_left
    gate.shut = False
    queries = snapshots.version.queries(np.arange(3))
    assert (snapshots.version.two_tower.retrieve(queries, 5).rows >= 0).all()


def test_a_version_that_comes_while_the_database_is_away_is_served_later(database_world: Settings, gate: Gate) -> None:
    versions = places(database_world).versions
    snapshots = Snapshots(versions)
    first = snapshots.version.id
    published = publish_version(database_world)["version"]
    promote(versions, published)
    gate.shut = True
    assert snapshots.reload() == first
    assert snapshots.refused is not None
    assert snapshots.refused.passing
    gate.shut = False
    snapshots._look()
    assert snapshots.version.id == first  # it is tried again after a pause, because that reads all its files
    assert snapshots.reload() == published
    assert snapshots.refused is None


def test_a_database_that_is_away_is_asked_once_for_all_channels(database_world: Settings, gate: Gate) -> None:
    versions, asked = places(database_world).versions, []
    promote(versions, publish_version(database_world)["version"])
    watch = DatabaseWatch(Snapshots(versions))

    def away(name: str) -> bool:
        asked.append(name)
        raise UnavailableError("no answer")

    gate.has = away  # type: ignore[attr-defined]
    watch.look()
    assert len(asked) == 1
    assert watch.problems == {"new_items": "no answer", "two_tower": "no answer"}


def test_a_look_that_does_not_end_says_that_nothing_answers(database_world: Settings, gate: Gate) -> None:
    versions = places(database_world).versions
    promote(versions, publish_version(database_world)["version"])
    now = [0.0]
    watch = DatabaseWatch(Snapshots(versions), lambda: now[0])
    seen: list[Any] = []

    def hang(_: str) -> bool:
        seen.append(dict(watch.problems))
        now[0] += 6
        seen.append(dict(watch.problems))
        return True

    gate.has = hang  # type: ignore[attr-defined]
    watch.look()
    assert seen[0] == {}
    assert sorted(seen[1]) == ["new_items", "two_tower"]
    assert watch.problems == {}
