"""`update incremental`: the updater of `twotower.update`, out of a configuration."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from twotower.config.available import check_available
from twotower.config.load import with_present_names
from twotower.config.settings import Settings
from twotower.datasets.places import Places
from twotower.logs import EventLog, open_reader
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.streaming import until_signals
from twotower.publish.overlay import EntityChanges, as_served
from twotower.publish.version import Version, open_version
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import MANIFEST, check_fields, read_json
from twotower.train.checkpoint import FINISHED, TENSORS, Checkpoint, load_model, open_checkpoint
from twotower.train.towers import check_loss
from twotower.update.chain import Chain, Sources
from twotower.update.entities import read_entities
from twotower.update.incremental import UpdateReport, update_incremental
from twotower.update.options import ChainOptions

log = logging.getLogger(__name__)


def learn(settings: Settings, *, follow: bool, dry_run: bool) -> UpdateReport:
    """The incremental update of a workspace's served version."""
    check_available(settings)
    where = places(settings)
    with event_log_of(settings) as event_log, until_signals(follow) as stopped:
        return update_incremental(
            where.versions,
            where.deltas,
            lambda path: open_chain(settings, path, event_log),
            dry_run=dry_run,
            follow_s=settings.update.follow_s if follow else None,
            stopped=stopped.is_set,
            sleep=stopped.wait,
        )


def open_chain(settings: Settings, path: Path, event_log: EventLog | None) -> Chain:
    """The chain of the version in a folder, as the configuration learns."""
    where = places(settings)
    torch.set_num_threads(1)  # sums depend on it, and small steps only wait for a second one
    version = open_version(path)
    check_held_out(settings, version)
    checkpoint = checkpoint_of(where, version)
    check_loss(checkpoint, None)
    options = ChainOptions(settings.update, settings.train, settings.samples, settings.serve.exclude != "none")
    return Chain(version, lambda: load_model(checkpoint), Sources(where.deltas, where.shards, event_log), options)


def check_held_out(settings: Settings, version: Version) -> None:
    """Refuse to learn for a version in whose training other users were held out than are now.

    Raises:
        ConfigError: the gate would judge on users whom the version was trained on, or train those who judge.
    """
    recorded = with_present_names(version.manifest["configuration"]).get("samples", {})
    trained, now = recorded.get("held_out_users"), settings.samples.held_out_users
    if trained is not None and trained != now:
        raise ConfigError(
            f"samples.held_out_users is {now:g} (0.01 where the file has an [update] section), and version "
            f"{version.id} was trained with {trained:g}: the gate judges on users whom nothing was ever trained on. "
            f"Set it to {trained:g}, or bootstrap again with `twotower run`"
        )
    if not now:
        log.warning(
            "samples.held_out_users is 0: the gate does not judge the recall of %s. To have it judged, set "
            "samples.held_out_users = 0.01 and bootstrap again with `twotower run`",
            version.id,
        )


@contextmanager
def event_log_of(settings: Settings) -> Iterator[EventLog | None]:
    """The event log to read, where there is one."""
    where, at = places(settings), settings.stream.log
    if at.kind == "local" and not where.log.exists():
        yield None
        return
    with closing(open_reader(at, where.log)) as event_log:
        yield event_log


def entities_of(settings: Settings) -> EntityChanges:
    """What was put or deleted, as the event log tells."""
    with event_log_of(settings) as event_log:
        return EntityChanges() if event_log is None else read_entities(event_log)


def open_as_served(settings: Settings, version: str | None = None) -> Version:
    """The served version, or a given one, with its deltas and with what was put or deleted."""
    return as_served(open_served(settings, version), places(settings).deltas, entities_of(settings))


def checkpoint_of(where: Places, version: Version) -> Checkpoint:
    """The checkpoint that a version was made of: only it has the networks and the optimizer state.

    Raises:
        DataError: it is not there any more.
    """
    wanted = version.manifest["checkpoint_sha256"]
    for path in sorted(where.checkpoints.glob(f"*/{FINISHED}/{MANIFEST}")):
        try:
            listed = check_fields(read_json(path), {"files": dict}, str(path))["files"]
            recorded = check_fields(listed.get(TENSORS), {"sha256": str}, str(path))["sha256"]
        except DataError as error:
            log.warning("%s", error)
            continue
        if recorded == wanted:
            return open_checkpoint(path.parent)
    raise DataError(
        f"{where.checkpoints} has not the checkpoint that version {version.id} was made of ({wanted[:12]}): restore "
        "it, or train and publish again"
    )
