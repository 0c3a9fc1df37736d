"""Requests a second and latency of `POST /v1/retrieve` and `POST /v1/recommend`, over real sockets.

    python benchmarks/serve.py --workspace demo/simulated --out benchmarks/results/serve.json

A server process answers for random known users: candidates, fused and from the two towers alone, at k = 100 and 500;
pages of 10 through the whole funnel, each with its record in the log. At 50 requests a second, where a latency counts
from the moment that the request was due, and over connections that ask again as soon as they are answered (a closed
loop). The clients are threads of this process and compete with the server for the same cores: they use the lightest
client there is, because httpx costs as much as some of these answers. Without `--workspace` a simulated world is made.
Each case is a line of JSON on stderr; the last line on stdout holds them all.
"""

import http.client
import json
import random
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from common import arguments_of, finish, note, options, server
from twotower.config import load
from twotower.pipeline.line import open_served, run_line
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

CONFIG = Path(__file__).parents[1] / "examples" / "demo.toml"
CONNECTIONS = (1, 4, 16)
KS = (100, 500)
CHANNELS: dict[str, list[str]] = {"fused": [], "two_tower": ["two_tower"]}
PAGE = 10
WARM_UP = 5
RATE = 50
"""Requests a second of the open loop, and the connections that they are spread over."""
RATE_CONNECTIONS = 4


def ask_on(
    url: str,
    route: str,
    users: list[Any],
    body: dict[str, Any],
    until: float,
    seed: int,
    latencies_ms: list[float],
    every_s: float = 0.0,
) -> None:
    """Ask over one connection until a moment, `every_s` or as soon as answered; latencies of all but the first."""
    address, generator = urlsplit(url), random.Random(seed)
    with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=30)) as connection:
        asked = 0
        due = time.monotonic() + generator.random() * every_s
        while time.monotonic() < until:
            document = json.dumps({**body, "user_id": generator.choice(users)})
            time.sleep(max(0.0, due - time.monotonic()))
            started = due if every_s else time.monotonic()
            due += every_s
            connection.request("POST", f"/v1/{route}", document, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {content[:300]!r}")
            asked += 1
            if asked > WARM_UP:
                latencies_ms.append(1000 * (time.monotonic() - started))


def measure(
    url: str,
    route: str,
    users: list[Any],
    channels: str,
    k: int,
    connections: int,
    seconds: float,
    rate: int | None = None,
) -> dict[str, Any]:
    """One case; `rate` in requests a second over all connections, None for a closed loop."""
    body = {"k": k, "channels": CHANNELS[channels]}
    latencies_ms: list[list[float]] = [[] for _ in range(connections)]
    started = time.monotonic()
    every_s = connections / rate if rate else 0.0
    threads = [
        threading.Thread(
            target=ask_on, args=(url, route, users, body, started + seconds, number, latencies_ms[number], every_s)
        )
        for number in range(connections)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - started
    all_ms = np.concatenate(latencies_ms)
    p50, p99 = np.percentile(all_ms, [50, 99])
    return {
        "route": route,
        "channels": channels,
        "k": k,
        "connections": connections,
        "rate": rate,
        "requests_per_s": round((len(all_ms) + WARM_UP * connections) / elapsed, 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
    }


def bench(workspace: Path, seconds: float, connections: tuple[int, ...]) -> dict[str, Any]:
    overrides = [f"workspace.path={json.dumps(str(workspace))}", "serve.port=0"]
    version = open_served(load(CONFIG, overrides))
    users = version.users.ids.to_pylist()
    cases = []
    with server(*options(CONFIG.name, overrides)) as url:
        asked = [("retrieve", channels, k) for channels in CHANNELS for k in KS] + [("recommend", "fused", PAGE)]
        for route, channels, k in asked:
            for count, rate in [(RATE_CONNECTIONS, RATE), *((count, None) for count in connections)]:
                cases.append(measure(url, route, users, channels, k, count, seconds, rate))
                note(json.dumps(cases[-1]))
    return {"items": len(version.item_ids), "users": len(users), "seconds_each": seconds, "cases": cases}


def main() -> None:
    parser = arguments_of(__doc__, "two seconds a case, on a tiny world")
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = arguments.workspace
        if workspace is None:
            workspace = Path(folder) / "workspace"
            users, items, epochs = (100, 100, 1) if arguments.smoke else (2000, 1500, 5)
            simulate_workspace(
                workspace, WorldOptions(users=users, items=items, days=3 if arguments.smoke else 7, seed=0)
            )
            overrides = [f"workspace.path={json.dumps(str(workspace))}", f"train.epochs={epochs}"]
            run_line(load(CONFIG, overrides), promoted=True)
        result = bench(workspace, 2.0 if arguments.smoke else 5.0, (1,) if arguments.smoke else CONNECTIONS)
    finish(arguments, "serve", **result)


if __name__ == "__main__":
    main()
