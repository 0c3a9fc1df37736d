"""The index over a vector database, against a database of a few lines and against real servers."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from twotower.index import database, pgvector
from twotower.index.build import build_index, connect, load_index
from twotower.index.database import DatabaseIndex, check_content, check_there
from twotower.index.exact import ExactIndex
from twotower.index.milvus import MilvusDatabase
from twotower.index.options import IndexOptions
from twotower.index.pgvector import PgvectorDatabase
from twotower.index.protocol import Exclusions
from twotower.schema.errors import ConfigError, DataError, UnavailableError, VersionError

NAME = "twotower_test"


class Memory:
    """A database in memory that notes how deep it was asked; with fewer probes than lists it finds fewer."""

    most = 1000
    most_lists = 150

    def __init__(self, lists: int = 0) -> None:
        self.content: dict[str, ExactIndex] = {}
        self.asked: list[tuple[int, int]] = []
        self.vectors: NDArray[np.float32] | None = None
        self.lists = lists

    def create(self, name: str, rows: Any, vectors: Any, lists: int) -> None:
        self.content[name] = ExactIndex.build(rows, vectors)
        self.vectors, self.lists = vectors, lists

    def has(self, name: str) -> bool:
        return name in self.content

    def count(self, name: str) -> int:
        return len(self.content[name]) if name in self.content else -1

    def nearest(self, name: str, queries: Any, n: int, probes: int) -> NDArray[np.int64]:
        self.asked.append((n, probes))
        found = self.content[name].search(queries, n).rows
        if self.lists and probes < self.lists // 4:  # a quarter of the lists is enough
            found[:, n // 2 :] = -1
        return found

    def read(self, name: str) -> Any:
        assert self.vectors is not None
        return self.content[name].rows, self.vectors


def unit_vectors(count: int, dimension: int = 8, seed: int = 0) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def over(memory: Memory, count: int) -> DatabaseIndex:
    return DatabaseIndex.build("memory", "memory://", NAME, lambda *_: memory, np.arange(count), unit_vectors(count))


@pytest.mark.parametrize("hidden", [0.0, 0.3, 0.6, 0.99])
def test_what_is_hidden_anywhere_is_made_up_for(hidden: float) -> None:
    """Hidden are the very nearest, so that what was requested first is short."""
    memory, vectors = Memory(), unit_vectors(3000)
    index, exact = over(memory, 3000), ExactIndex.build(np.arange(3000), vectors)
    query = unit_vectors(1, seed=1)
    out = exact.search(query, 3000).rows[0, : int(3000 * hidden)]
    expected = exact.without(out).search(query, 20)
    for found in (index.without(out).search(query, 20), index.search(query, 20, Exclusions.of([out]))):
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert max([0, *(n for n, _ in memory.asked)]) <= memory.most


def test_a_few_that_are_left_of_many_are_searched_here() -> None:
    memory = Memory()
    view = over(memory, 3000).without(np.arange(10, 3000))
    assert sorted(view.search(unit_vectors(1), 20).rows[0, :10].tolist()) == [*range(10)]
    assert not memory.asked


def test_rows_that_the_database_makes_up_are_passed_over() -> None:
    memory = Memory()
    index = over(memory, 50)
    memory.content[NAME] = ExactIndex.build(np.arange(25, 75), unit_vectors(50, seed=3))
    assert sorted(index.search(unit_vectors(1), 25).rows[0].tolist()) != []
    assert set(index.search(unit_vectors(1), 25).rows[0].tolist()) <= {*range(50)}


def test_a_row_that_the_database_gives_twice_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    index, query = over(memory, 50), unit_vectors(1)
    once = index.search(query, 10)
    search = memory.nearest
    monkeypatch.setattr(memory, "nearest", lambda *asked: np.repeat(search(*asked), 2, axis=1)[:, : asked[2]])
    np.testing.assert_array_equal(index.search(query, 10).rows, once.rows)


def test_a_list_longer_than_the_database_gives_is_searched_here_and_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FLAT_BELOW", 1000)
    memory, query = Memory(), unit_vectors(1, seed=1)
    index = over(memory, 2000).tune(unit_vectors(20, seed=2), [10, 1500], 0.9)
    assert max(n for n, _ in memory.asked) == memory.most
    expected = ExactIndex.build(np.arange(2000), unit_vectors(2000)).search(query, 1500)
    found = index.search(query, 1500)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_probes_are_tuned_for_each_k_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "FLAT_BELOW", 1000)
    memory = Memory()
    index = over(memory, 2000)
    tuned = index.tune(unit_vectors(300, seed=2), [10, 100], 0.99)
    assert memory.lists == 150
    assert [(entry.k, entry.nprobe, entry.recall) for entry in tuned.tuning] == [(10, 37, 1.0), (100, 37, 1.0)]
    tuned.save(tmp_path / "index")
    again = DatabaseIndex.load(tmp_path / "index", "memory", lambda *_: memory)
    assert again.tuning == tuned.tuning
    memory.asked.clear()
    again.search(unit_vectors(1), 10)
    assert memory.asked == [(10, 37)]
    described = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(described | {"tuning": [{"other": 1}]}))
    with pytest.raises(DataError, match="where a tuned index is expected"):
        DatabaseIndex.load(tmp_path / "index", "memory", lambda *_: memory)
    with pytest.raises(DataError, match="no queries to tune the index on"):
        index.tune(unit_vectors(0), [10], 0.99)


def test_a_collection_that_is_missing_short_or_changed_is_found_out() -> None:
    memory = Memory()
    index = over(memory, 30)
    check_content(index.collection, lambda *_: memory)
    with pytest.raises(VersionError, match="twotower_test in memory:// holds 30 vectors, where 31 were written"):
        check_there(replace(index.collection, count=31), lambda *_: memory)
    memory.vectors = unit_vectors(30, seed=9)
    with pytest.raises(VersionError, match="its vectors were changed"):
        check_content(index.collection, lambda *_: memory)
    memory.content.clear()
    with pytest.raises(VersionError, match="is missing: publish again"):
        check_there(index.collection, lambda *_: memory)


def test_an_embedded_index_is_meant_where_there_is_no_version() -> None:
    options = IndexOptions("pgvector", url="postgresql://localhost/x")
    with pytest.raises(Exception, match="is of published versions"):
        build_index(options, np.arange(9), unit_vectors(9), unit_vectors(2), ks=[3], seed=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "milvus"}, 'with no address: set url, such as "http://localhost:19530"'),
        ({"kind": "pgvector", "url": "http://localhost"}, "with the address http://localhost: set url"),
        ({"kind": "faiss", "url": "http://localhost:1"}, "is embedded: leave it out"),
        ({"kind": "pgvector", "url": "postgresql://me:secret@localhost/x"}, "an address holds no password"),
        ({"kind": "pgvector", "url": "postgresql://localhost/x?sslPassword=y"}, "an address holds no password"),
    ],
)
def test_addresses_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told) as refused:
        IndexOptions(**options)
    assert "secret" not in refused.value.errors()[0]["msg"]


@pytest.fixture(params=["pgvector", "milvus"])
def server(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param, request.getfixturevalue(f"{request.param}_url")


def test_a_real_database_reaches_the_recall_also_where_many_are_hidden(server: tuple[str, str], tmp_path: Path) -> None:
    kind, url = server
    rng = np.random.default_rng(0)
    centres = unit_vectors(50, 16)
    vectors = centres[rng.integers(50, size=21_000)] + rng.normal(size=(21_000, 16), scale=0.15).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows, queries = np.arange(21_000) * 3, vectors[::100] + np.float32(0.01)
    options = IndexOptions(kind, 0.95, url)  # type: ignore[arg-type]
    name = f"twotower_test_recall_{kind}"
    built = build_index(options, rows, vectors, queries[::2], ks=[10, 500], seed=0, collection=name)
    try:
        built.save(tmp_path / "index")
        index, exact = load_index(tmp_path / "index"), ExactIndex.build(rows, vectors)
        assert isinstance(index, DatabaseIndex)
        assert all(entry.recall >= 0.95 and entry.nprobe < 579 for entry in index.tuning)
        for share in (0.0, 0.5, 0.99):
            out = rows[rng.random(len(rows)) < share]
            for k in (10, 500):
                found, best = (one.without(out).search(queries[1::2], k) for one in (index, exact))
                hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found.rows, best.rows, strict=True)]
                assert sum(hits) >= 0.9 * (best.rows >= 0).sum(), (share, k)
        check_content(index.collection, connect)
        assert connect(kind, url).names("twotower_test_recall") == [name]
        with pytest.raises(VersionError, match="exists in"):
            build_index(options, rows, vectors, queries, ks=[10], seed=0, collection=name)
    finally:
        connect(kind, url).drop(name)
    assert not connect(kind, url).has(name)
    with pytest.raises(UnavailableError):
        built.search(queries[:1], 3)


def test_a_server_that_says_nothing_is_waited_for_once_and_only_so_long(
    pgvector_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, asked = PgvectorDatabase(pgvector_url), []
    monkeypatch.setattr(pgvector._Connection, "silence_s", 0.3)

    def sleep(connection: Any) -> None:
        asked.append(connection)
        connection.execute("SET statement_timeout = 0")
        connection.execute("SELECT pg_sleep(5)")

    database.has("absent")  # and leaves an idle connection
    with pytest.raises(UnavailableError, match="timeout"):
        database._search(sleep)
    assert [connection.closed for connection in asked] == [True]


def test_vectors_that_postgresql_cannot_index_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match="at most 2000 numbers, these have 2001: lower"):
        PgvectorDatabase("postgresql://absent/x").create("x", np.arange(1), np.ones((1, 2001), np.float32), 0)


def test_an_answer_of_milvus_that_takes_too_long_is_said_as_such() -> None:
    """The client gives it as an error of gRPC, not as one of its own."""

    class Late(grpc.RpcError):
        def details(self) -> str:
            return "Deadline Exceeded"

    def late(*_: Any, **__: Any) -> None:
        raise Late

    database = MilvusDatabase("http://somewhere:1")
    database._client = SimpleNamespace(has_collection=late)
    with pytest.raises(UnavailableError, match="Milvus at http://somewhere:1: Deadline Exceeded"):
        database.has("x")


@pytest.mark.parametrize(
    ("kind", "url"), [("pgvector", "postgresql://127.0.0.1:9/x"), ("milvus", "http://127.0.0.1:9")]
)
def test_a_database_that_is_not_there_is_said_within_seconds(kind: str, url: str) -> None:
    said: list[BaseException] = []

    def ask() -> None:
        try:
            connect(kind, url).has("twotower_test")
        except UnavailableError as error:
            said.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(20)
    assert len(said) == 1
    assert url in str(said[0])
