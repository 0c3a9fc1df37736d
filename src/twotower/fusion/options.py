"""Options of fusion."""

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.channels.options import Channel
from twotower.schema.options import STRICT, Length, NotNegative, Positive, Share


@dataclass(frozen=True, config=STRICT)
class FusionOptions:
    """How the channels' candidates become one list by reciprocal rank fusion, and what `twotower fuse` chooses."""

    weights: dict[Channel, NotNegative] = field(default_factory=dict)
    """By channel; a channel without a weight has 1. 0 = its items only fill places that all others leave free. Absent =
    what `twotower fuse` chose, or else all have 1."""
    constants: dict[Channel, NotNegative] = field(default_factory=dict)
    """The constant in weight / (constant + rank), by channel; a channel without one has 60. A small constant makes the
    first candidates count most."""
    reserved: dict[Channel, Share] = field(default_factory=dict)
    """By channel, its smallest share of the list, such as `{ new_items = 0.05 }`, so that new items are shown before
    anything is known of them; set by hand, whatever the weights are."""
    depth: Length = 1000
    """Candidates requested from each channel where several are fused, at least the length of the list."""
    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500])
    """Lengths of the list whose mean recall `twotower fuse` maximises."""
    users: Positive = 5000
    """At most this many validation users are read, evenly from all parts."""
    parts: Positive = 1
    """Validation parts: each is held out of what the previous one left to learn from, such as a day, then the day
    before it. Several parts show what holds on more than one day."""
