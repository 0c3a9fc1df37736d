"""Recall and latency of one query: exact beside FAISS, over clustered vectors, in one run.

    python benchmarks/index.py [--smoke] [--out benchmarks/results/index.json]

Vectors are a mixture of 200 gaussians brought to unit length; the queries that are measured come from the same mixture
and are not those that the index was tuned on. The second part filters: a share of the items is left out by chance, or
by an attribute that goes with the vectors (the gaussian), either by one query (`exclude`) or by a view (`without`).
Progress goes to stderr, one JSON line to stdout.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import arguments_of, finish, note
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.protocol import Exclusions, VectorIndex

DIMENSION = 64
KS = (50, 500)
CENTRES = 200
RECALL = 0.99
SEED = 0
SHARES = (0.0, 0.5, 0.9, 0.99)
"""Shares of items that are filtered out."""


def mixture(
    centres: NDArray[np.float32], count: int, rng: np.random.Generator, centre_of: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Unit vectors (count, D) around centres (C, D); noise is .7 of the spread of the centres in each dimension."""
    vectors = rng.standard_normal((count, centres.shape[1]), np.float32)
    vectors *= np.float32(0.7)
    vectors += centres[rng.integers(len(centres), size=count) if centre_of is None else centre_of]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def latencies_ms(
    index: VectorIndex, queries: NDArray[np.float32], k: int, exclude: Exclusions | None = None
) -> dict[str, float]:
    """Of queries (Q, D) asked one at a time, all with the same exclusions; `cpu`: of the calling thread alone."""
    seconds, cpu_seconds = [], []
    for query in queries[:, None]:
        start, cpu_start = time.perf_counter(), time.thread_time()
        index.search(query, k, exclude)
        cpu_seconds.append(time.thread_time() - cpu_start)
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    cpu = float(np.median(cpu_seconds)) * 1000
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3), "cpu_p50_ms": round(cpu, 3)}


def measure(count: int, queries: int) -> list[dict[str, Any]]:
    """One entry for each k, over `count` vectors."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((CENTRES, DIMENSION), np.float32)
    rows, vectors = np.arange(count), mixture(centres, count, rng)
    tuning, held_out = mixture(centres, 500, rng), mixture(centres, queries, rng)

    exact = ExactIndex.build(rows, vectors)
    start = time.perf_counter()
    built = FaissIndex.build(rows, vectors, SEED, flat_below=0)
    build_s = time.perf_counter() - start
    start = time.perf_counter()
    tuned = built.tune(tuning, KS, RECALL, exact)
    tune_s = time.perf_counter() - start
    note(f"{count} vectors: built in {build_s:.1f} s, tuned in {tune_s:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(Path(folder, "index"))
        start = time.perf_counter()
        index = FaissIndex.load(Path(folder, "index"))
        load_ms = 1000 * (time.perf_counter() - start)
        index.search(held_out, KS[-1])  # brings the mapped pages in
        entries = []
        for entry in index.tuning:
            truth, found = exact.search(held_out, entry.k).rows, index.search(held_out, entry.k).rows
            pairs = zip(truth, found, strict=True)
            recalls = [len(np.intersect1d(a, b)) / entry.k for a, b in pairs]
            entries.append(
                {
                    "vectors": count,
                    "k": entry.k,
                    "lists": round(4 * count**0.5),
                    "nprobe": entry.nprobe,
                    "recall": round(float(np.mean(recalls)), 4),
                    "recall_worst_query": round(min(recalls), 4),
                    "faiss": latencies_ms(index, held_out, entry.k),
                    "exact": latencies_ms(exact, held_out, entry.k),
                    "build_s": round(build_s, 1),
                    "tune_s": round(tune_s, 1),
                    "load_ms": round(load_ms, 1),
                }
            )
    return entries


def measure_filters(count: int, queries: int) -> list[dict[str, Any]]:
    """One entry for each kind of filter and each share, over `count` vectors, at the largest k."""
    rng, k = np.random.default_rng(SEED), KS[-1]
    centres = rng.standard_normal((CENTRES, DIMENSION), np.float32)
    centre_of = rng.integers(CENTRES, size=count)
    rows, vectors = np.arange(count), mixture(centres, count, rng, centre_of)
    tuning, held_out = mixture(centres, 500, rng), mixture(centres, queries, rng)
    exact = ExactIndex.build(rows, vectors)
    start = time.perf_counter()
    index = FaissIndex.build(rows, vectors, SEED, flat_below=0).tune(tuning, KS, RECALL, exact)
    note(f"{count} vectors: built and tuned in {time.perf_counter() - start:.1f} s")
    entries = []
    for kind in ("chance", "attribute"):
        for share in SHARES:
            out = np.flatnonzero(rng.random(count) < share if kind == "chance" else centre_of < share * CENTRES)
            exclude, view = Exclusions.of([out]), index.without(out)
            exact_view = exact.without(out)
            truth = exact_view.search(held_out, k).rows
            entry = {"vectors": count, "k": k, "filter": kind, "share": share}
            for name, found in (
                ("exclude", [index.search(query, k, exclude).rows[0] for query in held_out[:, None]]),
                ("without", view.search(held_out, k).rows),
            ):
                there = [a[a >= 0] for a in truth]
                recalls = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(there, found, strict=True)]
                entry[f"recall_{name}"] = round(float(np.mean(recalls)), 4)
                entry[f"recall_{name}_worst_query"] = round(min(recalls), 4)
            entry["exclude"] = latencies_ms(index, held_out, k, exclude)
            entry["without"] = latencies_ms(view, held_out, k)
            entry["exact_without"] = latencies_ms(exact_view, held_out, k)
            note(json.dumps(entry))
            entries.append(entry)
    return entries


def main() -> None:
    arguments = arguments_of(__doc__, "small sizes").parse_args()
    sizes, queries = ((5_000,), 20) if arguments.smoke else ((100_000, 1_000_000), 200)
    finish(
        arguments,
        "index",
        dimension=DIMENSION,
        centres=CENTRES,
        target_recall=RECALL,
        queries=queries,
        seed=SEED,
        results=[entry for size in sizes for entry in measure(size, queries)],
        filtered=measure_filters(sizes[0] * 2, queries),
    )


if __name__ == "__main__":
    main()
