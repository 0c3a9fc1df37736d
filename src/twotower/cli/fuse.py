"""Choosing how channels are fused on a part of the training events, never on the test set.

All channels are trained and fitted on the rest of the training events, and give their lists once. What is chosen then
stands in `fusion.json` of the workspace, and goes into every version that is published from there.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from twotower.cli.line import FUSION, held_out, make_samples, offline_channels, places, train_model
from twotower.cli.tune import identity, validation_workspace, with_values
from twotower.config.available import check_available
from twotower.config.load import as_dict
from twotower.config.settings import Settings
from twotower.evaluate.holdout import Truth, candidates
from twotower.features.columns import Bag, take
from twotower.fusion.choose import choose
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
    method: str
    weights: dict[str, float]
    users: int
    """Of the validation part, that it was chosen on."""
    recall: dict[str, dict[str, float]]
    """On validation: of each channel, of the fusion (by users that it was not chosen on) and of equal weights."""
    gain: dict[str, Any]
    """Of the fusion over the best channel."""


def fuse(settings: Settings) -> FuseReport:
    """Choose method, weights and constants on a validation split, for the versions published from now on.

    Raises:
        ConfigError: there is a single channel.
    """
    check_available(settings)
    if len(settings.models.channels) < 2:
        raise ConfigError(f"models.channels = {settings.models.channels}: fusing takes two channels or more")
    options = settings.fusion
    digest = identity(settings, (*_DECIDING, "tune"))
    folder = places(settings).workspace / FUSING / digest
    folder.mkdir(parents=True, exist_ok=True)
    smaller = with_values(settings, {"workspace.path": str(validation_workspace(settings, folder))})
    where = places(smaller)
    if not where.samples.exists():
        make_samples(smaller)
    train_model(smaller)
    samples = open_samples(where.samples)
    truth = some_users(held_out(smaller, samples), options.users, settings.train.seed)
    depth = min(len(samples.items), max(*options.k, options.depth))
    lists = {}
    for name, channel in offline_channels(smaller, samples).items():
        log.info("lists of %s", name)
        lists[name] = candidates(samples, channel, truth.user_rows, depth, truth.context)
    ks = sorted({min(k, len(samples.items)) for k in options.k})
    chosen = choose(lists, truth.items, ks, settings.train.seed)
    recall = {**chosen.channels, "fused": chosen.fused, "equal_weights": chosen.equal}
    gain = {"value": round(chosen.gain.value, 5), "ci95": [round(bound, 5) for bound in chosen.gain.ci95 or ()]}
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
    weights = dict(chosen.fusion.weights)
    return FuseReport(str(path), chosen.fusion.method, weights, chosen.users, recall, gain)


def some_users(truth: Truth, most: int, seed: int) -> Truth:
    """A random part of the users, with their items."""
    if len(truth.user_rows) <= most:
        return truth
    kept = np.sort(np.random.default_rng(seed).permutation(len(truth.user_rows))[:most])
    items = take(truth.items, kept)
    assert isinstance(items, Bag)
    context = {name: take(column, kept) for name, column in truth.context.items()}
    return Truth(truth.user_rows[kept], items, context)
