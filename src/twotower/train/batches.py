"""Batches: gathers and slices of memory-mapped columns, never a loop over rows.

B batch, C distinct items of the batch, K shared negatives, n and H negatives of each row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag, Beginnings, Column, Rows, concatenate, pointers, ranges, take
from twotower.features.fitted import Fitted
from twotower.features.vocabulary import UNKNOWN
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import MAX_TRAINING_WEIGHT
from twotower.towers.embedding import Compactor
from twotower.towers.losses import Mask, RowNegatives, SharedNegatives
from twotower.train.negatives import NegativeSources, StreamingFrequency
from twotower.train.options import TrainOptions

Longs = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float32]
Side = dict[str, Column | Beginnings]
"""Encoded columns of users or of items, by feature."""


@dataclass(frozen=True)
class Batch:
    """One step's rows. Each distinct item is there once, however often the batch holds it."""

    user: Side
    """Encoded columns (B rows), history and context included."""
    item: Side
    """Encoded columns of the distinct items (C rows), shared negatives first."""
    item_row: Longs
    """(C,) their rows in the catalogue."""
    positive: Longs
    """(B,) each row's item among them."""
    easy: SharedNegatives | RowNegatives | None
    hard: RowNegatives | None
    weight: Reals
    """(B,)"""

    def __len__(self) -> int:
        return len(self.positive)


@dataclass(frozen=True)
class Epoch:
    """The order of an epoch, and the clicks that its histories are cut from."""

    positives: Longs
    """(R,) the training rows, in the order in which they are fed."""
    clicked: npt.NDArray[np.int32]
    """Catalogue rows of clicks, by user; a history is a part of its user's."""
    early: npt.NDArray[np.bool_] | None
    """By training row, whether it is of the half of its user's clicks that stands first; None with time."""
    cut: Longs | None
    """By user, how many clicks the first of the pieces that a transformer reads lacks; None = no pieces."""


