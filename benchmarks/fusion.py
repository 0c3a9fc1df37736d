"""Fused lists against the best single channel of the same length, on public data sets, through the command line.

    python benchmarks/fusion.py --data DIR [--case NAME ...] [--work DIR] [--set section.key=value ...] [--out FILE]
        [--smoke]

For each case: imports the data set under `--data`, builds samples and trains all channels by the example configuration,
chooses how to fuse on a validation part of the training events (`twotower fuse`), and then looks at the test set once
(`twotower evaluate --channels`): recall at 200 and 500 of each channel, of their union and of the fused list, and the
paired difference of the fused list to the best single channel, which is picked on the test set itself. `--work` keeps
the workspaces, so that what is finished is not done again. Prints one JSON line; beside the file of `--out` come the
reports of all cases (Markdown) and plots (SVG).
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments_of, finish, note, options, twotower


@dataclass(frozen=True)
class Case:
    """A data set with its hold-out, and what differs from the example configuration."""

    source: list[str]
    """Arguments of `import`; those with a slash are paths below the data."""
    config: str
    changes: list[str]
    ks: tuple[int, ...] = (200, 500)
    """Lengths, for all of which one fusion is chosen."""


CHANNELS = 'models.channels=["two_tower", "item_cf", "swing", "als", "popular"]'
CASES = {
    "movielens": Case(
        ["movielens-1m", "ml-1m/", "--holdout", "time:0.9", "--positive", "4"], "movielens.toml", [CHANNELS]
    ),
    "kuairand": Case(
        ["kuairand", "kuairand/", "--holdout", "since:2022-05-03"],
        "kuairand.toml",
        [
            'models.channels=["two_tower", "mind", "item_cf", "als", "same_category", "popular"]',
            'models.same_category.attributes=["author_id", "tag"]',
            'models.popular.segment="onehot_feat1"',
            # Three single days: the two days that the test has would leave three quarters of the clicks to learn from.
            'tune.holdout="since:2022-05-02"',
            "fusion.parts=3",
            "fusion.users=13500",
        ],
    ),
    # One fusion for each length: the towers are the better channel at 200, popularity of the region at 500.
    **{
        f"globo_{k}": Case(
            ["globo", "globo/", "--holdout", "since:2017-10-10", "--until", "2017-10-10"],
            "globo.toml",
            ["fusion.users=20000", f"fusion.k=[{k}]"],
            (k,),
        )
        for k in (200, 500)
    },
    "gowalla": Case(
        ["interactions", "gowalla/train.parquet", "--test", "gowalla/test.parquet"], "ids_only.toml", [CHANNELS]
    ),
}


def main() -> None:
    parser = arguments_of(__doc__, "KuaiRand alone, one epoch, few users to choose on", data=True)
    parser.add_argument("--case", action="append", choices=list(CASES), help="absent = all")
    parser.add_argument("--work", type=Path, help="keeps the workspaces; absent = a temporary folder")
    parser.add_argument("--set", action="append", default=[], dest="changed")
    arguments = parser.parse_args()
    names = ["kuairand"] if arguments.smoke else arguments.case or list(CASES)
    with tempfile.TemporaryDirectory() as scratch:
        finish(
            arguments,
            "fused lists against the best single channel",
            cases={name: one_case(name, arguments.work or Path(scratch), arguments) for name in names},
        )


def one_case(name: str, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one data set."""
    case, workspace = CASES[name], work / name / "workspace"
    if not workspace.exists():
        workspace.parent.mkdir(parents=True, exist_ok=True)
        source = [str(arguments.data / part) if "/" in part else part for part in case.source]
        twotower("import", *source, "--out", str(workspace))
    changed = [*case.changes, f"workspace.path={workspace}", f"evaluate.channels_k={list(case.ks)}", *arguments.changed]
    changed += ["train.epochs=1", "fusion.users=200", "evaluate.bootstrap=50"] if arguments.smoke else []
    given = options(case.config, changed)
    if not (workspace / "samples").exists():
        twotower("samples", *given)
    twotower("train", *given)
    if not (workspace / "fusion.json").exists():
        twotower("fuse", *given)
    chosen = json.loads((workspace / "fusion.json").read_text(encoding="utf-8"))
    report = twotower("evaluate", *given, "--channels")
    if arguments.out:
        for file in map(Path, report["files"]):
            if file.suffix != ".json":
                shutil.copyfile(file, arguments.out.with_name(f"{arguments.out.stem}_{name}{file.suffix}"))
    found = {
        "config": case.config,
        "changed": [*case.changes, *arguments.changed],
        "fusion": report["fusion"],
        "validation": chosen["validation"],
        **{key: report[key] for key in ("users", "pairs", "recall", "best", "unique", "overlap", "cold")},
        "gain_is_above_zero": {k: best["difference"]["ci95"][0] > 0 for k, best in report["best"].items()},
    }
    note(name, json.dumps({key: found[key] for key in ("fusion", "recall", "best")}))
    return found


if __name__ == "__main__":
    main()
