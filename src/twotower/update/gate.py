"""The gate: what a delta must be like to go live, and figures of how well the chain does.

B positives, N items, D vector, W positives of users whom nothing is trained on.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Queries
from twotower.features.columns import Bag
from twotower.features.vocabulary import FIRST
from twotower.publish.delta import Rows
from twotower.publish.version import Version

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SAMPLED = 1000
"""Items whose spread is measured."""
COMPETITORS = 20_000
"""Items that the gate's recall is measured among, at most."""
GOLDEN = 16
ROUNDING = 1e-4
SAMPLED_USERS = 64
"""Users in whose lists the gate looks for items that rise."""
LISTED = 20
"""Items of such a list."""
LISTED_AMONG = 200_000
"""Items that such lists are made of, at most."""
LEAST_ACCUMULATED = 1e-6
"""Stands for the largest accumulator of a table that was hardly trained."""


@dataclass(frozen=True)
class Limits:
    """What a delta must keep."""

    most_move: float = 10.0
    """Largest change of a row, in lengths of a typical row."""
    most_length: float = 50.0
    """Longest row, in lengths of a typical row."""
    most_alike: float = 0.2
    """How much more alike two items may be on average than in the version: the cosine's mean."""
    k: int = 50
    margin: float = 0.02
    """How much recall@k of the untrained users may fall below that of what is served."""
    least: int = 100
    """Positives of untrained users from which on their recall is judged."""
    window: int = 1000
    """Latest positives of untrained users that are judged."""
    index_recall: float = 0.95
    """Share of the exact answer that the served path must find."""
    most_accumulated: float = 1e6
    """Largest optimizer accumulator of a row, in those of the version's largest: a row beyond it hardly moves again."""
    most_rise: float = 0.5
    """How much the share of lists that an item is in may rise within a window, beyond what its users explain."""
    rise_least: int = 20
    """Positives of an item within the window from which on its rise is judged."""


