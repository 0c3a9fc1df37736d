"""Kill a training run again and again, and check that it ends with the bytes of an undisturbed one.

    python benchmarks/soak/train.py --kills 50 --seed 0

A child process trains a small world with a checkpoint every few steps and is killed (SIGKILL) at a random moment; the
next one resumes. After some kills the newest checkpoint is damaged too: a byte is flipped, or it ends early. When a run
is finished, its tensors are compared with those of a run that nobody disturbed, and another round begins, until there
were enough kills. The last line is one JSON object.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.files import sha256
from twotower.towers.towers import Network
from twotower.train.checkpoint import FINISHED, TENSORS, Shape
from twotower.train.loop import Loss, Negatives, train

USERS, ITEMS, CLICKS = 300, 120, 6000
EPOCHS = 24
CHECKPOINT_S = 0.03
DAMAGED = 0.3
"""Share of kills after which the newest checkpoint is damaged."""
START_MS = 1_700_000_000_000


def make_world(folder: Path) -> None:
    generator = np.random.default_rng(0)
    request = START_MS + 1000 * np.arange(CLICKS)
    workspace = folder / "workspace"
    (workspace / "events" / "date=2023-11-14").mkdir(parents=True)
    pq.write_table(pa.table({c.USER_ID: np.arange(USERS)}), workspace / "users.parquet")
    pq.write_table(pa.table({c.ITEM_ID: np.arange(ITEMS)}), workspace / "items.parquet")
    events = {
        c.EVENT_SEQ: np.arange(CLICKS),
        c.USER_ID: generator.integers(USERS, size=CLICKS),
        c.ITEM_ID: generator.integers(ITEMS, size=CLICKS),
        c.REQUEST_TS_MS: request,
        c.CLICK_TS_MS: request + 500,
        c.OUTCOME: [c.CLICKED] * CLICKS,
    }
    pq.write_table(pa.table(events), workspace / "events" / "date=2023-11-14" / "0.parquet")
    build_samples(workspace, folder / "samples", Features(), 16)


def child(samples: Path, checkpoints: Path) -> None:
    """Train to the end, or until killed; a line on stdout says that everything is imported."""
    warm = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([warm])  # imports more, as do its first steps
    warm.sum().backward()
    optimizer.step()
    print("ready", flush=True)
    if not sys.stdin.readline():  # the parent is gone
        return
    shape = Shape(16, Network("dnn", (32,)), Network("dnn", (32,)), dropout=0.1)
    train(
        open_samples(samples),
        checkpoints,
        shape,
        loss=Loss(temperature=0.1),
        negatives=Negatives(),
        batch_size=256,
        epochs=EPOCHS,
        seed=0,
        learning_rate=0.001,
        table_learning_rate=0.05,
        schedule="constant",
        weight_decay=0.01,
        id_dropout=0.1,
        horizon=0,
        half_life_days=None,
        checkpoint_s=CHECKPOINT_S,
        threads=1,
    )


def start(folder: Path, checkpoints: Path) -> subprocess.Popen[str]:
    """A child that imports everything and waits for a line on stdin."""
    command = [sys.executable, __file__, "--folder", str(folder), "--checkpoints", str(checkpoints)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: subprocess.Popen[str]) -> None:
    """Let a child begin, once it is ready."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", "training did not start"
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()


def finish(process: subprocess.Popen[str], checkpoints: Path) -> str:
    """Let a child train to its end; the hash of its tensors."""
    go(process)
    return result_of(process, checkpoints)


def result_of(process: subprocess.Popen[str], checkpoints: Path) -> str:
    assert process.wait() == 0, "training failed"
    (run,) = checkpoints.iterdir()
    assert [path.name for path in run.iterdir()] == [FINISHED], "a finished run keeps nothing but its checkpoint"
    return sha256(run / FINISHED / TENSORS)


def damage(path: Path, generator: random.Random) -> None:
    """Flip a bit of one file of a checkpoint, or cut it short."""
    chosen = generator.choice(sorted(path.iterdir()))
    content = bytearray(chosen.read_bytes())
    place = generator.randrange(len(content))
    if generator.random() < 0.5:
        content[place] ^= 1 << generator.randrange(8)
        chosen.write_bytes(bytes(content))
    else:
        chosen.write_bytes(bytes(content[:place]))


def soak(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` children; counts of what happened."""
    generator = random.Random(seed)
    make_world(folder)
    first = start(folder, folder / "undisturbed")
    go(first)
    began = time.monotonic()
    while first.poll() is None and not list((folder / "undisturbed").glob(f"run-*/{FINISHED}")):
        time.sleep(0.005)
    longest_s = time.monotonic() - began  # to the result: the process takes as long again to end
    undisturbed = result_of(first, folder / "undisturbed")
    counts = {"kills": 0, "seed": seed, "rounds": 0, "resumable": 0, "half_written": 0, "damaged": 0}
    while counts["kills"] < kills:
        counts["rounds"] += 1
        checkpoints = folder / f"round-{counts['rounds']}"
        next_child = start(folder, checkpoints)
        while counts["kills"] < kills:
            process, next_child = next_child, start(folder, checkpoints)  # it starts Python meanwhile
            go(process)
            time.sleep(generator.uniform(0, longest_s))
            process.kill()
            if process.wait() == 0:  # it was done before
                break
            counts["kills"] += 1
            steps = sorted(checkpoints.glob("run-*/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
            counts["resumable"] += bool(steps)
            counts["half_written"] += bool(list(checkpoints.glob("run-*/.tmp-*")))
            if steps and generator.random() < DAMAGED:
                damage(steps[-1], generator)
                counts["damaged"] += 1
        assert finish(next_child, checkpoints) == undisturbed, f"round {counts['rounds']} ended with other bytes"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoints", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoints is not None:
        child(arguments.folder / "samples", arguments.checkpoints)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
