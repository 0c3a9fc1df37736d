"""How the arms of each kind of experiment run in one workspace, and what they find.

B users, N items.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Retriever
from twotower.config.settings import Settings
from twotower.datasets.workspace import HOLDOUT_IMPRESSIONS
from twotower.evaluate.calibration import auc, auc_within
from twotower.evaluate.holdout import candidates, ranked
from twotower.evaluate.ranking import Shown, read_shown, user_auc
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.protocol import PADDING
from twotower.pipeline.line import (
    build_samples,
    evaluate_rankers,
    fusion_of,
    offline_channels,
    train_model,
)
from twotower.pipeline.recorded import fixed_by_samples, fixed_by_training
from twotower.publish.version import PRE_RANK, RANK, TWO_TOWER
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.train.towers import TrainReport
from twotower.update.gate import spaced
from twotower.worlds.world import SCENES, World
from twotower_lab.ease import Ease
from twotower_lab.experiments import Experiment
from twotower_lab.score import Judge, Lists
from twotower_lab.stages import Stages, published

INDEXED_QUERIES: Final = 500
"""Users that an index is tuned on."""
FUSED_USERS: Final = 300
"""Users whose lists come from rankers over the whole catalogue."""
PRIOR: Final = 20
"""Impressions at the mean click rate that are added to the impressions of each item."""

Floats = npt.NDArray[np.float64]
Values = dict[str, Floats]


@dataclass(frozen=True)
class Result:
    """What an arm found."""

    arm: str
    values: Values
    """By measure, of each user."""
    facts: dict[str, Any]
    """Numbers of the whole arm."""


@dataclass(frozen=True)
class Trial:
    """The arms of an experiment on one workspace."""

    experiment: Experiment
    settings: Mapping[str, Settings]
    """By arm."""
    workspace: Path
    world: World | None
    many_items: int
    """`fusion`: items over which the cost of an answer is measured."""

    @property
    def _first(self) -> Settings:
        return next(iter(self.settings.values()))

    def _judge(self, settings: Settings, most: int | None = None) -> Judge:
        experiment = self.experiment
        return Judge(self.workspace, self.world, experiment.ks, experiment.groups, settings.evaluate.context, most)

    def _samples(self) -> Samples:
        return open_samples(self.workspace / "samples")

    def run(self) -> Iterator[Result]:
        """What each arm finds, one after the other."""
        runs: dict[str, Callable[[], Iterator[Result]]] = {
            "train": self.train,
            "index": self.index,
            "fusion": self.fusion,
            "ranking": self.ranking,
        }
        return runs[self.experiment.kind]()

    def train(self) -> Iterator[Result]:
        """Each arm is a channel of a configuration; samples and models are made again only where they differ."""
        made = trained = None
        for name, configured in self.settings.items():
            if made != (made := fixed_by_samples(configured)):
                build_samples(configured)
            if trained != (trained := fixed_by_training(configured)):
                started = time.process_time()
                report = train_model(configured)
                train_s = time.process_time() - started
            samples, channel = self._samples(), self.experiment.arms[name].channel
            facts = {"train_s": round(train_s, 2), "us_a_positive": round(1e6 * train_s / report.rows, 2)}
            facts["fit_s"] = round(report.channels.get(channel, report).seconds, 2)
            lists = lists_of(configured, samples, channel, max(self.experiment.ks))
            yield Result(name, self._judge(configured).score(samples, lists), facts)

    def index(self) -> Iterator[Result]:
        """One model, and an index of each arm over its vectors."""
        version, samples, judge = published(self._first), self._samples(), self._judge(self._first)
        (k,) = self.experiment.ks

        def scored(channel: Retriever) -> Values:
            return judge.score(samples, lambda truth: ranked(samples, channel, truth.user_rows, k))

        vectors, rows = np.asarray(version.item_vectors), np.arange(len(samples.items))
        channel = version.two_tower.over(TWO_TOWER, ExactIndex.build(rows, vectors))
        users = np.flatnonzero(np.diff(samples.clicks.indptr))
        users = users[spaced(len(users), INDEXED_QUERIES)]
        asked = queries_of_users(samples.features, samples.users, samples.clicks, users)
        queries, exact = channel.user_vectors(asked), scored(channel)
        for arm, of_arm in self.settings.items():
            index = build_index(of_arm.index, rows, vectors, queries, ks=[k], seed=of_arm.train.seed)
            approximate = channel.over(TWO_TOWER, index)
            values = scored(approximate)
            kept = share_of(*(ranked(samples, searched, users, k) for searched in (channel, approximate)))
            facts: dict[str, Any] = {f"index_recall@{k}": round(kept, 4)}
            if isinstance(index, FaissIndex) and index.tuning:
                facts["scanned"] = index.tuning[0].nprobe
            spared = {f"spared {name}": values[name] - kept * exact[name] for name in values if "recall" in name}
            yield Result(arm, values | spared, facts)

    def fusion(self) -> Iterator[Result]:
        """One version with two towers and rankers; arms differ in how many items reach which ranker."""
        configured = max(self.settings.values(), key=lambda settings: len(settings.models.rankers))
        version, samples = published(configured), self._samples()
        for arm, of_arm in self.settings.items():
            stages = Stages(version, of_arm.models.rankers, of_arm.funnel)
            started = time.process_time()
            values = self._judge(of_arm, FUSED_USERS).score(samples, stages.lists)
            each_ms = 1000 * (time.process_time() - started) / len(values["recall@50"])
            cost = {"ms, million items": np.array([stages.cost_ms(self.many_items)])}
            yield Result(arm, values | cost, {"ms": round(each_ms, 3)})

    def ranking(self) -> Iterator[Result]:
        """One pair of rankers, and what orders impressions without a network."""
        settings = self._first
        build_samples(settings)
        report, samples = train_model(settings), self._samples()
        figures = evaluate_rankers(settings, samples)
        shown = read_shown(self.workspace / HOLDOUT_IMPRESSIONS, samples)
        for name in self.settings:
            order = self.experiment.arms[name].channel
            if order in (PRE_RANK, RANK):
                yield _of_ranker(name, order, figures, report)
            else:
                scores = click_rates(samples)[shown.item_row] if order == "click_rate" else self._utility()
                yield Result(name, _orders(scores, shown), {})

    def _utility(self) -> Floats:
        """The true utility of the held-out impressions of a world, all of whose items are known."""
        assert self.world is not None
        table = pq.read_table(self.workspace / HOLDOUT_IMPRESSIONS)
        users = self.world.user_rows(table[c.USER_ID].combine_chunks())
        items = self.world.item_rows(table[c.ITEM_ID].combine_chunks())
        scenes = np.array([SCENES.index(scene) for scene in table["scene"].to_pylist()])
        return self.world.truth.utility(users, items, table[c.REQUEST_TS_MS].to_numpy(), scenes)


def _of_ranker(name: str, ranker: str, figures: Mapping[str, Any], report: TrainReport) -> Result:
    """The figures of one ranker; of the pre-ranker also what it keeps of the ranker's best."""
    own = figures[ranker]
    measures = {measure: value for measure, value in own.items() if isinstance(value, float)}
    if own["user_auc"]:
        measures["user_auc"] = own["user_auc"]["value"]
    kept = figures["kept_of_top"]
    if ranker == PRE_RANK and kept["share"]:
        share, fused = kept["share"]["value"], kept["share_fused"]["value"]
        measures |= {"kept": share, "kept, fused": fused, "kept, gain": share - fused}
    facts = {"deciles": own["deciles"], "position": report.rankers[ranker].position, "impressions": own["impressions"]}
    return Result(name, {measure: np.array([value]) for measure, value in measures.items()}, facts)


