"""Versions whose item vectors are in a vector database: a real PostgreSQL with pgvector."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import psycopg
import pytest

from twotower.config import Settings
from twotower.index.build import connect
from twotower.index.database import Collection
from twotower.index.options import IndexOptions
from twotower.pipeline.line import publish_version
from twotower.pipeline.places import places
from twotower.publish import publish as module
from twotower.publish.collections import collections_named
from twotower.publish.prune import prune
from twotower.publish.publish import current, promote, roll_back, verify
from twotower.publish.version import open_version, read_manifest
from twotower.schema.errors import VersionError
from twotower.serve.snapshots import Snapshots


def names_in(database_world: Settings) -> list[str]:
    home = places(database_world).versions / ".collections"
    return connect("pgvector", database_world.index.url or "").names(home.read_text().strip())


def test_a_version_in_a_database_gives_the_answers_of_one_in_files(database_world: Settings) -> None:
    versions = places(database_world).versions
    embedded = publish_version(replace(database_world, index=IndexOptions("exact")))["version"]
    published = publish_version(database_world)["version"]
    manifest = read_manifest(versions / published)
    assert sorted(manifest["collections"]) == ["new_items", "two_tower"]
    said = manifest["collections"]["two_tower"]
    assert said["name"].endswith(f"_{published.replace('-', '_').lower()}_two_tower")
    assert (said["kind"], said["url"], said["count"]) == ("pgvector", database_world.index.url, 300)
    assert manifest["collections"]["new_items"]["count"] > 0
    assert names_in(database_world) == sorted(one["name"] for one in manifest["collections"].values())
    assert verify(versions / published) == []
    one, other = open_version(versions / embedded), open_version(versions / published)
    users = np.arange(50)
    for channel in database_world.models.channels:
        a, b = (version.channels[channel].retrieve(version.queries(users), 30) for version in (one, other))
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.scores, b.scores)
    promote(versions, published)
    assert Snapshots(versions).version.id == published
    assert roll_back(versions) == manifest["parent"]


def test_vectors_that_were_changed_or_dropped_are_found_by_verify(database_world: Settings) -> None:
    versions = places(database_world).versions
    published = publish_version(database_world)["version"]
    name = read_manifest(versions / published)["collections"]["two_tower"]["name"]
    with psycopg.connect(database_world.index.url or "") as connection:
        connection.execute(f"UPDATE {name} SET vector = vector + vector WHERE id = 7")
    assert "its vectors were changed" in verify(versions / published)[0]
    with psycopg.connect(database_world.index.url or "") as connection:
        connection.execute(f"DELETE FROM {name} WHERE id = 7")
    assert (
        f"{name} in {database_world.index.url} holds 299 vectors, where 300 were written"
        in verify(versions / published)[0]
    )
    with pytest.raises(VersionError, match="is not promoted"):
        promote(versions, published)
    connect("pgvector", database_world.index.url or "").drop(name)
    assert "is missing: publish again" in verify(versions / published)[0]


def test_a_publication_of_a_version_that_exists_leaves_its_collections(
    database_world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower.pipeline.line.now_ms", lambda: 1_800_000_000_000)
    published = publish_version(database_world)["version"]
    with pytest.raises(VersionError, match="is never replaced"):
        publish_version(database_world)
    assert verify(places(database_world).versions / published) == []


SAID = {"kind": "milvus", "url": "http://x:1", "name": "x", "count": 3, "sha256": "0", "lists": 0}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ([], "collections is of type list"),
        ({"mf": 3}, "mf is of type int, where an object is expected"),
        ({"mf": {"kind": "milvus", "count": 1}}, "mf has no url"),
        ({"mf": SAID | {"count": "3"}}, "count is of type str"),
        ({"mf": SAID | {"kind": "other"}}, "no database of kind 'other', but milvus, pgvector"),
    ],
)
def test_a_manifest_whose_collections_are_none_is_refused_with_a_sentence(said: object, told: str) -> None:
    with pytest.raises(VersionError, match=told):
        collections_named({"id": "v", "collections": said})


def test_what_a_later_release_says_of_a_collection_is_passed_over() -> None:
    named = collections_named({"id": "v", "collections": {"mf": SAID | {"more": 1}, "als": SAID | {"count": 0}}})
    assert named == {"mf": Collection(**SAID)}
    assert collections_named({"id": "of an earlier release"}) == {}


@pytest.mark.parametrize("home", ["", "twotower", "\N{NO-BREAK SPACE}", "twotower_0123456G"])
def test_prune_drops_nothing_where_it_is_not_sure_what_is_ours(tmp_path: Path, home: str) -> None:
    (tmp_path / ".collections").write_text(home, encoding="utf-8")
    with pytest.raises(VersionError, match="eight digits are expected"):
        prune(tmp_path, tmp_path, IndexOptions("pgvector", url="postgresql://127.0.0.1:9/x"))


def test_a_publication_that_fails_leaves_no_collection_and_prune_drops_that_of_a_killed_one(
    database_world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = places(database_world)
    kept = publish_version(database_world)["version"]
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_golden", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            publish_version(database_world)
    before = names_in(database_world)
    assert len(before) == 2
    assert all(kept.replace("-", "_").lower() in name for name in before)
    home = (where.versions / ".collections").read_text().strip()
    database = connect("pgvector", database_world.index.url or "")
    for name in (f"{home}_killed_two_tower", "twotower_ffffffff_others_two_tower"):
        database.create(name, np.arange(3), np.eye(3, dtype=np.float32), 0)
    try:
        said = prune(where.versions, where.deltas, database_world.index, dry_run=True)
        assert (said.versions, said.collections) == ([], [f"{home}_killed_two_tower"])
        assert prune(where.versions, where.deltas, database_world.index) == said
        assert names_in(database_world) == before
        assert database.has("twotower_ffffffff_others_two_tower")
    finally:
        database.drop("twotower_ffffffff_others_two_tower")


def test_prune_keeps_the_served_version_its_parent_and_the_latest(database_world: Settings) -> None:
    where = places(database_world)
    first = current(where.versions)
    ids = [publish_version(database_world)["version"] for _ in range(3)]
    promote(where.versions, ids[0])
    removed = prune(where.versions, where.deltas, database_world.index, keep=1)
    assert removed.versions == [ids[1]]
    assert len(removed.collections) == 2
    assert sorted(path.name for path in where.versions.glob("[!.]*/")) == sorted([str(first), ids[0], ids[2]])
    assert verify(where.versions / ids[0]) == verify(where.versions / ids[2]) == []
