"""The embedded event log: one SQLite database in a folder, for any number of writers and readers on one machine.

    log/events.sqlite        the events, a table for each partition
    log/events.sqlite-wal    the write-ahead log: the latest events, until they are copied into the database
    log/events.sqlite-shm    shared by the processes that have the log open
    log/writer.lock          held by the process that is writing

The offset of an event is its number in the partition. A row holds the offset, the digest of the event's id (unique in
the partition), the event as JSON, and a CRC-32C of these three, which every reader checks.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from threading import Condition, Lock, Thread
from threading import Event as Flag
from typing import Final, NamedTuple

import google_crc32c

from twotower.logs.events import Event
from twotower.logs.former import former_partitions, former_records, remove_former
from twotower.logs.partition import digest, partition_of
from twotower.logs.payload import erased_payload, payload_of, record_of, user_of
from twotower.logs.protocol import Ack, EventLogError, Record, Sync, check_kept, check_range
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import sync_path

CHECKPOINT_PAGES = 1000
"""Length of the write-ahead log at which it is copied into the database."""

_LOGGER = logging.getLogger(__name__)
_FORMAT: Final = 2
_FILE: Final = "events.sqlite"
_WAL: Final = "events.sqlite-wal"
_PLACE: Final = struct.Struct("<q16s")
_BUSY_S: Final = 10.0
_CACHE_KIB: Final = 64 << 10
"""Pages that a writer keeps in memory: digests are in no order, so each new one is looked up in another page."""
_SCANNED_AT_ONCE: Final = 500
"""Rows that an erasing pass looks through at once."""
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class _Row(NamedTuple):
    offset: int
    digest: bytes
    checksum: int
    payload: bytes

    @property
    def is_whole(self) -> bool:
        try:
            return self.checksum == _checksum(self.offset, self.digest, self.payload)
        except (struct.error, TypeError):  # damage that made another type of a value
            return False


class LocalEventLog:
    """An event log in a folder; implements `EventLog`. Made by `open` to write, by `reader` to read only."""

    def __init__(self, folder: Path, database: sqlite3.Connection, writer: _Writer | None, clock_ms: ClockMs):
        self._folder = folder
        self._database = database
        self._writer = writer
        self._clock_ms = clock_ms
        self._reading = Lock()
        self._closed = Flag()
        self._partitions = _partitions_of(folder, database)
        self._on_disk = [0] * self._partitions

    @classmethod
    def open(
        cls,
        folder: Path,
        partitions: int = 4,
        sync: Sync = "always",
        sync_s: float = 1.0,
        clock_ms: ClockMs = now_ms,
    ) -> LocalEventLog:
        """Open a log to write, and make it where there is none; a log of format 1 is converted.

        Args:
            folder: holds the log alone, on a local disk.
            partitions: fixed when the log is made.
            sync: when an event is acknowledged: `always` once it is flushed to disk, in one flush for all waiting
                threads; `interval` once it is written, with a flush every `sync_s` seconds; `never` once it is written.
                All three survive a killed process; in a power cut only `always` keeps what is acknowledged.
            sync_s: seconds between flushes with `interval`.
            clock_ms: the log's clock.

        Raises:
            ConfigError: the log has another number of partitions.
            DataError: the folder holds another format, or the log is damaged.
            EventLogError: the disk refuses.
        """
        if partitions < 1:
            raise ConfigError(f"partitions={partitions}: a log has at least one")
        with _refusals(f"{folder} cannot be opened"), ExitStack() as opened:
            folder.mkdir(parents=True, exist_ok=True)
            writer = opened.enter_context(closing(_Writer(folder, partitions, sync, sync_s)))
            log = cls(folder, opened.enter_context(closing(_connect(folder, "ro"))), writer, clock_ms)
            opened.pop_all()
        return log

    @classmethod
    def reader(cls, folder: Path) -> LocalEventLog:
        """Open a log that this or another process writes, to read only: `append` raises `EventLogError`.

        Raises:
            DataError: there is no log, it is of another format, or damaged.
        """
        if former_partitions(folder):
            raise DataError(f"{folder} is of format 1: start the server once, which converts it when it opens the log")
        if not (folder / _FILE).exists():
            raise DataError(f"{folder / _FILE} does not exist: no log was made there")
        with _refusals(f"{folder} cannot be opened"), ExitStack() as opened:
            log = cls(folder, opened.enter_context(closing(_connect(folder, "ro"))), None, now_ms)
            opened.pop_all()
        return log

    @classmethod
    def describe(cls, folder: Path) -> tuple[str, int | None]:
        """What keeps the log, and its number of partitions; None where there is no log yet.

        Raises:
            DataError: the log is of another format, or damaged.
        """
        server = f"SQLite {sqlite3.sqlite_version}"
        if not (folder / _FILE).exists() and not former_partitions(folder):
            return server, None
        with closing(cls.reader(folder)) as log:
            return server, log.partitions

    @property
    def partitions(self) -> int:
        """See `EventLog`."""
        return self._partitions

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See `EventLog`."""
        writer, logged_ms = self._writable(), self._clock_ms()
        rows = []
        for event in events:
            mark, payload = digest(event.event_id, event.user_id), payload_of(event, logged_ms)
            rows.append((partition_of(event.user_id, self._partitions), mark, payload))
        return writer.append(rows)

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """See `EventLog`."""
        self._check_open()
        check_range(partition, self._partitions, offset, limit)
        with self._reading, _refusals(f"{self._folder} cannot be read"):
            rows = _select(self._database, partition, offset, limit)
            if offset and not (rows and rows[0].offset == offset):
                where = f"partition {partition} of {self._folder}"
                check_kept(offset, *_bounds(self._database, partition), where)
        if rows and not rows[0].is_whole:
            raise DataError(
                f"{self._folder / _FILE} is damaged at offset {rows[0].offset} of partition {partition}: "
                f"restore the file from a copy, or read on from offset {rows[0].offset + 1}"
            )
        records = []
        for row in rows:
            if not row.is_whole:  # the next call, which begins there, says so
                break
            records.append(record_of(row.offset, row.offset + 1, row.payload))
        if records and records[-1].next_offset > self._on_disk[partition]:
            with _refusals(f"{self._folder} cannot be flushed"), suppress(FileNotFoundError):  # copied, so on disk
                sync_path(self._folder / _WAL)
            self._on_disk[partition] = records[-1].next_offset
        return records

    def ends(self) -> list[int]:
        """See `EventLog`."""
        self._check_open()
        with self._reading, _refusals(f"{self._folder} cannot be read"):
            return [_bounds(self._database, partition)[1] for partition in range(self._partitions)]

    def erase(self, partition: int, users: Mapping[int | str, int]) -> int:
        """See `EventLog`."""
        writer = self._writable()
        check_range(partition, self._partitions, 0, 1)
        number, offset, damaged = 0, 0, list[int]()
        while offset < max(users.values(), default=0):
            with self._reading, _refusals(f"{self._folder} cannot be read"):
                rows = _select(self._database, partition, offset, _SCANNED_AT_ONCE)
            if not rows:
                break
            damaged += [row.offset for row in rows if not row.is_whole]
            number += writer.erase(partition, [row for row in rows if row.is_whole and _is_of(row, users)])
            offset = rows[-1].offset + 1
        writer.empty_wal()
        if damaged:
            raise DataError(
                f"{self._folder / _FILE} is damaged at the offsets {damaged} of partition {partition}, nothing is "
                f"erased there ({number} other events are). Restore the file from a copy"
            )
        return number

    def forget(self, partition: int, before: int) -> None:
        """Remove the events before an offset, which every consumer has read; the last event of a partition stays."""
        writer = self._writable()
        check_range(partition, self._partitions, before, 1)
        writer.forget(partition, before)

    def close(self) -> None:
        """See `EventLog`."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._reading, _refusals(f"{self._folder} cannot be closed"):
            self._database.close()
            if self._writer is not None:
                self._writer.close()

    def _writable(self) -> _Writer:
        self._check_open()
        if self._writer is None:
            raise EventLogError(f"{self._folder} was opened to read only: write through LocalEventLog.open")
        return self._writer

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EventLogError(f"{self._folder} is closed")


class _Writer:
    """Writes a log.

    Threads write one at a time, and so do processes, by a lock on a file: no process copies the write-ahead log into
    the database while another one writes. Threads flush outside the lock: the first that needs its events on disk
    flushes for all that have written by then, while others go on writing and share the next flush.
    """

    def __init__(self, folder: Path, partitions: int, sync: Sync, sync_s: float):
        self._folder = folder
        self._sync = sync
        self._refusal = ""
        self._changed = Condition()
        self._flushing = False
        self._closed = Flag()
        with ExitStack() as opened:
            self._turn = os.open(folder / "writer.lock", os.O_RDWR | os.O_CREAT, 0o644)
            opened.callback(os.close, self._turn)
            with self._turns():
                self._database = opened.enter_context(closing(_connect(folder, "rwc")))
                self._database.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
                self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute("PRAGMA secure_delete = ON")
                _make(folder, self._database, partitions)
                self._ends = [_bounds(self._database, partition)[1] for partition in range(partitions)]
                self._wal = os.open(folder / _WAL, os.O_RDWR)
                opened.callback(os.close, self._wal)
                os.fsync(self._wal)  # a retry of what a killed writer wrote is acknowledged as a duplicate
                sync_path(folder)
                sync_path(folder.parent)
            self._opened = opened.pop_all()
        self._on_disk = list(self._ends)
        self.flusher = Thread(target=self._flush_every, args=(sync_s,), name="event-log-flush", daemon=True)
        if sync == "interval":
            self.flusher.start()

    def append(self, rows: Sequence[tuple[int, bytes, bytes]]) -> list[Ack]:
        """Write rows of partition, digest and payload whose digests are new; an acknowledgement for each, in order."""
        with self._transaction("cannot take the events, send them again"):
            ends = {partition: _bounds(self._database, partition)[1] for partition in {row[0] for row in rows}}
            acks = []
            for partition, mark, payload in rows:
                acks.append(self._insert(partition, ends[partition], mark, payload))
                ends[partition] += not acks[-1].duplicate
        with self._changed:
            for partition, end in ends.items():
                self._ends[partition] = max(self._ends[partition], end)
        if self._sync == "always":
            self._flush(acks)
        return acks

    def erase(self, partition: int, rows: Sequence[_Row]) -> int:
        """Replace the payloads of rows by stubs of the same length; gives their number."""
        if rows:
            stubs = [
                (row.offset, row.digest, erased_payload(row.payload).ljust(len(row.payload), b"\0")) for row in rows
            ]
            with self._transaction("cannot be erased from"):
                self._database.executemany(
                    f"UPDATE partition_{partition} SET checksum = ?, payload = ? WHERE offset = ?",
                    [(_checksum(*stub), stub[2], stub[0]) for stub in stubs],
                )
        return len(rows)

    def forget(self, partition: int, before: int) -> None:
        """Remove what stands before an offset, but for the last event."""
        with self._transaction("cannot forget events"):
            last = _bounds(self._database, partition)[1] - 1
            self._database.execute(f"DELETE FROM partition_{partition} WHERE offset < ?", (min(before, last),))

    def empty_wal(self) -> None:
        """Copy the write-ahead log into the database and empty it."""
        with self._changed, _refusals(f"{self._folder} cannot be erased from"), self._turns():
            self._check()
            [(is_busy, *_)] = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if is_busy:
            raise EventLogError(
                f"{self._folder / _WAL} still holds what was erased, because it is being read: try again"
            )

    def close(self) -> None:
        """Flush and close; whoever still waits is refused."""
        self._closed.set()
        if self.flusher.is_alive():
            self.flusher.join()
        with self._changed, self._opened:
            while self._flushing:
                self._changed.wait()
            refused, self._refusal = self._refusal, f"{self._folder} is closed"
            self._opened.enter_context(self._turns())
            if not refused:
                with _refusals(f"{self._folder}: the last flush failed"):
                    os.fsync(self._wal)

    def _insert(self, partition: int, offset: int, mark: bytes, payload: bytes) -> Ack:
        table, row = f"partition_{partition}", _Row(offset, mark, _checksum(offset, mark, payload), payload)
        done = self._database.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO NOTHING", row)
        if done.rowcount:
            return Ack(partition, offset, duplicate=False)
        [(offset,)] = self._database.execute(f"SELECT offset FROM {table} WHERE digest = ?", (mark,))
        return Ack(partition, offset, duplicate=True)

    def _flush(self, acks: Sequence[Ack]) -> None:
        """Return when these events are on disk."""
        with self._changed:
            while not (is_done := all(ack.offset < self._on_disk[ack.partition] for ack in acks)) and self._flushing:
                self._changed.wait()
            if is_done:
                return
            self._check()
            self._flushing, ends = True, list(self._ends)
        try:
            self._fsync()
            self._on_disk = ends
        finally:
            with self._changed:
                self._flushing = False
                self._changed.notify_all()

    def _flush_every(self, sync_s: float) -> None:
        while not self._closed.wait(sync_s):
            try:
                self._fsync()
            except EventLogError as error:  # appends are refused from now on
                _LOGGER.error("%s", error)
                return

    def _fsync(self) -> None:
        try:
            with _refusals(f"{self._folder}: a flush failed"):
                os.fsync(self._wal)
        except BaseException as error:
            self._refusal = f"{self._folder}: a flush failed ({error!r}); check the disk and open the log again"
            raise

    def _check(self) -> None:
        """Refuse once a flush has failed: the kernel drops the pages, and a second flush would say that all is well."""
        if self._refusal:
            raise EventLogError(self._refusal)

    @contextmanager
    def _transaction(self, failure: str) -> Iterator[None]:
        """A transaction of this thread and this process alone, whole or not at all."""
        with self._changed, _refusals(f"{self._folder} {failure}"), self._turns():
            self._check()
            with _transaction(self._database):
                yield

    @contextmanager
    def _turns(self) -> Iterator[None]:
        """Hold the lock by which processes take turns."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)


