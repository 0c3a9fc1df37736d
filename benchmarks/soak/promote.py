"""Promote versions under load, and check that no request fails and no answer mixes two versions.

    python benchmarks/soak/promote.py --seconds 30 --promotions 10 --out benchmarks/results/soak_promote.json

A real server process answers 50 requests a second over kept-alive connections while one version after another is
promoted. The versions differ in the vectors of all items, so that the same user gets other items from each. Every
answer is compared with what the version that it names gives for that user offline. Latencies count from the moment that
a request was due, so that waiting behind a slow one is part of them. The last line is one JSON object.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from twotower.config import Settings, load
from twotower.features.columns import to_arrow
from twotower.index.build import build_index
from twotower.index.options import IndexOptions
from twotower.pipeline.line import run_line
from twotower.pipeline.places import places
from twotower.publish.golden import write_golden
from twotower.publish.manifest import write_manifest
from twotower.publish.publish import current_path, promote
from twotower.publish.version import open_version, read_manifest
from twotower.samples.columns_file import write_table
from twotower.schema import columns as c
from twotower.schema.files import MANIFEST, folder_listing
from twotower.schema.machine import machine
from twotower.serve.request import Request, retrieve
from twotower.serve.users import Recent
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

ROOT = Path(__file__).parents[2]
CONNECTIONS = 8
PATIENCE_S = 30.0
"""Until a promoted version has to be seen: a busy machine comes to it late."""
K = 20


@dataclass
class Seen:
    """What came back of all requests."""

    latencies_ms: list[float] = field(default_factory=list)
    answers: list[tuple[Any, Any]] = field(default_factory=list)
    """(user id, answer) of each."""
    failures: list[str] = field(default_factory=list)


def make_world(folder: Path) -> Settings:
    workspace = folder / "workspace"
    simulate_workspace(workspace, WorldOptions(users=300, items=300, days=3, seed=0))
    overrides = [f"workspace.path={json.dumps(str(workspace))}", "train.epochs=1", "train.batch_size=256"]
    settings = load(ROOT / "examples" / "demo.toml", overrides)
    run_line(settings, promoted=True)
    return settings


def variant(versions: Path, number: int) -> str:
    """Copy the served version with the vectors of its items dealt anew; gives the id."""
    source = open_version(current_path(versions))
    version_id = f"29990101T{number:09d}-variant"
    folder = versions / version_id
    two_tower = folder / "channels" / "two_tower"
    for path in source.path.rglob("*"):
        if path.is_file() and path.name != MANIFEST:
            target = folder / path.relative_to(source.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    vectors = np.random.default_rng(number).permutation(source.item_vectors)
    write_table(two_tower / "items.arrow", pa.table({c.ITEM_ID: source.item_ids, c.VECTOR: to_arrow(vectors)}))
    index = build_index(IndexOptions("faiss", 1.0), np.arange(len(vectors)), vectors, vectors, ks=[K], seed=0)
    index.save(two_tower / "index")
    manifest = {key: value for key, value in read_manifest(source.path).items() if key != "digest"}
    described = {**manifest, "id": version_id, "parent": source.id}
    write_manifest(folder, {**described, "files": {}})
    write_golden(open_version(folder, check_hashes=False), folder)
    write_manifest(folder, {**described, "files": folder_listing(folder)})
    return version_id


def load_server(url: str, users: list[Any], rate: float, enough: threading.Event, seen: Seen) -> list[threading.Thread]:
    """Threads that send requests when they are due, each over one connection, until there are enough."""
    started = time.monotonic() + 0.1

    def work(number: int) -> None:
        generator = random.Random(number)
        with httpx.Client(base_url=url, timeout=10) as client:
            for turn in itertools.takewhile(lambda _: not enough.is_set(), itertools.count()):
                due = started + (turn * CONNECTIONS + number) / rate
                time.sleep(max(0.0, due - time.monotonic()))
                user_id = generator.choice(users)
                try:
                    response = client.post("/v1/retrieve", json={"user_id": user_id, "k": K})
                except httpx.TransportError as error:
                    seen.failures.append(repr(error))
                    continue
                seen.latencies_ms.append(1000 * (time.monotonic() - due))
                if response.status_code != 200:
                    seen.failures.append(f"{response.status_code}: {response.text[:200]}")
                else:
                    seen.answers.append((user_id, response.json()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    return threads


def mixed(versions: Path, seen: Seen) -> list[str]:
    """Answers that are not those of the version that they name."""
    opened = {name: open_version(versions / name) for name in {answer["version"] for _, answer in seen.answers}}
    due: dict[tuple[str, Any], list[tuple[Any, float]]] = {}
    wrong = []
    for user_id, answer in seen.answers:
        key = (answer["version"], user_id)
        if key not in due:
            offline = retrieve(opened[key[0]], Request(K, "clicked", user_id), Recent(), range(0))
            due[key] = [(item.item_id, item.score) for item in offline.items]
        if [(item["item_id"], item["score"]) for item in answer["items"]] != due[key] or answer["failed_channels"]:
            wrong.append(f"user {user_id}: not the answer of {key[0]}")
    return wrong


def soak(settings: Settings, seconds: float, promotions: int, rate: float) -> dict[str, Any]:
    versions, workspace = places(settings).versions, str(places(settings).workspace)
    first = current_path(versions).name
    names = [variant(versions, number) for number in range(promotions)]
    known = open_version(versions / first)
    users = known.users.ids.to_pylist()
    command = [sys.executable, "-m", "twotower", "serve", "-c", str(ROOT / "examples" / "demo.toml")]
    command += ["--set", f"workspace.path={json.dumps(workspace)}", "--set", "serve.port=0"]
    command += ["--set", "serve.channel_timeout_ms=60000"]  # answers are compared with those of all channels
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            seen, enough = Seen(), threading.Event()
            threads = load_server(url, users, rate, enough, seen)
            try:
                for name in names:
                    time.sleep(seconds / (promotions + 1))
                    promote(versions, name)
                    latest = time.monotonic() + PATIENCE_S
                    while time.monotonic() < latest and seen.answers[-1][1]["version"] != name:
                        time.sleep(0.02)  # on a busy machine the server may come to it later
                time.sleep(seconds / (promotions + 1))
            finally:
                enough.set()
                for thread in threads:
                    thread.join()
        finally:
            server.terminate()
    p50, p99 = np.percentile(seen.latencies_ms, [50, 99])
    failures = seen.failures + mixed(versions, seen)
    return {
        "requests": len(seen.latencies_ms),
        "failures": len(failures),
        "examples": failures[:3],
        "versions_promoted": promotions,
        "versions_seen": len({answer["version"] for _, answer in seen.answers}),
        "server_exit_code": server.returncode,
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "items": len(known.item_ids),
        "rate_per_s": rate,
        "seconds": seconds,
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--promotions", type=int, default=10)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(make_world(Path(folder)), arguments.seconds, arguments.promotions, arguments.rate)
    line = json.dumps(result)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(line + "\n")
    print(line)
    sys.exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