class BatchMaker:
    """Makes the batches of an epoch; the same seed, epoch and step always give the same batch.

    The rows of an epoch are spread over as few batches as `batch_size` allows, which differ by one row at most. So no
    batch has a single row, which would have no in-batch negatives. (With `batch_size` 2 and an odd number of rows, one
    batch has 3.)

    Raises:
        DataError: an epoch has fewer than two rows, `batch_size` is below 2, or a weight is not from 0 to 1e9.
        ConfigError: the options need times or an order of the clicks, and the samples have none.
    """

    def __init__(self, samples: Samples, options: TrainOptions, sources: NegativeSources) -> None:
        self._samples = samples
        self._options = options
        self._easy, self._hard, self._frequency = sources.easy, sources.hard, sources.frequency
        self._uncorrected = sources.uncorrected
        self._items = Compactor(len(samples.items))
        self._users = Compactor(len(samples.users))
        self._column = np.full(len(samples.items), -1, np.int32)
        _check_weights(samples.positives.weight)
        self._weight = samples.positives.weight
        if options.half_life_days is not None:
            self._weight = self._weight * freshness(samples, options.half_life_days)
        self._weak = len(samples.positives) > int(samples.item_positives.sum())
        owner = np.repeat(np.arange(len(samples.users)), np.diff(samples.clicks.indptr))
        pairs = np.unique(owner * len(samples.items) + samples.clicks.item_row)
        self._pairs = pairs if self._easy and not self._easy.shared else None
        self._clicked = Bag(
            np.searchsorted(pairs, np.arange(len(samples.users) + 1) * len(samples.items)),
            (pairs % len(samples.items)).astype(np.int32),
        )
        history = samples.features.history
        self._last = history.last if history else 1
        self._item_tokens: Rows | None = history.vocabulary.rows(samples.items.ids) if history else None
        if options.order == "time" and not samples.timed:
            raise ConfigError("train.order = 'time', but the events have no time: use 'shuffled'")
        in_order = history is not None and history.encoder == "transformer"
        self._in_pieces = in_order and options.order != "time"
        if in_order and not samples.timed:
            raise ConfigError(
                "features.user.history.encoder = 'transformer' reads clicks in their order, and the events have no "
                "time: use encoder = 'mean' or 'attention'"
            )
        self.rows = int(samples.positives.copies.sum(dtype=np.int64))
        """Training rows of an epoch."""
        if min(options.batch_size, self.rows) < 2:
            raise DataError(
                f"batch_size = {options.batch_size} with {self.rows} training rows: at least 2 of each are needed"
            )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on, shuffled over all rows or in the order of time."""
        fed = self._order(epoch)
        rows = len(fed.positives)
        steps = max(1, min(-(-rows // self._options.batch_size), rows // 2))
        for step in range(first_step, steps):
            part = fed.positives[rows * step // steps : rows * (step + 1) // steps]
            yield self._batch(part, fed, np.random.default_rng([self._options.seed, epoch, step, 2]))

    def _order(self, epoch: int) -> Epoch:
        """Every positive as often as it is fed, shuffled or in the order of time.

        With time, a history is what was clicked before the request. Without, each user's clicks are split anew each
        epoch into random halves, each the history of the other. Leaving out only the row's own item would leak: next to
        a user id, the gap names the target.
        """
        generator = np.random.default_rng([self._options.seed, epoch, 1])
        positives, clicks = self._samples.positives, self._samples.clicks
        order = np.repeat(np.arange(len(positives)), positives.copies)
        if self._options.order == "time":
            order = order[np.argsort(positives.ts_ms[order], kind="stable")]
            return Epoch(order, clicks.item_row, None, None)
        order = generator.permutation(order)
        if self._in_pieces:
            return self._order_pieces(order, generator)
        if self._samples.timed:
            return Epoch(order, clicks.item_row, None, None)
        # Without time, positives and clicks stand in the same order: by user, then item.
        counts = np.diff(clicks.indptr)
        owner = np.repeat(np.arange(len(counts)), counts)
        shuffled = np.lexsort((generator.random(len(owner)), owner))
        early = np.empty(len(owner), bool)
        early[shuffled] = np.arange(len(owner)) < (clicks.indptr[:-1] + counts // 2)[owner]
        return Epoch(order, clicks.item_row[shuffled], early, None)

    def _order_pieces(self, order: Longs, generator: np.random.Generator) -> Epoch:
        """Rows whose histories end in one piece of their user's clicks follow each other; the pieces are shuffled.

        One pass over a piece then gives the histories of all of them (Kang and McAuley 2018). A piece has as many
        clicks as a history, and each epoch cuts the clicks elsewhere, so that a row has histories of every length.
        """
        cut = generator.integers(self._last, size=len(self._samples.users))
        user = self._samples.positives.user_row[order].astype(np.int64)
        piece = self._piece(order, user, cut)
        _, place = np.unique(user * (1 + int(piece.max(initial=0))) + piece, return_inverse=True)
        turn = generator.permutation(int(place.max(initial=0)) + 1)
        return Epoch(order[np.argsort(turn[place], kind="stable")], self._samples.clicks.item_row, None, cut)

    def _piece(self, rows: Longs, user_row: Longs, cut: Longs) -> Longs:
        """The piece of its user's clicks in which the history of each row (B,) ends; an empty one is in the first."""
        end = np.maximum(self._samples.positives.history[rows].astype(np.int64) - 1, 0)
        piece: Longs = (end + cut[user_row]) // self._last
        return piece

    def _histories(
        self, rows: Longs, user_row: Longs, fed: Epoch, tokens: Rows, generator: np.random.Generator
    ) -> Bag | Beginnings:
        """The histories of training rows (B,), as rows of the table of items."""
        if fed.cut is not None:
            return self._beginnings(rows, user_row, fed.cut, tokens, generator)
        first, last = self._samples.clicks.indptr[user_row], self._samples.clicks.indptr[user_row + 1]
        if fed.early is None:
            length = self._samples.positives.history[rows].astype(np.int64)
            last = first + length - self._skipped(length, generator)
        else:
            middle = first + (last - first) // 2
            first, last = np.where(fed.early[rows], middle, first), np.where(fed.early[rows], last, middle)
        count = np.minimum(last - first, self._last)
        return Bag(pointers(count), tokens[fed.clicked[ranges(last - count, count)]])

    def _beginnings(
        self, rows: Longs, user_row: Longs, cut: Longs, tokens: Rows, generator: np.random.Generator
    ) -> Beginnings:
        """The histories of training rows (B,) as beginnings of pieces."""
        piece = self._piece(rows, user_row, cut)
        pieces = 1 + int(piece.max(initial=0))
        distinct, row = np.unique(user_row * pieces + piece, return_inverse=True)
        user = distinct // pieces
        start = np.maximum(distinct % pieces * self._last - cut[user], 0)
        length = self._samples.positives.history[rows] - start[row]
        counts = np.zeros(len(distinct), np.int64)
        np.maximum.at(counts, row, length)
        clicked = self._samples.clicks.item_row[ranges(self._samples.clicks.indptr[user] + start, counts)]
        return Beginnings(Bag(pointers(counts), tokens[clicked]), row, length - self._skipped(length, generator))

    def _skipped(self, most: Longs, generator: np.random.Generator) -> Longs:
        """How many of the latest clicks before its request a row's history (B,) leaves out; at most all but one.

        So the model learns what comes later too (all-action prediction, Pancha et al. 2022).
        """
        if not self._options.horizon:
            return np.zeros(len(most), np.int64)
        return generator.integers(np.clip(most, 1, self._options.horizon + 1))

    def _batch(self, rows: Longs, fed: Epoch, generator: np.random.Generator) -> Batch:
        """The batch of some training rows (B,)."""
        samples = self._samples
        user_row, item_row = samples.positives.user_row[rows], samples.positives.item_row[rows]
        hard = self._hard.draw(rows, generator) if self._hard else None
        drawn = self._draw_easy(item_row.astype(np.int64), generator)
        negatives, copies = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if self._easy and self._easy.shared:
            negatives, place = self._items.compact(drawn)
            copies = np.bincount(place, minlength=len(negatives))
        distinct = self._place(negatives, [item_row, drawn.ravel(), *([hard[hard >= 0]] if hard is not None else [])])
        positive = self._column[item_row].astype(np.int64)
        easy: SharedNegatives | RowNegatives | None = None
        if self._easy and self._easy.shared:
            log_weight = np.log(copies) + self._log_weight(negatives, len(rows))
            easy = SharedNegatives(log_weight.astype(np.float32), self._mask(user_row, positive, len(negatives)))
        elif self._easy:
            log_weight = self._log_weight(drawn.ravel(), len(rows)).reshape(drawn.shape)
            right = (drawn == item_row[:, None]) | self._is_clicked(user_row, drawn)
            places = self._column[drawn].astype(np.int64)
            easy = RowNegatives(places, np.where(right, -np.inf, log_weight).astype(np.float32))
        rejected = None
        if hard is not None:
            places = np.where(hard >= 0, self._column[hard], 0).astype(np.int64)
            rejected = RowNegatives(places, np.where(hard >= 0, 0, -np.inf).astype(np.float32))
        self._column[distinct] = -1
        if isinstance(self._frequency, StreamingFrequency):
            # Only after q was used: an estimate that has seen the batch favours it.
            items, place = self._items.compact(item_row)
            self._frequency.observe(items, np.bincount(place, minlength=len(items)))
        return Batch(
            self._user_columns(rows, user_row, fed, generator),
            drop_ids(
                {name: take(column, distinct) for name, column in samples.items.features.items()},
                c.ITEM_ID,
                self._options.id_dropout,
                generator,
            ),
            distinct,
            positive,
            easy,
            rejected,
            self._weight[rows],
        )

    def _draw_easy(self, item_row: Longs, generator: np.random.Generator) -> Longs:
        """Catalogue rows of easy negatives: of all rows of the batch (n,), or of each (B, n)."""
        if self._easy is None:
            return np.zeros(0, np.int64)
        if not self._easy.shared:
            return self._easy.draw_rows(item_row, generator)
        donated = item_row[: self._easy.donors(len(item_row))]
        return np.concatenate([donated, self._easy.draw_shared(len(item_row), generator)])

    def _place(self, negatives: Longs, others: Sequence[npt.NDArray[np.integer[Any]]]) -> Longs:
        """The distinct items of a batch (C,), shared negatives first; notes the column of each."""
        self._column[negatives] = np.arange(len(negatives), dtype=np.int32)
        more = np.concatenate(others)
        rest, _ = self._items.compact(more[self._column[more] < 0])
        self._column[rest] = len(negatives) + np.arange(len(rest), dtype=np.int32)
        return np.concatenate([negatives, rest])

    def _log_weight(self, items: Longs, batch: int) -> npt.NDArray[np.float64]:
        """Log of how much one draw of an item counts among a row's easy negatives (n,)."""
        assert self._easy is not None
        if self._uncorrected:
            return np.zeros(len(items))
        expected = self._easy.log_expected(items, self._frequency.log_q(items), self._easy.draws(batch))
        return -expected if self._options.is_softmax else self._easy.log_target(items) - expected

    def _is_clicked(self, user_row: npt.NDArray[np.int32], items: Longs) -> npt.NDArray[np.bool_]:
        """Which of each row's items (B, n) its user has clicked."""
        assert self._pairs is not None
        wanted = user_row[:, None].astype(np.int64) * len(self._samples.items) + items
        place = np.minimum(np.searchsorted(self._pairs, wanted), len(self._pairs) - 1)
        clicked: npt.NDArray[np.bool_] = self._pairs[place] == wanted
        return clicked

    def _user_columns(
        self, rows: Longs, user_row: npt.NDArray[np.int32], fed: Epoch, generator: np.random.Generator
    ) -> Side:
        """What enters the user tower (B rows)."""
        """What enters the user tower (B rows)."""
        samples = self._samples
        user: Side = {name: take(column, user_row) for name, column in samples.users.features.items()}
        for feature in samples.features.context:
            column = take(samples.positives.context[feature.name], rows)
            user[feature.name] = some_missing(feature, column, self._options.id_dropout, generator)
        user = drop_ids(user, c.USER_ID, self._options.id_dropout, generator)
        if (history := samples.features.history) is not None and self._item_tokens is not None:
            user[history.name] = self._histories(rows, user_row.astype(np.int64), fed, self._item_tokens, generator)
        return user

    def _mask(self, user_row: npt.NDArray[np.int32], positive: Longs, negatives: int) -> Mask:
        """Each user's positives met with the shared negatives: once a user, then spread to its rows."""
        users, user_place = self._users.compact(user_row)
        start = self._clicked.indptr[users]
        counts = self._clicked.indptr[users + 1] - start
        place = self._column[self._clicked.rows[ranges(start, counts)]]
        met = (place >= 0) & (place < negatives)
        owner, column = np.repeat(np.arange(len(users)), counts)[met], place[met].astype(np.int64)
        hits = pointers(np.bincount(owner, minlength=len(users)))
        mine = hits[user_place + 1] - hits[user_place]
        mask = Mask(pointers(mine), column[ranges(hits[user_place], mine)])
        return _with_own(mask, positive, negatives) if self._weak else mask


