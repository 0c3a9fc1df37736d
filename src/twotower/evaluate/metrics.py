"""Full-catalogue metrics of ranked lists against held-out positives, with bootstrap intervals over users.

B users, K the longest cut-off, N items. Every user with held-out positives counts, one without candidates scores 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag
from twotower.index.protocol import PADDING

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A metric with its 95 % interval; None where resampling users says nothing about it (coverage)."""

    value: float
    ci95: tuple[float, float] | None

    def report(self) -> dict[str, Any]:
        """The figure as JSON values, rounded: `{"value", "ci95"}`."""
        ci95 = None if self.ci95 is None else [round(bound, 5) for bound in self.ci95]
        return {"value": round(self.value, 5), "ci95": ci95}


@dataclass(frozen=True)
class PerUser:
    """Metrics of single users, before they are averaged."""

    values: dict[str, Floats]
    """(B,) by name, such as `recall@50`."""
    weights: dict[str, Floats] = field(default_factory=dict)
    """(B,) of metrics whose mean does not weight users equally: the popularity percentile counts every listed item."""
    whole: dict[str, float] = field(default_factory=dict)
    """Metrics of all lists together: coverage."""


def score_lists(
    rows: npt.NDArray[np.int64], truth: Bag, item_positives: npt.NDArray[np.int64], ks: Sequence[int]
) -> PerUser:
    """Recall, NDCG, hit rate, coverage and popularity percentile at each cut-off.

    recall@k = hits / number of held-out items; ndcg@k has the ideal list cut at k; hit@k = 1 if there is any hit;
    coverage@k = share of the items with a training positive that any list holds; pop_pct@k = mean over all listed
    items of the share of items with a training positive that have at most as many as the listed one.

    Args:
        rows: (B, K) ranked items, -1 where a list has ended.
        truth: the distinct held-out items of each user; none is empty.
        item_positives: (N,) training positives of each item.
        ks: cut-offs. One above K judges lists of K, which must then be the whole catalogue.
    """
    size = len(item_positives)
    counts = np.diff(truth.indptr)
    owner = np.repeat(np.arange(len(counts)), counts)
    keys = np.arange(len(rows))[:, None] * size + rows
    listed = rows != PADDING
    hit = np.isin(keys, owner * size + truth.rows) & listed
    known = np.sort(item_positives[item_positives > 0])
    percentile = np.searchsorted(known, item_positives, side="right") / max(1, len(known))
    discount = 1 / np.log2(np.arange(2, rows.shape[1] + 2))
    ideal = np.concatenate([[0.0], np.cumsum(discount)])
    values: dict[str, Floats] = {}
    weights: dict[str, Floats] = {}
    whole: dict[str, float] = {}
    for k in ks:
        hits = hit[:, :k].sum(axis=1)
        values[f"recall@{k}"] = hits / counts
        values[f"ndcg@{k}"] = (hit[:, :k] * discount[:k]).sum(axis=1) / ideal[np.minimum(counts, min(k, rows.shape[1]))]
        values[f"hit@{k}"] = (hits > 0).astype(np.float64)
        shown = np.unique(rows[:, :k][listed[:, :k]])
        # Counted channels also list items without a training positive (new ones, and those that only histories know).
        whole[f"coverage@{k}"] = (item_positives[shown] > 0).sum() / max(1, len(known))
        length = listed[:, :k].sum(axis=1)
        mean = (percentile[np.maximum(rows[:, :k], 0)] * listed[:, :k]).sum(axis=1) / np.maximum(length, 1)
        values[f"pop_pct@{k}"] = mean
        weights[f"pop_pct@{k}"] = length.astype(np.float64)
    return PerUser(values, weights, whole)


def summarise(per_user: PerUser, resamples: int, seed: int) -> dict[str, Figure]:
    """Means over users with percentile intervals of the bootstrap (Efron 1979); all metrics see the same resamples."""
    names = list(per_user.values)
    values = np.stack([per_user.values[name] for name in names], axis=1)
    weights = np.stack([per_user.weights.get(name, np.ones(len(values))) for name in names], axis=1)
    figures = dict(zip(names, _bootstrap(values, weights, resamples, seed), strict=True))
    return figures | {name: Figure(value, None) for name, value in per_user.whole.items()}


def difference(ours: Floats, theirs: Floats, resamples: int, seed: int) -> Figure:
    """Mean paired difference over users (B,) with its interval; it is narrower than those of the two means."""
    return _bootstrap((ours - theirs)[:, None], np.ones((len(ours), 1)), resamples, seed)[0]


def _bootstrap(values: Floats, weights: Floats, resamples: int, seed: int) -> list[Figure]:
    """The weighted mean of each column (B, M) with its interval over resampled rows."""
    generator = np.random.default_rng(seed)
    count = len(values)
    means = np.empty((resamples, values.shape[1]))
    for start in range(0, resamples, 64):
        stop = min(start + 64, resamples)
        drawn = [np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(start, stop)]
        times = np.stack(drawn).astype(np.float64)
        means[start:stop] = (times @ (values * weights)) / np.maximum(times @ weights, 1e-300)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    mean = (values * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-300)
    return [Figure(float(m), (float(a), float(b))) for m, a, b in zip(mean, low, high, strict=True)]
