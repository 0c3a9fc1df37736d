"""The simulated world beside real logs: what its numbers are, and theirs.

    python benchmarks/world.py --data ../shared/data --out benchmarks/results/world.json [--seeds 3] [--smoke]

Each log is measured in the same way, whether people made it or `twotower simulate`. Real ones are imported from the
data sets' own folders (`kuairand`, `globo`; one that is absent is left out). A world of each nature is made as large as
given. Writes the figures as JSON, and a plot (SVG) and a table (Markdown) beside it; prints one JSON line.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from common import arguments_of, finish, note
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.datasets.tables import codes
from twotower.datasets.workspace import open_workspace
from twotower.evaluate.plots import figure, svg
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.worlds.natures import NATURES
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate

REAL = {"kuairand": "since:2022-05-04", "globo": "since:2017-10-10"}
"""Data sets with the hold-out that the import takes away; the days before it are measured."""
CONTEXT = {"kuairand": "tab", "globo": None}
"""The context that decides the click rate; a simulated world's is its scene."""
HOUR_MS = 3_600_000
SESSION_GAP_MS = 30 * 60_000
SETTLED_DAYS = 4
"""New items are counted on the last days alone: on the first ones every item is new to the log."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of the clicked items, most clicked first: the points of the plotted curve."""
SIZES = {"default": (4000, 3000), "kuairand": (12_000, 3000), "globo": (12_000, 3000)}
"""Users and items of the simulated worlds."""
DAYS = 8


@dataclass(frozen=True)
class Log:
    """The shown items of a log, N of them in the order of time."""

    user: npt.NDArray[np.int64]
    item: npt.NDArray[np.int64]
    ts_ms: npt.NDArray[np.int64]
    clicked: npt.NDArray[np.bool_]
    context: npt.NDArray[Any] | None
    """Of each row, its value of the context that decides the click rate."""
    has_impressions: bool

    @classmethod
    def of(cls, events: pa.Table, context: str | None) -> "Log":
        """The shown rows of joined events."""
        shown = events.filter(pc.is_in(events[c.OUTCOME], pa.array([c.IMPRESSED, c.CLICKED])))
        clicked = pc.equal(shown[c.OUTCOME], c.CLICKED).to_numpy()
        return cls(
            codes(shown[c.USER_ID]),
            codes(shown[c.ITEM_ID]),
            shown[c.REQUEST_TS_MS].to_numpy(),
            clicked,
            None if context is None else shown[context].to_numpy(),
            not bool(clicked.all()),
        )


