"""Kill a training run again and again, and check that it ends with the bytes of an undisturbed one.

    python benchmarks/soak/train.py --kills 50 --seed 0

A process trains a small world with a checkpoint every few steps. It is killed (SIGKILL) at a random moment, or right
before a random one of the files and folders that it writes, flushes, renames, removes or makes; the next one resumes.
After some kills the newest checkpoint is damaged too: a byte is flipped, or it ends early. When a run is finished, its
tensors are compared with those of a run that nobody disturbed, and another round begins, until there were enough kills.
The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
from functools import partial
from pathlib import Path

import forks
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.channels.options import ModelsOptions
from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import NegativesOptions
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.files import sha256
from twotower.towers.options import TowerOptions
from twotower.train.checkpoint import FINISHED, TENSORS
from twotower.train.options import TrainOptions
from twotower.train.towers import train

USERS, ITEMS, CLICKS = 300, 120, 6000
EPOCHS = 24
CHECKPOINT_S = 0.03
REACH = 0.7
"""Share of the time of an undisturbed run within which a process is killed: what resumes has less to do."""
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


def work(samples: Path, checkpoints: Path) -> None:
    """Train to the end, or until killed."""
    options = TrainOptions(
        temperature=0.1, batch_size=256, epochs=EPOCHS, weight_decay=0.01, dropout=0.1, checkpoint_s=CHECKPOINT_S,
        threads=1,
    )  # fmt: skip
    tower = TowerOptions("dnn", [32])
    models = ModelsOptions(dimension=16, user_tower=tower, item_tower=tower)
    train(open_samples(samples), checkpoints, options, models, NegativesOptions())


def result_of(checkpoints: Path) -> str:
    """The hash of the tensors of a finished run."""
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
    """Kill `kills` processes; counts of what happened."""
    generator, samples = random.Random(seed), folder / "samples"
    forks.run(lambda: make_world(folder))
    usual = forks.measured(lambda: work(samples, folder / "undisturbed"), folder / "undisturbed")
    undisturbed = result_of(folder / "undisturbed")
    counts = {"kills": 0, "seed": seed, "rounds": 0, "resumable": 0, "half_written": 0, "damaged": 0}
    while counts["kills"] < kills:
        counts["rounds"] += 1
        checkpoints = folder / f"round-{counts['rounds']}"
        train_on = partial(work, samples, checkpoints)
        while counts["kills"] < kills and not forks.disturbed(train_on, checkpoints, generator, usual, REACH):
            counts["kills"] += 1
            steps = sorted(checkpoints.glob("run-*/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
            counts["resumable"] += bool(steps)
            counts["half_written"] += bool(list(checkpoints.glob("run-*/.tmp-*")))
            if steps and generator.random() < DAMAGED:
                damage(steps[-1], generator)
                counts["damaged"] += 1
        forks.run(train_on)
        assert result_of(checkpoints) == undisturbed, f"round {counts['rounds']} ended with other bytes"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    forks.import_late_modules()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), arguments.kills, arguments.seed)))


if __name__ == "__main__":
    main()
