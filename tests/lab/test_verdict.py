import json
import math
from pathlib import Path

import numpy as np
import pytest

from twotower_lab.verdict import (
    AGREES,
    BLIND,
    DEPENDS,
    DOES_NOT,
    HOLDS,
    LIES,
    OPEN,
    SEES_MORE,
    Interval,
    interval,
    offline,
    verdict,
)


def test_over_seeds_alone_it_is_students_interval_of_their_means() -> None:
    # three seeds of one number each: mean 2, standard deviation 1, t of two degrees of freedom
    found = interval([np.array([1.0]), np.array([2.0]), np.array([3.0])], same_users=False)
    half = 4.302653 / math.sqrt(3)
    assert (found.value, found.seeds, found.users) == (2.0, 3, 3)
    assert (found.low, found.high) == (pytest.approx(2 - half, abs=1e-4), pytest.approx(2 + half, abs=1e-4))


def test_over_users_alone_it_is_the_normal_interval_of_their_mean() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0])
    found = interval([values], same_users=False)
    half = 1.959964 * math.sqrt(5 / 3 / 4)
    assert found.value == 1.5
    assert (found.low, found.high) == (pytest.approx(1.5 - half), pytest.approx(1.5 + half))
    assert interval([values], same_users=True) == found


def test_seeds_with_other_users_weigh_alike_however_many_they_have() -> None:
    # the means of the seeds agree, so the users decide: the variance of a mean of two independent means
    first, second = np.array([0.0, 2.0] * 50), np.array([-1.0, 3.0] * 10)
    found = interval([first, second], same_users=False)
    error = math.sqrt((first.var(ddof=1) / 100 + second.var(ddof=1) / 20) / 4)
    assert found.value == 1.0
    assert found.users == 120
    assert found.high - found.value == pytest.approx(1.959964 * error)


def test_the_same_users_are_averaged_over_the_seeds_first() -> None:
    # what one seed adds to a user another takes away: no user differs from another
    found = interval([np.array([1.0, 3.0, 2.0]), np.array([3.0, 1.0, 2.0])], same_users=True)
    assert (found.value, found.low, found.high, found.users) == (2.0, 2.0, 2.0, 3)
    apart = interval([np.array([1.0, 3.0, 2.0]), np.array([3.0, 1.0, 2.0])], same_users=False)
    assert apart.high > 2.5


def test_the_wider_interval_counts() -> None:
    users = [np.array([0.0, 1.0] * 500) + shift for shift in (-1.0, 0.0, 1.0)]
    found = interval(users, same_users=False)
    assert found.high - found.value == pytest.approx(4.302653 * 1.0 / math.sqrt(3))


def test_it_covers_the_truth_as_often_as_it_says_or_more() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        effects = 0.3 * rng.standard_normal(4)
        found = interval([0.1 + effect + rng.standard_normal(60) for effect in effects], same_users=False)
        covered += found.low <= 0.1 <= found.high
    assert 0.94 <= covered / 400 <= 1.0


def test_one_number_alone_has_no_interval() -> None:
    found = interval([np.array([0.5])], same_users=False)
    assert found.sign == 0
    assert found.document() == {"value": 0.5, "low": None, "high": None, "seeds": 1, "users": 1}


def test_signs_and_their_negatives() -> None:
    above, around = Interval(0.2, 0.1, 0.3, 3, 10), Interval(0.2, -0.1, 0.3, 3, 10)
    assert (above.sign, above.flipped().sign, around.sign) == (1, -1, 0)
    assert above.flipped() == Interval(-0.2, -0.3, -0.1, 3, 10)
    assert above.document() == {"value": 0.2, "low": 0.1, "high": 0.3, "seeds": 3, "users": 10}


@pytest.mark.parametrize(
    ("signs", "said"),
    [
        ([1], HOLDS),
        ([1, 1, 0], HOLDS),
        ([0], DOES_NOT),
        ([-1], DOES_NOT),
        ([0, -1], DOES_NOT),
        ([1, -1], DEPENDS),
        ([1, 0, -1], DEPENDS),
        ([], OPEN),
    ],
)
def test_the_rule_of_verdicts(signs: list[int], said: str) -> None:
    assert verdict(signs) == said


@pytest.mark.parametrize(
    ("true", "logged", "said"),
    [(1, -1, LIES), (-1, 1, LIES), (1, 0, BLIND), (-1, 0, BLIND), (1, 1, AGREES), (0, -1, SEES_MORE), (0, 0, AGREES)],
)
def test_what_the_offline_metric_does(true: int, logged: int, said: str) -> None:
    assert offline(true, logged) == said


def test_the_committed_verdicts_follow_from_their_intervals() -> None:
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results" / "lab").glob("*/result.json"))
    assert results
    for path in results:
        for claim in json.loads(path.read_text())["claims"]:
            ends = [
                (one["low"], one["high"]) for one in claim["conditions"] if one["judged"] and one["low"] is not None
            ]
            signs = [(low > 0) - (high < 0) for low, high in ends]
            signs += [0 for one in claim["conditions"] if one["judged"] and one["low"] is None]
            assert claim["verdict"] == verdict(signs), (path, claim["text"])
