from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c

CLICKS = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 3)]
Write = Callable[..., None]


@pytest.fixture
def write() -> Write:
    """Writes pairs of a user and an item, and further columns, as a table."""

    def written(path: Path, pairs: list[tuple[int, int]], **more: list[str]) -> None:
        user, item = ([pair[i] for pair in pairs] for i in (0, 1))
        columns = {c.USER_ID: pa.array(user, pa.int64()), c.ITEM_ID: pa.array(item, pa.int64())}
        pq.write_table(pa.table({**columns, **more}), path)

    return written


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    """Four users, the last without clicks, and six items, the last two without."""
    events = tmp_path / "events" / "date=unknown"
    events.mkdir(parents=True)
    pq.write_table(pa.table({c.USER_ID: np.arange(4)}), tmp_path / "users.parquet")
    pq.write_table(pa.table({c.ITEM_ID: np.arange(6)}), tmp_path / "items.parquet")
    none = pa.nulls(len(CLICKS), pa.int64())
    columns = {
        c.EVENT_SEQ: np.arange(len(CLICKS)),
        c.USER_ID: [user for user, _ in CLICKS],
        c.ITEM_ID: [item for _, item in CLICKS],
        c.REQUEST_TS_MS: none,
        c.CLICK_TS_MS: none,
        c.OUTCOME: [c.CLICKED] * len(CLICKS),
    }
    pq.write_table(pa.table(columns), events / "0.parquet")
    build_samples(tmp_path, tmp_path / "samples", Features(), 4)
    return open_samples(tmp_path / "samples")
