from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.channels.queries import queries_of_users
from twotower.config import Settings
from twotower.evaluate.ranking import with_history
from twotower.features.columns import Bag, Column, take
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs.entities import Entity
from twotower.pipeline.line import latest_checkpoint, open_served
from twotower.pipeline.places import places
from twotower.publish.overlay import EntityChanges, Overlay
from twotower.publish.ranker import OnnxRanker
from twotower.publish.version import Version
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.serve.funnel import Served, recommend
from twotower.serve.options import FunnelOptions
from twotower.serve.request import Request
from twotower.serve.users import Recent
from twotower.towers.ranker import Ranker
from twotower.train.checkpoint import load_ranker


@dataclass(frozen=True)
class Side:
    """A published ranker beside the trained one."""

    version: Version
    samples: Samples
    published: OnnxRanker
    trained: Ranker


@pytest.fixture(scope="module", params=["pre_rank", "rank"])
def side(request: pytest.FixtureRequest, world: Settings) -> Side:
    version = open_served(world)
    trained = load_ranker(latest_checkpoint(world, request.param))
    return Side(version, open_samples(places(world).samples), version.rankers[request.param], trained)


def asked(side: Side, user: int, clicks: list[int] | None = None) -> tuple[dict[str, Column], Bag]:
    """One user, with some other history if it is given; -1 = a stranger."""
    samples = side.samples
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.array([user]))
    history = queries.clicks if clicks is None else Bag(np.array([0, len(clicks)]), np.array(clicks, np.int32))
    return dict(queries.features), history


def expected(side: Side, user: dict[str, Column], clicks: Bag, items: dict[str, Column]) -> np.ndarray[Any, Any]:
    logits = side.trained.score(with_history(side.samples, side.trained, user, clicks), items)
    return side.trained.probability(torch.from_numpy(logits)).numpy()


def items_of(side: Side, rows: np.ndarray[Any, Any]) -> dict[str, Column]:
    return {name: take(column, rows) for name, column in side.samples.items.features.items()}


@pytest.mark.parametrize("clicks", [None, [], [5], list(range(60))])
def test_a_published_ranker_gives_the_probabilities_of_the_trained_one(side: Side, clicks: list[int] | None) -> None:
    """For histories of every length, known users and strangers, one candidate and all."""
    for user in (0, 17, -1):
        for rows in (np.array([3]), np.arange(len(side.samples.items))):
            features, history = asked(side, user, clicks)
            found = side.published.score(features, history, rows)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected(side, features, history, items_of(side, rows)), atol=1e-5)


def test_no_candidates_have_no_scores(side: Side) -> None:
    assert side.published.score(*asked(side, 0), np.zeros(0, np.int64)).shape == (0,)


def test_an_item_beyond_the_catalogue_is_one_of_which_nothing_is_known(side: Side) -> None:
    size = len(side.samples.items)
    user, clicks = asked(side, 4)
    nothing: dict[str, Column] = {
        f.name: np.full(1, UNKNOWN, np.int32) if f.name == c.ITEM_ID else f.absent(1)
        for f in side.trained.features.item
    }
    found = side.published.score(user, clicks, np.array([size + 9, 3, size]))
    np.testing.assert_allclose(found[[0, 2]], np.repeat(expected(side, user, clicks, nothing), 2), atol=1e-5)
    np.testing.assert_allclose(found[1:2], side.published.score(user, clicks, np.array([3])), atol=1e-6)
    later = side.published.score(user, Bag(np.array([0, 1]), np.array([size], np.int32)), np.array([3]))
    assert np.isfinite(later).all()


def test_a_user_whose_row_came_after_the_version_is_unknown(side: Side) -> None:
    user, clicks = asked(side, 4)
    spare = FIRST + len(side.version.features.vocabularies[c.USER_ID].values)
    strange = {**user, c.USER_ID: np.array([spare], np.int32)}
    unknown = {**user, c.USER_ID: np.array([UNKNOWN], np.int32)}
    rows = np.arange(20)
    np.testing.assert_array_equal(
        side.published.score(strange, clicks, rows), side.published.score(unknown, clicks, rows)
    )


def test_an_item_that_is_put_is_ranked_by_its_features(side: Side) -> None:
    base, size = side.version, len(side.samples.items)
    new = 10**9 if base.item_ids.type == pa.int64() else "zz new"
    like = {k: v for k, v in base.catalogue.slice(7, 1).to_pylist()[0].items() if k not in (c.ITEM_ID, c.AVAILABLE)}
    known = base.item_ids[30].as_py()
    laid = Overlay(base).lay(EntityChanges(items={new: Entity(features=like), known: Entity(features=like)}))
    name = next(name for name, one in base.rankers.items() if one is side.published)
    user, clicks = asked(side, 4)
    found = laid.rankers[name].score(user, clicks, np.array([size, 7, 30, 8]))
    for place, token in ((0, UNKNOWN), (2, side.samples.items.features[c.ITEM_ID][30])):
        items = {**items_of(side, np.array([7])), c.ITEM_ID: np.array([token], np.int32)}
        np.testing.assert_allclose(found[place], expected(side, user, clicks, items)[0], atol=1e-5)
    before = side.published.score(user, clicks, np.array([7, 8]))
    np.testing.assert_allclose(found[[1, 3]], before, atol=1e-6)


def test_the_funnel_orders_a_page_by_the_published_rankers(side: Side) -> None:
    options = FunnelOptions(retrieve=150, pre_rank=60, rank=30, explore_share=0.0, cosine=0.0)
    who = Request(10, "none", side.version.users.ids[5].as_py())

    def served(version: Version) -> Served:
        return recommend(version, who, Recent(), range(0), options, now_ms=1_800_000_000_000, request_id="r")

    page = served(side.version).page
    assert page.counts == {
        "retrieved": 150, "pre_rank_rejected": 90, "rank_rejected": 30, "ranked_not_shown": 20, "impressed": 10,
    }  # fmt: skip
    scores = [item.score for item in page.items]
    assert scores == sorted(scores, reverse=True)
    assert all(score is not None and 0 < score < 1 for score in scores)
    bare = served(replace(side.version, rankers={})).page
    assert [one.item_id for one in page.items] != [one.item_id for one in bare.items]
