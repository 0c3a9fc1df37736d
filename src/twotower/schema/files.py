"""Files that are whole or absent: temporary name, flush to disk, rename.

A reader never sees half a file or half a folder, whenever the writer is killed. What a killed writer leaves behind
has a name that begins with `.tmp-` and is removed by the next writer of the same name.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from twotower.schema.errors import DataError

TEMPORARY = ".tmp-"
MANIFEST = "manifest.json"
MOST_JSON_BYTES: Final = 1 << 28
"""Largest JSON document that is read: Python needs several times as much memory for it."""
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""How files are opened: one that is no file, such as a pipe that nobody writes to, must not hold the process."""
_AT_ONCE: Final = 1 << 20


def sync_path(path: Path) -> None:
    """Flush a file to disk, or a folder's own entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path` in one rename, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`, replacing what stood there, else it is removed.

    Replacing takes two renames (folders cannot be exchanged portably): a reader in that instant finds the folder
    absent, never mixed. Folders that are read while the system runs (versions) are never replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    old = path.parent / f"{TEMPORARY}old-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in (*names, "."):
                sync_path(Path(root, name))
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_path(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder, by name, without those that are still being written."""
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith(TEMPORARY))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document, whole or not at all; keys are sorted, so that the same content gives the same bytes."""
    with whole_file(path) as temporary:
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def opened_file(path: Path) -> Iterator[int]:
    """A descriptor of a regular file, to read from; nothing else is opened, and opening never waits.

    Raises:
        DataError: the file is missing, cannot be read, or is a folder, a pipe or a device.
    """
    try:
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DataError(f"{path} is no regular file: a folder, a pipe or a device cannot be read here")
        yield descriptor
    finally:
        os.close(descriptor)


def map_file(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file, mapped into memory and read-only.

    The file must not be cut while it is mapped: the system ends a process that reads behind the end of a file (SIGBUS).
    Files that are replaced by a rename do no harm.

    Raises:
        DataError: as of `opened_file`.
    """
    with opened_file(path) as descriptor:
        if not os.fstat(descriptor).st_size:
            return b""
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be mapped into memory: {error}") from None


def map_batches(path: Path) -> tuple[list[pa.RecordBatch], pa.Schema]:
    """All batches of a file, mapped into memory and checked, and their schema.

    Raises:
        DataError: the file is missing, is not of this format, or leads out of itself.
    """
    source = pa.py_buffer(map_file(path))
    try:
        stored = pa.ipc.open_file(source)
        batches = [stored.get_batch(number) for number in range(stored.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return batches, stored.schema


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON document.

    Raises:
        DataError: the file is missing, is not JSON, has numbers that are not finite (`NaN`, `1e999`), is nested too
            deeply, or has more bytes than are allowed.
    """
    with opened_file(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most_bytes:
            raise DataError(f"{path} has {size} bytes, where at most {most_bytes} are read: it was not written by this")
        try:
            with open(descriptor, "rb", closefd=False) as file:
                text = file.read(most_bytes + 1).decode("utf-8")
            return json.loads(text, parse_constant=_finite, parse_float=_finite)
        except RecursionError:
            raise DataError(f"{path} is nested too deeply: it was not written by this") from None
        except (ValueError, OSError) as error:
            raise DataError(
                f"{path} is not readable JSON ({error}): it was damaged or written by something else"
            ) from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


Kind = type | tuple[type, ...]


def check_fields(content: Any, fields: Mapping[str, Kind], where: str) -> dict[str, Any]:
    """A JSON object that has some fields, each of its type.

    Raises:
        DataError: it is no object, a field is missing or of another type; the message says which.

    >>> check_fields({"a": True}, {"a": int}, "x.json")
    Traceback (most recent call last):
    ...
    twotower.schema.errors.DataError: x.json: a is of type bool, where int is expected: it was damaged
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} is of type {type(content).__name__}, where an object is expected: it was damaged")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in content:
            raise DataError(f"{where} has no {name}: it was damaged")
        if type(content[name]) not in kinds:
            raise DataError(
                f"{where}: {name} is of type {type(content[name]).__name__}, where "
                f"{' or '.join(one.__name__ for one in kinds)} is expected: it was damaged"
            )
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a folder except its manifest, by relative path in sorted order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def check_listing(folder: Path, listing: Any) -> list[str]:
    """Compare a folder with the listing of its manifest; one sentence for each listed file that is not as it was.

    Only regular files inside the folder are opened, and no links are followed. Files that are not listed are ignored.
    """
    if not isinstance(listing, dict):
        return [f"the manifest lists its files as {type(listing).__name__}, where an object is expected"]
    problems = []
    for name, expected in listing.items():
        try:
            check_fields(expected, {"bytes": int, "sha256": str}, f"the manifest's entry of {name!r}")
            if problem := _difference(folder, name, expected["bytes"], expected["sha256"]):
                problems.append(problem)
        except DataError as error:
            problems.append(str(error))
    return problems


def _difference(folder: Path, name: str, size: int, digest: str) -> str | None:
    """How a file differs from what a manifest says of it, None where it does not."""
    try:
        descriptor = _open_inside(folder, name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return f"{name} is missing"
        link = error.errno in (errno.ELOOP, errno.ENOTDIR)
        return f"{name} {'is a link, or behind one' if link else f'cannot be opened: {error.strerror}'}"
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no regular file"
        if status.st_size != size:
            return f"{name} has {status.st_size} bytes, the manifest says {size}"
        same = _sha256_of(descriptor, size) == digest
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    finally:
        os.close(descriptor)
    return None if same else f"{name} does not have the SHA-256 of the manifest"


def _sha256_of(descriptor: int, size: int) -> str:
    """The SHA-256 of the first bytes of a file, and no more: it may grow without end."""
    hashed = hashlib.sha256()
    while size and (read := os.read(descriptor, min(size, _AT_ONCE))):
        hashed.update(read)
        size -= len(read)
    return hashed.hexdigest()


def _open_inside(folder: Path, name: str) -> int:
    """Open a file below a folder, following no link on the way; a name that leads out of it is a `DataError`."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts) or not name.isprintable():
        raise DataError(f"{name!r} is no name of a file inside the folder")
    within = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
            deeper = os.open(part, flags, dir_fd=within)
            os.close(within)
            within = deeper
        return os.open(parts[-1], _READ | os.O_NOFOLLOW, dir_fd=within)
    finally:
        os.close(within)
