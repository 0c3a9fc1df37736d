"""A data set as it was downloaded: a folder, or a `.zip` or `.tar` archive of one."""

import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Final

from twotower.schema.errors import DataError

ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")


def is_archive(path: Path) -> bool:
    """A file has the name of an archive."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()


@contextmanager
def opened(src: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """A folder with the wanted files, by their name, and the names of an archive's other files.

    A folder or a plain file is given as it is. Of an archive the wanted files are unpacked into a temporary folder,
    which is removed afterwards; errors name the archive.

    Raises:
        DataError: there is nothing, the archive is damaged, or there is no room to unpack it.
    """
    if not src.exists():
        raise DataError(f"{src} does not exist")
    if not is_archive(src):
        yield src, ()
        return
    with tempfile.TemporaryDirectory(prefix="twotower-") as folder:
        try:
            others = _unpack(src, wanted, Path(folder))
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise DataError(f"{src} cannot be unpacked, it is cut or damaged, or the disk is full: {error}") from None
        root = Path(folder)
        while [entry.is_dir() for entry in root.iterdir()] == [True]:
            root = next(root.iterdir())
        try:
            yield root, others
        except DataError as error:
            raise DataError(str(error).replace(str(root), str(src))) from None


def _unpack(src: Path, wanted: Callable[[str], bool], folder: Path) -> tuple[str, ...]:
    """Write the wanted files of an archive below a folder; the names of the others are returned."""
    others = []
    for name, stream in _members(src):
        path = PurePosixPath(name)
        parts = [part for part in path.parts if part not in ("/", "..", ".")]
        if any(part.startswith(("._", "__MACOSX")) for part in parts):
            continue
        if not wanted(path.name):
            others.append(f"{src}/{name}")
            continue
        target = folder.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with stream() as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    return tuple(sorted(others))


def _members(src: Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """The names of an archive's plain files, and how each is opened."""
    if src.suffix.lower() == ".zip":
        with zipfile.ZipFile(src) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, partial(archive.open, entry)
        return
    with tarfile.open(src) as packed:
        for member in packed:
            if member.isfile():
                yield member.name, partial(_of_tar, packed, member)


def _of_tar(packed: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = packed.extractfile(member)
    assert stream is not None  # it is a plain file
    return stream
