"""How training grows: with negatives, rows, and the size of tables and catalogue.

    python benchmarks/scaling.py [--out FILE] [--smoke]

Users and items are drawn by chance, items by Zipf's law; two towers of ids with a history of 20, D = 64, batches of
4096, two threads. Each case builds its samples and trains one epoch in a process of its own, so that the peak of memory
is that case's. Prints one JSON line; beside the file of `--out` come plots (SVG).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.channels.options import ModelsOptions
from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import EasyShares, NegativesOptions, SamplesOptions
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.towers.options import TowerOptions
from twotower.train.options import TrainOptions
from twotower.train.towers import train

LOSSES = ("pointwise", "triplet_hinge", "triplet_logistic", "sampled_softmax", "corrected_log_q", "bsl")
START_MS = 1_704_067_200_000


def case(rows: int, items: int, clicked: int, room: float, loss: str, count: int | None, own: bool) -> dict[str, Any]:
    """Train one epoch on `rows` clicks of `clicked` of `items` items."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        make(workspace, rows, items, clicked)
        build_samples(
            workspace, Path(folder) / "samples", Features(), 64, SamplesOptions(held_out_users=0, vocabulary_room=room)
        )
        samples = open_samples(Path(folder) / "samples")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tower, shares = TowerOptions("dnn", []), EasyShares() if count is None else EasyShares(0, 1, 0)
        report = train(
            samples,
            Path(folder) / "checkpoints",
            TrainOptions(loss=loss, epochs=1, checkpoint_s=1e9),
            ModelsOptions(user_tower=tower, item_tower=tower),
            NegativesOptions(shares, count=count, shared=not own),
        )
    return {
        "rows_per_s": round(report.rows_per_s),
        "epoch_s": round(report.rows / report.rows_per_s, 2),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "rss_before_training_gb": round(before * 1024 / 1e9, 2),
    }


def make(workspace: Path, rows: int, items: int, clicked: int) -> None:
    """A workspace of one day."""
    generator = np.random.default_rng(0)
    users = max(1000, rows // 50)
    weights = np.cumsum(1 / np.arange(1, clicked + 1) ** 0.8)
    item = np.minimum(np.searchsorted(weights / weights[-1], generator.random(rows)), clicked - 1)
    folder = workspace / "events" / "date=2024-01-01"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({c.USER_ID: np.arange(users)}), workspace / "users.parquet")
    pq.write_table(pa.table({c.ITEM_ID: np.arange(items)}), workspace / "items.parquet")
    events = {
        c.EVENT_SEQ: np.arange(rows),
        c.USER_ID: generator.integers(users, size=rows),
        c.ITEM_ID: item,
        c.REQUEST_TS_MS: START_MS + np.arange(rows),
        c.CLICK_TS_MS: START_MS + np.arange(rows) + 1,
        c.OUTCOME: pa.repeat(c.CLICKED, rows),
    }
    pq.write_table(pa.table(events), folder / "0.parquet")


def run(**given: Any) -> dict[str, Any]:
    """One case in a process of its own."""
    options = {"items": 4000, "clicked": 4000, "room": 0.1, "loss": "sampled_softmax", "count": None, "own": False}
    asked = {**options, **given}
    command = [sys.executable, __file__, "--case", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = {**given, **json.loads(done.stdout.splitlines()[-1])}
    print(result, file=sys.stderr, flush=True)
    return result


def plot(path: Path, title: str, points: list[tuple[float, float]], x: str, y: str) -> None:
    """Points and the line through the origin and the last of them, as SVG."""
    right, top = max(p[0] for p in points) * 1.05, max(p[1] for p in points) * 1.1
    places = [(60 + 520 * a / right, 330 - 280 * b / top) for a, b in points]
    circles = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4"/>' for a, b in places)
    marks = circles + "".join(
        f'<text x="{a:.1f}" y="{b - 10:.1f}" text-anchor="middle">{p[1]:g}</text>'
        for (a, b), p in zip(places, points, strict=True)
    )
    labels = "".join(
        f'<text x="{a:.1f}" y="350" text-anchor="middle">{p[0]:g}</text>'
        for (a, _), p in zip(places, points, strict=True)
    )
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 390" font-family="sans-serif" font-size="13">'
        '<rect width="600" height="390" fill="white"/><path d="M60 40V330H590" fill="none" stroke="gray"/>'
        f'<text x="300" y="24" text-anchor="middle" font-size="16">{title}</text>'
        f'<text x="325" y="376" text-anchor="middle">{x}</text><text x="12" y="50">{y}</text>'
        f'<polyline points="{line}" fill="none" stroke="steelblue" stroke-width="2"/>'
        f'<g fill="black">{marks}{labels}</g></svg>\n',
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small cases: shows that it runs, measures nothing")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(case(**json.loads(arguments.case))))
        return
    part = 20 if arguments.smoke else 1
    # The same rows touched, in tables of 4 thousand and of 1 million rows, in turns.
    small, large = [], []
    for _ in range(1 if arguments.smoke else 3):
        small.append(run(rows=400_000 // part)["epoch_s"])
        large.append(run(rows=400_000 // part, items=1_000_000 // part, room=250 / part)["epoch_s"])
    negatives = [
        run(rows=200_000 // part, loss=loss, count=count, own=count == 1)
        for loss in LOSSES[:: 5 if arguments.smoke else 1]
        for count in (1, 256, 1024, 4096)
    ]
    rows = [run(rows=count // part, clicked=4000) for count in (1_000_000, 3_000_000, 10_000_000)]
    items = [
        run(rows=500_000 // part, items=count // part, clicked=count // part) for count in (10_000, 200_000, 2_000_000)
    ]
    result = {
        "benchmark": "growth of training",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "table_of_1m_over_4k": round(float(np.median(large) / np.median(small)), 3),
        "table_epoch_s": {"4k": small, "1m": large},
        "negatives": negatives,
        "rows": rows,
        "items": items,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for name, found, unit in (("rows", rows, 1e6), ("items", items, 1e6)):
            for figure, label in (("epoch_s", "seconds of an epoch"), ("peak_rss_gb", "peak memory, GB")):
                points = [(one[name] / unit, one[figure]) for one in found]
                svg = arguments.out.with_name(f"{arguments.out.stem}_{name}_{figure}.svg")
                plot(svg, f"{label} by {name}", points, f"million {name}", label)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
