"""Files that are whole or absent: temporary name, flush to disk, rename.

A reader never sees half a file or half a folder, whenever the writer is killed. What a killed writer leaves behind
has a name that begins with `.tmp-` and is removed by the next writer of the same name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.schema.errors import DataError

TEMPORARY = ".tmp-"
MANIFEST = "manifest.json"


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush a written file to disk."""
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
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it becomes `path`, replacing what stood there, else it is removed.

    Replacing takes two renames (folders cannot be exchanged portably): a reader that opens files in that instant finds
    the folder absent, never mixed. Folders that are read while they are replaced (versions) have names of their own and
    are never replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    old = path.parent / f"{TEMPORARY}old-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                sync_file(Path(root, name))
            sync_folder(Path(root))
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
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


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable JSON ({error}): it was damaged or written by something else") from None


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


def check_listing(folder: Path, listing: dict[str, dict[str, Any]]) -> list[str]:
    """Compare a folder with the listing of its manifest; one sentence for each listed file that is not as it was.

    Files beyond the listing are not looked at.
    """
    problems = []
    for name, expected in listing.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            problems.append(f"{name} does not have the SHA-256 of the manifest")
    return problems
