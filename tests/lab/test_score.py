from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import load
from twotower.evaluate.holdout import Truth, read_truth
from twotower.pipeline.line import build_samples
from twotower.samples.read import open_samples
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower.worlds.truth import clicked_by, first_times
from twotower.worlds.world import NOTHING
from twotower_lab.score import Judge
from twotower_lab.trials import EXAMPLES


def test_the_best_lists_of_the_truth_find_everything_that_is_wanted(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    simulate_workspace(workspace, WorldOptions(users=200, items=150, days=3, seed=5))
    build_samples(load(EXAMPLES / "demo.toml", [f"workspace.path={workspace}"]))
    samples, world = open_samples(workspace / "samples"), world_of(workspace)
    assert world is not None
    item = world.item_rows(samples.items.ids)
    row_of = np.full(len(item), NOTHING)
    row_of[item] = np.arange(len(item))
    clicked = clicked_by(samples, world, item)
    first = first_times(workspace / "holdout.parquet", world)
    first = np.minimum(first, first_times(workspace / "holdout_cold.parquet", world))
    wanted: list[np.ndarray | None] = []

    def best(truth: Truth) -> np.ndarray:
        rows = truth.user_rows
        user = world.user_rows(samples.users.ids.take(pa.array(rows)))
        left_out = clicked.copy()
        if wanted[0] is not None:
            left_out[:, item[~wanted[0]]] = True
        top = world.top(user, first[user], 50, left_out)
        return np.where(top == NOTHING, NOTHING, row_of[top])

    judge = Judge(workspace, world)
    every = list(judge.groups(samples))
    assert [group.name for group in every] == ["", "rare ", "new_user ", "new_item "]
    for group in every:
        wanted[:] = [group.wanted]
        values = judge.score(samples, best)
        assert values[f"{group.name}true_recall@50"].min() == 1.0
        assert len(values[f"{group.name}recall@50"]) == len(group.truth.user_rows)
    # rare ones have half of the held-out clicks, or little more where many items have the same clicks
    warm, rare = every[0].truth.items.rows, every[1].truth.items.rows
    assert 0.5 <= len(rare) / len(warm) < 0.65
    assert samples.item_positives[rare].max() < np.sort(samples.item_positives[warm])[-10:].min()
    assert (samples.item_positives[every[3].truth.items.rows] == 0).all()


def test_lists_of_held_out_clicks_have_all_recall_of_the_log_and_no_truth_is_needed(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    simulate_workspace(workspace, WorldOptions(users=150, items=120, days=3, seed=6))
    build_samples(load(EXAMPLES / "demo.toml", [f"workspace.path={workspace}"]))
    samples = open_samples(workspace / "samples")
    truth = read_truth(workspace / "holdout.parquet", samples)
    lists = np.full((len(samples.users), 50), NOTHING)
    for user, begin, end in zip(truth.user_rows, truth.items.indptr, truth.items.indptr[1:], strict=False):
        lists[user, : end - begin] = truth.items.rows[begin:end]
    values = Judge(workspace).score(samples, lambda truth: lists[truth.user_rows])
    assert values["recall@50"].min() == 1.0
    assert values["ndcg@20"].min() == pytest.approx(1.0)
    assert not [name for name in values if "true" in name]
