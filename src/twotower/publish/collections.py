"""The collections of a vector database that versions name: how they are called, checked and dropped.

A collection belongs to one channel of one version, and never changes. Servers search it by this name, so that a
promotion switches towers and vectors together. The name begins with that of the versions' folder, a random number kept
in it: several workspaces can share a database, and each drops only its own.
"""

import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from twotower.index.build import connect
from twotower.index.checks import INDEX_JSON
from twotower.index.database import COLLECTION, Collection, check_content, check_there
from twotower.index.options import ADDRESSES, IndexOptions
from twotower.publish.version import read_manifest
from twotower.schema.errors import DataError, TwotowerError, VersionError, shown
from twotower.schema.files import MANIFEST, check_fields, read_json, whole_file

log = logging.getLogger(__name__)

HOME: Final = ".collections"
"""File of the versions' folder that holds the beginning of the names of its collections."""
_BEGINNING: Final = re.compile("twotower_[0-9a-f]{8}")
_NAMES: Final = "collections"


@contextmanager
def collections_of(versions: Path, version_id: str, index: IndexOptions) -> Iterator[Callable[[str], str | None]]:
    """Names the collections of a version that is being published, and drops them if that fails.

    Gives a function from the name of a channel to that of its collection, None where the index is embedded.
    """
    if index.url is None:
        yield lambda _: None
        return
    prefix = f"{_home(versions)}_{version_id.replace('-', '_').lower()}_"
    try:
        yield lambda channel: prefix + channel
    except BaseException:
        if not (versions / version_id).exists():  # else they are those of a complete version
            try:
                database = connect(index.kind, index.url)
                for name in database.names(prefix):
                    database.drop(name)
            except TwotowerError as error:
                log.warning("what was loaded into the vector database stays until `twotower prune`: %s", error)
        raise


def collections_in(folder: Path) -> dict[str, Any]:
    """The collections of a version that was written to a folder, by channel, for its manifest."""
    written = {
        path.parent.parent.name: read_json(path) for path in sorted(folder.glob(f"channels/*/index/{INDEX_JSON}"))
    }
    return {
        channel: {name: said[name] for name in COLLECTION}
        for channel, said in written.items()
        if said["kind"] in ADDRESSES
    }


def collections_named(manifest: Mapping[str, Any]) -> dict[str, Collection]:
    """The collections that a version's manifest names, by channel; what else a release says of them is passed over.

    Raises:
        VersionError: what it says of them is no collection, or of another kind of database.
    """
    where, named = f"version {manifest.get('id')}: collections of {MANIFEST}", dict[str, Collection]()
    try:
        written = check_fields(manifest, {_NAMES: dict}, where)[_NAMES] if _NAMES in manifest else {}
        for channel, said in written.items():
            check_fields(said, COLLECTION, f"{where}, {channel}")
            named[channel] = Collection(**{name: said[name] for name in COLLECTION})
    except DataError as error:
        raise VersionError(str(error)) from None
    for channel, collection in named.items():
        if collection.kind not in ADDRESSES:
            raise VersionError(
                f"{where}, {channel}: this release has no database of kind {shown(collection.kind)}, but "
                f"{', '.join(ADDRESSES)}"
            )
    return {channel: collection for channel, collection in named.items() if collection.count}


def check_collections(path: Path, *, content: bool = True) -> None:
    """Refuse a version whose collections are not as they were written.

    Args:
        path: of the version.
        content: read every vector; False = only their number is compared.

    Raises:
        UnavailableError: the database does not answer.
        VersionError: a collection is missing, or was changed.
    """
    for collection in collections_named(read_manifest(path)).values():
        (check_content if content else check_there)(collection, connect)


def prune_collections(
    versions: Path, index: IndexOptions, removed: Sequence[str] = (), *, dry_run: bool = False
) -> list[str]:
    """Drop the collections of this folder that no version names; gives their names.

    Args:
        versions: the folder of all versions.
        index: the options of the index.
        removed: ids of versions that do not count, because they are to be removed.
        dry_run: only give the names.

    Raises:
        UnavailableError: the database does not answer.
        VersionError: a version cannot be read, so that it is not known what it names; or the beginning of the names.
    """
    home = versions / HOME
    if index.url is None or not home.exists():
        return []
    named = {
        collection.name
        for path in versions.glob(f"[!.]*/{MANIFEST}")
        if path.parent.name not in removed
        for collection in collections_named(read_manifest(path.parent)).values()
    }
    database = connect(index.kind, index.url)
    dropped = [name for name in database.names(f"{_home(versions)}_") if name not in named]
    for name in dropped if not dry_run else ():
        log.info("dropping %s", name)
        database.drop(name)
    return dropped


def _home(versions: Path) -> str:
    """How the names of all collections of a folder of versions begin.

    Raises:
        VersionError: the file does not say it: tables that are not ours would be dropped.
    """
    path = versions / HOME
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_text(f"twotower_{secrets.token_hex(4)}\n", encoding="utf-8")
    home = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _BEGINNING.fullmatch(home):
        raise VersionError(
            f"{path} says {shown(home)}, where twotower_ and eight digits are expected: restore it from the names of "
            "collections in a manifest.json, or remove it and publish again"
        )
    return home
