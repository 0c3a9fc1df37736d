"""Events a second into and out of every event log, through the joiner, and rows a second in shards.

    python benchmarks/stream.py [--smoke] [--out benchmarks/results/stream.json]

A log takes batches of 100 events from one thread, and single events from four; then it is read in steps of 1000. Beside
each stands what it is built on, alone: lines in a file, flushed once a batch, `XADD` in a pipeline, a Kafka producer.
Kafka is librdkafka's own broker in this process, without disks: it shows what our code costs, not what Kafka can.
Events are one request of 30 items to two clicks. Each figure is the median of several passes, in turns, by the
clock and (", processor") by this process's own processor time, which a busy machine changes less and which leaves out
what a server does; all passes are in the file. The last line on stdout is the whole report.
"""

import os
import random
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import confluent_kafka
import pyarrow as pa
import redis

from common import arguments_of, finish
from twotower.logs import Event, EventLog, LocalEventLog
from twotower.logs.kafka import KafkaEventLog
from twotower.logs.redis import RedisEventLog
from twotower.stream.decode import decode
from twotower.stream.example import Example, encode_rows
from twotower.stream.join import join
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Row, RowRequest, Types
from twotower.stream.tfrecord import Records, read_records, write_records

TYPES = Types(pa.int64(), pa.int64(), {"age": pa.float32(), "city": pa.string()}, {"scene": pa.string()})
OPTIONS = StreamOptions(window_s=600, allowed_lateness_s=30, remember_s=3600)
T0 = 1_700_000_000_000
BATCH = 100
THREADS = 4
PROCESSOR = ", processor"
PLAINLY = 2000
"""Rows that protobuf alone reads: it takes long."""


def some_events(count: int, seed: int) -> list[Event]:
    """One request of 30 items to two clicks; names are new for each seed, because logs write a name once."""
    draw, events = random.Random(seed), list[Event]()
    while len(events) < count:
        n = len(events)
        user, items = draw.randrange(10_000), draw.sample(range(100_000), 30)
        body = {
            "items": items,
            "outcomes": ["impressed"] * 10 + ["ranked_not_shown"] * 5 + ["rank_rejected"] * 15,
            "positions": [*range(1, 11), *[None] * 20],
            "scores": [round(draw.random(), 6) for _ in items],
            "channels": [["two_tower", "item_cf"]] * 30,
            "probabilities": [1.0] * 15 + [0.1] * 15,
            "context": {"scene": "home"},
            "features": {"age": 30, "city": "Rome"},
            "history": draw.sample(range(100_000), 30),
            "version": "20231114-000000",
            "delta_seq": n,
        }
        at = T0 + 100 * n
        events.append(Event(f"{seed}-q{n}", "request", user, at, f"{seed}-r{n}", body))
        events += [
            Event(f"{seed}-c{n}-{k}", "click", user, at + 5000, f"{seed}-r{n}", {"item_id": items[k]}) for k in (0, 1)
        ]
    return sorted(events[:count], key=lambda event: event.ts_ms)


