"""The page of every section and key, made from the settings themselves, so that it cannot say anything else."""

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from twotower.config.settings import Settings
from twotower.datasets.options import ImportSection, TableFiles
from twotower.features.options import KINDS, Features
from twotower.schema.options import Day, NotNegative, Share
from twotower.train.options import Span

_HEAD = """\
# Configuration

One TOML file configures everything. Every key has a default, so that a file holds only what differs; an unknown key is
an error, and so is a value of another type. `--set section.key=value` overrides the file, any number of times; the
value is TOML, or else a plain string (`--set workspace.path=my world`).

This page is generated from the sections that the stages define (`options.py` of each) and `config/settings.py`.
"""
_FEATURES = """\
A feature is written `name = { kind = "..." }`, under `[features.user]`, `[features.item]` or `[features.context]`; see
[features](features.md).
"""
_TABLE_FILES = "### `[import.events]`, `[import.users]`, `[import.items]`\n"
_Row = tuple[str, str, str, str]
_WORDS = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "anything",
    TableFiles: "a table of the keys below",
}
_VALUES = {
    str: "texts by name",
    Span: "spans by key",
    NotNegative: "numbers ≥ 0 by name",
    Share: "numbers, 0 to 1, by name",
}
"""Of a table, by the type of its values; features otherwise."""


def reference() -> str:
    """All sections in their order as Markdown: a table each of key, type or choices, default, what it does."""
    pages = [_HEAD]
    for name, section in get_type_hints(Settings).items():
        pages.append(f"## `[{name}]`\n\n{_doc(section)}\n")
        if section is Features:
            pages.append(_FEATURES)
        pages.append(_table(_rows(section, "")))
        if section is Features:
            pages += [
                f'### `kind = "{kind}"`\n\n{_doc(cls)}\n\n{_table(_rows(cls, ""))}' for kind, cls in KINDS.items()
            ]
    pages.append(f"## `[import]`\n\n{_doc(ImportSection)}\n")
    pages.append(_table(_rows(ImportSection, "")))
    pages.append(f"{_TABLE_FILES}\n{_table(_rows(TableFiles, ''))}")
    return "\n".join(pages).rstrip() + "\n"


def _rows(section: Any, prefix: str) -> Iterator[_Row]:
    """The rows of a section; those of sections within it follow under dotted names."""
    hints = get_type_hints(section, include_extras=True)
    for name, info in _fields(section).items():
        if name == "kind" and section in KINDS.values():
            continue
        if dataclasses.is_dataclass(hints[name]) and hints[name] is not TableFiles:
            yield from _rows(hints[name], f"{prefix}{name}.")
        else:
            said = re.sub(r"\s+", " ", _description(section, name)).strip().replace("|", "\\|")
            yield (f"`{prefix}{name}`", _type(hints[name]), _default(info), said)


def _description(section: Any, name: str) -> str:
    """What is said of a key, where it was declared: a section that builds on another says only what is different."""
    said = (
        _fields(one)[name].description for one in section.__mro__ if name in getattr(one, "__pydantic_fields__", {})
    )
    return next((text for text in said if text), "")


def _fields(section: Any) -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = section.__pydantic_fields__
    return found


def _table(rows: Iterable[_Row]) -> str:
    lines = ["| key | value | default | what it does |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _doc(section: Any) -> str:
    return inspect.cleandoc(section.__doc__ or "")


def _type(hint: Any) -> str:
    """A type in words, with the limits of a number.

    >>> from twotower.schema.options import Positive
    >>> _type(Share), _type(list[Positive]), _type(Literal["a", "b"])
    ('number, 0 to 1', 'list of integer > 0', '`a`, `b`')
    """
    if hint is Day:
        return "day, `YYYY-MM-DD`"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _type(arguments[0]) + "".join(_limits(extra) for extra in arguments[1:] if isinstance(extra, FieldInfo))
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(choice) for choice in arguments if choice is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return _VALUES.get(arguments[1], "features by name") if origin is dict else _WORDS[origin or hint]


def _limits(info: FieldInfo) -> str:
    keys = ("gt", "ge", "lt", "le", "min_length")
    found = {key: getattr(rule, key) for rule in info.metadata for key in keys if hasattr(rule, key)}
    if {"ge", "le"} <= found.keys():
        return f", {found['ge']} to {found['le']}"
    signs = {"gt": " > ", "ge": " ≥ ", "lt": " and < ", "le": " and ≤ "}
    limits = "".join(f"{sign}{found[key]}" for key, sign in signs.items() if key in found)
    return limits + (", not empty" if found.get("min_length") else "")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "must be given"
    value = info.get_default(call_default_factory=True, validated_data={})
    return "absent" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f'{{ kind = "{vars(value)["kind"]}" }}'
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(entry)}" for key, entry in value.items()) + " }" if value else "{}"
    return json.dumps(value)
