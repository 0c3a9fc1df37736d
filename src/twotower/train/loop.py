"""The training loop, top to bottom."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.towers.encoders import label_aware
from twotower.towers.losses import (
    Form,
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
from twotower.train.batches import Batch, BatchMaker, RowNegatives, SharedNegatives, fed_frequency, freshness
from twotower.train.checkpoint import (
    FINISHED,
    Checkpoint,
    Progress,
    Shape,
    all_finite,
    drop_all_but,
    finished,
    resume,
    run_folder,
    save_checkpoint,
    save_step,
    seed_of_step,
    take_over,
)
from twotower.train.negatives import (
    ROW_COUNT,
    CountedFrequency,
    EasyNegatives,
    HardNegatives,
    Shares,
    StreamingFrequency,
)
from twotower.train.options import TrainOptions
from twotower.train.ranking import RankerReport

log = logging.getLogger(__name__)

REPORT_S = 5.0


@dataclass(frozen=True)
class Loss:
    """What is minimised; each number belongs to the losses that its line names."""

    name: str = "sampled_softmax"
    temperature: float = 0.07
    """Divides the cosine: `sampled_softmax`, `corrected_log_q`, `bsl` (of the negatives)."""
    positive_temperature: float | None = None
    """`bsl`: of the positive; None = the same."""
    margin: float = 0.4
    """`triplet_hinge`."""
    sigma: float = 10.0
    """`triplet_logistic`."""
    scale: float = 10.0
    """`pointwise`: initial scale of the cosine; learned."""
    pointwise_negatives: float = 3.0
    """`pointwise`: weight of all negatives of a row over its positive's."""
    popularity: float = 0.0
    """How much more than the softmax says items of many clicks are preferred: see `preferred`."""

    def preferred(self, clicks: npt.NDArray[np.float64], least: float) -> npt.NDArray[np.float64]:
        """What each item's product with any user's vector is raised by when the training is over, as (N,).

        The softmax leaves log P(item | user) in the product over the temperature; this adds popularity x log P(item)
        (logit adjustment, Menon et al. 2021, eq. 9; there it favours rare classes). The embeddings of rare items
        are fitted to their few clicks, and promise more than they keep.

        Args:
            clicks: (N,) of each item, older ones for less where age matters.
            least: an item counts as no fewer.
        """
        log_clicks: npt.NDArray[np.float64] = np.log(np.maximum(clicks, least))
        return self.temperature * self.popularity * log_clicks

    @property
    def corrected(self) -> bool:
        """It estimates a softmax over the catalogue, whose negatives are corrected for how often they are drawn."""
        return self.name in ("sampled_softmax", "corrected_log_q", "bsl")

    def form(self) -> Form:
        """The function of scores."""
        forms: dict[str, Callable[[], Form]] = {
            "sampled_softmax": lambda: sampled_softmax(self.temperature),
            "corrected_log_q": lambda: corrected_log_q(self.temperature),
            "bsl": lambda: bsl(self.temperature, self.positive_temperature or self.temperature),
            "triplet_hinge": lambda: triplet_hinge(self.margin),
            "triplet_logistic": lambda: triplet_logistic(self.sigma),
            "pointwise": lambda: pointwise(self.pointwise_negatives),
        }
        return forms[self.name]()


def loss_of(options: TrainOptions) -> Loss:
    """The loss that is configured."""
    return Loss(
        options.loss,
        options.temperature,
        options.positive_temperature,
        options.margin,
        options.sigma,
        options.scale,
        options.pointwise_negatives,
        options.logit_adjustment,
    )


@dataclass(frozen=True)
class Negatives:
    """What a positive is compared with."""

    easy: Shares = field(default_factory=Shares)
    alpha: float = 0.75
    count: int | None = None
    """Negatives of a row; None = all other rows of the batch, where they have a share."""
    shared: bool = True
    """One set for all rows of a batch, or one for each."""
    streaming: bool = False
    """q of in-batch negatives is estimated from the stream, not taken from the counts."""
    hard: dict[str, float] = field(default_factory=lambda: {c.PRE_RANK_REJECTED: 0.5, c.RANK_REJECTED: 0.5})
    """Shares of the sources of hard ones."""
    hard_share: float | None = None
    """Hard ones among all; None = half where the log has them, else none."""
    hard_count: int = 8
    """Hard ones of a positive in a step, where the easy ones are shared."""
    impressed_for_experiments: bool = False
    """As many of what was shown and not clicked as hard ones: wrong, and here to show it."""
    uncorrected_for_experiments: bool = False
    """Easy ones count alike, however often each is drawn."""


