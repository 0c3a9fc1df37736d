"""How many lists an approximate index probes for a number of neighbours: measured against exact search.

Q queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROUNDING: Final = 1e-6
"""How much lower than the k-th exact score a score may be, relative to 1, and still count as found."""


@dataclass(frozen=True)
class Tuned:
    """How many lists to probe for k neighbours, as measured when the index was built.

    Attributes:
        k: requested neighbours.
        nprobe: lists probed for them, the fewest that reach the required recall.
        recall: share of the exact neighbours found on the tuning queries; neighbours tied with the k-th are as good.
        latency_ms: median time of one query alone.
        queries: number of tuning queries.
    """

    k: int
    nprobe: int
    recall: float
    latency_ms: float
    queries: int


def fewest_probes(recall_at: Callable[[int], float], recall: float, lists: int) -> tuple[int, float]:
    """The fewest probes that reach a recall, and the recall that they reach; all lists where none does.

    The number is doubled until the recall is reached, and then halved into.

    >>> fewest_probes(lambda nprobe: min(1.0, nprobe / 10), 0.7, 64)
    (7, 0.7)
    """
    low, high, reached = 0, 1, recall_at(1)
    while reached < recall and high < lists:
        low, high = high, min(2 * high, lists)
        reached = recall_at(high)
    while high - low > 1:
        middle = (low + high) // 2
        measured = recall_at(middle)
        if measured >= recall:
            high, reached = middle, measured
        else:
            low = middle
    return high, reached


def probes_for(tuning: Sequence[Tuned], depth: float, lists: int) -> int:
    """Lists to probe for `depth` neighbours.

    That of the nearest tuned k from that number up; beyond all of them the largest is scaled in proportion. Without
    tuning every list is probed, and the answer is exact.
    """
    if not tuning:
        return lists
    for tuned in tuning:
        if tuned.k >= depth:
            return tuned.nprobe
    largest = tuning[-1]
    return min(lists, int(np.ceil(largest.nprobe * depth / largest.k)))


def sample_of(queries: NDArray[np.float32], most: int) -> NDArray[np.float32]:
    """At most `most` of some queries (Q, D), evenly spaced.

    >>> sample_of(np.arange(6, dtype=np.float32)[:, None], 3).ravel().tolist()
    [0.0, 2.0, 5.0]
    """
    spread = np.linspace(0, len(queries) - 1, min(len(queries), most)).astype(np.int64)
    return np.ascontiguousarray(queries[spread])


def good_enough(last: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """(Q, 1) the lowest scores that count as found, of exact k-th ones (Q,)."""
    return np.expand_dims(last - ROUNDING * np.maximum(1, np.abs(last)), 1)
