"""Fusion of ranked lists; an item that several channels bring stands once and keeps all of them.

B users, k candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.index.protocol import PADDING
from twotower.models.retriever import Candidates, top_of_groups
from twotower.schema.errors import ConfigError

RRF_CONSTANT = 60.0


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


def reciprocal_rank(lists: Mapping[str, Candidates], k: int, weights: Mapping[str, float] | None = None) -> Fused:
    """Reciprocal rank fusion: score = sum over channels of weight / (60 + rank) (Cormack et al. 2009, eq. 1).

    Only ranks count, so that channels whose scores have different units can meet.

    Args:
        lists: the channels' candidates by name, of the same B users; equal scores are ordered by row.
        k: candidates of the one list.
        weights: by channel, above 0; a channel without one weighs 1.

    Raises:
        ConfigError: no list, a weight that is not above 0, or one for no channel.

    >>> a = Candidates(np.array([[1, 2]]), np.array([[9, 8]], np.float32))
    >>> b = Candidates(np.array([[2, 3]]), np.array([[0.1, 0.05]], np.float32))
    >>> fused = reciprocal_rank({"a": a, "b": b}, 3)
    >>> fused.candidates.rows.tolist(), fused.channels_of(0, 0)
    ([[2, 1, 3]], ['a', 'b'])
    """
    share = _checked(weights, lists)
    return _fuse(lists, k, lambda name, rank: share[name] / (RRF_CONSTANT + rank), np.add)


def quota(lists: Mapping[str, Candidates], k: int, weights: Mapping[str, float] | None = None) -> Fused:
    """Interleave the channels in proportion to their weights; a channel that runs short leaves its places to the rest.

    The item at rank r of a channel of weight w is due at r / w; the earliest are taken, and an item that several
    channels bring is due at its earliest. Scores are minus that.

    Args:
        lists: as for `reciprocal_rank`.
        k: candidates of the one list.
        weights: by channel, above 0; a channel without one weighs 1.

    Raises:
        ConfigError: no list, a weight that is not above 0, or one for no channel.

    >>> a = Candidates(np.array([[1, 2, 3]]), np.zeros((1, 3), np.float32))
    >>> b = Candidates(np.array([[7, 8, 9]]), np.zeros((1, 3), np.float32))
    >>> quota({"a": a, "b": b}, 4, {"a": 3, "b": 1}).candidates.rows.tolist()
    [[1, 2, 3, 7]]
    """
    share = _checked(weights, lists)
    return _fuse(lists, k, lambda name, rank: -rank / share[name], np.maximum)


def _checked(weights: Mapping[str, float] | None, lists: Mapping[str, Candidates]) -> dict[str, float]:
    """The weight of each channel."""
    if not lists:
        raise ConfigError("no channel brought a list: there is nothing to fuse")
    weights = weights or {}
    if unknown := sorted(set(weights) - set(lists)):
        raise ConfigError(f"weights for {', '.join(unknown)}, but the channels are {', '.join(lists)}")
    if wrong := {name: weight for name, weight in weights.items() if not 0 < weight < np.inf}:
        raise ConfigError(f"weights {wrong}: a weight is above 0 and finite; leave a channel out instead")
    return {name: weights.get(name, 1.0) for name in lists}


def _fuse(
    lists: Mapping[str, Candidates],
    k: int,
    score_of: Callable[[str, npt.NDArray[Any]], npt.NDArray[Any]],
    combine: np.ufunc,
) -> Fused:
    names = tuple(lists)
    count = len(next(iter(lists.values())).rows)
    found = [np.nonzero(candidates.rows != PADDING) for candidates in lists.values()]
    owner = np.concatenate([owners for owners, _ in found])
    row = np.concatenate([lists[name].rows[at] for name, at in zip(names, found, strict=True)])
    due = np.concatenate([score_of(name, at[1] + 1.0) for name, at in zip(names, found, strict=True)])
    bit = np.concatenate([np.full(len(at[0]), 1 << i, np.int64) for i, at in enumerate(found)])
    size = int(row.max(initial=0)) + 1
    distinct, place = np.unique(owner * size + row, return_inverse=True)
    merged = np.full(len(distinct), 0.0 if combine is np.add else -np.inf)
    combine.at(merged, place, due)
    brought = np.zeros(len(distinct), np.int64)
    np.bitwise_or.at(brought, place, bit)
    best = top_of_groups(distinct // size, distinct % size, merged, count, k)
    # Which entry each place came from: its key is found again in the sorted distinct keys.
    keys = np.arange(count)[:, None] * size + best.rows
    entry = np.minimum(np.searchsorted(distinct, keys), max(0, len(distinct) - 1))
    shown = np.where(best.rows != PADDING, brought[entry], 0) if len(distinct) else np.zeros_like(best.rows)
    return Fused(best, names, shown)
