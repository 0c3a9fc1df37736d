"""`update`: the updaters of `twotower.update`, out of a configuration."""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from twotower.config.available import check_available
from twotower.config.load import as_dict
from twotower.config.settings import Settings
from twotower.datasets.places import Places
from twotower.datasets.tables import end_of_day
from twotower.features.feature_set import load as load_features
from twotower.logs import EventLog, open_reader
from twotower.pipeline.line import (
    LATEST,
    make_samples,
    open_served,
    publish_version,
    train_from,
    train_ranker_from,
)
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.streaming import until_signals
from twotower.publish.delta import last_seq
from twotower.publish.overlay import EntityChanges, as_served
from twotower.publish.publish import current_path, list_versions, promote, verify
from twotower.publish.version import TWO_TOWER, VECTOR_CHANNELS, Version, open_version, read_manifest
from twotower.samples.fitting import PreviousFeatures
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError, VersionError
from twotower.schema.files import MANIFEST, check_fields, read_json, write_json
from twotower.train.checkpoint import FINISHED, TENSORS, Checkpoint, load_model, open_checkpoint
from twotower.train.towers import check_loss
from twotower.update.bounds import Bounds
from twotower.update.chain import Chain
from twotower.update.full import check_version, due_days, fold, read_entities, rows_of_day
from twotower.update.gate import Limits
from twotower.update.incremental import UpdateReport, catch_up, update_incremental
from twotower.update.learner import Learning

log = logging.getLogger(__name__)

FULL = "full"
"""Beside the latest checkpoints: the days of the full chain. Training anew begins another chain."""
FULL_LOCK = ".full.lock"
LEAST_ROWS = 2
"""A day with fewer positives has nothing to learn."""


def learn(settings: Settings, *, follow: bool, dry_run: bool) -> UpdateReport:
    """The incremental update of a workspace's served version."""
    check_available(settings)
    where = places(settings)
    with ExitStack() as opened:
        event_log = _event_log(settings, opened)
        stopped = opened.enter_context(until_signals(follow))
        return update_incremental(
            where.versions,
            where.deltas,
            lambda path: open_chain(settings, path, event_log),
            dry_run=dry_run,
            follow_s=settings.update.follow_s if follow else None,
            stopped=stopped.is_set,
            sleep=lambda seconds: _wait(stopped, seconds),
        )


@dataclass(frozen=True)
class FullDay:
    """A day that the full chain has learned."""

    day: str
    checkpoints: dict[str, str]
    """By channel, relative to the folder of all checkpoints."""
    version: str | None
    """None where the day had nothing to learn."""
    refused: list[str] = field(default_factory=list)


def update_full(settings: Settings, *, dry_run: bool) -> UpdateReport:
    """The full update of every day that is due, in order.

    A day that is done is not repeated. The samples after it are replayed onto the new version before it is promoted,
    so that freshness does not fall back at the switch.

    Raises:
        DataError: nothing was trained yet.
        VersionError: none is served yet, or another full update is at work.
    """
    check_ready(settings, trained=True)
    where = places(settings)
    served = current_path(where.versions)
    done = _done(where)
    learned = _learned(where, done)
    watermark = end_of_day(learned.day) if learned.rest_ms is None else learned.rest_ms
    with ExitStack() as opened:
        due = due_days(
            where.events,
            where.shards,
            learned.day,
            learned.rest_ms,
            event_log=_event_log(settings, opened),
            idle_ms=round(settings.stream.idle_s * 1000),
        )
    if dry_run:
        return UpdateReport("full", served.name, 0, 0, watermark, plan={"days": due})
    rows, refused, latest = (
        0,
        list[int](),
        UpdateReport("full", served.name, last_seq(where.deltas, served.name), 0, watermark),
    )
    with _alone(where.workspace / FULL_LOCK):
        for place, day in enumerate(due):
            log.info("full update of %s", day)
            made = _learn_day(settings, where, _done(where), day)
            rows += made.rows
            aside, reasons = [*latest.set_aside, *made.set_aside], [*latest.reasons, *made.reasons]
            latest = replace(made, rows=rows, set_aside=aside, reasons=reasons)
            refused += [place] if made.refused else []
    return replace(latest, refused=refused)


