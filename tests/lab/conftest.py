from collections.abc import Callable
from pathlib import Path

import pytest

from twotower_lab.run import run


@pytest.fixture(scope="session")
def networks(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of a smoke run of one experiment; only read."""
    return made_once("lab", lambda out: run(["networks"], out, smoke=True))
