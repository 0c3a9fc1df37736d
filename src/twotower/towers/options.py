"""Options of a tower."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Width, at_most


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
