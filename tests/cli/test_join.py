"""From a server's answers to joined samples, by the commands, over every kind of event log."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.logs import Event, LocalEventLog
from twotower.stream.shards import partitions, read_rows

CONFIG = Path(__file__).parents[2] / "examples" / "demo.toml"


@pytest.mark.parametrize("kind", ["local", "redis", "kafka"])
def test_what_was_shown_and_clicked_at_a_server_becomes_samples(
    kind: str, own_world: Settings, run: Any, request: pytest.FixtureRequest
) -> None:
    workspace = Path(own_world.workspace.path)
    name = f"test-{uuid.uuid4().hex}"
    options = ["-c", str(CONFIG), "--set", f"workspace.path={workspace}", "--set", "serve.port=0"]
    if kind == "redis":
        options += ["--set", f'stream.log.url="{request.getfixturevalue("redis_url")}"']
    elif kind == "kafka":
        options += ["--set", f'stream.log.url="{request.getfixturevalue("kafka_servers")(name)}"']
    options += ["--set", f"stream.log.kind={kind}", "--set", f"stream.log.name={name}"]
    server = subprocess.Popen(
        [sys.executable, "-m", "twotower", "serve", *options], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    try:
        url = json.loads(server.stdout.readline())["url"]  # type: ignore[union-attr]
        asking = 12 if kind == "local" else 4  # an append to the Kafka of the tests takes more than a second
        users = pq.read_table(workspace / "users.parquet")["user_id"].to_pylist()[:asking]
        clicks = {}
        with httpx.Client(base_url=url, timeout=30) as client:
            for user in users:
                asked = {"user_id": user, "k": 5, "context": {"hour": 3, "scene": "home"}}
                page = client.post("/v1/recommend", json=asked).raise_for_status().json()
                item = page["items"][1]["item_id"]
                clicks[user, page["request_id"]] = item
                click = {
                    "event_id": f"click {user}", "type": "click", "user_id": user, "request_id": page["request_id"],
                    "item_id": item, "ts_ms": time.time_ns() // 1_000_000,
                }  # fmt: skip
                for _ in range(2):  # a retry
                    client.post("/v1/events", json={"events": [click]}).raise_for_status()
        followed = run("join", *options)
        assert followed["outcomes"] == {"clicked": asking}
        flushed = run("join", *options, "--flush")
        assert flushed["outcomes"]["impressed"] == asking * 4
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    shards = workspace / "shards"
    parts = [read_rows(shards, partition) for partition in partitions(shards)]
    rows = pa.concat_tables(parts, promote_options="default").to_pylist()
    clicked = {(row["user_id"], row["request_id"]): row for row in rows if row["outcome"] == "clicked"}
    assert {key: row["item_id"] for key, row in clicked.items()} == clicks
    for row in clicked.values():
        assert (row["position"], row["context.scene"], row["context.hour"]) == (2, "home", 3)
        assert row["version"]
        assert row["history"] is not None
        assert row["score"] is not None
        assert row["channel"]
    before = run("samples", *options)
    assert before["dropped"] == {}
    assert before["outcomes"]["clicked"] >= asking


def test_a_joiner_that_follows_ends_well_on_a_signal(own_world: Settings) -> None:
    workspace = Path(own_world.workspace.path)
    log = LocalEventLog.open(workspace / "log")
    options = ["-c", str(CONFIG), "--set", f"workspace.path={workspace}", "--set", "stream.follow_s=0.01"]
    joiner = subprocess.Popen(
        [sys.executable, "-m", "twotower", "join", *options, "--follow"], stdout=subprocess.PIPE, text=True
    )
    try:
        log.append([Event("e", "click", 1, 1_700_000_000_000, body={"item_id": "x"})])
        while not any(read_rows(workspace / "shards", p).num_rows for p in partitions(workspace / "shards")):
            assert joiner.poll() is None
        joiner.send_signal(signal.SIGTERM)
        out, _ = joiner.communicate(timeout=30)
    finally:
        joiner.kill()
        joiner.communicate()
        log.close()
    assert joiner.returncode == 0
    report = json.loads(out)
    assert (report["rows"], report["unjoined"], report["days"]) == (1, 1, ["2023-11-14"])


def test_join_loads_no_library_that_trains_or_searches(own_world: Settings) -> None:
    workspace = Path(own_world.workspace.path)
    log = LocalEventLog.open(workspace / "log")
    log.append([Event("e", "click", 1, 1_700_000_000_000, body={"item_id": "x"})])
    log.close()
    program = (
        "import sys\n"
        "from twotower.cli.main import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "heavy = ('torch', 'onnxruntime', 'faiss', 'ibis', 'duckdb', 'fastapi')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    options = ["-c", str(CONFIG), "--set", f"workspace.path={workspace}"]
    done = subprocess.run(
        [sys.executable, "-c", program, "join", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report, loaded = done.stdout.splitlines()
    assert (json.loads(report)["rows"], loaded) == (1, "[]")
