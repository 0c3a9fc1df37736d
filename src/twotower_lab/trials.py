"""Arms on one data set and one seed: a workspace, models, lists, and what they find, a file for each arm.

A file that is there is not made again, so that an interrupted run goes on where it was.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Retriever
from twotower.config.load import load
from twotower.config.settings import Settings
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.evaluate.holdout import candidates, ranked
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.faiss_index import FaissIndex
from twotower.index.protocol import PADDING
from twotower.publish.version import TWO_TOWER
from twotower.samples.options import NegativesOptions
from twotower.samples.read import Samples, open_samples
from twotower.schema.errors import DataError
from twotower.schema.files import read_json, write_json
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower.worlds.world import World
from twotower_lab.experiments import DATA, EXPERIMENTS, LogData, WorldData
from twotower_lab.feedback import feed_back
from twotower_lab.replay import first_model, replay, set_aside
from twotower_lab.score import K, score
from twotower_lab.stages import Stages
from twotower_lab.system import System

log = logging.getLogger(__name__)

FORMAT: Final = 1
OWN: Final = ("engine.threads=1", "train.threads=1", "samples.held_out_users=0")
"""Several arms run beside each other, each on a core; and everyone is learned from, for arms are judged by everyone."""
SMOKE: Final = ("train.epochs=1", "train.batch_size=256", "models.dimension=16")
SMOKE_USERS, SMOKE_ITEMS, SMOKE_DAYS = 250, 200, 3
SMOKE_LOOP_DAYS: Final = 2
SMOKE_REPLAYED_DAYS: Final = 1
INDEXED_QUERIES: Final = 500
FUSED_USERS: Final = 300
"""Users whose lists come from rankers over the whole catalogue."""
MANY, FEW_ITEMS = 1_000_000, 20_000
"""Items over which the cost of an answer is measured, and the same in a smoke run."""
"""Users that an index is tuned on."""

Values = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: some arms of an experiment that share a workspace."""

    experiment: str
    data: str
    seed: int
    arms: tuple[str, ...]
    smoke: bool

    def __str__(self) -> str:
        """Its name in the log."""
        return f"{self.experiment}: {self.data}, seed {self.seed}" + (
            f", {self.arms[0]}" if len(self.arms) == 1 else ""
        )


def units(name: str, data: str, seeds: int, smoke: bool) -> Iterator[Unit]:
    """The units of an experiment on a data set; arms of a feedback loop share nothing but the first log."""
    experiment = EXPERIMENTS[name]
    arms = tuple(arm for arm, what in experiment.arms.items() if not what.on or data in what.on)
    for seed in range(seeds):
        for group in [(arm,) for arm in arms] if experiment.kind == "feedback" else [arms]:
            yield Unit(name, data, seed, group, smoke)


def key_of(unit: Unit, arm: str) -> str:
    """A digest of everything that an arm's result depends on, except the code."""
    experiment, data = EXPERIMENTS[unit.experiment], _data(unit)
    changes = [*experiment.base, *experiment.arms[arm].changes]
    described = {name: value for name, value in asdict(data).items() if name != "seeds"}
    what = [FORMAT, experiment.kind, changes, described, unit.seed, unit.smoke]
    if experiment.kind in ("feedback", "updates"):
        what.append(_loop_days(unit))
    if experiment.kind == "updates":
        what.append(asdict(experiment.arms[arm].way))
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def result_path(out: Path, unit: Unit, arm: str) -> Path:
    """Where an arm's result is kept; those of a smoke run apart, so that they replace no others."""
    words = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in arm)
    return out / unit.experiment / ("smoke" if unit.smoke else "arms") / unit.data / str(unit.seed) / f"{words}.json"


def finished(out: Path, unit: Unit, arm: str) -> dict[str, Any] | None:
    """An arm's result if it is there and of the same definition; a damaged one is made again."""
    path = result_path(out, unit, arm)
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = read_json(path)
    except DataError as error:
        log.warning("%s", error)
        return None
    return result if result.get("key") == key_of(unit, arm) else None


