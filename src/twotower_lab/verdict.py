"""Intervals of paired differences, and the rule by which a claim holds, does not, or depends. Fixed before any run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

UPPER: Final = 0.975
"""The quantile at the upper end of an interval of 95 %."""

HOLDS, DOES_NOT, DEPENDS, OPEN = "holds", "does not", "depends", "not asked"
LIES, BLIND, SEES_MORE, AGREES = "lies", "is blind", "sees more", "agrees"

RULE: Final = (
    "An interval of 95 % is the wider of two: over seeds (Student's t on the means of the seeds) and over users "
    "(normal, on their paired differences, seeds weighing alike). Of a world every seed has other users; of a real log "
    "the users are the same, and a user's differences are first averaged over the seeds. A claim is judged by the true "
    "taste on a world and by held-out clicks on a real log. It holds if an interval is above zero somewhere and none "
    "is below it, it does not if none is above, and it depends if one is above and another below. The offline metric "
    "lies where clicks and true taste of the same arms have intervals on different sides of zero; it is blind where "
    "only the truth's is off zero, and sees more than there is where only the clicks' is."
)


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of 95 %."""

    value: float
    low: float
    high: float
    seeds: int
    users: int
    """Users of all seeds together; of a real log, users of one seed."""

    @property
    def sign(self) -> int:
        """1 above zero, -1 below it, 0 around it."""
        return int(self.low > 0) - int(self.high < 0)

    def flipped(self) -> "Interval":
        """The interval of the negative."""
        return Interval(-self.value, -self.high, -self.low, self.seeds, self.users)

    def document(self) -> dict[str, Any]:
        """The interval as reports have it."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        rounded = {name: round(number, 6) if math.isfinite(number) else None for name, number in numbers.items()}
        return {**rounded, "seeds": self.seeds, "users": self.users}


def interval(by_seed: Sequence[Floats], *, same_users: bool) -> Interval:
    """The mean of values (B,), or of paired differences, of users by seed; see `RULE`.

    One seed has the interval over users alone, a single number a seed that over seeds alone. One number alone has an
    interval without end. With `same_users`, the users of all seeds are the same, in the same order.

    >>> interval([np.array([1.0, 3.0]), np.array([2.0, 2.0])], same_users=False).value
    2.0
    """
    seeds = len(by_seed)
    means = np.array([values.mean() for values in by_seed])
    value = float(means.mean())
    halves = [stats.t.ppf(UPPER, seeds - 1) * stats.sem(means)] if seeds > 1 else []
    samples = [np.mean(by_seed, axis=0)] if same_users else by_seed
    if min(len(values) for values in samples) > 1:
        error = math.sqrt(sum(stats.sem(values) ** 2 for values in samples)) / len(samples)
        halves.append(stats.norm.ppf(UPPER) * error)
    half = float(max(halves, default=math.inf))
    return Interval(value, value - half, value + half, seeds, sum(len(values) for values in samples))


def verdict(signs: Sequence[int]) -> str:
    """What the signs of a claim's intervals say, one for each data set on which it could be asked.

    >>> verdict([1, 0]), verdict([0, -1]), verdict([0]), verdict([1, -1]), verdict([])
    ('holds', 'does not', 'does not', 'depends', 'not asked')
    """
    if not signs:
        return OPEN
    if 1 not in signs:
        return DOES_NOT
    return DEPENDS if -1 in signs else HOLDS


def offline(true: int, logged: int) -> str:
    """What the log's metric does where the truth is known.

    >>> offline(1, -1), offline(-1, 0), offline(0, 1), offline(1, 1), offline(0, 0)
    ('lies', 'is blind', 'sees more', 'agrees', 'agrees')
    """
    if true == logged:
        return AGREES
    if true and logged:
        return LIES
    return BLIND if true else SEES_MORE
