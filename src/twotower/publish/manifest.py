"""Manifests of versions and deltas: JSON with the SHA-256 of its own content, because a changed digit is still JSON."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twotower.schema.errors import DataError, VersionError
from twotower.schema.files import MANIFEST, Kind, check_fields, read_json, write_json

DIGEST = "digest"
"""Key of the SHA-256 of all other entries."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> str:
    """Write a manifest with its digest, which is returned."""
    own = digest(content)
    write_json(folder / MANIFEST, {**content, DIGEST: own})
    return own


def checked_manifest(folder: Path, kind: str, number: int, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """A manifest of a kind (`version` or `delta`) and format number, checked against its own digest.

    The files that it lists are not checked; `fields` are what is read of it, with their types.

    Raises:
        VersionError: it is missing, damaged, or of another kind or format.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except DataError as error:
        raise VersionError(f"{folder} is no whole {kind}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind or manifest.get("format") != number:
        raise VersionError(f"{folder} is no {kind} of format {number}: it comes from another release; publish again")
    if manifest.get(DIGEST) != digest({key: value for key, value in manifest.items() if key != DIGEST}):
        raise VersionError(
            f"{kind} {folder.name} is damaged: {folder / MANIFEST} does not have its own SHA-256. Restore it or "
            "publish again"
        )
    try:
        return check_fields(manifest, fields, f"{kind} {folder.name}: {MANIFEST}")
    except DataError as error:
        raise VersionError(str(error)) from None


def digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
