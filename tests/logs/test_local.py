import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from twotower.logs import Event, EventLogError, LocalEventLog, local
from twotower.schema.errors import ConfigError, DataError

NOW_MS = 1_700_000_000_000
FIRST = "00000000000000000000.log"


def event(event_id: str, user_id: int | str = 1, text: str = "") -> Event:
    return Event(event_id, "click", user_id, NOW_MS, body={"text": text})


def open_one(folder: Path, **options: Any) -> LocalEventLog:
    return LocalEventLog.open(folder, partitions=1, clock_ms=lambda: NOW_MS, **options)


def ids(log: LocalEventLog, offset: int = 0) -> list[str]:
    return [record.event.event_id for record in log.read(0, offset, 1000)]


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "partition-0000").glob("*.log"))


def write(folder: Path, names: list[str], **options: Any) -> list[int]:
    """Append events one by one; their offsets."""
    with closing(open_one(folder, **options)) as log:
        return [log.append([event(name)])[0].offset for name in names]


def three_segments(folder: Path) -> list[Path]:
    """Two sealed segments of two events each, and one event in the last."""
    with closing(open_one(folder, segment_bytes=250)) as log:
        for name in "abcde":
            log.append([event(name)])
    found = segments(folder)
    assert len(found) == 3
    return found


# --- opening


def test_another_number_of_partitions_is_refused(tmp_path: Path) -> None:
    LocalEventLog.open(tmp_path, partitions=2).close()
    with pytest.raises(ConfigError, match="has 2 partitions, 3 are asked for"):
        LocalEventLog.open(tmp_path, partitions=3)
    with pytest.raises(ConfigError, match="partitions=0"):
        LocalEventLog.open(tmp_path / "new", partitions=0)


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    first = open_one(tmp_path)
    with pytest.raises(EventLogError, match="open in another writer"):
        open_one(tmp_path)
    first.append([event("a")])
    first.close()
    with closing(open_one(tmp_path)) as second:
        assert ids(second) == ["a"]


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    (tmp_path / "log.json").write_text('{"format": 2, "partitions": 1}')
    for opening in (open_one, LocalEventLog.reader):
        with pytest.raises(DataError, match="where format 1 is due"):
            opening(tmp_path)


