"""One change at a time: what each of them brings, on MovieLens-1M and KuaiRand.

    python benchmarks/variants.py --data DIR [--table NAME ...] [--on SET ...] [--variant NAME ...] [--seeds 3]
        [--out FILE] [--smoke]

`encoders`: networks and encoders of the history against each other, with the time of a positive. `ablation`: from the
plain model (ids alone, in-batch negatives without a correction) to the example configuration. Each figure is the median
of the seeds on the hold-out, with their range, each user asked as `evaluate` asks; times are those of the processor.
Tables of an earlier run stay in FILE, and with `--variant` its other rows. Prints one JSON line.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.holdout import held_out, judge
from twotower.pipeline.line import channel_of, make_samples, train_from
from twotower.pipeline.places import places
from twotower.samples.read import open_samples
from twotower.train.checkpoint import load_model, open_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"
SETS = {
    "movielens_time": ("movielens-1m", "ml-1m", "time:0.9", "4", "movielens.toml", "recall@50"),
    "kuairand": ("kuairand", "kuairand", "since:2022-05-03", "all", "kuairand.toml", "recall@50"),
}
NETWORKS = {
    "dnn": ['models.user_tower.network="dnn"', 'models.item_tower.network="dnn"'],
    "dcn": ['models.user_tower.network="dcn"', 'models.item_tower.network="dcn"'],
}
HIDDEN = ["models.user_tower.layers=[256, 128]", "models.item_tower.layers=[256, 128]"]
NONE_PREFERRED = ["train.logit_adjustment=0"]
IDS = [
    'features.user={ user_id = { kind = "categorical" } }',
    'features.item={ item_id = { kind = "categorical" } }',
    "features.context={}",
]
POINTWISE = [
    'train.loss="pointwise"',
    *NONE_PREFERRED,
    "samples.negatives.easy={ in_batch = 0, uniform = 1 }",
    "samples.negatives.shared=false",
]
PLAIN = [
    *NONE_PREFERRED,
    *("models.dimension=64", "train.temperature=0.07", "train.id_dropout=0.1"),
    'train.schedule="constant"',
]
UNTUNED = [
    *NONE_PREFERRED,
    *("train.temperature=0.07", "train.batch_size=4096", "train.learning_rate=0.001"),
    *("train.table_learning_rate=0.05", "train.id_dropout=0.1"),
]


def encoder(name: str) -> list[str]:
    """Another encoder of the history."""
    return [f'features.user.history.encoder="{name}"']


# Of each data set: rows of a table, by what is different from the example configuration.
ENCODERS = {
    f"{network}, {name}": [*NETWORKS[network], *HIDDEN, *encoder(name), *NONE_PREFERRED]
    for network in NETWORKS
    for name in ("mean", "attention", "transformer")
}
TABLES: dict[str, dict[str, dict[str, list[str]]]] = {
    "encoders": {
        "movielens_time": ENCODERS,
        "kuairand": ENCODERS,
    },
    "ablation": {
        "movielens_time": {
            "ids alone, pointwise, 4 uniform negatives": [*IDS, *POINTWISE, *HIDDEN, *PLAIN],
            "softmax, in-batch negatives, log q": [*IDS, *HIDDEN, *PLAIN],
            "features, the history instead of the user's id": [*HIDDEN, *PLAIN, "train.horizon=0"],
            "a horizon of 1000 clicks": [*HIDDEN, *PLAIN],
            "no hidden layers": PLAIN,
            "128 numbers, temperature 0.1, a linear schedule": NONE_PREFERRED,
            "popular items preferred": [],
        },
        "kuairand": {
            "ids alone, pointwise, 4 uniform negatives": [*IDS, *POINTWISE, *HIDDEN, *NETWORKS["dnn"], *UNTUNED],
            "softmax, in-batch negatives, log q": [*IDS, *HIDDEN, *NETWORKS["dnn"], *UNTUNED],
            "features, context and histories": [*HIDDEN, *NETWORKS["dnn"], *UNTUNED],
            "no hidden layers": [*NETWORKS["dnn"], *UNTUNED],
            "temperature, rates and batch by trials": [*NETWORKS["dnn"], "train.id_dropout=0.2", *NONE_PREFERRED],
            "crosses in the user tower, more id dropout": NONE_PREFERRED,
            "popular items preferred": [],
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--table", action="append", choices=list(TABLES), help="absent = all")
    parser.add_argument("--on", action="append", choices=list(SETS), help="absent = all data sets")
    parser.add_argument("--variant", action="append", help="rows of the tables; absent = all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="changed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="KuaiRand alone, one seed, one epoch, two variants")
    arguments = parser.parse_args()
    earlier = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    result: dict[str, Any] = {
        **{table: rows for table, rows in earlier.items() if table in TABLES},
        "benchmark": "one change at a time",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "seeds": 1 if arguments.smoke else arguments.seeds,
        "changed": arguments.changed,
    }
    for table in arguments.table or TABLES:
        for data, variants in TABLES[table].items():
            if data in (["kuairand"] if arguments.smoke else arguments.on or SETS):
                chosen = {name: one for name, one in variants.items() if name in (arguments.variant or variants)}
                tables = result.setdefault(table, {})
                kept = [row for row in tables.get(data, []) if arguments.variant and row["variant"] not in chosen]
                tables[data] = kept + one_table(data, chosen, arguments)
                if arguments.out:
                    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def one_table(data: str, variants: dict[str, list[str]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a table."""
    name, folder, holdout, positive, config, metric = SETS[data]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        workspace = Path(scratch) / "workspace"
        import_dataset(name, arguments.data / folder, workspace, ImportOptions(holdout=holdout, positive=positive))
        for variant, changes in list(variants.items())[: 2 if arguments.smoke else None]:
            found, times = [], []
            for seed in range(1 if arguments.smoke else arguments.seeds):
                changed = [f"workspace.path={workspace}", *changes, *arguments.changed, f"train.seed={seed}"]
                settings = load(EXAMPLES / config, changed + (["train.epochs=1"] if arguments.smoke else []))
                if seed == 0:
                    make_samples(settings)
                samples = open_samples(places(settings).samples)
                started = time.process_time()
                report = train_from(settings, samples)
                times.append(round(1e6 * (time.process_time() - started) / report.rows, 2))
                channel = channel_of(load_model(open_checkpoint(Path(report.checkpoint))), samples)
                truth = held_out(places(settings).workspace, samples, settings.evaluate.context)
                found.append(round(judge(samples, channel, truth, metric), 5))
            rows.append(
                {
                    "variant": variant,
                    "changes": changes,
                    "metric": metric,
                    "median": statistics.median(found),
                    "range": [min(found), max(found)],
                    "microseconds_a_positive": statistics.median(times),
                }
            )
            print(data, rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
