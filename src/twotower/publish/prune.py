"""Remove old versions, and the collections of a vector database that no version names."""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from twotower.index.options import IndexOptions
from twotower.publish.collections import prune_collections
from twotower.publish.publish import current, list_versions, one_promoter, one_publisher
from twotower.publish.version import read_manifest
from twotower.schema.files import TEMPORARY

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What was removed."""

    versions: list[str] = field(default_factory=list)
    """Ids of versions, removed with their deltas."""
    collections: list[str] = field(default_factory=list)
    """Names of collections in the vector database."""


def prune(
    versions: Path, deltas: Path, index: IndexOptions, keep: int | None = None, *, dry_run: bool = False
) -> Pruned:
    """Remove old versions, then the collections that no version names.

    A collection without a version is what a killed publisher left. While this runs, nobody can publish.

    Args:
        versions: the folder of all versions.
        deltas: the folder of their deltas.
        index: the options of the index: where the vector database is.
        keep: number of the latest versions to keep, beside the served one and its parent; None = all are kept.
        dry_run: only say what would be removed.

    Raises:
        UnavailableError: the vector database does not answer.
        VersionError: another process is publishing, or a version cannot be read.
    """
    with one_publisher(versions):
        with one_promoter(versions):  # what is promoted is kept
            old = [] if keep is None else _old(versions, keep)
            prune_collections(versions, index, removed=old, dry_run=True)  # an error comes before anything is removed
            leaving = [versions / f"{TEMPORARY}{version_id}" for version_id in old]
            for version_id, path in zip(old, leaving, strict=True) if not dry_run else ():
                log.info("removing version %s", version_id)
                (versions / version_id).rename(path)  # removed as a whole, also if this is killed
        if not dry_run:
            for version_id, path in zip(old, leaving, strict=True):
                shutil.rmtree(path)
                shutil.rmtree(deltas / version_id, ignore_errors=True)
        return Pruned(old, prune_collections(versions, index, removed=old, dry_run=dry_run))


def _old(versions: Path, keep: int) -> list[str]:
    """Ids of the versions that are not kept, oldest first."""
    ids = [version.id for version in list_versions(versions)]
    served = current(versions)
    kept = {*ids[-keep:], served}
    if served in ids:
        kept.add(read_manifest(versions / served)["parent"])
    return [version_id for version_id in ids if version_id not in kept]
