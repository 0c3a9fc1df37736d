"""What each channel retrieves: alone, what no other channel does, and in the fused list.

B users, k cut-offs, P held-out pairs of a user and an item, N items.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Candidates, Retriever
from twotower.datasets.workspace import HOLDOUT, HOLDOUT_IMPRESSIONS
from twotower.evaluate.holdout import (
    Truth,
    asked_first,
    candidates,
    carried,
    cold_truths,
    first_requests,
    read_truth,
)
from twotower.evaluate.metrics import PerUser, difference, summarise
from twotower.evaluate.options import EvaluateOptions
from twotower.features.columns import Bag, take
from twotower.index.protocol import PADDING
from twotower.samples.read import Samples
from twotower.schema.clock import BEYOND_NOW

log = logging.getLogger(__name__)

UNION, FUSED = "union", "fused"
CELLS = 50_000_000
"""Users of a batch times items, at most."""
DECILES = 10

Fuse = Callable[[Mapping[str, Candidates], int], Candidates]
"""Lists of several channels, and how long the one list is to be."""


def evaluate_channels(
    samples: Samples,
    workspace: Path,
    channels: Mapping[str, Retriever],
    fuse: Fuse,
    options: EvaluateOptions,
    *,
    depth: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Every channel alone, all together and fused, on the hold-out, without what users clicked in training.

    Args:
        samples: what the channels were trained on.
        workspace: with `holdout.parquet` and, if there are cold ones, `holdout_cold.parquet`.
        channels: by name; a user's own stands here beside the others.
        fuse: makes one list of the channels' lists.
        options: cut-offs of channels (one above the size of the catalogue is cut to it), resamples, context.
        depth: candidates requested from each channel before fusing, if more than k.
        seed: of the resampling.

    Returns:
        `users`, `pairs`, `context` (as in `evaluate`), `ks`, `channels`; `recall`: of each channel, `union` (an item
        counts that any channel lists) and `fused`, by cut-off, with intervals; `best`: by cut-off the best single
        channel, and `difference`, fused minus it, paired; `unique`: by channel and cut-off the `share` of all held-out
        pairs that it alone finds, and the `loss`, recall of the union minus that without it; `overlap`: by cut-off,
        `[a][b]` the share of a's list that is in b's; `deciles`: recall over pairs in ten groups of them by training
        positives of the item; `cold`: `users` and `recall` by reason.

    Raises:
        DataError: there is no hold-out, or none of its users and items are known.
    """
    size, ks = len(samples.items), sorted(set(options.channels_k))
    cut = sorted({min(k, size) for k in ks})
    if cut != ks:
        log.info("cut-offs %s: the catalogue has %d items", cut, size)
    first = first_requests(workspace / HOLDOUT_IMPRESSIONS, samples) if options.context else None
    truth = asked_first(read_truth(workspace / HOLDOUT, samples), first)
    ask = partial(find, samples, channels, fuse, ks=cut, depth=depth)
    found, resamples = ask(truth), options.bootstrap
    return {
        "users": len(truth.user_rows),
        "pairs": len(truth.items.rows),
        "dropped": {BEYOND_NOW: truth.beyond_now} if truth.beyond_now else {},
        "context": carried(truth, first),
        "ks": cut,
        "channels": list(channels),
        "recall": found.recall(resamples, seed),
        "best": found.best(resamples, seed),
        "unique": found.unique(resamples, seed),
        "overlap": found.overlap(),
        "deciles": found.deciles(samples.item_positives),
        "cold": {
            reason: {"users": len(cold.user_rows), "recall": ask(cold).recall(resamples, seed)}
            for reason, cold in cold_truths(workspace, samples, first).items()
        },
    }


