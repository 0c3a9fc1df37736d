"""Kill a publisher again and again, and check after each kill that no one can see half a version.

    python benchmarks/soak/publish.py --kills 30 --seed 0

A process publishes the same tiny trained checkpoint and promotes the version. It is killed (SIGKILL) at a random
moment, or right before a random one of the files and folders that it writes, flushes, renames, removes or makes; if it
ends before, another one begins. After each

- every folder of `versions/` that does not begin with a dot is a whole version: its hashes and golden answers agree,
- `CURRENT` names one of them, once there was one,
- no half version of an earlier kill is left once another version has been published, and nothing once one has been
  promoted.

At the end a run that nobody kills goes through. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import forks

from twotower.config import Settings, parse
from twotower.pipeline.line import build_samples, publish_version, train_model
from twotower.pipeline.places import places
from twotower.publish.publish import current, list_versions, verify
from twotower.schema.files import TEMPORARY
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

KEPT = 3
"""Versions that are kept between kills, so that checking them does not take ever longer."""


def configuration(workspace: Path) -> Settings:
    shape = {"dimension": 8, "user_tower": {"layers": []}, "item_tower": {"layers": []}}
    return parse(
        {
            "workspace": {"path": str(workspace)},
            "models": {**shape, "channels": ["two_tower", "popular"]},
            "train": {"epochs": 1, "batch_size": 256},
        }
    )


def version_names(versions: Path) -> list[str]:
    return sorted(path.name for path in versions.iterdir() if path.is_dir() and not path.name.startswith("."))


def check(versions: Path) -> None:
    """Hold that every version is whole and that `CURRENT` names one of them.

    Raises:
        AssertionError: it is not so.
    """
    names = version_names(versions)
    assert names == [version.id for version in list_versions(versions)]
    for name in names:
        assert verify(versions / name) == [], name
    served = current(versions)
    assert served in names if names and served else not served, f"CURRENT names {served}, there are {names}"


def forget_old(versions: Path, names: list[str]) -> None:
    for name in names[:-KEPT]:
        if name != current(versions):
            (versions / name).rename(versions / f"{TEMPORARY}{name}")  # the next publisher removes it, as any leftover


def soak(folder: Path, kills: int, seed: int) -> dict[str, int | float]:
    """Kill `kills` publishers; counts of what happened."""
    draw = random.Random(seed)
    workspace = folder / "workspace"
    settings = configuration(workspace)
    versions = places(settings).versions

    def prepare() -> None:
        simulate_workspace(workspace, WorldOptions(users=100, items=100, days=2, seed=0))
        build_samples(settings)
        train_model(settings)
        publish_version(settings, promoted=True)  # the later ones follow a version, and take other steps

    def publish() -> None:
        publish_version(settings, promoted=True)

    forks.run(prepare)
    usual = forks.measured(publish, versions)
    killed, published, half_way, seen = 0, 0, 0, set(version_names(versions))
    while killed < kills:
        old, served = leftovers(versions), current(versions)
        killed += not forks.disturbed(publish, versions, draw, usual, reach=1.0)
        forks.run(lambda: check(versions))
        names, left = version_names(versions), leftovers(versions)
        if fresh := set(names) - seen:
            kept = [path for path in old & left if path.is_dir() or current(versions) != served]
            assert not kept, f"{kept} is of an earlier kill"
        published += len(fresh)
        seen |= fresh
        half_way += bool(left)
        forget_old(versions, names)
    forks.run(publish)
    assert current(versions) == version_names(versions)[-1]
    assert leftovers(versions) == set(), "leftovers of killed publishers"
    forks.run(lambda: check(versions))
    return {
        "kills": kills,
        "seed": seed,
        "published": published,
        "killed_half_way": half_way,
        "publish_s": round(usual.seconds, 2),
    }


def leftovers(versions: Path) -> set[Path]:
    return set(versions.glob(f"{TEMPORARY}*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    forks.import_late_modules()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
