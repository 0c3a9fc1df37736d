"""The plot of an experiment (SVG), and one page of all (HTML) that loads nothing from elsewhere."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from twotower.evaluate.plots import COLOURS, figure, svg
from twotower_lab.verdict import BLIND, LIES, RULE, SEES_MORE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUE, LOGGED = "true", "logged"
KINDS: Final = {TRUE: ("by the truth", "#aa3377", 0.15), LOGGED: ("by clicks", "#4477aa", -0.15)}
"""The word, the colour and the offset of a mark."""
SAID: Final = {LIES: "clicks lie", BLIND: "clicks blind", SEES_MORE: "clicks see it"}
"""What the plot says beside a difference."""
WIDTH: Final = 8.2
SERIES: Final = {
    "gini": "Gini coefficient of exposure (0 = even)",
    "top 1 %": "share of exposure of the most shown hundredth",
    "coverage": "share of items shown that day",
    "page_clicks": "clicks to expect on a page",
    "true_recall@50": "recall@50 of what users like best",
    "recall@50": "recall@50 of what was clicked that day",
}
"""What the plot of a feedback loop shows, with titles."""


def plot(result: Mapping[str, Any]) -> str:
    """The plot of an experiment's result."""
    loop = result["series"]
    panels: list[Any] = list(SERIES) if loop else result["panels"]
    heights = [2.2 for _ in SERIES] if loop else [1.1 + 0.33 * len(panel["rows"]) for panel in panels] or [1]
    with figure(WIDTH, sum(heights) + 0.4) as drawn:
        every = drawn.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(every, panels, strict=False):
            if loop:
                _days(axes, panel, loop, result["order"])
            else:
                _differences(axes, panel, result["order"])
        marks = {label: mark for axes in every for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        if marks:
            drawn.legend(list(marks.values()), list(marks), loc="outside lower center", ncols=3, frameon=False)
        if not panels:
            every[0].set_axis_off()
        return svg(drawn, result["question"])


def _differences(axes: "Axes", panel: Mapping[str, Any], order: Sequence[str]) -> None:
    """Each arm minus the first with its interval, one row an arm."""
    arms = [arm for arm in order if panel["rows"].get(arm)]
    measures = dict.fromkeys(panel["measures"][kind] for kind in KINDS if kind in panel["measures"])
    axes.set_title(f"{panel['data']}: {' and '.join(measures)}", loc="left")
    axes.set_xlabel(f"difference to “{panel['first']}”")
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    for kind, (label, colour, offset) in KINDS.items():
        rows = [(at, panel["rows"][arm][kind]) for at, arm in enumerate(arms) if kind in panel["rows"][arm]]
        if not rows:
            continue
        at, values = np.array([at - offset for at, _ in rows]), np.array([row["value"] for _, row in rows])
        reach = [_reach(row) for _, row in rows]
        axes.errorbar(values, at, xerr=reach, fmt="o", color=colour, markersize=4, label=label)
        for y, value in zip(at, values, strict=True):
            axes.annotate(f"{value:+.4f}", (1.01, y), xycoords=("axes fraction", "data"), color=colour, va="center")
    for y, arm in enumerate(arms):
        if word := SAID.get(panel["offline"].get(arm, "")):
            axes.annotate(word, (1.1, y), xycoords=("axes fraction", "data"), color="#a3333d", va="center")


def _reach(row: Mapping[str, Any]) -> float:
    """Half the width of a value's interval, which is symmetric; 0 for a single number without one."""
    return 0.0 if row["low"] is None else (row["high"] - row["low"]) / 2


def _days(axes: "Axes", measure: str, by_data: Mapping[str, Any], order: Sequence[str]) -> None:
    """A line for each arm over the days: the mean of the seeds with their range."""
    axes.set_title(SERIES[measure], loc="left")
    of_arms = next(iter(by_data.values()))[measure]
    for arm, colour in zip(order, COLOURS, strict=False):
        seeds = np.array(of_arms[arm])
        days = np.arange(1, seeds.shape[1] + 1)
        axes.plot(days, seeds.mean(axis=0), color=colour, label=arm)
        axes.fill_between(days, seeds.min(axis=0), seeds.max(axis=0), color=colour, alpha=0.1, linewidth=0)
    axes.set_xticks(days)


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """One page of all results."""
    text = (files("twotower_lab") / "report.html").read_text(encoding="utf-8")
    offline: dict[str, list[Any]] = {LIES: [], BLIND: [], SEES_MORE: []}
    for word, row in (pair for result in results for pair in _offline(result)):
        if word in offline:
            offline[word].append(row)
    return (
        Environment(autoescape=True)
        .from_string(text)
        .render(
            results=results,
            rule=RULE,
            offline=offline,
            best=[row for result in results for row in _best(result)],
            plots={result["name"]: Markup(plot(result)) for result in results},
            measures_of=lambda rows: list(dict.fromkeys(measure for row in rows.values() for measure in row)),
        )
    )


def _best(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Where another arm is best by clicks than by the truth."""
    for panel in result["panels"]:
        best = panel["best"]
        if len(best) == 2 and best[TRUE] != best[LOGGED]:
            yield f"{result['name']}, {panel['data']}", panel["measures"][TRUE], best[TRUE], best[LOGGED]


def _offline(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What clicks say of each arm against the first, and both intervals; in a feedback loop, of each claim."""
    for panel in result["panels"]:
        for arm, word in panel["offline"].items():
            where, against = f"{result['name']}, {panel['data']}", panel["first"]
            yield word, _pair(where, f"{arm} against {against}", panel["measures"][TRUE], panel["rows"][arm])
    for claim in result["claims"] if result["series"] else ():
        by_kind = {condition["kind"]: condition for condition in claim["conditions"]}
        if len(by_kind) == 2:
            true = by_kind[TRUE]
            where, arms = (
                f"{result['name']}, {true['data']}",
                f"{claim['better']} against {true['against'] or 'nothing'}",
            )
            yield by_kind[LOGGED]["offline"], _pair(where, arms, true["measure"], by_kind)


def _pair(where: str, arms: str, measure: str, intervals: Mapping[str, Any]) -> dict[str, Any]:
    return {"where": where, "arms": arms, "measure": measure, TRUE: intervals[TRUE], LOGGED: intervals[LOGGED]}
