"""Kill a publisher again and again, and check after each kill that no one can see half a version.

    python benchmarks/soak/publish.py --kills 30 --seed 0

A child process publishes the same tiny trained checkpoint and promotes the version, over and over; it is killed
(SIGKILL) at a random moment. After each kill

- every folder of `versions/` that does not begin with a dot is a whole version: its hashes and golden answers agree,
- `CURRENT` names one of them, once there was one,
- nothing of an earlier kill is left once another version has been published.

At the end a run that nobody kills goes through. The last line is one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twotower.config import Settings, parse
from twotower.pipeline.line import make_samples, publish_version, train_model
from twotower.pipeline.places import places
from twotower.publish.publish import current, list_versions, verify
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


def child(workspace: Path) -> None:
    """Publish and promote until killed, beginning with a line on stdout."""
    settings = configuration(workspace)
    print("ready", flush=True)
    while True:
        publish_version(settings, promoted=True)


def check(versions: Path) -> list[str]:
    """The ids of all versions, which are whole.

    Raises:
        AssertionError: a version is not, or `CURRENT` names none.
    """
    folders = sorted(path.name for path in versions.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert folders == [version.id for version in list_versions(versions)]
    for name in folders:
        assert verify(versions / name) == [], name
    served = current(versions)
    assert served in folders if folders and served else not served, f"CURRENT names {served}, there are {folders}"
    return folders


def forget_old(versions: Path, names: list[str]) -> None:
    for name in names[:-KEPT]:
        if name != current(versions):
            (versions / name).rename(versions / f".tmp-{name}")  # the next publisher removes it, as any leftover


def soak(folder: Path, kills: int, seed: int) -> dict[str, int | float]:
    """Kill `kills` children; counts of what happened."""
    generator = random.Random(seed)
    workspace = folder / "workspace"
    simulate_workspace(workspace, users=100, items=100, days=2, seed=0)
    settings = configuration(workspace)
    make_samples(settings)
    train_model(settings)
    versions = places(settings).versions
    started = time.monotonic()
    publish_version(settings, promoted=True)
    duration = time.monotonic() - started
    published, half_way, seen = 0, 0, set(check(versions))
    for _ in range(kills):
        old = leftovers(versions)
        command = [sys.executable, __file__, "--child", str(workspace)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()  # it has imported everything
            time.sleep(generator.uniform(0, 2 * duration))
            assert process.poll() is None, "the child ended by itself"
            process.kill()
        names = check(versions)
        if fresh := set(names) - seen:
            assert not set(old) & set(leftovers(versions)), "leftovers of an earlier kill"
        published += len(fresh)
        seen |= fresh
        half_way += bool(leftovers(versions))
        forget_old(versions, names)
    last = publish_version(settings, promoted=True)["version"]
    assert current(versions) == last
    assert leftovers(versions) == [], "leftovers of killed publishers"
    check(versions)
    return {
        "kills": kills,
        "seed": seed,
        "published": published,
        "killed_half_way": half_way,
        "publish_s": round(duration, 2),
    }


def leftovers(versions: Path) -> list[str]:
    return [path.name for path in versions.glob(".tmp-*")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
