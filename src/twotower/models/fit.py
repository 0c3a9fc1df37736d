"""Fit the channels that are counted, not trained, and keep them beside the checkpoints."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from twotower.models.item_cf import ItemCF
from twotower.models.popular import Popular
from twotower.samples.read import Samples
from twotower.schema.files import MANIFEST, check_listing, folder_listing, read_json, whole_folder, write_json

log = logging.getLogger(__name__)

Counted = Popular | ItemCF


def fit_channels(
    samples: Samples, names: Sequence[str], checkpoints: Path, memory_gb: float, threads: int
) -> dict[str, Counted]:
    """The channels `popular` and `item_cf`, fitted to samples or read back if they were fitted to the same before.

    Args:
        samples: what to fit to.
        names: of channels; others than these two are passed over.
        checkpoints: the folder of all checkpoints.
        memory_gb: memory of the engine.
        threads: threads of the engine.
    """
    fitted: dict[str, Counted] = {}
    identity = hashlib.sha256(json.dumps(samples.manifest["files"], sort_keys=True).encode()).hexdigest()[:12]
    for name, kind in (("item_cf", ItemCF), ("popular", Popular)):
        if name not in names:
            continue
        folder = checkpoints / f"{name}-{identity}"
        if not _whole(folder):
            log.info("fitting %s", name)
            channel: Counted = (
                ItemCF.fit(samples.clicks, len(samples.items), memory_gb, threads)
                if kind is ItemCF
                else Popular.fit(samples.item_positives)
            )
            with whole_folder(folder) as temporary:
                channel.save(temporary)
                write_json(temporary / MANIFEST, {"kind": name, "files": folder_listing(temporary)})
        fitted[name] = kind.load(folder)
    return fitted


def _whole(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and not check_listing(folder, read_json(folder / MANIFEST)["files"])
