"""Where a server keeps what it learns of users and items between versions: a protocol and its embedded default."""

import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lmdb

from twotower.schema.errors import TwotowerError

log = logging.getLogger(__name__)

MAP_BYTES = 1 << 40
"""Address space that LMDB reserves; a file grows only as far as it is filled."""
FILES = ("data.mdb", "lock.mdb")
_MIN_S, _BYTES_PER_S = 30, 10_000_000
"""Time that reading a store may take: in a damaged one, reading may never end."""


class FeatureStoreError(TwotowerError):
    """The store cannot be opened, read or written: a full disk, a damaged file, a lost connection."""


class FeatureStore(Protocol):
    """Small values by key, written in whole changes; it may be called from several threads at once.

    Every method but `close` raises `FeatureStoreError` if it fails.
    """

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None where there is none."""

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Set or, with None, delete keys of 1 to 511 bytes: all or, after a crash, none. A later `get` sees it."""

    def scan(self, prefix: bytes) -> dict[bytes, bytes]:
        """The values of all keys that begin with a prefix."""

    def clear(self) -> None:
        """Delete every key."""

    def close(self) -> None:
        """Close files and connections; a second call does nothing."""


class LmdbFeatureStore:
    """The embedded store: an LMDB file in a folder, read without locks or copies.

    A killed process loses nothing; after a power cut the latest changes may be gone, but never torn. A damaged store is
    renamed, and an empty one takes its place, because its content can be built again from the event log. LMDB trusts
    its file, and a damaged one would end the process that reads it. So another process reads all of it first.

    Raises:
        FeatureStoreError: the folder holds something else, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (damage := damage_of(folder)) is not None:
                aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
                log.error("%s is damaged (%s): it is set aside as %s and made anew", folder, damage, aside.name)
                folder.rename(aside)
                folder.mkdir()
            self._environment = lmdb.open(str(folder), map_size=MAP_BYTES, metasync=False, max_readers=1024)
        except (lmdb.Error, OSError) as error:
            raise FeatureStoreError(
                f"{folder} cannot be opened: {error}. Remove it: it is made again from the log"
            ) from None

    def get(self, key: bytes) -> bytes | None:
        """See `FeatureStore.get`."""
        with self._transaction(write=False) as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """See `FeatureStore.write`."""
        with self._transaction(write=True) as transaction:
            for key, value in changes.items():
                if value is None:
                    transaction.delete(key)
                else:
                    transaction.put(key, value)

    def scan(self, prefix: bytes) -> dict[bytes, bytes]:
        """See `FeatureStore.scan`."""
        found: dict[bytes, bytes] = {}
        with self._transaction(write=False) as transaction:
            cursor = transaction.cursor()
            for key, value in cursor if cursor.set_range(prefix) else ():
                if not key.startswith(prefix):
                    break
                found[key] = value
        return found

    def clear(self) -> None:
        """See `FeatureStore.clear`."""
        with self._transaction(write=True) as transaction:
            transaction.drop(self._environment.open_db(txn=transaction), delete=False)

    def close(self) -> None:
        """See `FeatureStore.close`."""
        self._environment.close()

    @contextmanager
    def _transaction(self, write: bool) -> Iterator[Any]:
        try:
            with self._environment.begin(write=write) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise FeatureStoreError(f"{self._folder}: {error}") from error


def damage_of(folder: Path) -> str | None:
    """What is wrong with a store; None if all of it can be read, and written to.

    Raises:
        OSError: the disk refuses.
    """
    for name in FILES:
        try:
            mode = os.lstat(folder / name).st_mode
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(mode):
            return f"{name} is no regular file"
    data = folder / FILES[0]
    if not data.exists():
        return None
    allowed_s = _MIN_S + data.stat().st_size / _BYTES_PER_S
    command = [sys.executable, "-P", "-c", _READER, str(folder.resolve())]
    try:
        ended = subprocess.run(command, capture_output=True, timeout=allowed_s, check=False)  # it may not survive
    except subprocess.TimeoutExpired:
        return f"reading it did not end within {allowed_s:.0f} s"
    said = ended.stderr.decode(errors="replace").strip() or "nothing said"
    if ended.returncode < 0:
        return f"reading it ended by signal {-ended.returncode}"
    if ended.returncode == _DAMAGED:
        return said
    if ended.returncode:
        raise OSError(f"it cannot be read: {said.splitlines()[-1]}")
    return None


_DAMAGED = 3
_READER = f"""
import sys, lmdb
try:
    with lmdb.open(sys.argv[1], map_size={MAP_BYTES}, create=False, max_readers=1024) as store:
        before = None
        with store.begin() as reading:
            for key, value in reading.cursor():
                if before is not None and key <= before:
                    raise lmdb.CorruptedError("its keys are not in their order")
                before, size = bytes(key), len(bytes(value))
        writing = store.begin(write=True)
        writing.put(b"check", bytes(1 << 16))
        writing.abort()
except (lmdb.DiskError, lmdb.LockError, lmdb.MapFullError, lmdb.MapResizedError, lmdb.ReadersFullError, MemoryError):
    raise
except lmdb.Error as error:
    if "No space" in str(error) or "Permission" in str(error) or "Read-only" in str(error):
        raise
    print(error, file=sys.stderr)
    sys.exit({_DAMAGED})
"""