def _orders(scores: Floats, shown: Shown) -> Values:
    """How well scores (R,) order impressions."""
    measures = {"auc": auc(scores, shown.clicked), "position_auc": auc_within(scores, shown.clicked, shown.position)}
    if mean := user_auc(scores, shown, 2, 0)["user_auc"]:
        measures["user_auc"] = mean["value"]
    return {measure: np.array([value]) for measure, value in measures.items()}


def click_rates(samples: Samples) -> Floats:
    """The share of each item's impressions (N,) that was clicked in training, moved to the mean where there are few."""
    trained, size = samples.impressions, len(samples.items)
    assert trained is not None
    clicks, seen = np.bincount(trained.item_row, trained.clicked, size), np.bincount(trained.item_row, minlength=size)
    rates: Floats = (clicks + PRIOR * trained.clicked.mean()) / (seen + PRIOR)
    return rates


def lists_of(settings: Settings, samples: Samples, channel: str, length: int) -> Lists:
    """The lists of a channel, of `ease`, or of all channels as one list (`fused`)."""
    if channel == Ease.name:
        ease = Ease(samples)
        return lambda truth: ranked(samples, ease, truth.user_rows, length)
    channels = offline_channels(settings, samples)
    if channel != "fused":
        return lambda truth: ranked(samples, channels[channel], truth.user_rows, length, truth.context)
    fusion = fusion_of(settings)
    asked = min(fusion.asked(length, tuple(channels)), len(samples.items))
    return lambda truth: (
        fusion.fuse(
            {
                name: candidates(samples, retriever, truth.user_rows, asked, truth.context)
                for name, retriever in channels.items()
            },
            length,
        ).candidates.rows
    )


def share_of(best: npt.NDArray[np.int64], retrieved: npt.NDArray[np.int64]) -> float:
    """The share of the best lists (B, k) that is among the retrieved ones.

    >>> share_of(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]]))
    0.75
    """
    size = max(int(best.max()), int(retrieved.max())) + 1
    owner = np.arange(len(best))[:, None] * size
    return float(np.isin((owner + best)[best != PADDING], (owner + retrieved)[retrieved != PADDING]).mean())
