"""Shards on disk: positives apart, and those of earlier formats."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from twotower.schema.files import read_json, sha256, write_json
from twotower.stream.clock import Clock
from twotower.stream.example import encode_rows
from twotower.stream.joiner import JoinCounts, Replay
from twotower.stream.rows import Row, Types
from twotower.stream.shards import JoinState, Manifest, merge, read_manifest, read_positives, read_rows, write_shard
from twotower.stream.tfrecord import write_records


def draft(begin: int, first_row: int) -> Manifest:
    return Manifest(
        partition=0, begin=begin, end=begin + 10, first_row=first_row, hour=1, watermark_ms=None, counts=JoinCounts(),
        state=JoinState(Replay(0, Clock())),
    )  # fmt: skip


def write_old(folder: Path, rows: list[Row], types: Types, manifest: Manifest) -> Manifest:
    """A shard as releases wrote it that had all rows in one file."""
    whole = write_shard(folder, [rows], types, manifest)
    own = folder / "partition-0000"
    for path in own.glob(f"{whole.name}.*.tfrecord"):
        path.unlink()
    path = own / f"{whole.name}.tfrecord"
    write_records(path, encode_rows([rows], types))
    content = read_json(path.with_suffix(".json"))
    del content["files"]
    write_json(
        path.with_suffix(".json"), {**content, "format": 2, "bytes": path.stat().st_size, "sha256": sha256(path)}
    )
    return read_manifest(path.with_suffix(".json"))


def test_positives_are_read_without_the_other_rows(many_rows: list[Row], types: Types, tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [many_rows[:30], many_rows[30:]], types, draft(0, 100))
    rows = read_rows(tmp_path, 0)
    clicked = rows.filter(pc.equal(rows["outcome"], "clicked"))
    (tmp_path / "partition-0000" / f"{shard.name}.others.tfrecord").unlink()
    found = read_positives(tmp_path, 0, 0, 10**6)
    assert (found.rows, found.problems) == (90, [])
    [table] = found.tables
    assert table.drop_columns(["row"]) == clicked
    assert table["row"].to_pylist() == list(range(100, 190, 3))
    part = read_positives(tmp_path, 0, 104, 111)
    assert (part.rows, part.tables[0]["row"].to_pylist()) == (7, [106, 109])


def test_rows_come_back_in_the_order_in_which_they_left(many_rows: list[Row], types: Types, tmp_path: Path) -> None:
    write_shard(tmp_path, [many_rows], types, draft(0, 0))
    rows = read_rows(tmp_path, 0)
    assert rows["item_id"].to_pylist() == [row.item_id for row in many_rows]
    for first in range(0, 90, 7):
        assert read_rows(tmp_path, 0, first, 7) == rows.slice(first, 7)


@pytest.mark.parametrize("first", [0, 13])
def test_a_shard_of_an_earlier_format_is_read_as_before(
    many_rows: list[Row], types: Types, tmp_path: Path, first: int
) -> None:
    write_old(tmp_path / "old", many_rows, types, draft(0, 0))
    write_shard(tmp_path / "new", [many_rows], types, draft(0, 0))
    assert read_rows(tmp_path / "old", 0, first) == read_rows(tmp_path / "new", 0, first)
    old, new = (read_positives(tmp_path / name, 0, first, 80) for name in ("old", "new"))
    assert (old.rows, old.problems) == (new.rows, new.problems) == (80 - first, [])
    assert pa.concat_tables(old.tables) == pa.concat_tables(new.tables)


def test_shards_of_an_earlier_format_are_merged_into_one(many_rows: list[Row], types: Types, tmp_path: Path) -> None:
    small = [
        write_old(tmp_path, many_rows[:45], types, draft(0, 0)),
        write_old(tmp_path, many_rows[45:], types, draft(10, 45)),
    ]
    rows = read_rows(tmp_path, 0)
    merged = merge(tmp_path, small)
    assert (merged.rows, merged.end_row, list(merged.files)) == (90, 90, ["all"])
    assert read_rows(tmp_path, 0) == rows
    assert [path.name for path in sorted((tmp_path / "partition-0000").glob("*.tfrecord"))] == [
        f"{merged.name}.tfrecord"
    ]
