import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.channels.item_to_item import FILE, ItemToItem
from twotower.channels.options import SwingOptions
from twotower.channels.retriever import Queries
from twotower.channels.swing import click_graph, fit_swing, parts, swing_kernel
from twotower.features.columns import Bag, pointers
from twotower.index.protocol import Exclusions
from twotower.samples.options import EngineOptions
from twotower.samples.read import Clicks
from twotower.schema.errors import ConfigError

Lists = list[list[int]]
PLAIN = SwingOptions(neighbours=1000, popularity=0, normalise=False)


def clicks(lists: Lists) -> Clicks:
    rows = np.array([item for items in lists for item in items], np.int32)
    return Clicks(pointers(np.array([len(items) for items in lists], np.int64)), rows, np.arange(len(rows)))


def neighbours(model: ItemToItem, items: int) -> list[list[tuple[int, float]]]:
    """The answer to a user of one click is that item's neighbours."""
    alone = Bag(np.arange(items + 1), np.arange(items, dtype=np.int32))
    found = model.retrieve(Queries({}, alone, Exclusions.of([[]] * items)), max(2, items))
    return [
        [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(found.rows, found.scores, strict=True)
    ]


def brute_force(users: Lists, items: int, options: SwingOptions = PLAIN) -> list[list[tuple[int, float]]]:
    """Neighbours of each item with their similarity, best first."""
    sets = [set(list(dict.fromkeys(reversed(clicked)))[: options.items]) for clicked in users]
    weight = [(max(1, len(one)) + options.offset) ** -options.activity for one in sets]
    near = np.zeros((items, items))
    for u, v in combinations(range(len(sets)), 2):
        both = sorted(sets[u] & sets[v])
        for i, j in combinations(both, 2):
            near[i, j] += weight[u] * weight[v] / (options.alpha + len(both))
    near = (near + near.T) / np.array([max(1, sum(j in s for s in sets)) for j in range(items)]) ** options.popularity
    return [
        sorted(
            ((j, float(near[i, j])) for j in range(items) if near[i, j]),
            key=lambda pair: (-round(pair[1], 12), pair[0]),
        )[: options.neighbours]
        for i in range(items)
    ]


def check(found: list[list[tuple[int, float]]], wanted: list[list[tuple[int, float]]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        # In float32, answers may tie that differ in float64; then the order is by row.
        assert sorted(row for row, _ in one) == sorted(row for row, _ in other)
        np.testing.assert_allclose([s for _, s in one], [s for _, s in other], rtol=1e-5)


def random_users(count: int, items: int, most: int, seed: int = 0) -> Lists:
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, items + 1, rng.integers(1, most)) ** 2 % items).tolist() for _ in range(count)]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 11), max_size=14), min_size=1, max_size=12),
    st.sampled_from(
        [PLAIN, replace(PLAIN, alpha=0.1, activity=0.0, popularity=0.5), replace(PLAIN, items=4, offset=0.0)]
    ),
)
def test_neighbours_are_those_of_brute_force(users: Lists, options: SwingOptions) -> None:
    check(neighbours(fit_swing(clicks(users), 12, options), 12), brute_force(users, 12, options))


@pytest.mark.parametrize("seed", range(3))
def test_a_catalogue_that_most_items_are_alone_in_gives_the_same_by_hash_tables(seed: int) -> None:
    users = random_users(60, 400, 12, seed)
    check(neighbours(fit_swing(clicks(users), 400, PLAIN), 400), brute_force(users, 400))


def test_three_users_by_hand() -> None:
    found = neighbours(fit_swing(clicks([[0, 1], [0, 1, 2], [2, 1, 0, 3]]), 4, replace(PLAIN, activity=1.0)), 4)
    w = [1 / 7, 1 / 8, 1 / 9]
    assert found[0] == [
        (1, pytest.approx(w[0] * w[1] / 3 + w[0] * w[2] / 3 + w[1] * w[2] / 4)),
        (2, pytest.approx(w[1] * w[2] / 4)),
    ]
    assert found[3] == []  # nobody else clicked it


def test_a_pair_of_users_with_much_in_common_says_less() -> None:
    narrow = neighbours(fit_swing(clicks([[0, 1], [0, 1]]), 12, PLAIN), 12)
    wide = neighbours(fit_swing(clicks([list(range(12))] * 2), 12, replace(PLAIN, activity=0.0)), 12)
    assert narrow[0] == [(1, pytest.approx(7 ** (-0.7) / 3))]
    assert wide[0] == [(item, pytest.approx(1 / 13)) for item in range(1, 12)]


def test_only_the_nearest_are_kept_and_of_equal_ones_the_first() -> None:
    users = random_users(40, 30, 9)
    options = replace(PLAIN, neighbours=3)
    found, wanted = neighbours(fit_swing(clicks(users), 30, options), 30), brute_force(users, 30, options)
    assert [[row for row, _ in one] for one in found] == [[row for row, _ in one] for one in wanted]
    equal = neighbours(fit_swing(clicks([[5, 4, 3, 2, 1, 0]] * 2), 6, options), 6)
    assert [[row for row, _ in one] for one in equal] == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
        [0, 1, 2],
        [0, 1, 2],
    ]


