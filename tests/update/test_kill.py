"""Updaters that are killed again and again end with the bytes of one that never was, and nothing is learned twice."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.config import Settings
from twotower.config.load import as_dict
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.updating import open_chain
from twotower.publish.delta import last_seq

ROOT = Path(__file__).parents[2]
SOAK = ROOT / "benchmarks" / "soak" / "update.py"


def start(settings: Settings, *options: str) -> "subprocess.Popen[bytes]":
    """The updater in a process of its own."""
    code = (
        "import json, sys; from twotower.config.load import parse; from twotower.pipeline.updating import learn;"
        "learn(parse(json.loads(sys.argv[1])), follow='--follow' in sys.argv, dry_run=False)"
    )
    document = json.dumps(as_dict(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", code, document, *options], stderr=subprocess.DEVNULL, env=environment
    )


def wait_for(settings: Settings, seq: int, seconds: float = 90) -> None:
    version, deltas = open_served(settings).id, places(settings).deltas
    until = time.monotonic() + seconds
    while last_seq(deltas, version) < seq:
        assert time.monotonic() < until, f"no delta {seq} within {seconds} s"
        time.sleep(0.01)


def soak(part: str, kills: int) -> dict[str, Any]:
    """What the soak of the updaters counted."""
    command = [sys.executable, str(SOAK), "--part", part, "--kills", str(kills), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills
    return result


def test_an_updater_that_is_killed_at_random_ends_with_the_same_bytes() -> None:
    result = soak("incremental", 12)
    assert result["refused"] > 0
    assert result["left_by_kills"]["half a delta"] > 0


def test_full_updates_that_are_killed_at_random_end_with_the_same_bytes() -> None:
    assert soak("full", 4)["days"] >= 2


def test_a_line_that_is_killed_at_random_learns_each_click_of_the_log_once() -> None:
    result = soak("line", 9)
    assert result["events"] >= result["acknowledged"] > 20
    assert result["learned"] > 20
    assert all(result[f"kills_of_the_{name}"] > 0 for name in ("writer", "joiner", "updater"))


def test_a_standby_takes_over_from_a_leader_that_is_killed(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 40))
    leader = start(learning, "--follow")
    wait_for(learning, 1)
    standby = start(learning, "--follow")
    try:
        happen(learning, clicks(learning, 40, seed=1))
        wait_for(learning, 2)
        assert standby.poll() is None
        leader.kill()
        leader.wait()
        made = last_seq(places(learning).deltas, open_served(learning).id)  # the leader may have made more
        happen(learning, clicks(learning, 40, seed=2))
        wait_for(learning, made + 1)
        standby.send_signal(signal.SIGTERM)
        assert standby.wait(timeout=60) == 0
    finally:
        for process in (leader, standby):
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("tables", [["user_id"], ["user_id", "item_id"]])
def test_the_networks_and_the_other_tables_of_the_updater_itself_do_not_move(learning, happen, clicks, tables) -> None:
    settings = replace(learning, update=replace(learning.update, tables=tables))
    happen(settings, clicks(settings, 90))
    chain = open_chain(settings, open_served(settings).path, None)
    model = chain.state.learner.model
    dense = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    others = {name: one.weights.tobytes() for name, one in model.tables.items() if name not in tables}
    special = {name: model.tables[name].weights[:2].tobytes() for name in tables}
    plan = chain.plan()
    assert plan is not None
    assert chain.make(plan).refused == []
    assert {name: value.numpy().tobytes() for name, value in model.state_dict().items()} == dense
    assert {name: one.weights.tobytes() for name, one in model.tables.items() if name not in tables} == others
    assert {name: model.tables[name].weights[:2].tobytes() for name in tables} == special
