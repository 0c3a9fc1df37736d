"""The gate: what a delta must be like to go live, and figures of how well the chain does.

B positives, N items, D vector, W positives of held-out users.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Queries
from twotower.features.columns import Bag
from twotower.features.vocabulary import FIRST
from twotower.logs.events import EntityId
from twotower.publish.delta import Delta, Rows
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.clock import HOUR_MS
from twotower.towers.two_tower import TwoTower
from twotower.update.bounds import ClickWindows
from twotower.update.learner import Touched
from twotower.update.options import GateOptions

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

SAMPLED = 1000
"""Items whose spread is measured."""
COMPETITORS = 20_000
"""Items that the gate's recall is measured among, at most."""
GOLDEN = 16
"""Users whose answers are compared with the trained vectors."""
ROUNDING = 1e-4
"""Largest difference of two scores that counts as none."""
SAMPLED_USERS = 64
"""Users in whose lists the gate looks for items that rise."""
LISTED = 20
"""Items of such a list."""
LISTED_AMONG = 200_000
"""Items that such lists are made of, at most."""
INDEX_RECALL = 0.95
"""Share of the exact answer that what is served must find, on golden queries."""
MAX_ACCUMULATOR = 1e6
"""Largest optimizer accumulator of a row that moved, as a multiple of the version's largest: beyond it the row would
hardly move again."""
MIN_RISE_POSITIVES = 20
"""The rise of an item is judged only once it has this many positives within a window of `update.bounds`."""
MIN_ACCUMULATOR = 1e-6
"""Stands for the largest accumulator of a table that was hardly trained."""


