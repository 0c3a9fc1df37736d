"""The training of a ranker, top to bottom: impressions in, a calibrated checkpoint out."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from twotower.evaluate.calibration import Platt, calibration_error, fit_platt
from twotower.features.columns import Bag, Beginnings, Rows, pointers, ranges, take
from twotower.features.feature_set import FeatureSet
from twotower.features.vocabulary import MISSING, UNKNOWN
from twotower.samples.names import NO_POSITION
from twotower.samples.read import Impressions, Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.towers.options import PreRankOptions
from twotower.towers.ranker import FIRST_POSITION, Ranker
from twotower.towers.two_tower import StepAssembler
from twotower.train.batches import Side, drop_ids, some_missing
from twotower.train.checkpoint import finished, run_folder
from twotower.train.loop import Run, StepLoss, Task, finish, train_epochs
from twotower.train.options import TrainOptions

POSITION = "position"
SCORED = 8192
"""Impressions that are scored at a time."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Calibrated:
    """How log-odds became probabilities, judged on the impressions that they were fitted to."""

    rows: int
    scale: float
    offset: float
    ece_before: float
    """Expected calibration error of the network's own probabilities."""
    ece: float
    """After the scaling."""


@dataclass(frozen=True)
class RankerReport:
    """What `twotower train` prints about a ranker."""

    checkpoint: str
    rows: int
    """Impressions seen in all epochs."""
    rows_per_s: float
    """Speed of this process; 0 where the run was already finished."""
    loss: float
    """Mean of the last epoch."""
    calibration: Calibrated
    position: list[float]
    """What each position adds to the log-odds, from the first on, as far as the log has them."""
    seconds: float


def train_ranker(
    samples: Samples,
    checkpoints: Path,
    options: PreRankOptions,
    train: TrainOptions,
    *,
    name: str,
    clock: Callable[[], float] = time.monotonic,
) -> RankerReport:
    """Train a ranker on impressions, from the last checkpoint of the same run if there is one, and calibrate it.

    It is calibrated on the latest impressions, which it does not train on: when it serves, it also scores later
    requests of the same users. The ids of users set apart by a hash would be out-of-vocabulary.

    Args:
        samples: with impressions.
        checkpoints: the folder of all runs.
        options: of the ranker.
        train: seed, threads and seconds between checkpoints.
        name: `pre_rank` or `rank`.
        clock: monotonic seconds.

    Raises:
        DataError: there are no impressions, or none of both kinds in a part; the loss or the numbers are not finite.
        ConfigError: the ranker needs a feature that is not there.
    """
    started = clock()
    cut = trained_impressions(samples, options.calibration_share)
    of_train = {"seed": train.seed, "threads": train.threads}
    settings = {"name": name, "ranker": asdict(options), "train": of_train, "torch": torch.__version__}
    run = Run(run_folder(checkpoints, samples.manifest, settings), samples, settings)
    if (done := finished(run.folder)) is not None:
        kept = done.manifest
        return RankerReport(
            str(done.path), kept["progress"]["rows"], 0.0, kept["loss"], Calibrated(**kept["calibration"]),
            kept["position"], 0.0,
        )  # fmt: skip
    torch.set_num_threads(train.threads)
    model = Ranker(samples.features, options, train.seed)
    shown = shown_in(samples)
    model.begin_at(float(shown.clicked[:cut].mean()))
    batches = ImpressionBatches(samples, model.features, options.id_dropout)
    task = _task(name, model, batches, cut, options=options, seed=train.seed)
    train = replace(train, epochs=options.epochs, table_learning_rate=options.table_learning_rate, schedule="constant")
    trained = train_epochs(task, run, train, clock=clock)
    calibrated = _calibrate(model, batches.parts(cut, len(shown)))
    curve = model.curve()[: max(1, int(shown.position.max(initial=0)))]
    path = finish(task, run, trained, ranker=name, calibration=asdict(calibrated), position=curve)
    return RankerReport(
        path, trained.progress.rows, trained.rows_per_s, trained.loss, calibrated, curve, round(clock() - started, 3)
    )


