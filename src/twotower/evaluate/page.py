"""The report on channels as Markdown tables and as a plot (SVG)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from twotower.evaluate.channels import FUSED, UNION
from twotower.evaluate.plots import COLOURS, figure, svg


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of the report of `evaluate_channels`."""
    ks = [str(k) for k in report["ks"]]
    names = list(report["recall"])
    return "\n".join(
        [
            "# Channels",
            "",
            f"{report['users']} users with {report['pairs']} held-out items; recall with 95 % intervals.",
            "",
            *_table(["", *(f"recall@{k}" for k in ks)], _recalls(report["recall"], ks)),
            "## Fused minus the best single channel",
            "",
            *_table(
                ["k", "best", "difference"],
                ([k, best["channel"], _with_interval(best["difference"], "+")] for k, best in report["best"].items()),
            ),
            "## What a channel adds",
            "",
            "Share of all held-out items that it alone finds; what the union's recall loses without it.",
            "",
            *_table(
                ["", *(f"{what} at {k}" for k in ks for what in ("alone", "loss"))],
                (
                    [name, *(cell for k in ks for cell in (_share(of[k]["share"]), _with_interval(of[k]["loss"])))]
                    for name, of in report["unique"].items()
                ),
            ),
            *(line for k in ks for line in _overlap(report["overlap"][k], k)),
            f"## By popularity, recall@{ks[len(ks) // 2]} over pairs",
            "",
            *_table(
                ["training positives", "pairs", *names],
                (
                    [
                        f"{group['positives'][0]} to {group['positives'][1]}",
                        group["pairs"],
                        *(_share(group["recall"][name][ks[len(ks) // 2]]) for name in names),
                    ]
                    for group in report["deciles"]
                ),
            ),
            *(
                line
                for reason, cold in report["cold"].items()
                for line in [
                    f"## `{reason}`: {cold['users']} users",
                    "",
                    *_table(["", *(f"recall@{k}" for k in ks)], _recalls(cold["recall"], ks)),
                ]
            ),
        ]
    )


def plot(report: Mapping[str, Any]) -> str:
    """Recall of every list at every cut-off with its interval, and by popularity of the item, as SVG."""
    ks = [str(k) for k in report["ks"]]
    names = [*report["channels"], FUSED, UNION]
    middle, deciles = ks[len(ks) // 2], report["deciles"]
    width = 0.85 / len(names)
    with figure(9, 7) as drawn:
        bars, lines = drawn.subplots(2, 1)
        bars.set_title("recall, with 95 % intervals")
        lines.set_title(f"recall@{middle} by training positives of the held-out item (least of each tenth)")
        for place, name in enumerate(names):
            figures, colour = [report["recall"][name][k] for k in ks], COLOURS[place % len(COLOURS)]
            at, values = np.arange(len(ks)) + width * place, np.array([one["value"] for one in figures])
            reach = np.abs(np.array([one["ci95"] for one in figures]).T - values)
            bars.bar(at, values, 0.9 * width, yerr=reach, color=colour, label=name, error_kw={"linewidth": 0.8})
            lines.plot([group["recall"][name][middle] for group in deciles], color=colour)
        bars.set_xticks(np.arange(len(ks)) + 0.425, [f"k = {k}" for k in ks])
        lines.set_xticks(range(len(deciles)), [group["positives"][0] for group in deciles])
        for axes in (bars, lines):
            axes.set_ylim(0, 1)
        drawn.legend(loc="outside lower center", ncols=5)
        return svg(drawn, "Recall of the channels")


def _recalls(recall: Mapping[str, Any], ks: Sequence[str]) -> Iterator[list[Any]]:
    for name, of in recall.items():
        yield [name, *(_with_interval(of[k]) for k in ks)]


def _overlap(overlap: Mapping[str, Mapping[str, float]], k: str) -> list[str]:
    names = list(overlap)
    return [
        f"## Overlap at {k}",
        "",
        "Share of a row's list that is in the column's.",
        "",
        *_table(["", *names], ([first, *(_share(overlap[first][second]) for second in names)] for first in names)),
    ]


def _table(head: Sequence[str], rows: Iterator[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def _share(value: float) -> str:
    return f"{value:.3f}"


def _with_interval(figure: Mapping[str, Any], sign: str = "") -> str:
    """A figure with its interval.

    >>> _with_interval({"value": 0.1234, "ci95": [0.1, 0.15]}, "+")
    '+0.1234 [+0.1000, +0.1500]'
    """
    low, high = figure["ci95"]
    return f"{figure['value']:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"
