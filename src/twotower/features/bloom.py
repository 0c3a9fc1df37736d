"""What a user was shown over days or weeks, in a few kilobytes: a Bloom filter for each period.

A Bloom filter (Bloom 1970) contains everything that was added, and by mistake a small share of everything else. Nothing
can be removed from it, so each period of the window has a filter, and the oldest one is dropped.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.schema.errors import ConfigError

Hashes = npt.NDArray[np.uint64]

MAX_OVER: Final = 4
"""A user who is shown more than expected gets more filters, up to this many times as many."""
_MIN_BITS: Final = 4096
"""Hashes that agree on the first place and on the step agree on all places, which is not rare in smaller filters."""
_AT_ONCE: Final = 1 << 16
"""Ids that are hashed together."""
_PARTS: Final = 10_000
_HEAD: Final = struct.Struct("<qI")
_PRIME: Final = np.uint64(0x100000001B3)


def hash_ids(ids: pa.Array) -> Hashes:
    """A hash of each id (n,), int64 or string without nulls; the same in every process and release.

    >>> hash_ids(pa.array([7, 8])).tolist() == [hash_ids(pa.array([x]))[0] for x in (7, 8)]
    True
    """
    if len(ids) > _AT_ONCE:
        return np.concatenate([hash_ids(ids.slice(start, _AT_ONCE)) for start in range(0, len(ids), _AT_ONCE)])
    if ids.type == pa.int64():
        return mixed(ids.to_numpy(zero_copy_only=False).astype(np.uint64))
    if not len(ids):
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(ids.buffers()[1], np.int32)[ids.offset : ids.offset + len(ids) + 1].astype(np.int64)
    content = np.frombuffer(ids.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]].astype(np.uint64)
    starts, lengths = offsets - offsets[0], np.diff(offsets)
    place = np.arange(len(content)) - np.repeat(starts[:-1], lengths)
    powers = np.cumprod(np.full(int(lengths.max()) + 1, _PRIME))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((content + np.uint64(1)) * powers[place])])
    return mixed(sums[starts[1:]] - sums[starts[:-1]])  # a polynomial of each id's bytes, modulo 2^64


def mixed(values: Hashes) -> Hashes:
    """Every bit of a value spread over all bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def is_held_out(user_ids: pa.Array, share: float) -> npt.NDArray[np.bool_]:
    """Held-out users (n,), chosen by a hash: never used in training, so that the quality gate can judge on them.

    >>> int(is_held_out(pa.array(range(1000)), 0.05).sum())
    60
    """
    return hash_ids(user_ids) % np.uint64(_PARTS) < np.uint64(round(share * _PARTS))


