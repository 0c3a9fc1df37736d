"""From users, items and events to what training reads: positives, histories, counts, encoded features."""

from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples

__all__ = ["Samples", "build_samples", "open_samples"]
