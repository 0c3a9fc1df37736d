import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "join.py"


def test_a_killed_joiner_leaves_what_an_undisturbed_one_does() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "20", "--seed", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20
    assert result["clicks"] > 100
    assert result["merged_shards"] > 0
