"""From a click's answer to the first request that sees the changed user embedding, over real processes and sockets.

    python benchmarks/freshness.py [--rates 100 1000] [--seconds 60] [--index faiss pgvector milvus] [--smoke]

`serve`, `join --follow` and `update incremental --follow` run beside each other on a simulated workspace, with the
defaults, while a client posts events (half of them requests of another ranker, half clicks on them) and asks 50
requests a second. Meanwhile users of their own ask for a page and click on it. A click is seen by the first answer
whose `delta_seq` is that of the first delta with the user's row, or a later one. New items: from a `PUT`'s answer to
the first list that holds the item, and from the answer to its second click (`update.admit_after`) to the first answer
that sees a trained embedding. Users and items of the load are such as have an embedding. Prints one JSON line.
"""

import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from common import arguments_of, finish, note, options, process, server
from twotower.cli.databases import database
from twotower.config import load
from twotower.features.vocabulary import FIRST
from twotower.index.options import ADDRESSES
from twotower.pipeline.line import open_served, run_line
from twotower.pipeline.places import places
from twotower.publish.delta import base_digest, last_seq, read_delta
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

CONFIG = Path(__file__).parents[1] / "examples" / "demo.toml"
REQUESTS_A_S = 50
BATCHES_A_S = 10
"""Posts of events."""
PROBES_A_S = 2
SHOWN = 10
NEW_ITEMS = 20
SETTLE_S = 10.0
"""After the load has ended: what has not been seen by then never is, here."""


class Client:
    """One connection to the server.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)

    def ask(self, method: str, path: str, body: Any) -> Any:
        """The answer of the server."""
        response = self._client.request(method, path, json=body).raise_for_status()
        return response.json() if response.content else None


@dataclass
class Seen:
    """What the clients saw, by the clock of this process."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    """When an answer came and which delta it was of."""
    latencies_ms: list[float] = field(default_factory=list)
    clicks: dict[Any, float] = field(default_factory=dict)
    """When the click of a user was answered."""
    items: dict[str, float] = field(default_factory=dict)
    """When the deciding click on a new item was answered."""
    put_s: list[float] = field(default_factory=list)
    """From a new item's PUT to the first list with it."""
    events: int = 0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def paced(rate: float, until: float) -> Iterator[int]:
    """Counts at a rate until a moment."""
    began = time.monotonic()
    for number in itertools.count():
        due = began + number / rate
        if due >= until:
            return
        time.sleep(max(0.0, due - time.monotonic()))
        yield number


def load_events(url: str, rate: float, until: float, users: list[Any], items: list[Any], seen: Seen) -> None:
    """Post requests, and in the next batch a click on each."""
    client, draw, each = Client(url), random.Random(1), max(1, round(rate / BATCHES_A_S / 2))
    asked: list[tuple[str, Any, Any]] = []
    for number in paced(BATCHES_A_S, until):
        clicks = [
            {"event_id": f"c{name}", "type": "click", "request_id": name, "user_id": user, "item_id": item}
            for name, user, item in asked
        ]
        asked, requests = [], []
        for place in range(each):
            name, user, shown = f"load-{number}-{place}", draw.choice(users), draw.sample(items, SHOWN)
            asked.append((name, user, draw.choice(shown)))
            requests.append(
                {"event_id": f"r{name}", "type": "request", "request_id": name, "user_id": user, "items": shown,
                 "outcomes": ["impressed"] * SHOWN, "positions": list(range(1, SHOWN + 1)), "context": {"hour": 12}}
            )  # fmt: skip
        events = [{**event, "ts_ms": now_ms()} for event in clicks + requests]
        client.ask("POST", "/v1/events", {"events": events})
        seen.events += len(events)


def load_requests(url: str, until: float, users: list[Any], seen: Seen) -> None:
    """Ask for candidates, and note which delta each answer is of."""
    client, draw = Client(url), random.Random(2)
    for _ in paced(REQUESTS_A_S, until):
        started = time.monotonic()
        answer = client.ask("POST", "/v1/retrieve", {"user_id": draw.choice(users), "k": 100})
        seen.answers.append((time.monotonic(), answer["delta_seq"]))
        seen.latencies_ms.append(1000 * (seen.answers[-1][0] - started))


def probe_clicks(url: str, until: float, users: list[Any], seen: Seen) -> None:
    """Users who ask for a page and click on it, each once."""
    client = Client(url)
    for number in paced(PROBES_A_S, until):
        user = users[number]
        page = client.ask("POST", "/v1/recommend", {"user_id": user, "context": {"hour": 12}})
        click = {"event_id": f"probe-{user}", "type": "click", "request_id": page["request_id"], "user_id": user,
                 "item_id": page["items"][0]["item_id"], "ts_ms": now_ms()}  # fmt: skip
        client.ask("POST", "/v1/events", {"events": [click]})
        seen.clicks[user] = time.monotonic()


def probe_items(url: str, name: str, every_s: float, users: list[Any], like: list[Any], seen: Seen) -> None:
    """Items that are put, found, and clicked twice."""
    client = Client(url)
    for number, features in enumerate(like):
        item = f"{name}-{number}"
        client.ask("PUT", f"/v1/items/{item}", {"features": features})
        put = time.monotonic()
        found: set[Any] = set()
        while item not in found:
            answer = client.ask(
                "POST", "/v1/retrieve", {"user_id": users[0], "k": 5000, "channels": ["two_tower"], "exclude": "none"}
            )
            found = {one["item_id"] for one in answer["items"]}
        seen.put_s.append(time.monotonic() - put)
        for user in users[2 * number : 2 * number + 2]:
            click = {"event_id": f"{item}-{user}", "type": "click", "user_id": user, "item_id": item, "ts_ms": now_ms()}
            client.ask("POST", "/v1/events", {"events": [click]})
        seen.items[item] = time.monotonic()
        time.sleep(every_s)


