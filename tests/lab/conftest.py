from pathlib import Path

import pytest

from twotower_lab.run import run


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of one experiment; only read."""
    out = tmp_path_factory.mktemp("lab")
    run(["networks"], out, smoke=True)
    return out
