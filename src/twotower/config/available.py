"""Which values of the configuration this release can honour.

The keys of a configuration are fixed; some of their values come with later releases. Asking for one is an error that
says so, never a silent default.
"""

from twotower.config.settings import Sequence, Settings
from twotower.schema.errors import ConfigError

CHANNELS = ("two_tower", "mind", "mf", "als", "item_cf", "swing", "popular", "new_items", "same_category")
"""The recall channels of this release."""


def check_available(settings: Settings) -> None:
    """Refuse a configuration that this release cannot carry out.

    Raises:
        ConfigError: every such key, with the values that work.
    """
    wanted = [
        ("engine.name", settings.engine.name, ("duckdb", "spark")),
        ("index.kind", settings.index.kind, ("exact", "faiss")),
        ("serve.features.kind", settings.serve.features.kind, ("lmdb",)),
        ("stream.log.kind", settings.stream.log.kind, ("local", "redis", "kafka")),
        *(("models.channels", name, CHANNELS) for name in settings.models.channels),
    ]
    problems = [
        f"{key} = {value!r} is not in this release: use {' or '.join(repr(known) for known in values)}"
        for key, value, values in wanted
        if value not in values
    ]
    for side, features in (("user", settings.features.user), ("item", settings.features.item)):
        if not features:
            problems.append(f"features.{side} is empty: a tower needs a feature")
    for name, feature in settings.features.user.items():
        if (
            isinstance(feature, Sequence)
            and feature.encoder == "transformer"
            and settings.models.dimension % feature.heads
        ):
            problems.append(
                f"features.user.{name}.heads = {feature.heads} does not divide models.dimension = "
                f"{settings.models.dimension}: a transformer's heads share the width of an item"
            )
    if "two_tower" not in settings.models.channels:
        problems.append("models.channels must name two_tower")
    if problems:
        raise ConfigError("; ".join(problems))
