"""Logs of events of few users, and rows of every kind of value."""

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from twotower.logs import Event, LocalEventLog
from twotower.stream.rows import Row, RowRequest, Types

T0 = 1_700_000_000_000  # 2023-11-14 22:13:20

TYPES = Types(
    pa.int64(),
    pa.string(),
    {"age": pa.float32(), "tags": pa.list_(pa.string()), "member": pa.bool_()},
    {"hour": pa.int64(), "scene": pa.string()},
)


@pytest.fixture
def types() -> Types:
    return TYPES


@pytest.fixture
def make_events() -> Callable[..., list[Event]]:
    return _events


@pytest.fixture
def many_rows() -> list[Row]:
    """Rows with all kinds of values, and each kind missing."""
    return _rows(30)


def _events(requests: int, seed: int = 0, users: int = 6, step_ms: int = 60_000) -> list[Event]:
    """Requests with clicks, some of them late, some doubled, some before their request, in the order of the log."""
    draw = random.Random(seed)
    events: list[tuple[int, Event]] = []
    for n in range(requests):
        ts_ms, user = T0 + n * step_ms, draw.randrange(users)
        items = [f"item {i}" for i in draw.sample(range(20), 5)]
        body = {
            "items": items, "outcomes": ["impressed"] * 2 + ["ranked_not_shown"] + ["rank_rejected"] * 2,
            "positions": [1, 2, None, None, None], "scores": [draw.random() for _ in items],
            "context": {"hour": ts_ms // 3_600_000 % 24, "scene": draw.choice(["home", "search"])},
            "features": {"age": draw.randrange(80), "tags": ["a", "ü"][: draw.randrange(3)]}, "history": items[:2],
            "version": "v1", "delta_seq": n,
        }  # fmt: skip
        events.append((ts_ms, Event(f"q{n}", "request", user, ts_ms, f"r{n}", body)))
        for k in range(draw.choice([0, 0, 1, 1, 2])):
            after_ms = draw.choice([1000, 60_000, 800_000])
            click = Event(f"c{n}-{k}", "click", user, ts_ms + after_ms, f"r{n}", {"item_id": draw.choice(items[:2])})
            early = after_ms == 1000 and draw.random() < 0.5
            events.append((ts_ms - 500 if early else ts_ms + after_ms, click))
    return [event for _, event in sorted(events, key=lambda pair: pair[0])]


@pytest.fixture
def make_log(tmp_path: Path) -> Callable[..., Path]:
    """Writes a local event log of two partitions and gives its folder."""

    def made(events: list[Event], name: str = "log") -> Path:
        log = LocalEventLog.open(tmp_path / name, partitions=2, sync="never")
        log.append(events)
        log.close()
        return tmp_path / name

    return made


def _rows(requests: int) -> list[Row]:
    rows = []
    for n in range(requests):
        request = RowRequest(
            n * 7919 * (-1) ** n,
            f"r{n}" if n % 4 else None,
            T0 + n,
            {"hour": n % 24, "scene": "hömé"} if n % 3 else {},
            {"age": n / 3, "tags": ["a", "", "bé"][: n % 4], "member": n % 2 == 0} if n % 5 else {},
            [f"item {i}" for i in range(n % 7)] if n % 2 else None,
            "v" * n or None,
            2**40 + n if n % 3 else None,
        )
        rows += [
            Row(request, "clicked one", "clicked", T0 + 2 * n, 1.5, 1, -0.25, "a|b", 1.0, 0.125),
            Row(request, "", "impressed", None, None, 2, None, None, 1.0, None),
            Row(request, "rejected one", "rank_rejected", None, None, None, 0.5, "a", 0.1, None),
        ]
    return rows
