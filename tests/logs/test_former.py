"""Logs of format 1: segments of records, each a u32 length, a u32 CRC-32C over these four bytes and the payload."""

import json
import shutil
import struct
from contextlib import closing
from pathlib import Path

import google_crc32c
import pytest

from twotower.logs import Event, LocalEventLog
from twotower.logs.events import ERASED
from twotower.logs.payload import erased_payload, mark_of, payload_of
from twotower.schema.errors import ConfigError, DataError

NOW_MS = 1_700_000_000_000


def event(event_id: str, text: str = "") -> Event:
    return Event(event_id, "click", 1, NOW_MS, body={"text": text})


def record(payload: bytes) -> bytes:
    length = struct.pack("<I", len(payload))
    return length + struct.pack("<I", google_crc32c.value(length + payload)) + payload


def former_log(folder: Path, segments: list[list[bytes]]) -> list[int]:
    """A log of one partition; the offset of each event and of the end."""
    partition = folder / "partition-0000"
    partition.mkdir(parents=True)
    offsets = [0]
    for payloads in segments:
        records = [record(payload) for payload in payloads]
        (partition / f"{offsets[-1]:020d}.log").write_bytes(b"".join(records))
        (partition / f"{offsets[-1]:020d}.ids").write_bytes(b"ids")
        for one in records:
            offsets.append(offsets[-1] + len(one))
    (folder / "log.json").write_text(json.dumps({"format": 1, "partitions": 1}))
    return offsets


def payloads(names: str) -> list[bytes]:
    return [payload_of(event(name, name * 20), NOW_MS) for name in names]


def open_one(folder: Path) -> LocalEventLog:
    return LocalEventLog.open(folder, partitions=1)


def test_every_offset_that_a_consumer_keeps_leads_to_the_same_next_event(tmp_path: Path) -> None:
    offsets = former_log(tmp_path, [payloads("abc"), payloads("de")])
    with closing(open_one(tmp_path)) as log:
        for number, name in enumerate("abcde"):
            found = log.read(0, offsets[number], 1)[0]
            assert found.event == event(name, name * 20)
            assert found.next_offset == offsets[number + 1]
        assert log.read(0, offsets[-1], 1) == []
        assert log.ends() == [offsets[-1]]
        assert [ack.duplicate for ack in log.append([event("a"), event("f")])] == [True, False]
        assert log.read(0, offsets[-1], 1)[0].event == event("f")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.sqlite", "writer.lock"]


def test_erased_events_and_half_a_record_at_the_end_are_as_they_were(tmp_path: Path) -> None:
    kept, gone = payloads("ab")
    former_log(tmp_path, [[kept, erased_payload(gone).ljust(len(gone), b"\0")]])
    [segment] = (tmp_path / "partition-0000").glob("*.log")
    segment.write_bytes(segment.read_bytes() + record(gone)[:-1])
    with closing(open_one(tmp_path)) as log:
        a, b = log.read(0, 0, 10)
        assert (a.event, b.event.type) == (event("a", "a" * 20), ERASED)
        assert mark_of(b.event) == mark_of(event("b"))
        assert log.append([event("b")])[0].duplicate


def test_a_damaged_segment_is_named_and_the_former_log_stays(tmp_path: Path) -> None:
    former_log(tmp_path, [payloads("ab"), payloads("c")])
    first = min((tmp_path / "partition-0000").glob("*.log"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"{first.name} is damaged at byte"):
        open_one(tmp_path)
    first.write_bytes(whole)
    with closing(open_one(tmp_path)) as log:
        assert [one.event.event_id for one in log.read(0, 0, 10)] == ["a", "b", "c"]


def test_a_conversion_that_was_killed_while_it_removed_the_former_log_is_completed(tmp_path: Path) -> None:
    former_log(tmp_path, [payloads("ab")])
    shutil.copytree(tmp_path, tmp_path / "copy")
    open_one(tmp_path).close()
    shutil.move(tmp_path / "copy" / "log.json", tmp_path / "log.json")
    shutil.move(tmp_path / "copy" / "partition-0000", tmp_path / "partition-0000")
    with closing(open_one(tmp_path)) as log:
        assert [one.event.event_id for one in log.read(0, 0, 10)] == ["a", "b"]
    assert not (tmp_path / "partition-0000").exists()
    assert not (tmp_path / "log.json").exists()


def test_a_reader_says_who_converts_and_another_number_of_partitions_is_refused(tmp_path: Path) -> None:
    former_log(tmp_path, [payloads("a")])
    with pytest.raises(DataError, match="is of format 1: start the server once"):
        LocalEventLog.reader(tmp_path)
    with pytest.raises(ConfigError, match="has 1 partitions, 4 are asked for"):
        LocalEventLog.open(tmp_path, partitions=4)


def test_a_lost_description_is_not_guessed(tmp_path: Path) -> None:
    former_log(tmp_path, [payloads("a")])
    (tmp_path / "log.json").unlink()
    with pytest.raises(DataError, match=r"has partitions but no log\.json"):
        open_one(tmp_path)
