from itertools import count
from pathlib import Path

import faiss as _faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from twotower.index import faiss_index
from twotower.index.build import load_index
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.protocol import Exclusions
from twotower.index.tuning import probes_for
from twotower.schema.errors import ConfigError, DataError

N, D = 6000, 16


def clustered(seed: int, number: int) -> NDArray[np.float32]:
    """Unit vectors around 100 centres, the same for every seed."""
    centres = np.random.default_rng(0).normal(size=(100, D))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(100, size=number)] + 0.5 * rng.normal(size=(number, D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def exact() -> ExactIndex:
    return ExactIndex.build(np.arange(N), clustered(1, N))


@pytest.fixture(scope="module")
def ivf() -> FaissIndex:
    return FaissIndex.build(np.arange(N), clustered(1, N), seed=3, flat_below=0)


def recall(index: FaissIndex, exact: ExactIndex, queries: NDArray[np.float32], k: int) -> float:
    pairs = zip(index.search(queries, k).rows, exact.search(queries, k).rows, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))


def test_tuning_takes_the_fewest_probes_that_reach_the_recall(ivf: FaissIndex, exact: ExactIndex) -> None:
    queries = clustered(2, 200)
    ticks = count()
    tuned = ivf.tune(queries, [100, 10], 0.95, exact, clock=lambda: next(ticks) / 1000)
    assert ivf.tuning == ()
    assert [entry.k for entry in tuned.tuning] == [10, 100]
    for entry in tuned.tuning:
        assert 1 < entry.nprobe < 310 // 2
        assert entry.recall >= 0.95
        assert recall(tuned, exact, queries, entry.k) == pytest.approx(entry.recall, abs=1e-6)
        assert entry.latency_ms == pytest.approx(1)
        assert entry.queries == 200
        fewer = FaissIndex(ivf._index, ivf._rows, ivf._hidden, (faiss_index.Tuned(entry.k, entry.nprobe - 1, 0, 0, 0),))
        assert recall(fewer, exact, queries, entry.k) < 0.95
    held_out = clustered(9, 300)
    assert recall(tuned, exact, held_out, 10) > 0.93
    assert recall(tuned, exact, held_out, 60) > 0.93
    assert recall(tuned, exact, held_out, 250) > 0.93


def test_a_recall_of_one_is_reached_and_stored(ivf: FaissIndex, exact: ExactIndex) -> None:
    (entry,) = ivf.tune(clustered(2, 50), [N + 1], 1.0, exact).tuning
    assert (entry.k, entry.recall) == (N, 1.0)
    assert entry.nprobe <= 310


def test_items_that_are_alike_do_not_spoil_the_measured_recall() -> None:
    vectors = np.concatenate([np.tile(clustered(1, 1), (500, 1)), clustered(2, 500)])
    exact = ExactIndex.build(np.arange(1000), vectors)
    tuned = FaissIndex.build(np.arange(1000), vectors, flat_below=0).tune(vectors[:1], [10], 1.0, exact)
    assert tuned.tuning[0].nprobe == 1


def test_tuning_is_saved_with_the_index(ivf: FaissIndex, exact: ExactIndex, tmp_path: Path) -> None:
    queries = clustered(2, 50)
    tuned = ivf.tune(queries, [10, 20], 0.9, exact)
    tuned.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index")
    assert isinstance(loaded, FaissIndex)
    assert (loaded.tuning, loaded.thinned) == (tuned.tuning, tuned.thinned)
    assert [entry.hidden for entry in tuned.thinned] == [0.5, 0.9]
    np.testing.assert_array_equal(loaded.search(queries, 15).rows, tuned.search(queries, 15).rows)


def test_probes_follow_the_nearest_tuned_k_above_and_grow_beyond_the_last(ivf: FaissIndex) -> None:
    tuning = (faiss_index.Tuned(10, 4, 1, 0, 1), faiss_index.Tuned(100, 30, 1, 0, 1))
    tuned = FaissIndex(ivf._index, ivf._rows, ivf._hidden, tuning)
    assert [tuned._probes(fetch) for fetch in (1, 10, 11, 100, 101, 200, 5000)] == [4, 4, 30, 30, 31, 60, 310]
    half_hidden = tuned.without(np.arange(0, N, 2))
    assert [half_hidden._probes(fetch) for fetch in (5, 6, 50, 100)] == [4, 30, 30, 60]
    assert ivf._probes(1) == 310


@pytest.fixture(scope="module")
def filtered_catalogue() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Vectors around 100 centres, and the centre of each: an attribute that goes with the vectors."""
    rng = np.random.default_rng(1)
    centres, centre_of = rng.normal(size=(100, D)), rng.integers(100, size=30_000)
    vectors = centres[centre_of] + 0.5 * rng.normal(size=(len(centre_of), D))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), centre_of


@pytest.fixture(scope="module")
def filtered(filtered_catalogue: tuple[NDArray[np.float32], NDArray[np.int64]]) -> tuple[FaissIndex, ExactIndex]:
    vectors, _ = filtered_catalogue
    exact = ExactIndex.build(np.arange(len(vectors)), vectors)
    built = FaissIndex.build(np.arange(len(vectors)), vectors)
    return built.tune(vectors[::300], [20, 200], 0.95, exact), exact


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["by chance", "by attribute"])
def test_the_promised_recall_holds_however_much_is_filtered(
    filtered: tuple[FaissIndex, ExactIndex],
    filtered_catalogue: tuple[NDArray[np.float32], NDArray[np.int64]],
    kind: str,
    share: float,
) -> None:
    (index, exact), (vectors, centre_of) = filtered, filtered_catalogue
    by_chance = np.random.default_rng(2).random(len(vectors)) < share
    out = np.flatnonzero(by_chance if kind == "by chance" else centre_of < 100 * share)
    queries = vectors[150::300] + np.float32(0.05)
    expected = exact.without(out).search(queries, 200).rows
    view = index.without(out).search(queries, 200).rows
    alone = index.search(queries, 200, Exclusions.of([out] * len(queries))).rows
    for found in (view, alone):
        assert not np.isin(found, out).any()
        assert np.mean([len(np.intersect1d(a, b)) / 200 for a, b in zip(expected, found, strict=True)]) > 0.945
        if share == 0.99:
            np.testing.assert_array_equal(found, expected)


def test_fewer_lists_than_all_are_probed_where_half_is_filtered(filtered: tuple[FaissIndex, ExactIndex]) -> None:
    index, _ = filtered
    half = index.without(np.arange(0, 30_000, 2))
    scan = half._scan(20)
    assert scan is not None
    assert probes_for(index.tuning, 20, index._lists) * 30_000 / index._lists <= scan < half.count() / 2
    assert index.without(np.arange(200))._scan(20) is None
    assert index.without(np.arange(0, 30_000 - 300))._scan(20) == 300


def test_an_index_without_tuning_for_filters_is_exact_under_them(
    filtered: tuple[FaissIndex, ExactIndex], filtered_catalogue: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    (index, exact), (vectors, centre_of) = filtered, filtered_catalogue
    older = FaissIndex(index._index, index._rows, index._hidden, index.tuning)
    out = np.flatnonzero(centre_of < 50)
    np.testing.assert_array_equal(
        older.without(out).search(vectors[:20], 50).rows, exact.without(out).search(vectors[:20], 50).rows
    )


@pytest.mark.parametrize("flat_below", [0, 10_000])
def test_queries_with_many_exclusions_and_with_few_go_together(
    exact: ExactIndex, monkeypatch: pytest.MonkeyPatch, flat_below: int
) -> None:
    monkeypatch.setattr(faiss_index, "FEW", 20)
    index = FaissIndex.build(np.arange(N), clustered(1, N), flat_below=flat_below).without(np.arange(5))
    queries = clustered(4, 5)
    exclude = Exclusions.of([np.arange(3000), [], np.arange(N), np.arange(7), np.arange(2, 30)])
    found, expected = index.search(queries, 15, exclude), exact.without(np.arange(5)).search(queries, 15, exclude)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


def test_lists_that_hold_too_few_are_probed_again_wider(ivf: FaissIndex, exact: ExactIndex) -> None:
    narrow = FaissIndex(ivf._index, ivf._rows, ivf._hidden, (faiss_index.Tuned(N, 1, 0, 0, 1),))
    queries = clustered(4, 30)
    assert (narrow.search(queries, 500).rows >= 0).all()
    everything = narrow.search(queries, N + 5)
    np.testing.assert_array_equal(np.sort(everything.rows[:, :N]), np.tile(np.arange(N), (30, 1)))
    assert (everything.rows[:, N:] == -1).all()
    nearest = exact.search(queries, 400).rows
    found = narrow.search(queries, 50, Exclusions.of(list(nearest)))
    assert (found.rows >= 0).all()
    assert not any(np.isin(rows, out).any() for rows, out in zip(found.rows, nearest, strict=True))
    shown = np.arange(0, N, 400)
    rare = narrow.without(np.setdiff1d(np.arange(N), shown)).search(queries, len(shown))
    np.testing.assert_array_equal(np.sort(rare.rows), np.tile(shown, (30, 1)))


def test_a_batch_fetches_for_each_user_only_what_that_user_needs(
    ivf: FaissIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    original = FaissIndex._search_alike

    def spy(self, queries, members, fetch, excluded, found):  # type: ignore[no-untyped-def]
        fetched.append((members.tolist(), fetch))
        original(self, queries, members, fetch, excluded, found)

    monkeypatch.setattr(FaissIndex, "_search_alike", spy)
    exclude = Exclusions.of([[], np.arange(3000), [], np.arange(3), np.arange(4)])
    ivf.search(clustered(4, 5), 10, exclude)
    assert fetched == [([0, 2], 10), ([3, 4], 14), ([1], 3010)]


def test_large_batches_are_cut_into_pieces(ivf: FaissIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = clustered(4, 30)
    whole = ivf.search(queries, 20).rows
    monkeypatch.setattr(faiss_index, "FETCHED_AT_ONCE", 70)
    np.testing.assert_array_equal(ivf.search(queries, 20).rows, whole)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(ivf: FaissIndex, tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        FaissIndex.build(np.arange(N), clustered(1, N), seed, flat_below=0).save(tmp_path / name)
    one, two, other = ((tmp_path / name / "index.faiss").read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_small_catalogues_are_scanned_and_need_no_tuning(exact: ExactIndex) -> None:
    flat = FaissIndex.build(np.arange(N), clustered(1, N))
    assert flat._lists == 0
    assert flat.tune(clustered(2, 5), [10], 0.9, exact) is flat


def test_searching_leaves_the_number_of_threads_alone(ivf: FaissIndex) -> None:
    before = _faiss.omp_get_max_threads()
    ivf.search(clustered(4, 30), 10)
    assert _faiss.omp_get_max_threads() == before


def test_tuning_that_cannot_be_is_refused(ivf: FaissIndex, exact: ExactIndex) -> None:
    queries = clustered(2, 5)
    with pytest.raises(ConfigError, match="give one k or more"):
        ivf.tune(queries, [], 0.9, exact)
    with pytest.raises(ConfigError, match=r"a recall of 1\.5"):
        ivf.tune(queries, [10], 1.5, exact)
    with pytest.raises(DataError, match="k=0"):
        ivf.tune(queries, [10, 0], 0.9, exact)
    with pytest.raises(DataError, match="no queries to tune the index on"):
        ivf.tune(queries[:0], [10], 0.9, exact)
    with pytest.raises(DataError, match="the exact index holds 5999 vectors, this one 6000"):
        ivf.tune(queries, [10], 0.9, exact.without(np.array([4])))


@pytest.mark.parametrize("flat_below", [0, 1000])
def test_a_damaged_file_is_refused(tmp_path: Path, flat_below: int) -> None:
    folder = tmp_path / "index"
    FaissIndex.build(np.arange(200), clustered(1, 200), flat_below=flat_below).save(folder)
    path = folder / "index.faiss"
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content + b"0", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"has {len(damaged)} bytes, index.json says {len(content)}"):
            FaissIndex.load(folder)
    path.write_bytes(b"garbage!" * (len(content) // 8) + b"g" * (len(content) % 8))
    with pytest.raises(DataError, match="is no index of FAISS"):
        FaissIndex.load(folder)
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        FaissIndex.load(folder)


def test_a_file_of_another_index_is_refused(tmp_path: Path) -> None:
    for name, dimension in (("one", 8), ("other", 4)):
        vectors = np.ones((8 * 4 // dimension, dimension), np.float32)
        FaissIndex.build(np.arange(len(vectors)), vectors).save(tmp_path / name)
    (tmp_path / "other" / "index.faiss").rename(tmp_path / "one" / "index.faiss")
    with pytest.raises(DataError, match=r"holds 8 vectors of 4, index.json says 4 of 8"):
        FaissIndex.load(tmp_path / "one")
