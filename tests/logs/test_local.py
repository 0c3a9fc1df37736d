import logging
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from twotower.logs import Event, EventLogError, LocalEventLog, local
from twotower.schema.errors import ConfigError, DataError

NOW_MS = 1_700_000_000_000
FILE = "events.sqlite"
WAL = "events.sqlite-wal"


def event(event_id: str, user_id: int | str = 1, text: str = "") -> Event:
    return Event(event_id, "click", user_id, NOW_MS, body={"text": text})


def open_one(folder: Path, **options: Any) -> LocalEventLog:
    return LocalEventLog.open(folder, partitions=1, clock_ms=lambda: NOW_MS, **options)


def ids(log: LocalEventLog, offset: int = 0) -> list[str]:
    return [record.event.event_id for record in log.read(0, offset, 1000)]


def write(folder: Path, names: list[str], **options: Any) -> None:
    """Append events one by one, and close: they are in the database then, and no write-ahead log is left."""
    with closing(open_one(folder, **options)) as log:
        for name in names:
            log.append([event(name)])
    assert not (folder / WAL).exists()


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


# --- opening


def test_another_number_of_partitions_is_refused(tmp_path: Path) -> None:
    LocalEventLog.open(tmp_path, partitions=2).close()
    with pytest.raises(ConfigError, match="has 2 partitions, 3 are asked for"):
        LocalEventLog.open(tmp_path, partitions=3)
    with pytest.raises(ConfigError, match="partitions=0"):
        LocalEventLog.open(tmp_path / "new", partitions=0)


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / FILE)) as database:
        database.execute("PRAGMA user_version = 3")
    for opening in (open_one, LocalEventLog.reader):
        with pytest.raises(DataError, match="is of format 3, expected 2"):
            opening(tmp_path)


