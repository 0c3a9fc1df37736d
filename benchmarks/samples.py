"""Building samples from a large log: rows a second and peak memory of the whole process.

    python benchmarks/samples.py [--smoke] [--events N] [--out benchmarks/results/samples.json]

The log is made in one process and read in another, so that the peak is that of `build_samples` alone: the resident set
of the process, interpreter, engine and mapped files included. Users are drawn evenly, items by a Zipf law; every event
is a click, the hardest case, since each becomes a training row. Progress goes to stderr, one JSON line to stdout.
"""

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
MEMORY_GB = 2.0
THREADS = 2
SEED = 0


def generate(workspace: Path, events: int, users: int, items: int) -> None:
    """Write a workspace, a Parquet file a day."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(SEED)
    user_id, item_id, draw_items = make_catalogue(workspace, rng, users, items)
    for day in range(DAYS):
        first, last = events * day // DAYS, events * (day + 1) // DAYS
        count = last - first
        request = FIRST_MS + day * DAY_MS + np.sort(rng.integers(0, DAY_MS, count))
        item = draw_items(count)
        table = pa.table(
            {
                "event_seq": np.arange(first, last),
                "request_id": pa.nulls(count, pa.string()),
                "user_id": user_id[rng.integers(0, users, count)],
                "item_id": item_id[item],
                "request_ts_ms": request,
                "click_ts_ms": request + rng.integers(1, 600_000, count),
                "outcome": pa.repeat("clicked", count),
                "weight": np.ones(count, np.float32),
                "hour": (request // 3_600_000 % 24),
                "price": rng.random(count),
            }
        )
        folder = workspace / "events" / f"date=2024-01-{day + 1:02}"
        folder.mkdir(parents=True)
        pq.write_table(table.take(rng.permutation(count)), folder / "part-0.parquet", compression="zstd")
        note(f"day {day + 1} of {DAYS} written")


def build(workspace: Path) -> dict[str, Any]:
    """Build the samples; seconds, rows and the peak of this process."""
    from twotower.config import parse
    from twotower.samples.build import build_samples
    from twotower.samples.options import EngineOptions, SamplesOptions

    document: dict[str, Any] = {
        "user": {
            "user_id": {"kind": "categorical"},
            "age": {"kind": "numeric"},
            "history": {"kind": "sequence"},
        },
        "item": {"item_id": {"kind": "categorical"}, "category": {"kind": "categorical"}},
        "context": {"hour": {"kind": "categorical"}, "price": {"kind": "numeric"}},
    }
    features = parse({"features": document}).features
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    engine = EngineOptions(memory_gb=MEMORY_GB, threads=THREADS)
    report = build_samples(
        workspace, workspace / "samples", features, 64, SamplesOptions(held_out_users=0), engine=engine
    )
    seconds = time.perf_counter() - start
    return {
        "rows": report.positives,
        "seconds": round(seconds, 1),
        "rows_per_s": round(report.positives / seconds),
        "rss_before_gb": round(before * 1024 / 1e9, 3),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "samples_gb": round(sum(f.stat().st_size for f in (workspace / "samples").iterdir()) / 1e9, 3),
    }


def main() -> None:
    if sys.argv[1:2] == ["generate"]:
        generate(Path(sys.argv[2]), *map(int, sys.argv[3:6]))
        return
    if sys.argv[1:2] == ["build"]:
        print(json.dumps(build(Path(sys.argv[2]))))
        return
    parser = arguments_of(__doc__, "a small log")
    parser.add_argument("--events", type=int, default=10_000_000)
    arguments = parser.parse_args()
    events, users, items = (20_000, 400, 200) if arguments.smoke else (arguments.events, 200_000, 100_000)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder, "workspace")
        run([sys.executable, __file__, "generate", workspace, events, users, items])
        measured = run([sys.executable, __file__, "build", workspace])
    finish(
        arguments,
        "samples",
        events=events,
        users=users,
        items=items,
        days=DAYS,
        seed=SEED,
        memory_gb=MEMORY_GB,
        threads=THREADS,
        **measured,
    )


if __name__ == "__main__":
    main()
