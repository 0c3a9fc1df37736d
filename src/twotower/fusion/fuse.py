"""Fusion of ranked lists: an item that several channels retrieve appears once and keeps the names of all of them.

B users, k candidates, C channels, M the largest number of different items that the channels retrieve for one user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates, Queries, Retriever
from twotower.index.protocol import PADDING
from twotower.schema.errors import ConfigError

Floats = npt.NDArray[np.float64]

RRF_CONSTANT = 60.0
FILL = 1e-9
"""A weight of 0 becomes this share of the smallest other weight: such items rank last, in their own order."""


@dataclass(frozen=True)
class Fused:
    """One list for each user, and which channels retrieved each item."""

    candidates: Candidates
    channels: tuple[str, ...]
    retrieved_by: npt.NDArray[np.int64]
    """(B, k) bit i is set where channel i retrieved the item."""

    def channels_of(self, user: int, place: int) -> list[str]:
        """The channels that retrieved one candidate."""
        bits = int(self.retrieved_by[user, place])
        return [name for bit, name in enumerate(self.channels) if bits >> bit & 1]


@dataclass(frozen=True)
class Fusion:
    """How channels become one list."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """By channel, at least 0; a channel without a weight has 1."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """By channel, at least 0; a channel without a constant has 60."""
    depth: int = 1
    """Candidates requested from each of several channels, at least k."""
    reserved: Mapping[str, float] = field(default_factory=dict)
    """By channel, its smallest share of the list, spread evenly from the first place to the last."""

    def asked(self, k: int, channels: Sequence[str]) -> int:
        """How many candidates to request from each channel for one list of k.

        >>> Fusion(depth=1000).asked(50, ["two_tower", "popular"]), Fusion(depth=1000).asked(50, ["popular"])
        (1000, 50)
        """
        return max(k, self.depth) if len(channels) > 1 else k

    def retrieve(self, channels: Mapping[str, Retriever], queries: Queries, k: int) -> Fused:
        """One list of k for each of the queries, from channels by name."""
        asked = self.asked(k, list(channels))
        return self.fuse({name: channel.retrieve(queries, asked) for name, channel in channels.items()}, k)

    def fuse(self, lists: Mapping[str, Candidates], k: int) -> Fused:
        """One list of k for each user, from lists by channel; a single list keeps its own scores.

        Raises:
            ConfigError: there is no list.
        """
        if len(lists) == 1:
            name, only = next(iter(lists.items()))
            rows, scores = only.rows[:, :k], only.scores[:, :k]
            return Fused(Candidates(rows, scores), (name,), (rows != PADDING).astype(np.int64))
        weights, constants, reserved = (
            {name: value for name, value in given.items() if name in lists}
            for given in (self.weights, self.constants, self.reserved)
        )
        if not any(reserved.values()):
            return reciprocal_rank(lists, k, weights, constants)
        every = max(k, sum(candidates.rows.shape[1] for candidates in lists.values()))
        return _reserve(reciprocal_rank(lists, every, weights, constants), lists, k, reserved)


def reciprocal_rank(
    lists: Mapping[str, Candidates],
    k: int,
    weights: Mapping[str, float] | None = None,
    constants: Mapping[str, float] | None = None,
) -> Fused:
    """Reciprocal rank fusion: score = sum over channels of weight / (constant + rank) (Cormack et al. 2009, eq. 1).

    Only ranks count, so that channels whose scores have different units can be combined. Equal scores are ordered by
    row. A channel has weight 1 if none is given; items of weight 0 rank behind all others. The paper has one constant,
    60, which is the default. A constant for each channel lets its term follow how fast its hits become rare down its
    list.

    Raises:
        ConfigError: there is no list; a weight or a constant is below 0, or belongs to no channel.

    >>> a = Candidates(np.array([[1, 2]]), np.array([[9, 8]], np.float32))
    >>> b = Candidates(np.array([[2, 3]]), np.array([[0.1, 0.05]], np.float32))
    >>> fused = reciprocal_rank({"a": a, "b": b}, 3)
    >>> fused.candidates.rows.tolist(), fused.channels_of(0, 0)
    ([[2, 1, 3]], ['a', 'b'])
    """
    if not lists:
        raise ConfigError("no channel returned a list: there is nothing to fuse")
    weight = _of_each(weights, lists, "weight", 1.0)
    constant = _of_each(constants, lists, "constant", RRF_CONSTANT)
    fill = FILL * min((value for value in weight if value), default=1.0)
    union = Union.of(lists)
    total = union.nothing()
    for channel in range(len(lists)):
        total += union.reciprocal(channel, weight[channel] or fill, constant[channel])
    order = _best(total, k)
    rows, scores = np.take_along_axis(union.rows, order, axis=1), np.take_along_axis(total, order, axis=1)
    brought = np.zeros(order.shape, np.int64)
    for channel, ranks in enumerate(union.ranks):
        brought |= (np.take_along_axis(ranks, order, axis=1) > 0).astype(np.int64) << channel
    if (short := k - order.shape[1]) > 0:
        behind = ((0, 0), (0, short))
        rows, brought = np.pad(rows, behind, constant_values=PADDING), np.pad(brought, behind)
        scores = np.pad(scores, behind, constant_values=-np.inf)
    return Fused(Candidates(rows, scores.astype(np.float32)), union.channels, brought)


def _best(scores: Floats, k: int) -> npt.NDArray[np.int64]:
    """The columns of the k best scores of each user (B, M), best first; equal scores stay in the order of columns."""
    columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    if (rest := scores.shape[1] - k) > 0:  # sorting only the k best is several times faster
        last = np.partition(scores, rest, axis=1)[:, rest, None]
        above, level = scores > last, scores == last
        level &= np.cumsum(level, axis=1) <= k - above.sum(axis=1, keepdims=True)
        columns = np.nonzero(above | level)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _of_each(
    values: Mapping[str, float] | None, channels: Mapping[str, object], what: str, absent: float
) -> list[float]:
    """The checked value of each channel, in their order."""
    values = values or {}
    if unknown := sorted(set(values) - set(channels)):
        raise ConfigError(f"{what}s for {', '.join(unknown)}, but the channels are {', '.join(channels)}")
    if wrong := {name: value for name, value in values.items() if not 0 <= value < np.inf}:
        raise ConfigError(f"{what}s {wrong}: a {what} is at least 0 and finite")
    return [float(values.get(name, absent)) for name in channels]


def _reserve(fused: Fused, lists: Mapping[str, Candidates], k: int, shares: Mapping[str, float]) -> Fused:
    """A fused list of everything, cut to k, in which some channels have at least their share of the places.

    The item at rank r of a channel with share s is expected at place r / s or before, and is moved there if it ranks
    behind. Scores stay with the places, so that they still fall.

    >>> a = Candidates(np.array([[1, 2, 3, 4]]), np.array([[9, 8, 7, 6]], np.float32))
    >>> b = Candidates(np.array([[7, 8]]), np.array([[5, 4]], np.float32))
    >>> both = Fusion({"b": 0.0}, reserved={"b": 0.5}).fuse({"a": a, "b": b}, 4)
    >>> both.candidates.rows.tolist(), both.channels_of(0, 1)
    ([[1, 7, 2, 8]], ['b'])
    """
    if not sum(shares.values()) < 1 or min(shares.values()) < 0:
        raise ConfigError(f"reserved shares {dict(shares)}: each is at least 0, and they sum to less than 1")
    rows = fused.candidates.rows
    order = np.empty((len(rows), k), np.int64)
    for user, listed in enumerate(rows):
        place = {row: at for at, row in enumerate(listed.tolist()) if row != PADDING}
        expected = sorted(
            (round(rank / share) - 1, place[row])
            for name, share in shares.items()
            if share
            for rank, row in enumerate(lists[name].rows[user, : int(k * share)].tolist(), 1)
            if row != PADDING
        )
        key = np.arange(rows.shape[1], dtype=np.float64)
        moved, behind = 0, -1.0
        for wanted, at in expected:
            if key[at] > wanted:
                behind = max(behind, wanted - moved - 0.5)  # those moved before it push it back by one each
                key[at], moved = behind, moved + 1
        order[user] = np.argsort(key, kind="stable")[:k]
    chosen, brought = (np.take_along_axis(values, order, axis=1) for values in (rows, fused.retrieved_by))
    return Fused(Candidates(chosen, fused.candidates.scores[:, :k]), fused.channels, brought)


@dataclass(frozen=True)
class Union:
    """What some channels retrieve, each item of a user once."""

    channels: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    """(B, M) catalogue rows, ascending, -1 at the end of a shorter union."""
    ranks: npt.NDArray[np.int32]
    """(C, B, M) rank of the item in each channel's list, from 1; 0 where the channel does not retrieve it."""
    depth: int
    """Length of the longest list."""

    @classmethod
    def of(cls, lists: Mapping[str, Candidates]) -> "Union":
        """The union of lists of the same users."""
        widths = [candidates.rows.shape[1] for candidates in lists.values()]
        channel = np.repeat(np.arange(len(widths)), widths)
        rank = np.concatenate([np.arange(1, width + 1, dtype=np.int32) for width in widths])
        brought = np.concatenate([candidates.rows for candidates in lists.values()], axis=1).astype(np.int64)
        users, width = brought.shape
        # Row and position of an entry in one number, so that one plain sort orders both; padding goes last.
        shift = max(1, width).bit_length()
        keys = np.where(brought != PADDING, brought, np.iinfo(np.int64).max >> shift) << shift | np.arange(width)
        keys.sort(axis=1)
        row = keys >> shift
        listed = row != np.iinfo(np.int64).max >> shift
        first = listed.copy()
        first[:, 1:] &= row[:, 1:] != row[:, :-1]
        column = np.cumsum(first, axis=1) - 1
        user, place = np.nonzero(listed)
        source, column = (keys & (1 << shift) - 1)[user, place], column[user, place]
        most = int(column.max(initial=-1)) + 1
        rows = np.full((users, most), PADDING, np.int64)
        rows[user, column] = row[user, place]
        ranks = np.zeros((len(widths), users, most), np.int32)
        ranks[channel[source], user, column] = rank[source]
        return cls(tuple(lists), rows, ranks, max(widths))

    def reciprocal(self, channel: int, weight: float, constant: float) -> Floats:
        """(B, M) weight / (constant + rank); 0 where the channel does not retrieve the item."""
        ranks = np.arange(self.depth + 1.0)
        term = np.divide(weight, constant + ranks, out=np.zeros_like(ranks), where=ranks > 0)
        return np.asarray(term[self.ranks[channel]])

    def nothing(self) -> Floats:
        """(B, M) scores before any channel adds to them; minus infinity where there is no item."""
        return np.where(self.rows != PADDING, 0.0, -np.inf)
