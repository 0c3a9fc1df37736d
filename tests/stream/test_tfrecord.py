from pathlib import Path

import pytest

from twotower.schema.errors import DataError
from twotower.stream.example import encode_rows
from twotower.stream.rows import Row, Types
from twotower.stream.tfrecord import frame, read_records, split_records, write_records


def test_records_come_back(tmp_path: Path) -> None:
    contents = [b"", b"a", b"x" * 100_000, bytes(range(256))]
    write_records(tmp_path / "file", contents)
    records = read_records(tmp_path / "file")
    assert [records.content(number) for number in range(len(records))] == contents


def test_a_file_of_nothing_has_no_records(tmp_path: Path) -> None:
    write_records(tmp_path / "file", [])
    assert len(read_records(tmp_path / "file")) == 0


def test_a_flip_of_any_byte_is_seen(many_rows: list[Row], types: Types) -> None:
    data = bytearray(b"".join(frame(content) for content in encode_rows([many_rows[:12]], types)))
    split_records(bytes(data), "shard")
    for place in range(len(data)):
        for bit in (0x01, 0x80):
            data[place] ^= bit
            with pytest.raises(DataError, match=r"shard.*(damaged|was cut)"):
                split_records(bytes(data), "shard")
            data[place] ^= bit


def test_a_file_that_was_cut_within_a_record_is_refused(many_rows: list[Row], types: Types) -> None:
    frames = [frame(content) for content in encode_rows([many_rows[:3]], types)]
    data = b"".join(frames)
    whole = {0, len(frames[0]), len(frames[0]) + len(frames[1]), len(data)}
    for size in range(len(data) + 1):
        if size in whole:
            split_records(data[:size], "shard")
        else:
            with pytest.raises(DataError, match="was cut"):
                split_records(data[:size], "shard")


def test_a_length_beyond_the_file_is_refused_without_room_for_it() -> None:
    data = bytearray(frame(b"abc"))
    with pytest.raises(DataError, match="the length of record 0, at byte 0, is damaged"):
        split_records(bytes([0xFF] * 8 + list(data[8:])), "shard")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        read_records(tmp_path / "gone")
