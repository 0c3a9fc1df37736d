"""Options of an evaluation."""

from dataclasses import field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Length


@dataclass(frozen=True, config=STRICT)
class EvaluateOptions:
    """How a model is judged."""

    k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [10, 20, 50, 200])
    """Cut-offs of the metrics."""
    bootstrap: Length = 1000
    """Resamples of users behind an interval."""
    context: bool = True
    """Ask each held-out user in the context of their first held-out request, where the hold-out has impressions and the
    model features of contexts; false = without a context."""
    channels_k: Annotated[list[Length], Field(min_length=1)] = field(default_factory=lambda: [200, 500, 2000])
    """Cut-offs of `evaluate --channels`; those above the size of the catalogue are cut to it."""
