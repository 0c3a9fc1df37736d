from pathlib import Path

import numpy as np
import pytest

from twotower.channels.lists import WeighedLists
from twotower.channels.options import SameCategoryOptions
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries
from twotower.channels.same_category import SameCategory
from twotower.features.columns import Bag
from twotower.features.options import Categorical, Features, Numeric
from twotower.index.protocol import Exclusions
from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples
from twotower.schema.errors import ConfigError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("world")
    simulate_workspace(folder / "workspace", WorldOptions(users=60, items=120, days=3, seed=0))
    features = Features(
        user={"user_id": Categorical("categorical")},
        item={
            "item_id": Categorical("categorical"),
            "category": Categorical("categorical"),
            "author": Categorical("categorical"),
            "age_days": Numeric("numeric"),
        },
    )
    build_samples(folder / "workspace", folder / "samples", features, 8)
    return open_samples(folder / "samples")


def test_a_score_is_the_users_share_of_each_category_times_the_items_share_of_it() -> None:
    categories = Bag(np.array([0, 1, 3, 4, 4]), np.array([0, 0, 1, 1], np.int32))
    items = Bag(np.array([0, 2, 4]), np.array([0, 1, 2, 1], np.int32))
    channel = SameCategory(categories, WeighedLists(items, np.array([0.75, 0.25, 0.8, 0.2], np.float32)), last=3)
    clicks = Bag(np.array([0, 4, 5, 5]), np.array([2, 1, 1, 0, 3], np.int32))
    found = channel.retrieve(Queries({}, clicks, Exclusions.of([[], [], []])), 3)
    # The latest three clicks are of items 1, 1 and 0: category 0 three times of five, category 1 twice.
    expected = {0: 0.6 * 0.75, 1: 0.6 * 0.25 + 0.4 * 0.2, 2: 0.4 * 0.8}
    assert found.rows.tolist() == [[0, 2, 1], [-1] * 3, [-1] * 3]
    np.testing.assert_allclose(found.scores[0], [expected[row] for row in (0, 2, 1)], rtol=1e-6)


def test_items_like_an_item_are_those_of_its_categories_without_itself() -> None:
    categories = Bag(np.array([0, 1, 3, 4, 4]), np.array([0, 0, 1, 1], np.int32))
    items = Bag(np.array([0, 2, 4]), np.array([0, 1, 2, 1], np.int32))
    channel = SameCategory(categories, WeighedLists(items, np.array([0.75, 0.25, 0.8, 0.2], np.float32)), last=3)
    found = channel.similar(np.array([1, 0, 3]), 2)
    assert found.rows.tolist() == [[2, 0], [1, -1], [-1, -1]]
    np.testing.assert_allclose(found.scores[0], [0.5 * 0.8, 0.5 * 0.75], rtol=1e-6)


def test_the_lists_are_those_of_a_count_by_hand(samples: Samples) -> None:
    channel = SameCategory.fit(samples, SameCategoryOptions(["category", "author"], last=50, items=7))
    tokens = {name: samples.items.features[name] for name in ("category", "author")}
    user = int(np.argmax(np.diff(samples.clicks.indptr)))
    clicked = samples.clicks.item_row[slice(*samples.clicks.indptr[user : user + 2])][-50:]
    expected = np.zeros(len(samples.items))
    for column in tokens.values():
        assert isinstance(column, np.ndarray)
        for token in column[clicked]:
            rows = np.flatnonzero((column == token) & (samples.item_positives > 0))
            best = rows[np.lexsort((rows, -samples.item_positives[rows]))][:7]
            expected[best] += samples.item_positives[best] / samples.item_positives[rows].sum() / (2 * len(clicked))
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.array([user]))
    found = channel.retrieve(queries, 20)
    np.testing.assert_allclose(found.scores[0], np.sort(expected)[::-1][:20], rtol=1e-5)
    np.testing.assert_allclose(expected[found.rows[0]], found.scores[0], rtol=1e-5)


def test_a_saved_channel_answers_alike(samples: Samples, tmp_path: Path) -> None:
    channel = SameCategory.fit(samples, SameCategoryOptions(["category"], last=5, items=50))
    channel.save(tmp_path)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.arange(60))
    one, other = SameCategory.load(tmp_path).retrieve(queries, 9), channel.retrieve(queries, 9)
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.scores, other.scores)


def test_an_attribute_that_is_no_category_is_refused(samples: Samples) -> None:
    with pytest.raises(ConfigError, match=r"age_days is no categorical feature of items; there are author, category"):
        SameCategory.fit(samples, SameCategoryOptions(["category", "age_days"]))
    with pytest.raises(ConfigError, match="needs at least one"):
        SameCategory.fit(samples, SameCategoryOptions())
