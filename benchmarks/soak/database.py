"""A vector database that dies and comes back under traffic, and publishers that are killed while they load one.

    python benchmarks/soak/database.py [--kinds pgvector milvus] [--kills 20] [--outages 3] [--out FILE]

For each kind, a real server on loopback and a tiny trained world:

- Publishers are killed at random moments of a publication. After each kill every version is whole, and nothing is
  served that was not; what is left in the database is what no version names, and `prune` drops it.
- `twotower serve` answers 20 requests a second while the database is killed (SIGKILL) and started again, some times.
  Counted are failed requests, answers without the two towers, and the seconds until they are back.

The last line is one JSON object; exit code 1 if anything of this does not hold.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from twotower.cli.databases import database
from twotower.config import Settings, parse
from twotower.index.build import connect
from twotower.index.options import IndexOptions
from twotower.pipeline.line import publish_version, run_line
from twotower.pipeline.places import places
from twotower.publish.collections import collections_named
from twotower.publish.prune import prune
from twotower.publish.publish import current, list_versions, promote, verify
from twotower.publish.version import read_manifest
from twotower.schema.machine import machine
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

RATE = 20
AWAY_S = 5.0
SETTLED_S = 1.0
PATIENCE_S = 60.0
PUBLISH = """
import sys
from twotower.config.load import load
from twotower.pipeline.line import publish_version
print("ready", flush=True)
publish_version(load(sys.argv[1], []), promoted=False)
print("done", flush=True)
"""


def make_world(folder: Path) -> Settings:
    workspace = folder / "workspace"
    simulate_workspace(workspace, WorldOptions(users=300, items=300, days=2, seed=0))
    settings = parse(
        {
            "workspace": {"path": str(workspace)},
            "models": {"dimension": 16, "channels": ["two_tower", "popular", "new_items"]},
            "train": {"epochs": 1, "batch_size": 256},
            "serve": {"port": 0},
        }
    )
    run_line(settings, promoted=True)
    return settings


def written(settings: Settings, folder: Path) -> Path:
    """The configuration as a file."""
    path = folder / f"config-{settings.index.kind}.toml"
    path.write_text(
        f"workspace.path = {json.dumps(settings.workspace.path)}\n"
        f"index = {{ kind = {json.dumps(settings.index.kind)}, url = {json.dumps(settings.index.url)} }}\n"
        'models = { dimension = 16, channels = ["two_tower", "popular", "new_items"] }\n'
        "train = { epochs = 1, batch_size = 256 }\n"
        "serve = { port = 0 }\n"
    )
    return path


def kill_publishers(settings: Settings, config: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill publishers; counts of what they left."""
    versions, deltas = places(settings).versions, places(settings).deltas
    started = time.monotonic()
    publish_version(settings, promoted=False)
    usual_s, served = time.monotonic() - started, current(versions)
    left, half_way = 0, 0
    for _ in range(kills):
        before = {version.id for version in list_versions(versions)}
        with subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(config)], stdout=subprocess.PIPE, text=True
        ) as publisher:
            assert publisher.stdout is not None
            publisher.stdout.readline()
            time.sleep(draw.uniform(0, usual_s))
            publisher.kill()
            half_way += "done" not in publisher.stdout.read()
        assert current(versions) == served
        new = {version.id for version in list_versions(versions)} - before
        for name in new:
            assert verify(versions / name) == [], name
        time.sleep(SETTLED_S)  # the database may still work off what the killed one sent
        left += len(prune(versions, deltas, settings.index, keep=1).collections)
        named = {
            collection.name
            for version in list_versions(versions)
            for collection in collections_named(read_manifest(versions / version.id)).values()
        }
        home = (versions / ".collections").read_text().strip()
        there = set(connect(settings.index.kind, settings.index.url or "").names(home))
        assert there == named, f"without a version: {there - named}; missing: {named - there}"
    return {"kills": kills, "killed_half_way": half_way, "collections_left_and_pruned": left}


