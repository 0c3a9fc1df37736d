"""Hard negatives in the simulated world: none to all, and with what was shown and not clicked forced in.

    python benchmarks/hard.py [--seeds 3] [--users 4000] [--items 3000] [--days 8] [--out FILE] [--smoke]

The world's log has the whole funnel; its last day is held out. Each seed is another world and another model. Prints one
JSON line.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from twotower.config import load
from twotower.evaluate.holdout import evaluate
from twotower.evaluate.options import EvaluateOptions
from twotower.pipeline.line import make_samples, offline_channel, train_model
from twotower.pipeline.places import places
from twotower.samples.read import open_samples
from twotower.train.checkpoint import open_checkpoint
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

CONFIG = Path(__file__).parent.parent / "examples" / "demo.toml"
ALONE = 'models.channels=["two_tower"]'
METRICS = ("recall@20", "recall@50", "recall@200", "pop_pct@50")
CASES = {
    "0 % hard": ["samples.negatives.hard_share=0"],
    "25 % hard": ["samples.negatives.hard_share=0.25"],
    "50 % hard": ["samples.negatives.hard_share=0.5"],
    "75 % hard": ["samples.negatives.hard_share=0.75"],
    "100 % hard": ["samples.negatives.hard_share=1"],
    "50 %, shown and not clicked among them": [
        "samples.negatives.hard_share=0.5",
        "samples.negatives.impressed_as_negatives_for_experiments=true",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--days", type=int, default=8)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one small world, two cases")
    arguments = parser.parse_args()
    cases = list(CASES)
    if arguments.smoke:
        arguments.seeds, arguments.users, arguments.items, arguments.days = 1, 300, 300, 3
        cases = [cases[0], cases[-1]]
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            workspace = Path(folder) / "workspace"
            simulate_workspace(
                workspace, WorldOptions(users=arguments.users, items=arguments.items, days=arguments.days, seed=seed)
            )
            for name in cases:
                figures[name].append(one_case(workspace, name, seed))
                print(seed, name, figures[name][-1], file=sys.stderr, flush=True)
    result = {
        "benchmark": "hard negatives, simulated world",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        **{name: getattr(arguments, name) for name in ("seeds", "users", "items", "days")},
        "cases": {
            name: {
                metric: {
                    "median": statistics.median(one[metric] for one in found),
                    "range": [min(one[metric] for one in found), max(one[metric] for one in found)],
                }
                for metric in METRICS
            }
            for name, found in figures.items()
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def one_case(workspace: Path, name: str, seed: int) -> dict[str, float]:
    """Figures of one model."""
    settings = load(CONFIG, [f"workspace.path={workspace}", f"train.seed={seed}", ALONE, *CASES[name]])
    make_samples(settings)
    report = train_model(settings)
    samples = open_samples(places(settings).samples)
    channel = offline_channel(samples, open_checkpoint(Path(report.checkpoint)))
    metrics: dict[str, Any] = evaluate(samples, workspace, [channel], EvaluateOptions(k=[20, 50, 200], bootstrap=2))
    return {metric: metrics[metric]["value"] for metric in METRICS}


if __name__ == "__main__":
    main()