def test_a_lost_description_is_not_guessed(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    (tmp_path / "log.json").unlink()
    with pytest.raises(DataError, match=r"has partitions but no log\.json"):
        LocalEventLog.open(tmp_path, partitions=8)


def test_a_failed_opening_lets_go_of_the_log(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    with pytest.raises(ConfigError):
        LocalEventLog.open(tmp_path, partitions=2)
    open_one(tmp_path).close()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    for leftover in (tmp_path / ".tmp-log.json", tmp_path / "partition-0000" / ".tmp-0.ids"):
        leftover.write_text("half")
    with closing(open_one(tmp_path)) as log:
        assert ids(log) == ["a"]
    assert not list(tmp_path.rglob(".tmp-*"))


# --- a reader in another process


def test_a_reader_needs_a_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        LocalEventLog.reader(tmp_path)


def test_a_reader_does_not_append(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    with closing(LocalEventLog.reader(tmp_path)) as reader, pytest.raises(EventLogError, match="opened to read alone"):
        reader.append([event("a")])


def test_a_reader_follows_a_writer_across_segments(tmp_path: Path) -> None:
    with closing(open_one(tmp_path, segment_bytes=350)) as log, closing(LocalEventLog.reader(tmp_path)) as reader:
        assert reader.ends() == [0]
        offset = 0
        for number in range(50):
            log.append([event(f"e{number}")])
            [record] = reader.read(0, offset, 10)
            assert record.event == event(f"e{number}")
            offset = record.next_offset
            assert reader.ends() == log.ends() == [offset]
            assert reader.read(0, offset, 10) == []
        assert len(segments(tmp_path)) > 10


def test_a_reader_waits_at_half_a_record_and_then_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    [_, second] = write(tmp_path, ["a", "b"])
    whole = (tmp_path / "partition-0000" / FIRST).read_bytes()
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        for length in range(second, len(whole)):
            (tmp_path / "partition-0000" / FIRST).write_bytes(whole[:length])
            assert ids(reader) == ["a"]
            assert reader.ends() == [second]
            assert reader.read(0, second, 10) == []
        (tmp_path / "partition-0000" / FIRST).write_bytes(whole)
        assert ids(reader, second) == ["b"]
        assert reader.ends() == [len(whole)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once, not at each attempt


def test_a_reader_of_a_log_that_is_being_made_sees_nothing(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    (tmp_path / "partition-0000" / FIRST).unlink()
    (tmp_path / "partition-0000").rmdir()
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert reader.read(0, 0, 10) == []
        assert reader.ends() == [0]


def test_another_process_reads_while_the_writer_has_the_log_open(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from twotower.logs import LocalEventLog\n"
        "print([record.event.event_id for record in LocalEventLog.reader(Path(sys.argv[1])).read(0, 0, 10)])"
    )
    with closing(open_one(tmp_path)) as log:
        log.append([event("a"), event("b")])
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "['a', 'b']\n"


def test_what_is_read_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    with closing(open_one(tmp_path, sync="never")) as log, closing(LocalEventLog.reader(tmp_path)) as reader:
        monkeypatch.setattr(os, "fsync", flushes.append)
        log.append([event("a")])
        assert len(flushes) == 0
        assert ids(reader) == ["a"]
        assert len(flushes) == 1
        assert ids(reader) == ["a"]
        assert len(flushes) == 1


# --- torn and damaged segments


def test_a_cut_anywhere_in_the_last_segment_leaves_the_whole_records_before_it(tmp_path: Path) -> None:
    names = ["a", "b", "ü", "d"]
    offsets = write(tmp_path, names)
    segment = tmp_path / "partition-0000" / FIRST
    whole = segment.read_bytes()
    ends = [*offsets[1:], len(whole)]
    for length in range(len(whole) + 1):
        segment.write_bytes(whole[:length])
        kept = sum(end <= length for end in ends)
        with closing(open_one(tmp_path)) as log:
            assert ids(log) == names[:kept]
            assert log.ends() == [ends[kept - 1] if kept else 0]
            assert [ack.duplicate for ack in log.append([event(name) for name in names])] == [
                n < kept for n in range(4)
            ]
            assert ids(log) == names
        assert segment.read_bytes() == whole
        torn = list(segment.parent.glob("*.torn-*"))
        assert [path.read_bytes() for path in torn] == (
            [whole[:length][log_end:]] if (log_end := ([0, *ends])[kept]) < length else []
        )
        for path in torn:
            path.unlink()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_changed_byte_never_gives_a_wrong_record(tmp_path: Path, which: int) -> None:
    names = ["a", "b", "c"]
    offsets = write(tmp_path, names)
    segment = tmp_path / "partition-0000" / FIRST
    whole = segment.read_bytes()
    for at in range(offsets[which], [*offsets[1:], len(whole)][which]):
        for change in (0x01, 0x80, 0xFF):
            segment.write_bytes(whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])
            with closing(LocalEventLog.reader(tmp_path)) as reader:
                assert ids(reader) == names[:which]
        with closing(open_one(tmp_path)) as log:
            assert ids(log) == names[:which]


def test_a_torn_tail_is_moved_aside_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, ["a"])
    segment = tmp_path / "partition-0000" / FIRST
    whole = segment.read_bytes()
    for _ in range(2):
        segment.write_bytes(whole + b"half a record")
        open_one(tmp_path).close()
    assert segment.read_bytes() == whole
    kept = sorted(segment.parent.glob("*.torn-*"))
    assert [path.name for path in kept] == [f"{FIRST}.torn-{len(whole)}", f"{FIRST}.torn-{len(whole)}-2"]
    assert {path.read_bytes() for path in kept} == {b"half a record"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert f"13 bytes after byte {len(whole)}" in caplog.text


def test_zeros_after_a_power_cut_are_no_events(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    with (tmp_path / "partition-0000" / FIRST).open("ab") as file:
        file.write(bytes(10_000))
    assert write(tmp_path, ["b"]) != []
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert ids(reader) == ["a", "b"]


def test_damage_in_a_sealed_segment_is_an_error_at_its_place(tmp_path: Path) -> None:
    first, second, _ = three_segments(tmp_path)
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    for log in (LocalEventLog.reader(tmp_path), open_one(tmp_path)):
        with closing(log):
            [record] = log.read(0, 0, 10)  # what stands before the damage is given
            assert record.event.event_id == "a"
            with pytest.raises(DataError, match=rf"{first.name} is damaged at byte {record.next_offset}"):
                log.read(0, record.next_offset, 10)
            assert ids(log, int(second.stem)) == ["c", "d", "e"]


@pytest.mark.parametrize("length", [0, 20])
def test_a_shortened_sealed_segment_is_an_error(tmp_path: Path, length: int) -> None:
    first, *_ = three_segments(tmp_path)
    os.truncate(first, length)
    with closing(LocalEventLog.reader(tmp_path)) as reader, pytest.raises(DataError, match="damaged at byte 0"):
        reader.read(0, 0, 10)


def test_a_missing_sealed_segment_is_an_error(tmp_path: Path) -> None:
    _, second, third = three_segments(tmp_path)
    second.unlink()
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert ids(reader) == ["a", "b"]
        with pytest.raises(DataError, match=f"read on from offset {int(third.stem)}"):
            reader.read(0, int(second.stem), 10)


def test_damage_in_the_last_segment_is_an_error_in_the_writer_that_wrote_it(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as log:
        [first, second] = log.append([event("a"), event("b")])
        with (tmp_path / "partition-0000" / FIRST).open("r+b") as file:
            file.seek(second.offset + 10)
            file.write(b"?")
        assert [record.offset for record in log.read(0, 0, 10)] == [first.offset]
        with pytest.raises(DataError, match=f"damaged at byte {second.offset}"):
            log.read(0, second.offset, 10)


def test_the_oldest_segments_may_be_removed(tmp_path: Path) -> None:
    first, second, _ = three_segments(tmp_path)
    first.unlink()
    first.with_suffix(".ids").unlink()
    with closing(open_one(tmp_path)) as log:
        assert ids(log) == ["c", "d", "e"]
        assert log.read(0, 0, 1)[0].offset == int(second.stem)
        with pytest.raises(DataError, match="keeps events from offset"):
            log.read(0, 1, 10)


# --- segments and their ids


def test_ids_of_sealed_segments_are_duplicates(tmp_path: Path) -> None:
    three_segments(tmp_path)
    with closing(open_one(tmp_path)) as log:
        offsets = {record.event.event_id: record.offset for record in log.read(0, 0, 10)}
        acks = log.append([event(name) for name in "eadcbx"])
        assert [ack.duplicate for ack in acks] == [True] * 5 + [False]
        assert [ack.offset for ack in acks[:5]] == [offsets[name] for name in "eadcb"]


@pytest.mark.parametrize("content", [None, b"", b"half", bytes(64)])
def test_missing_or_damaged_ids_are_made_again(tmp_path: Path, content: bytes | None) -> None:
    first, *_ = three_segments(tmp_path)
    whole = first.with_suffix(".ids").read_bytes()
    first.with_suffix(".ids").unlink()
    if content is not None:
        first.with_suffix(".ids").write_bytes(content)
    with closing(open_one(tmp_path)) as log:
        assert [ack.duplicate for ack in log.append([event("a"), event("b")])] == [True, True]
    assert first.with_suffix(".ids").read_bytes() == whole


def test_ids_are_not_made_from_a_damaged_segment(tmp_path: Path) -> None:
    first, *_ = three_segments(tmp_path)
    first.with_suffix(".ids").unlink()
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"and so is its \.ids file"):
        open_one(tmp_path)


def test_a_segment_that_was_made_but_not_written_to_is_used(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    [first] = segments(tmp_path)
    first.with_name(f"{first.stat().st_size:020d}.log").touch()
    with closing(LocalEventLog.reader(tmp_path)) as reader, closing(open_one(tmp_path)) as log:
        assert [ack.duplicate for ack in log.append([event("a"), event("b")])] == [True, False]
        assert ids(reader) == ids(log) == ["a", "b"]
    assert len(segments(tmp_path)) == 2


def test_ids_beside_the_last_segment_are_replaced_when_it_is_sealed(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    [first] = segments(tmp_path)
    local.write_ids(first.with_suffix(".ids"), {bytes(16): 0})  # a writer killed after the ids, before the next segment
    write(tmp_path, ["b", "c"], segment_bytes=250)
    with closing(open_one(tmp_path)) as log:
        assert [ack.duplicate for ack in log.append([event("a"), event("b"), event("c")])] == [True] * 3


def test_a_batch_larger_than_a_segment_is_one_segment(tmp_path: Path) -> None:
    with closing(open_one(tmp_path, segment_bytes=120)) as log:
        log.append([event(f"e{n}") for n in range(10)])
        log.append([event("last")])
        assert ids(log) == [*(f"e{n}" for n in range(10)), "last"]
    assert len(segments(tmp_path)) == 2


def test_too_large_an_event_is_refused_with_its_batch(tmp_path: Path) -> None:
    def large(name: str, texts: int) -> Event:
        return Event(name, "click", 1, NOW_MS, body={"texts": ["x" * 16_000] * texts})

    with closing(open_one(tmp_path)) as log:
        with pytest.raises(DataError, match="event 'large' takes 2112475 bytes, at most 2097152 are allowed"):
            log.append([event("small"), large("large", 132)])
        assert ids(log) == []
        log.append([large("largest", 130)])
        assert ids(log) == ["largest"]


# --- a disk that fails


def failing_write(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """The disk takes `room` more bytes, in two steps, and is full then."""
    real, left = os.pwrite, [room]

    def pwrite(descriptor: int, data: bytes, position: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, data[: min((room + 1) // 2, left[0])], position)
        left[0] -= written
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_full_disk_acknowledges_nothing_and_leaves_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [event(name) for name in "bcd"]
    with closing(open_one(tmp_path / "whole")) as log:
        log.append([event("a")])
        offsets = [ack.offset for ack in log.append(batch)] + log.ends()
    for room in range(offsets[-1] - offsets[0]):
        folder = tmp_path / str(room)
        with closing(open_one(folder, sync="never")) as log:
            log.append([event("a")])
            with monkeypatch.context() as patch:
                failing_write(patch, room)
                with pytest.raises(EventLogError, match="No space left on device"):
                    log.append(batch)
            kept = sum(offset <= offsets[0] + room for offset in offsets[1:])
            assert ids(log) == list("abcd"[: 1 + kept])
            assert segments(folder)[0].stat().st_size == log.ends()[0]
            assert [ack.duplicate for ack in log.append(batch)] == [n < kept for n in range(3)]
            assert ids(log) == list("abcd")


def test_a_disk_that_is_full_when_a_segment_is_sealed_does_not_end_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def full(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, mode)

    with closing(open_one(tmp_path, segment_bytes=120)) as log:
        log.append([event("a")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", full)
            with pytest.raises(EventLogError, match="No space left on device"):
                log.append([event("b")])
        assert [ack.duplicate for ack in log.append([event("a"), event("b")])] == [True, False]
        assert ids(log) == ["a", "b"]


def io_error(descriptor: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_after_a_failed_flush_the_log_refuses_until_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LocalEventLog.open(tmp_path, partitions=4)
    log.append([event("a")])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", io_error)
        with pytest.raises(EventLogError, match="flush failed"):
            log.append([event("b")])
    for user in range(8):  # of every partition
        with pytest.raises(EventLogError, match="open the log again"):
            log.append([event("c", user)])
    log.close()
    with closing(LocalEventLog.open(tmp_path, partitions=4)) as log:
        assert not log.append([event("c")])[0].duplicate


def test_a_flush_that_fails_in_the_background_stops_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_one(tmp_path, sync="interval", sync_s=0.001)
    monkeypatch.setattr(os, "fsync", io_error)
    log.append([event("a")])
    log._flusher.join(timeout=60)  # it ends at the failure
    with pytest.raises(EventLogError, match="open the log again"):
        log.append([event("b")])
    log.close()


# --- when an event counts as on disk


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts flushes."""
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        calls.append(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return lambda: len(calls)


def test_always_flushes_before_it_acknowledges(tmp_path: Path, flushed: Callable[[], int]) -> None:
    with closing(open_one(tmp_path)) as log:
        before = flushed()
        log.append([event("a"), event("b")])
        assert flushed() == before + 1
        log.append([event("a")])  # on disk already
        assert flushed() == before + 1


def test_never_leaves_flushing_to_the_system_until_it_closes(tmp_path: Path, flushed: Callable[[], int]) -> None:
    log = open_one(tmp_path, sync="never")
    before = flushed()
    log.append([event("a")])
    assert flushed() == before
    log.close()
    assert flushed() == before + 1


def test_interval_flushes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    with closing(open_one(tmp_path, sync="interval", sync_s=0.001)) as log:
        monkeypatch.setattr(os, "fsync", lambda descriptor: done.set())
        log.append([event("a")])
        assert done.wait(timeout=60)


def test_threads_that_wait_share_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = 7
    go_on, first_flush = threading.Event(), threading.Event()
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        first_flush.set()
        assert go_on.wait(timeout=60)

    with closing(open_one(tmp_path)) as log:
        monkeypatch.setattr(os, "fsync", fsync)
        threads = [threading.Thread(target=log.append, args=([event(f"e{n}")],)) for n in range(1 + others)]
        threads[0].start()
        assert first_flush.wait(timeout=60)
        [size] = log.ends()
        for thread in threads[1:]:
            thread.start()
        while log.ends() != [size * (1 + others)]:  # all have written, none is acknowledged
            threading.Event().wait(0.001)
        assert all(thread.is_alive() for thread in threads)
        go_on.set()
        for thread in threads:
            thread.join()
        assert len(calls) == 2


def test_a_duplicate_is_acknowledged_only_when_the_first_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, flushing = threading.Event(), threading.Event()
    duplicates: list[bool] = []

    def fsync(descriptor: int) -> None:
        flushing.set()
        assert go_on.wait(timeout=60)

    with closing(open_one(tmp_path)) as log:
        monkeypatch.setattr(os, "fsync", fsync)
        threads = [
            threading.Thread(target=lambda: duplicates.append(log.append([event("a")])[0].duplicate)) for _ in range(2)
        ]
        threads[0].start()
        assert flushing.wait(timeout=60)
        threads[1].start()
        threads[1].join(timeout=0.1)
        assert duplicates == []
        go_on.set()
        for thread in threads:
            thread.join()
        assert sorted(duplicates) == [False, True]


def test_a_segment_is_not_sealed_under_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, flushing = threading.Event(), threading.Event()
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        flushing.set()
        assert go_on.wait(timeout=60)
        real(descriptor)

    with closing(open_one(tmp_path, segment_bytes=120)) as log:
        monkeypatch.setattr(os, "fsync", fsync)
        threads = [threading.Thread(target=log.append, args=([event(name)],)) for name in "ab"]
        threads[0].start()
        assert flushing.wait(timeout=60)
        threads[1].start()
        threads[1].join(timeout=0.1)
        assert len(calls) == len(segments(tmp_path)) == 1
        go_on.set()
        for thread in threads:
            thread.join()
        assert ids(log) == ["a", "b"]
        assert len(segments(tmp_path)) == 2


def test_what_an_opening_finds_is_flushed_before_a_retry_of_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ["a"], sync="never")
    real, flushed = os.fsync, set()

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log = open_one(tmp_path)
    assert segments(tmp_path)[0].stat().st_ino in flushed
    assert log.append([event("a")])[0].duplicate
    log.close()


# --- erasing


def test_erasing_replaces_sealed_segments_and_seals_the_last_one_where_it_must(tmp_path: Path) -> None:
    with closing(open_one(tmp_path, segment_bytes=4096)) as log:
        for number in range(60):
            log.append([event(f"{name}-{number}", name) for name in ("kept", "gone")])
        before = {path: path.read_bytes() for path in segments(tmp_path)}
        following = LocalEventLog.reader(tmp_path)
        first = following.read(0, 0, 7)
        assert log.erase(0, {"other": log.ends()[0]}) == 0
        assert {path: path.read_bytes() for path in segments(tmp_path)} == before
        assert log.erase(0, {"gone": log.ends()[0]}) == 60
        assert segments(tmp_path)[:-1] == list(before)
        assert [path.stat().st_size for path in before] == list(map(len, before.values()))
        assert not any(b"gone" in path.read_bytes() for path in segments(tmp_path))
        rest = following.read(0, first[-1].next_offset, 1000)
        assert [record.event.event_id for record in rest if record.event.user_id == "kept"] == [
            f"kept-{number}" for number in range(4, 60)
        ]
        [end] = log.ends()
        assert log.append([event("kept-60", "kept")])[0].offset == end
        following.close()


def test_ids_that_are_made_again_know_erased_events(tmp_path: Path) -> None:
    paths = three_segments(tmp_path)
    with closing(open_one(tmp_path, segment_bytes=250)) as log:
        assert log.erase(0, {1: log.ends()[0]}) == 5
    for path in paths:
        path.with_suffix(".ids").unlink(missing_ok=True)
    with closing(open_one(tmp_path, segment_bytes=250)) as log:
        assert [log.append([event(name)])[0].duplicate for name in "abcde"] == [True] * 5


def test_nothing_is_erased_behind_damage_and_it_is_said(tmp_path: Path) -> None:
    first, second, _ = three_segments(tmp_path)
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    with closing(open_one(tmp_path, segment_bytes=250)) as log:
        with pytest.raises(DataError, match=f"{second.name} at byte [0-9]+: damaged, .* .4 events elsewhere are"):
            log.erase(0, {1: log.ends()[0]})
        assert second.read_bytes()[-20:] == bytes(content)[-20:]
        assert b"text" not in first.read_bytes()


def test_a_disk_that_is_full_while_erasing_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = three_segments(tmp_path)
    before = [path.read_bytes() for path in paths]

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with closing(open_one(tmp_path, segment_bytes=250)) as log:
        with monkeypatch.context() as patch:
            patch.setattr(local.shutil, "copyfile", refuse)
            with pytest.raises(EventLogError, match=r"cannot be erased from.*No space left"):
                log.erase(0, {1: log.ends()[0]})
        assert [path.read_bytes() for path in paths] == before
        assert log.erase(0, {1: log.ends()[0]}) == 5


def test_a_reader_does_not_erase(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    with closing(LocalEventLog.reader(tmp_path)) as log, pytest.raises(EventLogError, match="to read alone"):
        log.erase(0, {1: 1})
