from collections.abc import Callable
from dataclasses import replace
from math import log, sqrt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.config import settings as spec
from twotower.datasets.importers import import_dataset
from twotower.features.columns import Bag, pointers
from twotower.index.protocol import Exclusions
from twotower.models import item_cf
from twotower.models.item_cf import ItemCF
from twotower.models.retriever import Queries
from twotower.samples import build_samples, open_samples
from twotower.samples.engine import open_engine
from twotower.samples.read import Clicks

Lists = list[list[int]]


def bag(lists: Lists) -> Bag:
    return Bag(pointers(np.array([len(x) for x in lists], np.int64)), np.array([i for x in lists for i in x], np.int32))


def clicks(lists: Lists) -> Clicks:
    packed = bag(lists)
    return Clicks(packed.indptr, packed.rows, np.arange(len(packed.rows)))


def queries(lists: Lists, exclude: Lists | None = None) -> Queries:
    return Queries({}, bag(lists), Exclusions.of(exclude or [[]] * len(lists)))


def brute_force(
    users: Lists, items: int, kept: int, most: int = 500, damped: bool = True
) -> list[list[tuple[int, float]]]:
    """Neighbours of each item with their similarity, best first."""
    sets = []
    for clicked in users:
        latest = list(dict.fromkeys(reversed(clicked)))[:most]
        sets.append((set(latest), 1 / log(2 + len(latest)) if damped else 1.0))
    norm = [sum(i in s for s, _ in sets) for i in range(items)]
    both = [[sum(w for s, w in sets if i in s and j in s) for j in range(items)] for i in range(items)]
    return [
        sorted(
            ((j, both[i][j] / sqrt(norm[i] * norm[j])) for j in range(items) if j != i and both[i][j]),
            key=lambda pair: (-round(pair[1], 12), pair[0]),
        )[:kept]
        for i in range(items)
    ]


def neighbours(model: ItemCF, items: int) -> list[list[tuple[int, float]]]:
    """The answer to a user of one click is that item's neighbours."""
    found = model.retrieve(queries([[item] for item in range(items)]), max(2, items))
    return [
        [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(found.rows, found.scores, strict=True)
    ]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 11), max_size=14), min_size=1, max_size=12))
def test_neighbours_are_those_of_brute_force(users: Lists) -> None:
    expected = brute_force(users, 12, item_cf.NEIGHBOURS)
    for found, wanted in zip(neighbours(ItemCF.fit(clicks(users), 12), 12), expected, strict=True):
        assert [row for row, _ in found] == [row for row, _ in wanted]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in wanted], rtol=1e-6)


def test_two_users_by_hand() -> None:
    found = neighbours(ItemCF.fit(clicks([[0, 1], [1, 2, 0, 3]]), 4), 4)
    assert found[2] == [
        (3, pytest.approx(1 / log(6))),
        (0, pytest.approx(1 / log(6) / sqrt(2))),
        (1, pytest.approx(1 / log(6) / sqrt(2))),
    ]
    assert found[0][0] == (1, pytest.approx((1 / log(4) + 1 / log(6)) / 2))


def test_only_the_nearest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_cf, "NEIGHBOURS", 3)
    users = [np.random.default_rng(user).permutation(12)[:6].tolist() for user in range(30)]
    found = neighbours(ItemCF.fit(clicks(users), 12), 12)
    assert [[row for row, _ in pairs] for pairs in found] == [
        [row for row, _ in pairs] for pairs in brute_force(users, 12, 3)
    ]


def test_of_a_user_of_very_many_items_the_latest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_cf, "MOST_ITEMS", 3)
    users = [[0, 1, 2, 3, 1, 4], [0, 1]]
    found = neighbours(ItemCF.fit(clicks(users), 5), 5)
    assert [[row for row, _ in pairs] for pairs in found] == [
        [row for row, _ in pairs] for pairs in brute_force(users, 5, 100, most=3)
    ]
    assert [row for row, _ in found[4]] == [3, 1]  # 1 has two users; 0 and 2 were clicked too long ago


def test_scores_add_up_over_the_different_clicks_of_a_user() -> None:
    users = [np.random.default_rng(user).permutation(12)[:5].tolist() for user in range(20)]
    similar = brute_force(users, 12, 100)
    scores = dict.fromkeys(range(12), 0.0)
    for item in (3, 7):
        for other, similarity in similar[item]:
            scores[other] += similarity
    expected = sorted((row for row in scores if scores[row] and row not in (3, 7)), key=lambda row: (-scores[row], row))
    found = ItemCF.fit(clicks(users), 12).retrieve(queries([[3, 7, 3]], [[3, 7]]), 12)
    assert found.rows[0].tolist() == expected + [-1] * (12 - len(expected))
    np.testing.assert_allclose(found.scores[0, : len(expected)], [scores[row] for row in expected], rtol=1e-6)


