"""`update`: the updaters of `twotower.update`, out of a configuration."""

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

from twotower.cli.line import Places, places
from twotower.cli.streaming import until_signals
from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.logs import EventLog, open_reader
from twotower.publish.version import Version, open_version
from twotower.schema.errors import DataError
from twotower.schema.files import MANIFEST, read_json
from twotower.train.checkpoint import FINISHED, TENSORS, Checkpoint, load_model, open_checkpoint
from twotower.train.loop import Loss
from twotower.train.negatives import Shares
from twotower.update.chain import Chain
from twotower.update.gate import Limits
from twotower.update.incremental import UpdateReport, update_incremental
from twotower.update.learner import Learning

log = logging.getLogger(__name__)


def learn(settings: Settings, *, follow: bool, dry_run: bool) -> UpdateReport:
    """The incremental update of a workspace's served version."""
    check_available(settings)
    where = places(settings)
    with ExitStack() as opened:
        event_log: EventLog | None = None
        at = settings.stream.log
        if at.kind != "local" or where.log.exists():
            event_log = open_reader(at.kind, where.log, at.url, at.name)
            opened.callback(event_log.close)
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


def _wait(stopped: threading.Event, seconds: float) -> None:
    stopped.wait(seconds)


def open_chain(settings: Settings, path: Path, event_log: EventLog | None) -> Chain:
    """The chain of the version in a folder, as the configuration learns."""
    where, options, gate = places(settings), settings.update, settings.update.gate
    version = open_version(path, threads=settings.train.threads)
    checkpoint = checkpoint_of(where, version)
    easy = settings.samples.negatives.easy
    return Chain(
        version,
        lambda: load_model(checkpoint),
        where.deltas,
        where.shards,
        event_log,
        Learning(
            tuple(options.tables),
            loss_of(settings),
            Shares(easy.in_batch, easy.uniform, easy.clicks),
            settings.samples.negatives.alpha,
            options.negatives,
            options.batch_size,
            settings.train.batch_size,
            options.learning_rate or settings.train.table_learning_rate,
            options.recent,
            options.admit_after,
            options.seed,
        ),
        Limits(
            gate.most_move,
            gate.most_length,
            gate.most_alike,
            gate.k,
            gate.margin,
            gate.least,
            gate.window,
            gate.index_recall,
        ),
        options.rows,
        settings.samples.untrained_users,
        settings.serve.exclude != "none",
    )


def loss_of(settings: Settings) -> Loss:
    """The loss that is configured."""
    options = settings.train
    return Loss(
        options.loss,
        options.temperature,
        options.positive_temperature,
        options.margin,
        options.sigma,
        options.scale,
        options.pointwise_negatives,
    )


def checkpoint_of(where: Places, version: Version) -> Checkpoint:
    """The checkpoint that a version was made of: networks and optimizer state are in it alone.

    Raises:
        DataError: it is not there any more.
    """
    wanted = version.manifest["checkpoint_sha256"]
    for path in sorted(where.checkpoints.glob(f"*/{FINISHED}/{MANIFEST}")):
        files = read_json(path).get("files", {})
        if files.get(TENSORS, {}).get("sha256") == wanted:
            return open_checkpoint(path.parent)
    raise DataError(
        f"{where.checkpoints} has not the checkpoint that version {version.id} was made of ({wanted[:12]}): restore "
        "it, or train and publish again"
    )
