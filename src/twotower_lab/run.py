"""Run experiments: their units on the cores of this machine, then a result, a plot, and one report of all in a folder.

DIR/NAME/arms/DATA/SEED/ARM.json   what an arm found, user by user; made once. Of a smoke run DIR/NAME/smoke/...
DIR/NAME/result.json               differences, intervals, verdicts
DIR/NAME/plot.svg
DIR/report.html                    of all experiments that the folder holds
"""

import datetime
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import read_json, whole_file, write_json
from twotower_lab.experiments import DATA, EXPERIMENTS, Claim, Experiment, LogData, WorldData
from twotower_lab.page import plot, report
from twotower_lab.system import System
from twotower_lab.trials import Unit, check_definitions, finished, run_unit, units, usable
from twotower_lab.verdict import MOST_SEEDS, Interval, interval, offline, verdict

log = logging.getLogger(__name__)

ALL: Final = "all"
RESULT: Final = "result.json"
PLOT: Final = "plot.svg"
REPORT: Final = "report.html"

Floats = npt.NDArray[np.float64]


def listed() -> list[dict[str, Any]]:
    """Every experiment, as `twotower lab list` prints it."""
    return [
        {
            "name": name,
            "question": one.question,
            "data": list(one.data),
            "arms": list(one.arms),
            "claims": [claim.text for claim in one.claims],
        }
        for name, one in EXPERIMENTS.items()
    ]


