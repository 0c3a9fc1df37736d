"""One TOML file configures everything; unknown keys are errors."""

from twotower.config.load import load, parse
from twotower.config.settings import Settings

__all__ = ["Settings", "load", "parse"]
