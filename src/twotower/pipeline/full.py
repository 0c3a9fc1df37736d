"""`update full`: every day that is whole, as a new version, out of a configuration."""

import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twotower.config.load import as_dict
from twotower.config.settings import Settings
from twotower.datasets.places import Places
from twotower.datasets.tables import end_of_day
from twotower.features.feature_set import load as load_features
from twotower.pipeline.line import LATEST, build_samples, publish_version, train_from, train_ranker_from
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.updating import check_held_out, entities_of, event_log_of, open_chain
from twotower.publish.delta import last_seq
from twotower.publish.publish import current_path, list_versions, promote, verify
from twotower.publish.version import TWO_TOWER, VECTOR_CHANNELS, open_version, read_manifest
from twotower.samples.fitting import PreviousFeatures
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError, VersionError
from twotower.schema.files import read_json, write_json
from twotower.schema.locks import locked
from twotower.train.checkpoint import Checkpoint, open_checkpoint
from twotower.update.full import check_version, due_days, fold, rows_of_day
from twotower.update.incremental import UpdateReport, catch_up

log = logging.getLogger(__name__)

FULL = "full"
"""Key of the days of the full chain, beside the latest checkpoints. Training again begins another chain."""
FULL_LOCK = ".full.lock"
MIN_ROWS = 2
"""A day with fewer positives has nothing to learn."""


@dataclass(frozen=True)
class FullDay:
    """A day that the full chain has learned."""

    day: str
    checkpoints: dict[str, str]
    """By channel, relative to the folder of all checkpoints."""
    version: str | None
    """None where the day had nothing to learn."""
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reached:
    """How far the full chain has come."""

    day: str
    """The latest day."""
    rest_ms: int | None
    """The time of that day up to which the training that began the chain learned it; None = all of it."""

    @property
    def watermark_ms(self) -> int:
        """The time up to which requests were learned."""
        return end_of_day(self.day) if self.rest_ms is None else self.rest_ms

    def learned_ms(self, day: str) -> int:
        """The time up to which the requests of a day that is not done were learned: 0 for a later day, though a click
        on a request of the day before may have come in it.
        """
        return self.rest_ms if self.rest_ms is not None and day == self.day else 0


@dataclass(frozen=True)
class _FullChain:
    """The full chain of a workspace: each day's training begins with the parameters of the day before."""

    where: Places
    days: list[FullDay]
    checkpoints: dict[str, str]
    """The latest full checkpoint of each channel: yesterday's, or that of the training."""

    @classmethod
    def read(cls, where: Places) -> "_FullChain":
        path = where.checkpoints / LATEST
        if not path.exists():
            raise DataError(f"{where.checkpoints} has no finished checkpoint: run `twotower run` first")
        noted = read_json(path)
        days = [FullDay(**day) for day in noted.get(FULL, [])]
        trained = {name: path for name, path in noted["checkpoints"].items() if name in VECTOR_CHANNELS}
        return cls(where, days, days[-1].checkpoints if days else trained)

    @property
    def reached(self) -> Reached:
        if self.days:
            return Reached(self.days[-1].day, None)
        begun = open_checkpoint(self.where.checkpoints / self.checkpoints[TWO_TOWER]).manifest
        if begun["last_day"] is None:
            raise ConfigError("the events have no time: a full update learns days. Use `twotower run`")
        return Reached(begun["last_day"], begun["watermark_ms"])

    def note(self, day: FullDay, latest: dict[str, str] | None = None) -> None:
        """Note a day that is done, and the latest checkpoints where they changed, in one rename."""
        path = self.where.checkpoints / LATEST
        noted = read_json(path)
        kept = noted["checkpoints"] if latest is None else latest
        write_json(path, {**noted, "checkpoints": kept, FULL: [asdict(done) for done in [*self.days, day]]})