def run_unit(system: System, unit: Unit, out: Path, data: Path | None, scratch: Path) -> None:
    """Run those arms of a unit that have no result yet.

    Args:
        system: what is tested.
        unit: the arms.
        out: the folder of all results.
        data: the folder of real logs.
        scratch: a folder for workspaces on the way.
    """
    missing = [arm for arm in unit.arms if finished(out, unit, arm) is None]
    if not missing:
        return
    log.info("%s: %d arms", unit, len(missing))
    experiment = EXPERIMENTS[unit.experiment]

    def keep(arm: str, values: Values, facts: dict[str, Any], seconds: float) -> None:
        rounded = {name: np.asarray(one, np.float64).round(6).tolist() for name, one in values.items()}
        write_json(
            result_path(out, unit, arm),
            {"key": key_of(unit, arm), "arm": arm, "values": rounded, "facts": facts, "cpu_s": round(seconds, 2)},
        )

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        workspace = Path(folder) / "workspace"
        _make_workspace(_data(unit), unit.seed, workspace, data)
        if experiment.kind == "feedback":
            for arm in missing:
                started = time.process_time()
                values, facts = feed_back(system, _settings(system, unit, arm, workspace), _loop_days(unit))
                keep(arm, values, facts, time.process_time() - started)
            return
        world = world_of(workspace)
        if experiment.kind == "updates":
            later = set_aside(workspace, _loop_days(unit), world)
            first_model(system, _settings(system, unit, None, workspace), workspace, later)
            for arm in missing:
                copied = shutil.copytree(workspace, Path(folder) / "arm", copy_function=os.link)
                started = time.process_time()
                values, facts = replay(
                    system, _settings(system, unit, arm, copied), experiment.arms[arm].way, later, world
                )
                keep(arm, values, facts, time.process_time() - started)
                shutil.rmtree(copied)
            return
        runs: dict[str, Callable[..., Iterator[Result]]] = {
            "train": _models,
            "channels": _channels,
            "index": _indexes,
            "fusion": partial(_fusions, items=FEW_ITEMS if unit.smoke else MANY),
        }
        started = time.process_time()
        settings = {arm: _settings(system, unit, arm, workspace) for arm in missing}
        for result in runs[experiment.kind](system, settings, workspace, world):
            keep(result.arm, result.values, result.facts, time.process_time() - started)
            started = time.process_time()


@dataclass(frozen=True)
class Result:
    """What an arm found."""

    arm: str
    values: Values
    """By measure, of each user."""
    facts: dict[str, Any]
    """Numbers of the whole arm."""


def _models(system: System, settings: dict[str, Settings], workspace: Path, world: World | None) -> Iterator[Result]:
    """Each arm is a model of its own; samples are made again only where they differ."""
    made = None
    for arm, configured in settings.items():
        if made != (made := _of_samples(configured)):
            system.make_samples(configured)
        started = time.process_time()
        system.train(configured)
        seconds = time.process_time() - started
        samples = open_samples(workspace / "samples")
        channel = system.channels(configured, samples)[TWO_TOWER]
        yield Result(arm, _found(samples, workspace, channel, world), {"train_s": round(seconds, 2)})


