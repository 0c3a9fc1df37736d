"""What a log keeps in the place of an event of a deleted user: its type, its time and its digest.

Nobody can tell from it whose event it was. Offsets stay where they are, a retry is still a duplicate, and event time
runs through it as before, so that what a joiner remembers is made again as it was.
"""

import struct
from typing import Any, Final

import orjson

from twotower.logs.partition import DIGEST_BYTES, digest
from twotower.logs.protocol import EVENT_ID, TYPE, Event
from twotower.schema import columns as c

ERASED: Final = "erased"
"""Type of the events that a log gives for those that were erased."""
NOBODY: Final = "@erased"
"""Whose they are."""

_WAS: Final = "was"
_HEAD: Final = struct.Struct(f"<xqH{DIGEST_BYTES}s")
"""A zero, with which no JSON begins; ts_ms; the bytes of the type, which follow; the digest."""


def erased(payload: bytes) -> bytes:
    """What is stored in the place of an event; it takes fewer bytes, and zeros may follow it.

    >>> click = Event("e1", "click", 7, 1_700_000_000_000, body={"item_id": 3})
    >>> stub = erased(click.to_json())
    >>> len(stub) < len(click.to_json()), b"item" in stub
    (True, False)
    """
    document = orjson.loads(payload)
    name: bytes = document[TYPE].encode()
    return _HEAD.pack(document[c.TS_MS], len(name), digest(document[EVENT_ID], document[c.USER_ID])) + name


def is_erased(payload: bytes) -> bool:
    """The event that stood here was erased."""
    return payload[:1] == b"\0"


def event_from(payload: bytes) -> Event:
    """The event of a stored payload; in the place of an erased one, an event of `NOBODY`.

    >>> event_from(erased(Event("e1", "click", 7, 1_700_000_000_000).to_json())).type
    'erased'
    """
    if not is_erased(payload):
        return Event.from_json(orjson.loads(payload))
    ts_ms, length, mark = _HEAD.unpack_from(payload)
    was = payload[_HEAD.size : _HEAD.size + length].decode()
    return Event(mark.hex(), ERASED, NOBODY, ts_ms, body={_WAS: was})


def type_before(event: Event) -> Any:
    """The type of an event, of an erased one before it was."""
    return event.body.get(_WAS) if event.type == ERASED else event.type


def digest_of(payload: bytes) -> bytes:
    """The digest of the event, 16 bytes, that an erased one keeps."""
    if is_erased(payload):
        mark: bytes = _HEAD.unpack_from(payload)[2]
        return mark
    document = orjson.loads(payload)
    return digest(document[EVENT_ID], document[c.USER_ID])


def mark_of(event: Event) -> str:
    """The same of an event that was read, in hexadecimal digits: equal before and after it is erased."""
    return event.event_id if event.type == ERASED else digest(event.event_id, event.user_id).hex()


def user_of(payload: bytes) -> int | str | None:
    """Whose event it is; None of an erased one."""
    if is_erased(payload):
        return None
    user_id: int | str = orjson.loads(payload)[c.USER_ID]
    return user_id
