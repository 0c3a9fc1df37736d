"""Builds the index that the configuration names, and loads whatever was saved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from twotower.index.checks import INDEX_JSON
from twotower.index.database import DatabaseIndex, VectorDatabase
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.options import IndexOptions
from twotower.index.overlaid import BASE, NEWER, OverlaidIndex
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
    """The configured index of vectors (N, D) under rows (N,), tuned on queries (Q, D) where it is approximate.

    It is tuned to reach `options.recall` for each of `ks`, the numbers of neighbours that will be requested. An index
    in a vector database needs the name of its `collection`.

    Raises:
        ConfigError: no k where it matters; a client that is not installed.
        DataError: rows, vectors or queries that cannot be indexed.
        UnavailableError: the database does not answer, or refuses.
    """
    if options.url is not None:
        if collection is None:
            raise ConfigError(f'index.kind = "{options.kind}" is of published versions: use "faiss" or "exact" here')
        loaded = DatabaseIndex.build(options.kind, options.url, collection, connect, rows, vectors)
        return loaded.tune(queries, ks, options.recall)
    exact = ExactIndex.build(rows, vectors)
    if options.kind == "exact":
        return exact
    return FaissIndex.build(rows, vectors, seed).tune(queries, ks, options.recall, exact)


def load_index(folder: Path) -> VectorIndex:
    """The index saved in a folder, of any kind, mapped into memory.

    Raises:
        ConfigError: a kind that this release does not have.
        DataError: files are missing or damaged.
    """
    description = read_json(folder / INDEX_JSON)
    kind = description.get("kind") if isinstance(description, dict) else None
    match kind:
        case "exact":
            return ExactIndex.load(folder)
        case "faiss":
            return FaissIndex.load(folder)
        case "overlaid":
            newer = ExactIndex.load(folder / NEWER)
            return OverlaidIndex(load_index(folder / BASE).without(newer.rows), newer)
        case "milvus" | "pgvector":
            return DatabaseIndex.load(folder, kind, connect)
    raise ConfigError(f"there is no index of kind {kind!r}: exact, faiss, milvus or pgvector")


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
