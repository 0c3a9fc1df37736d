"""Arms on one data set and one seed: a workspace, models, lists, and what they find, a file for each arm.

A file that is there is not made again, so that an interrupted run continues where it was.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np

from twotower.config.load import load
from twotower.config.settings import Settings
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.schema.errors import DataError
from twotower.schema.files import read_json, write_json
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace, world_of
from twotower_lab.experiments import DATA, EVERYWHERE, EXPERIMENTS, Experiment, LogData, WorldData
from twotower_lab.feedback import feed_back
from twotower_lab.kinds import Result, Trial
from twotower_lab.replay import first_model, replay, set_aside

log = logging.getLogger(__name__)

FORMAT: Final = 2
EXAMPLES: Final = Path(str(files("twotower.cli"))) / "examples"
OWN: Final = ("engine.threads=1", "train.threads=1", "samples.held_out_users=0")
"""Several arms run side by side, each on a core. No user is held out, because arms are judged by all of them."""
SMOKE: Final = ("train.epochs=1", "train.batch_size=256", "models.dimension=16")
SMOKE_USERS, SMOKE_ITEMS, SMOKE_DAYS = 250, 200, 3
SMOKE_LOOP_DAYS: Final = {"feedback": 2, "updates": 1}
MANY_ITEMS, SMOKE_MANY_ITEMS = 1_000_000, 20_000
"""Items over which the cost of an answer is measured."""


@dataclass(frozen=True)
class Unit:
    """What one process does at a time: some arms of an experiment that share a workspace."""

    name: str
    data: str
    seed: int
    arms: tuple[str, ...]
    smoke: bool

    def __str__(self) -> str:
        """Its name in the log."""
        own = f", {self.arms[0]}" if len(self.arms) == 1 else ""
        return f"{self.name}: {self.data}, seed {self.seed}{own}"

    @property
    def experiment(self) -> Experiment:
        """The experiment that it belongs to."""
        return EXPERIMENTS[self.name]

    @property
    def source(self) -> WorldData | LogData:
        """The data that it uses; a world of a smoke run is tiny."""
        data = DATA[self.data]
        if self.smoke and isinstance(data, WorldData):
            return replace(data, users=SMOKE_USERS, items=SMOKE_ITEMS, days=SMOKE_DAYS)
        return data

    @property
    def loop_days(self) -> int:
        """Days that are served or replayed."""
        return SMOKE_LOOP_DAYS.get(self.experiment.kind, 0) if self.smoke else self.experiment.loop_days

    def settings(self, arm: str | None, workspace: Path) -> Settings:
        """The configuration of an arm: the data's, the experiment's, the arm's own; None = what all arms share.

        Raises:
            ConfigError: a change that no configuration takes.
        """
        data, experiment = DATA[self.data], self.experiment
        own = experiment.arms[arm].changes if arm else ()
        changes = [*EVERYWHERE, *data.changes, *(SMOKE if self.smoke else ()), *experiment.base, *own]
        place = [f"workspace.path={workspace}", f"train.seed={self.seed}", f"samples.seed={self.seed}", *OWN]
        return load(EXAMPLES / data.config, [*changes, *place])


def units(name: str, data: str, seeds: int, smoke: bool) -> Iterator[Unit]:
    """The units of an experiment on a data set; arms of a feedback loop share nothing but the first log."""
    experiment = EXPERIMENTS[name]
    arms = tuple(name for name, arm in experiment.arms.items() if not arm.on or data in arm.on)
    for seed in range(seeds):
        for group in [(arm,) for arm in arms] if experiment.kind == "feedback" else [arms]:
            yield Unit(name, data, seed, group, smoke)


def key_of(unit: Unit, arm: str) -> str:
    """A digest of everything that an arm's result depends on, except the code."""
    experiment = unit.experiment
    described = {name: value for name, value in asdict(unit.source).items() if name != "seeds"}
    judged = [experiment.kind, experiment.base, experiment.ks, experiment.groups, asdict(experiment.arms[arm])]
    what = [FORMAT, described, judged, unit.seed, unit.smoke, unit.loop_days]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def result_path(out: Path, unit: Unit, arm: str) -> Path:
    """Where an arm's result is kept; results of a smoke run are apart, so that they replace no others."""
    words = "".join(letter if letter.isalnum() or letter == "." else "_" for letter in arm)
    return out / unit.name / ("smoke" if unit.smoke else "arms") / unit.data / str(unit.seed) / f"{words}.json"


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


def run_unit(unit: Unit, out: Path, data: Path | None, scratch: Path) -> None:
    """Run those arms of a unit that have no result yet; `scratch` is a folder for temporary workspaces."""
    missing = [arm for arm in unit.arms if finished(out, unit, arm) is None]
    if not missing:
        return
    log.info("%s: %d arms", unit, len(missing))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        workspace = Path(folder) / "workspace"
        _make_workspace(unit.source, unit.seed, workspace, data)
        started = time.process_time()
        for result in _results(unit, missing, workspace):
            values = {name: np.asarray(own, np.float64).round(6).tolist() for name, own in result.values.items()}
            cpu_s = round(time.process_time() - started, 2)
            document = {"key": key_of(unit, result.arm), "arm": result.arm, "values": values, "facts": result.facts}
            write_json(result_path(out, unit, result.arm), {**document, "cpu_s": cpu_s})
            started = time.process_time()


def _results(unit: Unit, arms: Sequence[str], workspace: Path) -> Iterator[Result]:
    """What arms find in a workspace."""
    if unit.experiment.kind == "feedback":
        for arm in arms:
            yield Result(arm, *feed_back(unit.settings(arm, workspace), unit.loop_days))
        return
    world = world_of(workspace)
    if unit.experiment.kind == "updates":
        later = set_aside(workspace, unit.loop_days, world)
        first_model(unit.settings(None, workspace), workspace, later)
        for arm in arms:
            copied = shutil.copytree(workspace, workspace.parent / "arm", copy_function=os.link)
            way = unit.experiment.arms[arm].way
            yield Result(arm, *replay(unit.settings(arm, copied), way, later, world))
            shutil.rmtree(copied)
        return
    settings = {arm: unit.settings(arm, workspace) for arm in arms}
    items = SMOKE_MANY_ITEMS if unit.smoke else MANY_ITEMS
    yield from Trial(unit.experiment, settings, workspace, world, items).run()


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
        return "a smoke run has worlds alone"
    if folder is None or not (folder / data.folder).exists():
        return f"no {data.folder} in --data, $TWOTOWER_DATA or ../shared/data"
    return None


def check_definitions() -> None:
    """Read every arm's configuration once.

    Raises:
        ConfigError: a change that no configuration takes.
    """
    for name, experiment in EXPERIMENTS.items():
        for data in experiment.data:
            for unit in units(name, data, 1, False):
                for arm in unit.arms:
                    unit.settings(arm, Path("workspace"))
