"""The notebooks and programs of the examples run from top to bottom."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_runs_and_is_kept_without_output(path, tmp_path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]
    script = tmp_path / "cells.py"  # a process of its own, as a kernel is
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    done = subprocess.run([sys.executable, script], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_loss_and_a_channel_of_a_users_own_are_trained_judged_and_fused(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "own_parts.py"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "latest_clicks  recall@50 0." in done.stderr
    assert "fused " in done.stderr
    assert "latest_clicks" in done.stdout or "two_tower" in done.stdout
