"""The first configuration of a user's own data: chosen by what was seen of it, and written with its reasons."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Final, Literal

from twotower.datasets.options import ImportSection, TableFiles
from twotower.datasets.propose import Facts, Proposal

Kind = Literal["ids only", "features", "impressions", "news"]

NEW_ITEMS: Final = 0.15
"""From this share of events on new items in the last tenth of time on, and ..."""
NEWS_DAYS: Final = 5.0
"""... up to this many days between an item's first and last event, a log is one of news."""
FEW_CLICKS: Final = 10
"""Impressions with fewer positives than this for each user get the small steps of KuaiRand."""
FEW_KNOWN: Final = 0.5
"""Where more of the last events than this are of users not seen before, no embedding of users is learned."""
_LARGE: Final = 200_000
_BATCHES: Final = 40
"""At least this many steps in an epoch."""


def kind_of(proposal: Proposal) -> Kind:
    """Which starting configuration fits."""
    facts = proposal.facts
    if facts.new_items >= NEW_ITEMS and facts.days and facts.item_life_days <= NEWS_DAYS and facts.events > 10_000:
        return "news"
    if facts.has_impressions and facts.positives < FEW_CLICKS * facts.users:
        return "impressions"
    known = sum(len(side) for side in proposal.features.values())
    return "features" if known > 2 else "ids only"


def starting_point(proposal: Proposal) -> dict[str, dict[str, Any]]:
    """The sections of a first configuration, without `workspace` and `import`."""
    facts, kind = proposal.facts, kind_of(proposal)
    features = {side: dict(named) for side, named in proposal.features.items()}
    features["user"]["history"] = {"kind": "sequence", "last": {"news": 20}.get(kind, 50), "encoder": "mean"}
    if kind == "news" or facts.new_users > FEW_KNOWN:
        features["user"].pop("user_id", None)
    models: dict[str, Any] = {
        "channels": ["two_tower", "item_cf", "popular"],
        "dimension": 128 if facts.positives >= _LARGE else 64,
    }
    if kind != "ids only":
        models |= {"user_tower": {"layers": []}, "item_tower": {"layers": []}}
    if kind == "impressions":
        models["user_tower"] = {"network": "dcn", "layers": []}
    document = {"features": {side: named for side, named in features.items() if named}, "models": models}
    document["train"] = _train(kind, facts)
    if kind == "news":
        document["models"]["popular"] = {"half_life_days": 0.1}
        document["samples"] = {"vocabulary_room": 4}
    return document


def _train(kind: Kind, facts: Facts) -> dict[str, Any]:
    """Options of training: those of the data set of ours that is most like it, with a batch that fits."""
    batch = 64
    while batch < (512 if kind == "impressions" else 2048) and 2 * batch * _BATCHES <= facts.positives:
        batch *= 2
    common = {"logit_adjustment": 0.4, "batch_size": batch}
    match kind:
        case "news":
            return {"temperature": 0.05, **common, "epochs": 3, "schedule": "linear", "half_life_days": 0.5}
        case "impressions":
            return {
                "temperature": 0.2,
                **common,
                "epochs": 3,
                "learning_rate": 0.002,
                "table_learning_rate": 0.03,
                "id_dropout": 0.5,
            }
        case "features":
            return {"temperature": 0.1, **common, "epochs": 3 if facts.positives > _LARGE else 10, "schedule": "linear"}
        case "ids only":
            return {"temperature": 0.1, **common, "epochs": 20}


_REASONS: Final[Mapping[Kind, str]] = {
    "ids only": "ids only: nothing but ids is known, so the towers have no network",
    "features": "features: ids and what is known of users and items",
    "impressions": "impressions: few clicks of each user, so small steps and few of them",
    "news": "news: items are new and live for days, so late clicks count more and users have no embedding",
}


def as_toml(proposal: Proposal, workspace: str) -> str:
    """The file that `init` writes: everything with its reason, in the order in which it is used."""
    facts = proposal.facts
    span = "no times" if facts.days is None else f"{facts.days:.1f} days"
    lines = [
        "# Written by `twotower init`. Change what is wrong, then:",
        "#   twotower import -c THIS_FILE && twotower run -c THIS_FILE && twotower serve -c THIS_FILE",
        *(f"# Note: {note}." for note in proposal.notes),
        "",
        "[workspace]",
        f"path = {_toml(workspace)}",
        "",
        '# What becomes of your files: name in the files = name in the workspace, "" leaves a column out.',
        *_import(proposal),
        "",
        f"# {facts.events:,} events, {facts.positives:,} positive, of {facts.users:,} users and {facts.items:,} items, "
        f"{span}.",
        f"# The starting configuration is for {_REASONS[kind_of(proposal)]}.",
    ]
    for name, section in starting_point(proposal).items():
        lines += ["", *_section(name, section)]
    return "\n".join(lines) + "\n"


def _import(proposal: Proposal) -> Iterator[str]:
    section, rows = proposal.section, {(row.column, row.becomes.partition(".")[0]): row for row in proposal.columns}
    examples = {row.column: row for row in rows.values()}
    yield "[import]"
    for entry in fields(ImportSection):
        value = getattr(section, entry.name)
        if isinstance(value, TableFiles) or value is None or value == []:
            continue
        yield f"{entry.name} = {_toml(value)}"
    for name in ("events", "users", "items"):
        table = getattr(section, name)
        if table is None:
            continue
        yield f"\n[import.{name}]"
        for entry in fields(TableFiles):
            value = getattr(table, entry.name)
            if entry.name != "columns" and value not in (None, [], entry.default):
                yield f"{entry.name} = {_toml(value)}"
        yield f"[import.{name}.columns]"
        for column, to in table.columns.items():
            row = examples.get(column)
            shown = "" if row is None or not row.examples else f"  # {', '.join(map(_one_line, row.examples))}"
            yield f"{_toml(column)} = {_toml(to)}{shown}"


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _section(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    """A section; those of features are tables of their own, a line for each feature."""
    if name != "features":
        yield f"[{name}]"
        yield from (f"{_key(key)} = {_toml(value)}" for key, value in section.items())
        return
    for place, (side, named) in enumerate(section.items()):
        if place:
            yield ""
        yield f"[features.{side}]"
        yield from (f"{_key(key)} = {_toml(value)}" for key, value in named.items())


def _key(name: str) -> str:
    plain = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if plain else _toml(name)


def _toml(value: Any) -> str:
    """A value in one line of TOML; strings of JSON are strings of TOML, once delete is escaped."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
