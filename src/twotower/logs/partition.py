"""Which partition a user's events go to, and how an event is told from others there: the same on every machine."""

import struct
from collections.abc import Sequence
from hashlib import blake2b

import google_crc32c

from twotower.logs.events import Event

DIGEST_BYTES = 16


def user_key(user_id: int | str) -> bytes:
    r"""A user id as bytes that tell 1 from "1": a letter for the type, then int64 little-endian or UTF-8.

    >>> user_key(1), user_key("1")
    (b'i\x01\x00\x00\x00\x00\x00\x00\x00', b's1')
    """
    return b"i" + struct.pack("<q", user_id) if isinstance(user_id, int) else b"s" + user_id.encode()


def partition_of(user_id: int | str, partitions: int) -> int:
    """The partition of a user, from 0: the CRC-32C of the id's bytes, modulo the number of partitions.

    >>> [partition_of(user_id, 4) for user_id in (1, 2, 3, "1")]
    [0, 1, 2, 2]
    """
    return int(google_crc32c.value(user_key(user_id))) % partitions


def by_partition(events: Sequence[Event], partitions: int) -> dict[int, list[int]]:
    """Places of events in a sequence, by the partition that they belong to."""
    places: dict[int, list[int]] = {}
    for place, event in enumerate(events):
        places.setdefault(partition_of(event.user_id, partitions), []).append(place)
    return places


def digest(event_id: str, user_id: int | str) -> bytes:
    """16 bytes that stand for an event's id within its user: equal for a retry, for nothing else."""
    user = user_key(user_id)
    return blake2b(struct.pack("<I", len(user)) + user + event_id.encode(), digest_size=DIGEST_BYTES).digest()
