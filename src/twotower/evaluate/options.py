"""Options of an evaluation."""

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Length


@dataclass(frozen=True, config=STRICT)
class EvaluateOptions:
    """How models and channels are judged."""

    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [10, 20, 50, 200])
    """Cut-offs of the metrics."""
    bootstrap: Length = 1000
    """Number of resamples of users from which an interval is computed."""
    context: bool = True
    """Requests carry the context of each user's first held-out request, where the hold-out has impressions and the
    model has features of contexts; false = they carry none."""
    channels_k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500, 2000])
    """Cut-offs of `evaluate --channels`; those above the size of the catalogue are cut to it."""
