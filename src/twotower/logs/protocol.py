"""What an event log promises.

An event log keeps raw events in the order in which they came, split into partitions by user. A reader keeps an offset
for each partition and finds there, days later, the same events in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from twotower.logs.events import Event
from twotower.schema.errors import DataError, TwotowerError

Sync = Literal["always", "interval", "never"]
"""When an event is acknowledged: on disk, before the next flush of a clock, or once it is written."""


class EventLogError(TwotowerError):
    """The log cannot do what was asked: a full disk, a second writer, a lost connection. Nothing was acknowledged."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Says that an event is in the log: where it stands, and whether it stood there before."""

    partition: int
    offset: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place in a partition; reading goes on at `next_offset`."""

    offset: int
    next_offset: int
    event: Event
    logged_ms: int
    """The log's clock when it stored the event: nothing that a client says moves event time beyond it."""


class EventLog(Protocol):
    """An append-only log of events, in partitions by user.

    - All events of a user are in one partition (`partition_of`), in the order in which they were appended.
    - An offset is an integer that rises within a partition and is opaque otherwise: use 0 for the earliest kept event,
      and offsets that the log itself gave. The event at an offset never changes, but it may be erased.
    - Every method may be called from several threads.
    """

    @property
    def partitions(self) -> int:
        """The number of partitions, numbered from 0; it never changes."""

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """Write events; returns when they are on disk by the log's own policy.

        An event whose id the log already holds of the same user is not written again: its acknowledgement, of which
        there is one for each event in order, is a duplicate and gives the place of the first. So a caller that got an
        error or no answer sends the same events again. A batch is not a transaction: after an error some of its events
        may be in the log, but none is acknowledged.

        Raises:
            DataError: an event fails `twotower.logs.events.check_event` or cannot be written as JSON; nothing of the
                batch was written.
            EventLogError: the log cannot write.
        """

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """Up to `limit` events of a partition from an offset on, in order; empty at the end of the log.

        What was read is on disk, so an offset that a reader keeps outlives a power cut. A payload that is no event, or
        fails the check, is an event of the type `unusable` (`twotower.logs.payload`).

        Raises:
            ValueError: no such partition, a negative offset, or a limit below 1.
            DataError: the offset is of another log or no longer kept, or the log is damaged there.
            EventLogError: the log cannot be read now.
        """

    def ends(self) -> list[int]:
        """For each partition the offset of the next event that will be appended."""

    def erase(self, partition: int, users: Mapping[int | str, int]) -> int | None:
        """Erase what a partition holds of users before an offset each, such as that of the event that deletes them.

        Each of their events becomes one of the type `erased` (`twotower.logs.payload`), which keeps only the event's
        type and time: offsets hold, and a retry is still a duplicate. If the process is killed, a second call erases
        the rest.

        Args:
            partition: a partition of the log.
            users: the first offset that is kept, by user.

        Returns:
            The number of events that were erased now; None where a log cannot erase and only its retention does.

        Raises:
            ValueError: no such partition.
            DataError: the log is damaged; the rest is erased.
            EventLogError: the log cannot be written.
        """

    def close(self) -> None:
        """Bring everything to disk and let go of the log; a second call does nothing."""


def check_range(partition: int, partitions: int, offset: int, limit: int) -> None:
    """Refuse (`ValueError`) a partition that does not exist, a negative offset, or a limit below 1."""
    if not 0 <= partition < partitions:
        raise ValueError(f"partition={partition}, but the log has {partitions}")
    if offset < 0 or limit < 1:
        raise ValueError(f"offset={offset}, limit={limit}: an offset is at least 0, a limit at least 1")


def check_kept(offset: int, first: int, end: int, where: str) -> None:
    """Refuse (`DataError`) an offset behind the end of a partition, or before the first event that it keeps."""
    if offset > end:
        raise DataError(f"offset {offset} lies behind the end of {where}, {end}: it is not of this log")
    if 0 < offset < first:
        raise DataError(f"{where} keeps events from offset {first} on, not from {offset}: begin at 0")
