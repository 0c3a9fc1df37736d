import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Settings, load
from twotower.datasets.workspace import open_workspace
from twotower.pipeline.line import LATEST
from twotower.pipeline.places import places
from twotower.publish.delta import last_seq
from twotower.publish.publish import list_versions
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import DataError
from twotower.schema.files import read_json
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower_lab.experiments import Way
from twotower_lab.replay import HOUR_MS, LOGGED, Later, first_model, replay, set_aside
from twotower_lab.trials import EXAMPLES

CHANGES = [
    'models.channels=["two_tower"]', "models.rankers=[]", "models.dimension=16", "train.epochs=2",
    "train.batch_size=256", "index.kind='exact'", "samples.vocabulary_room=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Later]:
    """A world of four days, of which two are to be replayed, with its first model; only read."""
    workspace = tmp_path_factory.mktemp("replay") / "workspace"
    simulate_workspace(workspace, WorldOptions(users=250, items=150, days=5, seed=3))
    later = set_aside(workspace, 2, world_of(workspace))
    first_model(load(EXAMPLES / "demo.toml", [f"workspace.path={workspace}", *CHANGES]), workspace, later)
    return workspace, later


@pytest.fixture
def arm(begun: tuple[Path, Later], tmp_path: Path) -> Callable[..., Settings]:
    """The configuration of a copy of the workspace."""

    def configured(*changes: str) -> Settings:
        copied = shutil.copytree(begun[0], tmp_path / "arm", copy_function=os.link)
        return load(EXAMPLES / "demo.toml", [f"workspace.path={copied}", *CHANGES, *changes])

    return configured


def test_every_later_click_has_the_clicks_of_its_user_before_it(begun: tuple[Path, Later]) -> None:
    workspace, later = begun
    assert later.days == ["2026-01-07", "2026-01-08"]
    assert open_workspace(workspace).dates() == ["2026-01-05", "2026-01-06"]
    every = pa.concat_tables([later.before, later.rows.drop_columns(["history"])]).to_pylist()
    every.sort(key=lambda row: row["at"])
    seen: dict[int, list[str]] = {}
    expected = {}
    for row in every:
        expected[row[c.EVENT_SEQ]] = list(seen.get(row[c.USER_ID], []))
        seen.setdefault(row[c.USER_ID], []).append(row[c.ITEM_ID])
    for row, judged in zip(later.rows.to_pylist(), later.judged.tolist(), strict=True):
        before = expected[row[c.EVENT_SEQ]]
        assert row["history"] == before[-LOGGED:]
        assert judged == (row[c.ITEM_ID] not in before)
        assert later.begin_ms <= row[c.REQUEST_TS_MS] <= row["at"] < later.begin_ms + 2 * DAY_MS


def test_a_frozen_model_makes_nothing_and_deltas_come_as_often_as_they_are_to(begun, arm) -> None:
    _, later = begun
    settings = arm()
    world = world_of(Path(settings.workspace.path))
    frozen, facts = replay(settings, Way(), later, world)
    deltas = places(settings).deltas
    assert facts["deltas"] == 0
    assert not deltas.exists() or not list(deltas.rglob("manifest.json"))
    shutil.rmtree(settings.workspace.path)
    settings = arm("update.negatives_move=true")
    learned, facts = replay(settings, Way(every_min=360), later, world)
    [version] = list_versions(places(settings).versions)
    assert facts["deltas"] == last_seq(places(settings).deltas, version.id) == 8
    assert facts["refused"] == 0
    hours = len(frozen["recall@20"])
    assert {len(values) for values in (*frozen.values(), *learned.values())} == {hours}
    assert 0 < frozen["recall@20"].mean() < 1
    same = frozen["recall@20"][0] == learned["recall@20"][0]
    assert same  # nothing was learned before the first hours
    assert (frozen["recall@20"] != learned["recall@20"]).any()


def test_every_night_makes_a_version_of_the_day_before(begun, arm) -> None:
    _, later = begun
    settings = arm()
    _, facts = replay(settings, Way("full", 720), later)
    where = places(settings)
    versions = list_versions(where.versions)
    assert [day["day"] for day in read_json(where.checkpoints / LATEST)["full"]] == later.days[:1]
    # before the new one was promoted, the shards of its own last day were replayed onto it, which it knew
    assert [last_seq(where.deltas, version.id) for version in versions] == [2, 1 + 2]
    assert len(facts["hot_moves"]) == 1
    assert facts["hot_moves"][0] > 0


def test_the_favourites_of_the_hour_before_are_counted(begun, arm) -> None:
    _, later = begun
    values, facts = replay(arm(), Way(crowd="popular"), later)
    clicks = [
        *zip(later.before["at"].to_pylist(), later.rows_of(later.before[c.ITEM_ID].combine_chunks()), strict=True)
    ]
    clicks += zip(later.ts_ms.tolist(), later.item.tolist(), strict=True)
    found: dict[int, list[bool]] = {}
    for place in np.flatnonzero(later.judged).tolist():
        hour_ms = int(later.ts_ms[place]) // HOUR_MS * HOUR_MS
        counts = np.zeros(len(later.item_ids))
        for at, item in clicks:
            counts[item] += hour_ms - HOUR_MS <= at < hour_ms
        counts[later.rows_of(pa.array(later.rows["history"][place].as_py(), pa.string()))] = -1
        order = np.argsort(-counts, kind="stable")[:20]
        item = later.item[place]
        found.setdefault(hour_ms, []).append(bool(item in order and counts[item] > 0))
    expected = [np.mean(one) for _, one in sorted(found.items()) if len(one) >= 20]
    np.testing.assert_allclose(values["recall@20"], expected)
    assert len(facts["by_day"]) == 2


def test_the_neighbours_of_the_hour_before_find_something(begun, arm) -> None:
    values, _ = replay(arm(), Way(crowd="item_cf"), replace(begun[1]))
    assert 0 < values["recall@20"].mean() < 1


def test_more_days_than_there_are_cannot_be_replayed(tmp_path: Path) -> None:
    simulate_workspace(tmp_path / "workspace", WorldOptions(users=50, items=100, days=3, seed=0))
    with pytest.raises(DataError, match="has 2 days: fewer than 2 can be replayed"):
        set_aside(tmp_path / "workspace", 2, None)
