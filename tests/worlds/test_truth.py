from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from twotower.evaluate.options import EvaluateOptions
from twotower.worlds.options import WorldOptions
from twotower.worlds.truth import evaluate_by_truth, page_clicks, true_recall
from twotower.worlds.world import NOTHING, Requests, World, make_world

if TYPE_CHECKING:
    from twotower.channels.queries import Queries
    from twotower.channels.retriever import Candidates
    from twotower.config import Settings


@cache
def small() -> World:
    return make_world(WorldOptions(users=50, items=120, days=2, seed=0))


def asked(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    requests = small().requests(1)
    return requests.user[:count], requests.ts_ms[:count]


def test_the_best_list_finds_all_that_is_wanted_and_half_of_it_half() -> None:
    user, ts_ms = asked()
    best = small().top(user, ts_ms, 20)
    found = true_recall(small(), user, ts_ms, best, [5, 10, 20], n=10)
    assert found["true_recall@5"].tolist() == [0.5] * len(user)
    assert found["true_recall@10"].tolist() == [1.0] * len(user)
    assert found["true_recall@20"].tolist() == [1.0] * len(user)


def test_true_recall_is_the_share_counted_by_hand() -> None:
    user, ts_ms = asked(2)
    best = small().top(user, ts_ms, 4)
    worst = small().top(user, ts_ms, 120)
    last = [row[row != NOTHING][-1] for row in worst]
    lists = np.array([[best[0, 3], last[0], best[0, 0]], [last[1], NOTHING, NOTHING]])
    found = true_recall(small(), user, ts_ms, lists, [1, 2, 3], n=4)
    assert found["true_recall@1"].tolist() == [0.25, 0.0]
    assert found["true_recall@2"].tolist() == [0.25, 0.0]
    assert found["true_recall@3"].tolist() == [0.5, 0.0]


def test_what_was_clicked_is_not_wanted_again() -> None:
    user, ts_ms = asked(1)
    best = small().top(user, ts_ms, 3)
    clicked = np.zeros((50, 120), np.bool_)
    clicked[user[0], best[0, :2]] = True
    assert true_recall(small(), user, ts_ms, best, [3], n=2, clicked=clicked)["true_recall@3"].tolist() == [0.5]


def test_the_expected_clicks_of_a_page_are_the_mean_of_its_clicks() -> None:
    user, ts_ms = asked(1)
    page = np.tile(small().top(user, ts_ms, 8), (20_000, 1))
    requests = Requests(
        np.arange(20_000), np.repeat(user, 20_000), np.repeat(ts_ms, 20_000), np.zeros(20_000, np.int64)
    )
    expected = page_clicks(small(), requests, page)
    happened = (small().clicks(requests, page) > 0).sum(axis=1)
    assert expected[0] == pytest.approx(happened.mean(), abs=4 * happened.std() / np.sqrt(20_000))
    assert page_clicks(small(), requests.take(np.array([0])), np.full((1, 8), NOTHING)).tolist() == [0.0]


class Oracle:
    """Knows the truth at the first held-out click."""

    name = "oracle"

    def __init__(self, lists: np.ndarray) -> None:
        self._lists = lists

    def retrieve(self, queries: "Queries", k: int) -> "Candidates":
        from twotower.channels.retriever import Candidates

        rows = self._lists[: len(queries), :k]
        return Candidates(rows, np.zeros(rows.shape, np.float32))


def test_the_report_has_what_could_be_had_beside_what_channels_find(world: "Settings") -> None:
    from twotower.evaluate.holdout import read_truth
    from twotower.samples.read import open_samples
    from twotower.worlds.simulate import world_of
    from twotower.worlds.truth import clicked_by, first_times

    workspace = Path(world.workspace.path)
    samples, of = open_samples(workspace / "samples"), world_of(workspace)
    assert of is not None
    rows = read_truth(workspace / "holdout.parquet", samples).user_rows
    clicked = clicked_by(samples, of, np.arange(300))
    assert clicked.sum() == len({*zip(*np.nonzero(clicked), strict=True)}) > 100
    ts_ms = first_times(workspace / "holdout.parquet", of)[rows]
    oracle = Oracle(of.top(rows, ts_ms, 100, clicked))
    popular = Oracle(np.tile(np.argsort(-samples.item_positives), (len(rows), 1)))
    popular.name = "popular"
    report = evaluate_by_truth(
        samples, workspace, of, [oracle, popular], EvaluateOptions(k=[10, 50, 100], bootstrap=50)
    )
    assert report["oracle"] == report["best"]
    assert report["best"]["true_recall@10"]["value"] == pytest.approx(0.2)
    assert report["best"]["true_recall@50"]["value"] == 1.0
    assert report["popular"]["true_recall@50"]["value"] < 0.7
    assert report["popular"]["page_clicks"]["value"] < report["best"]["page_clicks"]["value"]
    for metric in ("true_recall@10", "page_clicks"):
        more = report["oracle"][metric]["value"] - report["popular"][metric]["value"]
        assert report["popular"][metric]["difference"]["value"] == pytest.approx(more, abs=2e-5)
    low, high = report["popular"]["page_clicks"]["ci95"]
    assert low < report["popular"]["page_clicks"]["value"] < high
    assert (report["users"], report["wanted"], report["page"]) == (len(rows), 50, 8)
