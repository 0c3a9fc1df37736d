"""Every loss with every kind of negatives on MovieLens-1M, over several seeds.

    python benchmarks/losses.py --data DIR [--seeds 3] [--epochs 2] [--out FILE] [--smoke]

Imports `time:0.9` with ratings of 4 and more as positives and trains one model a cell and seed, everything else as in
`examples/movielens_next.toml`. The figures are recall@50 and the mean popularity percentile of what is recommended.
Prints a table on stderr and one JSON line.
"""

import argparse
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from twotower.channels.options import ModelsOptions
from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.holdout import evaluate
from twotower.evaluate.options import EvaluateOptions
from twotower.pipeline.line import make_samples, offline_channel
from twotower.pipeline.places import places
from twotower.samples.options import EasyShares, NegativesOptions
from twotower.samples.read import open_samples
from twotower.train.checkpoint import open_checkpoint
from twotower.train.options import TrainOptions
from twotower.train.towers import train

CONFIG = Path(__file__).parent.parent / "examples" / "movielens_next.toml"
LOSSES = ("pointwise", "triplet_hinge", "triplet_logistic", "sampled_softmax", "corrected_log_q", "bsl")
NEGATIVES = {
    "in-batch": NegativesOptions(),
    "in-batch, streaming q": NegativesOptions(frequency="streaming"),
    "1024 uniform": NegativesOptions(EasyShares(0, 1, 0), count=1024),
    "1024 by clicks^0.75": NegativesOptions(EasyShares(0, 0, 1), count=1024),
    "half in-batch, rest both": NegativesOptions(EasyShares(0.5, 0.25, 0.25)),
    "4 of each row, uniform": NegativesOptions(EasyShares(0, 1, 0), count=4, shared=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one seed, two losses, two kinds of negatives")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    losses, kinds = list(LOSSES), list(NEGATIVES)
    if arguments.smoke:
        arguments.seeds, losses, kinds = 1, losses[2:4], kinds[:2]
    with tempfile.TemporaryDirectory() as folder:
        settings = load(CONFIG, [f"workspace.path={folder}/workspace", "features.user.history.last=50"])
        where = places(settings)
        import_dataset("movielens-1m", arguments.data, where.workspace, ImportOptions(holdout="time:0.9", positive="4"))
        make_samples(settings)
        cells = [
            {"loss": loss, "negatives": kind, **one_cell(where.workspace, loss, kind, arguments)}
            for loss in losses
            for kind in kinds
        ]
    result = {
        "benchmark": "losses x negatives, movielens-1m time:0.9 positive 4",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "seeds": arguments.seeds,
        "epochs": arguments.epochs,
        "losses": losses,
        "cells": cells,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def one_cell(workspace: Path, loss: str, kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median and range of a loss with one kind of negatives."""
    started = time.monotonic()
    samples = open_samples(workspace / "samples")
    figures: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as checkpoints:
            report = train(
                samples,
                Path(checkpoints),
                TrainOptions(
                    loss=loss, epochs=arguments.epochs, seed=seed, checkpoint_s=1e9, threads=arguments.threads
                ),
                ModelsOptions(),
                NEGATIVES[kind],
            )
            channel = offline_channel(samples, open_checkpoint(Path(report.checkpoint)))
            metrics = evaluate(samples, workspace, [channel], EvaluateOptions(k=[50], bootstrap=2))
        figures.append({name: metrics[name]["value"] for name in ("recall@50", "pop_pct@50")})
    cell = {
        name: {
            "median": statistics.median(one[name] for one in figures),
            "range": [min(one[name] for one in figures), max(one[name] for one in figures)],
        }
        for name in figures[0]
    }
    recall = cell["recall@50"]
    print(
        f"{loss:17} {kind:25} recall@50 {recall['median']:.4f} {recall['range']} "
        f"percentile {cell['pop_pct@50']['median']:.3f}  {time.monotonic() - started:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return cell


if __name__ == "__main__":
    main()