def _channels(system: System, settings: dict[str, Settings], workspace: Path, world: World | None) -> Iterator[Result]:
    """All arms are lists of one set of models."""
    configured = next(iter(settings.values()))
    system.make_samples(configured)
    system.train(configured)
    samples = open_samples(workspace / "samples")
    channels, fusion = system.channels(configured, samples), system.fusion(configured)

    def fused(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        asked = min(fusion.asked(K, tuple(channels)), len(samples.items))
        lists = {name: candidates(samples, channel, rows, asked) for name, channel in channels.items()}
        return fusion.fuse(lists, K).candidates.rows

    for arm in settings:
        if arm in channels:
            yield Result(arm, _found(samples, workspace, channels[arm], world), {})
        else:
            yield Result(arm, score(samples, workspace, fused, world), {})


def _indexes(system: System, settings: dict[str, Settings], workspace: Path, world: World | None) -> Iterator[Result]:
    """One model, and an index of each arm over its vectors."""
    configured = next(iter(settings.values()))
    system.make_samples(configured)
    system.train(configured)
    system.publish(configured)
    samples, version = open_samples(workspace / "samples"), system.served(configured)
    vectors, rows = version.item_vectors, np.arange(len(samples.items))
    assert isinstance(vectors, np.ndarray)  # nothing is laid over a version that is new
    channel = version.two_tower.over(TWO_TOWER, ExactIndex.build(rows, vectors))
    users = np.flatnonzero(np.diff(samples.clicks.indptr))
    users = users[np.linspace(0, len(users) - 1, INDEXED_QUERIES).astype(np.int64)]
    queries = channel.user_vectors(queries_of_users(samples.features, samples.users, samples.clicks, users))
    exact = _found(samples, workspace, channel, world)
    for arm, of_arm in settings.items():
        index = build_index(of_arm.index, rows, vectors, queries, ks=[K], seed=of_arm.train.seed)
        approximate = channel.over(TWO_TOWER, index)
        values = _found(samples, workspace, approximate, world)
        best, found = (ranked(samples, one, users, K) for one in (channel, approximate))
        kept = _share_of(best, found)
        facts: dict[str, Any] = {"index_recall@50": round(kept, 4)}
        if isinstance(index, FaissIndex) and index.tuning:
            facts["scanned"] = index.tuning[0].nprobe
        spared = {f"spared {name}": values[name] - kept * exact[name] for name in values if "recall" in name}
        yield Result(arm, values | spared, facts)


def _fusions(
    system: System, settings: dict[str, Settings], workspace: Path, world: World | None, items: int
) -> Iterator[Result]:
    """One version with two towers and rankers; arms differ in how many items reach which ranker."""
    configured = max(settings.values(), key=lambda one: len(one.models.rankers))
    system.make_samples(configured)
    system.train(configured)
    system.publish(configured)
    samples, version = open_samples(workspace / "samples"), system.served(configured)
    for arm, of_arm in settings.items():
        sizes = of_arm.funnel
        funnel = Stages(version, of_arm.models.rankers, sizes.retrieve, sizes.pre_rank, sizes.cosine)
        started = time.process_time()
        values = score(samples, workspace, funnel.lists, world, FUSED_USERS)
        each_ms = 1000 * (time.process_time() - started) / len(values[f"recall@{K}"])
        million_ms = funnel.cost_ms(items)
        yield Result(arm, values | {"ms, million items": np.array([million_ms])}, {"ms": round(each_ms, 3)})


def _share_of(best: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> float:
    """The share of the best lists (B, k) that is in the found ones.

    >>> _share_of(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]]))
    0.75
    """
    size = max(int(best.max()), int(found.max())) + 1
    owner = np.arange(len(best))[:, None] * size
    return float(np.isin((owner + best)[best != PADDING], (owner + found)[found != PADDING]).mean())


def _found(samples: Samples, workspace: Path, channel: Retriever, world: World | None) -> Values:
    return score(samples, workspace, lambda rows: ranked(samples, channel, rows, K), world)


def _of_samples(settings: Settings) -> Any:
    """Everything that samples depend on."""
    negatives = settings.samples.negatives
    shown = negatives.impressed_as_negatives_for_experiments
    kept = NegativesOptions(hard_most=negatives.hard_most, impressed_as_negatives_for_experiments=shown)
    return settings.features, settings.models.dimension, replace(settings.samples, negatives=kept)


def _data(unit: Unit) -> WorldData | LogData:
    data = DATA[unit.data]
    if unit.smoke and isinstance(data, WorldData):
        return replace(data, users=SMOKE_USERS, items=SMOKE_ITEMS, days=SMOKE_DAYS)
    return data


def _loop_days(unit: Unit) -> int:
    experiment = EXPERIMENTS[unit.experiment]
    if unit.smoke:
        return SMOKE_LOOP_DAYS if experiment.kind == "feedback" else SMOKE_REPLAYED_DAYS
    return experiment.loop_days


def _settings(system: System, unit: Unit, arm: str | None, workspace: Path) -> Settings:
    """The configuration of an arm: the data set's, the experiment's, the arm's own; None = what all arms share."""
    experiment, data = EXPERIMENTS[unit.experiment], DATA[unit.data]
    of_arm = () if arm is None else experiment.arms[arm].changes
    changes = [*data.changes, *(SMOKE if unit.smoke else ()), *experiment.base, *of_arm]
    own = [f"workspace.path={workspace}", f"train.seed={unit.seed}", f"samples.seed={unit.seed}", *OWN]
    return load(system.examples / data.config, [*changes, *own])


def _make_workspace(data: WorldData | LogData, seed: int, workspace: Path, folder: Path | None) -> None:
    if isinstance(data, WorldData):
        simulate_workspace(workspace, WorldOptions(users=data.users, items=data.items, days=data.days, seed=seed))
    elif folder is None:
        raise DataError(f"no folder of data for {data.dataset}")
    else:
        options = ImportOptions(holdout=data.holdout, positive=data.positive, until=data.until)
        import_dataset(data.dataset, folder / data.folder, workspace, options)


def usable(name: str, folder: Path | None, smoke: bool) -> str | None:
    """Why a data set cannot be used; None if it can."""
    data = DATA[name]
    if isinstance(data, WorldData):
        return None
    if smoke:
        return "left out of a smoke run"
    if folder is None or not (folder / data.folder).exists():
        return f"no {data.folder} in --data, $TWOTOWER_DATA or ../shared/data"
    return None


def check_definitions(system: System) -> None:
    """Read every arm's configuration once.

    Raises:
        ConfigError: a change that no configuration takes.
    """
    for name, experiment in EXPERIMENTS.items():
        for data in experiment.data:
            for unit in units(name, data, 1, False):
                for arm in unit.arms:
                    _settings(system, unit, arm, Path("workspace"))
