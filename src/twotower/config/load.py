"""From a TOML file and overrides to `Settings`, with errors that name the key and the nearest valid one."""

import copy
import dataclasses
import datetime
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from twotower.config.settings import Settings
from twotower.datasets.options import ImportSection, TableFiles
from twotower.features.options import KINDS
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, cut

RENAMED = {
    "train.popularity": "train.logit_adjustment",
    "samples.untrained_users": "samples.held_out_users",
    "update.rows": "update.rows_per_delta",
    "update.gate.least": "update.gate.min_positives",
    "update.gate.most_move": "update.gate.max_move",
    "update.gate.most_length": "update.gate.max_length",
    "update.gate.most_alike": "update.gate.max_mean_cosine_rise",
    "update.gate.most_rise": "update.gate.max_rise",
    "stream.lateness_s": "stream.allowed_lateness_s",
    "stream.late_s": "stream.remember_s",
}
"""Keys of earlier releases, with the names that they have now."""
REMOVED = {
    "samples.negatives.hard.impressed": (
        "an impressed item is no negative of retrieval: it was good enough to be shown, and the ranker learns from it. "
        "samples.negatives.impressed_as_negatives_for_experiments shows what it does to a model"
    ),
    "serve.fusion": "remove it: channels are always fused by their ranks; [fusion] has the weights",
    "models.mind.sharpness": "remove it: it is always 20",
    "models.als.iterations": "remove it: it is always 15",
    "serve.impressed_filter": "give its items as serve.impressed_items, and remove its other keys",
    "update.gate.most_accumulated": "remove it: it is always 1e6",
    "update.gate.rise_least": "remove it: it is always 20",
    "update.bounds.window_min": "remove it: it is always 60",
    "update.gate.index_recall": "remove it: it is always 0.95",
    "serve.features": "remove it; serve.feature_store says where a server keeps what it learns of users",
}
"""Keys of earlier releases that are gone, with what to do."""
CONSTANTS: Mapping[str, float] = {"samples.negatives.hard.impressed": 0.0, "models.mind.sharpness": 20.0}
"""Removed keys that samples and checkpoints of earlier releases record, with the values that they always have now."""

HELD_OUT_USERS = 0.01
"""Share of users who are held out of training where a configuration has an `[update]` section."""

IMPORT = "import"
"""The section of `twotower import -c`; it is no part of `Settings`, because no later stage depends on it."""

_ADAPTER = TypeAdapter(Settings)
_IMPORT_ADAPTER = TypeAdapter(ImportSection)
_SHOWN = 100
"""Characters of a wrong value that an error shows."""


def load(
    configuration: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    workspace: str | Path | None = None,
) -> Settings:
    """Read a configuration; without one, the defaults.

    Args:
        configuration: the path of a TOML file, or its content as a dict; None = the defaults. Where there is no file
            `movielens` or `movielens.toml`, these names mean the example of the package.
        overrides: `section.key=value` each, applied in order, the value being TOML or else a plain string; or values by
            key, such as `{"train.epochs": 3}`.
        workspace: `workspace.path`, in place of what the configuration says.

    Raises:
        ConfigError: no such file, no TOML, an unknown key, a value of another type.

    >>> load({"train": {"epochs": 3}}, {"models.dimension": 32}, workspace="clicks").workspace.path
    'clicks'
    """
    content, where = _content(configuration)
    if workspace is not None:
        _place(content, ["workspace", "path"], str(workspace), "workspace")
    return parse(content, overrides, where)


def _content(configuration: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """A configuration as a document, and its name in errors."""
    if configuration is None:
        return {}, "the defaults"
    if isinstance(configuration, Mapping):
        return copy.deepcopy(dict(configuration)), "configuration"
    path = _file(Path(configuration))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig")), str(path)
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration file {path}, and no example of this name; the examples are {', '.join(examples())}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, an integer of thousands of digits, a deep nesting
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _file(path: Path) -> Path:
    """The file that a path names, or the example of this name where there is no such file."""
    if len(path.parts) != 1 or (path.exists() and not path.is_dir()):
        return path
    return examples().get(path.name.removesuffix(".toml"), path)


def examples() -> dict[str, Path]:
    """The configurations of the package, by name.

    >>> list(examples())
    ['demo', 'globo', 'ids_only', 'kuairand', 'movielens', 'movielens_next']
    """
    folder = Path(str(files("twotower"))) / "cli" / "examples"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def parse(
    content: dict[str, Any], overrides: Iterable[str] | Mapping[str, Any] = (), where: str = "configuration"
) -> Settings:
    """Check a parsed configuration and its overrides, as of `load`; `content` itself stays as it is.

    Types are strict, as TOML has them: `"3"` and `true` are no integers. A day may be a TOML date or a string.
    A configuration with an `[update]` section holds out users for the gate of the updates, unless it says otherwise.

    Raises:
        ConfigError: an unknown key, a value of another type or out of its range.

    >>> parse({"train": {"epochs": 3}}, ["train.seed=7"]).train.seed
    7
    >>> parse({"train": {"epoch": 3}})
    Traceback (most recent call last):
    twotower.schema.errors.ConfigError: configuration: train.epoch is no key; did you mean epochs?
    """
    try:
        content = copy.deepcopy(content)
        if IMPORT in content:
            _import_section(content.pop(IMPORT))
        is_updated = "update" in content
        if isinstance(overrides, Mapping):
            for key, value in overrides.items():
                _place(content, key.split("."), value, key)
        else:
            for override in overrides:
                _override(content, override)
        if is_updated and isinstance(samples := content.setdefault("samples", {}), dict):
            samples.setdefault("held_out_users", HELD_OUT_USERS)
        _fit_towers(content)
        # As JSON, because strict types take sections from documents there, and from nothing but objects elsewhere.
        return _ADAPTER.validate_json(json.dumps(content, default=_plain), strict=True)
    except (RecursionError, UnicodeError, TypeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_problems(error))) from None