def typical_length(weights: Floats, ids: int) -> float:
    """The median length of those rows of a table that belong to an id; the others are free.

    >>> typical_length(np.array([[0.0], [0.1], [2.0], [3.0], [4.0], [0.0], [0.0], [0.0]], np.float32), ids=3)
    3.0
    """
    trained = weights[FIRST : FIRST + ids : max(1, ids // 10_000)]
    lengths = np.linalg.norm(trained, axis=1)
    return float(np.median(lengths)) if len(lengths) else 1.0


@dataclass(frozen=True)
class Recall:
    """Recall of the held-out users before and after learning; None where they have too few positives."""

    before: float | None
    after: float | None

    def problems(self, options: GateOptions) -> list[str]:
        """What is wrong with it."""
        if self.before is None or self.after is None or self.after >= self.before - options.margin:
            return []
        return [f"recall@{options.k} of the held-out users falls from {self.before:.4f} to {self.after:.4f}"]


class Gate:
    """Compares deltas with the version that they change, and with the model of its checkpoint before any learning."""

    def __init__(self, version: Version, model: TwoTower, options: GateOptions) -> None:
        self._options = options
        self._base = version
        vocabularies = version.features.vocabularies
        tables = {name: model.tables[name] for name in (c.USER_ID, c.ITEM_ID) if name in model.tables}
        self._typical: dict[str, float] = {
            name: typical_length(table.weights, len(vocabularies[name].values)) for name, table in tables.items()
        }
        self._largest: dict[str, float] = {
            name: float(table.accumulator.max(initial=0)) for name, table in tables.items()
        }

    def check(self, delta: Delta, touched: Touched, vectors: Floats, recall: Recall) -> list[str]:
        """What is wrong with a delta, before a server's answers are compared; one sentence each.

        Args:
            delta: what was learned.
            touched: rows that moved, as they were.
            vectors: (N, D) as they are now.
            recall: of the held-out users.
        """
        problems: list[str] = []
        for name, rows in delta.tables.items():
            problems += check_rows(name, rows, touched.before_of(name, rows), self._typical[name], self._options)
            accumulator = delta.optimizer[f"{name}.accumulator"]
            problems += check_accumulators(name, accumulator, self._largest[name])
        if not np.isfinite(delta.item_vectors).all():
            problems.append("vectors of items are not finite")
        if problems:
            return problems
        # Items that were put since are not compared: however alike they are, their likeness was not learned.
        own = vectors[: self._base.items.base]
        return [*check_spread(own, self._base, self._options), *recall.problems(self._options)]

    def risen_too_far(self, windows: ClickWindows, ts_ms: Longs, clicked_items: Iterable[EntityId]) -> list[EntityId]:
        """The items that rose further within the windows of some times than their users explain."""
        users, options = min(SAMPLED_USERS, len(self._base.users)), self._options
        rises = windows.rises(clicked_items, np.unique(ts_ms).tolist(), LISTED)
        return [
            item
            for item, rise in rises.items()
            if rise.positives >= MIN_RISE_POSITIVES and rise.lists / users > options.max_rise + rise.explained
        ]


def check_spread(vectors: Floats, base: Version, options: GateOptions) -> list[str]:
    """Whether the vectors of items (N, D) have come nearer to each other than those of a version may."""
    rise = mean_cosine(vectors) - mean_cosine(np.asarray(base.item_vectors))
    if rise <= options.max_mean_cosine_rise:
        return []
    return [f"items are more alike than in {base.id}, by {rise:.3f} in the mean cosine"]


def check_rows(name: str, moved: Rows, before: Rows, typical: float, options: GateOptions) -> list[str]:
    """What is wrong with the moved rows of a table; one sentence each.

    `before` are those of them that the table had, as they were; `typical` is the length of a typical row.
    """
    if not np.isfinite(moved.values).all():
        return [f"{name}: {(~np.isfinite(moved.values).all(axis=1)).sum()} rows are not finite"]
    problems = []
    lengths = np.linalg.norm(moved.values, axis=1)
    if len(lengths) and lengths.max() > options.max_length * typical:
        problems.append(f"{name}: a row is {lengths.max():.3g} long, a typical one {typical:.3g}")
    moves = np.linalg.norm(moved.values[np.isin(moved.rows, before.rows)] - before.values, axis=1)
    if len(moves) and moves.max() > options.max_move * typical:
        problems.append(f"{name}: a row moved by {moves.max():.3g}, a typical one is {typical:.3g} long")
    return problems


def check_accumulators(name: str, accumulator: Floats, largest: float) -> list[str]:
    """What is wrong with the optimizer state (n,) of the moved rows of a table; one sentence each.

    >>> check_accumulators("item_id", np.array([1.0, np.inf], np.float32), 1.0)
    ['item_id: 1 rows have an accumulator that is not finite: they would never move again']
    """
    if len(broken := np.flatnonzero(~np.isfinite(accumulator) | (accumulator < 0))):
        return [f"{name}: {len(broken)} rows have an accumulator that is not finite: they would never move again"]
    largest_allowed = MAX_ACCUMULATOR * max(largest, MIN_ACCUMULATOR)
    if len(accumulator) and accumulator.max() > largest_allowed:
        return [f"{name}: an accumulator is {accumulator.max():.3g}, the version's largest is {largest:.3g}"]
    return []


def spaced(count: int, at_most: int) -> Longs:
    """Rows of a table of `count`, evenly spaced.

    >>> spaced(9, 3).tolist(), spaced(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, count - 1, min(at_most, count)).astype(np.int64)


def mean_cosine(vectors: Floats) -> float:
    """Mean cosine of two items, of up to 1000 over the catalogue: 1 where all vectors have collapsed into one."""
    some = vectors[spaced(len(vectors), SAMPLED)]
    count = len(some)
    total = float(np.square(some.sum(axis=0, dtype=np.float64)).sum())
    return (total - float(np.square(some, dtype=np.float64).sum())) / max(1, count * (count - 1))


def recall_among(users: Floats, targets: Longs, vectors: Floats, k: int) -> float:
    """Share of targets (W,) that are among the k nearest of their user's vector (W, D), among at most 20,000 items."""
    own = np.einsum("wd,wd->w", users, vectors[targets])
    better = (users @ vectors[spaced(len(vectors), COMPETITORS)].T > own[:, None]).sum(axis=1)
    return float((better < k).mean())


def hits(users: Floats, targets: Longs, vectors: Floats, history: Bag, k: int) -> npt.NDArray[np.bool_]:
    """Which targets (B,) are among the k nearest of their user's vector, without what the user clicked before."""
    scores = users @ vectors.T
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    owner = np.repeat(np.arange(len(users)), np.diff(history.indptr))
    scores[owner, history.rows] = -np.inf
    hit: npt.NDArray[np.bool_] = (scores > own).sum(axis=1) < k
    return hit


def check_served(version: Version, vectors: Floats, options: GateOptions) -> list[str]:
    """Compare what would be served for some golden queries with the trained vectors; one sentence a problem."""
    queries: Queries = version.queries(np.append(spaced(len(version.users), GOLDEN), -1))
    users = version.two_tower.user_vectors(queries)
    if not np.isfinite(users).all():
        return ["golden queries: a user's vector is not finite"]
    k = min(options.k, int((~version.gone).sum()))
    answer = version.two_tower.retrieve(queries, k)
    scores = users @ vectors.T
    scores[:, version.gone] = -np.inf
    best = np.sort(scores, axis=1)[:, ::-1][:, :k]
    asked = users.any(axis=1)
    as_good = answer.scores[asked] >= best[asked, -1:] - ROUNDING
    off = np.abs(np.take_along_axis(scores, np.maximum(answer.rows, 0), axis=1) - answer.scores)[asked]
    if off.size and not np.nanmax(np.where(answer.rows[asked] >= 0, off, 0)) <= ROUNDING:
        return ["golden queries: what is served has other vectors than what was trained"]
    recall = float(as_good.mean()) if as_good.size else 1.0
    if recall < INDEX_RECALL:
        return [f"golden queries: the index finds {recall:.3f} of the exact answer"]
    return []


def lists_with(version: Version, vectors: Floats, rows: Longs) -> Longs:
    """In how many lists of a fixed sample of users some items (n,) are: lists of 20, among at most 200,000 items.

    `version` is as it is served, `vectors` (N, D) are those of its items, `rows` (n,) catalogue rows.
    """
    users = version.two_tower.user_vectors(version.queries(spaced(len(version.users), SAMPLED_USERS)))
    users = users[users.any(axis=1)]
    others = spaced(len(vectors), LISTED_AMONG)
    listed = max(1, round(LISTED * len(others) / len(vectors)))  # a share of the items fills that share of a list
    others = others[~version.gone[others]]
    if len(others) <= listed:
        return np.full(len(rows), len(users), np.int64)
    last = np.partition(users @ vectors[others].T, -listed, axis=1)[:, -listed]
    counts: Longs = (users @ vectors[rows].T >= last[:, None]).sum(axis=0, dtype=np.int64)
    return counts


def drift(recent: Longs, clicks: Longs) -> float:
    """How far the latest positives (W,) differ from the version's clicks of each item (N,): half the sum of the
    differences of their shares, 0 = alike, 1 = nothing in common.
    """
    if not len(recent) or not clicks.sum():
        return 0.0
    now = np.bincount(recent, minlength=len(clicks)) / len(recent)
    return float(np.abs(now - clicks / clicks.sum()).sum() / 2)


def by_hour(ts_ms: Longs, hit: npt.NDArray[np.bool_]) -> dict[str, list[int]]:
    """Hits and positives by hour since 1970.

    >>> by_hour(np.array([3_600_000, 3_700_000]), np.array([True, False]))
    {'1': [1, 2]}
    """
    hours = ts_ms // HOUR_MS
    return {
        str(hour): [int(hit[hours == hour].sum()), int((hours == hour).sum())] for hour in np.unique(hours).tolist()
    }
