"""How training grows: with negatives, rows, and the size of tables and catalogue.

    python benchmarks/scaling.py [--out FILE] [--smoke]

Users and items are drawn by chance, items by Zipf's law; two towers of ids with a history of 20, D = 64, batches of
4096, two threads. Each case builds its samples and trains one epoch in a process of its own, so that the peak of memory
is that case's. Prints one JSON line; beside the file of `--out` come plots (SVG).
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import arguments_of, finish, note
from common import run as run_program
from twotower.channels.options import ModelsOptions
from twotower.evaluate.plots import figure, svg
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
    result = {**given, **run_program([sys.executable, __file__, "--case", json.dumps(asked)])}
    note(result)
    return result


def plot(path: Path, title: str, points: list[tuple[float, float]], x: str, y: str) -> None:
    """Points and the line between them, as SVG."""
    with figure(6, 4) as drawn:
        axes = drawn.subplots()
        axes.plot(*zip(*points, strict=True), marker="o")
        for point in points:
            axes.annotate(f"{point[1]:g}", point, (0, 6), textcoords="offset points", ha="center")
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        path.write_text(svg(drawn, title) + "\n", encoding="utf-8")


def main() -> None:
    parser = arguments_of(__doc__, "small cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
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
    finish(
        arguments,
        "growth of training",
        table_of_1m_over_4k=round(float(np.median(large) / np.median(small)), 3),
        table_epoch_s={"4k": small, "1m": large},
        negatives=negatives,
        rows=rows,
        items=items,
    )
    if arguments.out:
        for name, found in (("rows", rows), ("items", items)):
            for measure, label in (("epoch_s", "seconds of an epoch"), ("peak_rss_gb", "peak memory, GB")):
                points = [(one[name] / 1e6, one[measure]) for one in found]
                path = arguments.out.with_name(f"{arguments.out.stem}_{name}_{measure}.svg")
                plot(path, f"{label} by {name}", points, f"million {name}", label)


if __name__ == "__main__":
    main()
