"""Fit the channels that are counted, not trained by the loop of the towers, and keep them beside the checkpoints."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.channels.als import ALS
from twotower.channels.item_cf import ItemCF
from twotower.channels.popular import Popular
from twotower.channels.same_category import SameCategory
from twotower.channels.swing import Swing
from twotower.samples.read import Samples
from twotower.schema.files import MANIFEST, check_listing, folder_listing, read_json, whole_folder, write_json

log = logging.getLogger(__name__)

Counted = Popular | ItemCF | Swing | ALS | SameCategory
KINDS: dict[str, type[Counted]] = {kind.name: kind for kind in (Popular, ItemCF, Swing, ALS, SameCategory)}
"""The channels by name."""


@dataclass(frozen=True)
class Recipe:
    """How one channel is fitted."""

    options: dict[str, Any]
    """All that the result depends on beside the samples, to be told from others by."""
    fit: Callable[[], Counted]


def fit_channels(samples: Samples, recipes: Mapping[str, Recipe], checkpoints: Path) -> dict[str, Counted]:
    """Channels by name, fitted to samples or read back if the same were fitted before.

    Args:
        samples: what the recipes fit to.
        recipes: by name of the channel.
        checkpoints: the folder of all checkpoints.
    """
    fitted: dict[str, Counted] = {}
    for name, recipe in recipes.items():
        identity = json.dumps([samples.manifest["files"], recipe.options], sort_keys=True)
        folder = checkpoints / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        if not _whole(folder):
            log.info("fitting %s", name)
            channel = recipe.fit()
            with whole_folder(folder) as temporary:
                channel.save(temporary)
                write_json(temporary / MANIFEST, {"kind": name, "files": folder_listing(temporary)})
        fitted[name] = KINDS[name].load(folder)
    return fitted


def _whole(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and not check_listing(folder, _listed(folder))


def _listed(folder: Path) -> Any:
    content = read_json(folder / MANIFEST)
    return content.get("files") if isinstance(content, dict) else None
