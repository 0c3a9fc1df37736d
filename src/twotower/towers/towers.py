"""The dense part of a tower: what features become in, a unit vector out, or one for each interest.

B batch, D vector, K interests, W width of all inputs side by side.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from twotower.features.fitted import INTERESTS, Bucket, Categories, Category, Fitted, Items, Number
from twotower.schema.errors import ConfigError
from twotower.towers.encoders import AttentionPooling, CausalTransformer, Interests, unit
from twotower.towers.options import PreRankOptions, TowerOptions

LENGTH = ".length"
"""Behind the name of an encoded sequence: how many items each row has."""
ROW = ".row"
"""Behind the name of an encoded sequence: which sequence each row is the beginning of; absent = its own."""
POPULARITY = ".popularity"
"""The input of an item tower for how much each item is preferred to others, (B, 2); no feature is called so."""


def input_width(feature: Fitted) -> int:
    """How many numbers a feature contributes to its tower's input."""
    if isinstance(feature, Category | Categories | Bucket | Items):
        return feature.dimension
    return 2 if isinstance(feature, Number) else feature.size + 1


def is_encoded(feature: Fitted) -> bool:
    """The feature is a sequence whose items enter the tower one by one, not as their mean."""
    return isinstance(feature, Items) and feature.encoder != "mean"


def part_of(name: str) -> str:
    """The name under which a module keeps what belongs to a feature: torch takes no points, and none of its own names.

    >>> part_of("history"), part_of("items")
    ('history', '_6974656d73')
    """
    usable = name.isidentifier() and not name.startswith("_") and not hasattr(nn.ModuleDict(), name)
    return name if usable else f"_{name.encode().hex()}"


