"""Negatives: where they are drawn from, and how often each item is expected among the easy ones.

B rows of a batch, N items, n easy and H hard negatives of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.features.columns import Bag
from twotower.samples.options import NegativesOptions
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SHARED_COUNT = 1024
"""Negatives of a batch without in-batch ones, unless a count is given."""
RATE = 0.02
"""Rate of the moving averages of `StreamingFrequency`."""
ROW_COUNT = 4
"""Negatives of a row that has its own, unless a count is given."""


@dataclass(frozen=True)
class Draws:
    """How many negatives of a row come from each source; expectations where rows draw their own."""

    in_batch: float
    uniform: float
    clicks: float

    @property
    def total(self) -> float:
        """Negatives of a row from all sources."""
        return self.in_batch + self.uniform + self.clicks


class EasyNegatives:
    """Draws easy negatives from the configured sources, and corrects them for how often they are drawn.

    `clicks` (N,) counts the clicks of each item. An item without any counts as one: the model must tell new items apart
    too. `alpha` is 0.75 in Mikolov et al. 2013.
    """

    def __init__(self, options: NegativesOptions, clicks: Longs) -> None:
        self.shares = options.easy
        self.shared = options.shared
        self._count = options.count
        self._size = len(clicks)
        weights = np.maximum(clicks, 1) ** options.alpha
        self._cumulative = np.cumsum(weights)
        self._log_clicks_q: Floats = np.log(weights) - np.log(self._cumulative[-1])

    def donors(self, batch: int) -> int:
        """How many rows of a batch give their items to all others as negatives; 0 where rows draw their own.

        Raises:
            ConfigError: more are asked for than a batch has.
        """
        if not self.shared or not self.shares.in_batch:
            return 0
        if self._count is None:
            return batch
        wanted = max(1, round(self.shares.in_batch * self._count))
        if wanted > batch:
            raise ConfigError(
                f"samples.negatives.count = {self._count} with easy.in_batch = {self.shares.in_batch:g} asks for "
                f"{wanted} negatives in a batch of {batch}: raise train.batch_size, or lower the count"
            )
        return batch if wanted == batch - 1 else wanted

    def draws(self, batch: int) -> Draws:
        """How many negatives of a row each source gives in a batch of B rows.

        A row's own item is none of its negatives. Where M of B rows donate theirs, a row has M (B - 1) / B others on
        average: M with the probability 1 - M / B, else M - 1.
        """
        shares = self.shares
        if not self.shared:
            count = self._count or ROW_COUNT
            return Draws(count * shares.in_batch, count * shares.uniform, count * shares.clicks)
        given = self.donors(batch)
        in_batch = given * (batch - 1) / batch
        total = self._count or (in_batch / shares.in_batch if shares.in_batch else SHARED_COUNT)
        uniform, clicks = (max(1, round(total * share)) if share else 0 for share in (shares.uniform, shares.clicks))
        return Draws(in_batch, float(uniform), float(clicks))

    def draw_shared(self, batch: int, generator: np.random.Generator) -> Longs:
        """Catalogue rows that are drawn for all rows of a batch, beside those of its donors."""
        draws = self.draws(batch)
        uniform = generator.integers(self._size, size=int(draws.uniform))
        return np.concatenate([uniform, self._by_clicks(int(draws.clicks), generator)])

    def draw_rows(self, items: Longs, generator: np.random.Generator) -> Longs:
        """Catalogue rows (B, n) drawn for each row of a batch with items (B,); each draw chooses its source."""
        batch, count = len(items), self._count or ROW_COUNT
        source = generator.random((batch, count))
        drawn = np.empty((batch, count), np.int64)
        other = source < self.shares.in_batch
        row = np.broadcast_to(np.arange(batch)[:, None], drawn.shape)[other]
        drawn[other] = items[(row + 1 + generator.integers(max(1, batch - 1), size=len(row))) % batch]
        by_clicks = source >= 1 - self.shares.clicks if self.shares.clicks else np.zeros_like(other)
        drawn[by_clicks] = self._by_clicks(int(by_clicks.sum()), generator)
        rest = ~(other | by_clicks)
        drawn[rest] = generator.integers(self._size, size=int(rest.sum()))
        return drawn

    def _by_clicks(self, count: int, generator: np.random.Generator) -> Longs:
        place = np.searchsorted(self._cumulative, generator.random(count) * self._cumulative[-1], side="right")
        rows: Longs = np.minimum(place, self._size - 1).astype(np.int64)
        return rows

    def log_expected(self, rows: Longs, log_frequency: Floats, draws: Draws) -> Floats:
        """Log of the expected count of items (n,) among a row's negatives, over all sources: log sum_k n_k q_k.

        It is computed in log space and never clipped: with a million items q is far below any constant that one might
        clip it at. `log_frequency` (n,) is the log of the items' share of the rows as fed, the q of in-batch negatives.
        """
        parts = []
        if draws.in_batch:
            parts.append(np.log(draws.in_batch) + log_frequency)
        if draws.uniform:
            parts.append(np.full(len(rows), np.log(draws.uniform) - np.log(self._size)))
        if draws.clicks:
            parts.append(np.log(draws.clicks) + self._log_clicks_q[rows])
        log_expected: Floats = np.logaddexp.reduce(parts, axis=0)
        return log_expected

    def log_target(self, rows: Longs) -> Floats:
        """Log of the share that items (n,) should have among the negatives that a loss averages over.

        Such losses have no softmax to estimate. They average over the uniform and the clicks' share, as configured.
        In-batch negatives stand in for those (alone: for uniform ones), each weighted by its target share over its
        expected count.
        """
        outside = self.shares.uniform + self.shares.clicks
        if not outside:
            return np.full(len(rows), -np.log(self._size))
        return self.log_expected(
            rows, np.zeros(len(rows)), Draws(0.0, self.shares.uniform / outside, self.shares.clicks / outside)
        )


class CountedFrequency:
    """q of in-batch negatives from the share (N,) of each item among the rows as fed."""

    def __init__(self, frequency: Floats) -> None:
        with np.errstate(divide="ignore"):  # an item that is never fed never comes from the batch
            self._log = np.log(frequency)

    def log_q(self, items: Longs) -> Floats:
        """Log q of items (n,)."""
        return self._log[items]


class StreamingFrequency:
    """q of in-batch negatives from the stream itself, for catalogues whose counts are not known beforehand.

    Yi et al. 2019 (algorithm 2) keep the moving average of the number of batches between two in which an item occurs.
    Its inverse is the probability to be in a batch, which is at most 1: an item with 20 copies in each would count
    once. Here draws are counted: q = (moving average of copies at an occurrence) / (moving average of draws since the
    one before). By the renewal-reward theorem that ratio is the share of the item, however often it occurs in a batch.
    The first 1 / `RATE` occurrences are averaged plainly.
    """

    def __init__(self, size: int) -> None:
        self.state: dict[str, npt.NDArray[Any]] = {
            "draws": np.zeros(1, np.int64),
            "last": np.zeros(size, np.int64),
            "gap": np.zeros(size, np.float32),
            "copies": np.zeros(size, np.float32),
            "seen": np.zeros(size, np.int32),
        }
        """What a checkpoint keeps: draws so far, and by item the draw of its last occurrence, both averages, and
        its occurrences."""

    def observe(self, items: Longs, copies: Longs) -> None:
        """Take in the distinct items (C,) of a batch, with how often each occurs (C,)."""
        draws, last, gap, mean_copies, seen = self.state.values()
        draws += copies.sum()
        seen[items] += 1
        rate = np.maximum(RATE, 1 / seen[items]).astype(np.float32)
        gap[items] += rate * ((draws - last[items]) - gap[items])
        mean_copies[items] += rate * (copies - mean_copies[items])
        last[items] = draws

    def log_q(self, items: Longs) -> Floats:
        """Log q of items (n,); one that never occurred counts as occurring now."""
        draws, _, gaps, mean_copies, occurrences = self.state.values()
        seen = occurrences[items] > 0
        copies = np.where(seen, mean_copies[items], 1).astype(np.float64)
        gap = np.where(seen, gaps[items].astype(np.float64), draws + len(occurrences))
        return np.log(copies) - np.log(gap)


class HardNegatives:
    """Draws hard negatives: items that the pre-ranker or the ranker rejected in the positive's own request.

    By source there are the rejected items of each training row, and how many are drawn for a row at most.
    """

    def __init__(self, lists: dict[str, Bag], counts: dict[str, int]) -> None:
        self._parts = [(lists[name], count) for name, count in counts.items() if count and name in lists]

    def draw(self, rows: Longs, generator: np.random.Generator) -> Longs:
        """Catalogue rows (B, H) of hard negatives, no entry of a list twice; -1 where a list has ended."""
        parts = []
        for bag, count in self._parts:
            start = bag.indptr[rows].astype(np.int64)
            length = bag.indptr[rows + 1] - start
            turn = generator.integers(np.maximum(length, 1))[:, None] + np.arange(count)
            place = start[:, None] + turn % np.maximum(length, 1)[:, None]
            there = np.arange(count) < length[:, None]
            parts.append(np.where(there, bag.rows[np.where(there, place, 0)] if len(bag.rows) else -1, -1))
        return np.concatenate(parts, axis=1).astype(np.int64)


@dataclass(frozen=True)
class NegativeSources:
    """Where the negatives of a batch come from, and how they share its loss."""

    easy: EasyNegatives | None
    """None = all negatives are hard."""
    frequency: CountedFrequency | StreamingFrequency
    """q of in-batch negatives."""
    hard: HardNegatives | None = None
    """None = all negatives are easy."""
    hard_share: float = 0.0
    """Weight of the hard part of the loss."""
    uncorrected: bool = False
    """Every easy negative counts alike, however often it is drawn: for experiments."""


def fed_frequency(samples: Samples) -> Floats:
    """The share q (N,) of each item among the rows as fed."""
    positives = samples.positives
    fed = np.bincount(positives.item_row, positives.copies, len(samples.items))
    frequency: Floats = fed / max(fed.sum(), 1)
    return frequency


def negative_sources(options: NegativesOptions, samples: Samples) -> NegativeSources:
    """The sources as configured, and hard ones as far as the samples have them.

    Where each row draws its own easy negatives, `hard_share` is a share of counts, else one of the weights of both
    parts of the loss.

    Raises:
        ConfigError: hard negatives are asked for and there are none, or fewer than one would be drawn; q is to be
            estimated, and nothing is drawn from the batch.
    """
    if options.frequency == "streaming" and not options.easy.in_batch:
        raise ConfigError(
            'samples.negatives.frequency = "streaming" estimates q of in-batch negatives, and easy.in_batch = 0: '
            'use frequency = "counts"'
        )
    streaming = options.frequency == "streaming"
    q = StreamingFrequency(len(samples.items)) if streaming else CountedFrequency(fed_frequency(samples))
    lists = {name: bag for name, bag in samples.positives.hard.items() if len(bag.rows)}
    wanted = (0.5 if lists else 0.0) if options.hard_share is None else options.hard_share
    if not wanted:
        easy = EasyNegatives(options, samples.item_positives)
        return NegativeSources(easy, q, uncorrected=options.uncorrected_for_experiments)
    if not lists:
        raise ConfigError(
            f"samples.negatives.hard_share = {wanted:g}, but no positive has a rejected item in its request: hard "
            f"negatives are rows of outcome {c.PRE_RANK_REJECTED} or {c.RANK_REJECTED}; set hard_share = 0"
        )
    count = options.hard_count
    if not options.shared:
        total = options.count or ROW_COUNT
        count = round(wanted * total)
        if not count or (count == total and wanted < 1):
            raise ConfigError(
                f"samples.negatives.hard_share = {wanted:g} of count = {total} is no whole number of hard and of easy "
                "negatives: raise count"
            )
        wanted = count / total
        options = replace(options, count=max(1, total - count))
    shares = {c.PRE_RANK_REJECTED: options.hard.pre_rank_rejected, c.RANK_REJECTED: options.hard.rank_rejected}
    counts = _divide(count, shares)
    if options.impressed_as_negatives_for_experiments:
        counts[c.IMPRESSED] = count
    easy_part = None if wanted == 1 else EasyNegatives(options, samples.item_positives)
    return NegativeSources(easy_part, q, HardNegatives(lists, counts), wanted, options.uncorrected_for_experiments)


def _divide(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to shares that sum to 1; they sum to the count."""
    ends = np.round(count * np.cumsum([0.0, *shares.values()])).astype(int)
    return dict(zip(shares, np.diff(ends).tolist(), strict=True))
