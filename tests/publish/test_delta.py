from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.publish.delta import Delta, Rows, delta_digest, delta_folder, last_seq, read_delta, write_delta
from twotower.schema.errors import VersionError

DELTA = Delta(
    "v",
    1,
    1_700_000_000_000,
    {"user_id": Rows(np.array([2, 5]), np.eye(2, 3, dtype=np.float32))},
    {
        "user_id": pa.table({"id": ["a", "b"], "row": pa.array([5, 1], pa.int32())}),
        "item_id": pa.table({"id": [7], "row": pa.array([9], pa.int32())}),
    },
    pa.array([7, 3]),
    np.ones((2, 4), np.float32),
    {"shards": {"0": 12}},
    {"positives": 4},
    {"user_id.accumulator": np.ones(2, np.float32)},
    {"pending": [["c", 1]]},
)


def test_a_delta_comes_back_as_it_was_written(tmp_path: Path) -> None:
    digest = write_delta(tmp_path, DELTA, "base")
    read = read_delta(tmp_path, "v", 1, "base")
    assert (last_seq(tmp_path, "v"), delta_digest(tmp_path, "v", 1)) == (1, digest)
    assert read.tables["user_id"].rows.tolist() == [2, 5]
    np.testing.assert_array_equal(read.tables["user_id"].values, DELTA.tables["user_id"].values)
    assert read.new_ids["user_id"].to_pydict() == {"id": ["a", "b"], "row": [5, 1]}
    assert read.new_ids["item_id"].to_pydict() == {"id": [7], "row": [9]}
    assert read.item_ids.to_pylist() == [7, 3]
    np.testing.assert_array_equal(read.item_vectors, DELTA.item_vectors)
    assert (read.offsets, read.report, read.state) == (DELTA.offsets, DELTA.report, DELTA.state)
    assert read.optimizer["user_id.accumulator"].tolist() == [1, 1]


def test_the_same_delta_has_the_same_bytes(tmp_path: Path) -> None:
    write_delta(tmp_path / "one", DELTA, "base")
    write_delta(tmp_path / "two", DELTA, "base")
    one, two = (delta_folder(tmp_path / name, "v", 1) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


def test_an_empty_delta_is_one(tmp_path: Path) -> None:
    nothing = replace(DELTA, tables={}, new_ids={}, item_ids=pa.array([], pa.int64()), optimizer={})
    write_delta(tmp_path, replace(nothing, item_vectors=np.zeros((0, 4), np.float32)), "base")
    read = read_delta(tmp_path, "v", 1, "base")
    assert (read.tables, read.new_ids, len(read.item_ids)) == ({}, {}, 0)


def test_a_delta_of_another_base_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path, DELTA, "base")
    with pytest.raises(VersionError, match="learned on another base"):
        read_delta(tmp_path, "v", 1, "other")
    delta_folder(tmp_path, "v", 1).rename(tmp_path / "v" / "00000002")
    with pytest.raises(VersionError, match="delta 1 of version v"):
        read_delta(tmp_path, "v", 2, "base")


def test_a_delta_is_never_replaced(tmp_path: Path) -> None:
    write_delta(tmp_path, DELTA, "base")
    with pytest.raises(VersionError, match="never replaced"):
        write_delta(tmp_path, DELTA, "base")


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "tables.safetensors", "new_ids.arrow", "items.arrow", "optimizer.safetensors", "state.json"],
)
def test_a_flipped_bit_of_any_file_is_noticed(tmp_path: Path, name: str) -> None:
    write_delta(tmp_path, DELTA, "base")
    path = delta_folder(tmp_path, "v", 1) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(VersionError):
        read_delta(tmp_path, "v", 1, "base")