def server_processes(folder: Path) -> list[psutil.Process]:
    """The processes of the database whose files are in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.pid != psutil.Process().pid:
                found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return list(dict.fromkeys(found))


def ask_at_a_rate(url: str, users: list[Any], enough: threading.Event, seen: list[tuple[float, float, Any]]) -> None:
    """One request every 1 / RATE seconds, when it is due: (moment, milliseconds, what came of it)."""
    with httpx.Client(base_url=url, timeout=10) as client:
        started, turn = time.monotonic(), 0
        while not enough.is_set():
            time.sleep(max(0.0, started + turn / RATE - time.monotonic()))
            turn, began = turn + 1, time.monotonic()
            try:
                response = client.post("/v1/retrieve", json={"user_id": users[turn % len(users)], "k": 50})
                came = response.json()["failed_channels"] if response.status_code == 200 else response.status_code
            except httpx.TransportError as error:
                came = repr(error)
            seen.append((began, 1000 * (time.monotonic() - began), came))


def outages(settings: Settings, config: Path, folder: Path, count: int) -> dict[str, Any]:
    """Kill the database under traffic and start it again."""
    kind = settings.index.kind
    command = [sys.executable, "-m", "twotower", "serve", "-c", str(config)]
    seen: list[tuple[float, float, Any]] = []
    enough = threading.Event()
    back_s, told_s, ready = [], [], []
    with ExitStack() as running, ExitStack() as serving:
        serving.enter_context(database(kind, folder))
        published = publish_version(settings)["version"]
        promote(places(settings).versions, published)
        server = running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        running.callback(server.terminate)
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        asking = threading.Thread(target=ask_at_a_rate, args=(url, [*range(1, 200)], enough, seen))
        asking.start()
        running.callback(asking.join)
        running.callback(enough.set)
        time.sleep(3)
        for _ in range(count):
            for process in server_processes(folder):
                process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            while not httpx.get(f"{url}/readyz").json().get("unavailable_channels"):
                time.sleep(0.05)
            told_s.append(time.monotonic() - killed)
            ready.append(httpx.get(f"{url}/readyz").status_code)
            time.sleep(AWAY_S)
            serving.close()  # what is left of the killed one
            serving.enter_context(database(kind, folder))
            answers = time.monotonic()
            while time.monotonic() - answers < PATIENCE_S and (not seen or seen[-1][2] != [] or seen[-1][0] < answers):
                time.sleep(0.02)
            back_s.append(time.monotonic() - answers)
            time.sleep(2)
    whole = [latency for _, latency, came in seen if came == []]
    without = [latency for _, latency, came in seen if isinstance(came, list) and came]
    failed = [came for _, _, came in seen if not isinstance(came, list)]
    return {
        "outages": count,
        "requests": len(seen),
        "failed": len(failed),
        "examples": [str(came) for came in failed[:3]],
        "answers_without_the_database": len(without),
        "p50_ms": round(float(np.median(whole)), 1),
        "p99_ms": round(float(np.quantile(whole, 0.99)), 1),
        "p50_without_ms": round(float(np.median(without)), 1) if without else None,
        "p99_without_ms": round(float(np.quantile(without, 0.99)), 1) if without else None,
        "readyz_while_away": ready,
        "seconds_until_told": [round(one, 2) for one in told_s],
        "seconds_until_back": [round(one, 2) for one in back_s],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["pgvector", "milvus"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--outages", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "rate_per_s": RATE}
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        embedded = make_world(folder)
        for kind in arguments.kinds:
            with database(kind, folder / kind) as url:
                settings = replace(embedded, index=IndexOptions(kind, url=url))
                config = written(settings, folder)
                publishers = kill_publishers(settings, config, arguments.kills, random.Random(arguments.seed))
            result[kind] = {**publishers, **outages(settings, config, folder / kind, arguments.outages)}
    line = json.dumps(result)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(line + "\n")
    print(line)
    sys.exit(any(result[kind]["failed"] for kind in arguments.kinds))


if __name__ == "__main__":
    main()
