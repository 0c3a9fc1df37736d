"""Batches: gathers and slices of memory-mapped columns, never a loop over rows.

B batch, C distinct items of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag, Column, Rows, concatenate, pointers, ranges, take
from twotower.features.fitted import Fitted
from twotower.features.vocabulary import UNKNOWN
from twotower.models.embedding import Compactor
from twotower.models.losses import Mask
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One step's rows; items stand once each, however often the batch holds them."""

    user: dict[str, Column]
    """Encoded columns (B rows), history and context included."""
    item: dict[str, Column]
    """Encoded columns of the distinct items (C rows)."""
    item_row: Longs
    """(C,) their rows in the catalogue."""
    positive: Longs
    """(B,) each row's item among them."""
    copies: Longs
    """(C,) how often each occurs."""
    mask: Mask
    """The users' other positives among the distinct items."""
    weight: npt.NDArray[np.float32]
    """(B,)"""


@dataclass(frozen=True)
class Epoch:
    """The order of an epoch, and the clicks that its histories are cut from."""

    positives: Longs
    """(R,) the training rows, in the order in which they are fed."""
    clicked: npt.NDArray[np.int32]
    """Catalogue rows of clicks, by user; a history is the first of its user's, as many as `_history_counts` says."""


class BatchMaker:
    """Makes the batches of an epoch; the same seed, epoch and step always give the same batch.

    Args:
        samples: the samples.
        batch_size: the most rows of a batch. The rows of an epoch are spread over as few batches as that allows, which
            differ by one row at most, so that none is left with a single row, which would have no negatives. (With
            `batch_size` 2 and an odd number of rows, one batch has 3.)
        id_dropout: share of user and item ids replaced by the unknown one, and of contexts made missing.
        seed: of the order of rows and of the replaced ids.

    Raises:
        DataError: an epoch has fewer than two rows, or `batch_size` is below 2: nothing is a negative.
    """

    def __init__(self, samples: Samples, batch_size: int, id_dropout: float, seed: int) -> None:
        self._samples = samples
        self._batch_size = batch_size
        self._id_dropout = id_dropout
        self._seed = seed
        self._items = Compactor(len(samples.items))
        self._users = Compactor(len(samples.users))
        self._column = np.full(len(samples.items), -1, np.int32)
        history = samples.features.history
        self._item_tokens: Rows | None = history.vocabulary.rows(samples.items.ids) if history else None
        if min(batch_size, self.rows) < 2:
            raise DataError(
                f"batch_size = {batch_size} with {self.rows} training rows: in-batch negatives need at least 2 of each"
            )

    @property
    def rows(self) -> int:
        """Training rows of an epoch."""
        if self._samples.timed:
            return len(self._samples.positives)
        counts = np.diff(self._samples.clicks.indptr)
        return int((counts - counts // 2).sum())

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return min(-(-self.rows // self._batch_size), self.rows // 2)

    @property
    def frequency(self) -> npt.NDArray[np.float64]:
        """The share q (N,) of each item among the rows as fed, in expectation over epochs.

        Without time, a click is a target in n - n // 2 of n epochs, where n is the number of its user's clicks.
        """
        if self._samples.timed:
            return self._samples.item_positives / self.rows
        clicks = self._samples.clicks
        counts = np.diff(clicks.indptr)
        share = (counts - counts // 2) / np.maximum(counts, 1)
        weights = np.repeat(share, counts)
        fed: npt.NDArray[np.float64] = np.bincount(clicks.item_row, weights, len(self._samples.items)) / self.rows
        return fed

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on, shuffled over all rows."""
        fed = self._timed(epoch) if self._samples.timed else self._drawn(epoch)
        rows, steps = len(fed.positives), self.steps
        for step in range(first_step, steps):
            part = fed.positives[rows * step // steps : rows * (step + 1) // steps]
            yield self._batch(part, fed.clicked, np.random.default_rng([self._seed, epoch, step, 2]))

    def _timed(self, epoch: int) -> Epoch:
        """Every positive once, with the clicks before its request."""
        order = np.random.default_rng([self._seed, epoch, 1]).permutation(self.rows)
        return Epoch(order, self._samples.clicks.item_row)

    def _drawn(self, epoch: int) -> Epoch:
        """A random half of each user's positives as the history of the other half.

        Leaving out just the row's own item would leak: beside a user id, the gap names the target.
        """
        generator = np.random.default_rng([self._seed, epoch, 1])
        clicks = self._samples.clicks
        counts = np.diff(clicks.indptr)
        owner = np.repeat(np.arange(len(counts)), counts)
        shuffled = np.lexsort((generator.random(len(owner)), owner))
        place = np.arange(len(owner)) - clicks.indptr[owner]
        targets = shuffled[place >= (counts // 2)[owner]]
        # Without time, positives and clicks stand in the same order: by user, then item.
        return Epoch(targets[generator.permutation(len(targets))], clicks.item_row[shuffled])

    def _history_counts(self, rows: Longs, user_row: npt.NDArray[np.int32]) -> Longs:
        """How many of its user's clicks are the history of each training row (B,)."""
        if self._samples.timed:
            return self._samples.positives.history[rows].astype(np.int64)
        indptr = self._samples.clicks.indptr
        halves: Longs = (indptr[user_row + 1] - indptr[user_row]) // 2
        return halves

    def _batch(self, rows: Longs, clicked: npt.NDArray[np.int32], generator: np.random.Generator) -> Batch:
        """The batch of some training rows (B,)."""
        samples = self._samples
        user_row, item_row = samples.positives.user_row[rows], samples.positives.item_row[rows]
        distinct, positive = self._items.compact(item_row)
        user = {name: take(column, user_row) for name, column in samples.users.features.items()}
        user |= {feature.name: self._context(feature, rows, generator) for feature in samples.features.context}
        item = {name: take(column, distinct) for name, column in samples.items.features.items()}
        if self._id_dropout:
            for side, name in ((user, c.USER_ID), (item, c.ITEM_ID)):
                if isinstance(ids := side.get(name), np.ndarray):
                    side[name] = np.where(generator.random(len(ids)) < self._id_dropout, np.int32(UNKNOWN), ids)
        history = samples.features.history
        if history is not None and self._item_tokens is not None:
            before = self._history_counts(rows, user_row)
            count = np.minimum(before, history.last)
            first = samples.clicks.indptr[user_row] + before - count
            user[history.name] = Bag(pointers(count), self._item_tokens[clicked[ranges(first, count)]])
        return Batch(
            user,
            item,
            distinct,
            positive,
            np.bincount(positive, minlength=len(distinct)),
            self._mask(user_row, distinct),
            samples.positives.weight[rows],
        )

    def _context(self, feature: Fitted, rows: Longs, generator: np.random.Generator) -> Column:
        """A context column; some rows are made missing, so that a request without it has a meaning."""
        column = take(self._samples.positives.context[feature.name], rows)
        silent = generator.random(len(rows)) < self._id_dropout
        return take(concatenate([column, feature.absent(len(rows))]), np.arange(len(rows)) + len(rows) * silent)

    def _mask(self, user_row: npt.NDArray[np.int32], distinct: Longs) -> Mask:
        """Each user's positives met with the distinct items of the batch: once a user, then spread to its rows."""
        clicks = self._samples.clicks
        users, user_place = self._users.compact(user_row)
        self._column[distinct] = np.arange(len(distinct), dtype=np.int32)
        start = clicks.indptr[users]
        counts = clicks.indptr[users + 1] - start
        column = self._column[clicks.item_row[ranges(start, counts)]]
        self._column[distinct] = -1
        owner = np.repeat(np.arange(len(users)), counts)[column >= 0]
        hits = pointers(np.bincount(owner, minlength=len(users)))
        mine = hits[user_place + 1] - hits[user_place]
        return Mask(pointers(mine), column[column >= 0].astype(np.int64)[ranges(hits[user_place], mine)])
