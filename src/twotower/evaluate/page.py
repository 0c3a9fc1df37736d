"""The report on channels as Markdown tables and as a plot (SVG)."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from twotower.evaluate.channels import FUSED, UNION

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#994455", "#997700", "#000000")
WIDTH, HEIGHT, LEFT, TOP = 900, 300, 60, 40


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
    middle = ks[len(ks) // 2]
    lines = {name: [group["recall"][name][middle] for group in report["deciles"]] for name in names}
    body = "".join(
        [
            *_bars(report["recall"], names, ks),
            f'<g transform="translate(0,{HEIGHT + 2 * TOP})">',
            *_lines(lines, [str(group["positives"][0]) for group in report["deciles"]], middle),
            "</g>",
            *_legend(names, 2 * HEIGHT + 4 * TOP + 30),
        ]
    )
    height = 2 * HEIGHT + 4 * TOP + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{WIDTH}" height="{height}" fill="white"/>{body}</svg>\n'
    )


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


def _bars(recall: Mapping[str, Any], names: Sequence[str], ks: Sequence[str]) -> Iterator[str]:
    yield from _frame("recall, with 95 % intervals")
    slot = (WIDTH - LEFT - 20) / len(ks)
    width = slot * 0.85 / len(names)
    for group, k in enumerate(ks):
        yield _text(LEFT + slot * (group + 0.45), TOP + HEIGHT + 18, f"k = {k}")
        for place, name in enumerate(names):
            figure = recall[name][k]
            x, y = LEFT + slot * group + width * place, _y(figure["value"])
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{width * 0.9:.1f}" height="{TOP + HEIGHT - y:.1f}" '
            yield f'fill="{_colour(place)}"/>'
            low, high = (_y(bound) for bound in figure["ci95"])
            yield f'<path d="M{x + width * 0.45:.1f} {low:.1f}V{high:.1f}" stroke="black"/>'


def _lines(lines: Mapping[str, Sequence[float]], labels: Sequence[str], k: str) -> Iterator[str]:
    yield from _frame(f"recall@{k} by training positives of the held-out item (least of each tenth)")
    step = (WIDTH - LEFT - 60) / max(1, len(labels) - 1)
    for place, label in enumerate(labels):
        yield _text(LEFT + 20 + step * place, TOP + HEIGHT + 18, label)
    for place, values in enumerate(lines.values()):
        points = " ".join(f"{LEFT + 20 + step * at:.1f},{_y(value):.1f}" for at, value in enumerate(values))
        yield f'<polyline points="{points}" fill="none" stroke="{_colour(place)}" stroke-width="2"/>'


def _frame(title: str) -> Iterator[str]:
    yield f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>'
    for tenth in range(0, 11, 2):
        y = _y(tenth / 10)
        yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#dddddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>'


def _legend(names: Sequence[str], y: float) -> Iterator[str]:
    step = (WIDTH - LEFT) / len(names)
    for place, name in enumerate(names):
        x = LEFT + step * place
        yield f'<rect x="{x:.1f}" y="{y - 11:.1f}" width="12" height="12" fill="{_colour(place)}"/>'
        yield f'<text x="{x + 16:.1f}" y="{y:.1f}" font-size="11">{escape(name)}</text>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'


def _y(value: float) -> float:
    return TOP + HEIGHT * (1 - value)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]