def run(
    system: System,
    name: str,
    out: Path,
    *,
    seeds: int | None = None,
    smoke: bool = False,
    data: Path | None = None,
    jobs: int = 1,
    command: str = "",
) -> dict[str, Any]:
    """Run an experiment, or all; what the folder holds of others stays, and of the same definition is not made again.

    Args:
        system: what is tested.
        name: of an experiment, or `all`.
        out: the folder of results.
        seeds: of each data set; None = the data set's own number.
        smoke: tiny worlds and one seed, to see that everything runs: its verdicts mean nothing.
        data: the folder of real logs; None or without one of them = that part is left out, and the result says so.
        jobs: processes beside each other, of one thread each.
        command: how this was asked for, for the report.

    Returns:
        `report`, its path, and `experiments`: by name, what became of each claim.

    Raises:
        ConfigError: no such experiment, or a number of seeds that cannot be.
        DataError: a data set that is there, but not whole.
    """
    if name != ALL and name not in EXPERIMENTS:
        raise ConfigError(f"there is no experiment {name!r}: one of {', '.join(EXPERIMENTS)}, or {ALL}")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        raise ConfigError(f"seeds={seeds}: from 1 to {MOST_SEEDS}")
    if jobs < 1:
        raise ConfigError(f"jobs={jobs}: at least 1")
    chosen = list(EXPERIMENTS) if name == ALL else [name]
    check_definitions(system)
    skipped: dict[str, dict[str, str]] = {}
    todo: dict[str, list[Unit]] = {}
    for one in chosen:
        reasons = {where: usable(where, data, smoke) for where in EXPERIMENTS[one].data}
        skipped[one] = {where: reason for where, reason in reasons.items() if reason is not None}
        todo[one] = [
            unit
            for where, reason in reasons.items()
            if reason is None
            for unit in units(one, where, 1 if smoke else seeds or DATA[where].seeds, smoke)
        ]
    for one in _done(system, todo, out, data, jobs):
        result = summarise(one, todo[one], out)
        result |= {"skipped": skipped[one], "made": made(command, smoke)}
        write_json(out / one / RESULT, result)
        _write(out / one / PLOT, plot(result))
        _write(out / REPORT, report(list(results(out).values())))
        verdicts = ", ".join(f"{claim['text']}: {claim['verdict']}" for claim in result["claims"])
        log.info("%s done. %s", one, verdicts)
    return {
        "report": str(out / REPORT),
        "experiments": {
            one: {claim["text"]: claim["verdict"] for claim in result["claims"]}
            for one, result in results(out).items()
            if one in chosen
        },
    }


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The results that a folder holds, in the order of the experiments."""
    return {name: read_json(out / name / RESULT) for name in EXPERIMENTS if (out / name / RESULT).exists()}


def made(command: str, smoke: bool) -> dict[str, Any]:
    """How, when and where a result was made."""
    return {
        "command": command,
        "smoke": smoke,
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{os.cpu_count()} cores, {_processor()}, {platform.system()}, Python {platform.python_version()}",
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8", errors="replace").splitlines() if told.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _done(system: System, todo: Mapping[str, Sequence[Unit]], out: Path, data: Path | None, jobs: int) -> Iterator[str]:
    """Run all units; gives each experiment when its last unit is finished."""
    with tempfile.TemporaryDirectory(prefix="twotower-lab-") as scratch:
        if jobs > 1:
            yield from _beside(system, todo, out, data, jobs, Path(scratch))
            return
        for name, of_one in todo.items():
            for unit in of_one:
                run_unit(system, unit, out, data, Path(scratch))
            yield name


def _beside(
    system: System, todo: Mapping[str, Sequence[Unit]], out: Path, data: Path | None, jobs: int, scratch: Path
) -> Iterator[str]:
    """The same in several processes; they end at once when this one is interrupted."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started: libraries read it when they load
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger("twotower").getEffectiveLevel()
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(level,)) as pool:
        waiting: dict[str, set[Future[None]]] = {
            name: {pool.submit(run_unit, system, unit, out, data, scratch) for unit in of_one}
            for name, of_one in todo.items()
        }
        try:
            while waiting:
                for name in [name for name, left in waiting.items() if not left]:
                    del waiting[name]
                    yield name
                ended, _ = wait(set().union(*waiting.values()), return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                waiting = {name: left - ended for name, left in waiting.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin(level: int) -> None:
    """A process of the pool begins: it says what it does, and leaves Ctrl-C to the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("twotower_lab").setLevel(level)


def summarise(name: str, done: Iterable[Unit], out: Path) -> dict[str, Any]:
    """Differences, intervals and verdicts of an experiment out of its arms' files.

    Raises:
        DataError: a unit has not been run.
    """
    experiment = EXPERIMENTS[name]
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for unit in done:
        for arm in unit.arms:
            result = finished(out, unit, arm)
            if result is None:
                raise DataError(f"{unit}, {arm}: no result in {out}, although it was run: run it again")
            found.setdefault(unit.data, {}).setdefault(arm, {})[unit.seed] = result
    return {
        "name": name,
        "question": experiment.question,
        "why": experiment.why,
        "kind": experiment.kind,
        "order": list(experiment.arms),
        "arms": {arm: what.described for arm, what in experiment.arms.items()},
        "base": list(experiment.base),
        "data": {data: _described(data, arms) for data, arms in found.items()},
        "claims": [_judged(claim, found) for claim in experiment.claims],
        "panels": [panel for data, arms in found.items() for panel in _panels(experiment, data, arms)],
        "figures": {data: _figures(experiment, data, arms) for data, arms in found.items()},
        "series": {data: _series(arms) for data, arms in found.items()} if experiment.kind == "feedback" else {},
        "cpu_s": round(sum(one["cpu_s"] for arms in found.values() for seed in arms.values() for one in seed.values())),
    }


Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Results of a data set, by arm and seed."""


def _described(data: str, arms: Found) -> dict[str, Any]:
    """What a data set is, and with how many seeds it was used."""
    what = DATA[data]
    seeds = max(len(by_seed) for by_seed in arms.values())
    if isinstance(what, WorldData):
        return {"seeds": seeds, "what": f"simulated, {what.users} users, {what.items} items, {what.days} days"}
    return {"seeds": seeds, "what": f"{what.dataset}, held out {what.holdout}, positive {what.positive}"}


def _values(arms: Found, arm: str, measure: str) -> dict[int, Floats]:
    """A measure of an arm by seed; of the seeds that have it."""
    return {
        seed: np.array(result["values"][measure])
        for seed, result in arms.get(arm, {}).items()
        if measure in result["values"]
    }


def compared(data: str, arms: Found, arm: str, than: str | None, measure: str) -> Interval | None:
    """An arm minus another, or its own figure; None where they have no seed in common with that measure."""
    ours = _values(arms, arm, measure)
    if than is None:
        values = ours
    else:
        theirs = _values(arms, than, measure)
        values = {seed: one - theirs[seed] for seed, one in ours.items() if seed in theirs}
    if not values:
        return None
    return interval(list(values.values()), same_users=isinstance(DATA[data], LogData))


def _judged(claim: Claim, found: Mapping[str, Found]) -> dict[str, Any]:
    """A claim's conditions, and its verdict."""
    conditions = []
    for data, arms in found.items():
        world = isinstance(DATA[data], WorldData)
        signs: dict[str, int] = {}
        logged = None if world and claim.logged == claim.true else claim.logged
        for kind, measure in (("true", claim.true if world else None), ("logged", logged)):
            against = [
                (than, one)
                for than in (claim.than or (None,))
                if measure is not None and (one := compared(data, arms, claim.better, than, measure)) is not None
            ]
            if not against:
                continue
            flipped = [(than, one.flipped() if claim.lower else one) for than, one in against]
            than, worst = min(flipped, key=lambda pair: (pair[1].sign, pair[1].value))
            signs[kind] = worst.sign
            conditions.append(
                {
                    "data": data,
                    "kind": kind,
                    "measure": measure,
                    "against": than,
                    "judged": kind == ("true" if world else "logged"),
                    "sign": worst.sign,
                    **worst.document(),
                }
            )
        if len(signs) == 2:
            conditions[-1]["offline"] = offline(signs["true"], signs["logged"])
    return {
        "text": claim.text,
        "better": claim.better,
        "than": list(claim.than),
        "lower": claim.lower,
        "verdict": verdict([one["sign"] for one in conditions if one["judged"]]),
        "conditions": conditions,
    }


def _panels(experiment: Experiment, data: str, arms: Found) -> Iterator[dict[str, Any]]:
    """What the plot shows of a data set: every arm minus the first, by the truth and by clicks."""
    names = [arm for arm in experiment.arms if arm in arms]
    if experiment.kind == "feedback" or not names:
        return
    world = isinstance(DATA[data], WorldData)
    for true, logged in experiment.plotted:
        kinds = {"true": true if world else None, "logged": logged}
        rows: dict[str, dict[str, Any]] = {arm: {} for arm in names}
        means: dict[str, dict[str, float]] = {}
        for kind, measure in kinds.items():
            if measure is None or (first := compared(data, arms, names[0], None, measure)) is None:
                continue
            means[kind] = {names[0]: first.value}
            for arm in names[1:]:
                difference = compared(data, arms, arm, names[0], measure)
                own = compared(data, arms, arm, None, measure)
                if difference is not None and own is not None:
                    rows[arm][kind] = difference.document()
                    means[kind][arm] = own.value
        if means:
            yield {
                "data": data,
                "measures": {kind: measure for kind, measure in kinds.items() if kind in means},
                "first": names[0],
                "rows": rows,
                "best": {kind: max(of_kind, key=of_kind.__getitem__) for kind, of_kind in means.items()},
                "offline": {
                    arm: offline(*(Interval.of(row[kind]).sign for kind in ("true", "logged")))
                    for arm, row in rows.items()
                    if len(row) == 2
                },
            }


def _figures(experiment: Experiment, data: str, arms: Found) -> dict[str, dict[str, float]]:
    """The means of an experiment's measures and facts, by arm."""
    world = isinstance(DATA[data], WorldData)
    pairs = experiment.plotted if experiment.kind != "feedback" else ()
    measures = [name for pair in pairs for name in (pair if world else pair[1:]) if name is not None]
    measures += [name for name in experiment.facts if name not in measures]
    if experiment.kind == "feedback":
        first = next(iter(next(iter(arms.values())).values()))
        measures = [name for name in first["values"] if name.endswith(", last days")]
    rows: dict[str, dict[str, float]] = {}
    for arm in (arm for arm in experiment.arms if arm in arms):
        for measure in measures:
            values = [values.mean() for values in _values(arms, arm, measure).values()]
            values += [one["facts"][measure] for one in arms[arm].values() if measure in one["facts"]]
            if values:
                rows.setdefault(arm, {})[measure] = round(float(np.mean(values)), 5)
    return rows


def _series(arms: Found) -> dict[str, dict[str, list[list[float]]]]:
    """By measure and arm, the days of each seed."""
    series: dict[str, dict[str, list[list[float]]]] = {}
    for arm, by_seed in arms.items():
        for result in by_seed.values():
            for measure, days in result["facts"]["series"].items():
                series.setdefault(measure, {}).setdefault(arm, []).append(days)
    return series


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
