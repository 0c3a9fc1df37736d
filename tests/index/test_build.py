import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.index import faiss_index
from twotower.index.build import build_index, load_index
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.options import IndexOptions
from twotower.schema.errors import ConfigError, DataError

VECTORS = np.random.default_rng(0).normal(size=(20_000, 4)).astype(np.float32)


@pytest.mark.parametrize(("kind", "expected"), [("exact", ExactIndex), ("faiss", FaissIndex)])
def test_the_kind_named_is_built_and_loaded(kind: Any, expected: type, tmp_path: Path) -> None:
    index = build_index(IndexOptions(kind, 0.9), np.arange(9), VECTORS[:9], VECTORS[:2], ks=[3], seed=0)
    index.save(tmp_path / "index")
    assert type(index) is expected
    assert type(load_index(tmp_path / "index")) is expected


def test_a_large_catalogue_is_tuned() -> None:
    assert len(VECTORS) == faiss_index.FLAT_BELOW
    index = build_index(IndexOptions("faiss", 0.95), np.arange(20_000), VECTORS, VECTORS[:50], ks=[10, 100], seed=0)
    assert isinstance(index, FaissIndex)
    assert [entry.k for entry in index.tuning] == [10, 100]
    assert all(entry.recall >= 0.95 and entry.nprobe < 566 for entry in index.tuning)


def test_kinds_that_this_release_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "kind": "hnsw"}))
    with pytest.raises(ConfigError, match="no index of kind 'hnsw': exact, faiss, milvus or pgvector"):
        load_index(tmp_path)


@pytest.mark.parametrize("kind", ["exact", "faiss"])
def test_a_damaged_description_is_refused(kind: Any, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    build_index(IndexOptions(kind, 0.9), np.arange(9), VECTORS[:9], VECTORS[:2], ks=[3], seed=0).save(folder)
    path = folder / "index.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(DataError, match="is not of format 1"):
        load_index(folder)
    del description["count"]
    path.write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"index\.json has no count"):
        load_index(folder)
    path.write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_index(folder)
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        load_index(folder)
