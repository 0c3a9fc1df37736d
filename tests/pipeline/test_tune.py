import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.features.bloom import is_held_out
from twotower.pipeline import tune as module
from twotower.pipeline.line import latest_checkpoint


def options(settings: Settings, *more: str) -> list[str]:
    text = Path(settings.workspace.path).parent / "config.toml"
    text.write_text(
        "[features.user]\nuser_id = { kind = 'categorical' }\nhistory = { kind = 'sequence' }\n"
        f"[workspace]\npath = {json.dumps(settings.workspace.path)}\n"
        "[models]\ndimension = 8\n"
        "[train]\nepochs = 6\nbatch_size = 256\n[samples]\nheld_out_users = 0.01\n"
        "[tune]\nmetric = 'recall@20'\npatience = 1\n"
        "[tune.space]\n'train.temperature' = { low = 0.05, high = 0.5, log = true }\n"
        "'models.user_tower.layers' = { choices = [[], [16]] }\n"
    )
    return ["-c", str(text), *more]


def test_trials_choose_on_validation_and_the_best_trains_on_everything(run, own_world: Settings) -> None:
    workspace = Path(own_world.workspace.path)
    (workspace / "holdout.parquet").rename(workspace / "kept.parquet")  # nobody may look at it
    answer = run("train", *options(own_world), "--trials", 3)
    rows = json.loads(Path(answer["table"]).read_text())
    assert len(rows) == answer["trials"] == 3
    assert [row["value"] for row in rows] == sorted((row["value"] for row in rows), reverse=True)
    assert rows[0]["value"] == answer["value"] == max(rows[0]["values"])
    assert rows[0]["values"][rows[0]["epochs"] - 1] == answer["value"]
    assert all(len(row["values"]) <= min(6, row["epochs"] + 2) for row in rows)
    assert answer["best"] == {**rows[0]["settings"], "train.epochs": rows[0]["epochs"]}
    assert [row["settings"] for row in rows if row["trial"] == 0] == [{}]  # the configuration as it is
    assert Path(answer["table"]).with_suffix(".md").read_text().count("\n") == 5
    settings = latest_checkpoint(own_world).manifest["settings"]["train"]
    assert settings["epochs"] == rows[0]["epochs"]
    events = pq.read_table(workspace / "events")
    out = is_held_out(events["user_id"].combine_chunks(), own_world.samples.held_out_users)
    clicked = [outcome == "clicked" for outcome in events["outcome"].to_pylist()]
    assert answer["rows"] == settings["epochs"] * (np.array(clicked) & ~out).sum()


def test_a_search_goes_on_where_it_was(run, own_world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run("train", *options(own_world), "--trials", 2)
    before = json.loads(Path(first["table"]).read_text())
    tried = []
    real = module._try
    monkeypatch.setattr(module, "_try", lambda settings: tried.append(settings) or real(settings))
    again = run("train", *options(own_world), "--trials", 3)
    assert (len(tried), again["trials"], again["table"]) == (1, 3, first["table"])
    after = json.loads(Path(again["table"]).read_text())
    assert [row for row in after if row["trial"] < 2] == before
    other = run("train", *options(own_world), "--trials", 1, "--set", "train.seed=1")
    assert other["table"] != first["table"]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"train.heat": "{low=1, high=2}"}, "train.heat is no key; the keys here are"),
        ({"serve.port": "{choices=[1]}"}, "serve.port is no key of features, samples, models or train"),
        ({"train.epochs": "{low=1, high=2}"}, "epochs are chosen by tune.patience"),
        ({"train.temperature": "{low=-1, high=2}"}, "train.temperature = -1"),
        ({"train.temperature": "{low=2, high=1}"}, "low = 2 is not below high = 1"),
        ({"train.temperature": "{low=0, high=1, log=true}"}, "log needs numbers above 0"),
        ({"train.temperature": "{choices=[]}"}, "give low and high, or choices"),
        ({"train.temperature": "{low=1}"}, "give low and high, or choices"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(
    run, own_world: Settings, space: dict[str, str], said: str, tmp_path: Path
) -> None:
    lines = [f"{json.dumps(key)} = {value}" for key, value in space.items()]
    (tmp_path / "c.toml").write_text("[tune.space]\n" + "\n".join(lines))
    place = ["--set", f"workspace.path={json.dumps(own_world.workspace.path)}"]
    assert run("train", "-c", tmp_path / "c.toml", *place, "--trials", 1, code=2) is None
    assert said in run.err
    assert not (Path(own_world.workspace.path) / "tuning").exists()


def test_without_optuna_it_says_what_to_install(run, own_world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("train", *options(own_world), "--trials", 1, code=2) is None
    assert "pip install 'twotower[tune]'" in run.err


def test_a_trial_that_fails_is_in_the_table_and_the_others_go_on(run, own_world: Settings, tmp_path: Path) -> None:
    more = ["--set", "train.table_learning_rate=0.05", "--set", 'models.item_tower.network="dnn"']
    config = options(own_world, *more)
    text = Path(config[1])
    text.write_text(text.read_text() + "'train.learning_rate' = { choices = [1e30, 1e31] }\n")
    answer = run("train", *config, "--trials", 2)
    rows = json.loads(Path(answer["table"]).read_text())
    assert [row["value"] is None for row in rows] == [False, True]
    assert "the loss is nan" in rows[1]["error"]
    assert "failed" in Path(answer["table"]).with_suffix(".md").read_text()
