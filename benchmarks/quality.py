"""Quality on public data sets, over several seeds, through the command line, as a user would run it.

    python benchmarks/quality.py --data DIR [--case NAME ...] [--seeds 3] [--judge SCRIPT] [--set section.key=value ...]
        [--out FILE] [--smoke]

For each case: imports the data set under `--data`, then for each seed trains by the example configuration, publishes
and writes the recommendations of every held-out user, asked in the context of the first held-out impression where the
model has features of contexts. `--judge` names a script that scores such a file on its own
(`SCRIPT RECOMMENDATIONS TEST --train TRAIN --k K,K`, one JSON line); without it the figures are those of `evaluate`. In
the same run stand popularity, ItemCF and EASE (Steck 2019, closed form), and the paired bootstrap over users of the
difference of the median seed to EASE. Prints one JSON line.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from common import arguments_of, finish, note, options, over_runs, run, twotower
from twotower.evaluate.metrics import difference
from twotower_lab.ease import weights


@dataclass(frozen=True)
class Case:
    """A data set with its hold-out, the configuration and what is measured."""

    source: list[str]
    """Arguments of `import`; those with a slash at their end or in them are paths below the data."""
    config: str
    k: int
    ease: float | None
    """Regularisation of EASE; None = its matrix would be too large, or it does not apply."""
    asked: str = "holdout.parquet"
    """Who is asked, and in which context if it has any."""
    hours: tuple[int, ...] = ()
    """Popularity of the last so many hours of training stands beside the figures."""


CASES = {
    "movielens_time": Case(
        ["movielens-1m", "ml-1m/", "--holdout", "time:0.9", "--positive", "4"], "movielens.toml", 50, 2000
    ),
    "movielens_last": Case(
        ["movielens-1m", "ml-1m/", "--holdout", "leave-one-out", "--positive", "all"], "movielens_next.toml", 10, 500
    ),
    "kuairand": Case(
        ["kuairand", "kuairand/", "--holdout", "since:2022-05-03"],
        "kuairand.toml",
        50,
        500,
        asked="holdout_impressions.parquet",
    ),
    "gowalla": Case(
        ["interactions", "gowalla/train.parquet", "--test", "gowalla/test.parquet"], "ids_only.toml", 20, None
    ),
    "globo": Case(
        ["globo", "globo/", "--holdout", "since:2017-10-10", "--until", "2017-10-10"],
        "globo.toml",
        20,
        None,
        hours=(1, 3, 6, 24, 10_000),
    ),
}


def main() -> None:
    parser = arguments_of(__doc__, "one seed, one epoch", data=True)
    parser.add_argument("--case", action="append", choices=list(CASES), help="absent = all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="changed")
    arguments = parser.parse_args()
    finish(
        arguments,
        "quality on public data sets",
        judged_by="script" if arguments.judge else "this program",
        cases={name: one_case(CASES[name], arguments) for name in arguments.case or CASES},
    )


def one_case(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one data set."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        source = [str(arguments.data / part) if "/" in part else part for part in case.source]
        twotower("import", *source, "--out", str(workspace))
        seeds = range(1 if arguments.smoke else arguments.seeds)
        runs = [one_seed(case, workspace, seed, arguments) for seed in seeds]
        metric = f"recall@{case.k}"
        middle = sorted(range(len(runs)), key=lambda seed: runs[seed]["figures"][metric])[(len(runs) - 1) // 2]
        found = {
            "config": case.config,
            "changed": arguments.changed,
            "seconds": [run["seconds"] for run in runs],
            "rows_per_s": [run["rows_per_s"] for run in runs],
            **{name: over_runs([run["figures"][name] for run in runs]) for name in runs[0]["figures"]},
            **{name: runs[0][name] for name in ("popular", "item_cf", "cold")},
        }
        if case.ease is not None:
            found["ease"] = beside_ease(workspace, case, workspace / f"recommendations-{middle}.parquet")
        for hours in case.hours:
            found[f"popular_last_{hours}_h"] = {metric: popular_lately(workspace, hours, case.k)}
    note(json.dumps(found))
    return found


def one_seed(case: Case, workspace: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, publish and recommend with one seed."""
    changed = [f"workspace.path={workspace}", *arguments.changed, f"train.seed={seed}"]
    changed += ["train.epochs=1", "evaluate.bootstrap=10"] if arguments.smoke else []
    given = options(case.config, changed)
    started = time.monotonic()
    if seed == 0:
        twotower("samples", *given)
    trained = twotower("train", *given)
    seconds = time.monotonic() - started
    metrics = twotower("evaluate", *given)
    twotower("publish", *given)
    out, holdout = workspace / f"recommendations-{seed}.parquet", workspace / "holdout.parquet"
    asked = ["--users", str(workspace / case.asked), "--k", "200", "--channel", "two_tower"]
    twotower("retrieve", *given, *asked, "--out", str(out))
    names = [f"{metric}@{k}" for k in sorted({case.k, 10, 20, 50, 200}) for metric in ("recall", "ndcg")]
    if arguments.judge:
        train = str(workspace / "train_positives.parquet")
        ks = ",".join(str(k) for k in sorted({case.k, 10, 20, 50, 200}))
        judged = run([sys.executable, arguments.judge, out, holdout, "--train", train, "--k", ks])
        figures = {name: judged[name] for name in names}
    else:
        figures = {name: metrics[name]["value"] for name in names}
    baselines = {name: {m: metrics[name][m]["value"] for m in names} for name in ("popular", "item_cf")}
    metric = f"recall@{case.k}"
    cold = {
        reason: {"users": found["users"], **{name: found[name][metric] for name in ("two_tower", "popular", "item_cf")}}
        for reason, found in metrics["cold"].items()
    }
    return {"figures": figures, **baselines, "cold": cold, "rows_per_s": trained["rows_per_s"], "seconds": seconds}


