"""The places of a configuration's workspace."""

from pathlib import Path

from twotower.config.settings import Settings
from twotower.datasets.places import Places


def places(settings: Settings) -> Places:
    """The places of a configuration's workspace."""
    return Places(Path(settings.workspace.path))
