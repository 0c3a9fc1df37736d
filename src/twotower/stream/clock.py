"""Event time: how far it has come in a partition of the log, and in all of them together.

Event time is never later than the log's own clock, whatever a client says. Each record carries the log's clock of the
moment when it was stored (`Record.logged_ms`), so event time is a function of the log alone, and a replay gives the
same rows. Where the log's clock was wrong and comes back, event time comes back with it.

A partition without new events keeps its event time. It no longer holds back the others once these are more than
`idle_ms` ahead of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from twotower.logs.events import ALLOWED_SKEW_MS, REQUEST, Event


@dataclass(frozen=True)
class Clock:
    """How far event time has come in a partition; None before the first event. All are milliseconds since 1970."""

    latest_ms: int | None = None
    """The latest time of an event that moved it."""
    request_ms: int | None = None
    """The latest time of a request."""
    floor_ms: int | None = None
    """What a flush raised the watermark to."""

    def watermark_ms(self, allowed_lateness_ms: int) -> int | None:
        """Nothing is expected any more from before this moment."""
        if self.latest_ms is None:
            return None
        return max(self.latest_ms - allowed_lateness_ms, self.floor_ms or 0)

    def after(self, event: Event, logged_ms: int, window_ms: int) -> "Clock":
        """The clock after the next event of the partition, which the log stored at `logged_ms`.

        In a log of requests, other events move it at most to the end of the window of the latest request. So one client
        with a wrong clock does not close everyone's windows when old events are replayed.
        """
        ts_ms = min(event.ts_ms, logged_ms)
        request_ms = max(self.request_ms or 0, ts_ms) if event.original_type == REQUEST else self.request_ms
        if request_ms is not None and ts_ms > request_ms + window_ms:
            return self
        return Clock(max(self.latest_ms or 0, ts_ms), request_ms, self.floor_ms)

    def is_beyond(self, logged_ms: int) -> bool:
        """Event time is later than the log's clock, which was wrong before and has come back."""
        return self.latest_ms is not None and self.latest_ms > logged_ms + ALLOWED_SKEW_MS

    def back_to(self, logged_ms: int) -> "Clock":
        """The clock once the log's clock has come back to a time."""
        return Clock(logged_ms, None if self.request_ms is None else min(self.request_ms, logged_ms))


@dataclass(frozen=True)
class JoinProgress:
    """How far a partition is joined."""

    watermark_ms: int | None
    """Event time that is joined; None before any event."""
    read_to_end: bool
    """Nothing of the partition's log is left to be joined."""


def joined_until(partitions: Iterable[JoinProgress], idle_ms: int) -> int | None:
    """Event time up to which all partitions are joined; None where one has events and none of them is joined yet.

    A partition that was read to its end is left out if it has no event, or if its watermark is more than `idle_ms`
    behind the latest one.

    >>> busy, idle = JoinProgress(90_000_000, False), JoinProgress(10_000_000, True)
    >>> joined_until([busy, idle], idle_ms=600_000)
    90000000
    """
    partitions = list(partitions)
    latest_ms = max(
        (progress.watermark_ms for progress in partitions if progress.watermark_ms is not None), default=None
    )
    if latest_ms is None:
        return None
    reached = [
        progress.watermark_ms
        for progress in partitions
        if not progress.read_to_end
        or (progress.watermark_ms is not None and progress.watermark_ms >= latest_ms - idle_ms)
    ]
    known = [watermark_ms for watermark_ms in reached if watermark_ms is not None]
    return min(known) if len(known) == len(reached) else None
