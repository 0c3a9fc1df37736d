import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from twotower.cli import main
from twotower_lab.experiments import EXPERIMENTS


def test_the_lab_lists_its_experiments(run) -> None:
    told = run("lab", "list")["experiments"]
    assert [one["name"] for one in told] == list(EXPERIMENTS)
    assert all(one["claims"] and one["arms"] and one["question"] for one in told)


def test_an_experiment_by_one_command(run, tmp_path: Path) -> None:
    told = run("lab", "run", "networks", "--smoke", "--out", tmp_path, "--jobs", "1")
    assert told["report"] == str(tmp_path / "report.html")
    assert list(told["experiments"]) == ["networks"]
    result = json.loads((tmp_path / "networks" / "result.json").read_text())
    assert result["made"]["command"] == "twotower lab run networks --smoke --jobs 1 --out DIR"
    assert [claim["verdict"] for claim in result["claims"]] == list(told["experiments"]["networks"].values())


def test_wrong_usage_is_told(run, tmp_path: Path) -> None:
    run("lab", "run", "nothing", "--out", tmp_path, code=2)
    assert "there is no experiment 'nothing'" in run.err
    run("lab", "run", "networks", "--data", tmp_path / "absent", "--out", tmp_path, code=2)
    assert "is no folder" in run.err


def test_a_run_that_is_interrupted_ends_at_once_and_keeps_what_it_has(run, tmp_path: Path) -> None:
    words = ["-m", "twotower", "lab", "run", "losses", "--smoke", "--jobs", "2", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (kept := list(tmp_path.rglob("listwise.json"))):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
    if process.returncode == 0:
        return  # it was done before it heard of it
    assert process.returncode == 1
    assert b"stopped" in told
    before = kept[0].stat().st_mtime_ns
    run("lab", "run", "losses", "--smoke", "--jobs", "1", "--out", tmp_path)
    assert kept[0].stat().st_mtime_ns == before


def test_without_its_libraries_the_lab_says_what_to_install(run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(main, "find_spec", lambda name: None if name == "scipy" else find_spec(name))
    run("lab", "run", "networks", "--smoke", "--out", tmp_path, code=2)
    assert "the lab needs scipy: pip install 'twotower[lab]'" in run.err


def test_the_report_of_a_folder_is_written_without_a_run(run, tmp_path: Path) -> None:
    committed = Path(__file__).parents[2] / "benchmarks" / "results" / "lab"
    for name in ("index", "shown"):
        shutil.copytree(committed / name, tmp_path / name)
    told = run("lab", "report", "--out", tmp_path)
    assert told == {"report": str(tmp_path / "report.html"), "experiments": ["shown", "index"]}
