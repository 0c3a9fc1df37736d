"""Builds the index that the configuration names, and loads whatever was saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from twotower.index.checks import INDEX_JSON
from twotower.index.database import Collection, DatabaseIndex, VectorDatabase
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.options import ADDRESSES, IndexOptions
from twotower.index.overlaid import BASE, OverlaidIndex
from twotower.index.protocol import VectorIndex
from twotower.schema.errors import ConfigError
from twotower.schema.files import read_json


def build_index(
    options: IndexOptions,
    rows: NDArray[np.int64],
    vectors: NDArray[np.float32],
    queries: NDArray[np.float32],
    *,
    ks: Sequence[int],
    seed: int,
    collection: str | None = None,
) -> VectorIndex:
    """The configured index, tuned on sample queries where it is approximate.

    Args:
        options: which kind, and the recall that it must reach.
        rows: (N,) int64, each once.
        vectors: (N, D) float32.
        queries: (Q, D) float32 of held-out users.
        ks: numbers of neighbours that will be requested.
        seed: of k-means.
        collection: name in the vector database; an embedded index has none.

    Raises:
        ConfigError: no k where it matters; a client that is not installed.
        DataError: rows, vectors or queries that cannot be indexed.
        UnavailableError: the database does not answer, or refuses.
    """
    if options.url is not None:
        if collection is None:
            raise ConfigError(f'index.kind = "{options.kind}" is of published versions: use "faiss" or "exact" here')
        at = Collection(options.kind, options.url, collection)
        return DatabaseIndex.build(at, connect, rows, vectors).tune(queries, ks, options.recall)
    exact = ExactIndex.build(rows, vectors)
    if options.kind == "exact":
        return exact
    return FaissIndex.build(rows, vectors, seed).tune(queries, ks, options.recall, exact)


def load_index(folder: Path) -> VectorIndex:
    """The index saved in a folder, of whatever kind, mapped into memory.

    Raises:
        ConfigError: a kind that this release does not have.
        DataError: files are missing or damaged.
    """
    description = read_json(folder / INDEX_JSON)
    kind = description.get("kind") if isinstance(description, dict) else None
    if kind == "overlaid":
        return OverlaidIndex.load(folder, load_index(folder / BASE))
    if kind in ADDRESSES:
        return DatabaseIndex.load(folder, kind, connect)
    if kind not in ("exact", "faiss"):
        raise ConfigError(f"there is no index of kind {kind!r}: exact, faiss, {', '.join(ADDRESSES)}")
    return ExactIndex.load(folder) if kind == "exact" else FaissIndex.load(folder)


def connect(kind: str, url: str) -> VectorDatabase:
    """The vector database of a kind at an address; a process has one connection to each.

    Raises:
        ConfigError: its client is not installed.
    """
    try:
        if kind == "milvus":
            from twotower.index.milvus import connect as connect_milvus

            return connect_milvus(url)
        from twotower.index.pgvector import connect as connect_pgvector

        return connect_pgvector(url)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'index.kind = "{kind}" needs a client that is not installed ({error}): pip install "twotower[{kind}]"'
        ) from None
