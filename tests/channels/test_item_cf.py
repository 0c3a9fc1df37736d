from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.item_to_item import FILE, ItemToItem
from twotower.channels.options import ItemCFOptions
from twotower.channels.retriever import Queries
from twotower.features.columns import Bag, pointers
from twotower.index.protocol import Exclusions
from twotower.samples.options import EngineOptions
from twotower.samples.read import Clicks, Positives

Lists = list[list[int]]
PLAIN = ItemCFOptions(popularity=0.5, normalise=False)


def bag(lists: Lists) -> Bag:
    return Bag(pointers(np.array([len(x) for x in lists], np.int64)), np.array([i for x in lists for i in x], np.int32))


def clicks(lists: Lists) -> Clicks:
    packed = bag(lists)
    return Clicks(packed.indptr, packed.rows, np.arange(len(packed.rows)))


def queries(lists: Lists, exclude: Lists | None = None) -> Queries:
    return Queries({}, bag(lists), Exclusions.of(exclude or [[]] * len(lists)))


def brute_force(users: Lists, items: int, options: ItemCFOptions = PLAIN) -> list[list[tuple[int, float]]]:
    """Neighbours of each item with their similarity, best first."""
    interests = []
    for clicked in users:
        latest = list(dict.fromkeys(reversed(clicked)))[: options.items]
        repeats = options.interest == "clicks"
        interests.append({item: 1 + log(clicked.count(item)) if repeats else 1.0 for item in latest})
    norm = [sum(one.get(i, 0) ** 2 for one in interests) for i in range(items)]

    def similarity(i: int, j: int) -> float:
        both = sum(one[i] * one[j] / len(one) ** options.activity for one in interests if i in one and j in one)
        return both and both / (norm[i] ** (1 - options.popularity) * norm[j] ** options.popularity)

    return [
        sorted(
            ((j, similarity(i, j)) for j in range(items) if j != i and similarity(i, j)),
            key=lambda pair: (-round(pair[1], 8), pair[0]),
        )[: options.neighbours]
        for i in range(items)
    ]


def neighbours(model: ItemToItem, items: int) -> list[list[tuple[int, float]]]:
    """The answer to a user of one click is that item's neighbours."""
    found = model.retrieve(queries([[item] for item in range(items)]), max(2, items))
    return [
        [(int(row), float(score)) for row, score in zip(rows, scores, strict=True) if row >= 0]
        for rows, scores in zip(found.rows, found.scores, strict=True)
    ]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 11), max_size=14), min_size=1, max_size=12),
    st.sampled_from(
        [
            PLAIN,
            ItemCFOptions(popularity=0.2, activity=1.0, normalise=False),
            ItemCFOptions(popularity=0.7, interest="clicks", normalise=False),
        ]
    ),
)
def test_neighbours_are_those_of_brute_force(users: Lists, options: ItemCFOptions) -> None:
    found = neighbours(fit_item_cf(clicks(users), 12, options), 12)
    for one, wanted in zip(found, brute_force(users, 12, options), strict=True):
        assert sorted(row for row, _ in one) == sorted(row for row, _ in wanted)
        np.testing.assert_allclose([s for _, s in one], [s for _, s in wanted], rtol=1e-5)


def test_two_users_by_hand() -> None:
    found = neighbours(fit_item_cf(clicks([[0, 1], [1, 2, 0, 3]]), 4, PLAIN), 4)
    assert found[2] == [
        (3, pytest.approx(1 / sqrt(4))),
        (0, pytest.approx(1 / sqrt(4) / sqrt(2))),
        (1, pytest.approx(1 / sqrt(4) / sqrt(2))),
    ]
    assert found[0][0] == (1, pytest.approx((1 / sqrt(2) + 1 / sqrt(4)) / 2))


def test_popularity_counts_against_a_candidate_by_its_exponent() -> None:
    users = [[0, 1, 2]] + [[1]] * 7
    for popularity in (0.0, 0.3, 1.0):
        options = ItemCFOptions(popularity=popularity, activity=0.0, normalise=False)
        found = dict(neighbours(fit_item_cf(clicks(users), 3, options), 3)[0])
        assert found == pytest.approx({1: 8**-popularity, 2: 1.0})
        back = dict(neighbours(fit_item_cf(clicks(users), 3, options), 3)[1])
        assert back == pytest.approx({0: 8 ** (popularity - 1), 2: 8 ** (popularity - 1)})


