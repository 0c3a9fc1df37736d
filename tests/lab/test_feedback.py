import itertools
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from twotower.config import load
from twotower.datasets.workspace import open_workspace
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import DataError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower.worlds.world import FIRST_DAY_MS, date_of
from twotower_lab.feedback import entropy, feed_back, gini
from twotower_lab.trials import EXAMPLES

CHANGES = [
    'models.channels=["two_tower"]',
    "models.dimension=16",
    "train.epochs=1",
    "train.batch_size=256",
    "samples.negatives.hard_share=0",
    "funnel.explore_share=1.0",
    "models.rankers=[]",
    "samples.held_out_users=0",
]


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    exposure = np.array([3.0, 0.0, 7.0, 1.0, 1.0])
    pairs = np.abs(exposure[:, None] - exposure[None, :]).mean()
    assert gini(exposure) == pytest.approx(pairs / 2 / exposure.mean())


def test_entropy_is_one_of_an_even_exposure_alone() -> None:
    assert entropy(np.full(7, 3.0)) == pytest.approx(1.0)
    assert (
        0
        < entropy(np.array([9.0, 1.0, 0.0]))
        < entropy(np.array([5.0, 5.0, 0.0]))
        == pytest.approx(np.log(2) / np.log(3))
    )


def test_the_loop_serves_learns_and_serves_again(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    simulate_workspace(workspace, WorldOptions(users=200, items=150, days=3, seed=4))
    settings = load(EXAMPLES / "demo.toml", [f"workspace.path={workspace}", *CHANGES])
    before = open_workspace(workspace).events()
    values, facts = feed_back(settings, days=2)
    after = open_workspace(workspace)
    assert after.dates()[-2:] == [str(date_of(2)), str(date_of(3))]
    events = after.events()
    assert events.slice(0, before.num_rows).select(before.column_names).equals(before)
    # the second day's model has learned from what the first day's model showed
    samples = open_samples(workspace / "samples")
    first_day = pc.less(pc.subtract(events[c.REQUEST_TS_MS], FIRST_DAY_MS), 3 * DAY_MS)
    clicked = pc.equal(events[c.OUTCOME], c.CLICKED)
    assert len(samples.positives) == pc.sum(pc.and_(first_day, clicked)).as_py()
    # everyone who came meanwhile, and everything new, is known
    world = world_of(workspace)
    assert world is not None
    assert len(samples.users) == world.users(3).num_rows
    assert len(samples.items) == world.items(3).num_rows
    # no user was shown an item again that they had clicked, or seen within a day
    shown = events.slice(before.num_rows)
    pairs: dict[tuple, list[int]] = {}
    for user, item, ts_ms in zip(
        *(shown[name].to_pylist() for name in (c.USER_ID, c.ITEM_ID, c.REQUEST_TS_MS)), strict=True
    ):
        pairs.setdefault((user, item), []).append(ts_ms)
    assert all(b - a > DAY_MS for times in pairs.values() for a, b in itertools.pairwise(times))
    series = facts["series"]
    assert {len(days) for days in series.values()} == {2}
    assert values["gini, last days"].tolist() == [pytest.approx(np.mean(series["gini"]))]
    assert 0 < series["coverage"][0] <= 1
    assert 0 < series["true_recall@50"][1] < 1


def test_only_a_world_can_be_served_again(tmp_path: Path, odd_world) -> None:
    with pytest.raises(DataError, match="holds no simulated world"):
        feed_back(odd_world, days=1)