def drop_ids(side: Side, name: str, share: float, generator: np.random.Generator) -> Side:
    """One side of a batch with a share of its ids replaced by the unknown one."""
    if share and isinstance(ids := side.get(name), np.ndarray):
        return side | {name: np.where(generator.random(len(ids)) < share, np.int32(UNKNOWN), ids)}
    return side


def some_missing(feature: Fitted, column: Column, share: float, generator: np.random.Generator) -> Column:
    """A context column of which a share is made missing, so that a request without it has a meaning."""
    count = len(column)
    silent = generator.random(count) < share
    return take(concatenate([column, feature.absent(count)]), np.arange(count) + count * silent)


def freshness(samples: Samples, half_life_days: float) -> Reals:
    """How much each positive (P,) counts for its age: 1 for the latest, half of it a half-life before.

    Raises:
        ConfigError: the positives have no time.
    """
    if not samples.timed:
        raise ConfigError(
            "train.half_life_days weighs positives by their age, and the events have no time: leave it out"
        )
    days = (samples.positives.ts_ms.max(initial=0) - samples.positives.ts_ms) / DAY_MS
    fresh: Reals = np.exp2(-days / half_life_days).astype(np.float32)
    return fresh


def _with_own(mask: Mask, positive: Longs, negatives: int) -> Mask:
    """Add the own item of rows whose user never clicked it: weak positives."""
    line = np.repeat(np.arange(len(positive)), np.diff(mask.indptr))
    there = np.bincount(line[mask.columns == positive[line]], minlength=len(positive)) > 0
    lacking = np.flatnonzero(~there & (positive < negatives))
    line, columns = np.concatenate([line, lacking]), np.concatenate([mask.columns, positive[lacking]])
    return Mask(pointers(np.bincount(line, minlength=len(positive))), columns[np.argsort(line, kind="stable")])


def _check_weights(weight: Reals) -> None:
    """Refuse weights (N,) whose sums and squares are not finite."""
    wrong = ~((weight >= 0) & (weight <= MAX_TRAINING_WEIGHT))
    if wrong.any():
        raise DataError(
            f"{int(wrong.sum())} of {len(weight)} positives have a weight such as {weight[wrong][0]:g}, where a number "
            f"from 0 to {MAX_TRAINING_WEIGHT:g} is expected: scale the column of samples.weight"
        )