@dataclass(frozen=True)
class FilterShape:
    """The size of filters, and the length of their periods."""

    period_ms: int
    filters: int
    """Filters that a window touches: one more than its periods."""
    items: int
    """Items that one filter is made for."""
    bits: int
    """Bits of one filter, a power of two."""
    hashes: int

    @classmethod
    def of(cls, window_ms: int, periods: int, items: int, error_rate: float) -> Self:
        """Filters for a window that is cut into periods.

        With n items in m bits and h hashes, a filter contains (1 - exp(-h n / m))^h of other items by mistake;
        m = -n ln p / ln(2)^2 and h = log2(1 / p) keep that at p. The window's filters are asked together, so each has
        its share of the error. `items` is the number of items expected to be shown to one user within the window;
        `error_rate` is the share of other items that then count as shown by mistake.

        Raises:
            ConfigError: periods shorter than a millisecond.

        >>> FilterShape.of(7 * 86_400_000, 7, 7000, 0.008)
        FilterShape(period_ms=86400000, filters=8, items=1000, bits=16384, hashes=10)
        """
        if window_ms < periods:
            raise ConfigError(
                f"a window of {window_ms} ms cannot be cut into {periods} periods: raise serve.impressed_window_s"
            )
        each = error_rate / (periods + 1)
        count = -(-items // periods)
        bits = max(_MIN_BITS, 2 ** int(np.ceil(np.log2(-count * np.log(each) / np.log(2) ** 2))))
        return cls(-(-window_ms // periods), periods + 1, count, bits, int(np.ceil(-np.log2(each))))

    def places(self, hashes: Hashes, number: int) -> npt.NDArray[np.uint32]:
        """The bit of each hash (n,) for one of the hash functions (Kirsch and Mitzenmacher 2006)."""
        step = (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        return (hashes.astype(np.uint32) + np.uint32(number) * step) & np.uint32(self.bits - 1)


@dataclass(frozen=True)
class _Filter:
    """One filter."""

    period: int
    count: int
    content: bytes

    def add(self, shape: FilterShape, hashes: Hashes) -> tuple["_Filter", Hashes]:
        """The filter with more hashes (n,), as far as there is room, and the new ones that are left."""
        bits = np.frombuffer(self.content, np.uint8).copy()
        hashes = hashes[np.sort(np.unique(hashes, return_index=True)[1])]
        places = np.stack([shape.places(hashes, number) for number in range(shape.hashes)])
        at, bit = places >> 3, np.uint8(1) << (places & 7).astype(np.uint8)
        fresh = np.flatnonzero(((bits[at] & bit) == 0).any(axis=0))
        added, left = np.split(fresh, [max(0, shape.items - self.count)])
        if not len(added):
            return self, hashes[left]
        np.bitwise_or.at(bits, at[:, added].ravel(), bit[:, added].ravel())
        return _Filter(self.period, self.count + len(added), bits.tobytes()), hashes[left]


@dataclass(frozen=True)
class Seen:
    """One user's filters, by rising period; immutable."""

    shape: FilterShape
    filters: tuple[_Filter, ...] = ()

    def add(self, times_ms: Sequence[int], hashes: Hashes) -> Self:
        """The same with more items, shown at some times; the filters of the earliest periods are dropped."""
        filters = list(self.filters)
        periods = np.asarray(times_ms, np.int64) // self.shape.period_ms
        for period in np.unique(periods).tolist():
            left = hashes[periods == period]
            for place, filtered in enumerate(filters):
                if filtered.period == period and len(left):
                    filters[place], left = filtered.add(self.shape, left)
            while len(left):
                filtered, left = _Filter(period, 0, bytes(self.shape.bits // 8)).add(self.shape, left)
                filters.append(filtered)
        filters.sort(key=lambda f: f.period)  # stable: of a period the newest last
        return replace(self, filters=tuple(filters[-MAX_OVER * self.shape.filters :]))

    def contains(self, hashes: Hashes, since_ms: int) -> npt.NDArray[np.bool_]:
        """Which items (n,) were shown since a time, or at most one period before it."""
        asked = [f for f in self.filters if (f.period + 1) * self.shape.period_ms > since_ms]
        found = np.zeros(len(hashes), np.bool_)
        for start in range(0, len(asked), 64):
            found |= self._in_any(asked[start : start + 64], hashes)
        return found

    def _in_any(self, filters: Sequence[_Filter], hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which items (n,) are in one of at most 64 filters."""
        # A bit of `table` for each filter: all are asked at once, and most items drop out after a few hashes.
        table = np.zeros(self.shape.bits, np.uint64)
        for number, filtered in enumerate(filters):
            bits = np.unpackbits(np.frombuffer(filtered.content, np.uint8), bitorder="little")
            table |= bits.astype(np.uint64) << np.uint64(number)
        left = np.arange(len(hashes))
        within = np.full(len(hashes), np.iinfo(np.uint64).max, np.uint64)
        for number in range(self.shape.hashes):
            within = within & table[self.shape.places(hashes[left], number)]
            left, within = left[within != 0], within[within != 0]
        found = np.zeros(len(hashes), np.bool_)
        found[left] = True
        return found

    def encode(self) -> bytes:
        """As bytes."""
        return b"".join(_HEAD.pack(f.period, f.count) + f.content for f in self.filters)

    @classmethod
    def decode(cls, shape: FilterShape, value: bytes) -> Self:
        """From the bytes of `encode`, with the same shape."""
        stored = struct.Struct(f"{_HEAD.format}{shape.bits // 8}s")
        return cls(shape, tuple(_Filter(*parts) for parts in stored.iter_unpack(value)))
