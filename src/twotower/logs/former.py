"""Logs of format 1, files of earlier releases: `LocalEventLog.open` copies their events into its database.

An event's offset becomes the byte before the end of its former record, so every offset that a consumer keeps still
leads to the same next event.
"""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import google_crc32c

from twotower.logs.payload import digest_of
from twotower.schema.errors import DataError
from twotower.schema.files import read_json

_DESCRIPTION: Final = "log.json"
_HEAD: Final = struct.Struct("<II")


def former_partitions(folder: Path) -> int:
    """The number of partitions of a log of format 1; 0 where there is none."""
    path = folder / _DESCRIPTION
    if not path.exists() and (folder / "partition-0000").exists():
        raise DataError(f"{folder} has partitions but no {_DESCRIPTION}: restore it, their number cannot be guessed")
    return int(read_json(path)["partitions"]) if path.exists() else 0


def former_records(folder: Path, partition: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset, digest and payload of each event; half a record at the end, as a killed writer leaves it, is left out.

    Raises:
        DataError: a segment that is followed by another one is damaged.
    """
    segments = sorted((folder / f"partition-{partition:04d}").glob("*.log"))
    for segment in segments:
        data, at = segment.read_bytes(), 0
        while at < len(data):
            length, checksum = _HEAD.unpack_from(data.ljust(at + _HEAD.size, b"\0"), at)
            end = at + _HEAD.size + length
            payload = data[at + _HEAD.size : end]
            if not 0 < length == len(payload) or _checksum(data[at : at + 4], payload) != checksum:
                break
            at = end
            yield int(segment.stem) + end - 1, digest_of(payload), payload
        if at < len(data) and segment != segments[-1]:
            raise DataError(f"{segment} is damaged at byte {at}: restore it from a copy")


def remove_former(folder: Path) -> None:
    """Remove the files of a log of format 1; its description goes last, so that a killed removal is done again."""
    for partition in folder.glob("partition-*"):
        shutil.rmtree(partition)
    (folder / _DESCRIPTION).unlink()


def _checksum(length: bytes, payload: bytes) -> int:
    return int(google_crc32c.extend(google_crc32c.value(length), payload))