def _learn_day(settings: Settings, where: Places, done: Sequence[FullDay], day: str) -> UpdateReport:
    """One day: samples, towers from yesterday's, a version, its gate, its catch-up, its promotion."""
    previous = {name: open_checkpoint(where.checkpoints / path) for name, path in _checkpoints(where, done).items()}
    until = replace(settings, samples=replace(settings.samples, last_day=day))
    features = load_features(previous[TWO_TOWER].path)
    files = sorted((where.events / f"{c.DATE}={day}").glob("*.parquet"))
    with ExitStack() as opened:
        event_log = _event_log(settings, opened)
        fold(where.workspace, read_entities(event_log) if event_log is not None else EntityChanges(), files)
    make_samples(until, PreviousFeatures(features, settings.update.evict_after_days))
    samples = open_samples(where.samples)
    own = rows_of_day(samples, day, _learned(where, done).of(day))
    served = current_path(where.versions)
    seq = last_seq(where.deltas, served.name)
    if len(own.positives) < LEAST_ROWS:
        _note(where, [*done, FullDay(day, _checkpoints(where, done), None)])
        return UpdateReport("full", served.name, seq, len(own.positives), samples.manifest["watermark_ms"])
    trained = {name: train_from(until, own, name, warm=previous[name]).checkpoint for name in previous}
    rankers = {name: train_ranker_from(until, samples, name).checkpoint for name in settings.models.rankers}
    paths = trained | rankers
    latest = {name: os.path.relpath(path, where.checkpoints) for name, path in paths.items()}
    chain = {name: latest[name] for name in trained}
    towers = open_checkpoint(Path(trained[TWO_TOWER]))
    if read_manifest(served)["checkpoint_sha256"] == towers.tensors_sha256:
        log.info("%s is served already: a run was killed before it could note that", served.name)
        _note(where, [*done, FullDay(day, chain, served.name)], latest)
        return UpdateReport("full", served.name, seq, len(own.positives), samples.manifest["watermark_ms"])
    version = _left_by_a_killed_run(where, served, towers, as_dict(until))
    if version is None:
        version = str(publish_version(until, promoted=False, checkpoints=paths)["version"])
    problems = check_version(
        open_version(served),
        open_version(where.versions / version),
        files,
        settings.samples.untrained_users,
        limits_of(settings),
    )
    if problems:
        log.error("version %s is not promoted: %s", version, "; ".join(problems))
        _note(where, [*done, FullDay(day, _checkpoints(where, done), version, problems)])
        return UpdateReport("full", served.name, seq, len(own.positives), samples.manifest["watermark_ms"], [seq])
    with ExitStack() as opened:
        event_log = _event_log(settings, opened)
        caught_up = catch_up(where.versions / version, where.deltas, lambda path: open_chain(settings, path, event_log))
        promote(where.versions, version)
    _note(where, [*done, FullDay(day, chain, version)], latest)
    return replace(caught_up, kind="full", rows=len(own.positives), refused=[], plan=None)


def _left_by_a_killed_run(where: Places, served: Path, towers: Checkpoint, configuration: dict[str, Any]) -> str | None:
    """The whole version of these towers that was published to follow the served one, if there is one."""
    for listed in list_versions(where.versions):
        path = where.versions / listed.id
        made = read_manifest(path)
        of = (made["parent"], made["checkpoint_sha256"], made["configuration"])
        if of == (served.name, towers.tensors_sha256, configuration) and not verify(path):
            log.info("%s is whole: a run was killed before it promoted that", listed.id)
            return listed.id
    return None


def _checkpoints(where: Places, done: Sequence[FullDay]) -> dict[str, str]:
    """The latest full checkpoint of each channel: yesterday's, or that of the training."""
    if done:
        return done[-1].checkpoints
    path = where.checkpoints / LATEST
    if not path.exists():
        raise DataError(f"{where.checkpoints} has no finished checkpoint: run `twotower run` first")
    found: dict[str, str] = read_json(path)["checkpoints"]
    return {name: one for name, one in found.items() if name in VECTOR_CHANNELS}


@dataclass(frozen=True)
class _Learned:
    """How far the full chain has come."""

    day: str
    """The latest day."""
    rest_ms: int | None
    """Of that day, the time up to which it was learned by the training that began the chain; None = all of it."""

    def of(self, day: str) -> int:
        """The time up to which the requests of a day that is due were learned: of a later day none were, though a click
        on a request of the day before may have come in it.
        """
        return self.rest_ms if self.rest_ms is not None and day == self.day else 0


