"""The embedded event log: files in a folder, one writer, any number of readers in other processes.

    log/log.json                                        format and number of partitions
    log/writer.lock                                     held by the writer
    log/partition-0000/<base offset, 20 digits>.log     a segment; the last one is written to, the others are sealed
    log/partition-0000/<base offset, 20 digits>.ids     the ids in a sealed segment
    log/partition-0000/<segment>.torn-<byte>            what recovery cut off there

An offset is a byte position in the partition: the base offset of a segment plus the position in its file.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from threading import Condition, Lock, Thread
from threading import Event as Flag
from typing import Final

from twotower.logs.events import Event
from twotower.logs.partition import digest, partition_of
from twotower.logs.payload import digest_of, erased_payload, payload_of, record_of, user_of
from twotower.logs.protocol import Ack, EventLogError, Record, Sync, check_range
from twotower.logs.segment import Ids, Stored, encode, read_ids, walk, write_ids
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import TEMPORARY, read_json, sync_folder, whole_file, write_json

_LOGGER = logging.getLogger(__name__)
_FORMAT: Final = 1
_YIELD: Final = 50
"""Records that are looked through before other threads may go first."""
_CREATE: Final = os.O_RDWR | os.O_CREAT
_DESCRIPTION: Final = "log.json"
_SEGMENT: Final = re.compile(r"\d{20}\.log")


class LocalEventLog:
    """An event log in a folder; implements `EventLog`. Made by `open` to write, by `reader` to read alone."""

    def __init__(
        self,
        folder: Path,
        partitions: int,
        writers: Sequence[_Writer],
        sync: Sync,
        sync_s: float,
        lock: int,
        clock_ms: ClockMs = now_ms,
    ):
        self._folder = folder
        self._partitions = partitions
        self._writers = writers
        self._sync = sync
        self._lock = lock
        self._clock_ms = clock_ms
        self._closed = Flag()
        self._read_on_disk = [0] * partitions
        self._valid_ends = [0] * partitions
        self._reported: set[tuple[int, int]] = set()
        self._flusher = Thread(target=self._flush_every, args=(sync_s,), name="event-log-flush", daemon=True)
        if sync == "interval":
            self._flusher.start()

    @classmethod
    def open(
        cls,
        folder: Path,
        partitions: int = 4,
        sync: Sync = "always",
        sync_s: float = 1.0,
        segment_bytes: int = 64 << 20,
        clock_ms: ClockMs = now_ms,
    ) -> LocalEventLog:
        """Open a log to write, and make it where there is none.

        What a killed writer left is mended first: the last segment of each partition is cut after its last whole
        record, and what is cut off is kept in a file beside it.

        Args:
            folder: of the log alone.
            partitions: fixed when the log is made.
            sync: when an event is acknowledged: `always` once it is flushed to disk, in one flush for all the threads
                that wait; `interval` once it is written, with a flush every `sync_s` seconds; `never` once it is
                written. All three survive a killed process; in a power cut only `always` keeps what is acknowledged.
            sync_s: seconds between flushes with `interval`.
            segment_bytes: a segment is sealed before it would grow beyond this size.
            clock_ms: the log's clock.

        Raises:
            ConfigError: the log has another number of partitions.
            DataError: the folder holds another format, or a sealed segment whose ids have to be read again is damaged.
            EventLogError: another writer has it open, or the disk refuses.
        """
        if partitions < 1:
            raise ConfigError(f"partitions={partitions}: a log has at least one")
        with _refusals(f"{folder} cannot be opened"), ExitStack() as opened:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            opened.callback(os.close, lock)
            for leftover in folder.rglob(f"{TEMPORARY}*"):
                leftover.unlink()
            _describe(folder, partitions)
            writers = []
            for number in range(partitions):
                writers.append(_Writer(number, _partition_folder(folder, number), segment_bytes))
                opened.callback(writers[-1].close)
            sync_folder(folder)
            sync_folder(folder.parent)
            opened.pop_all()
        return cls(folder, partitions, writers, sync, sync_s, lock, clock_ms)

    @classmethod
    def reader(cls, folder: Path) -> LocalEventLog:
        """Open a log that this or another process writes, to read alone: `append` raises `EventLogError`.

        Raises:
            DataError: there is no log, or it is of another format.
        """
        return cls(folder, _described_partitions(folder), [], "never", 0.0, -1)

    @property
    def partitions(self) -> int:
        """See `EventLog`."""
        return self._partitions

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See `EventLog`."""
        self._check_open()
        if not self._writers:
            raise EventLogError(f"{self._folder} was opened to read alone: append through LocalEventLog.open")
        for writer in self._writers:
            writer.check()
        logged_ms = self._clock_ms()
        records = [encode(payload_of(event, logged_ms)) for event in events]
        places: dict[int, list[int]] = {}
        for place, event in enumerate(events):
            places.setdefault(partition_of(event.user_id, self._partitions), []).append(place)
        acks: dict[int, Ack] = {}
        for number, mine in places.items():
            digests = [digest(events[place].event_id, events[place].user_id) for place in mine]
            written = self._writers[number].write(digests, [records[place] for place in mine])
            acks.update(zip(mine, written, strict=True))
        if self._sync == "always":
            for number, mine in places.items():
                self._writers[number].flush(max(acks[place].offset for place in mine) + 1)
        return [acks[place] for place in range(len(events))]

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """See `EventLog`."""
        self._check_open()
        check_range(partition, self._partitions, offset, limit)
        folder = _partition_folder(self._folder, partition)
        known_end = self._writers[partition].end if self._writers else 0
        with _refusals(f"{folder} cannot be read"):
            bases = _bases(folder)
            if not bases:
                return []
            if 0 < offset < bases[0]:
                raise DataError(f"{folder} keeps events from offset {bases[0]} on, not from {offset}: begin at 0")
            offset = max(offset, bases[0])
            records: list[Record] = []
            for base, end in zip(bases, [*bases[1:], None], strict=True):
                if end is not None and offset >= end:
                    continue
                found = self._read_segment(partition, base, offset, limit - len(records), is_last=end is None)
                records += found
                offset = found[-1].next_offset if found else offset
                if len(records) == limit:
                    break
                is_whole = offset >= known_end if end is None else offset == end
                if not is_whole:
                    if records:  # the next call, from the damaged place on, says so
                        break
                    raise DataError(
                        f"{_segment(folder, base)} is damaged at byte {offset - base}, which is offset {offset}: "
                        f"restore the file from a copy, or read on from offset {known_end if end is None else end}"
                    )
        return records

    def ends(self) -> list[int]:
        """See `EventLog`."""
        self._check_open()
        if self._writers:
            return [writer.end for writer in self._writers]
        return [self._valid_end(number) for number in range(self._partitions)]

    def erase(self, partition: int, users: Mapping[int | str, int]) -> int:
        """See `EventLog`."""
        self._check_open()
        check_range(partition, self._partitions, 0, 1)
        if not self._writers:
            raise EventLogError(f"{self._folder} was opened to read alone: erase through LocalEventLog.open")
        return self._writers[partition].erase(users)

    def close(self) -> None:
        """See `EventLog`."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._flusher.is_alive():
            self._flusher.join()
        if self._writers:
            with ExitStack() as closing:
                closing.callback(os.close, self._lock)
                for writer in self._writers:
                    closing.callback(writer.close)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EventLogError(f"{self._folder} is closed")

    def _flush_every(self, sync_s: float) -> None:
        while not self._closed.wait(sync_s):
            for writer in self._writers:
                try:
                    writer.flush(writer.end)
                except EventLogError as error:  # appends are refused from now on
                    _LOGGER.error("%s", error)
                    return

    def _read_segment(self, partition: int, base: int, offset: int, limit: int, is_last: bool) -> list[Record]:
        """Up to `limit` records of a segment, flushed before they are given, so that no reader is ahead of the disk."""
        path = _segment(_partition_folder(self._folder, partition), base)
        with _opened(path) as descriptor:
            end = base + os.fstat(descriptor).st_size
            if is_last and offset > end:
                raise DataError(f"offset {offset} lies behind the end of {path}, {end}: it is not of this log")
            records = [
                record_of(base + stored.position, base + stored.next_position, stored.payload)
                for stored in islice(walk(descriptor, offset - base), limit)
            ]
            if is_last and records and records[-1].next_offset > self._read_on_disk[partition]:
                os.fsync(descriptor)
                self._read_on_disk[partition] = records[-1].next_offset
        if is_last and not records and offset < end and (partition, offset) not in self._reported:
            self._reported.add((partition, offset))
            _LOGGER.warning(
                "%s: no whole record at byte %d of %d: a write under way, or what the next writer cuts off",
                path,
                offset - base,
                end - base,
            )
        return records

    def _valid_end(self, partition: int) -> int:
        """The end of the last whole record, which is not the end of the file while a record is being written."""
        folder = _partition_folder(self._folder, partition)
        with _refusals(f"{folder} cannot be read"):
            bases = _bases(folder)
            if not bases:
                return 0
            end = max(bases[-1], self._valid_ends[partition])
            with _opened(_segment(folder, bases[-1])) as descriptor:
                for stored in walk(descriptor, end - bases[-1]):
                    end = bases[-1] + stored.next_position
        self._valid_ends[partition] = end
        return end


class _Writer:
    """The writing end of one partition.

    Threads write one at a time, under a lock. They flush outside it: the first that needs its records on disk flushes
    for all that have written by then, while others write on and share the next flush.
    """

    def __init__(self, partition: int, folder: Path, segment_bytes: int):
        self._partition = partition
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._changed = Condition()
        self._erasing = Lock()
        self._flushing = False
        self._refusal = ""
        folder.mkdir(exist_ok=True)
        bases = _bases(folder) or [0]
        self._sealed = [_sealed_ids(folder, base, end) for base, end in pairwise(bases)]
        self._base = bases[-1]
        self._descriptor = os.open(_segment(folder, self._base), _CREATE, 0o644)
        try:
            self._ids, length = _scan(self._descriptor, self._base)
            _cut(_segment(folder, self._base), length)
            os.fsync(self._descriptor)  # a retry of what a killed writer wrote is acknowledged as a duplicate
            sync_folder(folder)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.end = self._base + length
        self._on_disk = self.end

    def check(self) -> None:
        """Refuse once a flush has failed: the kernel drops the pages, and a second flush would say that all is well."""
        if self._refusal:
            raise EventLogError(self._refusal)

    def write(self, digests: Sequence[bytes], records: Sequence[bytes]) -> list[Ack]:
        """Write the records whose digests are new, not yet flushed; an acknowledgement for each, in order."""
        size = sum(map(len, records))
        with self._changed, _refusals(f"{self._folder} cannot take the events, send them again"):
            while self._flushing and self._is_full(size):
                self._changed.wait()
            self.check()
            if self._is_full(size):
                self._seal()
            known = self._find(digests)
            fresh: dict[bytes, bytes] = {}
            for one, record in zip(digests, records, strict=True):
                if one not in known:
                    fresh.setdefault(one, record)
            self._write(fresh)
            known.update((one, self._ids[one]) for one in fresh)
            return [Ack(self._partition, known[one], duplicate=fresh.pop(one, None) is None) for one in digests]

    def flush(self, until: int) -> None:
        """Return when everything before an offset is on disk."""
        with self._changed:
            while self._flushing and self._on_disk < until:
                self._changed.wait()
            if self._on_disk >= until:
                return
            self.check()
            self._flushing, end = True, self.end
        try:
            with _refusals(f"{self._folder}: a flush failed"):
                self._fsync()
            with self._changed:
                self._on_disk = end
        finally:
            with self._changed:
                self._flushing = False
                self._changed.notify_all()

    def erase(self, users: Mapping[int | str, int]) -> int:
        """Erase what stands of users before an offset each; gives the number of events.

        A sealed segment is written anew, as long as it was, and replaces the old one in one rename. One that is still
        written to is sealed first, if something in it is to go.
        """
        number, damaged = 0, []
        with self._erasing, _refusals(f"{self._folder} cannot be erased from"):
            bases = _bases(self._folder)
            for base, end in zip(bases, [*bases[1:], None], strict=True):
                self.check()  # somebody may want to close
                if base >= max(users.values(), default=0):
                    break
                segment = _segment(self._folder, base)
                events, length = _events_of(segment, base, users)
                if events:
                    self._seal_if_last(base)
                    _overwrite(segment, events)
                    number += len(events)
                if end is not None and base + length != end:
                    damaged.append(f"{segment} at byte {length}")
        if damaged:
            raise DataError(
                f"{', '.join(damaged)}: damaged, nothing is erased from there on ({number} events elsewhere are). "
                "Restore the file from a copy, or remove it"
            )
        return number

    def close(self) -> None:
        """Flush and close; whoever still waits is refused."""
        with self._changed:
            while self._flushing:
                self._changed.wait()
            try:
                if not self._refusal:
                    with _refusals(f"{self._folder}: the last flush failed"):
                        self._fsync()
                    self._on_disk = self.end
            finally:
                self._refusal = f"{self._folder} is closed"
                os.close(self._descriptor)
                self._changed.notify_all()

    def _seal_if_last(self, base: int) -> None:
        with self._changed:
            while self._flushing:
                self._changed.wait()
            self.check()
            if self._base == base:
                self._seal()

    def _is_full(self, size: int) -> bool:
        return self.end > self._base and self.end + size - self._base > self._segment_bytes

    def _find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """The offsets of those digests that the partition holds."""
        found = {one: self._ids[one] for one in digests if one in self._ids}
        for ids in self._sealed:
            rest = [one for one in digests if one not in found]
            if not rest:
                break
            offsets = ids.find(rest).tolist()
            found.update((one, offset) for one, offset in zip(rest, offsets, strict=True) if offset >= 0)
        return found

    def _write(self, records: Mapping[bytes, bytes]) -> None:
        """Write records at the end, by digest.

        After a failure the whole ones stay and what follows them is cut: another process may have read them already, so
        nothing else may ever stand at their offsets. Sent again, they are duplicates.
        """
        data = b"".join(records.values())
        start, written, failure = self.end, 0, None
        try:
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], start + written - self._base)
        except OSError as error:
            failure = error
        except BaseException:
            self._refusal = f"{self._folder}: a write was interrupted; open the log again"
            raise
        for one, record in records.items():
            if self.end + len(record) > start + written:
                break
            self._ids[one] = self.end
            self.end += len(record)
        if failure is not None:
            try:
                os.ftruncate(self._descriptor, self.end - self._base)
            except OSError as error:
                self._refusal = f"{self._folder}: half a record could not be cut off ({error}); open the log again"
            raise failure

    def _fsync(self, new: bool = False) -> None:
        try:
            os.fsync(self._descriptor)
            if new:
                sync_folder(self._folder)
        except BaseException as error:
            self._refusal = f"{self._folder}: a flush failed ({error!r}); check the disk and open the log again"
            raise

    def _seal(self) -> None:
        """Go on in a new segment; the full one is on disk before the next exists, and so are its ids."""
        self._fsync()
        self._on_disk = self.end
        ids = write_ids(_segment(self._folder, self._base).with_suffix(".ids"), self._ids)
        old, self._descriptor = self._descriptor, os.open(_segment(self._folder, self.end), _CREATE | os.O_EXCL, 0o644)
        self._sealed.append(ids)
        self._base, self._ids = self.end, {}
        os.close(old)
        self._fsync(new=True)


def _partition_folder(folder: Path, partition: int) -> Path:
    return folder / f"partition-{partition:04d}"


def _segment(folder: Path, base: int) -> Path:
    return folder / f"{base:020d}.log"


def _bases(folder: Path) -> list[int]:
    """The base offsets of a partition's segments, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(name[:20]) for name in os.listdir(folder) if _SEGMENT.fullmatch(name))


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Give what the operating system refuses as the log's own error."""
    try:
        yield
    except OSError as error:
        raise EventLogError(f"{what}: {error}") from error