@dataclass(frozen=True)
class TrainReport:
    """What `twotower train` prints."""

    checkpoint: str
    rows: int
    """Training rows seen in all epochs."""
    rows_per_s: float
    """Of this process, from the first step to the last; 0 where the run was already finished."""
    loss: float
    """Mean of the last epoch."""
    seconds: float
    channels: dict[str, "TrainReport"] = field(default_factory=dict)
    """The other trained channels, by name."""
    rankers: dict[str, RankerReport] = field(default_factory=dict)
    """The rankers, by name."""


def train(  # noqa: PLR0912, PLR0915  one loop, top to bottom
    samples: Samples,
    checkpoints: Path,
    shape: Shape,
    *,
    loss: Loss,
    negatives: Negatives,
    batch_size: int,
    epochs: int,
    seed: int,
    learning_rate: float,
    table_learning_rate: float,
    schedule: str,
    weight_decay: float,
    id_dropout: float,
    horizon: int,
    half_life_days: float | None,
    in_time_order: bool = False,
    checkpoint_s: float,
    threads: int,
    sharpness: float = 20.0,
    enough: Callable[[int, TwoTower], bool] | None = None,
    warm: Checkpoint | None = None,
    decay: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> TrainReport:
    """Train the two towers, from the last checkpoint of the same run if there is one.

    A run is its samples and settings. The same run gives the same bytes, however often it was killed and resumed; a
    finished run is not repeated.

    Args:
        samples: what to train on.
        checkpoints: the folder of all runs.
        shape: of the model.
        loss: what is minimised.
        negatives: what positives are compared with.
        batch_size: positives in a step.
        epochs: passes over the positives.
        seed: of everything that is drawn.
        learning_rate: of the networks.
        table_learning_rate: of the embedding tables.
        schedule: `constant`, or `linear`: both rates fall to zero over the whole run.
        weight_decay: of the networks.
        id_dropout: share of ids replaced by the unknown one.
        horizon: a history ends up to so many clicks before its request.
        half_life_days: of the weight of a positive; None = age does not matter.
        in_time_order: an epoch goes through the positives as they were clicked; else it shuffles them.
        checkpoint_s: seconds between checkpoints.
        threads: threads of a step.
        sharpness: of the attention of a user's interests to the positive item (`label_aware`).
        enough: is called after each epoch with its number, from 1, and the model; True ends the training there.
            What is finished then is a shorter run under the name of the whole one: keep its folder apart.
        warm: the run whose parameters and optimizer state this one begins with; None = it begins anew.
        decay: what the accumulators of the tables of that run are multiplied by.
        clock: monotonic seconds.

    Raises:
        DataError: the loss or the trained numbers are not finite; fewer than two rows or a `batch_size` of one.
        ConfigError: negatives that the samples do not have, or that do not fit the batch; a shape that needs a
            feature that is not there.
    """
    started = clock()
    samples = replace(samples, features=shape.features_of(samples.features))
    settings = {
        "shape": asdict(shape),
        "loss": asdict(loss),
        "negatives": asdict(negatives),
        "batch_size": batch_size,
        "epochs": epochs,
        "seed": seed,
        "learning_rate": learning_rate,
        "table_learning_rate": table_learning_rate,
        "schedule": schedule,
        "weight_decay": weight_decay,
        "id_dropout": id_dropout,
        "horizon": horizon,
        "half_life_days": half_life_days,
        "threads": threads,
        **({"sharpness": sharpness} if shape.interests else {}),
        **({"order": "time"} if in_time_order else {}),
        "torch": torch.__version__,
        **({"warm": warm.tensors_sha256, "decay": decay, "rows": len(samples.positives)} if warm else {}),
    }
    folder = run_folder(checkpoints, samples.manifest, settings)
    if (done := finished(folder)) is not None:
        log.info("this run is finished: %s", done.path)
        drop_all_but(folder, [FINISHED])
        return TrainReport(str(done.path), done.manifest["progress"]["rows"], 0.0, done.manifest["loss"], 0.0)

    torch.set_num_threads(threads)
    hard_part = _hard_negatives(negatives, samples)
    easy_part = _easy_negatives(negatives, hard_part.share, samples)
    frequency = (
        StreamingFrequency(len(samples.items)) if negatives.streaming else CountedFrequency(fed_frequency(samples))
    )
    batches = BatchMaker(
        samples,
        batch_size,
        id_dropout,
        seed,
        easy_part,
        frequency,
        loss.corrected,
        hard_part.negatives,
        horizon,
        half_life_days,
        negatives.uncorrected_for_experiments,
        in_time_order,
    )
    form = loss.form()
    model = TwoTower(samples.features, shape.dimension, shape.user, shape.item, shape.dropout, seed, shape.popularity)
    model.calibrate(loss.scale)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, foreach=True)
    if warm is not None:
        take_over(warm, model, optimizer, decay)
    if shape.popularity:
        model.prefer(samples.items.features, loss.preferred(*_clicks_of_items(samples, half_life_days)))
    assembler = StepAssembler(model.features, model.tables)
    progress = resume(folder, model, optimizer, frequency) or Progress(0, 0, 0, 0.0, math.nan)
    if progress.rows:
        log.info("resuming %s at epoch %d, step %d", folder.name, progress.epoch + 1, progress.step)
    model.train()
    loop_started = reported = saved = clock()
    rows_before = progress.rows

    for epoch in range(progress.epoch, epochs):
        for step, batch in enumerate(batches.epoch(epoch, progress.step), progress.step):
            torch.default_generator.manual_seed(seed_of_step(seed, epoch, step))  # dropout depends on the step alone
            inputs = assembler.assemble(batch.user, batch.item)
            users, items = model.user_tower(inputs.user), model.item_tower(inputs.item)
            if shape.interests:
                users = label_aware(users, items[torch.from_numpy(batch.positive)], sharpness)
            total = _loss(form, users, items, batch, hard_part.share, model.calibration)
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            rate = 1 - progress.rows / (epochs * batches.rows) if schedule == "linear" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            optimizer.step()
            for name, touched in inputs.touched.items():
                if touched.values.grad is not None:
                    model.tables[name].update(touched.rows, touched.values.grad.numpy(), table_learning_rate * rate)
            value = float(total.detach())
            if not math.isfinite(value):
                raise DataError(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}: {_remedy(settings)}")
            rows, epoch_loss = progress.rows + len(batch.positive), progress.epoch_loss + value
            progress = Progress(epoch, step + 1, rows, epoch_loss, progress.last_loss)
            now = clock()
            if now - reported > REPORT_S:
                speed = (rows - rows_before) / (now - loop_started)
                left = (epochs * batches.rows - rows) / speed
                log.info(
                    "epoch %d/%d  %.0f samples/s  loss %.4f  %.0f s left",
                    epoch + 1, epochs, speed, epoch_loss / (step + 1), left,
                )  # fmt: skip
                reported = now
            if now - saved > checkpoint_s:
                save_step(folder, model, optimizer, shape, progress, samples.path, frequency)
                saved = clock()
        progress = Progress(epoch + 1, 0, progress.rows, 0.0, progress.epoch_loss / progress.step)
        log.info("epoch %d/%d done, loss %.4f", epoch + 1, epochs, progress.last_loss)
        if enough is not None and enough(epoch + 1, model):
            break

    speed = (progress.rows - rows_before) / max(1e-9, clock() - loop_started)
    if not all_finite(model):
        raise DataError(f"training ended with numbers that are not finite: {_remedy(settings)}")
    ends = {name: samples.manifest[name] for name in ("watermark_ms", "last_day")}
    rest = {"loss": progress.last_loss, "settings": settings, **ends}
    save_checkpoint(folder / FINISHED, model, optimizer, shape, progress, samples.path, rest, frequency)
    drop_all_but(folder, [FINISHED])
    return TrainReport(
        str(folder / FINISHED), progress.rows, round(speed, 1), progress.last_loss, round(clock() - started, 3)
    )


