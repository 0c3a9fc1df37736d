import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "promote.py"


def test_promoting_under_load_fails_no_request_and_mixes_no_versions() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--seconds", "5", "--promotions", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["failures"] == 0
    assert result["requests"] > 200
    assert result["versions_seen"] == 4
    assert result["server_exit_code"] == 0
