"""What an event log promises, and the events that go through it.

An event log keeps raw events in the order in which they came, split into partitions by user. Who reads it keeps an
offset for each partition and finds there, days later, the same events in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import orjson

from twotower.schema import columns as c
from twotower.schema.errors import DataError, TwotowerError, shown
from twotower.schema.tables import mistaken_time

EVENT_ID: Final = "event_id"
TYPE: Final = "type"
LOGGED_MS: Final = "logged_ms"
"""Field of a stored event that only the log itself writes: its clock."""

Sync = Literal["always", "interval", "never"]
"""When an event is acknowledged: on disk, before the next flush of a clock, or once it is written."""

MAX_PAYLOAD_BYTES: Final = 16 << 20
"""The largest event, as JSON. In a file a length beyond it is damage, so that no reader waits for gigabytes that never
come."""

_REQUIRED: Final = (EVENT_ID, TYPE, c.USER_ID, c.TS_MS)
_NAMED: Final = frozenset((*_REQUIRED, c.REQUEST_ID))


class EventLogError(TwotowerError):
    """The log cannot do what was asked: a full disk, a second writer, a lost connection. Nothing was acknowledged."""


@dataclass(frozen=True, slots=True)
class Event:
    """A raw event as a client or a server sent it, checked when it is made.

    Args:
        event_id: names the event; a retry carries the same id and the same user.
        type: `request`, `impression`, `click`, or any other word.
        user_id: int64 or string; 1 and "1" are different users.
        ts_ms: when it happened, milliseconds since 1970.
        request_id: the request that it belongs to, if any.
        body: its further JSON fields, such as items and context.

    Raises:
        DataError: a field of another type, an empty id, a time that is not in milliseconds, a body that names one of
            the fields above.
    """

    event_id: str
    type: str
    user_id: int | str
    ts_ms: int
    request_id: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.event_id, EVENT_ID, "an event")
        where = f"event {shown(self.event_id)}"
        _check_name(self.type, TYPE, where)
        if self.request_id is not None:
            _check_name(self.request_id, c.REQUEST_ID, where)
        _check_user(self.user_id, where)
        _check_time(self.ts_ms, where)
        if not isinstance(self.body, Mapping):
            raise DataError(f"{where} has a body of type {type(self.body).__name__}: a mapping of JSON fields is due")
        if LOGGED_MS in self.body:
            raise DataError(f"{where} names {LOGGED_MS}, which only the log writes: leave it out")
        if not _NAMED.isdisjoint(self.body):
            raise DataError(
                f"{where} names {', '.join(sorted(_NAMED & self.body.keys()))} in its body: leave it out there"
            )

    @classmethod
    def from_json(cls, document: Any) -> Event:
        """The event of a parsed JSON object; fields that are not named above become its body.

        Raises:
            DataError: no object, missing fields, or what the class refuses.

        >>> document = {"event_id": "e1", "type": "click", "user_id": 7, "ts_ms": 1700000000000, "item_id": 3}
        >>> Event.from_json(document).body
        {'item_id': 3}
        """
        if not isinstance(document, dict):
            raise DataError(f"an event is a JSON object, not {type(document).__name__}")
        missing = [name for name in _REQUIRED if name not in document]
        if missing:
            raise DataError(
                f"an event has no {', '.join(missing)}; it has {shown(list(document)) if document else 'no fields'}: "
                f"{', '.join(_REQUIRED)} are required"
            )
        return cls(
            event_id=document[EVENT_ID],
            type=document[TYPE],
            user_id=document[c.USER_ID],
            ts_ms=document[c.TS_MS],
            request_id=document.get(c.REQUEST_ID),
            body={name: value for name, value in document.items() if name not in _NAMED},
        )

    def to_json(self) -> bytes:
        """The event as one JSON object in UTF-8, which is what a log stores; `from_json` reads it back.

        Raises:
            DataError: the body holds what JSON or UTF-8 cannot.
        """
        document: dict[str, Any] = {
            EVENT_ID: self.event_id,
            TYPE: self.type,
            c.USER_ID: self.user_id,
            c.TS_MS: self.ts_ms,
        }
        if self.request_id is not None:
            document[c.REQUEST_ID] = self.request_id
        try:
            return orjson.dumps({**document, **self.body})
        except orjson.JSONEncodeError as error:
            raise DataError(f"event {self.event_id!r} cannot be written as JSON: {error}") from None


@dataclass(frozen=True, slots=True)
class Ack:
    """That an event is in the log: where it stands, and whether it stood there before."""

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
    - An offset is an integer that rises within a partition and is opaque otherwise: use 0 for the earliest event that
      is kept, and what the log itself gave. What stands at an offset never changes, but that it may be erased.
    - Every method may be called from several threads.
    """

    @property
    def partitions(self) -> int:
        """The number of partitions, numbered from 0; it never changes."""

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """Write events; returns when they are on disk by the log's own policy.

        An event whose id the same user's partition already holds, from an earlier call or earlier in this one, is not
        written again: its acknowledgement is a duplicate and gives the place of the first. So a caller that got an
        error or no answer sends the same events again. Ids are compared within a user: two users may use the same one.

        A batch is no transaction: after an error some of its events may be in the log, none is acknowledged.

        Returns:
            An acknowledgement for each event, in their order.

        Raises:
            DataError: an event fails `twotower.logs.events.check_event` or cannot be written as JSON; nothing of the
                batch was written.
            EventLogError: the log cannot write.
        """

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """Up to `limit` events of a partition from an offset on, in order; empty at the end of the log.

        What was read is on disk: an offset that a reader keeps outlives a power cut. In the place of what is no event,
        or fails the check, stands an event of the type `unusable` (`twotower.logs.payload`).

        Raises:
            ValueError: no such partition, a negative offset, or a limit below 1.
            DataError: the offset is of another log or no longer kept, or the log is damaged there.
            EventLogError: the log cannot be read now.
        """

    def ends(self) -> list[int]:
        """For each partition the offset at which the next event will stand: where to read only what is to come."""

    def erase(self, partition: int, users: Mapping[int | str, int]) -> int | None:
        """Erase what a partition holds of users before an offset each, such as that of the event that deletes them.

        In the place of each of their events stands one of the type `erased` (`twotower.logs.payload`), which keeps only
        the event's type and time: offsets hold, and a retry is a duplicate still. Killed at any moment, some of the
        events are erased, and a second call erases the rest.

        Args:
            partition: of the log.
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
    """Refuse what cannot be read.

    Raises:
        ValueError: no such partition, a negative offset, or a limit below 1.
    """
    if not 0 <= partition < partitions:
        raise ValueError(f"partition={partition}, but the log has {partitions}")
    if offset < 0 or limit < 1:
        raise ValueError(f"offset={offset}, limit={limit}: an offset is at least 0, a limit at least 1")


def _check_name(value: object, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where} has {name}={shown(value)} of type {type(value).__name__}: a string is due")
    if not value:
        raise DataError(f"{where} has an empty {name}")


def _check_user(user_id: object, where: str) -> None:
    if isinstance(user_id, bool) or not isinstance(user_id, int | str):
        raise DataError(
            f"{where} has {c.USER_ID}={shown(user_id)} of type {type(user_id).__name__}: an integer or a string is due"
        )
    if user_id == "":
        raise DataError(f"{where} has an empty {c.USER_ID}")
    if isinstance(user_id, int) and not -(2**63) <= user_id < 2**63:
        raise DataError(f"{where} has {c.USER_ID}={shown(user_id)}, which does not fit int64: send it as a string")


def _check_time(ts_ms: object, where: str) -> None:
    if isinstance(ts_ms, bool) or not isinstance(ts_ms, int):
        raise DataError(
            f"{where} has {c.TS_MS}={shown(ts_ms)} of type {type(ts_ms).__name__}: an integer of milliseconds is due"
        )
    likely = mistaken_time(ts_ms)
    if likely:
        raise DataError(f"{where} has {c.TS_MS}={shown(ts_ms)}, where milliseconds since 1970 are due; {likely}")
