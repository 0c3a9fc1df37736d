"""The training loop, top to bottom. It trains the two towers, MIND, MF and the rankers.

What differs between them comes in as a `Task`: the model, the batches of an epoch, and the loss of a batch.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from twotower.samples.read import Samples
from twotower.schema.errors import DataError
from twotower.towers.embedding import TouchedRows
from twotower.train.checkpoint import (
    FINISHED,
    Frequency,
    Model,
    Progress,
    all_finite,
    drop_all_but,
    drop_older_steps,
    resume,
    save_checkpoint,
)
from twotower.train.options import TrainOptions

log = logging.getLogger(__name__)

REPORT_S = 5.0
ModelT = TypeVar("ModelT", bound=Model)
BatchT = TypeVar("BatchT")


@dataclass(frozen=True)
class StepLoss:
    """What the model makes of a batch."""

    loss: Tensor
    """A scalar with a gradient."""
    rows: int
    """Training rows of the batch."""
    touched: dict[str, TouchedRows]
    """By embedding table, the rows that take a gradient."""


@dataclass(frozen=True)
class Task(Generic[ModelT, BatchT]):
    """What differs between the models that the loop trains."""

    name: str
    """Names the model in the log."""
    model: ModelT
    optimizer: torch.optim.AdamW
    """Updates the parameters of the model; the loop updates the tables."""
    rows: int
    """Training rows of an epoch."""
    batches: Callable[[int, int], Iterator[BatchT]]
    """The batches of an epoch, from a step on; both are counted from 0."""
    loss: Callable[[BatchT], StepLoss]
    remedy: str
    """What to do if a number becomes infinite."""
    frequency: Frequency | None = None
    """q of in-batch negatives, which a checkpoint keeps."""


@dataclass(frozen=True)
class Run:
    """Samples and settings, and the folder that belongs to them."""

    folder: Path
    samples: Samples
    settings: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """The end of a run, before its finished checkpoint is written."""

    progress: Progress
    loss: float
    """Mean of the last epoch."""
    rows_per_s: float
    """Speed of this process, from its first step to the last."""


def train_epochs(
    task: Task[ModelT, BatchT],
    run: Run,
    options: TrainOptions,
    *,
    stop_early: Callable[[int, ModelT], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Trained:
    """Train a model, changed in place, from the last checkpoint of the same run if there is one.

    The same run gives the same bytes, however often it was killed and resumed.

    Args:
        task: what is trained.
        run: where checkpoints go.
        options: epochs, seed, schedule, rate of the tables, time between checkpoints. Rates of parameters are the
            optimizer's.
        stop_early: called after each epoch with its number, from 1, and the model; True ends the training.
        clock: monotonic seconds.

    Raises:
        DataError: the loss or a trained number is not finite.
    """
    model, optimizer = task.model, task.optimizer
    progress = resume(run.folder, model, optimizer, task.frequency) or Progress(0, 0, 0, 0.0, None)
    if progress.rows:
        log.info("resuming %s at epoch %d, step %d", run.folder.name, progress.epoch + 1, progress.step)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    started = reported = saved = clock()
    rows_before, rows_in_all = progress.rows, options.epochs * task.rows

    for epoch in range(progress.epoch, options.epochs):
        for step, batch in enumerate(task.batches(epoch, progress.step), progress.step):
            # Dropout depends on the step alone.
            step_seed = np.random.default_rng([options.seed, epoch, step, 3]).integers(1 << 63)
            torch.default_generator.manual_seed(int(step_seed))
            forward = task.loss(batch)
            optimizer.zero_grad()
            forward.loss.backward()  # type: ignore[no-untyped-call]
            decay = 1 - progress.rows / rows_in_all if options.schedule == "linear" else 1.0
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * decay
            optimizer.step()
            for name, touched in forward.touched.items():
                if (gradient := touched.values.grad) is not None:
                    table_rate = options.table_learning_rate * decay
                    model.tables[name].update(touched.rows, gradient.numpy(), table_rate)
            value = float(forward.loss.detach())
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}: {task.remedy}")
            rows, epoch_loss = progress.rows + forward.rows, progress.epoch_loss + value
            progress = Progress(epoch, step + 1, rows, epoch_loss, progress.last_loss)
            now = clock()
            if now - reported > REPORT_S:
                speed = (rows - rows_before) / (now - started)
                log.info(
                    "%s: epoch %d/%d  %.0f rows/s  loss %.4f  %.0f s left",
                    task.name, epoch + 1, options.epochs, speed, epoch_loss / (step + 1), (rows_in_all - rows) / speed,
                )  # fmt: skip
                reported = now
            if now - saved > options.checkpoint_s:
                save(task, run, run.folder / f"step-{rows}", progress)
                drop_older_steps(run.folder)
                saved = clock()
        mean_loss = progress.epoch_loss / progress.step
        progress = Progress(epoch + 1, 0, progress.rows, 0.0, mean_loss)
        log.info("%s: epoch %d/%d done, loss %.4f", task.name, epoch + 1, options.epochs, mean_loss)
        if stop_early is not None and stop_early(epoch + 1, model):
            break

    speed = (progress.rows - rows_before) / max(1e-9, clock() - started)
    if not all_finite(model):
        raise DataError(f"training ended with numbers that are not finite: {task.remedy}")
    assert progress.last_loss is not None
    return Trained(progress, progress.last_loss, round(speed, 1))


def finish(task: Task[ModelT, BatchT], run: Run, trained: Trained, **described: Any) -> str:
    """Write the finished checkpoint of a run, with further entries of its manifest; gives its path."""
    path = run.folder / FINISHED
    save(task, run, path, trained.progress, loss=trained.loss, **described)
    drop_all_but(run.folder, [FINISHED])
    return str(path)


def save(task: Task[ModelT, BatchT], run: Run, path: Path, progress: Progress, **described: Any) -> None:
    """Write a checkpoint of a run."""
    manifest = {"settings": run.settings, "progress": asdict(progress), **described}
    save_checkpoint(path, task.model, task.optimizer, run.samples, manifest, task.frequency)
