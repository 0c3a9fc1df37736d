from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.features.options import Categorical, Features
from twotower.samples.build import build_samples
from twotower.samples.options import SamplesOptions
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c

START_MS = 1_700_000_000_000
HOUR = Features(context={"hour": Categorical("categorical")})


@dataclass(frozen=True)
class Event:
    user: int
    item: int
    request_ms: int | None
    click_ms: int | None
    weight: float = 1.0


BuildWorld = Callable[..., Samples]


@pytest.fixture
def build_world(tmp_path: Path) -> BuildWorld:
    """Samples of users 0..U-1 and items 0..N-1 with the given clicks; times in milliseconds after a start."""

    def build(events: Sequence[Event], users: int, items: int, features: Features = HOUR) -> Samples:
        day = "date=2023-11-15" if events[0].request_ms is not None else "date=unknown"
        folder = tmp_path / "workspace"
        (folder / "events" / day).mkdir(parents=True)
        pq.write_table(pa.table({c.USER_ID: np.arange(users)}), folder / "users.parquet")
        pq.write_table(pa.table({c.ITEM_ID: np.arange(items)}), folder / "items.parquet")
        times = [
            pa.array([None if at is None else START_MS + at for at in column], pa.int64())
            for column in ([e.request_ms for e in events], [e.click_ms for e in events])
        ]
        table = pa.table(
            {
                c.EVENT_SEQ: np.arange(len(events)),
                c.USER_ID: [e.user for e in events],
                c.ITEM_ID: [e.item for e in events],
                c.REQUEST_TS_MS: times[0],
                c.CLICK_TS_MS: times[1],
                c.OUTCOME: [c.CLICKED] * len(events),
                "stars": pa.array([e.weight for e in events], pa.float32()),
                "hour": [i % 24 for i in range(len(events))],
            }
        )
        pq.write_table(table, folder / "events" / day / "0.parquet")
        build_samples(folder, tmp_path / "samples", features, 8, SamplesOptions(held_out_users=0, weight="stars"))
        return open_samples(tmp_path / "samples")

    return build


@pytest.fixture
def random_events() -> Callable[..., list[Event]]:
    """Clicks at random: strictly rising request times within a user, each click some time after its request."""

    def draw(users: int, items: int, count: int, timed: bool, seed: int = 0) -> list[Event]:
        generator = np.random.default_rng(seed)
        user, item = generator.integers(users, size=count), generator.integers(items, size=count)
        request = generator.permutation(10 * count)[:count]
        click = request + generator.integers(1, 40, size=count)
        return [
            Event(int(u), int(i), int(r) if timed else None, int(k) if timed else None)
            for u, i, r, k in zip(user, item, request, click, strict=True)
        ]

    return draw


@pytest.fixture
def two_camps() -> list[Event]:
    """Sixteen users who like items 0-7 and sixteen who like 8-15, six of the eight each."""
    generator = np.random.default_rng(3)
    events, at = [], 0
    for user in range(32):
        liked: npt.NDArray[np.int64] = generator.permutation(8)[:6] + 8 * (user % 2)
        for item in liked.tolist():
            at += 10
            events.append(Event(user, item, at, at + 1))
    return events
