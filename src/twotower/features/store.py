"""Where a server keeps what it learns of users and items between versions: a protocol and its embedded default."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import lmdb

from twotower.schema.errors import TwotowerError

MAP_BYTES = 1 << 40
"""Address space that LMDB reserves; a file grows only as far as it is filled."""


class FeatureStoreError(TwotowerError):
    """The store cannot be opened, read or written: a full disk, a damaged file, a lost connection."""


class FeatureStore(Protocol):
    """Small values by key, written in whole changes; it may be called from several threads at once.

    Every method but `close` raises `FeatureStoreError` where the store cannot do it.
    """

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None where there is none."""
        ...

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Set or, with None, delete keys: all of them or, after a crash, none. A later `get` sees the change.

        Args:
            changes: values by key, of 1 to 511 bytes.
        """
        ...

    def scan(self, prefix: bytes) -> dict[bytes, bytes]:
        """The values of all keys that begin with a prefix."""
        ...

    def clear(self) -> None:
        """Delete every key."""
        ...

    def close(self) -> None:
        """Give back files and connections; a second call does nothing."""
        ...


class LmdbFeatureStore:
    """The embedded store: an LMDB file, read without locks or copies.

    A killed process loses nothing; after a power cut the latest changes may be gone, but never torn. What is in it can
    be made again from the event log.

    Args:
        folder: its folder, made if it is absent.

    Raises:
        FeatureStoreError: the folder holds something else, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
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
