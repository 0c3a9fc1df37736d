"""An updater that is killed again and again, in a process of its own, ends with the bytes of one that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twotower.cli.line import open_served, places
from twotower.cli.updating import learn, open_chain
from twotower.config import Settings
from twotower.config.load import as_dict
from twotower.publish.delta import last_seq
from twotower.serve.snapshots import Snapshots

KILLS = 6


def start(settings: Settings, *options: str) -> "subprocess.Popen[bytes]":
    """The updater in a process of its own."""
    code = (
        "import json, sys; from twotower.config.load import parse; from twotower.cli.updating import learn;"
        "learn(parse(json.loads(sys.argv[1])), follow='--follow' in sys.argv, dry_run=False)"
    )
    document = json.dumps(as_dict(settings))
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    return subprocess.Popen(
        [sys.executable, "-c", code, document, *options], stderr=subprocess.DEVNULL, env=environment
    )


def wait_for(settings: Settings, seq: int, seconds: float = 90) -> None:
    version, deltas = open_served(settings).id, places(settings).deltas
    until = time.monotonic() + seconds
    while last_seq(deltas, version) < seq:
        assert time.monotonic() < until, f"no delta {seq} within {seconds} s"
        time.sleep(0.01)


def test_an_updater_that_is_killed_at_random_ends_with_the_same_bytes(
    learning, happen, clicks, content, tmp_path
) -> None:
    small = replace(learning, update=replace(learning.update, rows=10))
    happen(small, clicks(small, 200))
    copied = shutil.copytree(small.workspace.path, tmp_path / "undisturbed")
    undisturbed = replace(small, workspace=replace(small.workspace, path=str(copied)))
    learn(undisturbed, follow=False, dry_run=False)
    generator = np.random.default_rng(0)
    for number in range(KILLS):
        process = start(small)
        wait_for(small, 3 * number + 1)
        time.sleep(float(generator.uniform(0, 0.05)))
        process.kill()
        process.wait()
    assert start(small).wait(timeout=120) == 0
    assert content(places(small).deltas) == content(places(undisturbed).deltas)
    snapshots = Snapshots(places(small).versions, deltas=places(small).deltas)
    assert snapshots.version.delta_seq == 20
    assert snapshots.refused_delta is None


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
        happen(learning, clicks(learning, 40, seed=2))
        wait_for(learning, 3)
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
    model = chain._learner.model
    dense = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    others = {name: one.weights.tobytes() for name, one in model.tables.items() if name not in tables}
    special = {name: model.tables[name].weights[:2].tobytes() for name in tables}
    plan = chain.plan()
    assert plan is not None
    assert chain.make(plan).refused == []
    assert {name: value.numpy().tobytes() for name, value in model.state_dict().items()} == dense
    assert {name: one.weights.tobytes() for name, one in model.tables.items() if name not in tables} == others
    assert {name: model.tables[name].weights[:2].tobytes() for name in tables} == special