class Tower(nn.Module):
    """Features side by side, a network, a projection, the L2 norm.

    Without a network (`none`) the features, each times a learned number, and a learned vector are added, and nothing is
    projected: with an id alone this is matrix factorisation. The learned vector is what all users have in common, such
    as a preference for popular items; otherwise each user's embedding would have to learn it.

    The inputs of the features stand side by side in their order. `dropout` is the share of hidden units left out in
    training.

    Raises:
        ValueError: a sequence whose heads do not divide its width.
        ConfigError: features are to be added and one is not D wide.
    """

    def __init__(self, features: Sequence[Fitted], network: TowerOptions, dimension: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.names = [feature.name for feature in features]
        self.interests = next((f.heads for f in features if isinstance(f, Items) and f.encoder == INTERESTS), 0)
        self.gains: nn.Parameter | None = None
        self.shift: nn.Parameter | None = None
        self.encoders = nn.ModuleDict(
            {
                part_of(feature.name): _encoder(feature, dropout)
                for feature in features
                if isinstance(feature, Items) and is_encoded(feature)
            }
        )
        check_widths(features, network, dimension)
        if network.network == "none":
            self.gains = nn.Parameter(torch.ones(len(features)))
            self.shift = nn.Parameter(torch.zeros(dimension))
            return
        width = sum(input_width(feature) for feature in features)
        self.hidden = hidden_layers(width, network, dropout)
        self.crosses = cross_layers(width, network)
        self.projection = nn.Linear(width_behind(width, network), dimension)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs by feature name to unit vectors (B, D), or (B, K, D) where a sequence is encoded as interests.

        Each input is (B, width), but an encoded sequence has (S, L, width) rows of its items, (B,) lengths and, where
        several rows share a sequence, (B,) the row of it.
        """
        return unit(self._vector([self._encoded(name, inputs) for name in self.names]))

    def _vector(self, features: Sequence[Tensor]) -> Tensor:
        if self.interests:
            features = [f if f.dim() == 3 else f[:, None].expand(-1, self.interests, -1) for f in features]
        if self.gains is not None and self.shift is not None:
            scaled = [gain * feature for gain, feature in zip(self.gains, features, strict=True)]
            return torch.stack(scaled).sum(dim=0) + self.shift
        projected: Tensor = self.projection(through(torch.cat(list(features), dim=-1), self.hidden, self.crosses))
        return projected

    def _encoded(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if (part := part_of(name)) not in self.encoders:
            return inputs[name]
        vector: Tensor = self.encoders[part](inputs[name], inputs[name + LENGTH], inputs.get(name + ROW))
        return vector


class WithPopularity(nn.Module):
    """A tower as it is served where popular items are preferred: its vectors have two more numbers.

    An item's are its preference b and what makes all of one length, (v, b, sqrt(B^2 - b^2)) / sqrt(1 + B^2) with B the
    greatest |b|; a user's are the same for all, (u, 1, 0) / sqrt(2). So the cosine orders items by u v + b: the
    reduction of inner products to cosines of Bachrach et al. 2014, for a product with a bias. A vector of zeros, of an
    unknown user or item, stays zero.
    """

    def __init__(self, tower: Tower, of_items: bool) -> None:
        super().__init__()
        self.tower = tower
        self.of_items = of_items
        self.train(tower.training)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Unit vectors (B, D + 2), or (B, K, D + 2) of interests."""
        vectors = self.tower(inputs)
        known = (vectors * vectors).sum(dim=-1, keepdim=True)
        more = inputs[POPULARITY] if self.of_items else torch.tensor([0.5, 0.0]).sqrt()
        left = (1 - (more * more).sum(dim=-1, keepdim=True)).sqrt()
        return torch.cat([vectors * left, known * more], dim=-1)


def check_widths(features: Sequence[Fitted], network: TowerOptions, dimension: int) -> None:
    """Refuse features that a tower without a network cannot add.

    Raises:
        ConfigError: one is not D wide.
    """
    for feature in features if network.network == "none" else ():
        if input_width(feature) != dimension:
            raise ConfigError(
                f"feature {feature.name} is {input_width(feature)} wide and the vectors {dimension}: without a network "
                'the features are added, so give it that width or the tower network = "dnn"'
            )


def _encoder(feature: Items, dropout: float) -> nn.Module:
    if feature.encoder == "attention":
        return AttentionPooling(feature.dimension, feature.last, feature.heads)
    if feature.encoder == INTERESTS:
        return Interests(feature.dimension, feature.last, feature.heads, feature.blocks)
    return CausalTransformer(feature.dimension, feature.last, feature.heads, feature.blocks, dropout)


def hidden_layers(width: int, network: TowerOptions | PreRankOptions, dropout: float) -> nn.Sequential:
    """The fully connected layers of a network whose input has this width."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise([width, *network.layers]):
        layers += [nn.Linear(narrow, wide), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def cross_layers(width: int, network: TowerOptions | PreRankOptions) -> nn.ModuleList:
    """The cross layers of a network; only `dcn` has some."""
    return nn.ModuleList(nn.Linear(width, width) for _ in range(network.crosses if network.network == "dcn" else 0))


def width_behind(width: int, network: TowerOptions | PreRankOptions) -> int:
    """How many numbers `through` gives for an input of this width."""
    deep = network.layers[-1] if network.layers else 0
    return width + deep if network.network == "dcn" and network.crosses else deep or width


def through(features: Tensor, hidden: nn.Sequential, crosses: nn.ModuleList) -> Tensor:
    """Features (..., width) through both kinds of layers, their outputs side by side."""
    deep: Tensor = hidden(features)
    if not crosses:
        return deep
    crossed = _cross(features, crosses)
    return torch.cat([crossed, deep], dim=-1) if len(hidden) else crossed


def _cross(first: Tensor, layers: nn.ModuleList) -> Tensor:
    """X = x0 * (W x + b) + x for each layer: DCN-v2, Wang et al. 2021, eq. 1. Each adds products of one degree more."""
    crossed = first
    for layer in layers:
        crossed = first * layer(crossed) + crossed
    return crossed
