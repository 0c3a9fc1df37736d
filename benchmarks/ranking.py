"""The pre-ranker and the ranker: order, calibration, and what the one keeps of the other's best.

    python benchmarks/ranking.py --data DIR [--seeds 3] [--out benchmarks/results/ranking.json] [--smoke]

On KuaiRand (`DIR/kuairand`, the days from 2022-05-03 on held out) and on the simulated world of the demo, its last day
held out. A seed is one of training on KuaiRand, and of training and the world on the other. Beside the rankers: the
click rate of the item, smoothed by 20 impressions of the mean, and in the world its own true utility, which no ranker
can beat. Progress goes to stderr, one JSON line to stdout.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from twotower.config import load
from twotower.config.settings import Settings
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.calibration import auc, auc_within
from twotower.evaluate.ranking import read_shown, user_auc
from twotower.pipeline.line import evaluate_rankers, make_samples, train_model
from twotower.pipeline.places import places
from twotower.samples.read import Samples, open_samples
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower.worlds.world import SCENES

EXAMPLES = Path(__file__).parent.parent / "examples"
PRIOR = 20
"""Impressions at the mean click rate that an item begins with."""
ONE = "train.threads=1"
"""Steps are small: where the machine is shared, threads that wait for each other cost more than they bring."""
FEW = 'models.channels=["two_tower", "item_cf", "popular"]'
ORDERS = ("auc", "position_auc", "user_auc")
RATES = ("auc", "position_auc", "log_loss", "log_loss_constant", "ece", "ece_raw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with kuairand/; absent = the world alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=1500)
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one small world: shows that it runs")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.data, arguments.seeds, arguments.users, arguments.items, arguments.days = None, 1, 300, 300, 3
    found: dict[str, list[dict[str, Any]]] = {"world": []}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.data is not None:
            found["kuairand"] = []
            workspace = Path(folder, "kuairand")
            import_dataset(
                "kuairand", arguments.data / "kuairand", workspace, ImportOptions(holdout="since:2022-05-03")
            )
            for seed in range(arguments.seeds):
                found["kuairand"].append(one_run("kuairand", "kuairand.toml", workspace, seed))
        for seed in range(arguments.seeds):
            workspace = Path(folder, f"world{seed}")
            simulate_workspace(
                workspace, WorldOptions(users=arguments.users, items=arguments.items, days=arguments.days, seed=seed)
            )
            found["world"].append(one_run("world", "demo.toml", workspace, seed))
    result = {
        "benchmark": "pre-ranker and ranker",
        "machine": {"cpus": os.cpu_count(), "architecture": platform.machine(), "python": platform.python_version()},
        **{name: getattr(arguments, name) for name in ("seeds", "users", "items", "days", "smoke")},
        "sets": {name: summed_up(runs) for name, runs in found.items()},
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def one_run(name: str, config: str, workspace: Path, seed: int) -> dict[str, Any]:
    """Train on a workspace and judge both rankers."""
    settings = load(EXAMPLES / config, [f"workspace.path={json.dumps(str(workspace))}", f"train.seed={seed}", FEW, ONE])
    started = time.monotonic()
    if not places(settings).samples.exists():
        make_samples(settings)
    report = train_model(settings)
    samples = open_samples(places(settings).samples)
    figures: dict[str, Any] = {
        **evaluate_rankers(settings, samples),
        "position": {ranker: one.position for ranker, one in report.rankers.items()},
        "beside": beside(settings, samples),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(name, seed, json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def beside(settings: Settings, samples: Samples) -> dict[str, Any]:
    """AUC of scores that need no network: the click rate of the item and, in a world, its true utility."""
    workspace, shown = places(settings).workspace, read_shown_of(settings, samples)
    trained = samples.impressions
    assert trained is not None
    clicks, seen = (np.bincount(trained.item_row, weights, len(samples.items)) for weights in (trained.clicked, None))
    rates = (clicks + PRIOR * trained.clicked.mean()) / (seen + PRIOR)
    scores = {"item_click_rate": rates[shown.item_row]}
    if (world := world_of(workspace)) is not None:
        table = pq.read_table(workspace / "holdout_impressions.parquet")
        scenes = np.array([SCENES.index(scene) for scene in table["scene"].to_pylist()])
        users, items = (
            find(table[column].combine_chunks())
            for find, column in ((world.user_rows, "user_id"), (world.item_rows, "item_id"))
        )
        scores["true_utility"] = world.truth.utility(users, items, table["request_ts_ms"].to_numpy(), scenes)
    found = {}
    for score, values in scores.items():
        mean = user_auc(values, shown, 2, 0)["user_auc"]
        found[score] = {
            "auc": round(auc(values, shown.clicked), 5),
            "position_auc": round(auc_within(values, shown.clicked, shown.position), 5),
            "user_auc": mean and mean["value"],
        }
    return found


def read_shown_of(settings: Settings, samples: Samples) -> Any:
    """The held-out impressions of a workspace; all items of these sets are known."""
    return read_shown(places(settings).workspace / "holdout_impressions.parquet", samples)


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and ranges over seeds; the calibration table is that of the first."""
    result: dict[str, Any] = {"impressions": [run["rank"]["impressions"] for run in runs]}
    for name in ("pre_rank", "rank"):
        result[name] = {rate: over_seeds([run[name][rate] for run in runs]) for rate in RATES}
        result[name]["user_auc"] = over_seeds([run[name]["user_auc"]["value"] for run in runs])
        result[name]["deciles"] = runs[0][name]["deciles"]
        result[name]["position"] = runs[0]["position"][name]
    result["beside"] = {
        score: {rate: over_seeds([run["beside"][score][rate] for run in runs]) for rate in ORDERS}
        for score in runs[0]["beside"]
    }
    kept = [run["kept_of_top"] for run in runs]
    result["kept_of_top"] = {
        **{name: kept[0][name] for name in ("users", "retrieved", "kept", "top")},
        **{
            name: over_seeds([one[name]["value"] for one in kept]) if kept[0][name] else None
            for name in ("share", "share_fused")
        },
    }
    result["seconds"] = over_seeds([run["seconds"] for run in runs])
    return result


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Their median and range."""
    return {"median": round(statistics.median(values), 5), "range": [min(values), max(values)]}


if __name__ == "__main__":
    main()
