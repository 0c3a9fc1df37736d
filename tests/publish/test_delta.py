import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.publish.delta import (
    Delta,
    Reports,
    Rows,
    chain_folder,
    delta_folder,
    folded_seqs,
    last_seq,
    prune,
    read_delta,
    read_folded,
    read_next,
    write_delta,
    write_folded,
)
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
    assert (last_seq(tmp_path, "v"), read.digest) == (1, digest)
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


def write_chain(deltas: Path, count: int) -> list[str]:
    """The digest of the base and of each delta of a chain."""
    digests = ["base"]
    for seq in range(1, count + 1):
        digests.append(write_delta(deltas, replace(DELTA, seq=seq), digests[-1]))
    return digests


def fold_at(deltas: Path, seq: int, digests: list[str]) -> None:
    report = {"folded": {"gated": [], "recall": {}}}
    write_folded(deltas, replace(DELTA, seq=seq, report=report, digest=digests[seq]), "base")


def path_of(deltas: Path, digests: list[str], seq: int = 0) -> list[int]:
    """The deltas that who reads on behind one of them meets."""
    found, follows = [], digests[seq]
    while (delta := read_next(deltas, "v", "base", seq, follows)) is not None:
        found.append(seq := delta.seq)
        follows = delta.digest
        assert follows == digests[seq]
    return found


def test_a_folded_delta_comes_back_and_says_what_the_next_one_follows(tmp_path: Path) -> None:
    digests = write_chain(tmp_path, 3)
    fold_at(tmp_path, 2, digests)
    read = read_folded(tmp_path, "v", "base")
    assert read is not None
    assert (read.seq, read.folded, read.digest) == (2, True, digests[2])
    assert read.new_ids["user_id"].to_pydict() == {"id": ["a", "b"], "row": [5, 1]}
    assert read_delta(tmp_path, "v", 3, read.digest).folded is False
    assert read_folded(tmp_path, "v", "another") is None


def test_a_chain_is_read_from_its_latest_folded_delta_and_otherwise_one_by_one(tmp_path: Path) -> None:
    assert path_of(tmp_path, ["base"]) == []
    digests = write_chain(tmp_path, 9)
    assert path_of(tmp_path, digests) == list(range(1, 10))
    fold_at(tmp_path, 3, digests)
    fold_at(tmp_path, 6, digests)
    assert path_of(tmp_path, digests) == [6, 7, 8, 9]
    assert path_of(tmp_path, digests, 2) == [3, 4, 5, 6, 7, 8, 9]  # a server that runs already
    assert last_seq(tmp_path, "v") == 9


def test_what_folded_deltas_stand_for_is_removed_but_for_the_way_between_the_last_two(tmp_path: Path) -> None:
    digests = write_chain(tmp_path, 10)
    prune(tmp_path, "v")
    fold_at(tmp_path, 3, digests)
    prune(tmp_path, "v")
    assert path_of(tmp_path, digests, 1) == list(range(2, 11))
    fold_at(tmp_path, 6, digests)
    fold_at(tmp_path, 9, digests)
    (chain_folder(tmp_path, "v") / ".tmp-00000002").mkdir()  # of one that was killed while it removed
    prune(tmp_path, "v")
    assert folded_seqs(tmp_path, "v") == [6, 9]
    assert sorted(path.name for path in chain_folder(tmp_path, "v").iterdir()) == [
        *(f"{seq:08d}" for seq in (7, 8, 9, 10)),
        "folded",
    ]
    assert path_of(tmp_path, digests, 1) == [9, 10]
    assert path_of(tmp_path, digests, 6) == [7, 8, 9, 10]
    delta_folder(tmp_path, "v", 10).rename(tmp_path / "elsewhere")
    assert last_seq(tmp_path, "v") == 9


def test_one_that_is_removed_while_it_is_read_is_got_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = write_chain(tmp_path, 6)
    fold_at(tmp_path, 3, digests)
    fold_at(tmp_path, 6, digests)
    module = sys.modules[read_delta.__module__]
    real = module.check_listing

    def removed_first(folder: Path, listing: dict[str, Any]) -> list[str]:
        prune(tmp_path, "v")
        return real(folder, listing)

    monkeypatch.setattr(module, "check_listing", removed_first)
    assert path_of(tmp_path, digests, 1) == [6]


def test_reports_taken_together_are_those_of_a_folded_delta(tmp_path: Path) -> None:
    each = [
        {"recall": {"7": [1, 2]}, "positives": 2},
        {"refused": ["too long"], "recall": {}},
        {"recall": {"7": [1, 3], "8": [0, 4]}, "positives": 7},
    ]
    one, other = Reports(), Reports()
    for seq, report in enumerate(each, 1):
        one.note(replace(DELTA, seq=seq, report=report))
    assert (list(one.gated), one.recall) == ([(2, ["too long"])], {7: (2, 5), 8: (0, 4)})
    assert one.latest == each[-1]
    write_folded(tmp_path, replace(DELTA, seq=3, report=one.folded(), digest="x"), "base")
    other.note(replace(DELTA, seq=1, report=each[0]))
    other.note(read_folded(tmp_path, "v", "base"))
    assert (other.gated, other.recall, other.latest) == (one.gated, one.recall, one.latest)
    many = Reports()
    for hour in range(60):
        many.note(replace(DELTA, report={"recall": {str(hour): [1, 1]}}))
    assert sorted(many.recall) == list(range(12, 60))
