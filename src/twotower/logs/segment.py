"""The two kinds of files of a local log: records in a segment, and the ids of a sealed segment beside it.

A record is a u32 length, a u32 CRC-32C over those four bytes and the payload, and the payload; integers are
little-endian. A segment is nothing but records. A file of ids is a head (magic, CRC-32C of the rest), the 16-byte
digests in ascending order, and the offset of each as int64.
"""

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from twotower.logs.partition import DIGEST_BYTES
from twotower.logs.protocol import MAX_PAYLOAD_BYTES
from twotower.schema.files import whole_file

_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<II")
_CHUNK_BYTES = 256 << 10

_IDS_HEAD = struct.Struct("<8sII")
_IDS_MAGIC = b"TTIDS\0\0\1"
_DIGEST = np.dtype(f"S{DIGEST_BYTES}")
_OFFSET = np.dtype("<i8")


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole valid record: where it begins and ends in its segment, in bytes, and its payload."""

    position: int
    next_position: int
    payload: bytes


def encode(payload: bytes) -> bytes:
    r"""The record of a payload.

    >>> encode(b"{}")
    b'\x02\x00\x00\x001{\xbcT{}'
    """
    length = _LENGTH.pack(len(payload))
    return length + _LENGTH.pack(google_crc32c.extend(google_crc32c.value(length), payload)) + payload


def walk(descriptor: int, position: int) -> Iterator[Stored]:
    """The records of a segment from a byte position on, up to the first that is not whole and valid.

    Whoever walks compares where it stopped with the size of the file. An empty record is never valid, so zeros that a
    file system leaves after a power cut are none.
    """
    data, start = b"", position
    while True:
        at = position - start
        head = data[at : at + _HEAD.size]
        length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
        end = at + _HEAD.size + length
        if len(head) < _HEAD.size or (end > len(data) and 0 < length <= MAX_PAYLOAD_BYTES):
            wanted = max(_CHUNK_BYTES, end - at)
            fresh = os.pread(descriptor, wanted, position)
            if len(fresh) <= len(data) - at:
                return
            data, start = fresh, position
            continue
        payload = data[at + _HEAD.size : end]
        if not 0 < length <= MAX_PAYLOAD_BYTES:
            return
        if google_crc32c.extend(google_crc32c.value(data[at : at + _LENGTH.size]), payload) != checksum:
            return
        yield Stored(position, start + end, payload)
        position = start + end


@dataclass(frozen=True)
class Ids:
    """The ids of a sealed segment, mapped from its file: N digests (N,) S16 ascending, their offsets (N,) int64."""

    digests: NDArray[np.bytes_]
    offsets: NDArray[np.int64]

    def find(self, digests: Sequence[bytes]) -> NDArray[np.int64]:
        """The offset of each of M digests, -1 where the segment does not hold it; (M,) int64."""
        wanted: NDArray[Any] = np.array(digests, _DIGEST)
        places = np.minimum(np.searchsorted(self.digests, wanted), len(self.digests) - 1)
        return np.where(self.digests[places] == wanted, self.offsets[places], -1)


def write_ids(path: Path, offsets: Mapping[bytes, int]) -> Ids:
    """Write the ids of a segment, from digest to offset, whole or not at all, and map them."""
    digests = np.array(list(offsets), _DIGEST)
    order = np.argsort(digests)
    body = digests[order].tobytes() + np.array(list(offsets.values()), _OFFSET)[order].tobytes()
    with whole_file(path) as temporary:
        temporary.write_bytes(_IDS_HEAD.pack(_IDS_MAGIC, google_crc32c.value(body), 0) + body)
    ids = read_ids(path)
    assert ids is not None
    return ids


def read_ids(path: Path) -> Ids | None:
    """Map the ids of a segment; None where the file is missing or damaged, and has to be made again."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except (FileNotFoundError, ValueError):  # ValueError: empty
        return None
    count, rest = divmod(len(data) - _IDS_HEAD.size, _DIGEST.itemsize + _OFFSET.itemsize)
    if rest or count < 1:
        return None
    magic, checksum, _ = _IDS_HEAD.unpack(data[: _IDS_HEAD.size].tobytes())
    body = np.asarray(data[_IDS_HEAD.size :])
    if magic != _IDS_MAGIC or google_crc32c.value(body) != checksum:
        return None
    return Ids(body[: count * _DIGEST.itemsize].view(_DIGEST), body[count * _DIGEST.itemsize :].view(_OFFSET))
