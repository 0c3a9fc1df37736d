"""Training speed beside other libraries, on the same rows and features of MovieLens-1M.

    make peers
    python benchmarks/speed.py --data DIR [--rounds 5] [--out FILE] [--smoke]

Features: user id, gender, age, occupation, the mean of the last 50 clicked items; item id, genres, year. Both towers
have layers of 256 and 128 and vectors of 64; batches of 4096, all other rows of the batch as negatives, two threads.
Each system runs as a process of its own with its own Python (`.peers/`), in turns, so that a busy machine slows all of
them; the figure is the median of the rounds. A first epoch is not counted for the others; ours is counted whole.

In the same run, the time of the loss (forward and backward) over that of its three bare matrix products.
Prints one JSON line.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common import arguments_of, finish, note, options, run, twotower
from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.features.columns import Bag, ranges
from twotower.pipeline.line import build_samples
from twotower.pipeline.places import places
from twotower.samples.read import Samples, open_samples
from twotower.towers.losses import Mask, SharedNegatives, sampled_softmax, shared_loss
from twotower.train.negatives import fed_frequency

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "examples" / "movielens_next.toml"
PEERS = ROOT / ".peers"
THREADS, BATCH, LAST = 2, 4096, 50
FEATURES = [
    f'features.user.history={{ kind = "sequence", last = {LAST}, encoder = "mean" }}',
    "models.user_tower.layers=[256, 128]",
    "models.item_tower.layers=[256, 128]",
    f"train.batch_size={BATCH}",
]


def main() -> None:
    parser = arguments_of(__doc__, "one round, without other libraries", data=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    peers = {} if arguments.smoke else {"tfrs": run_tfrs, "torch_rechub": run_torch_rechub}
    if missing := [name for name in peers if not (PEERS / name / "bin" / "python").exists()]:
        raise SystemExit(f"{PEERS} lacks {', '.join(missing)}: type make peers")
    rates: dict[str, list[float]] = {name: [] for name in ("twotower", *peers)}
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        settings = load(CONFIG, [f"workspace.path={folder}/workspace", *FEATURES])
        workspace = places(settings).workspace
        import_dataset("movielens-1m", arguments.data, workspace, ImportOptions(holdout="time:0.9", positive="4"))
        build_samples(settings)
        rows = Path(folder) / "rows.npz"
        export(open_samples(workspace / "samples"), rows)
        for turn in range(1 if arguments.smoke else arguments.rounds):
            rates["twotower"].append(run_twotower(workspace, turn))
            for name, run_peer in peers.items():
                rates[name].append(run_peer(rows))
            ratios.append(loss_over_floor())
            note({name: round(found[-1]) for name, found in rates.items()}, ratios[-1])
    medians = {name: statistics.median(found) for name, found in rates.items()}
    finish(
        arguments,
        "training speed, movielens-1m, all features, history 50, D 64, batch 4096",
        threads=THREADS,
        positives_per_s={
            name: {"median": round(medians[name]), "rounds": [round(rate) for rate in found]}
            for name, found in rates.items()
        },
        times_faster_than={name: round(medians["twotower"] / medians[name], 2) for name in peers},
        loss_over_its_matrix_products={"median": statistics.median(ratios), "rounds": ratios},
    )


def export(samples: Samples, path: Path) -> None:
    """The training rows as padded arrays: ids begin at 1 or higher, 0 is padding."""
    rows, clicks, history = samples.positives, samples.clicks, samples.features.history
    assert history is not None
    tokens = history.vocabulary.rows(samples.items.ids)[clicks.item_row]
    count = np.minimum(rows.history, LAST).astype(np.int64)
    first = clicks.indptr[rows.user_row] + rows.history - count
    padded = np.zeros((len(rows), LAST), np.int32)
    padded[np.arange(LAST) < count[:, None]] = tokens[ranges(first, count)]
    genres = samples.items.features["genres"]
    assert isinstance(genres, Bag)
    lengths = np.diff(genres.indptr)
    by_item = np.zeros((len(lengths), int(lengths.max())), np.int32)
    by_item[np.arange(by_item.shape[1]) < lengths[:, None]] = genres.rows
    users = {name: column[rows.user_row] for name, column in samples.users.features.items()}  # type: ignore[index]
    items = {name: samples.items.features[name][rows.item_row] for name in ("item_id", "year")}  # type: ignore[index]
    tables = samples.features.tables
    np.savez(
        path,
        **users,
        **items,
        genres=by_item[rows.item_row],
        history=padded,
        q=fed_frequency(samples)[rows.item_row].astype(np.float32),
        **{f"size.{name.split('.')[-1]}": np.array(table.rows) for name, table in tables.items()},
        **{f"width.{name.split('.')[-1]}": np.array(table.dimension) for name, table in tables.items()},
    )


def run_twotower(workspace: Path, turn: int) -> float:
    """Positives a second of `twotower train`, two epochs, the first one included."""
    changed = [f"workspace.path={workspace}", "train.epochs=2", f"train.seed={turn}", f"train.threads={THREADS}"]
    return float(twotower("train", *options(CONFIG.name, [*FEATURES, *changed]))["rows_per_s"])


def run_tfrs(rows: Path) -> float:
    """Positives a second of TensorFlow Recommenders, the second epoch."""
    program = ROOT / "benchmarks" / "peers" / "tfrs_train.py"
    quiet = {"TF_USE_LEGACY_KERAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": str(THREADS)}
    found = run([PEERS / "tfrs" / "bin" / "python", program, rows, "--threads", THREADS], {**os.environ, **quiet})
    return float(found["rows"] / statistics.median(found["epoch_s"]))


def run_torch_rechub(rows: Path) -> float:
    """Positives a second of torch-rechub, a part of an epoch."""
    program = ROOT / "benchmarks" / "peers" / "torch_rechub_train.py"
    found = run([PEERS / "torch_rechub" / "bin" / "python", program, rows, "--threads", THREADS])
    return float(found["rows"] / statistics.median(found["epoch_s"]))


def loss_over_floor(repeats: int = 15) -> float:
    """Time of the in-batch softmax, forward and backward, over that of U V^T, G V and G^T U; medians, in turns."""
    torch.set_num_threads(THREADS)
    generator, draw = torch.Generator().manual_seed(0), np.random.default_rng(0)
    users, items = (
        torch.nn.functional.normalize(torch.randn(BATCH, 64, generator=generator)).requires_grad_() for _ in range(2)
    )
    positive = torch.arange(BATCH)
    lists = [np.union1d(draw.integers(BATCH, size=60), [row]) for row in range(BATCH)]
    mask = Mask(np.cumsum([0, *map(len, lists)]), np.concatenate(lists))
    negatives = SharedNegatives(torch.randn(BATCH, generator=generator).numpy(), mask)
    share = torch.full((BATCH,), 1 / BATCH)
    scores = torch.empty(BATCH, BATCH)
    form, calibration = sampled_softmax(0.07), torch.zeros(2)
    times: dict[str, list[float]] = {"loss": [], "floor": []}
    for _ in range(repeats):
        users.grad = items.grad = None
        started = time.perf_counter()
        loss = shared_loss(form, users, items, positive, negatives, share=share, calibration=calibration)
        loss.backward()  # type: ignore[no-untyped-call]
        times["loss"].append(time.perf_counter() - started)
        with torch.no_grad():
            started = time.perf_counter()
            torch.mm(users, items.T, out=scores)
            scores @ items
            scores.T @ users
            times["floor"].append(time.perf_counter() - started)
    return round(statistics.median(times["loss"]) / statistics.median(times["floor"]), 3)


if __name__ == "__main__":
    main()