def _learned(where: Places, done: Sequence[FullDay]) -> _Learned:
    if done:
        return _Learned(done[-1].day, None)
    begun = open_checkpoint(where.checkpoints / _checkpoints(where, done)[TWO_TOWER]).manifest
    if begun["last_day"] is None:
        raise ConfigError("the events have no time: a full update learns days. Use `twotower run`")
    return _Learned(begun["last_day"], begun["watermark_ms"])


def _done(where: Places) -> list[FullDay]:
    path = where.checkpoints / LATEST
    return [FullDay(**day) for day in read_json(path).get(FULL, [])] if path.exists() else []


def _note(where: Places, done: Sequence[FullDay], latest: dict[str, str] | None = None) -> None:
    """Note the days that are done, and the latest checkpoints where they changed, in one rename."""
    path = where.checkpoints / LATEST
    noted = read_json(path) if path.exists() else {}
    kept = noted["checkpoints"] if latest is None else latest
    write_json(path, {**noted, "checkpoints": kept, FULL: [asdict(day) for day in done]})


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VersionError("another full update is at work: wait for it to end") from None
        yield


def _event_log(settings: Settings, opened: ExitStack) -> EventLog | None:
    """The event log to read, where there is one."""
    where, at = places(settings), settings.stream.log
    if at.kind == "local" and not where.log.exists():
        return None
    event_log = open_reader(at, where.log)
    opened.callback(event_log.close)
    return event_log


def open_as_served(settings: Settings, version: str | None = None) -> Version:
    """The served version, or a given one, with its deltas and with what was put or deleted."""
    opened_version = open_served(settings, version)
    with ExitStack() as opened:
        event_log = _event_log(settings, opened)
        entities = read_entities(event_log) if event_log is not None else EntityChanges()
    return as_served(opened_version, places(settings).deltas, entities)


def limits_of(settings: Settings) -> Limits:
    """What the gate is to keep."""
    gate = settings.update.gate
    return Limits(
        gate.most_move,
        gate.most_length,
        gate.most_alike,
        gate.k,
        gate.margin,
        gate.least,
        gate.window,
        gate.index_recall,
        gate.most_accumulated,
        gate.most_rise,
        gate.rise_least,
    )


def bounds_of(settings: Settings) -> Bounds:
    """What one user and one item can move."""
    bounds = settings.update.bounds
    return Bounds(60_000 * bounds.window_min, bounds.pair, bounds.user, bounds.item, bounds.item_share)


def _wait(stopped: threading.Event, seconds: float) -> None:
    stopped.wait(seconds)


def open_chain(settings: Settings, path: Path, event_log: EventLog | None) -> Chain:
    """The chain of the version in a folder, as the configuration learns."""
    where, options = places(settings), settings.update
    torch.set_num_threads(1)  # sums depend on it, and small steps only wait for a second one
    version = open_version(path)
    checkpoint = checkpoint_of(where, version)
    check_loss(checkpoint, None)
    return Chain(
        version,
        lambda: load_model(checkpoint),
        where.deltas,
        where.shards,
        event_log,
        Learning(
            tuple(options.tables),
            settings.train,
            replace(settings.samples.negatives, count=options.negatives, shared=True),
            options.batch_size,
            settings.train.batch_size,
            options.learning_rate or settings.train.table_learning_rate,
            options.negatives_move,
            options.recent,
            options.admit_after,
            options.seed,
        ),
        limits_of(settings),
        options.rows,
        settings.samples.untrained_users,
        settings.serve.exclude != "none",
        options.fold_every,
        bounds_of(settings),
    )


def checkpoint_of(where: Places, version: Version) -> Checkpoint:
    """The checkpoint that a version was made of: networks and optimizer state are in it alone.

    Raises:
        DataError: it is not there any more.
    """
    wanted = version.manifest["checkpoint_sha256"]
    for path in sorted(where.checkpoints.glob(f"*/{FINISHED}/{MANIFEST}")):
        try:
            listed = check_fields(read_json(path), {"files": dict}, str(path))["files"]
            found = check_fields(listed.get(TENSORS), {"sha256": str}, str(path))["sha256"]
        except DataError as error:
            log.warning("%s", error)
            continue
        if found == wanted:
            return open_checkpoint(path.parent)
    raise DataError(
        f"{where.checkpoints} has not the checkpoint that version {version.id} was made of ({wanted[:12]}): restore "
        "it, or train and publish again"
    )
