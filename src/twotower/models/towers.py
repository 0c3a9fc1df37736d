"""The dense part of a tower: what features become in, a unit vector out."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from twotower.features.fitted import Bucket, Categories, Category, Fitted, Items, Number


def input_width(feature: Fitted) -> int:
    """How many numbers a feature contributes to its tower's input."""
    if isinstance(feature, Category | Categories | Bucket | Items):
        return feature.dimension
    return 2 if isinstance(feature, Number) else feature.size + 1


class Tower(nn.Module):
    """Features side by side, fully connected layers with ReLU, a projection, the L2 norm.

    Args:
        features: the tower's features, in the order in which their inputs stand side by side.
        layers: widths of the hidden layers.
        dimension: D, length of the vector.
        dropout: share of hidden units left out in training.
    """

    def __init__(self, features: Sequence[Fitted], layers: Sequence[int], dimension: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.names = [feature.name for feature in features]
        widths = [sum(input_width(feature) for feature in features), *layers]
        hidden: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            hidden += [nn.Linear(narrow, wide), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*hidden)
        self.projection = nn.Linear(widths[-1], dimension)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs by feature name, each (B, width), to unit vectors (B, D)."""
        side_by_side = torch.cat([inputs[name] for name in self.names], dim=1)
        vector = self.projection(self.hidden(side_by_side))
        unit: Tensor = vector * torch.rsqrt(vector.square().sum(dim=1, keepdim=True) + 1e-12)
        return unit
