"""The time of this machine, as the one clock that is handed to whoever needs one."""

import time
from collections.abc import Callable

ClockMs = Callable[[], int]
"""Gives milliseconds since 1970."""


def now_ms() -> int:
    """Milliseconds since 1970 by the clock of this machine."""
    return time.time_ns() // 1_000_000
