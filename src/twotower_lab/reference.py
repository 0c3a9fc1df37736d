"""The claims as a page of the documentation has them, made from the experiments, so that it says nothing else."""

from collections.abc import Iterator

from twotower_lab.experiments import DATA, EXPERIMENTS, Claim, LogData, WorldData

BEGIN, END = "<!-- claims: generated -->", "<!-- claims: end -->"
"""Around the list in `docs/lab.md`."""


def reference() -> str:
    """Tables of the data sets and of all experiments with their claims and arms, as Markdown.

    After a change, put what `python -m twotower_lab.reference` prints between the marks of `docs/lab.md`.
    """
    return "\n".join([BEGIN, "", *_data(), *_claims(), END, ""])


def _data() -> Iterator[str]:
    yield "| data | what it is | seeds |"
    yield "|---|---|---|"
    for name, data in DATA.items():
        if isinstance(data, WorldData):
            what = f"a simulated world: {data.users:,} users, {data.items:,} items, {data.days} days"
        else:
            part = f"held out `{data.holdout}`" if data.holdout else "nothing held out"
            part += f", until `{data.until}`" if data.until else ""
            what = f"`{data.dataset}` from `{data.folder}/`, {part}, positive `{data.positive}`"
        changed = "".join(f", `{change}`" for change in data.changes)
        yield f"| `{name}` | {what}; `{data.config}`{changed} | {data.seeds} |"
    yield ""


def _claims() -> Iterator[str]:
    for name, experiment in EXPERIMENTS.items():
        yield f"### `{name}`"
        yield ""
        yield f"{experiment.question} {experiment.why} On {_listed(experiment.data)}."
        yield ""
        yield "| claim | better | than | measure |"
        yield "|---|---|---|---|"
        for claim in experiment.claims:
            than = "; ".join(claim.than) or "zero"
            yield f"| {claim.text} | {claim.better} | {than} | {_measure(claim, experiment.data)} |"
        yield ""
        yield "| arm | changes |"
        yield "|---|---|"
        if experiment.base:
            yield f"| every arm | {_changes(experiment.base)} |"
        for arm, what in experiment.arms.items():
            only = f" (on {_listed(what.on)} alone)" if what.on else ""
            words = [_changes(what.changes), str(what.way).replace("`", "")]
            yield f"| {arm}{only} | {'; '.join(word for word in words if word) or 'as configured'} |"
        yield ""


def _measure(claim: Claim, data: tuple[str, ...]) -> str:
    """What a claim is judged by, on a world and on a log."""
    words = []
    if any(isinstance(DATA[name], WorldData) for name in data):
        words.append(f"`{claim.true}`")
    if claim.logged and any(isinstance(DATA[name], LogData) for name in data):
        words.append(f"on a log `{claim.logged}`")
    return ", ".join(words) + (" (less is better)" if claim.lower else "")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _changes(changes: tuple[str, ...]) -> str:
    return " ".join(f"`{change}`" for change in changes)


if __name__ == "__main__":
    print(reference(), end="")
