import importlib.util
from pathlib import Path

from twotower.config import Settings

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "promote.py"


def test_promoting_under_load_fails_no_request_and_mixes_no_versions(own_world: Settings) -> None:
    spec = importlib.util.spec_from_file_location("promote", SOAK)
    promote = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(promote)
    result = promote.soak(own_world, seconds=5, promotions=3, rate=50)
    assert result["failures"] == 0, result["examples"]
    assert result["requests"] > 200
    assert result["versions_seen"] == 4
    assert result["server_exit_code"] == 0