def _clicks_of_items(samples: Samples, half_life_days: float | None) -> tuple[npt.NDArray[np.float64], float]:
    """Clicks of each item (N,), older ones for less, and the least that is told from none: one, or one ten half-lives
    before the latest.
    """
    if half_life_days is None:
        return samples.item_positives.astype(np.float64), 1.0
    weights = freshness(samples, half_life_days)
    faded = np.bincount(samples.positives.item_row, weights, len(samples.items)).astype(np.float64)
    return faded, 0.5**10


def _loss(
    form: Form,
    users: Tensor,
    items: Tensor,
    batch: Batch,
    hard_share: float,
    calibration: Tensor,
) -> Tensor:
    """The loss of a step from the vectors of its users (B, D) and distinct items (C, D).

    Hard negatives have a part of their own: in one sum with corrected easy ones, which stand for a whole catalogue,
    they would get next to nothing of the gradient. A positive without hard ones has its easy part alone.
    """
    positive, weight = torch.from_numpy(batch.positive), torch.from_numpy(batch.weight)
    share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
    loss = torch.zeros(())
    for part, part_share in ((batch.easy, share * (1 - hard_share)), (batch.hard, share * hard_share)):
        if isinstance(part, SharedNegatives):
            log_weight = torch.from_numpy(part.log_weight)
            loss = loss + shared_loss(form, users, items, positive, log_weight, part.mask, part_share, calibration)
        elif isinstance(part, RowNegatives):
            places, log_weight = torch.from_numpy(part.places), torch.from_numpy(part.log_weight)
            loss = loss + row_loss(form, users, items, positive, places, log_weight, part_share, calibration)
    return loss


