"""Fit the channels that are counted, not trained by the loop of the towers, and keep them beside the checkpoints."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

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
"""What reads a counted channel from its folder, by name."""
OwnChannels = Callable[[Samples], Mapping[str, Retriever]]
"""Trains a user's own channels on some samples: by name, anything of the shape of a `Retriever`."""


def fit_channels(
    samples: Samples,
    names: Iterable[str],
    models: ModelsOptions,
    checkpoints: Path,
    *,
    engine: EngineOptions,
    seed: int,
) -> dict[str, Counted]:
    """The counted channels among some names, fitted to samples, or read back if the same were fitted before.

    Args:
        samples: what they are fitted to.
        names: of channels; those that are not counted are passed over.
        models: with the options of each channel.
        checkpoints: the folder of all checkpoints.
        engine: what runs the jobs.
        seed: of the first factors of ALS.
    """
    fitted: dict[str, Counted] = {}
    for name in (name for name in names if name in LOADERS):
        options = asdict(getattr(models, name)) | ({"seed": seed} if name == ALS.name else {})
        identity = json.dumps([samples.manifest["files"], options], sort_keys=True)
        folder = checkpoints / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        if not _whole(folder):
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


def _whole(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and not check_listing(folder, _listed(folder))


def _listed(folder: Path) -> Any:
    content = read_json(folder / MANIFEST)
    return content.get("files") if isinstance(content, dict) else None
