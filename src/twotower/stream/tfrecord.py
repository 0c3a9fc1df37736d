"""TFRecord framing: a file of records, each with a checksum of its length and one of its content.

A record is a u64 length, the masked CRC-32C of these eight bytes, the content, and the masked CRC-32C of the content;
integers are little-endian. It is the format of TensorFlow's `tf.io.TFRecordWriter` (uncompressed).
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from twotower.schema.errors import DataError

_HEAD: Final = struct.Struct("<QI")
_LENGTH: Final = struct.Struct("<Q")
_CRC: Final = struct.Struct("<I")
_MASK_DELTA: Final = 0xA282EAD8


def masked_crc(data: bytes) -> int:
    """The CRC-32C of some bytes, rotated right by 15 bits plus a constant, as this format stores it.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    crc = int(google_crc32c.value(data))
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame(content: bytes) -> bytes:
    """The record of some bytes."""
    length = _LENGTH.pack(len(content))
    return b"".join((length, _CRC.pack(masked_crc(length)), content, _CRC.pack(masked_crc(content))))


def write_records(path: Path, contents: Iterable[bytes]) -> None:
    """Write a file of records."""
    with path.open("wb") as file:
        file.writelines(frame(content) for content in contents)


@dataclass(frozen=True)
class Records:
    """The records of a file, every checksum checked."""

    data: bytes
    """The whole file."""
    starts: npt.NDArray[np.int64]
    """(N,) where the content of each record begins."""
    ends: npt.NDArray[np.int64]
    """(N,) where it ends."""

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, first: int, end: int) -> "Records":
        """Those from a number on, up to another."""
        return Records(self.data, self.starts[first:end], self.ends[first:end])

    def content(self, number: int) -> bytes:
        """The content of one record."""
        return self.data[self.starts[number] : self.ends[number]]


def read_records(path: Path) -> Records:
    """Read a file of records.

    Raises:
        DataError: it is missing, ends within a record, or a checksum does not match.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    return split_records(data, str(path))


def split_records(data: bytes, where: str) -> Records:
    """The records of a file's bytes.

    Raises:
        DataError: as in `read_records`.
    """
    size, position = len(data), 0
    starts: list[int] = []
    ends: list[int] = []
    while position < size:
        start = position + _HEAD.size
        if start > size:
            raise DataError(f"{where} ends within the head of record {len(starts)}, at byte {size}: it was cut")
        length, length_crc = _HEAD.unpack_from(data, position)
        if masked_crc(data[position : position + _LENGTH.size]) != length_crc:
            raise DataError(f"{where}: the length of record {len(starts)}, at byte {position}, is damaged")
        end = start + length
        if end + _CRC.size > size:
            raise DataError(f"{where} ends within record {len(starts)}, which begins at byte {position}: it was cut")
        if masked_crc(data[start:end]) != _CRC.unpack_from(data, end)[0]:
            raise DataError(f"{where}: the content of record {len(starts)}, at byte {start}, is damaged")
        starts.append(start)
        ends.append(end)
        position = end + _CRC.size
    return Records(data, np.array(starts, np.int64), np.array(ends, np.int64))