def typical_length(weights: Floats, ids: int) -> float:
    """The median length of the rows of a table that belong to some id; its room is empty.

    >>> typical_length(np.array([[0.0], [0.1], [2.0], [3.0], [4.0], [0.0], [0.0], [0.0]], np.float32), ids=3)
    3.0
    """
    trained = weights[FIRST : FIRST + ids : max(1, ids // 10_000)]
    lengths = np.linalg.norm(trained, axis=1)
    return float(np.median(lengths)) if len(lengths) else 1.0


def check_rows(name: str, moved: Rows, before: Rows, typical: float, limits: Limits) -> list[str]:
    """What is wrong with the moved rows of a table; one sentence each.

    Args:
        name: of the table.
        moved: as they are.
        before: as those of them were that the table had before.
        typical: the length of a row.
        limits: what they must keep.
    """
    if not np.isfinite(moved.values).all():
        return [f"{name}: {(~np.isfinite(moved.values).all(axis=1)).sum()} rows are not finite"]
    problems = []
    lengths = np.linalg.norm(moved.values, axis=1)
    if len(lengths) and lengths.max() > limits.most_length * typical:
        problems.append(f"{name}: a row is {lengths.max():.3g} long, a typical one {typical:.3g}")
    moves = np.linalg.norm(moved.values[np.isin(moved.rows, before.rows)] - before.values, axis=1)
    if len(moves) and moves.max() > limits.most_move * typical:
        problems.append(f"{name}: a row moved by {moves.max():.3g}, a typical one is {typical:.3g} long")
    return problems


def check_accumulators(name: str, accumulator: Floats, largest: float, limits: Limits) -> list[str]:
    """What is wrong with the optimizer state (n,) of the moved rows of a table; one sentence each.

    >>> check_accumulators("item_id", np.array([1.0, np.inf], np.float32), 1.0, Limits())
    ['item_id: 1 rows have an accumulator that is not finite: they would never move again']
    """
    if len(broken := np.flatnonzero(~np.isfinite(accumulator) | (accumulator < 0))):
        return [f"{name}: {len(broken)} rows have an accumulator that is not finite: they would never move again"]
    most = limits.most_accumulated * max(largest, LEAST_ACCUMULATED)
    if len(accumulator) and accumulator.max() > most:
        return [f"{name}: an accumulator is {accumulator.max():.3g}, the version's largest is {largest:.3g}"]
    return []


def alikeness(vectors: Floats) -> float:
    """Mean cosine of two items, of up to 1000 over the catalogue: 1 where all vectors have collapsed into one."""
    some = vectors[np.linspace(0, len(vectors) - 1, min(SAMPLED, len(vectors))).astype(np.int64)]
    count = len(some)
    total = float(np.square(some.sum(axis=0, dtype=np.float64)).sum())
    return (total - float(np.square(some, dtype=np.float64).sum())) / max(1, count * (count - 1))


def recall_among(users: Floats, targets: Longs, vectors: Floats, k: int) -> float:
    """Share of targets (W,) that are among the k nearest of their user's vector (W, D), among at most 20,000 items."""
    spread = np.unique(np.linspace(0, len(vectors) - 1, min(COMPETITORS, len(vectors))).astype(np.int64))
    own = np.einsum("wd,wd->w", users, vectors[targets])
    better = (users @ vectors[spread].T > own[:, None]).sum(axis=1)
    return float((better < k).mean())


def hits(users: Floats, targets: Longs, vectors: Floats, history: Bag, k: int) -> npt.NDArray[np.bool_]:
    """Which targets (B,) are among the k nearest of their user's vector, what the user clicked before left out."""
    scores = users @ vectors.T
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    owner = np.repeat(np.arange(len(users)), np.diff(history.indptr))
    scores[owner, history.rows] = -np.inf
    found: npt.NDArray[np.bool_] = (scores > own).sum(axis=1) < k
    return found


def check_served(version: Version, vectors: Floats, limits: Limits) -> list[str]:
    """Ask what would be served some golden queries, and compare with the trained vectors; one sentence a problem."""
    rows = np.unique(np.linspace(0, len(version.users) - 1, min(GOLDEN, len(version.users))).astype(np.int64))
    queries: Queries = version.queries(np.concatenate([rows, [-1]]))
    users = version.two_tower.user_vectors(queries)
    if not np.isfinite(users).all():
        return ["golden queries: a user's vector is not finite"]
    k = min(limits.k, int((~version.gone).sum()))
    found = version.two_tower.retrieve(queries, k)
    scores = users @ vectors.T
    scores[:, version.gone] = -np.inf
    best = np.sort(scores, axis=1)[:, ::-1][:, :k]
    asked = users.any(axis=1)
    enough = found.scores[asked] >= best[asked, -1:] - ROUNDING
    off = np.abs(np.take_along_axis(scores, np.maximum(found.rows, 0), axis=1) - found.scores)[asked]
    if off.size and not np.nanmax(np.where(found.rows[asked] >= 0, off, 0)) <= ROUNDING:
        return ["golden queries: what is served has other vectors than what was trained"]
    recall = float(enough.mean()) if enough.size else 1.0
    return [f"golden queries: the index finds {recall:.3f} of the exact answer"] if recall < limits.index_recall else []


def lists_with(version: Version, vectors: Floats, rows: Longs) -> Longs:
    """In how many lists of 20, among at most 200,000 items, of a fixed sample of users some items (n,) are.

    Args:
        version: as it is served.
        vectors: (N, D) of its items.
        rows: (n,) of the catalogue.
    """
    count = len(version.users)
    sample = np.unique(np.linspace(0, count - 1, min(SAMPLED_USERS, count)).astype(np.int64))
    users = version.two_tower.user_vectors(version.queries(sample))
    users = users[users.any(axis=1)]
    others = np.unique(np.linspace(0, len(vectors) - 1, min(LISTED_AMONG, len(vectors))).astype(np.int64))
    listed = max(1, round(LISTED * len(others) / len(vectors)))  # of a share of the items, that share of a list
    others = others[~version.gone[others]]
    if len(others) <= listed:
        return np.full(len(rows), len(users), np.int64)
    last = np.partition(users @ vectors[others].T, -listed, axis=1)[:, -listed]
    counts: Longs = (users @ vectors[rows].T >= last[:, None]).sum(axis=0, dtype=np.int64)
    return counts


def drift(recent: Longs, clicks: Longs) -> float:
    """How far the latest positives (W,) are from the version's clicks of each item (N,): half the sum of differences
    of their shares, 0 = alike, 1 = nothing in common.
    """
    if not len(recent) or not clicks.sum():
        return 0.0
    now = np.bincount(recent, minlength=len(clicks)) / len(recent)
    return float(np.abs(now - clicks / clicks.sum()).sum() / 2)


def by_hour(ts_ms: Longs, found: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """Hits and positives by hour since 1970.

    >>> by_hour(np.array([3_600_000, 3_700_000]), np.array([True, False]))
    {'1': [1, 2]}
    """
    hours = ts_ms // 3_600_000
    return {
        str(hour): [int(found[hours == hour].sum()), int((hours == hour).sum())] for hour in np.unique(hours).tolist()
    }
