import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from twotower.cli.main import app
from twotower.config import Settings
from twotower.pipeline.places import places
from twotower.publish.publish import current

STAGES = ("samples", "train", "evaluate", "publish", "run")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "No such command"),
        (["train", "--nothing"], "No such option"),
        (["versions", "promote"], "Missing argument"),
        (["retrieve", "--k", "many", "--out", "x"], "unable to parse string as an integer"),
        (["retrieve"], "Missing option"),
        (["train", "-c", "absent.toml"], "no configuration file absent.toml"),
        (["train", "-c", "movielenz"], "the examples are demo, globo, ids_only"),
        (["train", "--set", "train"], "write section.key=value"),
        (["train", "--set", "train.epoch=3"], "did you mean epochs?"),
        (["train", "--set", "train.epochs=many"], "train.epochs = 'many'"),
        (["publish", "--set", "index.kind=qdrant"], "input should be 'exact', 'faiss', 'milvus' or 'pgvector'"),
        (["doctor", "--set", "index.kind=milvus"], 'kind = "milvus" with no address: set url, such as "http://'),
        (["serve", "--set", "serve.port=70000"], "serve.port"),
        (["versions", "list", "--set", "nothing.at=1"], "nothing"),
        (["import", "netflix", ".", "--out", "x"], "netflix"),
        (["simulate", "--out", "x", "--users", "0"], "users=0"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_sentence(
    run, arguments: list[str], said: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, code=2) is None
    assert said in " ".join(run.err.replace("│", " ").split())
    assert "Traceback" not in run.err


def test_the_version_is_that_of_the_package(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"twotower {version('twotower')}\n"


@pytest.mark.parametrize(
    "command",
    [
        *STAGES,
        "serve",
        "versions list",
        "versions verify",
        "versions promote x",
        "versions rollback",
        "retrieve --out o.parquet",
    ],
)
def test_a_missing_workspace_exits_with_1_says_so_and_makes_nothing(
    run, command: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*command.split(), "--set", "workspace.path=absent", code=1) is None
    assert run.err.strip().splitlines()[-1].startswith("error: absent")
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_without_a_version_says_what_to_run(run, tmp_path: Path) -> None:
    place = ["--set", f"workspace.path={tmp_path}"]
    assert run("versions", "list", *place) == {"current": None, "versions": []}
    for arguments in (["serve"], ["versions", "verify"], ["retrieve", "--out", tmp_path / "o.parquet"]):
        assert run(*arguments, *place, code=1) is None
        assert "publish" in run.err
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_what_is_away_and_exits_with_1(run, tmp_path: Path) -> None:
    place = ["--set", f"workspace.path={tmp_path / 'absent'}", "--set", "serve.port=0"]
    away = ["--set", "index={kind='pgvector', url='postgresql://127.0.0.1:9/x'}"]
    healthy = run("doctor", *place)
    assert (healthy["ok"], healthy["problems"]) == (True, [])
    report = run("doctor", *place, *away, code=1)
    [problem] = [told for told in report["problems"] if not told.startswith("extra ")]
    assert problem.startswith("vector database: PostgreSQL at postgresql://127.0.0.1:9/x: ")
    assert f"error: {problem}" in run.err
    assert {check["name"]: check["state"] for check in report["checks"]}["vector database"] == "failed"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_version_is_reported_and_exits_with_1(run, own_world: Settings, tmp_path: Path) -> None:
    place = ["--set", f"workspace.path={own_world.workspace.path}"]
    versions = places(own_world).versions
    served = current(versions)
    assert run("versions", "verify", served, *place)["ok"]
    (versions / served / "clicks.arrow").write_bytes(b"")
    answer = run("versions", "verify", *place, code=1)
    assert (answer["version"], answer["ok"], len(answer["problems"])) == (served, False, 1)
    for arguments in (["promote", served], ["promote", "no-such"], ["rollback"], ["verify", "no-such"]):
        assert run("versions", *arguments, *place, code=1) is None
        assert run.err.strip().splitlines()[-1].startswith("error: ")
    assert run("serve", *place, code=1) is None
    assert "is damaged: clicks.arrow has 0 bytes" in run.err
    assert not places(own_world).log.exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--k", 0], 2),
        (["--exclude", "seen"], 2),
        (["--channel", "mind"], 2),
        (["--users", "absent.csv"], 1),
        (["--users", "absent"], 2),
        (["--version", "x"], 1),
    ],
)
def test_retrieve_refuses_what_cannot_be_meant(
    run, world: Settings, tmp_path: Path, arguments: list, code: int
) -> None:
    place = ["--set", f"workspace.path={world.workspace.path}"]
    assert run("retrieve", *place, "--out", tmp_path / "o.parquet", *arguments, code=code) is None
    assert str(arguments[1]) in run.err
    assert not (tmp_path / "o.parquet").exists()


def test_vectors_and_towers_are_exported(run, world: Settings, tmp_path: Path) -> None:
    place = ["--set", f"workspace.path={world.workspace.path}"]
    (tmp_path / "some.csv").write_text("user_id,hour\n3,20\n999999,3\n")
    written = run("export", "users", *place, "--users", tmp_path / "some.csv", "--out", tmp_path / "users.parquet")
    served = {"version": current(places(world).versions), "delta_seq": 0, "channel": "two_tower"}
    assert written == {"out": str(tmp_path / "users.parquet"), "count": 2, "dimension": 16, **served}
    items = run("export", "items", *place, "--out", tmp_path / "items.npy")
    assert {path.name for path in tmp_path.iterdir()} >= {"items.npy", "items.ids.npy", "users.parquet"}
    assert (items["count"], items["dimension"]) == (len(np.load(tmp_path / "items.npy")), 16)
    towers = run("export", "towers", *place, "--out", tmp_path / "towers")
    assert (towers["version"], (tmp_path / "towers" / "tower.py").exists()) == (served["version"], True)
    for arguments in (["items", "--out", "x.txt"], ["items", "--channel", "popular"], ["towers", "--out", tmp_path]):
        out = [] if "--out" in arguments else ["--out", tmp_path / "o.npy"]
        assert run("export", *arguments, *out, *place, code=2) is None
    assert not (tmp_path / "o.npy").exists()


def test_sigterm_ends_a_command_with_1_and_nothing_half_written(own_world: Settings, as_trained: list[str]) -> None:
    workspace = Path(own_world.workspace.path)
    config = Path(__file__).parents[2] / "examples" / "demo.toml"
    place = f"workspace.path={json.dumps(str(workspace))}"
    options = ["-c", str(config), *as_trained, "--set", place, "--set", "train.epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if "epoch 1/" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert not list(workspace.rglob(".tmp-*"))
