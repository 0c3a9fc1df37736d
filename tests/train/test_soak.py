import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "train.py"


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "12", "--seed", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 12
    assert result["resumable"] > 0