def measure(log: Log) -> dict[str, Any]:
    """The figures of a log."""
    first_day = int(log.ts_ms.min()) // DAY_MS
    day = log.ts_ms // DAY_MS - first_day
    clicks = np.bincount(log.item[log.clicked])
    by_user = np.bincount(log.user[log.clicked])
    by_user = by_user[by_user > 0]
    whole_days = [d for d in range(int(day.max()) + 1) if (day == d).sum() > 0.2 * len(day) / (day.max() + 1)]
    return {
        "days": len(whole_days),
        "users": len(np.unique(log.user)),
        "items": len(np.unique(log.item)),
        "shown": len(log.item) if log.has_impressions else None,
        "clicks": int(log.clicked.sum()),
        "zipf": zipf_slope(clicks),
        "zipf_of_a_day": statistics.mean(
            zipf_slope(np.bincount(log.item[log.clicked & (day == d)])) for d in whole_days
        ),
        "top_1_percent": top_share(clicks, 0.01),
        "top_10_percent": top_share(clicks, 0.1),
        "top_shares": [top_share(clicks, share) for share in SHARES],
        **new_items(log, day),
        "click_rate": float(log.clicked.mean()) if log.has_impressions else None,
        "click_rate_by_context": click_rates(log) if log.has_impressions else None,
        "hours": (np.bincount(log.ts_ms // HOUR_MS % 24, minlength=24) / len(log.ts_ms)).round(4).tolist(),
        "clicks_a_user_and_day": float(by_user.mean() / len(whole_days)),
        "clicks_of_users": dict(zip(map(str, QUANTILES), np.quantile(by_user, QUANTILES).tolist(), strict=True)),
        "clicks_of_users_cv": float(by_user.std() / by_user.mean()),
        **sessions(log),
    }


def zipf_slope(clicks: npt.NDArray[np.int64]) -> float:
    """Slope of log clicks over log rank, from the tenth item to the middle of those that were clicked."""
    counts = np.sort(clicks[clicks > 0])[::-1]
    rank = np.arange(10, len(counts) // 2)
    return float(np.polyfit(np.log(rank), np.log(counts[rank - 1]), 1)[0])


def top_share(clicks: npt.NDArray[np.int64], share: float) -> float:
    """What the most clicked share of the clicked items has of all clicks."""
    counts = np.sort(clicks[clicks > 0])[::-1]
    return float(counts[: max(1, int(len(counts) * share))].sum() / counts.sum())


def new_items(log: Log, day: npt.NDArray[np.int64]) -> dict[str, float]:
    """Share of a day's clicks on items that the log first saw on that day, or within 24 hours, on settled days."""
    first = np.full(int(log.item.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, log.item, log.ts_ms)
    first_seen = first[log.item]
    same_day, within = [], []
    for late in range(max(1, int(day.max()) + 1 - SETTLED_DAYS), int(day.max()) + 1):
        rows = log.clicked & (day == late)
        same_day.append(float((first_seen[rows] // DAY_MS == log.ts_ms[rows] // DAY_MS).mean()))
        within.append(float((log.ts_ms[rows] - first_seen[rows] < DAY_MS).mean()))
    return {"new_that_day": statistics.mean(same_day), "new_within_24_h": statistics.mean(within)}


def click_rates(log: Log) -> dict[str, dict[str, float]]:
    """Share of the shown and click rate of each value of the context that has 1 % of them."""
    if log.context is None:
        return {}
    values, code = np.unique(log.context, return_inverse=True)
    shown, clicked = np.bincount(code), np.bincount(code, log.clicked)
    return {
        str(value): {"share": float(shown[row] / len(code)), "click_rate": float(clicked[row] / shown[row])}
        for row, value in enumerate(values)
        if shown[row] >= 0.01 * len(code)
    }


def sessions(log: Log) -> dict[str, Any]:
    """Sessions end with half an hour without anything; how soon users come back."""
    key = np.unique(np.stack([log.user, log.ts_ms]), axis=1)  # a page counts once
    gap = np.diff(key[1])[np.diff(key[0]) == 0]
    pause_h = gap[gap >= SESSION_GAP_MS] / HOUR_MS
    count = key.shape[1] - int((gap < SESSION_GAP_MS).sum())
    back = {f"back_within_{hours}_h": float((pause_h < hours).mean()) for hours in (1, 3, 6, 24)}
    return {"requests_a_session": key.shape[1] / count, **back}


def real(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """The figures of a data set."""
    import_dataset(name, data / name, folder / name, ImportOptions(holdout=REAL[name]))
    return measure(Log.of(open_workspace(folder / name).events(), CONTEXT[name]))


def simulated(options: WorldOptions, seeds: Sequence[int]) -> dict[str, Any]:
    """The median figures of some worlds of a nature."""
    logs = (simulate(replace(options, seed=seed)).events for seed in seeds)
    return median([measure(Log.of(events, "scene")) for events in logs])


def median(figures: Sequence[Any]) -> Any:
    """The median of each figure, through dictionaries and lists."""
    first = figures[0]
    if isinstance(first, Mapping):
        return {name: median([one[name] for one in figures]) for name in first}
    if isinstance(first, list):
        return [median(list(values)) for values in zip(*figures, strict=True)]
    return None if first is None else statistics.median(figures)


ROWS = (
    ("users", "users", "{:,.0f}"),
    ("items that were shown", "items", "{:,.0f}"),
    ("clicks", "clicks", "{:,.0f}"),
    ("Zipf slope of clicks over items, all days", "zipf", "{:.2f}"),
    ("the same of a day, mean", "zipf_of_a_day", "{:.2f}"),
    ("clicks on the first 1 % of the clicked items", "top_1_percent", "{:.1%}"),
    ("on the first 10 %", "top_10_percent", "{:.1%}"),
    ("clicks on items first seen that day", "new_that_day", "{:.1%}"),
    ("within 24 hours", "new_within_24_h", "{:.1%}"),
    ("click rate of the shown", "click_rate", "{:.1%}"),
    ("clicks a day of a user who clicks", "clicks_a_user_and_day", "{:.2f}"),
    ("their spread: standard deviation / mean", "clicks_of_users_cv", "{:.2f}"),
    ("requests a session", "requests_a_session", "{:.2f}"),
    ("pauses between sessions under 1 hour", "back_within_1_h", "{:.1%}"),
    ("under 3 hours", "back_within_3_h", "{:.1%}"),
    ("under 24 hours", "back_within_24_h", "{:.1%}"),
)
"""What the table shows: the words, the figure, its form."""


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures of all logs as Markdown."""
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for words, key, form in ROWS:
        cells = ["-" if of[key] is None else form.format(of[key]) for of in figures.values()]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    for name, of in figures.items():
        if of["click_rate_by_context"]:
            rates = ", ".join(
                f"{value} {one['click_rate']:.0%} of {one['share']:.0%}"
                for value, one in sorted(of["click_rate_by_context"].items(), key=lambda pair: -pair[1]["share"])
            )
            lines += ["", f"{name}, click rate by context (of which share of the shown): {rates}."]
    return "\n".join(lines) + "\n"


COLOURS = {"kuairand": "#ee6677", "globo": "#4477aa", "default": "#228833"}


def plot(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Concentration of clicks and volume by hour, a line a log, worlds dashed, as SVG."""
    with figure(9, 7) as drawn:
        shares, hours = drawn.subplots(2, 1)
        shares.set_title("share of the clicks on the most clicked items (share of the clicked items, log scale)")
        shares.set_xscale("log")
        shares.set_xticks(SHARES, [f"{share:.1%}".replace(".0%", "%") for share in SHARES])
        shares.minorticks_off()
        shares.set_ylim(0, 1)
        hours.set_title("share of the shown (clicks on Globo) by hour, UTC")
        hours.set_xticks(range(24))
        hours.set_ylim(0, 0.12)
        for name, of in figures.items():
            look = {"color": COLOURS[name.split()[-1].lower()], "ls": "--" if name.startswith("world") else "-"}
            shares.plot(SHARES, of["top_shares"], label=name, **look)
            hours.plot(of["hours"], **look)
        for axes in (shares, hours):
            axes.yaxis.set_major_formatter("{x:.0%}")
        drawn.legend(loc="outside lower center", ncols=5)
        return svg(drawn, "The simulated world beside real logs") + "\n"


def main() -> None:
    parser = arguments_of(__doc__, "one small world of each nature")
    parser.add_argument("--data", type=Path, help="folder that holds kuairand/ and globo/")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    started, figures = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in (("kuairand", "KuaiRand"), ("globo", "Globo")):
            if arguments.data is not None and (arguments.data / name).is_dir():
                figures[words] = real(name, arguments.data, Path(folder))
                note(words, figures[words])
    for nature in NATURES:
        users, items = (2000, 400) if arguments.smoke else SIZES[nature]
        seeds = range(1 if arguments.smoke else arguments.seeds)
        figures[f"world {nature}"] = simulated(WorldOptions(users, items, DAYS, like=nature), seeds)
        note(nature, figures[f"world {nature}"])
    seconds = round(time.monotonic() - started)
    finish(
        arguments,
        "the simulated world beside real logs",
        seeds=arguments.seeds,
        days=DAYS,
        seconds=seconds,
        logs=figures,
    )
    if arguments.out:
        arguments.out.with_suffix(".svg").write_text(plot(figures), encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(table(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
