from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.samples.columns_file import map_columns, write_columns, write_table
from twotower.schema.errors import DataError

SCHEMA = pa.schema([("row", pa.int32()), ("pair", pa.list_(pa.float32(), 2)), ("bag", pa.large_list(pa.int32()))])


def batch(rows: list[int], bags: list[list[int]]) -> pa.RecordBatch:
    pairs = pa.array([[row, row / 2] for row in rows], pa.list_(pa.float32(), 2))
    return pa.record_batch({"row": pa.array(rows), "pair": pairs, "bag": pa.array(bags, pa.list_(pa.int32()))})


def test_batches_become_one_batch_with_lists_that_go_on_across_them(tmp_path: Path) -> None:
    one, two = batch([1, 2], [[7], []]), batch([9, 3, 4], [[0], [8, 9], [5]]).slice(1)
    assert write_columns(tmp_path / "x.arrow", SCHEMA, [one, two]) == 4
    found = map_columns(tmp_path / "x.arrow")
    assert found.schema == SCHEMA
    assert found.to_pydict() == {
        "row": [1, 2, 3, 4],
        "pair": [[1, 0.5], [2, 1], [3, 1.5], [4, 2]],
        "bag": [[7], [], [8, 9], [5]],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["x.arrow"]


def test_no_rows_are_a_file_too(tmp_path: Path) -> None:
    assert write_columns(tmp_path / "x.arrow", SCHEMA, []) == 0
    assert map_columns(tmp_path / "x.arrow").num_rows == 0
    write_table(tmp_path / "y.arrow", SCHEMA.empty_table())
    assert map_columns(tmp_path / "y.arrow").schema == SCHEMA


def test_a_null_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    rows = pa.record_batch({"row": pa.array([1, None], pa.int32())})
    with pytest.raises(DataError, match=r"x\.arrow: column row holds 1 nulls"):
        write_columns(tmp_path / "x.arrow", pa.schema([("row", pa.int32())]), [rows])
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_many_chunks_is_written_as_one_batch(tmp_path: Path) -> None:
    table = pa.table({"x": pa.chunked_array([[1, 2], [3]])})
    write_table(tmp_path / "x.arrow", table)
    column = map_columns(tmp_path / "x.arrow").column("x").to_numpy(zero_copy_only=True)
    assert column.tolist() == [1, 2, 3]
    assert not column.flags.owndata
    assert isinstance(column, np.ndarray)


def test_a_file_of_several_batches_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.chunked_array([[1, 2], [3]])})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="has 2 record batches, where one is expected"):
        map_columns(tmp_path / "x.arrow")
