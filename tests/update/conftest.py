"""A published workspace, and what its users do afterwards: events in the log, joined into shards."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.config import Settings, load
from twotower.logs import Event, LocalEventLog
from twotower.pipeline.line import open_served, run_line
from twotower.pipeline.places import places
from twotower.pipeline.streaming import join_log
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace


def in_small_steps(settings: Settings) -> Settings:
    """Small steps, so that there are several."""
    update = replace(settings.update, batch_size=32, negatives=64, recent=128, rows_per_delta=100)
    return replace(settings, update=update)


@pytest.fixture
def learning(own_world: Settings) -> Settings:
    return in_small_steps(own_world)


@pytest.fixture(scope="session")
def judged_world(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A published world that was trained without a fifth of its users; it is only read."""
    path = tmp_path_factory.mktemp("judged") / "workspace"
    simulate_workspace(path, WorldOptions(users=300, items=300, days=3, seed=1))
    overrides = [
        f"workspace.path={path}", "samples.held_out_users=0.2", "train.epochs=1", "train.batch_size=256",
        "models.dimension=16", 'models.channels=["two_tower", "item_cf", "popular"]', "models.rankers=[]",
    ]  # fmt: skip
    settings = load(Path(__file__).parents[2] / "examples" / "demo.toml", overrides)
    run_line(settings, promoted=True)
    return settings


@pytest.fixture
def judged(judged_world: Settings, tmp_path: Path) -> Settings:
    """The same for a test that changes it."""
    copied = shutil.copytree(judged_world.workspace.path, tmp_path / "judged")
    return in_small_steps(replace(judged_world, workspace=replace(judged_world.workspace, path=str(copied))))


def clicks_of(
    settings: Settings, count: int, seed: int = 0, users: Sequence[Any] | None = None, first_item: int = 0
) -> list[Event]:
    """Clicks of known users on known items after the watermark of the served version."""
    version, generator = open_served(settings), np.random.default_rng(seed)
    who = list(users) if users is not None else version.users.ids.to_pylist()
    items = version.item_ids.to_pylist()[first_item : first_item + 40]
    begin = (version.watermark_ms or 0) + 1000 * seed
    return [
        Event(
            f"c{seed}-{n}",
            "click",
            who[generator.integers(len(who))],
            begin + 1000 * (n + 1),
            body={"item_id": items[generator.integers(len(items))]},
        )
        for n in range(count)
    ]


@pytest.fixture
def happen() -> Callable[[Settings, Sequence[Event]], None]:
    """Appends events to a workspace's log and joins it."""

    def happened(settings: Settings, events: Sequence[Event]) -> None:
        log = LocalEventLog.open(places(settings).log, sync="never")
        log.append(events)
        log.close()
        join_log(settings, follow=False, flush=True, share="1/1")

    return happened


@pytest.fixture
def clicks() -> Callable[..., list[Event]]:
    return clicks_of


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder with its bytes."""
    return bytes_below
