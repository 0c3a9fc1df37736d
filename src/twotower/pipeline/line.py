"""The stages in their order, as a configuration describes them; each takes its own sections of it."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from twotower.channels.fit import Counted, OwnChannels, fit_channels
from twotower.channels.options import PopularOptions
from twotower.channels.popular import check_popular
from twotower.channels.retriever import Retriever
from twotower.channels.same_category import check_attributes
from twotower.channels.vector_channel import VectorChannel
from twotower.config.load import as_dict
from twotower.config.settings import Settings
from twotower.datasets.workspace import HOLDOUT, HOLDOUT_IMPRESSIONS
from twotower.evaluate import page
from twotower.evaluate.channels import evaluate_channels
from twotower.evaluate.holdout import evaluate
from twotower.evaluate.plots import can_plot
from twotower.evaluate.ranking import evaluate_ranker, kept_of_top, read_shown, some_users
from twotower.fusion.fuse import Fusion
from twotower.index.exact import ExactIndex
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.recorded import ASKED, as_made, check_same, fixed_by_samples, fixed_by_training
from twotower.publish.publish import VersionParts, current_path, promote, publish
from twotower.publish.version import (
    NEW_ITEMS,
    PRE_RANK,
    RANK,
    TWO_TOWER,
    VECTOR_CHANNELS,
    Version,
    item_tokens,
    open_version,
)
from twotower.samples import build
from twotower.samples.build import MADE_WITH, SamplesReport
from twotower.samples.fitting import PreviousFeatures
from twotower.samples.read import Samples, open_samples
from twotower.schema.clock import now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import read_json, whole_file, write_json
from twotower.towers.losses import Loss
from twotower.towers.options import PreRankOptions
from twotower.towers.ranker import Ranker, ranker_features
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint import Checkpoint, load_model, load_ranker, open_checkpoint
from twotower.train.models import check_towers
from twotower.train.ranking import RankerReport, train_ranker, trained_impressions
from twotower.train.towers import TrainReport, WarmStart, train
from twotower.worlds.simulate import world_of
from twotower.worlds.truth import evaluate_by_truth

log = logging.getLogger(__name__)

LATEST = "latest.json"
METRICS = "metrics.json"
CHANNELS = "channels"
KEPT_USERS = 200
"""Users of the hold-out whose candidates both rankers are asked about, at most."""
FUSION = "fusion.json"
"""In a workspace: how `twotower fuse` chose to fuse."""


def build_samples(settings: Settings, previous: PreviousFeatures | None = None) -> SamplesReport:
    """Build samples out of the workspace; `previous` as in `samples.build`."""
    check_ready(settings)
    where = places(settings)
    return build.build_samples(
        where.workspace,
        where.samples,
        settings.features,
        settings.models.dimension,
        settings.samples,
        engine=settings.engine,
        impressions=bool(settings.models.rankers),
        previous=previous,
    )


def train_model(settings: Settings, asked: Settings | None = None, *, loss: Loss | None = None) -> TrainReport:
    """Make a checkpoint of each trained channel and ranker; the two towers' report holds the others.

    Args:
        settings: how to train.
        asked: the configuration that trials chose these settings from, which later commands will give; None = the
            settings themselves.
        loss: a loss of your own for the towers, in place of `train.loss`: a function of `Scores` at the top level of
            a file.
    """
    check_ready(settings, trained=True)
    where = places(settings)
    samples = open_samples(where.samples)
    check_samples(settings, samples)
    reports: dict[str, TrainReport] = {}
    for name in trained_channels(settings):
        log.info("training %s", name)
        reports[name] = train_from(settings, samples, name, loss=loss)
    rankers: dict[str, RankerReport] = {}
    for name in settings.models.rankers:
        log.info("training %s", name)
        rankers[name] = train_ranker_from(settings, samples, name)
    made_checkpoints = {name: report.checkpoint for name, report in (reports | rankers).items()}
    latest = {name: os.path.relpath(path, where.checkpoints) for name, path in made_checkpoints.items()}
    made = {MADE_WITH: fixed_by_training(settings), ASKED: fixed_by_training(asked or settings)}
    write_json(where.checkpoints / LATEST, {"checkpoints": latest, **made})
    return replace(reports.pop(TWO_TOWER), channels=reports, rankers=rankers)


def check_samples(settings: Settings, samples: Samples) -> None:
    """Refuse samples from which not everything can be trained and fitted, before anything is.

    Raises:
        ConfigError: they were made with other settings, or a channel needs a feature or a time that they do not have.
        DataError: a ranker cannot learn from their impressions.
    """
    remedy = "run `twotower samples` and train again"
    check_same(samples.manifest.get(MADE_WITH, {}), fixed_by_samples(settings), f"{samples.path} holds samples", remedy)
    for name in trained_channels(settings):
        check_towers(samples.features, settings.models, name)
    for name in settings.models.rankers:
        options = _ranker_options(settings, name)
        ranker_features(samples.features, options)
        trained_impressions(samples, options.calibration_share)
    channels = settings.models.channels
    if "popular" in channels:
        check_popular(samples, settings.models.popular)
    if "same_category" in channels:
        check_attributes(samples, settings.models.same_category)


def _ranker_options(settings: Settings, name: str) -> PreRankOptions:
    return {PRE_RANK: settings.pre_rank, RANK: settings.rank}[name]


def train_ranker_from(settings: Settings, samples: Samples, name: str) -> RankerReport:
    """Make a checkpoint of one ranker, `pre_rank` or `rank`, from given samples."""
    checkpoints, options = places(settings).checkpoints, _ranker_options(settings, name)
    return train_ranker(samples, checkpoints, options, settings.train, name=name)


def trained_channels(settings: Settings) -> list[str]:
    """The configured channels that have towers."""
    return [name for name in settings.models.channels if name in VECTOR_CHANNELS]


def train_from(
    settings: Settings,
    samples: Samples,
    channel: str = TWO_TOWER,
    *,
    loss: Loss | None = None,
    warm: Checkpoint | None = None,
    stop_early: Callable[[int, TwoTower], bool] | None = None,
) -> TrainReport:
    """Make a checkpoint of one channel from given samples: one epoch from `warm`, if given; the rest as in `train`."""
    return train(
        samples,
        places(settings).checkpoints,
        settings.train,
        settings.models,
        settings.samples.negatives,
        channel=channel,
        loss=loss,
        warm=None if warm is None else WarmStart(warm, settings.update.decay),
        stop_early=stop_early,
    )


def fit_counted(settings: Settings, samples: Samples, names: Sequence[str] | None = None) -> dict[str, Counted]:
    """The counted channels among some names, or of all that are configured."""
    checkpoints, channels = places(settings).checkpoints, settings.models.channels if names is None else names
    return fit_channels(
        samples, channels, settings.models, checkpoints, engine=settings.engine, seed=settings.train.seed
    )


def noted_checkpoints(settings: Settings) -> dict[str, Any]:
    """What training noted of the checkpoints that it finished last; empty where there are none."""
    path = places(settings).checkpoints / LATEST
    noted: dict[str, Any] = read_json(path) if path.exists() else {}
    return noted


def as_trained(settings: Settings, channels: Sequence[str] | None = None) -> Settings:
    """A configuration with what trials have chosen for the existing checkpoints.

    Args:
        settings: the configuration.
        channels: the trained channels that are needed; None = all configured ones.

    Raises:
        ConfigError: the checkpoints were trained with other settings.
        DataError: a channel or ranker has no checkpoint.
    """
    needed = trained_channels(settings) if channels is None else channels
    for name in (*needed, *settings.models.rankers):
        latest_checkpoint(settings, name)
    noted = noted_checkpoints(settings)
    where = f"{places(settings).checkpoints} holds checkpoints"
    check_same(noted.get(ASKED, {}), fixed_by_training(settings, needed), where, "run `twotower train` again")
    return as_made(settings, noted.get(MADE_WITH, {}))


def latest_checkpoint(settings: Settings, channel: str = TWO_TOWER) -> Checkpoint:
    """The checkpoint of a channel that training finished last."""
    checkpoints = places(settings).checkpoints
    latest = noted_checkpoints(settings).get("checkpoints", {})
    if channel not in latest:
        raise DataError(f"{checkpoints} has no finished checkpoint of {channel}: run `twotower train` first")
    return open_checkpoint(checkpoints / latest[channel])


def evaluate_model(settings: Settings) -> dict[str, Any]:
    """Metrics of the latest checkpoint and of baselines on the hold-out; they are also kept beside the checkpoint."""
    check_ready(settings, evaluated=True)
    settings = as_trained(settings, [TWO_TOWER])
    where = places(settings)
    samples, checkpoint = open_samples(where.samples), latest_checkpoint(settings)
    counted = replace(settings, models=replace(settings.models, popular=PopularOptions()))
    baselines = fit_counted(counted, samples, ["popular", "item_cf"])
    channels = [channel_of(load_model(checkpoint), samples), *baselines.values()]
    options, seed = settings.evaluate, settings.train.seed
    metrics = evaluate(samples, where.workspace, channels, options, seed=seed)
    if (world := world_of(where.workspace)) is not None:
        metrics["truth"] = evaluate_by_truth(samples, where.workspace, world, channels, options, seed)
    if settings.models.rankers:
        metrics["rankers"] = evaluate_rankers(settings, samples)
    write_json(checkpoint.path.parent / METRICS, metrics)
    return metrics


def evaluate_rankers(settings: Settings, samples: Samples) -> dict[str, Any]:
    """Each ranker on held-out impressions; with both, how much of the ranker's best the pre-ranker keeps.

    Without held-out impressions the result is empty.
    """
    funnel, resamples, seed = settings.funnel, settings.evaluate.bootstrap, settings.train.seed
    path = places(settings).workspace / HOLDOUT_IMPRESSIONS
    if not path.exists():
        log.warning("rankers are not judged: %s does not exist; a hold-out of a log with impressions has it", path)
        return {}
    shown = read_shown(path, samples)
    rankers: dict[str, Ranker] = {
        name: load_ranker(latest_checkpoint(settings, name)) for name in settings.models.rankers
    }
    result: dict[str, Any] = {
        name: evaluate_ranker(samples, shown, ranker, resamples, seed) for name, ranker in rankers.items()
    }
    if len(rankers) < len((PRE_RANK, RANK)):
        return result
    fusion, channels = fusion_of(settings), offline_channels(settings, samples)
    result["kept_of_top"] = kept_of_top(
        samples,
        some_users(shown.user_row, KEPT_USERS),
        lambda queries, k: fusion.retrieve(channels, queries, k).candidates.rows,
        rankers[PRE_RANK],
        rankers[RANK],
        retrieved=funnel.retrieve,
        kept=funnel.pre_rank,
        top=funnel.rank,
        resamples=resamples,
        seed=seed,
    )
    return result


def evaluate_channels_of(settings: Settings, own: OwnChannels | None = None) -> dict[str, Any]:
    """What each channel and the fused list find of the hold-out, `own` channels included (see `offline_channels`).

    JSON and Markdown are kept beside the checkpoint, and a plot where the extra `plots` is installed.
    """
    check_ready(settings, trained=True, evaluated=True)
    settings = as_trained(settings)
    where = places(settings)
    samples = open_samples(where.samples)
    channels = offline_channels(settings, samples, own)
    fusion = fusion_of(settings, channels)
    report = evaluate_channels(
        samples,
        where.workspace,
        channels,
        lambda lists, k: fusion.fuse(lists, k).candidates,
        settings.evaluate,
        depth=fusion.depth,
        seed=settings.train.seed,
    )
    report["fusion"] = asdict(fusion)
    folder = latest_checkpoint(settings).path.parent
    write_json(folder / f"{CHANNELS}.json", report)
    texts = {"md": page.markdown(report)}
    if can_plot():
        texts["svg"] = page.plot(report)
    else:
        log.warning("no plot: it needs matplotlib, pip install 'twotower[plots]'")
    for suffix, text in texts.items():
        with whole_file(folder / f"{CHANNELS}.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return {**report, "files": [str(folder / f"{CHANNELS}.{suffix}") for suffix in ("json", *texts)]}


def channel_of(model: TwoTower, samples: Samples, name: str = TWO_TOWER) -> VectorChannel:
    """A trained channel over an exact index of the whole catalogue."""
    vectors = model.encode_items(samples.items.features)
    index = ExactIndex.build(np.arange(len(vectors)), vectors)
    return VectorChannel(
        name, model.features, item_tokens(model.features, samples.items.ids), model.encode_users, index
    )


def offline_channels(settings: Settings, samples: Samples, own: OwnChannels | None = None) -> dict[str, Retriever]:
    """All channels by name as evaluation asks them: vectors are searched exactly, in the whole catalogue.

    `own` trains a user's own channels on the samples: objects of the shape of a `Retriever`, by name.

    Raises:
        ConfigError: one of them has the name of a configured channel.
    """
    more = own(samples) if own is not None else {}
    if taken := sorted(set(more) & set(settings.models.channels)):
        raise ConfigError(f"{', '.join(taken)}: models.channels has this name already; give your channel another one")
    channels: dict[str, Retriever] = {
        name: channel_of(load_model(latest_checkpoint(settings, name)), samples, name)
        for name in trained_channels(settings)
    }
    channels |= fit_counted(settings, samples)
    if NEW_ITEMS in settings.models.channels:
        towers, most = channels[TWO_TOWER], settings.models.new_items.most_clicks
        assert isinstance(towers, VectorChannel)
        new = towers.index.without(np.flatnonzero(samples.item_positives > most))
        channels[NEW_ITEMS] = towers.over(NEW_ITEMS, new)
    return {**{name: channels[name] for name in settings.models.channels}, **more}


def fusion_of(settings: Settings, names: Iterable[str] | None = None) -> Fusion:
    """How channels (or the configured ones) are fused: as configured, else as `twotower fuse` chose, else all alike.

    Raises:
        DataError: the choice was made among other channels.
    """
    options, channels = settings.fusion, list(settings.models.channels if names is None else names)
    path = places(settings).workspace / FUSION
    given = {
        key: {str(name): value for name, value in getattr(options, key).items() if name in channels}
        for key in ("weights", "constants", "reserved")
    }
    if given["weights"] or given["constants"] or not path.exists():
        return Fusion(**given, depth=options.depth)
    chosen = read_json(path)
    if sorted(chosen["channels"]) != sorted(channels):
        raise DataError(
            f"{path} was chosen for {', '.join(chosen['channels'])}, and the channels are {', '.join(channels)}: run "
            "`twotower fuse` again, remove the file, or give fusion.weights"
        )
    return Fusion(**{name: chosen[name] for name in ("weights", "constants", "depth")}, reserved=given["reserved"])


def publish_version(
    settings: Settings, *, promoted: bool = True, checkpoints: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Make a version of the latest checkpoints, or of given ones by channel and ranker; promote it or not.

    Given ones must be of this configuration. Latest ones of another configuration are refused.
    """
    check_ready(settings, trained=True)
    where, fusion = places(settings), fusion_of(settings)
    if checkpoints is None:
        settings = as_trained(settings)
    samples = open_samples(where.samples)

    def made(name: str) -> Checkpoint:
        return latest_checkpoint(settings, name) if checkpoints is None else open_checkpoint(Path(checkpoints[name]))

    channels = {name: made(name) for name in trained_channels(settings)}
    checkpoint = channels[TWO_TOWER]
    metrics_file = checkpoint.path.parent / METRICS
    metrics = read_json(metrics_file) if metrics_file.exists() else {}
    parts = VersionParts(
        samples,
        where.workspace / "items.parquet",
        channels,
        fit_counted(settings, samples),
        {name: made(name) for name in settings.models.rankers},
        fusion,
    )
    version = publish(
        where.versions,
        parts,
        settings.models,
        settings.index,
        ks=sorted({*settings.evaluate.k, 500, fusion.depth}),
        seed=settings.train.seed,
        recorded={"configuration": as_dict(settings), "metrics": metrics},
        clock_ms=now_ms,
    )
    if promoted:
        promote(where.versions, version)
    return {"version": version, "path": str(where.versions / version), "metrics": metrics}


def run_line(settings: Settings, *, promoted: bool = True) -> dict[str, Any]:
    """Samples, training, evaluation (where there is a hold-out) and publishing in one run."""
    holdout = (places(settings).workspace / HOLDOUT).exists()
    check_ready(settings, trained=True, evaluated=holdout)
    fusion_of(settings)
    report = build_samples(settings)
    log.info("samples: %s", json.dumps(asdict(report)))
    trained = train_model(settings)
    log.info("trained: %s", json.dumps(asdict(trained)))
    if holdout:
        metrics = evaluate_model(settings)
        log.info("evaluated: %s", json.dumps({k: v for k, v in metrics.items() if k.startswith("recall")}))
    return publish_version(settings, promoted=promoted)


def open_served(settings: Settings, version: str | None = None) -> Version:
    """The served version, or a given one."""
    versions = places(settings).versions
    return open_version(versions / version if version else current_path(versions), threads=settings.train.threads)
