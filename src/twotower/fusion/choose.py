"""Chooses how channels are fused, on lists of users whose held-out items are known.

B users, C channels, M items of a user's union, k cut-offs. The objective is recall, the mean over the cut-offs.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates
from twotower.evaluate.metrics import Figure, difference
from twotower.features.columns import Bag
from twotower.fusion.fuse import RRF_CONSTANT, Floats, Fusion, Union
from twotower.index.protocol import PADDING

log = logging.getLogger(__name__)

CONSTANTS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Constants that are tried when a channel's term is fitted to its hits by rank."""
STEPS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Factors of a weight that are tried."""
BENDS = (0.25, 4.0)
"""Factors of a constant that are tried."""
ROUNDS = 3
"""Every channel is changed at most this many times."""
RESAMPLES = 1000
BLOCK = 32
"""Users whose scores are computed together."""


@dataclass(frozen=True)
class Chosen:
    """A fusion, and how good it is on validation."""

    fusion: Fusion
    users: int
    channels: dict[str, dict[str, float]]
    """Recall of each channel alone, by name and cut-off."""
    fused: dict[str, float]
    """Recall of a fusion that was chosen on the other half of the users, or on the other parts."""
    equal: dict[str, float]
    """Recall of reciprocal rank fusion as in its paper: equal weights, constant 60."""
    gain: Figure
    """Mean of `fused` minus the mean recall of the channel that was best where the fusion was chosen, paired."""
    by_part: tuple[float, ...]
    """The gain on each validation part."""


def choose(
    lists: Mapping[str, Candidates],
    truth: Bag,
    ks: Sequence[int],
    seed: int,
    part: npt.NDArray[np.int64] | None = None,
) -> Chosen:
    """The fusion with the greatest recall in which each term is worth more than its noise.

    A term weight / (constant + rank) estimates how likely a hit is at that rank. First, each channel's term is fitted
    to its hits by maximum likelihood, as if there were no other channel. From there, and from the best channel alone,
    one channel after another gets the best other weight, 0 included, or constant. A change is kept if its gain is above
    its standard error (paired; over users and, where there are several validation parts, over these). At the end, a
    channel whose removal loses less than that gets weight 0.

    A choice looks better than it is on the users that it was made on. So it is made several times: on all users; and on
    each half of them, for the figures on the other half, or on all parts but one, for the figures on that part. Where
    these figures are not above those of the best channel by more than their noise, that channel ranks first alone, and
    the others fill up.

    Args:
        lists: candidates of each channel by name, as long as a server will request them, without excluded items.
        truth: the distinct held-out items of the same users; none is empty.
        ks: cut-offs.
        seed: of the halves.
        part: (B,) the validation part of each user, from 0; None = there is one.
    """
    part = np.zeros(len(truth), np.int64) if part is None else part
    union = Union.of(lists)
    whole = _Search.of(union, truth, part, ks)
    several = part.max(initial=0) > 0
    fold = part if several else np.random.default_rng(seed).permutation(len(truth)) % 2
    fused, alone = np.zeros((2, len(truth), len(ks)))
    singles = whole.singles
    for judged in np.unique(fold):
        rest, ours = fold != judged, fold == judged
        log.info("choosing on %d users, to be judged by %d others", rest.sum(), ours.sum())
        fused[ours] = whole.of_users(ours).recall(whole.of_users(rest).choose())
        alone[ours] = singles[singles[:, rest].mean(axis=(1, 2)).argmax(), ours]
    change = (fused - alone).mean(axis=1)
    gain = difference(fused.mean(axis=1), alone.mean(axis=1), RESAMPLES, seed)
    if gain.ci95 is not None and gain.ci95[0] > 0 and _is_gain(change, part):
        log.info("choosing on all of them")
        fusion = whole.choose()
    else:
        log.info("no fusion is better than the best channel by more than noise: it stands first, the others fill up")
        best = union.channels[singles.mean(axis=(1, 2)).argmax()]
        fusion = Fusion({name: float(name == best) for name in union.channels}, depth=union.depth)
    return Chosen(
        fusion,
        len(truth),
        {name: _by_k(values, ks) for name, values in zip(union.channels, singles, strict=True)},
        _by_k(fused, ks),
        _by_k(whole.recall(Fusion(depth=union.depth)), ks),
        gain,
        tuple(round(float(mean), 5) for mean in _means(change, part)),
    )


def _by_k(recall: Floats, ks: Sequence[int]) -> dict[str, float]:
    return {f"recall@{k}": round(float(value), 5) for k, value in zip(ks, recall.mean(axis=0), strict=True)}


@dataclass(frozen=True)
class _Term:
    """What a channel adds to the score of its items: weight / (constant + rank)."""

    weight: float
    constant: float


@dataclass(frozen=True)
class _Search:
    union: Union
    hit: npt.NDArray[np.bool_]
    """(B, M) the item is held out."""
    counts: npt.NDArray[np.int64]
    """(B,) held-out items."""
    part: npt.NDArray[np.int64]
    """(B,) validation part."""
    ks: Sequence[int]

    @classmethod
    def of(cls, union: Union, truth: Bag, part: npt.NDArray[np.int64], ks: Sequence[int]) -> "_Search":
        counts = np.diff(truth.indptr)
        size = 1 + max(int(union.rows.max(initial=0)), int(truth.rows.max(initial=0)))
        owners = np.arange(len(counts))
        hit = np.isin(owners[:, None] * size + union.rows, np.repeat(owners, counts) * size + truth.rows)
        return cls(union, hit & (union.rows != PADDING), counts, part, ks)

    @cached_property
    def hits(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """User and column of every hit."""
        user, column = np.nonzero(self.hit)
        return user, column

    @cached_property
    def blocks(self) -> list["_Search"]:
        """A few users at a time, so that their scores stay in the processor's cache."""
        return [self.of_users(slice(at, at + BLOCK)) for at in range(0, len(self.counts), BLOCK)]

    def of_users(self, users: npt.NDArray[np.bool_] | slice) -> "_Search":
        union = Union(self.union.channels, self.union.rows[users], self.union.ranks[:, users], self.union.depth)
        return _Search(union, self.hit[users], self.counts[users], self.part[users], self.ks)

    @cached_property
    def singles(self) -> Floats:
        """(C, B, k) recall of each channel alone."""
        ranks = self.union.ranks
        hits = [(self.hit & (ranks > 0) & (ranks <= k)).sum(axis=2) for k in self.ks]
        return np.stack(hits, axis=2) / self.counts[:, None]

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """The channels by falling recall."""
        return np.argsort(-self.singles.mean(axis=(1, 2)), kind="stable")

    def recall(self, fusion: Fusion) -> Floats:
        """(B, k) recall of a fusion."""
        terms = [
            _Term(fusion.weights.get(name, 1.0), fusion.constants.get(name, RRF_CONSTANT))
            for name in self.union.channels
        ]
        return self._at_each(self._total(terms))

    def choose(self) -> Fusion:
        fitted = [self._fit(channel) for channel in range(len(self.order))]
        best = [replace(term, weight=term.weight * (at == self.order[0])) for at, term in enumerate(fitted)]
        climbed = [self._climb(start, fitted) for start in (best, fitted)]
        terms = max(climbed, key=lambda terms: float(self._mean(terms).mean()))
        largest = max(term.weight for term in terms)
        named = dict(zip(self.union.channels, terms, strict=True))
        weights = {name: float(f"{term.weight / largest:.4g}") for name, term in named.items()}
        return Fusion(weights, {name: term.constant for name, term in named.items()}, self.union.depth)

    def _climb(self, start: Sequence[_Term], fitted: Sequence[_Term]) -> list[_Term]:
        """Change one channel after another, the best channels first, until no gain is above its error."""
        terms, now = list(start), self._mean(start)
        for _ in range(ROUNDS):
            before = list(terms)
            for channel in self.order:
                base = terms[channel] if terms[channel].weight else fitted[channel]
                tried = [replace(base, weight=base.weight * step) for step in STEPS]
                tried += [self._bent(base, base.constant * bend) for bend in BENDS]
                tried += [replace(base, weight=0.0)] if sum(term.weight > 0 for term in terms) > 1 else []
                tried = [term for term in tried if term != terms[channel]]
                means = self._means(terms, channel, tried)
                first = int(means.mean(axis=1).argmax())
                if _is_gain(means[first] - now, self.part):
                    terms[channel], now = tried[first], means[first]
            if terms == before:
                break
        for channel in self.order[::-1]:
            without = [*terms[:channel], replace(terms[channel], weight=0.0), *terms[channel + 1 :]]
            if terms[channel].weight and any(term.weight for term in without):
                less = self._mean(without)
                if not _is_gain(now - less, self.part):
                    terms, now = without, less
        return terms

    def _fit(self, channel: int) -> _Term:
        """The weight and the constant under which the channel's hits by rank are likeliest (Poisson)."""
        depth = self.union.depth
        hits = np.bincount(self.union.ranks[channel][self.hit], minlength=depth + 1)[1:].astype(np.float64)
        listed = np.bincount(self.union.ranks[channel].ravel(), minlength=depth + 1)[1:].astype(np.float64)
        fits = []
        for constant in CONSTANTS:
            shape = 1 / (constant + np.arange(1, depth + 1))
            # Half a hit more for each channel keeps one without any from a weight of 0.
            weight = (hits.sum() + 0.5) / max((listed * shape).sum(), 1e-12)
            expected = weight * shape
            fits.append(((hits * np.log(expected) - listed * expected).sum(), weight, constant))
        _, weight, constant = max(fits)
        return _Term(weight, constant)

    def _bent(self, term: _Term, constant: float) -> _Term:
        """Another constant, with the weight that keeps the sum over the list the same."""
        ranks = np.arange(1, self.union.depth + 1)
        return _Term(term.weight * (1 / (term.constant + ranks)).sum() / (1 / (constant + ranks)).sum(), constant)

    def _total(self, terms: Sequence[_Term]) -> Floats:
        total = self.union.nothing()
        for channel, term in enumerate(terms):
            if term.weight:
                total += self.union.reciprocal(channel, term.weight, term.constant)
        return total

    def _at_each(self, scores: Floats) -> Floats:
        """(B, k) recall by scores (B, M), as `reciprocal_rank` orders them, but for the hits alone."""
        user, column = self.hits
        score = scores[user, column]
        recall = np.empty((len(self.counts), len(self.ks)))
        top = scores
        for at, k in sorted(enumerate(self.ks), key=lambda pair: -pair[1]):
            inside = np.isfinite(score)
            if k < scores.shape[1]:
                # One k at a time: numpy partitions at a single position several times faster than at two.
                top = np.partition(top, top.shape[1] - k, axis=1)[:, -k:]
                last = top[:, 0]
                inside &= score >= last[user]
                for tie in np.flatnonzero(inside & (score == last[user])):
                    row, limit = scores[user[tie]], score[tie]
                    inside[tie] = (row > limit).sum() + (row[: column[tie]] == limit).sum() < k
            recall[:, at] = np.bincount(user[inside], minlength=len(self.counts)) / self.counts
        return recall

    def _mean(self, terms: Sequence[_Term]) -> Floats:
        """(B,) mean recall."""
        mean: Floats = self._means(terms, 0, terms[:1])[0]
        return mean

    def _means(self, terms: Sequence[_Term], channel: int, tried: Sequence[_Term]) -> Floats:
        """(T, B) mean recall with each of T terms in place of the channel's."""
        return np.concatenate([block._means_here(terms, channel, tried) for block in self.blocks], axis=1)

    def _means_here(self, terms: Sequence[_Term], channel: int, tried: Sequence[_Term]) -> Floats:
        others = self._total([*terms[:channel], _Term(0.0, 1.0), *terms[channel + 1 :]])
        units = {at: self.union.reciprocal(channel, 1.0, at) for at in {term.constant for term in tried}}
        each = (others + units[term.constant] * term.weight for term in tried)
        means: Floats = np.stack([self._at_each(scores).mean(axis=1) for scores in each])
        return means


def _is_gain(change: npt.NDArray[Any], part: npt.NDArray[np.int64]) -> bool:
    """Whether a paired change (B,) is above its standard error over users, and over parts if there are several.

    >>> one, two = np.zeros(4, np.int64), np.array([0, 0, 1, 1])
    >>> _is_gain(np.array([0.1, 0.0, 0.1, 0.0]), one), _is_gain(np.array([0.1, -0.1, 0.1, 0.0]), one)
    (True, False)
    >>> _is_gain(np.array([0.1, 0.1, 0.0, 0.0]), one), _is_gain(np.array([0.1, 0.1, 0.0, 0.0]), two)
    (True, False)
    """
    mean, parts = float(change.mean()), _means(change, part)
    errors = [_error(change), _error(parts) if len(parts) > 1 else 0.0]
    return mean > max(errors)


def _error(values: npt.NDArray[Any]) -> float:
    return float(values.std(ddof=min(1, len(values) - 1))) / math.sqrt(len(values))


def _means(values: npt.NDArray[Any], part: npt.NDArray[np.int64]) -> Floats:
    """The mean in each part."""
    counts = np.bincount(part)
    means: Floats = np.bincount(part, values)[counts > 0] / counts[counts > 0]
    return means