def popular_lately(workspace: Path, hours: int, k: int) -> float:
    """Recall of the most clicked items of the last hours of training, without what a user clicked."""
    train, holdout = (pq.read_table(workspace / f"{name}.parquet") for name in ("train_positives", "holdout"))
    user, item, ts_ms = (train[name].to_numpy() for name in ("user_id", "item_id", "ts_ms"))
    items, counts = np.unique(item[ts_ms > ts_ms.max() - hours * 3_600_000], return_counts=True)
    order = items[np.lexsort((items, -counts))]
    clicked: dict[int, set[int]] = {}
    for one, of in zip(user.tolist(), item.tolist(), strict=True):
        clicked.setdefault(one, set()).add(of)
    held: dict[int, set[int]] = {}
    for one, of in zip(holdout["user_id"].to_pylist(), holdout["item_id"].to_pylist(), strict=True):
        held.setdefault(one, set()).add(of)
    best = order[: 20 * k].tolist()
    recalls = []
    for one, truth in held.items():
        listed = [candidate for candidate in best if candidate not in clicked.get(one, set())][:k]
        recalls.append(len(truth.intersection(listed)) / len(truth))
    return round(statistics.mean(recalls), 5)


def beside_ease(workspace: Path, case: Case, recommendations: Path) -> dict[str, Any]:
    """EASE on the same training positives and users, and our difference to it."""
    train, holdout = (pq.read_table(workspace / f"{name}.parquet") for name in ("train_positives", "holdout"))
    users, user = np.unique(train["user_id"].to_numpy(), return_inverse=True)
    items, item = np.unique(train["item_id"].to_numpy(), return_inverse=True)
    clicked = np.zeros((len(users), len(items)), np.float32)
    clicked[user, item] = 1
    judged = np.unique(np.searchsorted(users, holdout["user_id"].to_numpy()))
    truth = np.zeros((len(users), len(items)), bool)
    held = [np.searchsorted(of, holdout[name].to_numpy()) for of, name in ((users, "user_id"), (items, "item_id"))]
    truth[held[0], held[1]] = True
    scores = clicked[judged] @ weights(clicked, case.ease)
    scores[clicked[judged] > 0] = -np.inf
    best = np.argpartition(-scores, case.k, axis=1)[:, : case.k]
    counts = truth[judged].sum(axis=1)
    theirs = np.take_along_axis(truth[judged], best, axis=1).sum(axis=1) / counts
    table = pq.read_table(recommendations, filters=[("rank", "<=", case.k)])
    listed = np.isin(table["item_id"].to_numpy(), items) & np.isin(table["user_id"].to_numpy(), users)
    rows = [
        np.searchsorted(of, table[name].to_numpy()[listed]) for of, name in ((users, "user_id"), (items, "item_id"))
    ]
    hits = np.bincount(rows[0], truth[rows[0], rows[1]], len(users))[judged]
    gain = difference(hits / counts, theirs, 2000, 0)
    return {
        "lambda": case.ease,
        f"recall@{case.k}": round(float(theirs.mean()), 5),
        "ours_minus_ease": {"value": round(gain.value, 5), "ci95": [round(bound, 5) for bound in gain.ci95 or ()]},
    }


if __name__ == "__main__":
    main()
