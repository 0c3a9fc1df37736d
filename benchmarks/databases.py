"""Item vectors in FAISS, Milvus, PostgreSQL and by exact search, beside each other in one run.

    python benchmarks/databases.py [--sizes 10000 100000 1000000] [--out benchmarks/results/databases.json] [--smoke]

Vectors are a mixture of 200 gaussians brought to unit length (as in `index.py`). Each engine builds its index, tunes it
for every k and answers the same queries, one at a time and in turn, with nothing hidden and with a share of the items
hidden by chance or by an attribute that goes with the vectors (the gaussian). Then four threads ask at once. Both
servers run on this machine and share its cores with the client. Progress goes to stderr, one JSON line to stdout.
"""

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common import arguments_of, finish, note
from index import CENTRES, DIMENSION, RECALL, SEED, mixture
from twotower.cli.databases import database
from twotower.index.build import build_index, connect
from twotower.index.exact import ExactIndex
from twotower.index.options import IndexOptions
from twotower.index.protocol import VectorIndex

KS = (50, 500, 2000)
FILTERS = (("none", 0.0), ("chance", 0.5), ("attribute", 0.5), ("chance", 0.99), ("attribute", 0.99))
THREADS = 4
THREADS_S = 3.0


def hidden_by(kind: str, share: float, centre_of: Any, rng: np.random.Generator) -> Any:
    """Rows that a filter hides."""
    chance = rng.random(len(centre_of)) < share
    return np.flatnonzero(chance if kind == "chance" else centre_of < share * CENTRES)


def memory_mb(folder: Path) -> float:
    """Memory of the servers whose command line names a folder, and of their children; shared pages count once."""
    total = 0
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                total += sum(part.memory_full_info().pss for part in (process, *process.children(recursive=True)))
        except psutil.Error:
            continue
    return round(total / 2**20)


def compared(indexes: dict[str, VectorIndex], queries: Any, k: int, truth: Any) -> Iterator[dict[str, Any]]:
    """Recall and latency of each index; the engines answer each query in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in indexes}
    hits: dict[str, list[float]] = {name: [] for name in indexes}
    for place, query in enumerate(queries[:, None]):
        best = truth[place][truth[place] >= 0]
        for name, index in indexes.items():
            start = time.perf_counter()
            found = index.search(query, k).rows[0]
            seconds[name].append(time.perf_counter() - start)
            hits[name].append(len(np.intersect1d(best, found)) / len(best))
    for name, index in indexes.items():
        p50, p99 = np.quantile(seconds[name], [0.5, 0.99]) * 1000
        yield {
            "engine": name,
            "k": k,
            "recall": round(float(np.mean(hits[name])), 4),
            "p50_ms": round(float(p50), 2),
            "p99_ms": round(float(p99), 2),
            "queries_a_s": round(queries_a_s(index, queries, k)),
        }


def queries_a_s(index: VectorIndex, queries: Any, k: int) -> float:
    """Of some threads that ask at once."""
    until = time.perf_counter() + THREADS_S

    def ask(first: int) -> int:
        asked = 0
        while time.perf_counter() < until:
            place = (first + asked) % len(queries)
            index.search(queries[place : place + 1], k)
            asked += 1
        return asked

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(ask, range(THREADS))) / THREADS_S


def measure(count: int, asked: int, urls: dict[str, str], folder: Path) -> dict[str, Any]:
    """All engines over `count` vectors."""
    rng = np.random.default_rng(SEED)
    centres = rng.standard_normal((CENTRES, DIMENSION), np.float32)
    centre_of = rng.integers(CENTRES, size=count)
    rows, vectors = np.arange(count), mixture(centres, count, rng, centre_of)
    tuning, queries = mixture(centres, 500, rng), mixture(centres, asked, rng)
    indexes: dict[str, VectorIndex] = {}
    built: dict[str, Any] = {}
    for kind in ("exact", "faiss", *urls):
        options = IndexOptions(kind, RECALL, urls.get(kind))  # type: ignore[arg-type]
        start = time.perf_counter()
        indexes[kind] = build_index(
            options, rows, vectors, tuning, ks=KS, seed=SEED, collection=f"twotower_benchmark_{count}"
        )
        tuned = {entry.k: entry.nprobe for entry in getattr(indexes[kind], "tuning", ())}
        built[kind] = {"build_and_tune_s": round(time.perf_counter() - start, 1), "nprobe": tuned}
        if kind in urls:
            built[kind]["server_mb"] = memory_mb(folder / kind)
        note(count, kind, built[kind])
    exact = ExactIndex.build(rows, vectors)
    results = []
    for kind, share in FILTERS:
        out = hidden_by(kind, share, centre_of, rng)
        views = {name: index.without(out) for name, index in indexes.items()}
        for k in KS:
            truth = exact.without(out).search(queries, k).rows
            for entry in compared(views, queries, k, truth):
                results.append({"filter": kind, "hidden": share, **entry})
                note(count, results[-1])
    for kind, url in urls.items():
        connect(kind, url).drop(f"twotower_benchmark_{count}")
    return {"vectors": count, "built": built, "results": results}


def main() -> None:
    parser = arguments_of(__doc__, "small sizes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    sizes, asked = ([3000], 10) if arguments.smoke else (arguments.sizes, 100)
    with tempfile.TemporaryDirectory() as named, ExitStack() as running:
        folder = Path(named)
        urls = {kind: running.enter_context(database(kind, folder / kind)) for kind in ("pgvector", "milvus")}
        results = [measure(size, asked, urls, folder) for size in sizes]
    finish(arguments, "databases", dimension=DIMENSION, target_recall=RECALL, queries=asked, seed=SEED, sizes=results)


if __name__ == "__main__":
    main()
