"""Run experiments: their units on the cores of this machine, then a result, a plot, and one report of all in a folder.

DIR/NAME/arms/DATA/SEED/ARM.json   what an arm found, user by user; made once. Of a smoke run DIR/NAME/smoke/...
DIR/NAME/result.json               differences, intervals, verdicts
DIR/NAME/plot.svg
DIR/report.html                    of all results that the folder holds
"""

import datetime
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, Final

from twotower.schema.errors import ConfigError
from twotower.schema.files import read_json, whole_file, write_json
from twotower.schema.machine import machine
from twotower_lab.experiments import DATA, EXPERIMENTS
from twotower_lab.page import plot, report
from twotower_lab.results import summarise
from twotower_lab.trials import Unit, check_definitions, run_unit, units, usable

log = logging.getLogger(__name__)

ALL: Final = "all"
RESULT: Final = "result.json"
PLOT: Final = "plot.svg"
REPORT: Final = "report.html"


def listed() -> list[dict[str, Any]]:
    """Every experiment, as `twotower lab list` prints it."""
    return [
        {
            "name": name,
            "kind": experiment.kind,
            "question": experiment.question,
            "data": list(experiment.data),
            "arms": list(experiment.arms),
            "claims": [claim.text for claim in experiment.claims],
        }
        for name, experiment in EXPERIMENTS.items()
    ]


def run(
    names: Sequence[str],
    out: Path,
    *,
    seeds: int | None = None,
    smoke: bool = False,
    data: Path | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run experiments. The folder's results of other experiments stay; a result of the same definition is not repeated.

    Args:
        names: of experiments; `all` is all of them.
        out: the folder of results.
        seeds: of each data set; None = the data set's own number.
        smoke: tiny worlds and one seed, to see that everything runs: its verdicts mean nothing.
        data: the folder of real logs; None = the conventional one. A log that is not there is left out, and the result
            says so.
        jobs: number of processes, each with one thread.

    Returns:
        `report`, its path, and `experiments`: by name, the verdict on each claim.

    Raises:
        ConfigError: an experiment does not exist, a number is not possible, `data` is no folder, or no experiment has
            its data.
        DataError: a data set is damaged.
    """
    chosen = _chosen(names, seeds, data, jobs)
    words = [*names, *(["--seeds", seeds] if seeds else []), *(["--smoke"] if smoke else []), "--jobs", jobs]
    command = " ".join(["twotower lab run", *map(str, words), "--out DIR"])
    data = data or _real_logs()
    check_definitions()
    skipped = {name: _without(name, data, smoke) for name in chosen}
    todo = {name: own for name in chosen if (own := list(_units(name, skipped[name], seeds, smoke)))}
    for name in chosen:
        if name not in todo:
            log.warning("%s is left out: %s", name, "; ".join(skipped[name].values()))
    if not todo:
        raise ConfigError(f"nothing can be run: {'; '.join(skipped[chosen[0]].values())}")
    verdicts = {}
    for name in _done(todo, out, data, jobs):
        when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        made = {"command": command, "smoke": smoke, "when": when, "machine": machine()}
        result = {**summarise(name, todo[name], out), "skipped": skipped[name], "made": made}
        write_json(out / name / RESULT, result)
        _write(out / name / PLOT, plot(result))
        write_report(out)
        verdicts[name] = {claim["text"]: claim["verdict"] for claim in result["claims"]}
        log.info("%s done. %s", name, ", ".join(f"{text}: {verdict}" for text, verdict in verdicts[name].items()))
    return {"report": str(out / REPORT), "experiments": {name: verdicts[name] for name in todo}}


def _chosen(names: Sequence[str], seeds: int | None, data: Path | None, jobs: int) -> list[str]:
    """The experiments that are asked for, once the arguments are checked."""
    if unknown := [name for name in names if name not in (*EXPERIMENTS, ALL)]:
        raise ConfigError(f"there is no experiment {unknown[0]!r}: one of {', '.join(EXPERIMENTS)}, or {ALL}")
    if jobs < 1 or (seeds is not None and seeds < 1):
        raise ConfigError(f"seeds={seeds}, jobs={jobs}: at least 1 of each")
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data {data} is no folder: it holds a folder of each real log, such as kuairand")
    return list(EXPERIMENTS) if ALL in names else list(dict.fromkeys(names))


def _without(name: str, data: Path | None, smoke: bool) -> dict[str, str]:
    """The data of an experiment that cannot be used, with the reason."""
    reasons = {where: usable(where, data, smoke) for where in EXPERIMENTS[name].data}
    return {where: reason for where, reason in reasons.items() if reason is not None}


def _units(name: str, skipped: Mapping[str, str], seeds: int | None, smoke: bool) -> Iterator[Unit]:
    for where in EXPERIMENTS[name].data:
        if where not in skipped:
            yield from units(name, where, 1 if smoke else seeds or DATA[where].seeds, smoke)


def write_report(out: Path) -> dict[str, Any]:
    """Write the page of all results that a folder holds; gives its path and the names of the experiments on it.

    Raises:
        ConfigError: the folder holds none.
    """
    kept = results(out)
    if not kept:
        raise ConfigError(f"{out} holds no results: there is no NAME/{RESULT} in it")
    _write(out / REPORT, report(list(kept.values())))
    return {"report": str(out / REPORT), "experiments": list(kept)}


def results(out: Path) -> dict[str, dict[str, Any]]:
    """The results that a folder holds: in the order of the table, then those that the table no longer has."""
    there = sorted(path.parent.name for path in out.glob(f"*/{RESULT}"))
    order = [*(name for name in EXPERIMENTS if name in there), *(name for name in there if name not in EXPERIMENTS)]
    return {name: read_json(out / name / RESULT) for name in order}


def _real_logs() -> Path | None:
    """The conventional folder of real logs, if it is there."""
    folder = Path(os.environ.get("TWOTOWER_DATA") or "../shared/data")
    return folder if folder.is_dir() else None


def _done(todo: Mapping[str, Sequence[Unit]], out: Path, data: Path | None, jobs: int) -> Iterator[str]:
    """Run all units; gives each experiment when its last unit is finished."""
    with tempfile.TemporaryDirectory(prefix="twotower-lab-") as scratch:
        if jobs > 1:
            yield from _beside(todo, out, data, jobs, Path(scratch))
            return
        for name, of_experiment in todo.items():
            for unit in of_experiment:
                run_unit(unit, out, data, Path(scratch))
            yield name


def _beside(
    todo: Mapping[str, Sequence[Unit]], out: Path, data: Path | None, jobs: int, scratch: Path
) -> Iterator[str]:
    """The same in several processes; they end at once when this one is interrupted."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started: libraries read it when they load
    context = multiprocessing.get_context("spawn")
    level = logging.getLogger("twotower").getEffectiveLevel()
    with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(level,)) as pool:
        waiting: dict[str, set[Future[None]]] = {
            name: {pool.submit(run_unit, unit, out, data, scratch) for unit in of_experiment}
            for name, of_experiment in todo.items()
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
    """Set up a process of the pool: it logs its progress, and leaves Ctrl-C to the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("twotower_lab").setLevel(level)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
