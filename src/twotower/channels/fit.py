"""Fit the channels that are counted, not trained like the towers, and keep them beside the checkpoints."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from twotower.channels.als import ALS
from twotower.channels.item_cf import ITEM_CF, fit_item_cf
from twotower.channels.item_to_item import ItemToItem
from twotower.channels.options import ModelsOptions
from twotower.channels.popular import Popular
from twotower.channels.retriever import Retriever
from twotower.channels.same_category import SameCategory
from twotower.channels.swing import SWING, fit_swing
from twotower.samples.options import EngineOptions
from twotower.samples.read import Samples
from twotower.schema.files import MANIFEST, check_listing, folder_listing, read_json, whole_folder, write_json

log = logging.getLogger(__name__)

Counted = Popular | ItemToItem | ALS | SameCategory
LOADERS: Final[Mapping[str, Callable[[Path], Counted]]] = {
    Popular.name: Popular.load,
    ITEM_CF: partial(ItemToItem.load, ITEM_CF),
    SWING: partial(ItemToItem.load, SWING),
    ALS.name: ALS.load,
    SameCategory.name: SameCategory.load,
}
"""By name of a counted channel, what reads it from its folder."""
OwnChannels = Callable[[Samples], Mapping[str, Retriever]]
"""Trains a user's own channels on samples: by name, any object of the shape of a `Retriever`."""


def fit_channels(
    samples: Samples,
    names: Iterable[str],
    models: ModelsOptions,
    checkpoints: Path,
    *,
    engine: EngineOptions,
    seed: int,
) -> dict[str, Counted]:
    """The counted channels among some names, fitted to samples, or read back if they were fitted before.

    They are kept in `checkpoints`, the folder of all checkpoints. The engine runs the jobs of ItemCF and Swing, the
    seed is for ALS.
    """
    fitted: dict[str, Counted] = {}
    for name in (name for name in names if name in LOADERS):
        options = asdict(getattr(models, name)) | ({"seed": seed} if name == ALS.name else {})
        identity = json.dumps([samples.manifest["files"], options], sort_keys=True)
        folder = checkpoints / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        content = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        if not isinstance(content, dict) or check_listing(folder, content.get("files")):
            log.info("fitting %s", name)
            channel = _fit(samples, name, models, checkpoints, engine=engine, seed=seed)
            with whole_folder(folder) as temporary:
                channel.save(temporary)
                write_json(temporary / MANIFEST, {"kind": name, "files": folder_listing(temporary)})
        fitted[name] = LOADERS[name](folder)
    return fitted


def _fit(
    samples: Samples, name: str, models: ModelsOptions, scratch: Path, *, engine: EngineOptions, seed: int
) -> Counted:
    clicks, items = samples.clicks, len(samples.items)
    if name == ITEM_CF:
        return fit_item_cf(clicks, items, models.item_cf, engine, scratch, positives=samples.positives)
    if name == SWING:
        return fit_swing(clicks, items, models.swing, engine, scratch)
    if name == ALS.name:
        return ALS.fit(clicks, items, models.als, threads=engine.threads, seed=seed)
    if name == SameCategory.name:
        return SameCategory.fit(samples, models.same_category)
    return Popular.fit(samples, models.popular)
