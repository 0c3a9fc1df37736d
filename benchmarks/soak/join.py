"""Kill the joiner again and again while the log grows, and compare what is left with an undisturbed run.

    python benchmarks/soak/join.py --kills 500 --seed 0

A writer appends requests and clicks, some late, some before their request, some twice. A process follows the log
with small shards, merges them and writes daily partitions; it is killed (SIGKILL) at a random moment and the next one
goes on. In the end the log is joined to its end and

- the rows of every partition, in order, are those of a joiner that was never disturbed, and so are the counts,
- the daily partitions have its bytes,
- every click that the log acknowledged is there exactly once.

The last line is one JSON object.
"""

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import forks
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.logs import Event, LocalEventLog
from twotower.schema.files import parquet_files
from twotower.stream.join import JoinReport, join
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Types
from twotower.stream.shards import manifests, partitions, read_rows

PARTITIONS = 2
TYPES = Types(pa.int64(), pa.int64(), {"age": pa.float32()}, {"scene": pa.string()})
OPTIONS = StreamOptions(
    window_s=600, allowed_lateness_s=30, remember_s=3600, shard_events=60, merged_mb=1, follow_s=0.001
)
T0 = 1_700_000_000_000
STEP_MS = 15_000
REQUESTS_A_KILL = 40
LONGEST_S = 0.12


def some_events(draw: random.Random, first: int, count: int) -> list[Event]:
    """So many requests and their clicks, in the order in which they come."""
    timed: list[tuple[int, Event]] = []
    for n in range(first, first + count):
        ts_ms, user, items = T0 + n * STEP_MS, draw.randrange(50), draw.sample(range(1000), 6)
        body = {
            "items": items,
            "outcomes": ["impressed"] * 3 + ["ranked_not_shown"] + ["rank_rejected"] * 2,
            "context": {"scene": draw.choice(["home", "search"])},
            "features": {"age": draw.randrange(90)},
            "history": draw.sample(range(1000), draw.randrange(5)),
        }
        timed.append((ts_ms, Event(f"q{n}", "request", user, ts_ms, f"r{n}", body)))
        for k in range(draw.choice([0, 1, 1, 3])):
            after_ms = draw.choice([1000, 30_000, 500_000, 900_000])
            item = draw.choice(items[:3])
            come_ms = ts_ms - 100 if after_ms == 1000 and draw.random() < 0.3 else ts_ms + after_ms
            timed.append((come_ms, Event(f"c{n}-{k}", "click", user, ts_ms + after_ms, f"r{n}", {"item_id": item})))
    return [event for _, event in sorted(timed, key=lambda pair: pair[0])]


def run(folder: Path, out: Path, *, follow: bool) -> JoinReport:
    """Join what the log holds, to its end or for ever."""
    with closing(LocalEventLog.reader(folder / "log")) as log:
        return join(
            log, out / "shards", out / "events", TYPES, OPTIONS, flush=not follow, follow=follow
        )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """The hash of every daily file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for day in sorted(folder.iterdir())
        for path in parquet_files(day)
    }


def soak(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill so many joiners; counts of what happened.

    Raises:
        AssertionError: something was lost, doubled or is other than undisturbed.
    """
    pa.set_cpu_count(1)
    draw = random.Random(seed)
    disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    clicks: Counter[tuple[object, ...]] = Counter()
    left_by_kills = Counter[str]()
    started = time.monotonic()
    with closing(LocalEventLog.open(folder / "log", PARTITIONS, sync="never")) as log:
        for kill in range(kills):
            events = some_events(draw, kill * REQUESTS_A_KILL, REQUESTS_A_KILL)
            half = draw.randrange(len(events))
            log.append(events[:half])
            joiner = forks.start(lambda: run(folder, disturbed, follow=True))
            log.append(events[half:])
            clicks.update({(e.user_id, e.request_id, e.body["item_id"]): 1 for e in events if e.type == "click"})
            assert not forks.wait(joiner, draw.uniform(0, LONGEST_S)), "the joiner ended by itself"
            left = [path.name for path in folder.rglob(".tmp-*")]
            left_by_kills.update("half a file" for _ in left)
            for partition in partitions(disturbed / "shards"):
                own = disturbed / "shards" / f"partition-{partition:04d}"
                orphans = {path.name.split(".")[0] for path in own.glob("*.tfrecord")} - {
                    path.stem for path in own.glob("*.json")
                }
                left_by_kills.update("a shard without its manifest" for _ in orphans)
        events = log.ends()
    run(folder, disturbed, follow=False)
    report = run(folder, undisturbed, follow=False)
    shards = merged = 0
    for partition in range(PARTITIONS):
        own, other = (read_rows(out / "shards", partition) for out in (disturbed, undisturbed))
        assert own == other, f"partition {partition}: other rows than undisturbed"
        counted = [manifests(out / "shards", partition) for out in (disturbed, undisturbed)]
        for name in ("events", "late", "duplicates", "unjoined", "before_request"):
            mine, theirs = (sum(getattr(one.counts, name) for one in found) for found in counted)
            assert mine == theirs, f"partition {partition}: {mine} {name}, undisturbed {theirs}"
        shards, merged = shards + len(counted[0]), merged + sum(one.counts.events > 60 for one in counted[0])
    assert digests(disturbed / "events") == digests(undisturbed / "events"), "other daily partitions than undisturbed"
    days = [pq.ParquetFile(path).read() for day in (disturbed / "events").iterdir() for path in parquet_files(day)]
    rows = pa.concat_tables(days).filter(pa.compute.equal(pa.concat_tables(days)["outcome"], "clicked")).to_pylist()
    found = Counter((row["user_id"], row["request_id"], row["item_id"]) for row in rows)
    assert found == Counter(dict.fromkeys(clicks, 1)), "clicks were lost or doubled"
    return {
        "kills": kills,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "bytes_of_log": sum(events),
        "rows": report.rows,
        "clicks": len(clicks),
        "late": report.late,
        "shards": shards,
        "merged_shards": merged,
        "days": len(report.days),
        "left_by_kills": dict(sorted(left_by_kills.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
