"""Training of the two towers, MIND and MF: positives and negatives in, a checkpoint out."""

import hashlib
import inspect
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.channels.options import ModelsOptions
from twotower.samples.options import NegativesOptions
from twotower.samples.read import Samples
from twotower.schema.errors import ConfigError
from twotower.towers.encoders import label_aware
from twotower.towers.losses import (
    Loss,
    RowNegatives,
    SharedNegatives,
    bsl,
    corrected_log_q,
    pointwise,
    row_loss,
    sampled_softmax,
    shared_loss,
    triplet_hinge,
    triplet_logistic,
)
from twotower.towers.two_tower import StepAssembler, TwoTower
from twotower.train.batches import Batch, BatchMaker, freshness
from twotower.train.checkpoint import Checkpoint, finished, run_folder, take_over
from twotower.train.loop import Run, StepLoss, Task, finish, train_epochs
from twotower.train.models import MF, MIND, TWO_TOWER, new_towers
from twotower.train.negatives import negative_sources
from twotower.train.options import TrainOptions
from twotower.train.ranking import RankerReport

log = logging.getLogger(__name__)

OWN_LOSS = "own_loss"
"""Key of a checkpoint's settings: name and SHA-256 of the loss of your own that it was trained with."""
SHARPNESS = 20.0
"""In training, the interests of `mind` are weighted by a softmax of this many times their cosine to the positive."""


@dataclass(frozen=True)
class TrainReport:
    """What `twotower train` prints."""

    checkpoint: str
    rows: int
    """Training rows seen in all epochs."""
    rows_per_s: float
    """Speed of this process, from the first step to the last; 0 where the run was already finished."""
    loss: float
    """Mean of the last epoch."""
    seconds: float
    channels: dict[str, "TrainReport"] = field(default_factory=dict)
    """The other trained channels, by name."""
    rankers: dict[str, RankerReport] = field(default_factory=dict)
    """The rankers, by name."""


@dataclass(frozen=True)
class WarmStart:
    """The run whose parameters and optimizer state another run begins with."""

    checkpoint: Checkpoint
    decay: float = 1.0
    """What the accumulators of its tables are multiplied by."""


