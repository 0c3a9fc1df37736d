"""What a log stores of an event, and what it gives back: the same for every log.

The payload of an event is its JSON object with the field `logged_ms`: the clock of the process that appended it. An
erased event leaves a stub of its type, its times and its digest (`erased_payload`): it does not tell whose event it
was, but offsets and event time stay as they are, and a retry is still a duplicate.

A payload that is no event, or one that fails the check, is read as an event of the type `unusable`, with its reason. It
keeps its offset, belongs to no user, and stops no reader.
"""

import struct
from dataclasses import asdict, replace
from hashlib import blake2b
from typing import Any, Final

import orjson

from twotower.logs.events import (
    ERASED,
    EVENT_ID,
    LOGGED_MS,
    NOBODY,
    UNUSABLE,
    Erased,
    Event,
    Unusable,
    check_event,
    check_time,
)
from twotower.logs.partition import DIGEST_BYTES, digest
from twotower.logs.protocol import Record
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import DataError, shown
from twotower.schema.limits import MALFORMED, MAX_EVENT_BYTES, TOO_LARGE, Refused
from twotower.schema.tables import EARLIEST_MS, LATEST_MS

_HEADS: Final = {0: struct.Struct(f"<BqH{DIGEST_BYTES}s"), 1: struct.Struct(f"<BqH{DIGEST_BYTES}sq")}
"""The head of a stub, by its first byte, with which no JSON begins: then ts_ms, the bytes of the type, which follows
the head, the digest, and logged_ms, which the stubs of earlier releases (0) do not have."""


def payload_of(event: Event, logged_ms: int) -> bytes:
    """What a log stores of an event at a time of its clock.

    Raises:
        Refused: the event fails `check_event`, or takes more than `MAX_EVENT_BYTES`.
        DataError: it cannot be written as JSON.
    """
    check_event(event, logged_ms)
    payload = event.to_json()
    if len(payload) > MAX_EVENT_BYTES:
        raise Refused(
            TOO_LARGE,
            f"event {shown(event.event_id)} takes {len(payload)} bytes, at most {MAX_EVENT_BYTES} are allowed: "
            "split it",
        )
    return b'%b,"%b":%d}' % (payload[:-1], LOGGED_MS.encode(), logged_ms)


def record_of(offset: int, next_offset: int, payload: bytes | None, clock_ms: ClockMs = now_ms) -> Record:
    """The record of a stored payload (None = a message without a value): its event, an `erased` or an `unusable` one.

    `clock_ms` stands for the log's clock where a payload of an earlier release or another program does not have it.

    >>> record = record_of(0, 1, b'{"event_id": 3}')
    >>> record.event.type, record.event.body["reason"]
    ('unusable', 'malformed')
    """
    payload = payload or b""
    logged_ms = None
    try:
        if is_erased(payload):
            event, said_ms = _stub(payload)
            logged_ms = _usable(said_ms) or clock_ms()
            check_time(event.ts_ms, logged_ms, "an erased event")
        else:
            document = _document(payload)
            logged_ms = _usable(document.pop(LOGGED_MS, None)) or clock_ms()
            event = Event.from_json(document)
            check_event(event, logged_ms)
            if event.ts_ms > logged_ms:  # by a clock that is a little ahead: nothing happened after it was logged
                event = replace(event, ts_ms=logged_ms)
    except DataError as error:
        reason = error.reason if isinstance(error, Refused) else MALFORMED
        logged_ms = logged_ms or clock_ms()
        body = asdict(Unusable(reason, str(error)))
        event = Event(digest_of(payload).hex(), UNUSABLE, NOBODY, logged_ms, body=body)
    return Record(offset, next_offset, event, logged_ms)


def erased_payload(payload: bytes) -> bytes:
    """What is stored in the place of an event; it takes fewer bytes, and zeros may follow it.

    >>> click = Event("e1", "click", 7, 1_700_000_000_000, body={"item_id": 3})
    >>> stub = erased_payload(payload_of(click, 1_700_000_000_000))
    >>> record_of(0, 1, stub).event.type, b"item" in stub
    ('erased', False)
    """
    record = record_of(0, 0, payload)
    name = record.event.type.encode()
    return _HEADS[1].pack(1, record.event.ts_ms, len(name), digest_of(payload), record.logged_ms) + name


def is_erased(payload: bytes) -> bool:
    """The event that stood here was erased."""
    return payload[:1] in (b"\0", b"\1")


def digest_of(payload: bytes) -> bytes:
    """The digest of the event, 16 bytes, which an erased one keeps; or of the bytes of a payload that is no event."""
    try:
        if is_erased(payload):
            mark: bytes = _HEADS[payload[0]].unpack_from(payload)[3]
            return mark
        document = _document(payload)
        return digest(document[EVENT_ID], document[c.USER_ID])
    except (DataError, KeyError, AttributeError, TypeError, ValueError, struct.error):
        return blake2b(payload, digest_size=DIGEST_BYTES).digest()


def mark_of(event: Event) -> str:
    """The digest of an event that was read, in hexadecimal digits: equal before and after it is erased."""
    return event.event_id if event.user_id == NOBODY else digest(event.event_id, event.user_id).hex()


def user_of(payload: bytes) -> int | str | None:
    """Whose event it is; None of an erased one and of what is no event."""
    if is_erased(payload):
        return None
    try:
        user_id = _document(payload).get(c.USER_ID)
    except DataError:
        return None
    return user_id if type(user_id) in (int, str) else None


def _document(payload: bytes) -> dict[str, Any]:
    if len(payload) > 2 * MAX_EVENT_BYTES:
        raise Refused(TOO_LARGE, f"it takes {len(payload)} bytes, at most {MAX_EVENT_BYTES} are allowed")
    try:
        document = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise Refused(MALFORMED, f"it is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refused(MALFORMED, f"it is no JSON object but a {type(document).__name__}")
    return document


def _usable(logged_ms: Any) -> int | None:
    """The log's clock as a payload has it; None where it is no time of a log."""
    return logged_ms if type(logged_ms) is int and EARLIEST_MS <= logged_ms <= LATEST_MS else None


def _stub(payload: bytes) -> tuple[Event, int | None]:
    head = _HEADS[payload[0]]
    try:
        _, ts_ms, length, mark, *logged_ms = head.unpack_from(payload)
        was = Erased(payload[head.size : head.size + length].decode())
        return Event(mark.hex(), ERASED, NOBODY, ts_ms, body=asdict(was)), logged_ms[0] if logged_ms else None
    except (struct.error, UnicodeDecodeError) as error:
        raise Refused(MALFORMED, f"it is no stub of an erased event: {error}") from None
