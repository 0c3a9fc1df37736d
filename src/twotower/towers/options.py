"""Options of towers and of rankers."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Length, NotNegative, Positive, Rate, Width, at_most


@dataclass(frozen=True, config=STRICT)
class TowerOptions:
    """One tower: its features, a network, a projection, the L2 norm."""

    network: Literal["dnn", "dcn", "none"] = "dnn"
    """`dnn`: fully connected layers; `dcn`: crosses of features beside them; `none`: the features, each of width
    `models.dimension`, are added, without layers or projection."""
    layers: list[Width] = field(default_factory=lambda: [256, 128])
    """`dnn`, `dcn`: widths of the fully connected layers; empty = none."""
    crosses: Annotated[int, Field(gt=0), at_most(100)] = 2
    """`dcn`: how many cross layers; each adds products of one more feature."""


@dataclass(frozen=True, config=STRICT)
class PreRankOptions:
    """The pre-ranker: an early-fusion network that scores all candidates, trained on what was shown, clicked or not."""

    history: Literal["mean", "target"] = "mean"
    """How it reads sequences of items: their mean; or each weighted by how it meets the candidate (DIN)."""
    attention: Width = 16
    """`target`: hidden units of that weight."""
    network: Literal["dnn", "dcn"] = "dnn"
    """`dnn`: fully connected layers; `dcn`: crosses of features beside them."""
    layers: list[Width] = field(default_factory=lambda: [64])
    """Widths of the fully connected layers; empty = none."""
    crosses: Annotated[int, Field(gt=0), at_most(100)] = 2
    """`dcn`: how many cross layers."""
    positions: Length = 50
    """Positions of a page that have a bias of their own; later ones share that of the last."""
    batch_size: Positive = 512
    """Impressions in a step."""
    epochs: Positive = 1
    """Passes over the impressions."""
    learning_rate: Rate = 0.001
    """Of the network (Adam)."""
    table_learning_rate: Rate = 0.02
    """Of the embedding tables (row-wise Adagrad)."""
    position_learning_rate: Rate = 0.05
    """Of the biases of positions (Adam)."""
    weight_decay: NotNegative = 0.0
    """Of the network, decoupled."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of hidden units left out in training."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids replaced by the unknown id in training, and of contexts made missing."""
    calibration_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The latest impressions are not trained on: log-odds are scaled to fit them."""


@dataclass(frozen=True, config=STRICT)
class RankOptions(PreRankOptions):
    """The ranker: the same network, larger, for what the pre-ranker keeps."""

    history: Literal["mean", "target"] = "target"
    """How it reads sequences of items: their mean; or each weighted by how it meets the candidate (DIN)."""
    layers: list[Width] = field(default_factory=lambda: [128, 64])
    """Widths of the fully connected layers; empty = none."""
