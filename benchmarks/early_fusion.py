"""Why early fusion cannot retrieve: one request over a million items, by the ranker and by the two towers' index.

    python benchmarks/early_fusion.py [--smoke] [--out benchmarks/results/early_fusion.json]

The rankers score every item of the catalogue for one user, as a version would (ONNX, mapped tables, one thread); the
index searches as many vectors for k = 2000, tuned to recall .99 on other queries. Weights are drawn: what a network
costs does not depend on what it has learned. Items have an id, a category, an author, tags and a price; the user has an
id, an age and thirty clicks. Rounds are interleaved, and times are those of the calling thread's processor beside the
wall's. Progress goes to stderr, one JSON line to stdout.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common import arguments_of, finish, note
from twotower.features.columns import Bag
from twotower.features.feature_set import FeatureSet, encode_request, encode_table, fit
from twotower.features.options import Categorical, Features, MultiCategorical, Numeric, Sequence
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.publish.ranker import OnnxRanker, write_ranker
from twotower.samples.read import Entities
from twotower.towers.options import PreRankOptions, RankOptions
from twotower.towers.ranker import Ranker

DIMENSION = 64
CENTRES = 200
K = 2000
KEPT = 200
RECALL = 0.99
QUERIES = 200
"""That recall is measured on."""
SEED = 0
HISTORY = 30
CHUNK = 20_000
"""Items of one call of a ranker: of a million at once, the numbers between its layers would fill the memory."""
RANKERS = {
    "pre_rank": PreRankOptions(),
    "rank": RankOptions(),
}
FEATURES = Features(
    user={
        "user_id": Categorical("categorical"),
        "age": Numeric("numeric"),
        "history": Sequence("sequence", last=HISTORY),
    },
    item={
        "item_id": Categorical("categorical"),
        "category": Categorical("categorical"),
        "author": Categorical("categorical"),
        "tags": MultiCategorical("multi_categorical"),
        "price": Numeric("numeric", transform="log"),
    },
)


def catalogue(count: int, rng: np.random.Generator) -> tuple[FeatureSet, Entities]:
    """Fitted features, and encoded items."""
    items = pa.table(
        {
            "item_id": np.arange(count),
            "category": rng.integers(50, size=count),
            "author": rng.integers(max(2, count // 20), size=count),
            "tags": pa.ListArray.from_arrays(
                np.arange(0, 2 * count + 1, 2, dtype=np.int32), pa.array(rng.integers(500, size=2 * count))
            ),
            "price": rng.lognormal(size=count),
        }
    )
    users = pa.table({"user_id": np.arange(1000), "age": rng.integers(18, 80, size=1000)})
    features = fit(FEATURES, users, items, {}, DIMENSION, 0.0)
    return features, Entities(items["item_id"].combine_chunks(), encode_table(features.item, items))


def clustered(centres: NDArray[np.float32], count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors (count, D) around centres (C, D), as in `benchmarks/index.py`."""
    vectors = np.float32(0.7) * rng.standard_normal((count, centres.shape[1]), np.float32)
    vectors += centres[rng.integers(len(centres), size=count)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of the wall and of this thread's processor."""
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return 1000 * (time.perf_counter() - wall), 1000 * (time.thread_time() - cpu)


def measure(count: int, rounds: int) -> dict[str, Any]:
    """Medians of every way to answer one request over `count` items."""
    rng = np.random.default_rng(SEED)
    features, items = catalogue(count, rng)
    note(f"{count} items encoded")
    centres = rng.standard_normal((CENTRES, DIMENSION), np.float32)
    vectors, tuning, queries = (clustered(centres, size, rng) for size in (count, 500, QUERIES))
    exact = ExactIndex.build(np.arange(count), vectors)
    index = FaissIndex.build(np.arange(count), vectors, SEED, flat_below=0).tune(tuning, [K], RECALL, exact)
    note("index built and tuned")
    user = encode_request(features.user_columns, {"user_id": 7, "age": 33}, "features")
    clicks = Bag(np.array([0, HISTORY]), rng.integers(count, size=HISTORY).astype(np.int32))
    every = [np.arange(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    candidates = rng.choice(count, min(K, count), replace=False)
    with tempfile.TemporaryDirectory() as folder:
        rankers = {}
        for name, options in RANKERS.items():
            write_ranker(Path(folder, name), Ranker(features, options, SEED), {})
            rankers[name] = OnnxRanker(Path(folder, name), items)
        ways: dict[str, Callable[[int], object]] = {
            "search_index": lambda at: index.search(queries[at : at + 1], K),
            "search_exact": lambda at: exact.search(queries[at : at + 1], K),
            "pre_rank_candidates": lambda _: rankers["pre_rank"].score(user, clicks, candidates),
            "rank_kept": lambda _: rankers["rank"].score(user, clicks, candidates[:KEPT]),
            "pre_rank_all": lambda _: [rankers["pre_rank"].score(user, clicks, rows) for rows in every],
            "rank_all": lambda _: [rankers["rank"].score(user, clicks, rows) for rows in every],
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for at in range(rounds):
            for name, way in ways.items():
                if at == 0:
                    way(0)  # brings the mapped pages in
                times[name].append(timed(lambda way=way, at=at: way(at)))  # type: ignore[misc]
            note(f"round {at + 1} of {rounds}")
    truth, found = exact.search(queries, K).rows, index.search(queries, K).rows
    recall = float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(truth, found, strict=True)]))
    medians = {
        name: {
            "ms": round(float(np.median([wall for wall, _ in one])), 3),
            "cpu_ms": round(float(np.median([cpu for _, cpu in one])), 3),
            "cpu_range_ms": [round(f(cpu for _, cpu in one), 3) for f in (min, max)],
        }
        for name, one in times.items()
    }
    return {
        "items": count,
        "k": K,
        "recall": round(recall, 4),
        "nprobe": index.tuning[0].nprobe if index.tuning else None,
        "one_request": medians,
        "times_dearer": {
            name: round(medians[f"{name}_all"]["cpu_ms"] / medians["search_index"]["cpu_ms"]) for name in RANKERS
        },
    }


def main() -> None:
    arguments = arguments_of(__doc__, "small sizes").parse_args()
    count, rounds = (5_000, 2) if arguments.smoke else (1_000_000, 5)
    finish(
        arguments,
        "early fusion over a whole catalogue",
        dimension=DIMENSION,
        seed=SEED,
        **measure(count, rounds),
    )


if __name__ == "__main__":
    main()
