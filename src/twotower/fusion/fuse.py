"""Fusion of ranked lists; an item that several channels bring stands once and keeps all of them.

B users, k candidates, C channels, M the most different items that the channels bring one user.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates
from twotower.index.protocol import PADDING
from twotower.schema.errors import ConfigError

Floats = npt.NDArray[np.float64]

RRF, QUOTA = "rrf", "quota"
RRF_CONSTANT = 60.0
FILL = 1e-9
"""What a weight of 0 stands for, as a share of the least other weight: behind everything, in its own order."""


@dataclass(frozen=True)
class Fused:
    """One list a user, and which channels brought each item."""

    candidates: Candidates
    channels: tuple[str, ...]
    brought_by: npt.NDArray[np.int64]
    """(B, k) bit i is set where channel i brought the item."""

    def channels_of(self, user: int, place: int) -> list[str]:
        """The channels behind one candidate."""
        bits = int(self.brought_by[user, place])
        return [name for bit, name in enumerate(self.channels) if bits >> bit & 1]


@dataclass(frozen=True)
class Fusion:
    """How the channels of a version become one list."""

    method: str = RRF
    """`rrf` or `quota`."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """By channel, at least 0; a channel without one weighs 1."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Of `rrf`, by channel; a channel without one has 60."""
    depth: int = 1
    """Candidates that each channel is asked for, if there are several and k is smaller."""
    reserved: Mapping[str, float] = field(default_factory=dict)
    """By channel, the least share of the places that it has, evenly from the first to the last."""

    def asked(self, k: int, channels: Sequence[str]) -> int:
        """How many candidates each of some channels is asked for, so that they give one list of k.

        >>> Fusion(depth=1000).asked(50, ["two_tower", "popular"]), Fusion(depth=1000).asked(50, ["popular"])
        (1000, 50)
        """
        return max(k, self.depth) if len(channels) > 1 else k

    def fuse(self, lists: Mapping[str, Candidates], k: int) -> Fused:
        """One list a user out of the lists of some channels; a single one keeps its own scores.

        Raises:
            ConfigError: no list.
        """
        if len(lists) == 1:
            name, only = next(iter(lists.items()))
            rows, scores = only.rows[:, :k], only.scores[:, :k]
            return Fused(Candidates(rows, scores), (name,), (rows != PADDING).astype(np.int64))
        reserved = {name: share for name, share in self.reserved.items() if share and name in lists}
        most = sum(candidates.rows.shape[1] for candidates in lists.values()) if reserved else k
        weights = {name: weight for name, weight in self.weights.items() if name in lists}
        if self.method == QUOTA:
            fused = quota(lists, most, weights)
        else:
            constants = {name: constant for name, constant in self.constants.items() if name in lists}
            fused = reciprocal_rank(lists, most, weights, constants)
        return reserve(fused, lists, k, reserved) if reserved else fused


def reciprocal_rank(
    lists: Mapping[str, Candidates],
    k: int,
    weights: Mapping[str, float] | None = None,
    constants: Mapping[str, float] | None = None,
) -> Fused:
    """Reciprocal rank fusion: score = sum over channels of weight / (constant + rank) (Cormack et al. 2009, eq. 1).

    Only ranks count, so that channels whose scores have different units can meet. The paper has one constant, 60; with
    its own for each channel, a term can follow how fast that channel's hits grow rare down its list.

    Args:
        lists: the channels' candidates by name, of the same B users; equal scores are ordered by row.
        k: candidates of the one list.
        weights: by channel, at least 0; a channel without one weighs 1. Items of weight 0 stand behind all others.
        constants: by channel, at least 0; a channel without one has 60.

    Raises:
        ConfigError: no list, a weight or constant that is below 0, or one for no channel.

    >>> a = Candidates(np.array([[1, 2]]), np.array([[9, 8]], np.float32))
    >>> b = Candidates(np.array([[2, 3]]), np.array([[0.1, 0.05]], np.float32))
    >>> fused = reciprocal_rank({"a": a, "b": b}, 3)
    >>> fused.candidates.rows.tolist(), fused.channels_of(0, 0)
    ([[2, 1, 3]], ['a', 'b'])
    """
    share = shares(weights, lists)
    constant = {name: _checked(constants, lists, "constant").get(name, RRF_CONSTANT) for name in lists}
    union = Union.of(lists)
    total = union.nothing(RRF)
    for channel, name in enumerate(union.channels):
        total += union.reciprocal(channel, share[name], constant[name])
    return _best(union, total, k)


