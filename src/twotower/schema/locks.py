"""Locks on files: one process at a time does a piece of work. The system releases the locks of a process that ends."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from twotower.schema.errors import TwotowerError

Busy = Callable[[str], TwotowerError]
"""Makes the error for a lock that is held, from words for its holder, such as `another process (4711)`."""


def take_lock(path: Path, busy: Busy, *, wait: bool = False) -> FileLock:
    """Lock a file, which is made and stays, until `release` of what this gives or until the process ends.

    Raises:
        TwotowerError: what `busy` gives, where another process, or another caller in this one, holds the lock; with
            `wait`, this waits instead.
    """
    lock = FileLock(path, timeout=-1 if wait else 0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise busy(_holder(path)) from None
    path.write_text(f"{os.getpid()}\n", encoding="ascii")
    return lock


@contextmanager
def locked(path: Path, busy: Busy, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock; arguments and errors as of `take_lock`."""
    lock = take_lock(path, busy, wait=wait)
    try:
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """The holder of a lock in words, with its process id where it wrote one."""
    try:
        noted = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        noted = ""
    return f"another process ({noted})" if noted.isdigit() else "another process"
