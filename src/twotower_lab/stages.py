"""Two towers, then rankers: what a part of the funnel finds, and what it costs over many items.

n candidates, N items of the catalogue, K of a list.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.config.settings import Settings
from twotower.evaluate.holdout import Truth
from twotower.index.exact import ExactIndex
from twotower.index.protocol import PADDING
from twotower.pipeline.line import build_samples, open_served, publish_version, train_model
from twotower.publish.version import PRE_RANK, TWO_TOWER, Version
from twotower.serve.funnel import rank
from twotower.serve.options import FunnelOptions
from twotower_lab.score import K

Ints = npt.NDArray[np.int64]

TIMES: Final = 3
"""A cost is the median of this many."""
AT_ONCE: Final = 20_000
"""Candidates that a ranker scores in one call."""


def published(settings: Settings) -> Version:
    """Learn from everything in a workspace, and serve the result."""
    build_samples(settings)
    train_model(settings)
    publish_version(settings, promoted=True)
    return open_served(settings)


@dataclass(frozen=True)
class Stages:
    """A part of a version's funnel."""

    version: Version
    rankers: Sequence[str]
    """Those of the version that are asked: `pre_rank`, `rank`, both or none."""
    funnel: FunnelOptions
    """With `retrieve` of at least N, the rankers decide alone."""

    @property
    def _served(self) -> Version:
        asked: Mapping[str, Any] = {name: self.version.rankers[name] for name in self.rankers}
        return replace(self.version, rankers=asked)

    def lists(self, truth: Truth) -> Ints:
        """The first K (B, K) for the users of a truth, without what they clicked."""
        version, clicks = self._served, self.version.clicks
        lists = np.full((len(truth.user_rows), K), PADDING)
        for place, user in enumerate(truth.user_rows.tolist()):
            queries = version.queries(np.array([user]), exclude=clicks.items)
            wanted = max(K, min(self.funnel.retrieve, len(version.item_ids)))
            rows = version.two_tower.retrieve(queries, wanted).rows[0]
            rows = rows[rows != PADDING]
            ranked = rank(version, queries, rows, self._kept(len(rows)), self.funnel.cosine)
            best = ranked.rows[ranked.order[:K]]
            lists[place, : len(best)] = best
        return lists

    def _kept(self, candidates: int) -> int:
        return self.funnel.pre_rank if PRE_RANK in self.rankers else candidates

    def cost_ms(self, items: int) -> float:
        """Processor time of one answer over a catalogue of this size, made of this one's items again and again.

        The two towers search every vector exactly: an approximate index would be faster by far.
        """
        version, clicks = self._served, self.version.clicks
        copies = np.arange(items) % len(version.item_ids)
        vectors = np.asarray(version.item_vectors[np.arange(len(version.item_ids))])
        many = version.two_tower.over(TWO_TOWER, ExactIndex.build(np.arange(items), vectors[copies]))
        user = int(np.argmax(np.diff(clicks.indptr)))
        queries = version.queries(np.array([user]))
        times_ms = []
        for _ in range(TIMES if self.funnel.retrieve < items else 1):
            started = time.process_time()
            rows = copies
            if self.funnel.retrieve < items:
                rows = copies[many.retrieve(queries, self.funnel.retrieve).rows[0]]
            kept = self._kept(len(rows))
            for begin in range(0, len(rows), AT_ONCE):
                rank(version, queries, rows[begin : begin + AT_ONCE], kept, self.funnel.cosine)
            times_ms.append(1000 * (time.process_time() - started))
        return round(float(np.median(times_ms)), 3)
