"""Options of fusion."""

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.channels.options import Channel
from twotower.schema.options import STRICT, Length, NotNegative, Positive, Share


@dataclass(frozen=True, config=STRICT)
class FusionOptions:
    """How the channels' candidates become one list, and what `twotower fuse` chooses; `serve.fusion` is the method."""

    weights: dict[Channel, NotNegative] = field(default_factory=dict)
    """By channel; one without weighs 1. 0 = its items only fill places that all others leave free. Absent = what
    `twotower fuse` chose, or else all weigh 1."""
    constants: dict[Channel, NotNegative] = field(default_factory=dict)
    """`rrf`: of weight / (constant + rank), by channel; one without has 60. Small = its first ones count most."""
    reserved: dict[Channel, Share] = field(default_factory=dict)
    """By channel, the least share of the places of the one list that it has, such as `{ new_items = 0.05 }`, so that
    new items are shown before anything is known of them; set by hand, whatever the weights are."""
    depth: Length = 1000
    """Candidates that each channel is asked for where several are fused, and at least as many as are wanted."""
    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500])
    """Lengths of the list at which `twotower fuse` raises recall, their mean."""
    users: Positive = 5000
    """Users of validation that it looks at, at most, evenly from all parts."""
    parts: Positive = 1
    """Validation parts that it looks at: each is held out of what the one after it left to learn from, such as a day
    and the days before it. More show what holds on other days than one."""
