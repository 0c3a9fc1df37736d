import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.config.load import as_dict, parse
from twotower.pipeline import ready
from twotower.pipeline.line import (
    LATEST,
    as_trained,
    check_samples,
    evaluate_model,
    publish_version,
    run_line,
    train_model,
)
from twotower.pipeline.places import places
from twotower.pipeline.ready import check_ready
from twotower.pipeline.recorded import as_made, check_same, fixed_by_training
from twotower.publish.version import read_manifest
from twotower.samples.read import open_samples
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import read_json, write_json


def test_a_version_is_not_published_with_settings_that_it_was_not_trained_with(own_world: Settings) -> None:
    for change, message in (
        ("models.dimension=32", "models.dimension is 16 there and 32 in the configuration"),
        ("train.temperature=0.5", r"train.temperature is 0.07 there and 0.5 in the configuration"),
        ('train.loss="bsl"', "train.loss is 'sampled_softmax' there and 'bsl' in the configuration"),
        ("features.item.category.dimension=3", "features.item.category.dimension is absent there and 3 in"),
        ("samples.days=2", "samples.days is absent there and 2 in the configuration"),
    ):
        changed = parse(as_dict(own_world), [change])
        for command in (lambda c: publish_version(c, promoted=False), evaluate_model):
            with pytest.raises(ConfigError, match=message):
                command(changed)
    assert len(list(places(own_world).versions.glob("2*"))) == 1


def test_what_training_does_not_fix_may_be_other_when_a_version_is_made(own_world: Settings) -> None:
    changes = ["models.popular.window_days=1", "serve.port=9", "train.threads=1", 'models.channels=["two_tower"]']
    assert as_trained(parse(as_dict(own_world), changes)).serve.port == 9


def test_what_trials_chose_is_what_a_version_says(own_world: Settings) -> None:
    path = places(own_world).checkpoints / LATEST
    noted = read_json(path)
    noted["configuration"]["train"]["temperature"] = 0.25
    write_json(path, noted)
    version = publish_version(own_world, promoted=False)
    assert read_manifest(Path(version["path"]))["configuration"]["train"]["temperature"] == 0.25


def test_samples_of_other_settings_are_not_trained_on(own_world: Settings) -> None:
    samples = open_samples(places(own_world).samples)
    check_samples(parse(as_dict(own_world), ["samples.negatives.alpha=0.5", "train.epochs=9"]), samples)
    for change in ("samples.hot.form=sqrt", "models.dimension=8", "features.item.category.dimension=3"):
        with pytest.raises(ConfigError, match=r"holds samples of other settings: .* run `twotower samples`"):
            train_model(parse(as_dict(own_world), [change]))


@pytest.fixture
def untouched(own_world: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A workspace in which nothing may be computed."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was computed first")

    for name in ("build_samples", "train", "train_ranker", "fit_channels"):
        monkeypatch.setattr(f"twotower.pipeline.line.{name}", refuse)
    return own_world


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(-5, "nothing")], "none of them of a user and an item of the workspace"),
        ([], "has 0 rows, none of them of a user and an item"),
    ],
)
def test_a_hold_out_that_judges_nothing_is_found_before_training(
    pairs: list[tuple[int, str]], message: str, untouched: Settings
) -> None:
    columns = {"user_id": pa.array([u for u, _ in pairs], pa.int64()), "item_id": pa.array([i for _, i in pairs], pa.string())}  # fmt: skip # noqa: E501
    pq.write_table(pa.table(columns), places(untouched).workspace / "holdout.parquet")
    with pytest.raises(DataError, match=message):
        run_line(untouched, promoted=False)


@pytest.mark.parametrize(
    ("change", "module", "message"),
    [
        ('models.channels=["two_tower", "als"]', "implicit", "als needs implicit: pip install 'twotower[als]'"),
        ('models.channels=["two_tower", "swing"]', "numba", "swing needs numba: pip install 'twotower[swing]'"),
        ('engine.name="spark"', "pyspark", "spark needs pyspark: pip install 'twotower[spark]'"),
    ],
)
def test_a_missing_extra_is_found_before_training(
    change: str, module: str, message: str, untouched: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = ready.find_spec
    monkeypatch.setattr(ready, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(ConfigError) as error:
        run_line(parse(as_dict(untouched), [change]), promoted=False)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("features.user.agee={kind='numeric'}", r"features.user.agee: no such column; there are user_id"),
        ("features.item.zzz={kind='numeric'}", r"features.item.zzz: no such column; there are item_id"),
        ('index.kind="milvus"', 'kind = "milvus" with no address: set url'),
        ("models.popular.segment=nothing", "models.popular.segment = 'nothing' is no categorical or bucketed feature"),
        ('models={channels=["two_tower", "same_category"]}', "the channel needs at least one"),
    ],
)
def test_what_cannot_be_is_found_before_training(change: str, message: str, untouched: Settings) -> None:
    with pytest.raises(ConfigError, match=message):
        run_line(parse(as_dict(untouched), [change]), promoted=False)


def test_a_place_that_cannot_be_written_is_found_before_training(untouched: Settings, tmp_path: Path) -> None:
    versions = places(untouched).versions
    versions.rename(tmp_path / "moved")
    versions.touch()
    with pytest.raises(DataError, match="versions is a file, where the folder of versions is made"):
        check_ready(untouched, trained=True)
    with pytest.raises(DataError, match="is no workspace, there is no such folder"):
        check_ready(replace(untouched, workspace=replace(untouched.workspace, path=str(tmp_path / "x"))))


def test_samples_and_checkpoints_say_what_they_were_made_with(world: Settings) -> None:
    noted = json.loads((places(world).checkpoints / LATEST).read_text())
    assert noted["configuration"]["models"]["dimension"] == 16
    assert open_samples(places(world).samples).manifest["configuration"]["models"] == {"dimension": 16}


def test_what_an_earlier_release_recorded_is_compared_by_the_keys_of_today():
    settings = parse(
        {"models": {"channels": ["two_tower", "mind"]}, "features": {"user": {"history": {"kind": "sequence"}}}}
    )
    wanted = fixed_by_training(settings)
    made = deepcopy(wanted)
    made["samples"]["negatives"]["hard"]["impressed"] = 0.0
    made["models"]["mind"]["sharpness"] = 20.0
    made["train"]["popularity"] = made["train"].pop("logit_adjustment")
    check_same(made, wanted, "checkpoints are", "train again")
    assert as_made(settings, made) == settings
    made["models"]["mind"]["sharpness"] = 5.0
    with pytest.raises(ConfigError, match=r"models.mind.sharpness is 5.0 there and absent in the configuration"):
        check_same(made, wanted, "checkpoints are", "train again")