def _task(
    name: str, model: Ranker, batches: "ImpressionBatches", rows: int, *, options: PreRankOptions, seed: int
) -> Task[Ranker, "ImpressionBatch"]:
    """The network, its batches of the first impressions, and the loss of a batch."""
    groups: list[dict[str, Any]] = [
        {"params": [parameter for key, parameter in model.named_parameters() if key != POSITION]},
        {"params": [model.position], "lr": options.position_learning_rate, "weight_decay": 0.0},
    ]
    assembler = StepAssembler(model.features, model.tables)
    steps = -(-rows // options.batch_size)

    def epoch_batches(epoch: int, first_step: int) -> Iterator[ImpressionBatch]:
        order = np.random.default_rng([seed, epoch, 1]).permutation(rows)
        for step in range(first_step, steps):
            part = order[rows * step // steps : rows * (step + 1) // steps]
            yield batches.drawn(part, np.random.default_rng([seed, epoch, step, 2]))

    def step_loss(batch: ImpressionBatch) -> StepLoss:
        inputs = assembler.assemble(batch.user, batch.item)
        logits = model(inputs.user, inputs.item) + model.bias(torch.from_numpy(batch.position))
        loss = binary_cross_entropy_with_logits(logits, torch.from_numpy(batch.clicked))
        return StepLoss(loss, len(batch.clicked), inputs.touched)

    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, foreach=True)
    remedy = f"lower {name}.learning_rate or {name}.table_learning_rate"
    return Task(name, model, optimizer, rows, epoch_batches, step_loss, remedy)


def trained_impressions(samples: Samples, calibration_share: float) -> int:
    """How many of the impressions, in the order of time, a ranker trains on; it is calibrated on the others.

    No request is divided.

    Raises:
        DataError: there are no impressions, or a part has not both clicked ones and others.
    """
    shown = shown_in(samples)
    begins = shown.ts_ms[min(len(shown) - 1, int(len(shown) * (1 - calibration_share)))]
    cut = int(np.searchsorted(shown.ts_ms, begins, side="left"))
    for part, what in ((shown.clicked[:cut], "train on"), (shown.clicked[cut:], "calibrate on")):
        clicks = int(part.sum())
        if not 0 < clicks < len(part):
            raise DataError(
                f"{len(part)} impressions to {what}, {clicks} of them clicked: a ranker needs some of both kinds. "
                "Choose more days, or another calibration_share"
            )
    return cut


def shown_in(samples: Samples) -> Impressions:
    """The impressions of samples; without any, a DataError."""
    if samples.impressions is None:
        raise DataError(
            f"{samples.path} has no impressions, which rankers learn from: set models.rankers and build them again "
            "with `twotower samples`"
        )
    return samples.impressions


@dataclass(frozen=True)
class ImpressionBatch:
    """Impressions (B,) as the network reads them."""

    user: Side
    item: Side
    position: Longs
    clicked: npt.NDArray[np.float32]


class ImpressionBatches:
    """Gathers impressions: their users and contexts, what was clicked before, their items.

    An id that no training row clicked has no row in the tables, and none of its impressions here has a click. If these
    trained the unknown id, it would learn that unknown users never click and that new items are never clicked. So they
    train the row for missing ids, which no request has. The unknown id is trained by a share of all ids (`id_dropout`,
    which also makes contexts missing).
    """

    def __init__(self, samples: Samples, features: FeatureSet, id_dropout: float) -> None:
        self._samples = samples
        self._shown = shown_in(samples)
        self._features = features
        self._id_dropout = id_dropout
        self._tokens: Rows | None = features.history.vocabulary.rows(samples.items.ids) if features.history else None
        self._has_positions = bool((self._shown.position != NO_POSITION).any())

    def drawn(self, rows: Longs, generator: np.random.Generator) -> ImpressionBatch:
        """Impressions (B,) to train on, some of their ids unknown and some of their contexts missing."""
        batch = self.plain(rows)
        for feature in self._features.context:
            column = batch.user[feature.name]
            assert not isinstance(column, Beginnings)
            batch.user[feature.name] = some_missing(feature, column, self._id_dropout, generator)
        for side, name in ((batch.user, c.USER_ID), (batch.item, c.ITEM_ID)):
            if isinstance(ids := side.get(name), np.ndarray):
                side[name] = np.where(ids == UNKNOWN, np.int32(MISSING), ids)
            side.update(drop_ids(side, name, self._id_dropout, generator))
        return batch

    def plain(self, rows: Longs) -> ImpressionBatch:
        """Impressions (B,) as a server reads them, except for their positions."""
        samples, shown = self._samples, self._shown
        user_row = shown.user_row[rows]
        user: Side = {f.name: take(samples.users.features[f.name], user_row) for f in self._features.user_columns}
        user |= {f.name: take(shown.context[f.name], rows) for f in self._features.context}
        if (history := self._features.history) is not None and self._tokens is not None:
            count = shown.history[rows].astype(np.int64)
            stop, count = samples.clicks.indptr[user_row] + count, np.minimum(count, history.last)
            places = ranges(stop - count, count)
            user[history.name] = Bag(pointers(count), self._tokens[samples.clicks.item_row[places]])
        item: Side = {name: take(column, shown.item_row[rows]) for name, column in samples.items.features.items()}
        # A log without positions has one bias, which is the network's own.
        position = shown.position[rows].astype(np.int64) if self._has_positions else np.full(len(rows), FIRST_POSITION)
        return ImpressionBatch(user, item, position, shown.clicked[rows].astype(np.float32))

    def parts(self, first: int, last: int) -> Iterator[ImpressionBatch]:
        """Impressions first..last - 1 in their order, as a server reads them."""
        for start in range(first, last, SCORED):
            yield self.plain(np.arange(start, min(start + SCORED, last)))


def _calibrate(model: Ranker, batches: Iterable[ImpressionBatch]) -> Calibrated:
    """Fit the scaling of log-odds, in place, to impressions at their positions that were not trained on."""
    scored = [
        (model.score(batch.user, batch.item, batch.position.astype(np.int32)), batch.clicked)  # type: ignore[arg-type]
        for batch in batches
    ]
    logits, clicked = (np.concatenate(part).astype(np.float64) for part in zip(*scored, strict=True))
    platt = fit_platt(logits, clicked)
    model.calibration.copy_(torch.tensor([platt.scale, platt.offset]))
    before, after = (calibration_error(scaling.probability(logits), clicked) for scaling in (Platt(1.0, 0.0), platt))
    return Calibrated(len(logits), round(platt.scale, 4), round(platt.offset, 4), round(before, 5), round(after, 5))
