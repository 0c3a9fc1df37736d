from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from twotower.channels.retriever import Queries
from twotower.config import Settings
from twotower.evaluate.calibration import auc
from twotower.evaluate.ranking import Shown, evaluate_ranker, kept_of_top, read_shown, score_shown, user_auc
from twotower.pipeline.line import evaluate_rankers, latest_checkpoint
from twotower.pipeline.places import places
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.towers.ranker import Ranker
from twotower.train.checkpoint import load_ranker


@pytest.fixture(scope="module")
def samples(world: Settings) -> Samples:
    return open_samples(places(world).samples)


@pytest.fixture(scope="module")
def shown(world: Settings, samples: Samples) -> Shown:
    return read_shown(places(world).workspace / "holdout_impressions.parquet", samples)


@pytest.fixture
def model(world: Settings) -> Ranker:
    return load_ranker(latest_checkpoint(world, "rank"))


def test_histories_in_the_held_out_period_go_on_with_its_own_clicks(world: Settings, shown: Shown) -> None:
    table = pq.read_table(places(world).workspace / "holdout_impressions.parquet")
    assert len(shown) == table.num_rows
    assert shown.clicked.sum() == sum(one == c.CLICKED for one in table["outcome"].to_pylist())
    count = len(shown.clicks.ts_ms)
    trained = open_samples(places(world).samples).clicks
    assert count == len(trained.ts_ms) + int(shown.clicked[shown.user_row >= 0].sum())
    for user in range(len(shown.clicks.indptr) - 1):
        assert (np.diff(shown.clicks.ts_ms[shown.clicks.indptr[user] : shown.clicks.indptr[user + 1]]) >= 0).all()


def test_a_held_out_impression_scores_as_the_request_that_it_was(samples: Samples, shown: Shown, model: Ranker) -> None:
    """A click of the same page, or a later one, is not told."""
    scores = score_shown(samples, shown, model)
    later = int(np.flatnonzero(shown.clicked > 0)[0])
    mine = shown.user_row == shown.user_row[later]
    before = mine & (shown.ts_ms <= shown.ts_ms[later])
    clicks = shown.clicks
    forgotten = replace(
        shown, clicks=replace(clicks, ts_ms=np.where(clicks.ts_ms > shown.ts_ms[later], 2**62, clicks.ts_ms))
    )
    np.testing.assert_array_equal(score_shown(samples, forgotten, model)[before], scores[before])


def test_order_is_judged_without_positions_and_probabilities_with_them(
    samples: Samples, shown: Shown, model: Ranker
) -> None:
    figures = evaluate_ranker(samples, shown, model, 10, 0)
    scores = score_shown(samples, shown, model)
    assert figures["auc"] == pytest.approx(auc(scores, shown.clicked), abs=1e-5)
    logits = scores + model.bias(torch.from_numpy(shown.position.astype(np.int64))).detach().numpy()
    p = model.probability(torch.from_numpy(logits)).numpy()
    loss = -np.mean(np.where(shown.clicked > 0, np.log(p), np.log(1 - p)))
    assert figures["log_loss"] == pytest.approx(loss, abs=1e-4)
    assert sum(row["share"] for row in figures["deciles"]) == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        model.position += 1
    moved = evaluate_ranker(samples, shown, model, 10, 0)
    assert moved["auc"] == figures["auc"]
    assert moved["log_loss"] != figures["log_loss"]


def test_the_mean_over_users_is_of_those_who_have_both_kinds(shown: Shown) -> None:
    few = replace(
        shown,
        user_row=np.array([3, 3, 5, 5, 5, 8, -1, -1]),
        clicked=np.array([1.0, 0, 0, 1, 0, 1, 1, 0]),
    )
    found = user_auc(np.array([2.0, 1, 3, 2, 1, 0, 0, 9]), few, 10, 0)
    assert found["users"] == 2
    assert found["user_auc"]["value"] == pytest.approx((1 + 0.5) / 2)


def test_what_the_pre_ranker_keeps_is_counted_among_the_rankers_best(samples: Samples) -> None:
    class ByRow:
        """Scores an item by its row, or from the other end."""

        features = samples.features

        def __init__(self, sign: float) -> None:
            self.sign = sign

        def score(self, user: Any, item: Any) -> np.ndarray[Any, Any]:
            return self.sign * item[c.ITEM_ID]

    numbered = replace(samples.items, features={**samples.items.features, c.ITEM_ID: np.arange(len(samples.items))})
    changed = replace(samples, items=numbered)

    def first_ones(queries: Queries, k: int) -> np.ndarray[Any, Any]:
        return np.tile(np.arange(k), (len(queries), 1))

    def share(one: float, other: float, kept: int) -> Any:
        rankers: Any = (ByRow(one), ByRow(other))
        return kept_of_top(
            changed, np.arange(4), first_ones, *rankers, retrieved=40, kept=kept, top=10, resamples=10, seed=0
        )

    assert share(1, 1, 20)["share"]["value"] == 1
    assert share(-1, 1, 20)["share"]["value"] == 0
    assert share(-1, 1, 35)["share"]["value"] == 0.5
    assert share(1, 1, 35)["share_fused"]["value"] == 0.5  # the best ten are the last of the list
    assert share(1, 1, 20)["users"] == 4
    assert share(1, 1, 40)["share"] is None  # the pre-ranker has nothing to drop


def test_both_rankers_are_judged_in_one_report(world: Settings, samples: Samples) -> None:
    report = evaluate_rankers(world, samples)
    assert report.keys() == {"pre_rank", "rank", "kept_of_top"}
    kept = report["kept_of_top"]
    assert (kept["kept"], kept["top"]) == (world.funnel.pre_rank, world.funnel.rank)
    assert kept["share"]["value"] > kept["share_fused"]["value"]


def test_without_held_out_impressions_rankers_are_not_judged(
    own_world: Settings, samples: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    (places(own_world).workspace / "holdout_impressions.parquet").unlink()
    assert evaluate_rankers(own_world, samples) == {}
    assert "rankers are not judged" in caplog.text


def test_held_out_impressions_that_are_absent_or_of_other_items_are_refused(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rankers are judged by what was shown after their training"):
        read_shown(tmp_path / "holdout_impressions.parquet", samples)
    table = {
        c.USER_ID: [1], c.ITEM_ID: ["nothing"], c.OUTCOME: [c.CLICKED], c.REQUEST_TS_MS: [1], c.CLICK_TS_MS: [1],
        "hour": [1], "scene": ["x"],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="none of them of an item of the samples"):
        read_shown(tmp_path / "other.parquet", samples)
