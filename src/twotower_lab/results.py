"""The result of an experiment from its arms' files: differences, intervals, verdicts, and what the plot shows."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.schema.errors import DataError
from twotower_lab.experiments import DATA, EXPERIMENTS, Claim, Experiment, LogData, WorldData
from twotower_lab.trials import Unit, finished
from twotower_lab.verdict import Interval, interval, offline, verdict

Floats = npt.NDArray[np.float64]
Arms = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Results of a data set, by arm and seed."""


def summarise(name: str, done: Iterable[Unit], out: Path) -> dict[str, Any]:
    """Differences, intervals and verdicts of an experiment, from its arms' files.

    Raises:
        DataError: a unit has not been run.
    """
    experiment = EXPERIMENTS[name]
    by_data: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for unit in done:
        for arm in unit.arms:
            result = finished(out, unit, arm)
            if result is None:
                raise DataError(f"{unit}, {arm}: no result in {out}, although it was run: run it again")
            by_data.setdefault(unit.data, {}).setdefault(arm, {})[unit.seed] = result
    by_seed = {data: _by_seed(experiment, data, arms) for data, arms in by_data.items()}
    return {
        "name": name,
        "question": experiment.question,
        "why": experiment.why,
        "kind": experiment.kind,
        "order": list(experiment.arms),
        "arms": {arm: what.described for arm, what in experiment.arms.items()},
        "base": list(experiment.base),
        "data": {
            data: {"seeds": max(map(len, arms.values())), "what": str(DATA[data])} for data, arms in by_data.items()
        },
        "claims": [judged(claim, by_data) for claim in experiment.claims],
        "panels": [panel for data, arms in by_data.items() for panel in _panels(experiment, data, arms)],
        "figures": {
            data: {
                arm: {measure: round(float(np.mean(values)), 5) for measure, values in row.items()}
                for arm, row in rows.items()
            }
            for data, rows in by_seed.items()
        },
        "by_seed": by_seed,
        "series": {data: _series(arms) for data, arms in by_data.items()} if experiment.kind == "feedback" else {},
        "cpu_s": round(
            sum(done["cpu_s"] for arms in by_data.values() for arm in arms.values() for done in arm.values())
        ),
    }


def compared(data: str, arms: Arms, arm: str, than: str | None, measure: str) -> Interval | None:
    """An arm minus another, or its own figure; None where no seed has the measure for both."""
    values = _values(arms, arm, measure)
    if than is not None:
        theirs = _values(arms, than, measure)
        values = {seed: ours - theirs[seed] for seed, ours in values.items() if seed in theirs}
    if not values:
        return None
    return interval(list(values.values()), same_users=isinstance(DATA[data], LogData))


def _values(arms: Arms, arm: str, measure: str) -> dict[int, Floats]:
    """A measure of an arm by seed, for the seeds that have it."""
    return {
        seed: np.array(result["values"][measure])
        for seed, result in arms.get(arm, {}).items()
        if measure in result["values"]
    }


def judged(claim: Claim, by_data: Mapping[str, Arms]) -> dict[str, Any]:
    """A claim's conditions, and its verdict."""
    conditions: list[dict[str, Any]] = []
    for data, arms in by_data.items():
        own = list(_conditions(claim, data, arms))
        if len(own) == 2:
            own[1]["offline"] = offline(own[0]["sign"], own[1]["sign"])
        conditions += own
    return {
        "text": claim.text,
        "better": claim.better,
        "than": list(claim.than),
        "lower": claim.lower,
        "verdict": verdict([condition["sign"] for condition in conditions if condition["judged"]]),
        "conditions": conditions,
    }


def _conditions(claim: Claim, data: str, arms: Arms) -> Iterator[dict[str, Any]]:
    """How a claim stands on a data set, by the truth and by clicks, against the strongest arm that it names."""
    world = isinstance(DATA[data], WorldData)
    for kind, measure in claim.measured(world).items():
        against = [
            (than, difference.flipped() if claim.lower else difference)
            for than in claim.than or (None,)
            if (difference := compared(data, arms, claim.better, than, measure)) is not None
        ]
        if against:
            than, worst = min(against, key=lambda pair: (pair[1].sign, pair[1].value))
            yield {
                "data": data,
                "kind": kind,
                "measure": measure,
                "against": than,
                "judged": kind == ("true" if world else "logged"),
                "sign": worst.sign,
                **worst.document(),
            }


def _panels(experiment: Experiment, data: str, arms: Arms) -> Iterator[dict[str, Any]]:
    """What the plot shows of a data set: every arm minus the first, by the truth and by clicks."""
    names = [arm for arm in experiment.arms if arm in arms]
    if experiment.kind == "feedback" or not names:
        return
    first, others = names[0], names[1:]
    for true, logged in experiment.plotted:
        kinds = Claim("", first, logged=logged, true=true).measured(isinstance(DATA[data], WorldData))
        means: dict[str, dict[str, float]] = {}
        rows: dict[str, dict[str, Interval]] = {arm: {} for arm in names}
        for kind, measure in kinds.items():
            own = {arm: compared(data, arms, arm, None, measure) for arm in names}
            if own[first] is None:
                continue
            means[kind] = {arm: figure.value for arm, figure in own.items() if figure is not None}
            for arm in others:
                if (difference := compared(data, arms, arm, first, measure)) is not None:
                    rows[arm][kind] = difference
        if means:
            yield {
                "data": data,
                "measures": {kind: kinds[kind] for kind in means},
                "first": first,
                "rows": {arm: {kind: row[kind].document() for kind in row} for arm, row in rows.items()},
                "best": {kind: max(of_kind, key=of_kind.__getitem__) for kind, of_kind in means.items()},
                "offline": {
                    arm: offline(row["true"].sign, row["logged"].sign) for arm, row in rows.items() if len(row) == 2
                },
            }


def _by_seed(experiment: Experiment, data: str, arms: Arms) -> dict[str, dict[str, list[float]]]:
    """An experiment's measures and facts by arm: the mean of each seed."""
    if experiment.kind == "feedback":
        some = next(iter(next(iter(arms.values())).values()))
        measures = [name for name in some["values"] if name.endswith(", last days")]
    else:
        world = isinstance(DATA[data], WorldData)
        measures = [name for pair in experiment.plotted for name in (pair if world else pair[1:]) if name]
    rows: dict[str, dict[str, list[float]]] = {}
    for arm in (arm for arm in experiment.arms if arm in arms):
        for measure in dict.fromkeys([*measures, *experiment.facts]):
            values = [float(values.mean()) for values in _values(arms, arm, measure).values()]
            values += [result["facts"][measure] for result in arms[arm].values() if measure in result["facts"]]
            if values:
                rows.setdefault(arm, {})[measure] = [round(value, 5) for value in values]
    return rows


def _series(arms: Arms) -> dict[str, dict[str, list[list[float]]]]:
    """By measure and arm, the days of each seed."""
    series: dict[str, dict[str, list[list[float]]]] = {}
    for arm, by_seed in arms.items():
        for result in by_seed.values():
            for measure, days in result["facts"]["series"].items():
                series.setdefault(measure, {}).setdefault(arm, []).append(days)
    return series