def load_import(configuration: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> ImportSection:
    """The section `[import]` of a configuration, with overrides such as `import.timezone=Asia/Shanghai`.

    Raises:
        ConfigError: no such file or section, an unknown key, a value of another type.
    """
    content, where = _content(configuration)
    for override in overrides:
        _override(content, override)
    if IMPORT not in content:
        raise ConfigError(f"{where} has no section [import]: `twotower init FILES... --out DIR` writes one")
    try:
        return _import_section(content[IMPORT])
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_problems(error))) from None


def _import_section(document: Any) -> ImportSection:
    return _IMPORT_ADAPTER.validate_json(json.dumps(document, default=_plain), strict=True)


def _problems(error: ValidationError) -> list[str]:
    section = [IMPORT] if error.title == ImportSection.__name__ else []
    return [
        _sentence((*section, *problem["loc"]), problem["type"], problem["msg"], problem["input"])
        for problem in error.errors()
    ]


def _fit_towers(content: dict[str, Any]) -> None:
    """Give towers of ids and sequences alone no network, where the configuration says nothing of their networks.

    Without further features there is nothing for a network to combine: it would only add noise.
    """
    features, models = content.get("features", {}), content.setdefault("models", {})
    sides: list[Any] = list(features.values()) if isinstance(features, dict) else [None]
    if not isinstance(models, dict) or not all(isinstance(side, dict) for side in sides):
        return  # what is wrong is said when types are checked
    if all(
        isinstance(kind, dict) and (name in (c.USER_ID, c.ITEM_ID) or kind.get("kind") == "sequence")
        for side in sides
        for name, kind in side.items()
    ):
        for tower in ("user_tower", "item_tower"):
            models.setdefault(tower, {"network": "none"})


def as_dict(settings: Settings) -> dict[str, Any]:
    """A configuration as a plain document, for a manifest; `parse` of it gives the same settings."""
    document: dict[str, Any] = _ADAPTER.dump_python(settings, mode="json", exclude_none=True)
    return document


def with_present_names(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier release recorded, with the keys that there are now.

    A removed key stays where its value was another than the constant that took its place: it tells what was made.

    >>> with_present_names({"train": {"popularity": 0.4, "epochs": 2}})
    {'train': {'epochs': 2, 'logit_adjustment': 0.4}}
    >>> with_present_names({"models": {"mind": {"sharpness": 20.0, "interests": 4}}})
    {'models': {'mind': {'interests': 4}}}
    """
    document = copy.deepcopy(document)
    for old in (*RENAMED, *CONSTANTS):
        *sections, key = old.split(".")
        section: Any = document
        for name in sections:
            section = section.get(name, {})
        if key not in section:
            continue
        if old in RENAMED:
            _place(document, RENAMED[old].split("."), section.pop(key), old)
        elif section[key] == CONSTANTS[old]:
            del section[key]
    return document


def _plain(value: Any) -> str:
    """TOML's dates and times as text."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"{value!r} is no value of a configuration")


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: write section.key=value")
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        document = {}
    value = document["value"] if document.keys() == {"value"} else text
    _place(content, names, value, f"--set {override}")


def _place(content: dict[str, Any], names: list[str], value: Any, where: str) -> None:
    """Put a value where a dotted key stands; a part of the key that is a value, not a section, is a `ConfigError`."""
    for name in names[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: {name} is a value, not a section")
    content[names[-1]] = value


def _sentence(location: tuple[int | str, ...], kind: str, message: str, seen: Any) -> str:
    shown = cut(repr(seen), _SHOWN)
    # between a feature and its key stands the feature's kind, which the file has elsewhere
    written = (*location[:3], *location[4:]) if location[:1] == ("features",) else location
    name = ".".join(map(str, written))
    match kind:
        case "unexpected_keyword_argument":
            return f"{name[:_SHOWN]} is no key; " + _hint(name, _keys_beside(location))
        case "missing":
            return f"{name} is missing"
        case "dataclass_type" | "model_attributes_type" | "dict_type":
            return f"{name} = {shown}: a section with keys is expected"
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{name}: kind is one of {', '.join(KINDS)}; seen {shown}"
        case "value_error":
            return f"{name}: {message.removeprefix('Value error, ')}"
        case _:
            return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def _hint(name: str, known: list[str]) -> str:
    if name in RENAMED:
        return f"it is called {RENAMED[name]} now"
    if name in REMOVED:
        return f"it is gone since an earlier release; {REMOVED[name]}"
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    return f"did you mean {near[0]}?" if near else f"the keys here are {', '.join(known) or 'none'}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section or the feature in which the last part of a location stands."""
    if location[0] == IMPORT:
        return [field.name for field in dataclasses.fields(TableFiles if len(location) > 2 else ImportSection)]
    level: Any = KINDS.get(str(location[-2])) if len(location) > 4 and location[0] == "features" else Settings()
    for part in location[:-1] if isinstance(level, Settings) else ():
        level = getattr(level, str(part), None)
    return [field.name for field in dataclasses.fields(level)] if dataclasses.is_dataclass(level) else []
