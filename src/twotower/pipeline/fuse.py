"""Choosing how channels are fused on parts of the training events, never on the test set.

All channels are trained and fitted on the rest of the training events, and give their lists once. With several parts,
each is held out of what the one before it left. The choice is written to `fusion.json` of the workspace, and goes into
every version that is published from there.
"""

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.channels.fit import OwnChannels
from twotower.channels.lists import end_to_end
from twotower.channels.retriever import Candidates
from twotower.config.load import as_dict
from twotower.config.settings import Settings
from twotower.evaluate.holdout import Truth, candidates, held_out
from twotower.features.columns import concatenate, take
from twotower.fusion.choose import choose
from twotower.pipeline.line import FUSION, build_samples, offline_channels, train_model
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.tune import identity, validation_workspace, with_values
from twotower.samples.read import open_samples
from twotower.schema.errors import ConfigError
from twotower.schema.files import write_json

log = logging.getLogger(__name__)

FUSING = "fusing"
_DECIDING = ("features", "samples", "models", "train")
"""Sections that make the channels what they are."""


@dataclass(frozen=True)
class FuseReport:
    """What `twotower fuse` prints."""

    path: str
    """The file with what was chosen."""
    weights: dict[str, float]
    users: int
    """Users of validation, on whom the weights were chosen."""
    recall: dict[str, dict[str, float]]
    """On validation, of each channel, of the fusion (on users that it was not chosen on) and of equal weights."""
    gain: dict[str, Any]
    """Gain of the fusion over the best channel, in all and for each part."""


def fuse(settings: Settings, own: OwnChannels | None = None) -> FuseReport:
    """Choose weights and constants on validation parts, for the versions published from now on.

    `own` trains a user's own channels on the samples of each part; a version cannot be published with these.

    Raises:
        ConfigError: there is a single channel.
        DataError: a part leaves no events to learn from.
    """
    check_ready(settings, trained=True)
    if len(settings.models.channels) < 2 and own is None:
        raise ConfigError(f"models.channels = {settings.models.channels}: fusing takes two channels or more")
    options = settings.fusion
    folder = places(settings).workspace / FUSING / identity(settings, (*_DECIDING, "tune"))
    parts, found_lists = [settings], []
    for number in range(options.parts):
        parts.append(part_before(parts[-1], folder / f"part-{number + 1}"))
    for part in parts[1:]:
        samples_of(part)
    for number, part in enumerate(parts[1:]):
        log.info("validation part %d of %d", number + 1, options.parts)
        found_lists.append(
            lists_of(part, math.ceil(options.users / options.parts), max(*options.k, options.depth), own)
        )
    lists = {name: end_to_end([part_lists.lists[name] for part_lists in found_lists]) for name in found_lists[0].lists}
    users = [len(part_lists.truth.user_rows) for part_lists in found_lists]
    items = concatenate([part_lists.truth.items for part_lists in found_lists])
    ks = sorted({min(k, found_lists[0].items) for k in options.k})
    chosen = choose(lists, items, ks, settings.train.seed, np.repeat(np.arange(len(found_lists)), users))
    recall = {**chosen.channels, "fused": chosen.fused, "equal_weights": chosen.equal}
    gain = {"value": round(chosen.gain.value, 5), "ci95": [round(bound, 5) for bound in chosen.gain.ci95 or ()]}
    gain["by_part"] = list(chosen.by_part)
    path = places(settings).workspace / FUSION
    document = {key: value for key, value in as_dict(settings).items() if key in (*_DECIDING, "tune", "fusion")}
    write_json(
        path,
        {
            **asdict(chosen.fusion),
            "depth": options.depth,
            "channels": list(lists),
            "validation": {"users": chosen.users, "recall": recall, "gain": gain},
            "configuration_sha256": hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest(),
        },
    )
    return FuseReport(str(path), dict(chosen.fusion.weights), chosen.users, recall, gain)


@dataclass(frozen=True)
class Lists:
    """The lists of all channels for the users of one validation part."""

    lists: dict[str, Candidates]
    truth: Truth
    items: int
    """Size of the catalogue, which all parts share."""


def part_before(settings: Settings, folder: Path) -> Settings:
    """The configuration of a validation part: its workspace has the events that the part leaves to learn from.

    The next part is made from this one. Its rule is absent, so that the rule of this part is applied again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workspace = validation_workspace(settings, folder)
    return with_values(settings, {"workspace.path": str(workspace), "tune.holdout": None})


def samples_of(settings: Settings) -> None:
    """Make the samples of a validation part, and check that it can judge, before anything is trained.

    Raises:
        DataError: a part has no held-out positive of a user and an item that its samples know.
    """
    where = places(settings)
    if not where.samples.exists():
        build_samples(settings)
    held_out(where.workspace, open_samples(where.samples), settings.evaluate.context)


def lists_of(settings: Settings, users: int, depth: int, own: OwnChannels | None = None) -> Lists:
    """Train all channels, and request their lists for some users."""
    where = places(settings)
    train_model(settings)
    samples = open_samples(where.samples)
    truth = some_users(held_out(where.workspace, samples, settings.evaluate.context), users, settings.train.seed)
    lists = {}
    for name, channel in offline_channels(settings, samples, own).items():
        log.info("lists of %s", name)
        lists[name] = candidates(samples, channel, truth.user_rows, min(len(samples.items), depth), truth.context)
    return Lists(lists, truth, len(samples.items))


def some_users(truth: Truth, most: int, seed: int) -> Truth:
    """A random part of the users, with their items."""
    if len(truth.user_rows) <= most:
        return truth
    kept = np.sort(np.random.default_rng(seed).permutation(len(truth.user_rows))[:most])
    context = {name: take(column, kept) for name, column in truth.context.items()}
    return Truth(truth.user_rows[kept], take(truth.items, kept), context)
