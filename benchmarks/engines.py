"""DuckDB and Spark on the same logs: seconds, peak memory, and whether the files are the same.

    python benchmarks/engines.py [--smoke] [--events N ...] [--jobs NAME ...] [--out benchmarks/results/engines.json]

A log is made once for each size: requests with two clicks, one item that was shown and two that were rejected; items by
a Zipf law, so that most users have clicked the first one; an eighth of the requests is one crawler's. Each job runs in
a process of its own. Its peak is that of the resident set, Python's and, with Spark, Java's, which is a process of its
own. Seconds count the start of the engine; that of Spark is told apart. Where other work shares the processors, their
seconds (`cpu_s`, Python's and Java's) tell more than those of the clock. With `--out`, what the file holds of other
sizes and jobs stays. Progress goes to stderr, one JSON line to stdout.
"""

import hashlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments_of, finish, make_catalogue, note, run

DAYS = 10
FIRST_MS = 1_704_067_200_000
DAY_MS = 86_400_000
MEMORY_GB = 3.0
THREADS = 2
SEED = 0
OUTCOMES = ("clicked", "clicked", "impressed", "rank_rejected", "pre_rank_rejected")
CRAWLER = 1 / 8
"""Share of the requests of one user."""
ENGINES = ("duckdb", "spark")
JOBS = ("samples", "item_cf", "swing")
"""In this order: the others read the samples of the first."""


def generate(workspace: Path, events: int, users: int, items: int) -> None:
    """Write a workspace, a Parquet file a day."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(SEED)
    user_id, item_id, draw_items = make_catalogue(workspace, rng, users, items)
    for day in range(DAYS):
        requests = events // DAYS // len(OUTCOMES)
        at = FIRST_MS + day * DAY_MS + np.sort(rng.integers(0, DAY_MS, requests))
        user = np.where(rng.random(requests) < CRAWLER, 0, rng.integers(0, users, requests))
        count = requests * len(OUTCOMES)
        item = draw_items(count)
        clicked = np.tile([outcome == "clicked" for outcome in OUTCOMES], requests)
        request = np.repeat(at, len(OUTCOMES))
        table = pa.table(
            {
                "event_seq": np.arange(day * count, (day + 1) * count),
                "user_id": user_id[np.repeat(user, len(OUTCOMES))],
                "item_id": item_id[item],
                "request_ts_ms": request,
                "click_ts_ms": pa.array(request + rng.integers(1, 600_000, count), mask=~clicked),
                "outcome": np.tile(OUTCOMES, requests),
                "hour": request // 3_600_000 % 24,
                "price": rng.random(count),
            }
        )
        folder = workspace / "events" / f"date=2024-01-{day + 1:02}"
        folder.mkdir(parents=True)
        pq.write_table(table.take(rng.permutation(count)), folder / "part-0.parquet", compression="zstd")
    note(f"{events} events written")


def run_job(workspace: Path, job: str, name: str) -> dict[str, Any]:
    """Run one job with one engine; seconds, and the peaks of this process and of Java."""
    from twotower.config import parse
    from twotower.samples.engine import open_engine

    engine = parse({"engine": {"name": name, "memory_gb": MEMORY_GB, "threads": THREADS}}).engine
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=workspace) as scratch, open_engine(engine, Path(scratch)):
        # A Spark that runs is used by the job, so that its start is measured here.
        started = time.perf_counter() - start
        digest = run_samples(workspace, engine) if job == "samples" else run_neighbours(workspace, engine, job)
        seconds = time.perf_counter() - start
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "job": job,
        "engine": name,
        "seconds": round(seconds, 1),
        "cpu_s": round(sum(usage.ru_utime + usage.ru_stime for usage in used), 1),
        "start_s": round(started, 1) if name == "spark" else 0.0,
        "peak_rss_gb": round(used[0].ru_maxrss * 1024 / 1e9, 3),
        "java_peak_rss_gb": round(used[1].ru_maxrss * 1024 / 1e9, 3) if name == "spark" else 0.0,
        "sha256": digest,
    }


def run_samples(workspace: Path, engine: Any) -> str:
    """Build samples; the hash of the hashes of their files."""
    from twotower.config import parse
    from twotower.samples.build import build_samples
    from twotower.samples.read import open_samples

    document: dict[str, Any] = {
        "user": {"user_id": {"kind": "categorical"}, "age": {"kind": "numeric"}, "history": {"kind": "sequence"}},
        "item": {"item_id": {"kind": "categorical"}, "category": {"kind": "categorical"}},
        "context": {"hour": {"kind": "categorical"}, "price": {"kind": "numeric"}},
    }
    folder = workspace / f"samples-{engine.name}"
    settings = parse({"features": document, "samples": {"held_out_users": 0, "hot": {"form": "sqrt"}}})
    build_samples(workspace, folder, settings.features, 64, settings.samples, engine=engine)
    return hashlib.sha256(json.dumps(open_samples(folder).manifest, sort_keys=True).encode()).hexdigest()


def run_neighbours(workspace: Path, engine: Any, job: str) -> str:
    """Fit ItemCF or Swing to the samples; the hash of its file."""
    from twotower.channels.item_cf import fit_item_cf
    from twotower.channels.swing import fit_swing
    from twotower.samples.read import open_samples

    samples, fit = open_samples(workspace / "samples-duckdb"), {"item_cf": fit_item_cf, "swing": fit_swing}[job]
    folder = workspace / f"{job}-{engine.name}"
    folder.mkdir()
    fit(samples.clicks, len(samples.items), engine=engine, scratch=workspace).save(folder)
    return hashlib.sha256((folder / "neighbours.arrow").read_bytes()).hexdigest()


def main() -> None:
    if sys.argv[1:2] == ["generate"]:
        generate(Path(sys.argv[2]), *map(int, sys.argv[3:6]))
        return
    if sys.argv[1:2] == ["job"]:
        print(json.dumps(run_job(Path(sys.argv[2]), *sys.argv[3:5])))
        return
    parser = arguments_of(__doc__, "a small log")
    parser.add_argument("--events", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000, 20_000_000])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    arguments = parser.parse_args()
    sizes, users, items = ([20_000], 400, 200) if arguments.smoke else (arguments.events, 200_000, 100_000)
    rows = []
    if arguments.out and arguments.out.exists():
        anew = {(events, job) for events in sizes for job in arguments.jobs}
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        rows = [row for row in kept if (row["events"], row["job"]) not in anew]
    for events in sizes:
        with tempfile.TemporaryDirectory() as folder:
            workspace = Path(folder, "workspace")
            run([sys.executable, __file__, "generate", workspace, events, users, items])
            if "samples" not in arguments.jobs:
                run([sys.executable, __file__, "job", workspace, "samples", "duckdb"])
            for job in arguments.jobs:
                for engine in ENGINES:
                    rows.append({"events": events, **run([sys.executable, __file__, "job", workspace, job, engine])})
                    note(json.dumps(rows[-1]))
    rows.sort(key=lambda row: (JOBS.index(row["job"]), row["events"], row["engine"]))
    finish(
        arguments,
        "engines",
        users=users,
        items=items,
        days=DAYS,
        seed=SEED,
        memory_gb=MEMORY_GB,
        threads=THREADS,
        same=all(
            len({row["sha256"] for row in rows if (row["events"], row["job"]) == key}) == 1
            for key in {(row["events"], row["job"]) for row in rows}
        ),
        rows=rows,
    )


if __name__ == "__main__":
    main()