def measure(rate: float, seconds: float, scratch: Path, index: list[str]) -> dict[str, Any]:
    """Everything at one rate with the options of an index, on a workspace of its own."""
    workspace = scratch / f"at-{rate:g}"
    simulate_workspace(workspace, WorldOptions(users=2000, items=1500, days=7, seed=0))
    changes = [
        *(f"workspace.path={json.dumps(str(workspace))}", "serve.port=0", "models.rankers=[]", "train.epochs=2"),
        *('models.channels=["two_tower", "item_cf", "popular"]', "update.fold_every=0"),  # every delta is read below
        *index,
    ]
    settings = load(CONFIG, changes)
    run_line(settings, promoted=True)
    version = open_served(settings)
    draw = random.Random(0)
    users, items = (
        [one for one, row in zip(ids.to_pylist(), version.features.vocabularies[name].rows(ids).tolist(), strict=True)
         if row >= FIRST]
        for name, ids in (("user_id", version.users.ids), ("item_id", version.item_ids))
    )  # fmt: skip
    draw.shuffle(users)
    probes, strangers, loaded, seen = users[:200], users[200:300], users[300:], Seen()
    names = ("category", "author", "tags", "price")
    like = version.catalogue.select(names).slice(0, NEW_ITEMS).to_pylist()
    given = options(CONFIG.name, changes)
    with ExitStack() as opened:
        url = opened.enter_context(server(*given))
        opened.enter_context(process("join", "--follow", *given))
        opened.enter_context(process("update", "incremental", "--follow", *given))
        time.sleep(min(SETTLE_S, seconds))
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=load_events, args=(url, rate, until, loaded, items, seen)),
            threading.Thread(target=load_requests, args=(url, until + SETTLE_S, loaded, seen)),
            threading.Thread(target=probe_clicks, args=(url, until, probes, seen)),
            threading.Thread(
                target=probe_items, args=(url, "new", max(0.0, seconds / NEW_ITEMS - 0.5), strangers, like, seen)
            ),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    deltas = places(settings).deltas
    first: dict[Any, int] = {}
    rows = dict(zip(probes, version.features.vocabularies["user_id"].rows(pa.array(probes)).tolist(), strict=True))
    of_row = {row: user for user, row in rows.items()}
    sizes, follows = list[int](), base_digest(version.path)
    for seq in range(1, last_seq(deltas, version.id) + 1):
        delta = read_delta(deltas, version.id, seq, follows)
        follows = delta.digest
        sizes.append(sum(len(table.rows) for table in delta.tables.values()))
        if "user_id" in delta.tables:
            for row in delta.tables["user_id"].rows.tolist():
                if row in of_row:
                    first.setdefault(of_row[row], seq)
        if "item_id" in delta.new_ids:
            for item in delta.new_ids["item_id"].column("id").to_pylist():
                first.setdefault(item, seq)
    return {
        "events_a_s": round(seen.events / seconds, 1),
        "click_to_user_embedding": times(seen, seen.clicks, first),
        "put_to_retrieved": figures(seen.put_s),
        "clicks_to_item_embedding": times(seen, seen.items, first),
        "retrieve_ms": {"p50": round(float(np.percentile(seen.latencies_ms, 50)), 1),
                        "p99": round(float(np.percentile(seen.latencies_ms, 99)), 1)},
        "deltas": len(sizes),
        "rows_a_delta": round(float(np.median(sizes)), 1) if sizes else None,
    }  # fmt: skip


def times(seen: Seen, began: dict[Any, float], first: dict[Any, int]) -> dict[str, Any]:
    """Seconds from a beginning to the first answer of its delta or a later one."""
    ordered = sorted(seen.answers)
    moments = np.array([moment for moment, _ in ordered])
    latest = np.maximum.accumulate([seq for _, seq in ordered])
    found = []
    for name, moment in began.items():
        if name in first and (place := int(np.searchsorted(latest, first[name]))) < len(latest):
            found.append(max(0.0, float(moments[place]) - moment))
    return {**figures(found), "never": len(began) - len(found)}


def figures(seconds: list[float]) -> dict[str, Any]:
    """Percentiles, in seconds."""
    if not seconds:
        return {"n": 0}
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"n": len(seconds), "p50_s": round(float(p50), 3), "p99_s": round(float(p99), 3),
            "most_s": round(max(seconds), 3)}  # fmt: skip


def main() -> None:
    parser = arguments_of(__doc__, "five seconds at one rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 1000.0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--index", nargs="+", default=["faiss"], help="kinds of the index; a database is started here")
    arguments = parser.parse_args()
    rates, seconds = ([50.0], 5.0) if arguments.smoke else (arguments.rates, arguments.seconds)
    runs = []
    for kind in arguments.index:
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as started:
            index = [f"index.kind={json.dumps(kind)}"]
            if kind in ADDRESSES:
                url = started.enter_context(database(kind, Path(scratch, kind)))
                index.append(f"index.url={json.dumps(url)}")
            for rate in rates:
                runs.append({"index": kind, "rate": rate, **measure(rate, seconds, Path(scratch), index)})
                note(json.dumps(runs[-1]))
    finish(
        arguments,
        "freshness",
        seconds=seconds,
        load_average_before=round(os.getloadavg()[0], 1),
        runs=runs,
    )


if __name__ == "__main__":
    main()