def some_rows(requests: int) -> list[Row]:
    """Rows as the joiner makes them: 10 shown items of a request, one of them clicked, and 20 others."""
    draw, rows = random.Random(0), list[Row]()
    for n in range(requests):
        context, features = {"scene": "home"}, {"age": 30.0, "city": "Rome"}
        history = draw.sample(range(100_000), 30)
        request = RowRequest(n, f"r{n}", T0 + n, context, features, history, "20231114-000000", n)
        for place in range(30):
            shown = place < 10
            outcome = "clicked" if place == 0 else "impressed" if shown else "rank_rejected"
            row = Row(request, draw.randrange(100_000), outcome, score=draw.random(), channel="two_tower|item_cf")
            row = replace(row, position=place + 1 if shown else None, probability=1.0 if shown else 0.1)
            rows.append(replace(row, click_ts_ms=T0 + n + 5000, weight=1.0) if place == 0 else row)
    return rows


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A Redis that flushes every write; gives its address."""
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed: apt-get install redis-server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
    options += ["--appendonly", "yes", "--appendfsync", "always", "--loglevel", "warning"]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def batches(events: list[Event]) -> list[list[Event]]:
    return [events[begin : begin + BATCH] for begin in range(0, len(events), BATCH)]


def append(log: EventLog, events: list[Event]) -> None:
    for batch in batches(events):
        log.append(batch)


def append_singly(log: EventLog, events: list[Event]) -> None:
    """One event a call, from several threads."""

    def send(mine: list[Event]) -> None:
        for event in mine:
            log.append([event])

    threads = [threading.Thread(target=send, args=(events[place::THREADS],)) for place in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_all(log: EventLog) -> int:
    count = 0
    for partition in range(log.partitions):
        offset = 0
        while records := log.read(partition, offset, 1000):
            offset, count = records[-1].next_offset, count + len(records)
    return count


def plain_file(path: Path, events: list[Event], flush: bool) -> None:
    """The same events as lines of a file."""
    with path.open("wb") as file:
        for batch in batches(events):
            file.write(b"".join(event.to_json() + b"\n" for event in batch))
            file.flush()
            if flush:
                os.fsync(file.fileno())


def plain_redis(url: str, key: str, events: list[Event]) -> None:
    client = redis.Redis.from_url(url)
    for batch in batches(events):
        with client.pipeline(transaction=False) as pipeline:
            for event in batch:
                pipeline.xadd(key, {"event": event.to_json()})
            pipeline.execute()


def plain_kafka(servers: str, topic: str, events: list[Event]) -> None:
    producer = confluent_kafka.Producer(
        {"bootstrap.servers": servers, "acks": "all", "enable.idempotence": True, "linger.ms": 0, "log_level": 3}
    )
    for batch in batches(events):
        for event in batch:
            producer.produce(topic, event.to_json())
        producer.flush()


def join_all(log: EventLog, out: Path) -> None:
    join(log, out, None, TYPES, OPTIONS, flush=True)


def write_rows(path: Path, rows: list[Row]) -> None:
    write_records(path, encode_rows([rows], TYPES))


def protobuf_alone(records: Records, count: int) -> list[dict[str, list[object]]]:
    """The same rows by protobuf, one after the other."""
    return [
        {
            name: list(getattr(value, value.WhichOneof("kind")).value)
            for name, value in Example.FromString(records.content(number)).features.feature.items()
        }
        for number in range(count)
    ]


def measure(size: int, rows: int, passes: int, folder: Path) -> dict[str, list[float]]:
    """Every figure of every pass, in turns."""
    found: dict[str, list[float]] = {}

    def note(name: str, count: int, work: Callable[..., object], *arguments: object) -> None:
        started, worked = time.perf_counter(), time.process_time()
        work(*arguments)
        rates = count / (time.perf_counter() - started), count / (time.process_time() - worked)
        found.setdefault(name, []).append(rates[0])
        found.setdefault(f"{name}{PROCESSOR}", []).append(rates[1])
        note(f"{name}: {rates[0]:.0f}/s, {rates[1]:.0f}/s of processor time")

    made = some_rows(rows // 30)
    with ExitStack() as opened:
        url = opened.enter_context(redis_server(folder))
        brokers = confluent_kafka.Producer({"test.mock.num.brokers": 1, "log_level": 3})
        servers = ",".join(f"{b.host}:{b.port}" for b in brokers.list_topics(timeout=10).brokers.values())
        for turn in range(passes):
            name = uuid.uuid4().hex
            for topic in (name, f"{name}-plain"):
                brokers.list_topics(topic, timeout=10)
            few, many = some_events(size // 10, 2 * turn), some_events(size, 2 * turn + 1)
            everything = len(few) + len(many)
            logs: dict[str, Callable[[], EventLog]] = {
                "local, sync = always": partial(LocalEventLog.open, folder / f"{name}-always", sync="always"),
                "local, sync = never": partial(LocalEventLog.open, folder / f"{name}-never", sync="never"),
                "redis": partial(RedisEventLog, url, name),
                "kafka": partial(KafkaEventLog, servers, name),
            }
            for kind, open_log in logs.items():
                with closing(open_log()) as log:
                    note(f"append batches, {kind}", len(many), append, log, many)
                    note(f"append singly, {kind}", len(few), append_singly, log, few)
                    note(f"read, {kind}", everything, read_all, log)
                    note(f"join, {kind}", everything, join_all, log, folder / f"shards-{name}-{kind}")
            note("plain file, flushed", len(many), plain_file, folder / f"{name}.jsonl", many, True)
            note("plain file", len(many), plain_file, folder / f"{name}.jsonl", many, False)
            note("plain XADD", len(many), plain_redis, url, f"{name}-plain", many)
            note("plain producer", len(many), plain_kafka, servers, f"{name}-plain", many)
            path = folder / f"{name}.tfrecord"
            note("shard, write rows", len(made), write_rows, path, made)
            note("shard, check records", len(made), read_records, path)
            records, some = read_records(path), min(PLAINLY, len(made))
            note("shard, decode rows", len(made), decode, records, TYPES.schema())
            note("shard, protobuf alone", some, protobuf_alone, records, some)
            found.setdefault("bytes a row", []).append(path.stat().st_size / len(made))
    return found


def main() -> None:
    parser = arguments_of(__doc__, "few events, one pass")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--passes", type=int, default=3)
    arguments = parser.parse_args()
    size, rows, passes = (600, 600, 1) if arguments.smoke else (arguments.events, arguments.rows, arguments.passes)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(size, rows, passes, Path(folder))
    finish(
        arguments,
        "stream",
        events=size,
        rows=rows,
        passes=passes,
        bytes_an_event=round(statistics.mean(len(event.to_json()) for event in some_events(300, 0))),
        per_s={name: round(statistics.median(values)) for name, values in found.items()},
        each={name: [round(value) for value in values] for name, values in found.items()},
    )


if __name__ == "__main__":
    main()
