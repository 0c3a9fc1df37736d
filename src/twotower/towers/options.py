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
    """The pre-ranker: an early-fusion network that scores all candidates. It is trained on impressions."""

    history: Literal["mean", "target"] = "mean"
    """How a sequence of items is read: `mean`, or `target`: a sum weighted by attention to the candidate (DIN)."""
    attention: Width = 16
    """`target`: hidden units of the attention."""
    network: Literal["dnn", "dcn"] = "dnn"
    """`dnn`: fully connected layers; `dcn`: crosses of features beside them."""
    layers: list[Width] = field(default_factory=lambda: [64])
    """Widths of the fully connected layers; empty = none."""
    crosses: Annotated[int, Field(gt=0), at_most(100)] = 2
    """`dcn`: how many cross layers."""
    positions: Length = 50
    """Positions of a page with a bias of their own; later ones share the bias of the last."""
    batch_size: Positive = 512
    """Impressions in a step."""
    epochs: Positive = 1
    """Passes over the impressions."""
    learning_rate: Rate = 0.001
    """Learning rate of the network (Adam)."""
    table_learning_rate: Rate = 0.02
    """Learning rate of the embedding tables (row-wise Adagrad)."""
    position_learning_rate: Rate = 0.05
    """Learning rate of the biases of positions (Adam)."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of the network."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of hidden units left out in training."""
    id_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of ids that training replaces by the unknown id, and of contexts that it makes missing."""
    calibration_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the impressions, the latest, that calibrate the log-odds and are not trained on."""


@dataclass(frozen=True, config=STRICT)
class RankOptions(PreRankOptions):
    """The ranker: the same network, larger, for what the pre-ranker keeps."""

    history: Literal["mean", "target"] = "target"
    """How a sequence of items is read: `mean`, or `target`: a sum weighted by attention to the candidate (DIN)."""
    layers: list[Width] = field(default_factory=lambda: [128, 64])
    """Widths of the fully connected layers; empty = none."""
