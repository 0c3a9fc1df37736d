"""The claims as a page of the documentation has them, made from the experiments, so that it says nothing else."""

import textwrap
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Final

from jinja2 import Environment

from twotower_lab.experiments import DATA, EVERYWHERE, EXPERIMENTS, Arm, Claim, Experiment, LogData, WorldData

BEGIN, END = "<!-- claims: generated -->", "<!-- claims: end -->"
"""Around the list in `docs/lab.md`."""
TEMPLATE: Final = "claims.md"


def reference() -> str:
    """Tables of the data sets and of all experiments with their claims and arms, as Markdown.

    After a change, put what `python -m twotower_lab.reference` prints between the marks of `docs/lab.md`.
    """
    template = Environment().from_string((files("twotower_lab") / TEMPLATE).read_text(encoding="utf-8"))
    text = template.render(
        data=DATA, everywhere=EVERYWHERE, experiments=EXPERIMENTS, ticked=_ticked, measures=_measures, words=_words
    )
    lines = (line if line.startswith("|") else textwrap.fill(line, 120) for line in text.rstrip().splitlines())
    return "\n".join([BEGIN, "", *lines, "", END, ""])


def _ticked(words: Sequence[str], between: str = " ") -> str:
    return between.join(f"`{word}`" for word in words)


def _measures(claim: Claim, experiment: Experiment) -> str:
    """What a claim is judged by, on a world and on a log."""
    kinds = [type(DATA[name]) for name in experiment.data]
    world, log = WorldData in kinds, LogData in kinds and claim.logged
    return ", ".join([*([f"`{claim.true}`"] if world else []), *([f"on a log `{claim.logged}`"] if log else [])])


def _words(arm: Arm) -> Iterator[str]:
    """An arm's changes, its channel and its way, as far as they are not the usual ones."""
    if arm.changes:
        yield _ticked(arm.changes)
    if arm.channel != Arm().channel:
        yield f"channel `{arm.channel}`"
    if str(arm.way):
        yield str(arm.way).replace("`", "")


if __name__ == "__main__":
    print(reference(), end="")
