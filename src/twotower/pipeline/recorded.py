"""What samples and training have fixed, kept beside them, because a configuration is edited between commands.

Without this record, a version could be recorded with a dimension that its vectors do not have.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from twotower.config.load import as_dict, parse, with_present_names
from twotower.config.settings import Settings
from twotower.samples.build import made_with
from twotower.schema.errors import ConfigError

Document = dict[str, Any]

ASKED: Final = "asked"
"""Key of the settings as they were asked for, before trials changed some."""

_FREE: Final[Mapping[str, tuple[str, ...]]] = {
    "features": (),
    "samples": (),
    "models": (
        *("channels", "rankers", "als", "popular", "new_items", "same_category", "item_cf", "swing"),
        *("mf", "mind"),  # of those that are configured, see `fixed_by_training`
    ),
    "train": ("checkpoint_s", "threads"),
}
"""Sections that training fixes, each without the keys that may change: of counted channels, and of where it runs."""


def fixed_by_samples(settings: Settings) -> Document:
    """What the samples of a configuration are made with, by section."""
    return made_with(settings.features, settings.samples, settings.models.dimension)


def fixed_by_training(settings: Settings, channels: Sequence[str] | None = None) -> Document:
    """What the checkpoints of a configuration are made with, by section; of some trained channels, or of all."""
    document = as_dict(settings)
    fixed = {
        section: {key: value for key, value in document[section].items() if key not in free}
        for section, free in _FREE.items()
    }
    fixed["models"] |= {
        name: document["models"][name] for name in ("mf", "mind") if name in (channels or settings.models.channels)
    }
    return fixed | {name: document[name] for name in settings.models.rankers}


def check_same(made: Document, wanted: Document, what: str, remedy: str) -> None:
    """Refuse a configuration that differs from what existing samples or checkpoints were made with.

    Args:
        made: what fixed them; empty = an earlier release made them, without a record. It may have more channels and
            rankers than are wanted.
        wanted: the same of the configuration.
        what: names them, such as `checkpoints holds checkpoints`.
        remedy: how to make them again.

    Raises:
        ConfigError: with each key and both values.
    """
    if not made:
        return
    made = with_present_names(made)
    unasked = {name for name in ("mf", "mind") if name not in wanted["models"]}
    models = {key: value for key, value in made["models"].items() if key not in unasked}
    changed = list(differences({key: made.get(key) for key in wanted} | {"models": models}, wanted))
    if changed:
        more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ConfigError(f"{what} of other settings: {'; '.join(changed[:5])}{more}. Set them back, or {remedy}")


def differences(made: Any, wanted: Any, key: str = "") -> Iterator[str]:
    """Each key whose values differ, with both.

    >>> list(differences({"models": {"dimension": 16}}, {"models": {"dimension": 32}}))
    ['models.dimension is 16 there and 32 in the configuration']
    """
    if isinstance(made, dict) and isinstance(wanted, dict):
        for name in sorted(made.keys() | wanted.keys()):
            yield from differences(made.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    elif made != wanted:
        before, now = ("absent" if value is None else repr(value) for value in (made, wanted))
        yield f"{key} is {before} there and {now} in the configuration"


def as_made(settings: Settings, made: Document) -> Settings:
    """A configuration with the values that training has fixed."""
    if not made:
        return settings
    made = with_present_names(made)
    document, asked = as_dict(settings), fixed_by_training(settings)
    for section, values in asked.items():
        free = {key: value for key, value in document[section].items() if key not in values}
        fixed = made.get(section) or values
        document[section] = free | {key: value for key, value in fixed.items() if key not in free}
    return parse(document, where="the settings of the checkpoint")
