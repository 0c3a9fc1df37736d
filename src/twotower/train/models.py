"""The two towers of each trained channel, out of the configuration."""

from twotower.channels.options import ModelsOptions
from twotower.features.feature_set import FeatureSet
from twotower.towers.options import TowerOptions
from twotower.towers.towers import check_widths
from twotower.towers.two_tower import TwoTower

TWO_TOWER, MIND, MF = "two_tower", "mind", "mf"
_NO_NETWORK = TowerOptions("none", layers=[])


def channel_features(features: FeatureSet, models: ModelsOptions, channel: str) -> FeatureSet:
    """What the towers of a channel read: ids only for `mf`; for `mind` the history as several interests."""
    if channel == MF:
        return features.of_ids()
    return features.with_interests(models.mind.interests, models.mind.rounds) if channel == MIND else features


def check_towers(features: FeatureSet, models: ModelsOptions, channel: str) -> None:
    """Refuse features out of which no towers of a channel can be made.

    Raises:
        ConfigError: a tower without a network cannot add its features.
    """
    read = channel_features(features, models, channel)
    if channel != MF:
        check_widths((*read.user, *read.context), models.user_tower, models.dimension)
        check_widths(read.item, models.item_tower, models.dimension)


def new_towers(
    features: FeatureSet,
    models: ModelsOptions,
    channel: str,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    adjusted: bool = False,
) -> TwoTower:
    """Untrained towers of a channel; see `TwoTower`."""
    read = channel_features(features, models, channel)
    towers = (_NO_NETWORK, _NO_NETWORK) if channel == MF else (models.user_tower, models.item_tower)
    return TwoTower(read, models.dimension, *towers, seed=seed, dropout=dropout, adjusted=adjusted)
