from pathlib import Path

import pytest

from twotower.cli.lab import SYSTEM
from twotower_lab.run import run


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of one experiment; only read."""
    out = tmp_path_factory.mktemp("lab")
    run(SYSTEM, "networks", out, smoke=True, command="twotower lab run networks --smoke")
    return out
