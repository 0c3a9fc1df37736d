"""A published workspace, and what its users do afterwards: events in the log, joined into shards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.config import Settings
from twotower.logs import Event, LocalEventLog
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.streaming import join_log


@pytest.fixture
def learning(own_world: Settings) -> Settings:
    """Small steps, so that there are several."""
    update = replace(own_world.update, batch_size=32, negatives=64, recent=128, rows=100)
    return replace(own_world, update=update)


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