def quota(lists: Mapping[str, Candidates], k: int, weights: Mapping[str, float] | None = None) -> Fused:
    """Interleave the channels in proportion to their weights; a channel that runs short leaves its places to the rest.

    The item at rank r of a channel of weight w is due at r / w; the earliest are taken, and an item that several
    channels bring is due at its earliest. Scores are minus that.

    Args:
        lists: as for `reciprocal_rank`.
        k: candidates of the one list.
        weights: by channel, at least 0; a channel without one weighs 1. Items of weight 0 stand behind all others.

    Raises:
        ConfigError: no list, a weight that is below 0, or one for no channel.

    >>> a = Candidates(np.array([[1, 2, 3]]), np.zeros((1, 3), np.float32))
    >>> b = Candidates(np.array([[7, 8, 9]]), np.zeros((1, 3), np.float32))
    >>> quota({"a": a, "b": b}, 4, {"a": 3, "b": 1}).candidates.rows.tolist()
    [[1, 2, 3, 7]]
    """
    share = shares(weights, lists)
    union = Union.of(lists)
    earliest = union.nothing(QUOTA)
    for channel, name in enumerate(union.channels):
        np.maximum(earliest, union.due(channel, share[name]), out=earliest)
    return _best(union, earliest, k)


def reserve(fused: Fused, lists: Mapping[str, Candidates], k: int, shares: Mapping[str, float]) -> Fused:
    """A fused list cut to k, in which some channels have at least their share of the places.

    The item at rank r of a channel with share s is due at place r / s. One that stands behind is moved there; scores
    stay with the places, so that they go on falling.

    Args:
        fused: all that the channels brought, of the same users.
        lists: the channels' candidates by name.
        k: candidates of the one list.
        shares: by channel.

    Raises:
        ConfigError: the shares leave nothing for the others.

    >>> a = Candidates(np.array([[1, 2, 3, 4]]), np.array([[9, 8, 7, 6]], np.float32))
    >>> b = Candidates(np.array([[7, 8]]), np.array([[5, 4]], np.float32))
    >>> both = Fusion("rrf", {"b": 0.0}, reserved={"b": 0.5}).fuse({"a": a, "b": b}, 4)
    >>> both.candidates.rows.tolist(), both.channels_of(0, 1)
    ([[1, 7, 2, 8]], ['b'])
    """
    if not sum(shares.values()) < 1 or min(shares.values()) < 0:
        raise ConfigError(f"reserved shares {dict(shares)}: each is at least 0, and they sum to less than 1")
    rows = fused.candidates.rows
    order = np.tile(np.arange(rows.shape[1]), (len(rows), 1))
    for user, listed in enumerate(rows):
        place = {row: at for at, row in enumerate(listed.tolist()) if row != PADDING}
        due = sorted(
            (round(rank / share) - 1, place[row])
            for name, share in shares.items()
            for rank, row in enumerate(lists[name].rows[user, : int(k * share)].tolist(), 1)
            if row != PADDING
        )
        key = np.arange(rows.shape[1], dtype=np.float64)
        moved, behind = 0, -1.0
        for wanted, at in due:
            if key[at] > wanted:
                behind = max(behind, wanted - moved - 0.5)  # those moved before it push it back by one each
                key[at], moved = behind, moved + 1
        order[user] = np.argsort(key, kind="stable")
    width = min(k, rows.shape[1])
    chosen = order[:, :width]
    whole = np.full((len(rows), k), PADDING, np.int64)
    whole[:, :width] = np.take_along_axis(rows, chosen, axis=1)
    scores = np.full((len(rows), k), -np.inf, np.float32)
    scores[:, :width] = fused.candidates.scores[:, :width]
    brought = np.zeros((len(rows), k), np.int64)
    brought[:, :width] = np.take_along_axis(fused.brought_by, chosen, axis=1)
    return Fused(Candidates(whole, scores), fused.channels, brought)