def _lock(folder: Path) -> int:
    descriptor = os.open(folder / "writer.lock", _CREATE, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise EventLogError(
            f"{folder} is open in another writer: a log has one at a time; stop it, or read with LocalEventLog.reader"
        ) from None
    return descriptor


def _describe(folder: Path, partitions: int) -> None:
    """Write what the log is, or check that what is there agrees."""
    if (folder / _DESCRIPTION).exists():
        found = _described_partitions(folder)
        if found != partitions:
            raise ConfigError(
                f"{folder} has {found} partitions, {partitions} are asked for: a log keeps the number that it was made "
                f"with; set partitions = {found}, or use another folder"
            )
    elif _partition_folder(folder, 0).exists():
        raise DataError(f"{folder} has partitions but no {_DESCRIPTION}: restore it, their number cannot be guessed")
    else:
        write_json(folder / _DESCRIPTION, {"format": _FORMAT, "partitions": partitions})


def _described_partitions(folder: Path) -> int:
    path = folder / _DESCRIPTION
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(f"{path} says {content}, where format {_FORMAT} is due: another version wrote this log")
    partitions = content.get("partitions")
    if not isinstance(partitions, int) or partitions < 1:
        raise DataError(f"{path} says partitions={partitions!r}: restore the file")
    return partitions


def _scan(descriptor: int, base: int) -> tuple[dict[bytes, int], int]:
    """The offset of each digest in a segment, and the bytes that its whole records take."""
    ids: dict[bytes, int] = {}
    length = 0
    for stored in walk(descriptor, 0):
        ids[digest_of(stored.payload)] = base + stored.position
        length = stored.next_position
    return ids, length


def _events_of(segment: Path, base: int, users: Mapping[int | str, int]) -> tuple[list[Stored], int]:
    """The records of users before an offset each in a segment, and the bytes that its whole records take."""
    found, length = list[Stored](), 0
    with _opened(segment) as descriptor:
        for place, stored in enumerate(walk(descriptor, 0)):
            user_id = user_of(stored.payload)
            if user_id is not None and base + stored.position < users.get(user_id, 0):
                found.append(stored)
            length = stored.next_position
            if place % _YIELD == 0:
                time.sleep(0)  # whoever answers requests in this process goes first
    return found, length


def _overwrite(segment: Path, records: Sequence[Stored]) -> None:
    """Erase records of a sealed segment, whole or not at all."""
    with whole_file(segment) as temporary:
        shutil.copyfile(segment, temporary)
        with temporary.open("r+b") as file:
            for stored in records:
                file.seek(stored.position)
                file.write(encode(erased_payload(stored.payload).ljust(len(stored.payload), b"\0")))


def _sealed_ids(folder: Path, base: int, end: int) -> Ids:
    """The ids of a sealed segment, read again from its records where their file is missing or damaged."""
    segment = _segment(folder, base)
    ids = read_ids(segment.with_suffix(".ids"))
    if ids is not None:
        return ids
    with _opened(segment) as descriptor:
        offsets, length = _scan(descriptor, base)
    if base + length != end:
        raise DataError(
            f"{segment} is damaged at byte {length}, and so is its .ids file: restore one of them from a copy"
        )
    _LOGGER.info("%s: wrote the ids of its %d events again", segment, len(offsets))
    return write_ids(segment.with_suffix(".ids"), offsets)


def _cut(segment: Path, length: int) -> None:
    """Cut a segment after its whole records; what follows them is kept in a file beside it."""
    with segment.open("r+b") as file:
        file.seek(length)
        tail = file.read()
        if not tail:
            return
        names = (f"{segment.name}.torn-{length}{suffix}" for suffix in ("", *(f"-{again}" for again in range(2, 1000))))
        aside = next(path for name in names if not (path := segment.with_name(name)).exists())
        with whole_file(aside) as temporary:
            temporary.write_bytes(tail)
        file.truncate(length)
    _LOGGER.warning(
        "%s: %d bytes after byte %d are no whole record, as a killed writer leaves them: cut off and kept in %s",
        segment,
        len(tail),
        length,
        aside.name,
    )
