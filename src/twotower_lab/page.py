"""The plot of an experiment (SVG), and one page of all (HTML) that asks nothing of any other place."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, Final

from twotower.evaluate.page import COLOURS
from twotower_lab.verdict import AGREES, BLIND, DEPENDS, DOES_NOT, HOLDS, LIES, OPEN, RULE, SEES_MORE

TRUE, LOGGED = "true", "logged"
KINDS: Final = {TRUE: ("by the truth", "#aa3377"), LOGGED: ("by clicks", "#4477aa")}
WIDTH, LABEL, RIGHT = 820, 250, 150
ROW, HEAD, FOOT = 34, 58, 30
LINES_HEIGHT: Final = 190
SAID: Final = {LIES: ("clicks lie", "#a3333d"), BLIND: ("clicks blind", "#777"), SEES_MORE: ("clicks see it", "#777")}
"""What the plot says beside a difference."""
SERIES: Final = {
    "gini": "Gini coefficient of exposure (0 = even)",
    "top 1 %": "share of exposure of the most shown hundredth",
    "coverage": "share of items shown that day",
    "page_clicks": "clicks to expect on a page",
    "true_recall@50": "recall@50 of what users like best",
    "recall@50": "recall@50 of what was clicked that day",
}
"""What the plot of a feedback loop shows, with titles."""

STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 3rem; border-top: 1px solid #ccc; padding-top: 1rem; font-size: 1.25rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.verdict { display: inline-block; padding: 0 0.5rem; border-radius: 0.6rem; color: #fff; white-space: nowrap; }
.holds { background: #22713a; } .doesnot { background: #a3333d; } .depends { background: #7a5b00; }
.notasked { background: #666; } .lies { color: #a3333d; font-weight: bold; } .unjudged { color: #666; }
.made, .why { color: #555; } svg { min-width: 640px; width: 100%; height: auto; } code { font-size: 0.85em; }
@media (max-width: 600px) {
  .overview, .overview tbody, .overview tr, .overview td { display: block; } .overview tr:first-child { display: none; }
  .overview td { border: 0; padding: 0.1rem 0; } .overview tr { border-bottom: 1px solid #ddd; padding: 0.4rem 0; }
  .overview td.number { text-align: left; white-space: normal; } .overview td:empty { display: none; }
}
summary { cursor: pointer; } .smoke { background: #fff3cd; padding: 0.5rem 1rem; }
"""


