"""An experiment of each kind, on a tiny world; `make lab-smoke` runs them all."""

from pathlib import Path

import pytest

from twotower_lab.experiments import EXPERIMENTS
from twotower_lab.run import REPORT, results, run

ONE_OF_EACH = ("late_and_early", "index", "ranking", "feedback", "updates")
"""Beside `networks`, which the tests of this folder share."""


def test_there_is_one_of_each_kind() -> None:
    assert {EXPERIMENTS[name].kind for name in (*ONE_OF_EACH, "networks")} == {one.kind for one in EXPERIMENTS.values()}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_an_experiment_runs_to_its_verdicts(name: str, tmp_path: Path) -> None:
    run([name], tmp_path, smoke=True)
    claims = results(tmp_path)[name]["claims"]
    assert len(claims) == len(EXPERIMENTS[name].claims) > 0
    assert all(claim["verdict"] for claim in claims)
    assert (tmp_path / REPORT).exists()
