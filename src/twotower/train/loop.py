"""The training loop, top to bottom."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twotower.models.losses import in_batch_log_weight, in_batch_softmax
from twotower.models.two_tower import StepAssembler, TwoTower
from twotower.samples.read import Samples
from twotower.schema.errors import DataError
from twotower.train.batches import Batch, BatchMaker
from twotower.train.checkpoint import (
    FINISHED,
    Checkpoint,
    Progress,
    Shape,
    drop_all_but,
    open_checkpoint,
    resume,
    run_folder,
    save_checkpoint,
    save_step,
)

log = logging.getLogger(__name__)

REPORT_S = 5.0


@dataclass(frozen=True)
class TrainReport:
    """What `twotower train` prints."""

    checkpoint: str
    rows: int
    """Training rows seen in all epochs."""
    rows_per_s: float
    """Of this process; 0 where the run was already finished."""
    loss: float
    """Mean of the last epoch."""
    seconds: float


def train(
    samples: Samples,
    checkpoints: Path,
    shape: Shape,
    *,
    temperature: float,
    batch_size: int,
    epochs: int,
    seed: int,
    learning_rate: float,
    table_learning_rate: float,
    weight_decay: float,
    id_dropout: float,
    checkpoint_s: float,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
) -> TrainReport:
    """Train the two towers on in-batch negatives, from the last checkpoint of the same run if there is one.

    A run is its samples and settings. The same run gives the same bytes, however often it was killed and resumed; a
    finished run is not repeated.

    Args:
        samples: what to train on.
        checkpoints: the folder of all runs.
        shape: of the model.
        temperature: divides the cosine.
        batch_size: positives in a step.
        epochs: passes over the positives.
        seed: of everything that is drawn.
        learning_rate: of the networks.
        table_learning_rate: of the embedding tables.
        weight_decay: of the networks.
        id_dropout: share of ids replaced by the unknown one.
        checkpoint_s: seconds between checkpoints.
        threads: threads of a step.
        clock: monotonic seconds.

    Raises:
        DataError: the loss or the trained numbers are not finite; fewer than two rows or a `batch_size` of one, so that
            nothing is a negative.
    """
    started = clock()
    settings = {
        "shape": vars(shape),
        "temperature": temperature,
        "batch_size": batch_size,
        "epochs": epochs,
        "seed": seed,
        "learning_rate": learning_rate,
        "table_learning_rate": table_learning_rate,
        "weight_decay": weight_decay,
        "id_dropout": id_dropout,
        "threads": threads,
        "torch": torch.__version__,
    }
    folder = run_folder(checkpoints, samples.manifest, settings)
    if (done := _finished(folder)) is not None:
        log.info("this run is finished: %s", done.path)
        drop_all_but(folder, [FINISHED])
        return TrainReport(str(done.path), done.manifest["progress"]["rows"], 0.0, done.manifest["loss"], 0.0)

    torch.set_num_threads(threads)
    batches = BatchMaker(samples, batch_size, id_dropout, seed)
    frequency = torch.from_numpy(batches.frequency).float()
    model = TwoTower(samples.features, shape.dimension, shape.user_layers, shape.item_layers, shape.dropout, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, foreach=True)
    assembler = StepAssembler(model)
    progress = resume(folder, model, optimizer) or Progress(0, 0, 0, 0.0, math.nan)
    if progress.rows:
        log.info("resuming %s at epoch %d, step %d", folder.name, progress.epoch + 1, progress.step)
    model.train()
    loop_started = reported = saved = clock()
    rows_before = progress.rows

    for epoch in range(progress.epoch, epochs):
        for step, batch in enumerate(batches.epoch(epoch, progress.step), progress.step):
            torch.default_generator.manual_seed(_seed_of_step(seed, epoch, step))  # dropout depends on the step alone
            inputs = assembler.assemble(batch.user, batch.item)
            users, items = model.user_tower(inputs.user), model.item_tower(inputs.item)
            loss = _loss(users, items, batch, frequency, temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for name, touched in inputs.touched.items():
                if touched.values.grad is not None:
                    model.tables[name].update(touched.rows, touched.values.grad.numpy(), table_learning_rate)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}: {_remedy(settings)}")
            rows, epoch_loss = progress.rows + len(batch.positive), progress.epoch_loss + value
            progress = Progress(epoch, step + 1, rows, epoch_loss, progress.last_loss)
            now = clock()
            if now - reported > REPORT_S:
                rate = (rows - rows_before) / (now - loop_started)
                left = (epochs * batches.rows - rows) / rate
                log.info(
                    "epoch %d/%d  %.0f samples/s  loss %.4f  %.0f s left",
                    epoch + 1, epochs, rate, epoch_loss / (step + 1), left,
                )  # fmt: skip
                reported = now
            if now - saved > checkpoint_s:
                save_step(folder, model, optimizer, shape, progress, samples.path)
                saved = clock()
        progress = Progress(epoch + 1, 0, progress.rows, 0.0, progress.epoch_loss / progress.step)
        log.info("epoch %d/%d done, loss %.4f", epoch + 1, epochs, progress.last_loss)

    if not _all_finite(model):
        raise DataError(f"training ended with numbers that are not finite: {_remedy(settings)}")
    rest = {"loss": progress.last_loss, "settings": settings, "watermark_ms": samples.manifest["watermark_ms"]}
    save_checkpoint(folder / FINISHED, model, optimizer, shape, progress, samples.path, rest)
    drop_all_but(folder, [FINISHED])
    rate = (progress.rows - rows_before) / max(1e-9, clock() - loop_started)
    return TrainReport(
        str(folder / FINISHED), progress.rows, round(rate, 1), progress.last_loss, round(clock() - started, 3)
    )


def _loss(users: Tensor, items: Tensor, batch: Batch, frequency: Tensor, temperature: float) -> Tensor:
    """The loss of a step from the vectors of its users (B, D) and distinct items (C, D); `frequency` is q (N,)."""
    log_weight = in_batch_log_weight(
        torch.from_numpy(batch.copies).float(), frequency[torch.from_numpy(batch.item_row)]
    )
    positive, weight = torch.from_numpy(batch.positive), torch.from_numpy(batch.weight)
    return in_batch_softmax(users, items, positive, log_weight, batch.mask, temperature, weight)


def _seed_of_step(seed: int, epoch: int, step: int) -> int:
    return int(np.random.default_rng([seed, epoch, step, 3]).integers(1 << 63))


def _finished(folder: Path) -> Checkpoint | None:
    """The finished checkpoint of a run, if there is one; a damaged one is made again."""
    if not (folder / FINISHED).exists():
        return None
    try:
        return open_checkpoint(folder / FINISHED)
    except DataError as error:
        log.warning("training again: %s", error)
        return None


def _all_finite(model: TwoTower) -> bool:
    dense = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    return dense and all(bool(np.isfinite(table.weights).all()) for table in model.tables.values())


def _remedy(settings: dict[str, Any]) -> str:
    return (
        f"lower train.learning_rate = {settings['learning_rate']} or train.table_learning_rate = "
        f"{settings['table_learning_rate']}, or raise train.temperature = {settings['temperature']}"
    )