def plot(result: Mapping[str, Any]) -> str:
    """The plot of an experiment's result."""
    parts: list[str] = []
    top = 0.0
    panels = (
        [_days(title, result["series"], name, result["order"]) for name, title in SERIES.items()]
        if result["series"]
        else [_forest(panel, result["order"]) for panel in result["panels"]]
    )
    for height, body in panels:
        parts.append(f'<g transform="translate(0,{top:.0f})">{body}</g>')
        top += height
    if result["series"]:
        arms = result["order"]
        body = "".join(_legend([(arm, COLOURS[at]) for at, arm in enumerate(arms)]))
        parts.append(f'<g transform="translate(0,{top:.0f})">{body}</g>')
        top += 20 + 18 * math.ceil(len(arms) / 3)
    height = max(top, 40.0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{escape(result["question"])}">'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _forest(panel: Mapping[str, Any], order: Sequence[str]) -> tuple[float, str]:
    """Each arm minus the first with its interval, one row an arm; the height, and what stands in it."""
    rows = {arm: panel["rows"][arm] for arm in order if panel["rows"].get(arm)}
    bounds = [abs(bound) for row in rows.values() for one in row.values() for bound in _bounds(one)]
    reach = _round_up(max(bounds, default=0.0) * 1.05)
    middle, half = LABEL + (WIDTH - LABEL - RIGHT) / 2, (WIDTH - LABEL - RIGHT) / 2
    kinds = [kind for kind in KINDS if kind in panel["measures"]]
    measures = panel["measures"][kinds[0]] if len(kinds) == 1 else " and ".join(panel["measures"][k] for k in kinds)
    bottom = HEAD + ROW * len(rows)
    parts = [
        f'<text x="10" y="20" font-size="15">{escape(panel["data"])}: {escape(measures)}</text>',
        f'<text x="10" y="40" fill="#555">difference to “{escape(panel["first"])}”</text>',
        *_legend([KINDS[kind] for kind in kinds], LABEL + 130, 40, 130),
    ]
    for part in (-1, -0.5, 0, 0.5, 1):
        x = middle + half * part
        parts.append(f'<path d="M{x:.1f} {HEAD - 6}V{bottom}" stroke="{"#555" if part == 0 else "#ddd"}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{reach * part:+.3g}</text>')
    for place, (arm, row) in enumerate(rows.items()):
        y = HEAD + ROW * (place + 0.5)
        word = panel["offline"].get(arm, "")
        parts.append(f'<text x="10" y="{y + 4:.1f}">{escape(arm)}</text>')
        if word in SAID:
            said, colour = SAID[word]
            parts.append(f'<text x="{WIDTH - RIGHT + 70}" y="{y + 4:.1f}" fill="{colour}" font-size="12">{said}</text>')
        for kind, offset in zip(kinds, (-6, 6) if len(kinds) == 2 else (0,), strict=True):
            if kind in row:
                low, high = _bounds(row[kind])
                at, (left, right) = y + offset, (middle + half * bound / reach for bound in (low, high))
                x = middle + half * row[kind]["value"] / reach
                colour = KINDS[kind][1]
                parts.append(f'<path d="M{left:.1f} {at:.1f}H{right:.1f}" stroke="{colour}" stroke-width="2"/>')
                parts.append(f'<circle cx="{x:.1f}" cy="{at:.1f}" r="4" fill="{colour}"/>')
                parts.append(
                    f'<text x="{WIDTH - RIGHT + 12}" y="{at + 4:.1f}" font-size="11" fill="{colour}">'
                    f"{row[kind]['value']:+.4f}</text>"
                )
    return bottom + FOOT + 10, "".join(parts)


def _bounds(one: Mapping[str, Any]) -> tuple[float, float]:
    """An interval's ends; a single number has none but itself."""
    low, high = one["low"], one["high"]
    return (float(one["value"]), float(one["value"])) if low is None else (float(low), float(high))


def _days(
    title: str, by_data: Mapping[str, Mapping[str, Mapping[str, Any]]], measure: str, order: Sequence[str]
) -> tuple[float, str]:
    """A line for each arm over the days, the mean of the seeds with their range; the height, and what stands in it."""
    of_arms = next(iter(by_data.values()))[measure]
    series = {arm: of_arms[arm] for arm in order}
    every = [value for seeds in series.values() for days in seeds for value in days]
    low, high = min(every), max(every)
    pad = max((high - low) * 0.05, 1e-3)
    low, high = low - pad, high + pad
    count = len(next(iter(series.values()))[0])
    bottom, left, right = HEAD + LINES_HEIGHT - 20, 60, WIDTH - 20

    def x_of(day: int) -> float:
        return left + (right - left) * (day + 0.5) / count

    def y_of(value: float) -> float:
        return float(HEAD - 20 + (bottom - HEAD + 20) * (high - value) / (high - low))

    parts = [f'<text x="10" y="22" font-size="15">{escape(title)}</text>']
    digits = max(2, 1 - math.floor(math.log10(high - low)))
    for part in range(5):
        value = low + (high - low) * part / 4
        parts.append(f'<path d="M{left} {y_of(value):.1f}H{right}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y_of(value) + 4:.1f}" text-anchor="end" fill="#555">{value:.{digits}f}</text>'
        )
    for day in range(count):
        parts.append(f'<text x="{x_of(day):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#555">{day + 1}</text>')
    for place, seeds in enumerate(series.values()):
        colour = COLOURS[place]
        upper = [f"{x_of(day):.1f},{y_of(max(days[day] for days in seeds)):.1f}" for day in range(count)]
        lower = [f"{x_of(day):.1f},{y_of(min(days[day] for days in seeds)):.1f}" for day in range(count)]
        mean = [f"{x_of(day):.1f},{y_of(sum(days[day] for days in seeds) / len(seeds)):.1f}" for day in range(count)]
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity="0.1"/>')
        parts.append(f'<polyline points="{" ".join(mean)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return bottom + FOOT, "".join(parts)


def _legend(entries: Sequence[tuple[str, str]], left: float = 60, top: float = 14, step: float = 240) -> Iterator[str]:
    for place, (text, colour) in enumerate(entries):
        x, y = left + step * (place % 3), top + 18 * (place // 3)
        yield f'<rect x="{x:.0f}" y="{y - 10:.0f}" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{x + 18:.0f}" y="{y:.0f}" font-size="12">{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next round number.

    >>> _round_up(0.013), _round_up(0.0), _round_up(0.05)
    (0.015, 0.001, 0.05)
    """
    if value <= 0:
        return 0.001
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        float(f"{step * power:.6g}") for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9)
    )


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """One page of all results."""
    smoke = any(result["made"]["smoke"] for result in results)
    body = [
        "<h1>twotower lab: what holds, and what does not</h1>",
        '<p class="smoke">Parts of this page come from a smoke run on tiny worlds: its verdicts mean nothing.</p>'
        if smoke
        else "",
        f"<p>{escape(RULE)}</p>",
        '<div class="wide"><table class="overview">',
        "<tr><th>experiment</th><th>claim</th><th>verdict</th><th>found</th></tr>",
        *(line for result in results for line in _overview(result)),
        "</table></div>",
        "<h2>Where the offline metric lies</h2>",
        *_lies(results),
        *(line for result in results for line in _section(result)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>twotower lab</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _badge(claim: Mapping[str, Any]) -> str:
    """The verdict, and whether the opposite was found or just no difference."""
    said = claim["verdict"]
    name = {HOLDS: "holds", DOES_NOT: "doesnot", DEPENDS: "depends", OPEN: "notasked"}[said]
    opposite = any(one["judged"] and one["sign"] < 0 for one in claim["conditions"])
    note = f"<br><small>{'the opposite' if opposite else 'no difference seen'}</small>" if said == DOES_NOT else ""
    return f'<span class="verdict {name}">{escape(said)}</span>{note}'


def _overview(result: Mapping[str, Any]) -> Iterator[str]:
    for place, claim in enumerate(result["claims"]):
        name = f'<a href="#{result["name"]}">{result["name"]}</a>' if place == 0 else ""
        found = "<br>".join(_condition(one) for one in claim["conditions"] if one["judged"])
        yield f"<tr><td>{name}</td><td>{escape(claim['text'])}</td><td>{_badge(claim)}</td>"
        yield f'<td class="number">{found}</td></tr>'


def _condition(one: Mapping[str, Any]) -> str:
    return f"{escape(one['data'])} {_with_interval(one)}"


def _with_interval(one: Mapping[str, Any]) -> str:
    """A difference with its interval.

    >>> _with_interval({"value": 0.1234, "low": 0.1, "high": 0.15})
    '+0.1234 [+0.1000, +0.1500]'
    """
    if one["low"] is None:
        return f"{one['value']:+.4f} [no interval]"
    return f"{one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"


def _lies(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every pair of arms of which clicks and truth say something else, and where another arm is best by them."""
    rows: dict[str, list[str]] = {LIES: [], BLIND: [], SEES_MORE: []}
    others = []
    for result in results:
        for word, row in (*_of_panels(result), *_of_days(result)):
            if word in rows:
                rows[word].append(row)
        for panel in result["panels"]:
            best = panel["best"]
            if len(best) == 2 and best[TRUE] != best[LOGGED]:
                cells = (f"{result['name']}, {panel['data']}", panel["measures"][TRUE], best[TRUE], best[LOGGED])
                others.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    titles = "".join(f"<th>{title}</th>" for title in ("where", "arms", "measure", "by the truth", "by clicks"))
    head = f'<div class="wide"><table><tr>{titles}</tr>'
    if rows[LIES]:
        yield "<p>It says the opposite of the truth of these arms:</p>"
        yield f"{head}{''.join(rows[LIES])}</table></div>"
    else:
        yield "<p>Nowhere in these results does it say the opposite of the truth.</p>"
    if others:
        yield "<p>Another arm is best by it than by the truth, though not always by more than chance:</p>"
        yield '<div class="wide"><table><tr><th>where</th><th>measure</th><th>best by the truth</th>'
        yield f"<th>best by clicks</th></tr>{''.join(others)}</table></div>"
    for word, text in ((BLIND, "that it does not see"), (SEES_MORE, "that it sees and the truth does not")):
        if rows[word]:
            yield f"<details><summary>{len(rows[word])} differences {text}</summary>"
            yield f"{head}{''.join(rows[word])}</table></div></details>"


def _of_panels(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the log says of each arm against the first, and a row on it."""
    for panel in result["panels"]:
        for arm, word in panel["offline"].items():
            row = panel["rows"][arm]
            where = f"{result['name']}, {panel['data']}"
            yield word, _told(where, arm, panel["first"], panel["measures"][TRUE], row[TRUE], row[LOGGED])


def _of_days(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same of the claims about a feedback loop, which has no such panels."""
    for claim in result["claims"] if result["series"] else ():
        by_kind = {one["kind"]: one for one in claim["conditions"]}
        if len(by_kind) == 2:
            true, logged = by_kind[TRUE], by_kind[LOGGED]
            where, against = f"{result['name']}, {true['data']}", true["against"] or "nothing"
            yield logged["offline"], _told(where, claim["better"], against, true["measure"], true, logged)


def _told(where: str, arm: str, against: str, measure: str, true: Mapping[str, Any], logged: Mapping[str, Any]) -> str:
    words = "".join(f"<td>{escape(cell)}</td>" for cell in (where, f"{arm} against {against}", measure))
    numbers = "".join(f'<td class="number">{_with_interval(one)}</td>' for one in (true, logged))
    return f"<tr>{words}{numbers}</tr>"


def _section(result: Mapping[str, Any]) -> Iterator[str]:
    made = result["made"]
    yield f'<h2 id="{result["name"]}">{escape(result["name"])}: {escape(result["question"])}</h2>'
    yield f'<p class="why">{escape(result["why"])}</p>'
    yield "<ul>"
    for data, what in result["data"].items():
        yield f"<li>{escape(data)}: {escape(what['what'])}; {what['seeds']} seeds</li>"
    for data, reason in result["skipped"].items():
        yield f"<li>{escape(data)}: left out, {escape(reason)}</li>"
    yield "</ul>"
    yield '<div class="wide"><table><tr><th>claim</th><th>verdict</th><th>where, by what</th><th>against</th>'
    yield "<th>difference</th></tr>"
    for claim in result["claims"]:
        rows = claim["conditions"] or [None]
        for place, one in enumerate(rows):
            head = f"<td>{escape(claim['text'])}</td><td>{_badge(claim)}</td>" if place == 0 else "<td></td>" * 2
            if one is None:
                yield f"<tr>{head}<td>-</td><td>-</td><td>-</td></tr>"
                continue
            word = ""
            if one.get("offline", AGREES) != AGREES:
                style = "lies" if one["offline"] == LIES else "unjudged"
                word = f'<br><span class="{style}">the log {one["offline"]}</span>'
            quiet = "" if one["judged"] else ' class="unjudged"'
            sign = ", less is better" if claim["lower"] else ""
            yield f"<tr>{head}<td{quiet}>{escape(one['data'])}, {escape(one['measure'])}{sign}{word}</td>"
            yield f"<td>{escape(one['against'] or 'zero')}</td>"
            yield f'<td class="number">{_with_interval(one)}</td></tr>'
    yield "</table></div>"
    yield f'<div class="wide">{plot(result)}</div>'
    yield from _figures(result["figures"], result["order"])
    yield "<details><summary>The arms as changes of the configuration</summary><div class='wide'><table>"
    if result["base"]:
        yield f"<tr><td>every arm</td><td>{_changes(result['base'])}</td></tr>"
    for arm in result["order"]:
        yield f"<tr><td>{escape(arm)}</td><td>{_changes(result['arms'][arm])}</td></tr>"
    yield "</table></div></details>"
    yield (
        f'<p class="made"><code>{escape(made["command"])}</code>; {result["cpu_s"]} s of processor time, finished '
        f"{escape(made['when'])}, {escape(made['machine'])}.</p>"
    )


def _changes(changes: Sequence[str]) -> str:
    return "<br>".join(f"<code>{escape(change)}</code>" for change in changes) or "as configured"


def _figures(figures: Mapping[str, Mapping[str, Mapping[str, float]]], order: Sequence[str]) -> Iterator[str]:
    """The means of each arm."""
    for data, rows in figures.items():
        measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
        if not measures:
            continue
        yield f'<div class="wide"><table><tr><th>{escape(data)}</th>'
        yield "".join(f"<th>{escape(measure)}</th>" for measure in measures) + "</tr>"
        for arm in (arm for arm in order if arm in rows):
            row = rows[arm]
            cells = "".join(f'<td class="number">{_number(row.get(measure))}</td>' for measure in measures)
            yield f"<tr><td>{escape(arm)}</td>{cells}</tr>"
        yield "</table></div>"


def _number(value: float | None) -> str:
    """A figure in four digits.

    >>> _number(0.12345), _number(12.3456), _number(None)
    ('0.1235', '12.35', '')
    """
    return "" if value is None else f"{value:.4g}"
