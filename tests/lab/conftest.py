from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.cli.lab import SYSTEM
from twotower_lab.run import run


@pytest.fixture(scope="session")
def networks(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of a smoke run of one experiment; only read."""
    command = "twotower lab run networks --smoke"
    return made_once("lab", lambda out: run(SYSTEM, "networks", out, smoke=True, command=command))
