"""Whether probabilities mean what they say: Platt scaling, the expected calibration error, area under the curve.

n impressions, their log-odds or probabilities p, and whether they were clicked.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.schema.errors import DataError

Floats = npt.NDArray[np.float64]

BINS = 10
_STEPS = 100
_LEAST_SCALE = 1e-3
"""A smaller scale would turn the order around or make all scores equal: the ranker has learned nothing."""


@dataclass(frozen=True)
class Platt:
    """Probability = sigmoid(scale * log-odds + offset), scale > 0: the order of scores stays (Platt 1999)."""

    scale: float
    offset: float

    def probability(self, logits: Floats) -> Floats:
        """Probabilities (n,) from log-odds (n,)."""
        return sigmoid(self.scale * logits + self.offset)


def sigmoid(logits: Floats) -> Floats:
    """Probabilities from log-odds, without overflow."""
    return np.exp(-np.logaddexp(0, -logits))


def fit_platt(logits: Floats, clicked: Floats) -> Platt:
    """The scaling of greatest likelihood, by Newton's method.

    Two numbers against thousands of clicks need none of the smoothed targets of the paper.

    Args:
        logits: (n,) log-odds.
        clicked: (n,) 0 or 1, both of which occur.

    Raises:
        DataError: the scores do not rise with clicks.

    >>> logits = np.repeat([-2.0, 2.0], 100)
    >>> clicked = np.concatenate([np.arange(100) < 27, np.arange(100) < 73]).astype(float)
    >>> platt = fit_platt(logits, clicked)  # sigmoid(0.5 * 2) = 0.73
    >>> round(platt.scale, 2), round(abs(platt.offset), 2)
    (0.5, 0.0)
    """
    design = np.stack([logits, np.ones_like(logits)], axis=1)
    rate = clicked.mean()
    found = np.array([0.0, np.log(rate) - np.log1p(-rate)])
    for _ in range(_STEPS):
        p = sigmoid(design @ found)
        gradient = design.T @ (p - clicked)
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        found = found - step / max(1.0, float(np.abs(step).max()) / 2)
        if np.abs(step).max() < 1e-10:
            break
    if not found[0] > _LEAST_SCALE:
        raise DataError(
            f"log-odds scaled by {found[0]:.3g} would fit best: on impressions that it did not see the ranker orders "
            "no better than chance. Train on more days, or for fewer epochs"
        )
    return Platt(float(found[0]), float(found[1]))


def calibration_error(p: Floats, clicked: Floats, bins: int = BINS) -> float:
    """Expected calibration error: |mean probability - click rate| over bins of equal size, their mean.

    Bins of equal size, not of equal width (Naeini et al. 2015): click probabilities crowd in a corner.

    >>> round(calibration_error(np.full(100, 0.5), np.repeat([0.0, 1.0], [60, 40])), 3)
    0.1
    """
    return float(sum(row["share"] * abs(row["probability"] - row["clicked"]) for row in reliability(p, clicked, bins)))


def reliability(p: Floats, clicked: Floats, bins: int = BINS) -> list[dict[str, Any]]:
    """Bins of impressions by probability, lowest first: their share, mean probability and click rate.

    Equal probabilities stay in one bin, so that no order of rows decides; a bin may then be larger than others.
    """
    ordered = np.sort(p)
    place = np.searchsorted(ordered, p, side="left") * bins // max(1, len(p))
    return [
        {
            "share": float(inside.mean()),
            "probability": float(p[inside].mean()),
            "clicked": float(clicked[inside].mean()),
        }
        for one in range(bins)
        if (inside := place == one).any()
    ]


def auc(scores: npt.NDArray[np.floating], clicked: Floats) -> float:
    """The share of pairs of a clicked and another impression that stand in the right order, ties as half of one.

    NaN where one of both kinds is missing.

    >>> auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
    0.875
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    clicks = clicked.sum()
    others = len(clicked) - clicks
    if not clicks or not others:
        return float("nan")
    return float(((ranks * clicked).sum() - clicks * (clicks + 1) / 2) / (clicks * others))


def auc_within(scores: npt.NDArray[np.floating], clicked: Floats, groups: npt.NDArray[np.integer]) -> float:
    """The same over pairs of the same group alone.

    >>> auc_within(np.array([0.1, 0.4, 0.9, 0.8]), np.array([0.0, 1.0, 0.0, 1.0]), np.array([1, 1, 2, 2]))
    0.5
    """
    parts = [(scores[inside], clicked[inside]) for one in np.unique(groups) if (inside := groups == one).any()]
    pairs = np.array([own.sum() * (len(own) - own.sum()) for _, own in parts])
    each = [auc(values, own) if count else 0.0 for (values, own), count in zip(parts, pairs, strict=True)]
    return float((pairs * each).sum() / pairs.sum()) if pairs.sum() else float("nan")


def log_loss(p: Floats, clicked: Floats) -> float:
    """Mean of -log of the probability of what happened."""
    return float(-np.mean(np.log(np.where(clicked > 0, p, 1 - p))))