def update_full(settings: Settings, *, dry_run: bool) -> UpdateReport:
    """The full update of every day that is whole and not learned yet, in order. A day that is done is not repeated.

    The samples that came since are replayed onto the new version before it is promoted, so that the version is as fresh
    as the one that it replaces.

    Raises:
        ConfigError: other users are held out than in the training.
        DataError: nothing was trained yet.
        VersionError: none is served yet, or another full update is at work.
    """
    check_ready(settings, trained=True)
    where = places(settings)
    served, reached = current_path(where.versions), _FullChain.read(where).reached
    check_held_out(settings, open_version(served))
    with event_log_of(settings) as event_log:
        idle_ms = settings.stream.idle_ms
        due = due_days(where.events, where.shards, reached.day, reached.rest_ms, event_log=event_log, idle_ms=idle_ms)
    report = UpdateReport("full", served.name, 0, 0, reached.watermark_ms)
    if dry_run:
        return replace(report, plan={"days": due})
    report = replace(report, seq=last_seq(where.deltas, served.name))
    refused = list[int]()
    with locked(
        where.workspace / FULL_LOCK,
        lambda holder: VersionError(f"{holder} runs another full update: wait for it to end"),
    ):
        for number, day in enumerate(due):
            log.info("full update of %s", day)
            made = _learn_day(settings, _FullChain.read(where), day)
            refused += [number] if made.refused else []
            report = replace(
                made,
                rows=report.rows + made.rows,
                set_aside=[*report.set_aside, *made.set_aside],
                reasons=[*report.reasons, *made.reasons],
            )
    return replace(report, refused=refused)


def _learn_day(settings: Settings, chain: _FullChain, day: str) -> UpdateReport:
    """One day: samples, towers from yesterday's, a version, its gate, its catch-up, its promotion."""
    where = chain.where
    previous = {name: open_checkpoint(where.checkpoints / path) for name, path in chain.checkpoints.items()}
    until = replace(settings, samples=replace(settings.samples, last_day=day))
    files = sorted((where.events / f"{c.DATE}={day}").glob("*.parquet"))
    fold(where.workspace, entities_of(settings), files)
    features = load_features(previous[TWO_TOWER].path)
    build_samples(until, PreviousFeatures(features, settings.update.evict_after_days))
    samples, served = open_samples(where.samples), current_path(where.versions)
    own = rows_of_day(samples, day, chain.reached.learned_ms(day))
    seq, rows = last_seq(where.deltas, served.name), len(own.positives)
    unchanged = UpdateReport("full", served.name, seq, rows, samples.manifest["watermark_ms"])
    if rows < MIN_ROWS:
        chain.note(FullDay(day, chain.checkpoints, None))
        return unchanged
    trained = {name: train_from(until, own, name, warm=previous[name]).checkpoint for name in previous}
    rankers = {name: train_ranker_from(until, samples, name).checkpoint for name in settings.models.rankers}
    latest = {name: os.path.relpath(path, where.checkpoints) for name, path in (trained | rankers).items()}
    checkpoints = {name: latest[name] for name in trained}
    towers = open_checkpoint(Path(trained[TWO_TOWER]))
    if read_manifest(served)["checkpoint_sha256"] == towers.tensors_sha256:
        log.info("%s is served already: a run was killed before it could note that", served.name)
        chain.note(FullDay(day, checkpoints, served.name), latest)
        return unchanged
    version = _left_by_a_killed_run(where, served, towers, as_dict(until))
    if version is None:
        version = str(publish_version(until, promoted=False, checkpoints=trained | rankers)["version"])
    held_out, path = settings.samples.held_out_users, where.versions / version
    if problems := check_version(open_version(served), open_version(path), files, held_out, settings.update.gate):
        log.error("version %s is not promoted: %s", version, "; ".join(problems))
        chain.note(FullDay(day, chain.checkpoints, version, problems))
        return replace(unchanged, refused=[seq], reasons=problems)
    with event_log_of(settings) as event_log:
        caught_up = catch_up(path, where.deltas, lambda path: open_chain(settings, path, event_log))
    promote(where.versions, version)
    chain.note(FullDay(day, checkpoints, version), latest)
    return replace(caught_up, kind="full", rows=rows, refused=[], plan=None)


def _left_by_a_killed_run(where: Places, served: Path, towers: Checkpoint, configuration: dict[str, Any]) -> str | None:
    """The whole version of these towers that a killed run published to follow the served one, if there is one."""
    for listed in list_versions(where.versions):
        path = where.versions / listed.id
        made = read_manifest(path)
        of = (made["parent"], made["checkpoint_sha256"], made["configuration"])
        if of == (served.name, towers.tensors_sha256, configuration) and not verify(path):
            log.info("%s is whole: a run was killed before it promoted that", listed.id)
            return listed.id
    return None