@dataclass(frozen=True)
class _HardPart:
    negatives: HardNegatives | None
    share: float


def _hard_negatives(negatives: Negatives, samples: Samples) -> _HardPart:
    """The hard part of the loss, as configured or as the samples allow.

    Where each row draws its own easy negatives, the share is one of counts, else one of the weights of both parts.

    Raises:
        ConfigError: hard negatives are asked for and there are none, or fewer than one would be drawn.
    """
    lists = {name: bag for name, bag in samples.positives.hard.items() if len(bag.rows)}
    wanted = (0.5 if lists else 0.0) if negatives.hard_share is None else negatives.hard_share
    if not wanted:
        return _HardPart(None, 0.0)
    if not lists:
        raise ConfigError(
            f"samples.negatives.hard_share = {wanted:g}, but no positive has a rejected item in its request: hard "
            f"negatives are rows of outcome {c.PRE_RANK_REJECTED} or {c.RANK_REJECTED}; set hard_share = 0"
        )
    total, count = negatives.count or ROW_COUNT, negatives.hard_count
    if not negatives.shared:
        count = round(wanted * total)
        if not count or (count == total and wanted < 1):
            raise ConfigError(
                f"samples.negatives.hard_share = {wanted:g} of count = {total} is no whole number of hard and of easy "
                "negatives: raise count"
            )
        wanted = count / total
    counts = _divide(count, {name: negatives.hard.get(name, 0.0) for name in (c.PRE_RANK_REJECTED, c.RANK_REJECTED)})
    if negatives.impressed_for_experiments:
        counts[c.IMPRESSED] = count
    return _HardPart(HardNegatives(lists, counts), wanted)


def _divide(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to shares that sum to 1; they sum to the count."""
    ends = np.round(count * np.cumsum([0.0, *shares.values()])).astype(int)
    return dict(zip(shares, np.diff(ends).tolist(), strict=True))


def _easy_negatives(negatives: Negatives, hard_share: float, samples: Samples) -> EasyNegatives | None:
    """The easy part of the loss; None where all negatives are hard.

    Raises:
        ConfigError: q is to be estimated, and nothing is drawn from the batch.
    """
    if negatives.streaming and not negatives.easy.in_batch:
        raise ConfigError(
            'samples.negatives.frequency = "streaming" estimates q of in-batch negatives, and easy.in_batch = 0: '
            'use frequency = "counts"'
        )
    if hard_share == 1:
        return None
    count = negatives.count
    if not negatives.shared:
        count = round((count or ROW_COUNT) * (1 - hard_share))
    return EasyNegatives(negatives.easy, negatives.alpha, count, negatives.shared, samples.item_positives)


def _remedy(settings: dict[str, Any]) -> str:
    return (
        f"lower train.learning_rate = {settings['learning_rate']} or train.table_learning_rate = "
        f"{settings['table_learning_rate']}, or raise train.temperature = {settings['loss']['temperature']}"
    )
