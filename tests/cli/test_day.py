"""A whole day through the command line."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pandas as pd
import pyarrow.parquet as pq

from twotower.publish.version import read_manifest

CONFIG = Path(__file__).parents[2] / "examples" / "demo.toml"
SMALL = ["train.epochs=1", "train.batch_size=256", "models.dimension=16", "serve.port=0", "evaluate.bootstrap=50"]

SMALL_DEMO = ["train.epochs=1", "models.dimension=16", 'models.channels=["two_tower", "popular"]', "models.rankers=[]"]


def check(path: Path, workspace: Path, k: int) -> int:
    """An independent look at a file of recommendations; gives the number of users."""
    assert pq.read_schema(path).names == ["user_id", "item_id", "rank", "score", "channel"]
    table = pd.read_parquet(path)
    events = pd.concat([pd.read_parquet(file) for file in sorted((workspace / "events").rglob("*.parquet"))])
    clicks = events[events["outcome"] == "clicked"]
    assert not table.duplicated(["user_id", "item_id"]).any()
    assert not table.duplicated(["user_id", "rank"]).any()
    assert table.groupby("user_id")["rank"].agg(["min", "max", "size"]).eq([1, k, k]).all(axis=None)
    assert table.merge(clicks, on=["user_id", "item_id"]).empty
    assert table["item_id"].isin(pd.read_parquet(workspace / "items.parquet")["item_id"]).all()
    assert set(table["user_id"]) == set(pd.read_parquet(workspace / "users.parquet")["user_id"])
    ordered = table.sort_values(["user_id", "rank"])
    assert ordered.groupby("user_id")["score"].apply(lambda scores: scores.is_monotonic_decreasing).all()
    return table["user_id"].nunique()


def test_a_whole_day_through_the_command_line(run, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"

    def options(workspace: Path) -> list[str]:
        return ["-c", str(CONFIG), *(x for o in (f"workspace.path={workspace}", *SMALL) for x in ("--set", o))]

    for workspace in (parts, whole):
        made = run("simulate", "--out", workspace, "--users", 200, "--items", 200, "--days", 3, "--seed", 1)
    keys = {"workspace", "users", "items", "events", "holdout", "holdout_cold", "train_positives", "dropped"}
    assert made.keys() == keys | {"columns", "examples", "not_read"}
    assert run("samples", *options(parts))["positives"] == made["train_positives"]
    trained = run("train", *options(parts))
    assert trained.keys() == {"checkpoint", "rows", "rows_per_s", "loss", "seconds", "channels", "rankers"}
    assert (trained["channels"].keys(), trained["rankers"].keys()) == ({"mind"}, {"pre_rank", "rank"})
    evaluated = run("evaluate", *options(parts))
    assert {"recall@50", "popular", "item_cf", "cold"} <= evaluated.keys()
    assert evaluated["recall@50"].keys() == {"value", "ci95"}
    published = run("publish", *options(parts))
    assert published.keys() == {"version", "path", "metrics"}
    assert published["metrics"] == evaluated

    for channel in ("two_tower", "popular", "fused"):
        out = tmp_path / f"{channel}.parquet"
        told = run("retrieve", *options(parts), "--users", "all", "--k", 20, "--out", out, "--channel", channel)
        assert told == {
            "out": str(out),
            "users": check(out, parts, 20),
            "context": [],
            "version": published["version"],
            "delta_seq": 0,
            "channel": channel,
        }

    assert run("versions", "verify", *options(parts)) == {"version": published["version"], "ok": True, "problems": []}
    again = run("publish", "--no-promote", *options(parts))["version"]
    listed = run("versions", "list", *options(parts))
    assert listed["current"] == published["version"]
    assert [version["id"] for version in listed["versions"]] == [published["version"], again]
    assert [version["parent"] for version in listed["versions"]] == [None, published["version"]]
    assert run("versions", "promote", again, *options(parts)) == {"current": again}
    assert run("versions", "rollback", *options(parts)) == {"current": published["version"]}
    assert run("versions", "rollback", again, *options(parts)) == {"current": again}

    at_once = run("run", *options(whole))
    files = [read_manifest(Path(report["path"]))["files"] for report in (published, at_once)]
    latency = "channels/two_tower/index/index.json"
    assert {name: one for name, one in files[0].items() if name != latency} == {
        name: one for name, one in files[1].items() if name != latency
    }
    assert at_once["metrics"] == evaluated

    command = [sys.executable, "-m", "twotower", "serve", *options(parts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert (ready["version"], ready["admin_url"]) == (again, None)
        row = pd.read_parquet(tmp_path / "fused.parquet").iloc[0]
        ask = {"user_id": int(row["user_id"]), "k": 20}
        before = httpx.post(f"{ready['url']}/v1/retrieve", json=ask).json()
        assert before["items"][0]["item_id"] == row["item_id"]
        click = {"event_id": "e1", "type": "click", "item_id": row["item_id"], "ts_ms": 1_790_000_000_000}
        posted = httpx.post(f"{ready['url']}/v1/events", json={"events": [{**click, "user_id": ask["user_id"]}]})
        assert (posted.status_code, posted.json()["accepted"]) == (202, 1)
        after = httpx.post(f"{ready['url']}/v1/retrieve", json=ask).json()
        assert row["item_id"] not in [item["item_id"] for item in after["items"]]
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == ""
        assert server.wait(20) == 0


def test_the_demo_checks_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twotower", "demo", "--check", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, *(part for option in SMALL_DEMO for part in ("--set", option))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    answer = json.loads(line)
    assert {"url", "version", "metrics", "seconds", "before", "clicked", "after", "learned"} <= answer.keys()
    assert answer["learned"]["delta_seq"] > answer["before"]["delta_seq"]
    assert answer["clicked"] in [item["item_id"] for item in answer["before"]["items"]]
    assert answer["clicked"] not in [item["item_id"] for item in answer["after"]["items"]]
