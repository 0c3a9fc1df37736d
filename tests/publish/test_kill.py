import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "publish.py"


def test_a_killed_publisher_never_leaves_half_a_version() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "12", "--seed", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 12
    assert result["killed_half_way"] > 0
