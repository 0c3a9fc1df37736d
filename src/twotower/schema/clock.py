"""The clock, and the events that lie beyond it.

Windows, half-lives, watermarks and cuts are counted back from the latest event, so one event in the future would move
all of them. Such events are left out wherever the events of a workspace are read, and counted.
"""

import datetime
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

log = logging.getLogger(__name__)

ClockMs = Callable[[], int]
"""Gives milliseconds since 1970."""

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS

BEYOND_NOW = "beyond_now"
"""Why an event is left out: one of its times is later than the clock."""


def now_ms() -> int:
    """Milliseconds since 1970, by the clock of this machine."""
    return time.time_ns() // 1_000_000


def day_of(ts_ms: int) -> str:
    """The day of UTC, `YYYY-MM-DD`.

    >>> day_of(0), day_of(86_400_000)
    ('1970-01-01', '1970-01-02')
    """
    return str(datetime.date(1970, 1, 1) + datetime.timedelta(days=ts_ms // DAY_MS))


def until_now(table: pa.Table, times: Sequence[str], now: int, where: str) -> tuple[pa.Table, int]:
    """The events of which no time is later than now, and the number of the others, which a warning tells.

    `times` are columns of integer milliseconds since 1970; absent columns and nulls do not count.
    """
    beyond = pa.array(np.zeros(table.num_rows, np.bool_))
    for name in set(times).intersection(table.column_names):
        beyond = pc.or_(beyond, pc.fill_null(pc.greater(table[name].cast(pa.int64()), now), False))
    left_out = pc.sum(beyond).as_py() or 0
    if not left_out:
        return table, 0
    log.warning("%s: %d of %d rows are later than now and left out", where, left_out, table.num_rows)
    return table.filter(pc.invert(beyond)), left_out