@dataclass(frozen=True)
class ListHits:
    """Which held-out pairs are in which list."""

    items: Bag
    """The held-out items of B users, P in all."""
    ks: Sequence[int]
    """Cut-offs, rising."""
    hits: Mapping[str, npt.NDArray[np.bool_]]
    """By channel, `union` and `fused`: (k, P) the pair is in the list of that length."""
    both: Mapping[tuple[str, str], npt.NDArray[np.int64]]
    """By two lists: (k,) how many places of the first are in the second."""
    places: Mapping[str, npt.NDArray[np.int64]]
    """By list: (k,) how many places it has."""

    @property
    def singles(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The hits of the channels alone."""
        return {name: hit for name, hit in self.hits.items() if name not in (UNION, FUSED)}

    def _per_user(self, hit: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """(B,) share of a user's pairs that are hits, of hits (P,)."""
        counts = np.diff(self.items.indptr)
        owner = np.repeat(np.arange(len(counts)), counts)
        return np.bincount(owner, weights=hit, minlength=len(counts)) / counts

    def recall(self, resamples: int, seed: int) -> dict[str, Any]:
        """Recall of every list, with intervals."""
        values = {
            f"{name}@{k}": self._per_user(hit[at]) for name, hit in self.hits.items() for at, k in enumerate(self.ks)
        }
        figures = summarise(PerUser(values), resamples, seed)
        return {name: {str(k): figures[f"{name}@{k}"].report() for k in self.ks} for name in self.hits}

    def best(self, resamples: int, seed: int) -> dict[str, Any]:
        """The best single channel at each cut-off, and how much better the fused list is."""
        result = {}
        for at, k in enumerate(self.ks):
            recalls = {name: self._per_user(hit[at]) for name, hit in self.singles.items()}
            name = max(recalls, key=lambda one: recalls[one].mean())
            gain = difference(self._per_user(self.hits[FUSED][at]), recalls[name], resamples, seed)
            result[str(k)] = {"channel": name, "difference": gain.report()}
        return result

    def unique(self, resamples: int, seed: int) -> dict[str, Any]:
        """The pairs that each channel finds and no other does."""
        result: dict[str, Any] = {name: {} for name in self.singles}
        for name, hit in self.singles.items():
            others = [other for other_name, other in self.singles.items() if other_name != name]
            rest = np.logical_or.reduce(others) if others else np.zeros_like(hit)
            for at, k in enumerate(self.ks):
                with_it, without = self._per_user(hit[at] | rest[at]), self._per_user(rest[at])
                result[name][str(k)] = {
                    "share": round(float((hit[at] & ~rest[at]).mean()), 5),
                    "loss": difference(with_it, without, resamples, seed).report(),
                }
        return result

    def overlap(self) -> dict[str, Any]:
        """The share of each list that is in each other list, over all users together."""
        return {
            str(k): {
                first: {
                    second: round(float(self.both[first, second][at] / max(1, self.places[first][at])), 4)
                    for second in self.places
                }
                for first in self.places
            }
            for at, k in enumerate(self.ks)
        }

    def deciles(self, item_positives: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Recall over pairs in ten groups by training positives (N,) of the item; ties stay together."""
        positives = item_positives[self.items.rows]
        rank = np.searchsorted(np.sort(positives), positives, side="left")
        group = rank * DECILES // max(1, len(positives))
        return [
            {
                "positives": [int(positives[inside].min()), int(positives[inside].max())],
                "pairs": int(inside.sum()),
                "recall": {
                    name: {str(k): round(float(hit[at][inside].mean()), 5) for at, k in enumerate(self.ks)}
                    for name, hit in self.hits.items()
                },
            }
            for decile in range(DECILES)
            if (inside := group == decile).any()
        ]


def find(
    samples: Samples, channels: Mapping[str, Retriever], fuse: Fuse, truth: Truth, *, ks: Sequence[int], depth: int
) -> ListHits:
    """Request the lists of all channels, a batch of users at a time, and look up the held-out pairs in them."""
    size, names = len(samples.items), [*channels, FUSED]
    hits: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in names}
    both = {(first, second): np.zeros(len(ks), np.int64) for first in names for second in names}
    places = {name: np.zeros(len(ks), np.int64) for name in names}
    batch = max(1, min(1024, CELLS // size))
    for start in range(0, len(truth.user_rows), batch):
        users = truth.user_rows[start : start + batch]
        items = take(truth.items, np.arange(start, start + len(users)))
        assert isinstance(items, Bag)
        owner = np.repeat(np.arange(len(users)), np.diff(items.indptr))
        asked = min(size, max(*ks, depth))
        told = {name: take(column, np.arange(start, start + len(users))) for name, column in truth.context.items()}
        lists = {name: candidates(samples, channel, users, asked, told) for name, channel in channels.items()}
        # One fused list for each length: the number of requested candidates depends on it.
        at_k = {name: [found.rows[:, :k] for k in ks] for name, found in lists.items()}
        at_k[FUSED] = [fuse({n: _first(found, max(k, depth)) for n, found in lists.items()}, k).rows for k in ks]
        listed = np.zeros((len(users), size), bool)
        for second in names:
            hit = np.zeros((len(ks), len(owner)), bool)
            for at, rows in enumerate(at_k[second]):
                user, place = np.nonzero(rows != PADDING)
                listed[:] = False
                listed[user, rows[user, place]] = True
                hit[at] = listed[owner, items.rows]
                places[second][at] += len(user)
                for first in names:
                    inside = listed[np.arange(len(users))[:, None], at_k[first][at]] & (at_k[first][at] != PADDING)
                    both[first, second][at] += inside.sum()
            hits[second].append(hit)
        log.info("%d of %d users", start + len(users), len(truth.user_rows))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in hits.items()}
    union = np.logical_or.reduce([joined[name] for name in channels])
    return ListHits(truth.items, ks, {**joined, UNION: union}, both, places)


def _first(found: Candidates, k: int) -> Candidates:
    return Candidates(found.rows[:, :k], found.scores[:, :k])