def test_the_weight_of_training_rows_is_the_interest() -> None:
    """0 and 1 weigh 2 and 1 to one user, who has two rows of 1, and 0 and 2 weigh 1 and 3 to the other; 3 nothing."""
    rows = [(0, 0, 2.0), (0, 1, 0.5), (1, 0, 1.0), (1, 2, 3.0), (0, 1, 0.5), (1, 3, 0.0)]
    user, item, weight = (np.array(column) for column in zip(*rows, strict=True))
    count, nothing = len(rows), np.zeros(len(rows), np.int32)
    positives = Positives(
        user.astype(np.int32), item.astype(np.int32), nothing, weight.astype(np.float32), np.arange(count), {},
        nothing, {},
    )  # fmt: skip
    options = ItemCFOptions(popularity=0.5, activity=0.0, interest="weight", normalise=False)
    model = fit_item_cf(clicks([[0, 1], [0, 2, 3]]), 4, options, positives=positives)
    assert neighbours(model, 4)[0] == [(1, pytest.approx(2 / sqrt(5))), (2, pytest.approx(3 / sqrt(5) / 3))]
    assert neighbours(model, 4)[3] == []


def test_only_the_nearest_are_kept() -> None:
    options = ItemCFOptions(popularity=0.5, neighbours=3, normalise=False)
    users = [np.random.default_rng(user).permutation(12)[:6].tolist() for user in range(30)]
    found = neighbours(fit_item_cf(clicks(users), 12, options), 12)
    assert [[row for row, _ in pairs] for pairs in found] == [
        [row for row, _ in pairs] for pairs in brute_force(users, 12, options)
    ]


def test_of_a_user_of_very_many_items_the_latest_count() -> None:
    options = ItemCFOptions(popularity=0.5, items=3, normalise=False)
    users = [[0, 1, 2, 3, 1, 4], [0, 1]]
    found = neighbours(fit_item_cf(clicks(users), 5, options), 5)
    assert [[row for row, _ in pairs] for pairs in found] == [
        [row for row, _ in pairs] for pairs in brute_force(users, 5, options)
    ]
    assert [row for row, _ in found[4]] == [3, 1]  # 1 has two users; 0 and 2 were clicked too long ago


def test_normalised_the_neighbours_of_each_item_sum_to_one() -> None:
    users = [np.random.default_rng(user).permutation(12)[:5].tolist() for user in range(20)]
    found = neighbours(fit_item_cf(clicks(users), 12), 12)
    plain = neighbours(fit_item_cf(clicks(users), 12, ItemCFOptions(normalise=False)), 12)
    for one, other in zip(found, plain, strict=True):
        total = sum(score for _, score in other)
        assert one == [(row, pytest.approx(score / total)) for row, score in other]


def test_a_user_of_everything_and_an_item_of_everyone_do_not_end_the_job() -> None:
    """Without a bound, the one user alone would make 200 million pairs."""
    users = [list(range(20_000)), *([0, user] for user in range(1, 5_000))]
    found = neighbours(fit_item_cf(clicks(users), 20_000, engine=EngineOptions(memory_gb=0.5)), 5)
    assert 0 < len(found[0]) <= 200


def test_users_and_threads_in_any_number_and_order_give_the_same_bytes(tmp_path: Path) -> None:
    users = [np.random.default_rng(user).permutation(200)[:40].tolist() for user in range(300)]
    fit_item_cf(clicks(users), 200, engine=EngineOptions(threads=1)).save(tmp_path)
    one = (tmp_path / FILE).read_bytes()
    fit_item_cf(clicks(users[::-1]), 200, engine=EngineOptions(threads=4)).save(tmp_path)
    assert (tmp_path / FILE).read_bytes() == one


def same_on_spark(users: Lists, items: int, options: ItemCFOptions, spark: EngineOptions, folder: Path) -> bool:
    written = set()
    for engine in (EngineOptions(), spark):
        fit_item_cf(clicks(users), items, options, engine, folder).save(folder)
        written.add((folder / FILE).read_bytes())
    return len(written) == 1


@pytest.mark.parametrize(
    "options", [ItemCFOptions(), ItemCFOptions(interest="clicks", popularity=0.45, activity=0.7, items=30)]
)
def test_spark_gives_the_same_bytes(tmp_path: Path, spark: EngineOptions, options: ItemCFOptions) -> None:
    users = [(np.random.default_rng(user).random(user % 50) ** 2 * 200).astype(int).tolist() for user in range(200)]
    assert same_on_spark(users, 200, options, spark, tmp_path)


def test_a_user_of_everything_and_an_item_of_everyone_give_the_same_bytes_on_spark(
    tmp_path: Path, spark: EngineOptions
) -> None:
    users = [list(range(20_000)), *([0, user] for user in range(1, 2_000))]
    assert same_on_spark(users, 20_000, ItemCFOptions(), spark, tmp_path)


def test_no_clicks_at_all_give_no_neighbours(tmp_path: Path) -> None:
    model = fit_item_cf(clicks([[], []]), 3)
    model.save(tmp_path)
    for answer in (model, ItemToItem.load("item_cf", tmp_path)):
        assert answer.retrieve(queries([[0], []]), 2).rows.tolist() == [[-1, -1]] * 2
