"""Recall on MovieLens-1M over several seeds, through the command line, as a user would run it.

    python benchmarks/movielens.py --data DIR [--seeds 3] [--judge SCRIPT] [--out FILE] [--smoke]

Imports `time:0.9` with ratings of 4 and more as positives, then for each seed trains, evaluates, publishes and writes
the recommendations of every held-out user. `--judge` names a script that scores such a file on its own
(`SCRIPT RECOMMENDATIONS TEST --train TRAIN --k 10,20,50,200`, one JSON line); without it the figures are those of
`evaluate`. Prints one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent.parent / "examples" / "movielens.toml"
METRICS = ("recall@10", "ndcg@10", "recall@20", "recall@50", "recall@200")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one seed, one epoch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        twotower(
            "import",
            "movielens-1m",
            str(arguments.data),
            "--out",
            str(workspace),
            "--holdout",
            "time:0.9",
            "--positive",
            "4",
        )
        runs = [one_seed(workspace, seed, arguments) for seed in range(1 if arguments.smoke else arguments.seeds)]
    figures = {name: [run[name] for run in runs] for name in METRICS}
    result = {
        "benchmark": "movielens-1m time:0.9 positive 4",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "judged_by": "script" if arguments.judge else "evaluate",
        "seeds": len(runs),
        "rows_per_s": [run["rows_per_s"] for run in runs],
        **{
            name: {"median": statistics.median(values), "range": [min(values), max(values)]}
            for name, values in figures.items()
        },
        "popular": runs[0]["popular"],
        "item_cf": runs[0]["item_cf"],
    }
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(line)


def one_seed(workspace: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, evaluate, publish and recommend with one seed."""
    options = ["-c", str(CONFIG), "--set", f"workspace.path={workspace}", "--set", f"train.seed={seed}"]
    if arguments.smoke:
        options += ["--set", "train.epochs=1", "--set", "evaluate.bootstrap=10"]
    if seed == 0:
        twotower("samples", *options)
    trained = twotower("train", *options)
    metrics = twotower("evaluate", *options)
    twotower("publish", *options)
    out = workspace / f"recommendations-{seed}.parquet"
    holdout = workspace / "holdout.parquet"
    twotower("retrieve", *options, "--users", str(holdout), "--k", "200", "--out", str(out))
    figures = {name: metrics[name]["value"] for name in METRICS}
    if arguments.judge:
        train = str(workspace / "train_positives.parquet")
        judged = run([str(arguments.judge), str(out), str(holdout), "--train", train, "--k", "10,20,50,200"])
        figures = {name: judged[name] for name in METRICS}
    baselines = {name: {m: metrics[name][m]["value"] for m in METRICS} for name in ("popular", "item_cf")}
    return {**figures, **baselines, "rows_per_s": trained["rows_per_s"]}


def twotower(*arguments: str) -> dict[str, Any]:
    """Run a command and give its JSON line."""
    return run(["-m", "twotower", *arguments])


def run(arguments: list[str]) -> dict[str, Any]:
    """Run Python with arguments and give the last line of its output, parsed."""
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


if __name__ == "__main__":
    main()
