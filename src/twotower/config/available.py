"""Sections of a configuration that do not fit each other; each value by itself is checked when it is read."""

from collections.abc import Iterator

from twotower.config.settings import Settings
from twotower.features.options import Categorical, Feature, MultiCategorical, Numeric, Sequence
from twotower.schema.errors import ConfigError


def check_available(settings: Settings) -> None:
    """Refuse a configuration whose sections do not fit each other.

    Raises:
        ConfigError: every such key, with what to do.
    """
    problems = [] if settings.features.user else ["features.user is empty: a tower needs a feature"]
    dimension = settings.models.dimension
    for name, feature in settings.features.user.items():
        if isinstance(feature, Sequence) and feature.encoder == "transformer" and dimension % feature.heads:
            problems.append(
                f"features.user.{name}.heads = {feature.heads} does not divide models.dimension = {dimension}: "
                "a transformer's heads share the width of an item"
            )
    problems += _of_channels(settings)
    negatives = settings.samples.negatives
    if negatives.frequency == "streaming" and not negatives.easy.in_batch:
        problems.append(
            'samples.negatives.frequency = "streaming" estimates q of in-batch negatives, and easy.in_batch = 0: '
            'use frequency = "counts"'
        )
    if "two_tower" not in settings.models.channels:
        problems.append("models.channels must name two_tower")
    if problems:
        raise ConfigError("; ".join(problems))


def _of_channels(settings: Settings) -> Iterator[str]:
    """What channels and rankers need of the features."""
    features, models = settings.features, settings.models
    history = isinstance(features.user.get("history"), Sequence)
    item_id = isinstance(features.item.get("item_id"), Categorical)
    if "mf" in models.channels and ("user_id" not in features.user or "item_id" not in features.item):
        yield (
            "the channel mf multiplies ids: add user_id to features.user and item_id to features.item, or leave mf out "
            "of models.channels"
        )
    if "mind" in models.channels and not history:
        yield (
            'the channel mind finds the interests of a click history: add history = { kind = "sequence" } to '
            "features.user, or leave mind out of models.channels"
        )
    sequences = any(isinstance(kind, Sequence) for kind in features.user.values())
    for ranker in models.rankers:
        options = settings.rank if ranker == "rank" else settings.pre_rank
        if options.history == "target" and not (item_id and sequences):
            yield (
                f'{ranker}.history = "target" lets the candidate attend to what the user clicked: add item_id to '
                'features.item and history = { kind = "sequence" } to features.user, or take history = "mean"'
            )
    if settings.train.logit_adjustment and not item_id:
        yield "train.logit_adjustment is known by item: add item_id to features.item, or set it to 0"
    popular, attributes = models.popular, models.same_category.attributes
    if "popular" in models.channels:
        segments = features.user | features.context
        if popular.segment is not None and not _has_values(segments.get(popular.segment), several=False):
            yield (
                f"models.popular.segment = {popular.segment!r} is no categorical or bucketed feature of users or "
                "context"
            )
        if popular.prior and popular.segment is None:
            yield f"models.popular.prior = {popular.prior} is for the lists of segments: set segment too"
    if "same_category" in models.channels:
        if not attributes:
            yield "models.same_category.attributes = []: the channel needs at least one"
        for name in attributes:
            if not _has_values(features.item.get(name), several=True):
                yield f"models.same_category.attributes: {name} is no categorical feature of items"


def _has_values(feature: Feature | None, several: bool) -> bool:
    """A feature has values that something can be counted by: one of each row, or `several`."""
    if isinstance(feature, Numeric):
        return feature.transform == "buckets"
    return isinstance(feature, Categorical) or (several and isinstance(feature, MultiCategorical))
