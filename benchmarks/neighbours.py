"""ItemCF and Swing beside the item-item recommenders of the library `implicit`: time, memory and recall.

    python benchmarks/neighbours.py --data DIR [--case NAME ...] [--rounds 3] [--out FILE] [--smoke]

For each case the data set under `--data` is imported and its samples are built; then every method fits to the same
clicks, in turns, so that a busy machine slows all of them. Each run is a process of its own, with two threads; its
seconds and its processor seconds are those of the fit alone, its peak is the resident set of the whole process. The
recall of the held-out positives is that of `evaluate`, without what users clicked, in the first round. Swing's kernel
is compiled before the clock starts. Prints one JSON line.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common import arguments_of, finish, note, run
from twotower.channels.item_cf import fit_item_cf
from twotower.channels.swing import fit_swing
from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.holdout import ranked, read_truth
from twotower.evaluate.metrics import score_lists
from twotower.pipeline.line import build_samples
from twotower.pipeline.places import places
from twotower.samples.options import EngineOptions
from twotower.samples.read import Clicks, Samples, open_samples

CONFIG = Path(__file__).parent.parent / "examples" / "ids_only.toml"
THREADS, NEIGHBOURS = 2, 200
CASES: dict[str, tuple[int, str, str, ImportOptions]] = {
    "movielens": (50, "movielens-1m", "ml-1m", ImportOptions(holdout="time:0.9", positive="4")),
    "kuairand": (50, "kuairand", "kuairand", ImportOptions(holdout="since:2022-05-03")),
    "globo": (20, "globo", "globo", ImportOptions(holdout="since:2017-10-10", until="2017-10-10")),
    "gowalla": (20, "interactions", "gowalla/train.parquet", ImportOptions()),
}
"""Cut-off of the recall, and what is imported from where."""
IMPLICIT = {
    "implicit cosine": "CosineRecommender",
    "implicit tf-idf": "TFIDFRecommender",
    "implicit bm25": "BM25Recommender",
}
METHODS = ("item_cf", "swing", *IMPLICIT)


def main() -> None:
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(one_run(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "True")))
        return
    parser = arguments_of(__doc__, "one round of MovieLens", data=True)
    parser.add_argument("--case", action="append", choices=list(CASES), help="absent = all")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.case, arguments.rounds = ["movielens"], 1
    finish(
        arguments,
        "item-to-item neighbours",
        threads=THREADS,
        implicit_neighbours=NEIGHBOURS,
        cases={name: one_case(name, arguments.data, arguments.rounds) for name in arguments.case or CASES},
    )


def one_case(name: str, data: Path, rounds: int) -> dict[str, Any]:
    """All methods on one data set, in turns."""
    k, dataset, source, options = CASES[name]
    if name == "gowalla":
        options = replace(options, test=data / "gowalla" / "test.parquet")
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        import_dataset(dataset, data / source, workspace, options)
        build_samples(load(CONFIG, [f"workspace.path={workspace}"]))
        clicks = len(open_samples(workspace / "samples").clicks.item_row)
        for turn in range(rounds):
            for method in METHODS:
                runs[method].append(run([sys.executable, __file__, "run", method, workspace, k, turn == 0]))
                note(name, method, runs[method][-1])
    return {
        "clicks": clicks,
        "methods": {
            method: {
                **{
                    figure: {
                        "median": statistics.median(one[figure] for one in found),
                        "rounds": [one[figure] for one in found],
                    }
                    for figure in ("fit_s", "processor_s", "peak_gb")
                },
                f"recall@{k}": found[0]["recall"],
            }
            for method, found in runs.items()
        },
    }


def one_run(method: str, workspace: Path, k: int, judged: bool) -> dict[str, float]:
    """Fit one method in this process."""
    samples = open_samples(places(load(CONFIG, [f"workspace.path={workspace}"])).samples)
    fit = implicit_fit(method, samples) if method in IMPLICIT else our_fit(method, samples)
    started, processor = time.perf_counter(), time.process_time()
    answer = fit()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    found = {"fit_s": round(seconds, 2), "processor_s": round(processor, 2), "peak_gb": round(peak, 2)}
    if judged:
        truth = read_truth(workspace / "holdout.parquet", samples)
        scores = score_lists(answer(truth.user_rows, k), truth.items, samples.item_positives, [k])
        found["recall"] = round(float(scores.values[f"recall@{k}"].mean()), 5)
    return found


Answer = Callable[[Any, int], Any]


def our_fit(method: str, samples: Samples) -> Callable[[], Answer]:
    """Fit a channel by its default options."""
    fitted = {"item_cf": fit_item_cf, "swing": fit_swing}[method]
    few = Clicks(np.array([0, 2, 4]), np.array([0, 1, 0, 1], np.int32), np.arange(4))
    fitted(few, 2)

    def fit() -> Answer:
        channel = fitted(samples.clicks, len(samples.items), engine=EngineOptions(threads=THREADS))
        return lambda user_rows, k: ranked(samples, channel, user_rows, k)

    return fit


def implicit_fit(method: str, samples: Samples) -> Callable[[], Answer]:
    """Fit a recommender of the library to users' distinct clicks; the matrix is made before."""
    from implicit import nearest_neighbours
    from scipy.sparse import csr_matrix

    clicks, items = samples.clicks, len(samples.items)
    users = len(clicks.indptr) - 1
    pairs = np.unique(np.repeat(np.arange(users), np.diff(clicks.indptr)) * items + clicks.item_row)
    clicked = csr_matrix((np.ones(len(pairs)), (pairs // items, pairs % items)), (users, items))
    model = getattr(nearest_neighbours, IMPLICIT[method])(NEIGHBOURS, num_threads=THREADS)

    def fit() -> Answer:
        model.fit(clicked, show_progress=False)
        return lambda user_rows, k: model.recommend(user_rows, clicked[user_rows], k)[0].astype(np.int64)

    return fit


if __name__ == "__main__":
    main()
