from typing import Any

import numpy as np
import pytest

from twotower.config import Settings
from twotower.evaluate.holdout import Truth
from twotower.features.columns import Bag
from twotower.pipeline.line import open_served
from twotower.publish.version import Version
from twotower.serve.options import FunnelOptions
from twotower_lab.stages import Stages


def funnel(retrieve: int, pre_rank: int) -> FunnelOptions:
    return FunnelOptions(retrieve=retrieve, pre_rank=pre_rank, rank=pre_rank, page=1, cosine=0)


EVERYTHING = funnel(10**6, 10)


def truth(users: Any) -> Truth:
    """Users with nothing held out: only who asks matters."""
    return Truth(np.asarray(users), Bag(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32)))


@pytest.fixture(scope="module")
def version(world: Settings) -> Version:
    return open_served(world)


def asked(version: Version, user: int) -> Any:
    clicks = version.clicks
    return version.queries(np.array([user]), exclude=clicks.items)


def test_a_ranker_over_everything_orders_the_whole_catalogue_but_what_was_clicked(version: Version) -> None:
    users = np.flatnonzero(np.diff(version.clicks.indptr))[:3]
    found = Stages(version, ["rank"], EVERYTHING).lists(truth(users))
    for user, listed in zip(users.tolist(), found, strict=True):
        queries = asked(version, user)
        scores = version.rankers["rank"].score(queries.features, queries.clicks, np.arange(len(version.item_ids)))
        scores[queries.clicks.rows] = -np.inf
        np.testing.assert_allclose(scores[listed], np.sort(scores)[::-1][: len(listed)])


def test_without_rankers_it_is_the_two_towers_list(version: Version) -> None:
    users = np.flatnonzero(np.diff(version.clicks.indptr))[:3]
    found = Stages(version, [], funnel(100, 100)).lists(truth(users))
    for user, listed in zip(users.tolist(), found, strict=True):
        assert listed.tolist() == version.two_tower.retrieve(asked(version, user), 50).rows[0].tolist()


def test_behind_a_pre_ranker_only_what_it_keeps_is_ranked(version: Version) -> None:
    user = int(np.argmax(np.diff(version.clicks.indptr)))
    queries = asked(version, user)
    retrieved = version.two_tower.retrieve(queries, 100).rows[0]
    kept = retrieved[np.argsort(-version.rankers["pre_rank"].score(queries.features, queries.clicks, retrieved))[:20]]
    found = Stages(version, ["pre_rank", "rank"], funnel(100, 20)).lists(truth([user]))[0]
    assert set(found[:20]) == set(kept)
    assert set(found) <= set(retrieved)


def test_a_ranker_over_many_items_costs_more_than_behind_two_towers(version: Version) -> None:
    alone = Stages(version, ["rank"], EVERYTHING).cost_ms(20_000)
    assert alone > 3 * Stages(version, ["rank"], funnel(200, 200)).cost_ms(20_000) > 0