def test_only_the_latest_clicks_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_cf, "LATEST", 2)
    model = ItemCF.fit(clicks([[0, 1], [2, 3], [4, 5]]), 6)
    assert model.retrieve(queries([[0, 2, 4]]), 3).rows.tolist() == [[3, 5, -1]]


def test_few_users_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    users = [np.random.default_rng(user).permutation(12)[: user % 6].tolist() for user in range(20)]
    model = ItemCF.fit(clicks(users), 12)
    whole = model.retrieve(queries(users, users), 5)
    monkeypatch.setattr(item_cf, "_ENTRIES", 1)
    parts = model.retrieve(queries(users, users), 5)
    np.testing.assert_array_equal(whole.rows, parts.rows)
    np.testing.assert_array_equal(whole.scores, parts.scores)


def test_users_and_threads_in_any_number_and_order_give_the_same_bytes(tmp_path: Path) -> None:
    users = [np.random.default_rng(user).permutation(200)[:40].tolist() for user in range(300)]
    ItemCF.fit(clicks(users), 200, spec.Engine(threads=1)).save(tmp_path)
    one = (tmp_path / item_cf.FILE).read_bytes()
    ItemCF.fit(clicks(users[::-1]), 200, spec.Engine(threads=4)).save(tmp_path)
    assert (tmp_path / item_cf.FILE).read_bytes() == one


def saved(users: Lists, items: int, engine: spec.Engine, folder: Path) -> bytes:
    ItemCF.fit(clicks(users), items, engine).save(folder)
    return (folder / item_cf.FILE).read_bytes()


def test_spark_gives_the_same_bytes(tmp_path: Path, spark: spec.Engine) -> None:
    users = [np.random.default_rng(user).permutation(200)[: user % 50].tolist() for user in range(200)]
    assert saved(users, 200, spark, tmp_path) == saved(users, 200, spec.Engine(), tmp_path)


def test_a_user_of_very_many_items_and_an_item_of_all_users_give_the_same_bytes_on_spark(
    tmp_path: Path, spark: spec.Engine
) -> None:
    """Without a bound, the one user alone would make 200 million pairs."""
    users = [np.random.default_rng(0).permutation(20_000).tolist(), *([0, user] for user in range(1, 2_000))]
    one = saved(users, 20_000, spec.Engine(), tmp_path)
    assert saved(users, 20_000, spark, tmp_path) == one
    assert len(ItemCF.load(tmp_path)._neighbours.rows) <= 20_000 * item_cf.NEIGHBOURS


def test_movielens_gives_the_same_bytes_on_spark(
    tmp_path: Path, real_data: Callable[[str], Path], spark: spec.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_cf, "MOST_ITEMS", 100)  # pairs by the million, not by ten millions
    import_dataset("movielens-1m", real_data("ml-1m"), tmp_path / "ml", holdout="time:0.9", positive="4")
    build_samples(tmp_path / "ml", tmp_path / "samples", spec.Features(), 8)
    samples = open_samples(tmp_path / "samples")
    written = []
    for engine in (spec.Engine(), replace(spark, options={})):
        ItemCF.fit(samples.clicks, len(samples.items), engine).save(tmp_path)
        written.append((tmp_path / item_cf.FILE).read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) > 2_000_000


def test_users_of_any_number_of_items_weigh_the_same_on_spark(tmp_path: Path, spark: spec.Engine) -> None:
    """Each size of a user is there: the logarithms of both engines round to the same whole numbers."""
    sizes = pa.table({"user": np.repeat(np.arange(500), np.arange(1, 501)), "item": np.arange(125_250)})
    sizes = sizes.append_column("place", pa.array(np.arange(125_250)))
    found = []
    for engine in (spec.Engine(), spark):
        with open_engine(engine, tmp_path / engine.name) as opened:
            weights = item_cf._edges(opened.put("clicks", sizes)).select("user", "weight").distinct()
            found.append(opened.fetch(weights.order_by("user")).column("weight").to_pylist())
    assert found[0] == found[1]
    assert found[0] == [round(2**30 / log(2 + size)) for size in range(1, 501)]


def test_no_clicks_at_all_give_no_neighbours(tmp_path: Path) -> None:
    model = ItemCF.fit(clicks([[], []]), 3)
    model.save(tmp_path)
    for answer in (model, ItemCF.load(tmp_path)):
        assert answer.retrieve(queries([[0], []]), 2).rows.tolist() == [[-1, -1]] * 2