def _connect(folder: Path, mode: str) -> sqlite3.Connection:
    uri = f"{(folder / _FILE).absolute().as_uri()}?mode={mode}"
    database = sqlite3.connect(uri, uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    database.text_factory = bytes  # there is text only where there is damage
    return database


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _make(folder: Path, database: sqlite3.Connection, partitions: int) -> None:
    """Make the tables of a new log, fill them from a log of format 1, or check that those that are there agree."""
    database.execute("PRAGMA journal_mode = WAL")
    made = _format_of(database) != 0
    found = _partitions_of(folder, database) if made else former_partitions(folder) or partitions
    if found != partitions:
        raise ConfigError(
            f"{folder} has {found} partitions, {partitions} are asked for: a log keeps the number that it was made "
            f"with; set partitions = {found}, or use another folder"
        )
    if not made:
        with _transaction(database):
            for partition in range(partitions):
                table = f"partition_{partition}"
                database.execute(
                    f"CREATE TABLE {table} (offset INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, "
                    "checksum INTEGER NOT NULL, payload BLOB NOT NULL)"
                )
                for at, mark, payload in former_records(folder, partition):
                    row = (at, mark, _checksum(at, mark, payload), payload)
                    database.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?)", row)
            database.execute(f"PRAGMA user_version = {_FORMAT}")
    if former_partitions(folder):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        remove_former(folder)