@dataclass(frozen=True)
class Union:
    """What some channels bring, each item of a user once."""

    channels: tuple[str, ...]
    rows: npt.NDArray[np.int64]
    """(B, M) catalogue rows, rising, -1 at the end of a shorter union."""
    ranks: npt.NDArray[np.int32]
    """(C, B, M) rank of the item in each channel's list, from 1; 0 where the channel does not bring it."""
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
        # Row and place of an entry in one number, so that one plain sort orders both; padding goes last.
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
        """(B, M) weight / (constant + rank); 0 where the channel does not bring the item."""
        term = weight / (constant + np.arange(self.depth + 1)) if constant else weight / self._from_1()
        term[0] = 0.0
        return np.asarray(term[self.ranks[channel]])

    def due(self, channel: int, weight: float) -> Floats:
        """(B, M) - rank / weight; minus infinity where the channel does not bring the item."""
        term = -self._from_1() / weight
        term[0] = -np.inf
        return np.asarray(term[self.ranks[channel]])

    def _from_1(self) -> Floats:
        ranks: Floats = np.maximum(np.arange(self.depth + 1.0), 1.0)
        return ranks

    def nothing(self, method: str) -> Floats:
        """(B, M) scores before any channel has its say; minus infinity where there is no item."""
        return np.where(self.rows != PADDING, 0.0 if method == RRF else -np.inf, -np.inf)

    def best(self, scores: Floats, k: int) -> npt.NDArray[np.bool_]:
        """(B, M) true at the k best items of each user by scores (B, M), minus infinity at padding; ties by row."""
        listed: npt.NDArray[np.bool_] = self.rows != PADDING
        most = scores.shape[1]
        if most <= k:
            return listed
        last = np.partition(scores, most - k, axis=1)[:, most - k, None]
        chosen: npt.NDArray[np.bool_] = scores >= last
        over = np.flatnonzero(chosen.sum(axis=1) > k)
        level = scores[over] == last[over]
        room = k - (scores[over] > last[over]).sum(axis=1, keepdims=True)
        chosen[over] &= ~level | (np.cumsum(level, axis=1) <= room)
        return chosen & listed


def shares(weights: Mapping[str, float] | None, channels: Mapping[str, Any] | Sequence[str]) -> dict[str, float]:
    """The weight of each channel, all above 0: 0 becomes so small a share that it only fills what others leave free.

    Raises:
        ConfigError: no channel, a weight that is below 0, or one for no channel.

    >>> shares({"a": 2, "b": 0}, ["a", "b", "c"])
    {'a': 2.0, 'b': 1e-09, 'c': 1.0}
    """
    if not channels:
        raise ConfigError("no channel brought a list: there is nothing to fuse")
    given = _checked(weights, channels, "weight")
    every = {name: float(given.get(name, 1.0)) for name in channels}
    least = min((weight for weight in every.values() if weight), default=1.0)
    return {name: weight or least * FILL for name, weight in every.items()}


def _checked(
    values: Mapping[str, float] | None, channels: Mapping[str, Any] | Sequence[str], what: str
) -> Mapping[str, float]:
    values = values or {}
    if unknown := sorted(set(values) - set(channels)):
        raise ConfigError(f"{what}s for {', '.join(unknown)}, but the channels are {', '.join(channels)}")
    if wrong := {name: value for name, value in values.items() if not 0 <= value < np.inf}:
        raise ConfigError(f"{what}s {wrong}: a {what} is at least 0 and finite")
    return values


def _best(union: Union, scores: Floats, k: int) -> Fused:
    """The k best of each user, by score falling and row rising."""
    users = len(union.rows)
    owner, column = np.nonzero(union.best(scores, k))
    place = np.arange(len(owner)) - np.searchsorted(owner, np.arange(users))[owner]
    score = np.full((users, k), -np.inf)
    score[owner, place] = scores[owner, column]
    row = np.full((users, k), PADDING, np.int64)
    row[owner, place] = union.rows[owner, column]
    brought = np.zeros((users, k), np.int64)
    for channel, ranks in enumerate(union.ranks):
        brought[owner, place] |= (ranks[owner, column] > 0).astype(np.int64) << channel
    order = np.argsort(-score, axis=1, kind="stable")
    row, score, brought = (np.take_along_axis(values, order, axis=1) for values in (row, score, brought))
    return Fused(Candidates(row, score.astype(np.float32)), union.channels, brought)
