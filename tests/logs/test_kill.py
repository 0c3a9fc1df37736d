import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak" / "event_log.py"


def test_a_killed_writer_loses_and_doubles_nothing_that_it_acknowledged() -> None:
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", "20", "--seed", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 20
    assert result["acknowledged"] > 100
    assert result["torn"] > 0