@pytest.mark.parametrize("content", [b"no database" * 1000, b"SQLite format 3\0" + bytes(10_000)])
def test_what_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    for opening in (open_one, LocalEventLog.reader):
        with pytest.raises(DataError, match=r"Restore events\.sqlite from a copy"):
            opening(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


def test_a_failed_opening_lets_go_of_the_log(tmp_path: Path) -> None:
    open_one(tmp_path).close()
    with pytest.raises(ConfigError):
        LocalEventLog.open(tmp_path, partitions=2)
    open_one(tmp_path).close()


# --- several writers


def test_two_writers_of_one_log_double_nothing_and_see_each_others_events(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as first, closing(open_one(tmp_path)) as second:
        [a] = first.append([event("a")])
        [again, b] = second.append([event("a"), event("b")])
        assert (again.duplicate, again.offset, b.offset) == (True, a.offset, 1)
        assert [ack.duplicate for ack in first.append([event("b"), event("c")])] == [True, False]
        assert ids(first) == ids(second) == ["a", "b", "c"]
        assert first.ends() == second.ends() == [3]


def test_processes_that_write_one_log_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from twotower.logs import Event, LocalEventLog, local
        local.CHECKPOINT_PAGES = 10
        log = LocalEventLog.open(Path(sys.argv[1]), partitions=2)
        duplicates = 0
        for step in range(100):
            shared = Event(f"shared-{step}", "click", 1, 1_700_000_000_000)
            own = Event(f"{sys.argv[2]}-{step}", "click", 2, 1_700_000_000_000)
            duplicates += sum(ack.duplicate for ack in log.append([shared, own]))
        log.close()
        print(duplicates)
    """
    writers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(3)
    ]
    assert sum(int(writer.communicate()[0]) for writer in writers) == 200
    with closing(LocalEventLog.reader(tmp_path)) as log:
        found = [record.event.event_id for partition in range(2) for record in log.read(partition, 0, 1000)]
    expected = [f"{name}-{step}" for name in ("shared", "0", "1", "2") for step in range(100)]
    assert sorted(found) == sorted(expected)


# --- a reader in another process


def test_a_reader_needs_a_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        LocalEventLog.reader(tmp_path)


def test_a_reader_does_not_write(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        for writing in (
            lambda: reader.append([event("b")]),
            lambda: reader.erase(0, {1: 1}),
            lambda: reader.forget(0, 1),
        ):
            with pytest.raises(EventLogError, match="opened to read only"):
                writing()
        assert ids(reader) == ["a"]


def test_a_reader_follows_a_writer_while_the_write_ahead_log_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_PAGES", 10)
    with closing(open_one(tmp_path)) as log, closing(LocalEventLog.reader(tmp_path)) as reader:
        assert reader.ends() == [0]
        offset = 0
        for number in range(100):
            log.append([event(f"e{number}")])
            [record] = reader.read(0, offset, 10)
            assert record.event == event(f"e{number}")
            offset = record.next_offset
            assert reader.ends() == log.ends() == [offset]
            assert reader.read(0, offset, 10) == []
        assert (tmp_path / WAL).stat().st_size < 40 * 4120  # 100 appends take 200 pages


def test_a_reader_reads_on_when_the_writer_closes_and_another_opens(tmp_path: Path) -> None:
    write(tmp_path, ["a"])
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert ids(reader) == ["a"]
        with closing(open_one(tmp_path)) as log:
            log.append([event("b")])
        assert ids(reader) == ["a", "b"]
        with closing(open_one(tmp_path)) as log:
            log.append([event("c")])
            assert ids(reader) == ["a", "b", "c"]


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


# --- what a kill, a power cut and a bad disk leave


def unfinished(folder: Path, names: str) -> bytes:
    """A log whose writer was killed: one event in the database, others in the write-ahead log; gives its content."""
    write(folder, ["a"])
    with closing(open_one(folder)) as log:
        for name in names:
            log.append([event(name)])
        content = [(path, path.read_bytes()) for path in (folder / FILE, folder / WAL)]
    for path, was in content:
        path.write_bytes(was)
    return content[1][1]


def test_a_cut_anywhere_in_the_write_ahead_log_leaves_whole_events_and_a_retry_completes_them(tmp_path: Path) -> None:
    content = unfinished(tmp_path, "bcd")
    before = (tmp_path / FILE).read_bytes()
    kept = []
    for length in [*range(0, len(content), 509), len(content)]:
        (tmp_path / FILE).write_bytes(before)
        (tmp_path / WAL).write_bytes(content[:length])
        with closing(open_one(tmp_path)) as log:
            found = ids(log)
            kept.append(len(found))
            assert found == list("abcd"[: len(found)])
            acks = log.append([event(name) for name in "abcd"])
            assert [ack.duplicate for ack in acks] == [number < len(found) for number in range(4)]
            assert ids(log) == list("abcd")
    assert kept == sorted(kept)
    assert set(kept) == {1, 2, 3, 4}


@pytest.mark.parametrize("tail", [b"half a frame", bytes(10_000)])
def test_what_stands_behind_the_write_ahead_log_is_no_event(tmp_path: Path, tail: bytes) -> None:
    content = unfinished(tmp_path, "bc")
    (tmp_path / WAL).write_bytes(content + tail)
    with closing(LocalEventLog.reader(tmp_path)) as reader, closing(open_one(tmp_path)) as log:
        assert ids(reader) == ["a", "b", "c"]
        assert [ack.duplicate for ack in log.append([event("c"), event("d")])] == [True, False]
        assert ids(reader) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("which", "step"), [("database", 13), ("write-ahead log", 61)])
def test_a_changed_byte_never_gives_a_wrong_event(tmp_path: Path, which: str, step: int) -> None:
    names = ["a", "b", "c"]
    unfinished(tmp_path, "bc") if which == "write-ahead log" else write(tmp_path, names)
    contents = {path: path.read_bytes() for path in (tmp_path / FILE, tmp_path / WAL) if path.exists()}
    damaged = tmp_path / (FILE if which == "database" else WAL)
    complaints = 0
    for at in range(0, len(contents[damaged]), step):
        for path, content in contents.items():
            path.write_bytes(content)
        (tmp_path / "events.sqlite-shm").unlink(missing_ok=True)
        content = contents[damaged]
        damaged.write_bytes(content[:at] + bytes([content[at] ^ 0x81]) + content[at + 1 :])
        try:
            with closing(LocalEventLog.reader(tmp_path)) as reader:
                for record in reader.read(0, 0, 10):
                    assert record.event == event(names[record.offset])
        except (DataError, EventLogError):
            complaints += 1
    assert complaints if which == "database" else not complaints


def damage(folder: Path, text: bytes) -> None:
    """Change a byte of an event in the database."""
    content = (folder / FILE).read_bytes()
    assert content.count(text) == 1
    (folder / FILE).write_bytes(content.replace(text, text[:-1] + bytes([text[-1] ^ 1])))


def test_damage_is_an_error_at_its_offset_and_reading_goes_on_behind_it(tmp_path: Path) -> None:
    write(tmp_path, ["first", "second", "third"])
    damage(tmp_path, b'"second"')
    for log in (LocalEventLog.reader(tmp_path), open_one(tmp_path)):
        with closing(log):
            assert ids(log) == ["first"]  # what stands before the damage is given
            with pytest.raises(DataError, match=r"damaged at offset 1 .* read on from offset 2"):
                log.read(0, 1, 10)
            assert ids(log, 2) == ["third"]


# --- retention


def test_forgotten_events_are_gone_with_their_ids_and_offsets_go_on(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as log:
        for name in "abcd":
            log.append([event(name, text=f"secret-{name}")])
        log.forget(0, 2)
        assert [(record.offset, record.event.event_id) for record in log.read(0, 0, 10)] == [(2, "c"), (3, "d")]
        with pytest.raises(DataError, match="keeps events from offset 2 on, not from 1: begin at 0"):
            log.read(0, 1, 10)
        log.forget(0, 100)
        assert ids(log) == ["d"]  # the last one stays
        [a, d] = log.append([event("a"), event("d")])
        assert (a.duplicate, a.offset, d.duplicate, d.offset) == (False, 4, True, 3)
    assert b"secret-c" not in everything(tmp_path)


def test_an_empty_partition_forgets_nothing(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as log:
        log.forget(0, 10)
        assert log.append([event("a")])[0].offset == 0


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


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_acknowledges_nothing_and_the_log_goes_on(tmp_path: Path) -> None:
    batch = [event(name, text="x" * 3000) for name in "bcd"]
    with closing(open_one(tmp_path)) as log:
        log.append([event("a")])
        size = (tmp_path / WAL).stat().st_size
        for room in range(0, 3 * 4120, 1030):
            with largest_file(size + room), pytest.raises(EventLogError, match="cannot take the events, send them"):
                log.append(batch)
            assert ids(log) == ["a"]
            assert log.ends() == [1]
        assert [ack.duplicate for ack in log.append(batch)] == [False] * 3
        assert ids(log) == list("abcd")
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert ids(reader) == list("abcd")


def test_a_disk_that_is_full_when_events_are_copied_into_the_database_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_PAGES", 4)
    names = [f"e{number}" for number in range(40)]
    with closing(open_one(tmp_path)) as log:
        log.append([event(name, text="x" * 3000) for name in names[:10]])
        acknowledged = 10
        with largest_file(max((tmp_path / FILE).stat().st_size, 16 * 4120)), suppress(EventLogError):
            for name in names[10:]:
                log.append([event(name, text="x" * 3000)])
                acknowledged += 1
        assert 10 < acknowledged < 40
        assert ids(log) == names[:acknowledged]
        acks = [log.append([event(name, text="x" * 3000)])[0] for name in names]
        assert [ack.duplicate for ack in acks] == [number < acknowledged for number in range(40)]
    with closing(LocalEventLog.reader(tmp_path)) as reader:
        assert ids(reader) == names


def test_a_database_that_cannot_be_written_is_an_error_of_the_log(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as log:
        log.append([event("a")])
        log._writer._database.execute("PRAGMA query_only = ON")
        with pytest.raises(EventLogError, match="cannot take the events, send them again: attempt to write a readonly"):
            log.append([event("b")])


def io_error(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


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


def test_a_flush_that_fails_in_the_background_stops_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = open_one(tmp_path, sync="interval", sync_s=0.001)
    monkeypatch.setattr(os, "fsync", io_error)
    log._writer.flusher.join(timeout=60)  # it ends at the failure
    with pytest.raises(EventLogError, match="open the log again"):
        log.append([event("b")])
    log.close()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


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
    with closing(LocalEventLog.open(tmp_path, partitions=4)) as log:
        before = flushed()
        log.append([event("a", user) for user in range(8)])  # of several partitions
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
        assert log.ends() == [1]
        for thread in threads[1:]:
            thread.start()
        while log.ends() != [1 + others]:  # all have written, none is acknowledged
            threading.Event().wait(0.001)
        assert all(thread.is_alive() for thread in threads)
        go_on.set()
        for thread in threads:
            thread.join()
        assert len(calls) == 2


@pytest.mark.parametrize("writers", [1, 2])
def test_a_duplicate_is_acknowledged_only_when_the_first_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int
) -> None:
    go_on, flushing = threading.Event(), threading.Event()
    duplicates: list[bool] = []

    def fsync(descriptor: int) -> None:
        flushing.set()
        assert go_on.wait(timeout=60)

    logs = [open_one(tmp_path) for _ in range(writers)]
    monkeypatch.setattr(os, "fsync", fsync)
    threads = [
        threading.Thread(target=lambda log=log: duplicates.append(log.append([event("a")])[0].duplicate))
        for log in (logs[0], logs[-1])
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
    for log in logs:
        log.close()


def test_what_an_opening_finds_is_flushed_before_a_retry_of_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(tmp_path, "b")
    real, flushed = os.fsync, set()

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    log = open_one(tmp_path)
    assert (tmp_path / WAL).stat().st_ino in flushed
    assert log.append([event("b")])[0].duplicate
    log.close()


# --- erasing


def test_of_an_erased_user_no_file_holds_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CHECKPOINT_PAGES", 50)
    with closing(open_one(tmp_path)) as log, closing(LocalEventLog.reader(tmp_path)) as following:
        for number in range(60):
            log.append([event(f"{name}-{number}", name, name * (number * 40 % 3000)) for name in ("kept", "gone")])
        first = following.read(0, 0, 7)
        before = everything(tmp_path)
        assert b"gone" in before
        assert log.erase(0, {"other": log.ends()[0]}) == 0
        assert b"gone" in everything(tmp_path)
        assert log.erase(0, {"gone": log.ends()[0]}) == 60
        assert b"gone" not in everything(tmp_path)
        assert b"kept-59" in everything(tmp_path)
        rest = following.read(0, first[-1].next_offset, 1000)
        assert [record.event.event_id for record in rest if record.event.user_id == "kept"] == [
            f"kept-{number}" for number in range(4, 60)
        ]
        [end] = log.ends()
        assert log.append([event("kept-60", "kept")])[0].offset == end


def test_a_pass_that_was_killed_before_it_emptied_the_write_ahead_log_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(writer: object) -> None:
        raise KeyboardInterrupt

    with closing(open_one(tmp_path)) as log:
        log.append([event("secret")])
        with monkeypatch.context() as patch:
            patch.setattr(local._Writer, "empty_wal", killed)
            with pytest.raises(KeyboardInterrupt):
                log.erase(0, {1: 1})
        assert b"secret" in everything(tmp_path)
        assert log.erase(0, {1: 1}) == 0
        assert b"secret" not in everything(tmp_path)


def test_a_reader_that_holds_the_write_ahead_log_is_an_error_and_the_next_pass_empties_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_BUSY_S", 0.05)
    with closing(open_one(tmp_path)) as log, closing(sqlite3.connect(tmp_path / FILE)) as holding:
        log.append([event("secret"), event("b")])
        rows = holding.execute("SELECT * FROM partition_0")
        rows.fetchone()
        with pytest.raises(EventLogError, match="still holds what was erased"):
            log.erase(0, {1: 2})
        rows.close()
        assert log.erase(0, {1: 2}) == 0
        assert b"secret" not in everything(tmp_path)


def test_damaged_events_are_not_erased_and_it_is_said(tmp_path: Path) -> None:
    write(tmp_path, ["first", "second", "third"])
    damage(tmp_path, b'"second"')
    with closing(open_one(tmp_path)) as log:
        with pytest.raises(DataError, match=r"damaged at the offsets \[1\] of partition 0, .* \(2 other events are\)"):
            log.erase(0, {1: 3})
        assert [record.event.type for record in log.read(0, 2, 10)] == ["erased"]
    assert b"third" not in everything(tmp_path)


def test_a_disk_that_is_full_while_erasing_is_an_error_and_a_second_pass_erases(tmp_path: Path) -> None:
    with closing(open_one(tmp_path)) as log:
        log.append([event(name) for name in "abc"])
        with largest_file((tmp_path / WAL).stat().st_size), pytest.raises(EventLogError, match="cannot be erased from"):
            log.erase(0, {1: 3})
        assert ids(log) == ["a", "b", "c"]
        assert log.erase(0, {1: 3}) == 3
