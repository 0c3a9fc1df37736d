"""What every recall channel must do, on a small simulated world of every kind of user and item."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from twotower.channels.als import ALS
from twotower.channels.fit import LOADERS, Counted
from twotower.channels.item_cf import fit_item_cf
from twotower.channels.options import ALSOptions, SameCategoryOptions
from twotower.channels.popular import Popular
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Candidates, Queries, Retriever, WithoutItems, similar_items
from twotower.channels.same_category import SameCategory
from twotower.channels.swing import fit_swing
from twotower.channels.vector_channel import VectorChannel
from twotower.features.columns import Bag
from twotower.features.feature_set import FeatureSet
from twotower.features.options import Categorical, Features, Sequence
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions
from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples
from twotower.towers.options import TowerOptions
from twotower.towers.two_tower import TwoTower
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

FEATURES = Features(
    user={"user_id": Categorical("categorical"), "history": Sequence("sequence", last=10)},
    item={"item_id": Categorical("categorical"), "category": Categorical("categorical")},
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    folder = tmp_path_factory.mktemp("world")
    simulate_workspace(folder / "workspace", WorldOptions(users=60, items=120, days=3, seed=0))
    build_samples(folder / "workspace", folder / "samples", FEATURES, 8)
    return open_samples(folder / "samples")


def two_tower(samples: Samples) -> Retriever:
    return vector_channel("two_tower", samples, samples.features, TowerOptions("dnn", []))


def vector_channel(name: str, samples: Samples, features: FeatureSet, network: TowerOptions) -> Retriever:
    model = TwoTower(features, 8, network, network).eval()
    history = samples.features.history
    assert history is not None
    vectors = model.encode_items(samples.items.features)
    index = ExactIndex.build(np.arange(len(samples.items)), vectors)
    tokens = history.vocabulary.rows(samples.items.ids)
    return VectorChannel(name, features, tokens, model.encode_users, index, vectors)


CHANNELS: dict[str, Callable[[Samples], Retriever]] = {
    "two_tower": two_tower,
    "mind": lambda samples: vector_channel(
        "mind", samples, samples.features.with_interests(3, 3), TowerOptions("dnn", [8])
    ),
    "mf": lambda samples: vector_channel("mf", samples, samples.features.of_ids(), TowerOptions("none", [])),
    "item_cf": lambda samples: fit_item_cf(samples.clicks, len(samples.items)),
    "swing": lambda samples: fit_swing(samples.clicks, len(samples.items)),
    "als": lambda samples: ALS.fit(samples.clicks, len(samples.items), ALSOptions(factors=8), threads=1, seed=0),
    "same_category": lambda samples: SameCategory.fit(samples, SameCategoryOptions(["category"], last=20, items=50)),
    "popular": Popular.fit,
    "popular without some": lambda samples: WithoutItems(Popular.fit(samples), odd(samples)),
    "item_cf without some": lambda samples: WithoutItems(fit_item_cf(samples.clicks, len(samples.items)), odd(samples)),
}


def odd(samples: Samples) -> NDArray[np.bool_]:
    return np.arange(len(samples.items)) % 2 == 1


@dataclass(frozen=True)
class Asked:
    channel: Retriever
    samples: Samples

    def queries(self, user_rows: list[int], exclude_clicks: bool = True) -> Queries:
        clicks = self.samples.clicks
        exclude = clicks.items if exclude_clicks else None
        rows = np.array(user_rows, np.int64)
        return queries_of_users(self.samples.features, self.samples.users, clicks, rows, exclude=exclude)


@pytest.fixture(params=CHANNELS)
def asked(request: pytest.FixtureRequest, samples: Samples) -> Asked:
    return Asked(CHANNELS[request.param](samples), samples)


def check(found: Candidates, queries: Queries, k: int, items: int) -> None:
    """No item twice, none that is excluded, best first with ties by row, padding at the end alone."""
    assert found.rows.shape == found.scores.shape == (len(queries), k)
    assert (found.rows.dtype, found.scores.dtype) == (np.int64, np.float32)
    for user, (rows, scores) in enumerate(zip(found.rows, found.scores, strict=True)):
        excluded = queries.exclude.rows[queries.exclude.indptr[user] : queries.exclude.indptr[user + 1]]
        count = int((rows >= 0).sum())
        assert rows[count:].tolist() == [-1] * (k - count)
        assert np.isneginf(scores[count:]).all()
        assert np.isfinite(scores[:count]).all()
        best = rows[:count].tolist()
        assert len(set(best)) == count
        assert not set(best) & set(excluded.tolist())
        assert all(row < items for row in best)
        assert list(zip((-scores[:count]).tolist(), best, strict=True)) == sorted(
            zip((-scores[:count]).tolist(), best, strict=True)
        )


def same(one: Candidates, other: Candidates) -> None:
    np.testing.assert_array_equal(one.rows, other.rows)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("k", [1, 7, 500])
@pytest.mark.parametrize("exclude_clicks", [True, False])
def test_lists_are_whole_ordered_and_without_what_is_excluded(asked: Asked, k: int, exclude_clicks: bool) -> None:
    queries = asked.queries(list(range(len(asked.samples.users))), exclude_clicks)
    check(asked.channel.retrieve(queries, k), queries, k, len(asked.samples.items))


def test_a_shorter_list_is_the_beginning_of_a_longer_one(asked: Asked) -> None:
    queries = asked.queries(list(range(20)))
    long, short = asked.channel.retrieve(queries, 60), asked.channel.retrieve(queries, 5)
    same(short, Candidates(long.rows[:, :5], long.scores[:, :5]))


def test_a_user_of_whom_nothing_is_known_is_answered(asked: Asked) -> None:
    queries = asked.queries([-1, 0, -1])
    found = asked.channel.retrieve(queries, 5)
    check(found, queries, 5, len(asked.samples.items))
    np.testing.assert_array_equal(found.rows[0], found.rows[2])
    if asked.channel.name in ("two_tower", "mind", "popular"):  # others know nothing without clicks or an id
        assert (found.rows[0] >= 0).all()


def test_a_user_who_is_offered_nothing_gets_padding(asked: Asked) -> None:
    everything = np.arange(len(asked.samples.items), dtype=np.int32)
    users = len(asked.samples.users)
    whole = Bag(np.arange(users + 1) * len(everything), np.tile(everything, users))
    clicks = asked.samples.clicks
    queries = queries_of_users(asked.samples.features, asked.samples.users, clicks, np.array([0, 3]), exclude=whole)
    assert asked.channel.retrieve(queries, 3).rows.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("k", [1, 7, 500])
def test_similar_items_are_whole_ordered_and_never_the_item_itself(asked: Asked, k: int) -> None:
    rows = np.arange(len(asked.samples.items))
    found = similar_items(asked.channel, rows, k)
    if found is None:
        assert asked.channel.name in ("als", "same_category", "popular")
        return
    itself = Exclusions.of(rows[:, None].tolist())
    queries = Queries({}, Bag(np.zeros(len(rows) + 1, np.int64), np.zeros(0, np.int32)), itself)
    check(found, queries, k, len(rows))
    some = similar_items(asked.channel, rows[[5, 3]], min(k, 3))
    assert some is not None
    same(some, Candidates(found.rows[[5, 3], :3], found.scores[[5, 3], :3]))


def test_no_users_get_no_lists(asked: Asked) -> None:
    assert asked.channel.retrieve(asked.queries([]), 4).rows.shape == (0, 4)


def test_an_answer_does_not_depend_on_the_other_users(asked: Asked) -> None:
    together = asked.channel.retrieve(asked.queries(list(range(30))), 10)
    for user in range(30):
        alone = asked.channel.retrieve(asked.queries([user]), 10)
        np.testing.assert_allclose(alone.scores[0], together.scores[user], rtol=1e-5, atol=1e-6)


def test_eight_threads_get_the_answers_of_one(asked: Asked) -> None:
    queries = [asked.queries([user, user + 1]) for user in range(30)]
    alone = [asked.channel.retrieve(query, 10) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        for place, found in enumerate(pool.map(lambda query: asked.channel.retrieve(query, 10), queries * 4)):
            same(found, alone[place % 30])


@pytest.mark.parametrize("name", ["item_cf", "swing", "als", "same_category", "popular"])
def test_a_saved_channel_answers_alike_and_saves_the_same_bytes(name: str, samples: Samples, tmp_path: Path) -> None:
    channel = CHANNELS[name](samples)
    assert isinstance(channel, Counted)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
    channel.save(tmp_path / "one")
    loaded = LOADERS[name](tmp_path / "one")
    queries = Asked(channel, samples).queries(list(range(60)))
    same(loaded.retrieve(queries, 20), channel.retrieve(queries, 20))
    loaded.save(tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
