"""What every vector index must do. The truth is a stable argsort of all scores.

Vectors hold small whole numbers, so that float32 scores are exact in any order of additions and ties are plenty.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from twotower.index.build import connect, load_index
from twotower.index.database import DatabaseIndex
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.overlaid import OverlaidIndex
from twotower.index.protocol import Exclusions, Neighbours, VectorIndex
from twotower.schema.errors import DataError

Build = Callable[[NDArray[np.int64], NDArray[np.float32]], VectorIndex]


def build_overlaid(rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> OverlaidIndex:
    """Half of the vectors over a base that has all rows, the newer ones with other vectors."""
    ExactIndex.build(rows, vectors)  # refuses what cannot be indexed
    newer = np.arange(len(rows)) % 2 == 1
    stale = np.where(newer[:, None], vectors + 1, vectors)
    return OverlaidIndex.over(ExactIndex.build(rows, stale), rows[newer], vectors[newer])


BUILDS: dict[str, Build] = {
    "overlaid": build_overlaid,
    "exact": ExactIndex.build,
    "faiss_flat": FaissIndex.build,
    "faiss_ivf_all_lists": partial(FaissIndex.build, flat_below=0),
}


DATABASES = ("pgvector", "milvus")


@pytest.fixture(params=[*BUILDS, *DATABASES], scope="module")
def build(request: pytest.FixtureRequest) -> Iterator[Build]:
    if request.param in BUILDS:
        yield BUILDS[request.param]
        return
    url, made = request.getfixturevalue(f"{request.param}_url"), dict[str, DatabaseIndex]()

    def built(rows: NDArray[np.int64], vectors: NDArray[np.float32]) -> DatabaseIndex:
        """What was built of the same vectors serves again: Milvus takes seconds to load a collection."""
        key = hashlib.sha256(rows.tobytes() + vectors.tobytes() + str(vectors.shape).encode()).hexdigest()
        if key not in made:
            made[key] = DatabaseIndex.build(request.param, url, f"twotower_test_{key[:16]}", connect, rows, vectors)
        return made[key]

    yield built
    for index in made.values():
        connect(request.param, url).drop(index.collection.name)


def whole_numbers(seed: int, count: int, dimension: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-2, 3, size=(count, dimension)).astype(np.float32)


def scattered_rows(seed: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(3 * count)[:count].astype(np.int64)


def truth(
    rows: NDArray[np.int64], vectors: NDArray[np.float32], query: NDArray[np.float32], k: int, out: set[int]
) -> list[tuple[float, int]]:
    scores = (vectors.astype(np.float64) @ query).tolist()
    best = sorted((-score, row) for score, row in zip(scores, rows.tolist(), strict=True) if row not in out)
    return [(-score, row) for score, row in best[:k]]


def check(
    index: VectorIndex,
    rows: NDArray[np.int64],
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    k: int,
    exclude: Sequence[Sequence[int]] | None = None,
    hidden: Sequence[int] = (),
) -> None:
    """Scores equal the truth; rows too, but FAISS may choose among those that tie for the last place."""
    found = index.search(queries, k, None if exclude is None else Exclusions.of(exclude))
    assert found.rows.shape == found.scores.shape == (len(queries), k)
    assert (found.rows.dtype, found.scores.dtype) == (np.int64, np.float32)
    for b, query in enumerate(queries):
        out = set(hidden) | set(exclude[b] if exclude else ())
        expected = truth(rows, vectors, query, k, out)
        n = len(expected)
        assert found.rows[b, n:].tolist() == [-1] * (k - n)
        assert np.isneginf(found.scores[b, n:]).all()
        assert found.scores[b, :n].tolist() == [score for score, _ in expected]
        got = list(zip((-found.scores[b, :n]).tolist(), found.rows[b, :n].tolist(), strict=True))
        assert got == sorted(got)
        last = expected[-1][0] if expected else 0.0
        if isinstance(index, ExactIndex):
            assert found.rows[b, :n].tolist() == [row for _, row in expected]
        else:
            assert [row for score, row in got if -score > last] == [row for score, row in expected if score > last]
            tied = {row for score, row in truth(rows, vectors, query, len(rows), out) if score == last}
            chosen = [row for score, row in got if -score == last]
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) <= tied


@pytest.mark.parametrize("count", [1, 2, 7, 100, 700])
@pytest.mark.parametrize("k", [1, 5, 64, 1000])
def test_the_nearest_are_those_of_a_full_sort(build: Build, count: int, k: int) -> None:
    rows, vectors, queries = scattered_rows(1, count), whole_numbers(2, count, 5), whole_numbers(3, 25, 5)
    check(build(rows, vectors), rows, vectors, queries, k)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exclusions_and_hidden_rows_are_left_out(build: Build, data: st.DataObject) -> None:
    embedded = build in BUILDS.values()
    count = data.draw(st.integers(0, 60) if embedded else st.sampled_from([0, 1, 9, 60]), "N")
    dimension = data.draw(st.integers(1, 20) if embedded else st.just(5), "D")
    batch = data.draw(st.integers(0, 24), "B")
    seed = data.draw(st.integers(0, 1000), "seed") if embedded else count
    rows = scattered_rows(seed, count)
    vectors, queries = whole_numbers(seed + 1, count, dimension), whole_numbers(seed + 2, batch, dimension)
    some = st.lists(st.integers(0, 3 * count + 2), max_size=count + 5)
    hidden = data.draw(some, "hidden")
    exclude = data.draw(st.none() | st.lists(some, min_size=batch, max_size=batch), "exclude")
    k = data.draw(st.integers(1, count + 3), "k")
    index = build(rows, vectors).without(np.array(hidden, np.int64))
    assert index.count() == count - len(set(hidden) & set(rows.tolist()))
    check(index, rows, vectors, queries, k, exclude, hidden)


def test_one_user_who_saw_nearly_everything_and_one_who_saw_nothing(build: Build) -> None:
    rows, vectors, queries = scattered_rows(4, 500), whole_numbers(5, 500, 8), whole_numbers(6, 2, 8)
    check(build(rows, vectors), rows, vectors, queries, 20, [rows[:-7].tolist(), []])


def test_a_row_both_hidden_and_excluded_counts_once(build: Build) -> None:
    rows, vectors, queries = np.arange(10), whole_numbers(5, 10, 4), whole_numbers(6, 2, 4)
    check(build(rows, vectors).without(rows[:4]), rows, vectors, queries, 10, [[2, 3, 3, 4], [0]], [0, 1, 2, 3])


def test_a_user_who_saw_everything_gets_padding(build: Build) -> None:
    rows, vectors = scattered_rows(4, 50), whole_numbers(5, 50, 8)
    found = build(rows, vectors).search(vectors[:1], 3, Exclusions.of([rows]))
    assert found.rows.tolist() == [[-1, -1, -1]]


def test_unit_vectors_are_ordered_by_their_cosine(build: Build) -> None:
    vectors = np.random.default_rng(7).normal(size=(3000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[:40] + np.float32(0.1)
    found = build(np.arange(3000), vectors).search(queries, 50)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-exact, axis=1)[:, :50]
    np.testing.assert_array_equal(found.rows, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(exact, order, axis=1), atol=1e-6)


def test_all_vectors_alike_are_found_in_any_number(build: Build) -> None:
    rows, vectors = scattered_rows(8, 300), np.tile(whole_numbers(9, 1, 6), (300, 1))
    check(build(rows, vectors), rows, vectors, whole_numbers(10, 3, 6), 20, [[], rows[:5].tolist(), []])


def test_an_empty_index_answers_with_padding(build: Build) -> None:
    index = build(np.empty(0, np.int64), np.empty((0, 4), np.float32))
    found = index.search(np.ones((2, 4), np.float32), 3, Exclusions.of([[1], []]))
    assert index.count() == 0
    assert found.rows.tolist() == [[-1] * 3] * 2
    assert np.isneginf(found.scores).all()


def test_no_queries_have_no_neighbours(build: Build) -> None:
    found = build(np.arange(3), whole_numbers(1, 3, 4)).search(np.empty((0, 4), np.float32), 2)
    assert found.rows.shape == found.scores.shape == (0, 2)


def test_the_order_given_changes_nothing(build: Build) -> None:
    rows, vectors, queries = scattered_rows(1, 200), whole_numbers(2, 200, 6), whole_numbers(3, 5, 6)
    shuffled = np.random.default_rng(4).permutation(200)
    same(build(rows, vectors).search(queries, 30), build(rows[shuffled], vectors[shuffled]).search(queries, 30))


def same(one: Neighbours, other: Neighbours) -> None:
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.scores, other.scores)


def test_hidden_rows_are_among_its_rows(build: Build) -> None:
    rows = scattered_rows(4, 50)
    index = build(rows, whole_numbers(5, 50, 8)).without(rows[:9])
    assert index.rows.tolist() == sorted(rows.tolist())


def test_hiding_leaves_the_index_itself_as_it_is_and_adds_up(build: Build) -> None:
    rows, vectors, queries = np.arange(40), whole_numbers(2, 40, 6), whole_numbers(3, 5, 6)
    index = build(rows, vectors)
    view = index.without(np.array([1, 2])).without(np.array([2, 3, 99]))
    assert (index.count(), view.count()) == (40, 37)
    check(view, rows, vectors, queries, 40, hidden=[1, 2, 3])
    check(index, rows, vectors, queries, 40)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_a_saved_index_answers_alike_and_saves_the_same_bytes(build: Build, tmp_path: Path, count: int) -> None:
    rows, vectors, queries = scattered_rows(1, count), whole_numbers(2, count, 6), whole_numbers(3, 30, 6)
    index = build(rows, vectors)
    index.without(rows[:10]).save(tmp_path / "one")
    loaded = load_index(tmp_path / "one")
    assert type(loaded) is type(index)
    assert loaded.count() == count
    exclude = Exclusions.of([rows[:b] for b in range(30)])
    same(loaded.search(queries, 20, exclude), index.search(queries, 20, exclude))
    same(loaded.without(rows[:9]).search(queries, 20), index.without(rows[:9]).search(queries, 20))
    loaded.save(tmp_path / "two")
    build(rows, vectors).save(tmp_path / "three")
    loaded.close()
    for path in (tmp_path / "one").rglob("*"):
        name = path.relative_to(tmp_path / "one")
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / name).read_bytes()
            assert path.read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_eight_threads_get_the_answers_of_one(build: Build, tmp_path: Path) -> None:
    rows, vectors, queries = scattered_rows(1, 2000), whole_numbers(2, 2000, 16), whole_numbers(3, 64, 16)
    build(rows, vectors).save(tmp_path / "index")
    index = load_index(tmp_path / "index").without(rows[:100])
    exclude = [rows[b : 3 * b].tolist() for b in range(64)]

    def ask(b: int) -> Neighbours:
        return index.search(queries[b : b + 1], 30, Exclusions.of([exclude[b]]))

    alone = [ask(b) for b in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for b, found in enumerate(pool.map(ask, [*range(64)] * 5)):
            same(found, alone[b % 64])


def test_what_cannot_be_indexed_is_refused(build: Build) -> None:
    good = whole_numbers(1, 3, 2)
    bad = good.copy()
    bad[1, 0] = np.nan
    with pytest.raises(DataError, match="1 of 3 vectors hold NaN or infinity, the first is number 1"):
        build(np.arange(3), bad)
    with pytest.raises(DataError, match="1 rows occur more than once, such as 5"):
        build(np.array([5, 2, 5]), good)
    with pytest.raises(DataError, match="row -4 is negative"):
        build(np.array([5, -4, 2]), good)
    with pytest.raises(DataError, match="2 rows for 3 vectors"):
        build(np.arange(2), good)
    with pytest.raises(DataError, match="vectors are float64"):
        build(np.arange(3), good.astype(np.float64))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rows are int32"):
        build(np.arange(3, dtype=np.int32), good)  # type: ignore[arg-type]


def test_what_cannot_be_answered_is_refused(build: Build) -> None:
    index = build(np.arange(3), whole_numbers(1, 3, 2))
    with pytest.raises(DataError, match="queries have 3 numbers, the vectors of the index 2"):
        index.search(np.ones((1, 3), np.float32), 1)
    with pytest.raises(DataError, match="1 of 2 queries hold NaN or infinity"):
        index.search(np.array([[0, 1], [np.inf, 0]], np.float32), 1)
    with pytest.raises(DataError, match=r"queries are float32\(2,\)"):
        index.search(np.ones(2, np.float32), 1)
    with pytest.raises(DataError, match="k=0"):
        index.search(np.ones((1, 2), np.float32), 0)
    with pytest.raises(DataError, match="exclusions of 2 queries for 1 queries"):
        index.search(np.ones((1, 2), np.float32), 1, Exclusions.of([[1], [2]]))
    with pytest.raises(DataError, match="rows are float64"):
        index.without(np.ones(2))  # type: ignore[arg-type]