def test_popularity_counts_against_a_candidate() -> None:
    users = [[0, 1, 2], [0, 1, 2], [1], [1], [1]]
    plain, damped = (neighbours(fit_swing(clicks(users), 3, replace(PLAIN, popularity=p)), 3)[0] for p in (0.0, 0.5))
    assert [row for row, _ in plain] == [1, 2]
    assert [row for row, _ in damped] == [2, 1]
    assert dict(damped)[1] == pytest.approx(dict(plain)[1] / 5**0.5)
    assert dict(damped)[2] == pytest.approx(dict(plain)[2] / 2**0.5)


def test_of_an_items_users_so_many_count_and_items_keep_the_same_ones() -> None:
    users = [[0, 1]] * 50 + [[2, 3]] * 5
    graph = click_graph(clicks(users), 4, replace(PLAIN, users=10))
    assert np.diff(graph.item_indptr).tolist() == [10, 10, 5, 5]
    assert graph.user[:10].tolist() == graph.user[10:20].tolist()
    found = neighbours(fit_swing(clicks(users), 4, replace(PLAIN, users=10, activity=0.0)), 4)
    assert found[0] == [(1, pytest.approx(45 / 3))]


def test_who_is_chosen_depends_on_the_user_alone_and_is_spread_evenly() -> None:
    users = [[0]] * 20_000
    chosen = click_graph(clicks(users), 1, replace(PLAIN, users=2_000)).user
    counts = np.bincount(chosen // 1_000, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 43.8  # chi-square, 19 degrees of freedom, 1 in 1000


@pytest.mark.parametrize("options", [PLAIN, SwingOptions(neighbours=7, users=15, items=6)])
def test_any_number_of_parts_and_threads_gives_the_same_bytes(options: SwingOptions, tmp_path: Path) -> None:
    users = random_users(120, 90, 20)
    written = set()
    for threads, memory_gb in ((1, 2.0), (2, 2.0), (5, 2.0), (1, 1e-5), (3, 1e-9)):
        fit_swing(clicks(users), 90, options, EngineOptions(memory_gb=memory_gb, threads=threads)).save(tmp_path)
        written.add((tmp_path / FILE).read_bytes())
    assert len(written) == 1


def test_parts_cover_all_items_once_and_keep_to_their_memory() -> None:
    graph = click_graph(clicks(random_users(200, 90, 20)), 90, PLAIN)
    assert parts(graph, 10**9) == [(0, 90)]
    assert len(parts(graph, 10**9, threads=4)) == 4
    for slots in (1, 100, 1000):
        found = parts(graph, slots)
        assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
        assert found[-1][1] == 90
        assert len(found) >= min(20, 2000 // slots)


def test_a_part_is_the_same_rows_as_of_the_whole() -> None:
    graph = click_graph(clicks(random_users(100, 50, 9)), 50, PLAIN)
    whole, part = (swing_kernel()(graph, first, last, 1.0, 5) for first, last in ((0, 50), (20, 31)))
    of_part = (whole.item >= 20) & (whole.item < 31)
    assert part.item.tolist() == whole.item[of_part].tolist()
    assert part.neighbour.tolist() == whole.neighbour[of_part].tolist()
    assert part.similarity.tobytes() == whole.similarity[of_part].tobytes()


def test_a_user_of_everything_and_an_item_of_everyone_do_not_end_the_job() -> None:
    """Without the caps: 200 million pairs of items, and 200 million pairs of users."""
    users = [list(range(20_000)), *([0, user % 20_000, (user * 7) % 20_000] for user in range(1, 20_000))]
    found = neighbours(fit_swing(clicks(users), 20_000, SwingOptions(), EngineOptions(memory_gb=0.5, threads=1)), 20)
    assert all(len(one) <= 100 for one in found)
    assert found[0]


@pytest.mark.parametrize(("threads", "memory_gb"), [(2, 2.0), (3, 1e-5)])
def test_spark_gives_the_same_bytes(tmp_path: Path, spark: EngineOptions, threads: int, memory_gb: float) -> None:
    """The parts are tasks in processes of their own."""
    users = [list(range(90)), *random_users(120, 90, 20)]
    written = set()
    for engine in (EngineOptions(), replace(spark, threads=threads, memory_gb=memory_gb)):
        fit_swing(clicks(users), 90, SwingOptions(users=50), engine, tmp_path).save(tmp_path)
        written.add((tmp_path / FILE).read_bytes())
    assert len(written) == 1


def test_no_clicks_at_all_give_no_neighbours(tmp_path: Path) -> None:
    model = fit_swing(clicks([[], []]), 3)
    model.save(tmp_path)
    assert neighbours(model, 3) == neighbours(ItemToItem.load("swing", tmp_path), 3) == [[], [], []]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "numba", None)
    swing_kernel.cache_clear()
    yield
    swing_kernel.cache_clear()


def test_without_the_compiler_the_error_says_what_to_install(no_compiler: None) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'twotower\[swing\]'"):
        fit_swing(clicks([[0, 1]]), 2)
