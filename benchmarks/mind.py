"""MIND against the two towers: where several vectors of a user gain, and where not.

    python benchmarks/mind.py --data DIR [--case NAME ...] [--set section.key=value ...] [--seeds 3] [--out FILE]
        [--smoke]

Both read the same features and samples and are trained by the same loop: `two_tower` as the example configuration has
it, with the mean as the encoder of the history, `mind` with its routing in place of that encoder. Judged is recall on
the hold-out, with the paired difference of MIND to it over users (each seed's figures averaged; 95 % interval), for
everyone and by thirds of the users: by their clicks, and by how far these spread (1 minus the length of the mean
of the clicked items' vectors). Prints one JSON line.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.holdout import Truth, held_out, ranked
from twotower.evaluate.metrics import difference, score_lists
from twotower.pipeline.line import channel_of, make_samples, train_from
from twotower.pipeline.places import places
from twotower.samples.read import Samples, open_samples
from twotower.train.checkpoint import load_model, open_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
SETS = {
    "movielens_time": ("movielens-1m", "ml-1m", "time:0.9", "4", "movielens.toml"),
    "kuairand": ("kuairand", "kuairand", "since:2022-05-03", "all", "kuairand.toml"),
}
MODELS = ("two_tower", "mind")
KS = [50, 200]
Floats = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--case", action="append", choices=list(SETS), help="absent = all")
    parser.add_argument("--set", action="append", default=[], dest="changed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="KuaiRand alone, one seed, one epoch")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.case, arguments.seeds = ["kuairand"], 1
        arguments.changed.append("train.epochs=1")
    result: dict[str, Any] = {
        "benchmark": "MIND against the two towers",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "seeds": arguments.seeds,
        "changed": arguments.changed,
    }
    for data in arguments.case or SETS:
        result[data] = compare(data, arguments.data, arguments.seeds, arguments.changed)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def compare(data: str, folder: Path, seeds: int, changed: list[str]) -> dict[str, Any]:
    """Recall of each model, and MIND's difference to the others."""
    name, source, holdout, positive, config = SETS[data]
    found: dict[str, list[dict[str, Floats]]] = {model: [] for model in MODELS}
    seconds: dict[str, list[float]] = {model: [] for model in MODELS}
    groups: dict[str, npt.NDArray[np.bool_]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "workspace"
        import_dataset(name, folder / source, workspace, ImportOptions(holdout=holdout, positive=positive))
        for model in MODELS:
            for seed in range(seeds):
                settings = load(EXAMPLES / config, [f"workspace.path={workspace}", *changed, f"train.seed={seed}"])
                if not groups:
                    make_samples(settings)
                samples = open_samples(places(settings).samples)
                truth = held_out(places(settings).workspace, samples, settings.evaluate.context)
                report = train_from(settings, samples, channel=model)
                trained = load_model(open_checkpoint(Path(report.checkpoint)))
                channel = channel_of(trained, samples, model)
                lists = ranked(samples, channel, truth.user_rows, max(KS), truth.context)
                found[model].append(score_lists(lists, truth.items, samples.item_positives, KS).values)
                seconds[model].append(report.seconds)
                if not groups:
                    groups = thirds(samples, truth, trained.encode_items(samples.items.features))
                recall = {f"recall@{k}": round(float(found[model][-1][f"recall@{k}"].mean()), 5) for k in KS}
                print(data, model, seed, recall, f"{report.seconds:.0f} s", file=sys.stderr, flush=True)
    table: dict[str, Any] = {"users": len(truth.user_rows), "models": {}}
    for model, runs in found.items():
        table["models"][model] = {"seconds": sorted(round(s, 1) for s in seconds[model])}
        for k in KS:
            means = sorted(round(float(run[f"recall@{k}"].mean()), 5) for run in runs)
            table["models"][model][f"recall@{k}"] = {"median": means[len(means) // 2], "range": [means[0], means[-1]]}
    table["mind_minus"] = {
        "two_tower": {group: {f"recall@{k}": gain(found, k, chosen) for k in KS} for group, chosen in groups.items()}
    }
    return table


def gain(found: dict[str, list[dict[str, Floats]]], k: int, chosen: npt.NDArray[np.bool_]) -> Any:
    """The paired difference of MIND to the two towers over some users, each seed's figures averaged first."""
    theirs, ours = (np.mean([run[f"recall@{k}"][chosen] for run in found[name]], axis=0) for name in MODELS)
    figure = difference(ours, theirs, 1000, 0)
    assert figure.ci95 is not None
    return {"users": int(chosen.sum()), "value": round(figure.value, 5), "ci95": [round(x, 5) for x in figure.ci95]}


def thirds(samples: Samples, truth: Truth, vectors: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks (B,) of all users, and of thirds of them by their clicks and by how far these spread."""
    clicks = samples.clicks
    counts = np.diff(clicks.indptr)[truth.user_rows]
    mine = [clicks.item_row[clicks.indptr[user] : clicks.indptr[user + 1]] for user in truth.user_rows]
    spread = 1 - np.linalg.norm([vectors[rows].sum(axis=0) for rows in mine], axis=1) / np.maximum(counts, 1)
    masks = {"all": np.ones(len(counts), bool)}
    for name, value in (("clicks", counts.astype(np.float64)), ("spread", spread)):
        low, high = np.quantile(value, [1 / 3, 2 / 3])
        masks |= {
            f"{name}: least third": value <= low,
            f"{name}: middle third": (value > low) & (value <= high),
            f"{name}: most third": value > high,
        }
    return masks


if __name__ == "__main__":
    main()
