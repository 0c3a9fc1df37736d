import pytest

from twotower.logs import Event
from twotower.stream.clock import Clock, JoinProgress, joined_until

T0 = 1_700_000_000_000
HOUR_MS = 3_600_000


def event(ts_ms: int, kind: str = "click") -> Event:
    return Event("e", kind, 1, ts_ms)


@pytest.mark.parametrize("kind", ["click", "impression", "request", "other"])
def test_nothing_moves_event_time_beyond_the_clock_of_the_log(kind: str) -> None:
    clock = Clock().after(event(T0 + HOUR_MS, kind), logged_ms=T0, window_ms=1000)
    assert clock.latest_ms == T0
    assert clock.request_ms == (T0 if kind == "request" else None)


def test_a_small_step_back_of_the_clock_is_no_jump() -> None:
    clock = Clock().after(event(T0), logged_ms=T0, window_ms=1000)
    assert not clock.is_beyond(T0 - 300_000)
    assert clock.is_beyond(T0 - 300_001)


def test_a_clock_that_comes_back_takes_what_a_flush_raised_with_it() -> None:
    clock = Clock(T0 + HOUR_MS, T0 + HOUR_MS, T0 + 2 * HOUR_MS).back_to(T0)
    assert (clock, clock.watermark_ms(1000)) == (Clock(T0, T0), T0 - 1000)


@pytest.mark.parametrize(
    ("partitions", "reached"),
    [
        ([], None),
        ([JoinProgress(None, True)], None),
        ([JoinProgress(5_000, False), JoinProgress(3_000, False)], 3_000),
        ([JoinProgress(5_000, False), JoinProgress(4_500, True)], 4_500),  # not idle for long enough
        ([JoinProgress(5_000, False), JoinProgress(3_000, True)], 5_000),  # idle
        ([JoinProgress(5_000, True), JoinProgress(3_000, True)], 5_000),
        ([JoinProgress(5_000, True), JoinProgress(None, True)], 5_000),  # never had an event
        ([JoinProgress(5_000, True), JoinProgress(None, False)], None),  # has events that nobody joined yet
    ],
)
def test_an_idle_partition_does_not_hold_the_others(partitions: list[JoinProgress], reached: int | None) -> None:
    assert joined_until(partitions, idle_ms=1_000) == reached