def train(
    samples: Samples,
    checkpoints: Path,
    options: TrainOptions,
    models: ModelsOptions,
    negatives: NegativesOptions,
    *,
    channel: str = TWO_TOWER,
    loss: Loss | None = None,
    warm: WarmStart | None = None,
    stop_early: Callable[[int, TwoTower], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainReport:
    """Train the towers of a channel, from the last checkpoint of the same run if there is one.

    A run is its samples and settings; a finished run is not repeated.

    Args:
        samples: what to train on.
        checkpoints: the folder of all runs.
        options: how to train.
        models: the towers.
        negatives: what positives are compared with.
        channel: `two_tower`, `mind` or `mf`.
        loss: a loss of your own in place of `options.loss`: a function at the top level of a file. Its negatives are
            weighted as those of `options.loss` are.
        warm: a run to begin with; this one then trains one epoch.
        stop_early: called after each epoch with its number, from 1, and the model; True ends the training. The shorter
            run then has the name of the whole one: keep its folder apart.
        clock: monotonic seconds.

    Raises:
        DataError: the loss or the trained numbers are not finite; fewer than two rows or a `batch_size` of one.
        ConfigError: negatives that the samples do not have, or that do not fit the batch; a channel that needs a
            feature that is not there; a loss without a name, or another one than that of `warm`.
    """
    started = clock()
    options = _channel_options(options, models, channel, warm is not None)
    described = ("dimension", "user_tower", "item_tower", *([MIND] if channel == MIND else []))
    settings = {
        "channel": channel,
        "train": {name: value for name, value in asdict(options).items() if name != "checkpoint_s"},
        "models": {name: value for name, value in asdict(models).items() if name in described},
        "negatives": asdict(negatives),
        "torch": torch.__version__,
        **({} if loss is None else {OWN_LOSS: _described(loss)}),
        **({} if warm is None else {"warm": [warm.checkpoint.tensors_sha256, warm.decay, len(samples.positives)]}),
    }
    run = Run(run_folder(checkpoints, samples.manifest, settings), samples, settings)
    if warm is not None:
        check_loss(warm.checkpoint, loss)
    if (done := finished(run.folder)) is not None:
        return TrainReport(str(done.path), done.manifest["progress"]["rows"], 0.0, done.manifest["loss"], 0.0)
    torch.set_num_threads(options.threads)
    task = _task(samples, options, models, negatives, channel=channel, loss=loss or configured_loss(options))
    if warm is not None:
        take_over(warm.checkpoint, task.model, task.optimizer, warm.decay)
    if options.logit_adjustment:
        task.model.prefer(samples.items.features, _preferences(samples, options))
    trained = train_epochs(task, run, options, stop_early=stop_early, clock=clock)
    path = finish(task, run, trained)
    return TrainReport(path, trained.progress.rows, trained.rows_per_s, trained.loss, round(clock() - started, 3))


def configured_loss(options: TrainOptions) -> Loss:
    """The loss that the options name."""
    losses: dict[str, Callable[[], Loss]] = {
        "sampled_softmax": lambda: sampled_softmax(options.temperature),
        "corrected_log_q": lambda: corrected_log_q(options.temperature),
        "bsl": lambda: bsl(options.temperature, options.positive_temperature or options.temperature),
        "triplet_hinge": lambda: triplet_hinge(options.margin),
        "triplet_logistic": lambda: triplet_logistic(options.sigma),
        "pointwise": lambda: pointwise(options.pointwise_negatives),
    }
    return losses[options.loss]()


def check_loss(checkpoint: Checkpoint, loss: Loss | None) -> None:
    """Refuse to continue a checkpoint with another loss than it was trained with, if either is a loss of your own.

    Raises:
        ConfigError: the losses differ.
    """
    recorded = checkpoint.manifest.get("settings", {}).get(OWN_LOSS, {}).get("name")
    given = None if loss is None else _described(loss)["name"]
    if recorded != given:
        before, now = (name or "the configured one" for name in (recorded, given))
        raise ConfigError(
            f"{checkpoint.path} was trained with another loss ({before}) than is to go on from it ({now}): give the "
            "same one, or train anew"
        )


def _described(loss: Any) -> dict[str, str]:
    """Name and SHA-256 of a loss of your own, which distinguish its runs from others."""
    try:
        name, source = f"{loss.__module__}.{loss.__qualname__}", inspect.getsource(loss)
    except (AttributeError, TypeError, OSError):
        name, source = repr(loss), ""
    if not source or "<" in name:
        raise ConfigError(
            f"the loss {name} cannot be told from others: write it as a function at the top level of a file, `def "
            "my_loss(scores): ...`, so that checkpoints can name it"
        )
    return {"name": name, "sha256": hashlib.sha256(source.encode()).hexdigest()}


def _channel_options(options: TrainOptions, models: ModelsOptions, channel: str, warm: bool) -> TrainOptions:
    """How a channel is trained: MF without dropout; a run that continues another has one epoch."""
    epochs = {MF: models.mf.epochs, MIND: models.mind.epochs}.get(channel) or options.epochs
    options = replace(options, epochs=epochs)
    if channel == MF:
        options = replace(options, dropout=0.0, id_dropout=0.0)
    return replace(options, epochs=1, schedule="constant") if warm else options


def _task(
    samples: Samples,
    options: TrainOptions,
    models: ModelsOptions,
    negatives: NegativesOptions,
    *,
    channel: str,
    loss: Loss,
) -> Task[TwoTower, Batch]:
    """The towers of a channel, their batches, and the loss of a batch."""
    adjusted = options.logit_adjustment > 0
    model = new_towers(samples.features, models, channel, seed=options.seed, dropout=options.dropout, adjusted=adjusted)
    model.calibrate(options.scale)
    samples = replace(samples, features=model.features)
    sources = negative_sources(negatives, samples)
    batches = BatchMaker(samples, options, sources)
    assembler = StepAssembler(model.features, model.tables)

    def step_loss(batch: Batch) -> StepLoss:
        inputs = assembler.assemble(batch.user, batch.item)
        users, items = model.user_tower(inputs.user), model.item_tower(inputs.item)
        if channel == MIND:
            users = label_aware(users, items[torch.from_numpy(batch.positive)], SHARPNESS)
        value = batch_loss(loss, users, items, batch, hard_share=sources.hard_share, calibration=model.calibration)
        return StepLoss(value, len(batch), inputs.touched)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True
    )
    remedy = (
        f"lower train.learning_rate = {options.learning_rate} or train.table_learning_rate = "
        f"{options.table_learning_rate}, or raise train.temperature = {options.temperature}"
    )
    return Task(channel, model, optimizer, batches.rows, batches.epoch, step_loss, remedy, sources.frequency)


def _preferences(samples: Samples, options: TrainOptions) -> npt.NDArray[np.float64]:
    """What each item's product with any user's vector is raised by when the training is over, as (N,).

    The softmax leaves log P(item | user) in the product over the temperature; this adds `logit_adjustment` x log
    P(item) (Menon et al. 2021, eq. 9, where it favours rare classes), because the embeddings of rare items overestimate
    the few clicks that they are fitted to. Older clicks count less where age matters. An item counts as at least one
    click, or one ten half-lives before the latest.
    """
    clicks, fewest = samples.item_positives.astype(np.float64), 1.0
    if options.half_life_days is not None:
        weights, fewest = freshness(samples, options.half_life_days), 0.5**10
        clicks = np.bincount(samples.positives.item_row, weights, len(samples.items)).astype(np.float64)
    preferred: npt.NDArray[np.float64] = np.log(np.maximum(clicks, fewest))
    return options.temperature * options.logit_adjustment * preferred


def batch_loss(
    loss: Loss, users: Tensor, items: Tensor, batch: Batch, *, hard_share: float, calibration: Tensor
) -> Tensor:
    """The loss of a step from the vectors of its users (B, D) and distinct items (C, D).

    Hard negatives have a part of their own: in one sum with corrected easy ones, which stand for a whole catalogue,
    they would get almost none of the gradient. A positive without hard ones has only its easy part.
    """
    positive, weight = torch.from_numpy(batch.positive), torch.from_numpy(batch.weight)
    share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    total = torch.zeros(())
    for part, part_share in ((batch.easy, share * (1 - hard_share)), (batch.hard, share * hard_share)):
        if isinstance(part, SharedNegatives):
            total = total + shared_loss(loss, users, items, positive, part, share=part_share, calibration=calibration)
        elif isinstance(part, RowNegatives):
            total = total + row_loss(loss, users, items, positive, part, share=part_share, calibration=calibration)
    return total