def _format_of(database: sqlite3.Connection) -> int:
    [(found,)] = database.execute("PRAGMA user_version")
    return int(found)


def _partitions_of(folder: Path, database: sqlite3.Connection) -> int:
    if (found := _format_of(database)) != _FORMAT:
        raise DataError(f"{folder / _FILE} is of format {found}, expected {_FORMAT}: another version wrote this log")
    [(partitions,)] = database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'")
    return int(partitions)


def _select(database: sqlite3.Connection, partition: int, offset: int, limit: int) -> list[_Row]:
    """Up to `limit` rows of a partition from an offset on."""
    query = (
        f"SELECT rowid, digest, checksum, payload FROM partition_{partition} WHERE rowid >= ? ORDER BY rowid LIMIT ?"
    )
    return [_Row(*row) for row in database.execute(query, (offset, limit))]


def _bounds(database: sqlite3.Connection, partition: int) -> tuple[int, int]:
    """The first offset that a partition keeps, and the offset of the next event."""
    table = f"partition_{partition}"
    [(first, last)] = database.execute(f"SELECT (SELECT min(offset) FROM {table}), (SELECT max(offset) FROM {table})")
    return (0, 0) if last is None else (first, last + 1)


def _checksum(offset: int, mark: bytes, payload: bytes) -> int:
    return int(google_crc32c.extend(google_crc32c.value(_PLACE.pack(offset, mark)), payload))


def _is_of(row: _Row, users: Mapping[int | str, int]) -> bool:
    user_id = user_of(row.payload)
    return user_id is not None and row.offset < users.get(user_id, 0)


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Give what the operating system or SQLite refuses as the log's own error."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # UnicodeDecodeError: a message with names that are damaged
        if isinstance(error, UnicodeDecodeError) or getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
            raise DataError(
                f"{what}: {error}. Restore {_FILE} from a copy, or save what is whole with sqlite3 and .recover"
            ) from error
        raise EventLogError(f"{what}: {error}") from error
    except OSError as error:
        raise EventLogError(f"{what}: {error}") from error
