import copy
import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twotower.config import Settings, load, parse
from twotower.config.load import REMOVED, RENAMED, as_dict
from twotower.features.options import Categorical, MultiCategorical, Numeric, Sequence, Vector
from twotower.schema.errors import ConfigError

EXAMPLE = """
[workspace]
path = "workspace"
[engine]
name = "duckdb"
memory_gb = 2
[features.user]
user_id = { kind = "categorical" }
gender = { kind = "categorical" }
history = { kind = "sequence", last = 50, encoder = "attention" }
[features.item]
item_id = { kind = "categorical" }
genres = { kind = "multi_categorical", separator = "|" }
year = { kind = "numeric", transform = "standard" }
title_vector = { kind = "vector", size = 384 }
[features.context]
hour = { kind = "categorical" }
[samples]
first_day = "2000-04-25"
last_day = "2000-12-01"
hot = { form = "none" }
impressed_weight = 0.0
[samples.negatives]
easy = { in_batch = 0.5, uniform = 0.25, clicks = 0.25 }
alpha = 0.75
hard = { pre_rank_rejected = 0.5, rank_rejected = 0.5 }
hard_share = 0.5
impressed_as_negatives_for_experiments = false
[models]
channels = ["two_tower", "item_cf", "swing", "popular"]
dimension = 64
user_tower = { network = "dnn", layers = [256, 128] }
item_tower = { network = "dcn", layers = [] }
[train]
loss = "sampled_softmax"
temperature = 0.07
batch_size = 4096
epochs = 10
seed = 0
[evaluate]
k = [10, 20, 50, 200]
[index]
kind = "faiss"
[serve]
port = 8000
admin_port = 8001
exclude = "impressed"
[stream]
log = { kind = "local" }
window_s = 600
[update]
tables = ["user_id", "item_id"]
"""


def example(tmp_path: Path) -> Settings:
    path = tmp_path / "example.toml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return load(path)


def test_an_example_with_every_section_loads(tmp_path: Path) -> None:
    settings = example(tmp_path)
    assert settings.features.user["history"] == Sequence("sequence", 50, "attention")
    assert settings.features.item == {
        "item_id": Categorical("categorical"),
        "genres": MultiCategorical("multi_categorical", "|"),
        "year": Numeric("numeric"),
        "title_vector": Vector("vector", 384),
    }
    assert settings.samples.first_day == "2000-04-25"
    assert settings.samples.negatives.easy.uniform == 0.25
    assert settings.engine.memory_gb == 2.0
    assert settings.models.item_tower.layers == []
    assert settings.stream.window_s == 600.0


def test_without_a_file_there_are_the_defaults() -> None:
    assert load(None) == parse({})
    assert replace(parse({}), models=Settings().models) == Settings()
    assert load(None, ["train.seed=7"]).train.seed == 7


@pytest.mark.parametrize(
    ("content", "networks"),
    [
        ({}, ("none", "none")),
        ({"features": {"user": {"user_id": {"kind": "categorical"}}}}, ("none", "none")),
        (
            {"features": {"item": {"item_id": {"kind": "categorical"}, "genre": {"kind": "categorical"}}}},
            ("dnn", "dnn"),
        ),
        ({"features": {"context": {"hour": {"kind": "categorical"}}}}, ("dnn", "dnn")),
        ({"models": {"user_tower": {"layers": [8]}}}, ("dnn", "none")),
    ],
)
def test_towers_of_ids_alone_have_no_network_unless_the_file_says_so(content: dict[str, Any], networks: Any) -> None:
    models = parse(content).models
    assert (models.user_tower.network, models.item_tower.network) == networks


def test_a_configuration_survives_being_written_down(tmp_path: Path) -> None:
    for settings in (Settings(), example(tmp_path)):
        assert parse(as_dict(settings)) == settings


def test_parsing_leaves_the_document_as_it_is() -> None:
    document = {"train": {"epochs": 3}}
    before = copy.deepcopy(document)
    assert parse(document, ["train.epochs=5", "serve.port=0"]).train.epochs == 5
    assert document == before


UNKNOWN_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"trian": {}}, "trian is no key; did you mean train?"),
    ({"train": {"epoch": 3}}, "train.epoch is no key; did you mean epochs?"),
    ({"train": {"zzz": 3}}, "train.zzz is no key; the keys here are loss, temperature, positive_temperature"),
    ({"samples": {"negatives": {"hrad": {}}}}, "samples.negatives.hrad is no key; did you mean hard?"),
    (
        {"samples": {"negatives": {"easy": {"unifrom": 0.5}}}},
        "samples.negatives.easy.unifrom is no key; did you mean uniform?",
    ),
    ({"models": {"user_tower": {"layer": [1]}}}, "models.user_tower.layer is no key; did you mean layers?"),
    ({"features": {"usr": {}}}, "features.usr is no key; did you mean user?"),
    (
        {"features": {"item": {"year": {"kind": "numeric", "transfrom": "log"}}}},
        "features.item.year.transfrom is no key; did you mean transform?",
    ),
    ({"stream": {"log": {"uri": "x"}}}, "stream.log.uri is no key; did you mean url?"),
]


@pytest.mark.parametrize(("document", "message"), UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_the_nearest_one(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(document)
    assert message in str(error.value)


def test_users_are_held_out_where_a_file_has_an_update_section_and_recorded_settings_keep_that() -> None:
    without, updated = parse({"train": {"epochs": 2}}), parse({"update": {}, "samples": {"seed": 3}})
    assert (without.samples.held_out_users, updated.samples.held_out_users) == (0.0, 0.01)
    assert parse({"update": {}, "samples": {"held_out_users": 0.2}}).samples.held_out_users == 0.2
    assert parse({"update": {}}, ["samples.held_out_users=0"]).samples.held_out_users == 0.0
    assert parse({}, ["update.seed=1"]).samples.held_out_users == 0.0
    for settings in (without, updated):
        assert parse(as_dict(settings)) == settings


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse({}, [f"{old}=1"], where="my.toml")
    assert f"my.toml: {old} is no key; it is called {new} now" in str(error.value)


@pytest.mark.parametrize(("key", "remedy"), REMOVED.items())
def test_a_removed_key_is_refused_with_what_to_do(key: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse({}, [f'{key}.kind="lmdb"'], where="my.toml")
    assert f"my.toml: {key} is no key; it is gone since an earlier release; {remedy}" in str(error.value)


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"train": 3}, "train = 3: a section with keys is expected"),
    ({"train": {"epochs": "3"}}, "train.epochs = '3': input should be a valid integer"),
    ({"train": {"epochs": True}}, "train.epochs = True: input should be a valid integer"),
    ({"train": {"epochs": 0}}, "train.epochs = 0: input should be greater than 0"),
    ({"train": {"temperature": float("nan")}}, "train.temperature = nan: input should be a finite number"),
    ({"train": {"loss": "softmax"}}, "train.loss = 'softmax': input should be 'pointwise', 'triplet_hinge'"),
    ({"workspace": {"path": 7}}, "workspace.path = 7: input should be a valid string"),
    ({"evaluate": {"k": 10}}, "evaluate.k = 10: input should be a valid"),
    ({"evaluate": {"k": []}}, "evaluate.k = []: list should have at least 1 item"),
    ({"evaluate": {"k": [10, "20"]}}, "evaluate.k.1 = '20': input should be a valid integer"),
    ({"models": {"channels": ["popularity"]}}, "models.channels.0 = 'popularity': input should be 'two_tower'"),
    ({"samples": {"first_day": "2000-13-01"}}, "samples.first_day: a day is written YYYY-MM-DD"),
    ({"samples": {"first_day": "20000101"}}, "samples.first_day: a day is written YYYY-MM-DD"),
    ({"samples": {"negatives": {"easy": {"uniform": 0.5}}}}, "samples.negatives.easy: the shares sum to 1.5"),
    ({"samples": {"negatives": {"hard": {"rank_rejected": 1.0}}}}, "samples.negatives.hard: the shares sum to 1.5"),
    ({"features": {"item": {"v": {"kind": "vector"}}}}, "features.item.v.size is missing"),
    ({"features": {"item": {"v": {}}}}, "features.item.v: kind is one of categorical, multi_categorical, numeric"),
    ({"features": {"item": {"v": {"kind": "text"}}}}, "features.item.v: kind is one of categorical"),
    ({"features": {"item": {"v": "numeric"}}}, "features.item.v = 'numeric': a section with keys is expected"),
    ({"features": {"item": {}}}, "features: features.item is empty"),
    ({"features": {"user": {}}}, "features: features.user is empty"),
    (
        {"features": {"user": {"x": {"kind": "numeric"}}, "context": {"x": {"kind": "numeric"}}}},
        "x is in features.user and in features.context",
    ),
    (
        {"features": {"context": {"outcome": {"kind": "categorical"}}}},
        "features.context.outcome is what the model is to find",
    ),
]


@pytest.mark.parametrize(("document", "message"), WRONG_VALUES)
def test_a_wrong_value_is_refused_with_its_key(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(document, where="my.toml")
    assert str(error.value).startswith("my.toml: ")
    assert message in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"train.epochs = -1.*; serve.prot is no key"):
        parse({"train": {"epochs": -1}, "serve": {"prot": 1}})


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.temperature = 0.5", ("train", "temperature"), 0.5),
        ("evaluate.k=[5, 10]", ("evaluate", "k"), [5, 10]),
        ("workspace.path=/data/my world", ("workspace", "path"), "/data/my world"),
        ("workspace.path='7'", ("workspace", "path"), "7"),
        ("workspace.path=a=b", ("workspace", "path"), "a=b"),
        ("samples.first_day=2000-04-25", ("samples", "first_day"), "2000-04-25"),
        ('samples.first_day="2000-04-25"', ("samples", "first_day"), "2000-04-25"),
        ("index.kind=exact", ("index", "kind"), "exact"),
        ("models.user_tower.layers=[]", ("models", "user_tower", "layers"), []),
    ],
)
def test_an_override_is_toml_or_else_a_plain_string(override: str, key: tuple[str, ...], value: object) -> None:
    found: Any = parse({}, [override])
    for name in key:
        found = getattr(found, name)
    assert found == value


def test_later_overrides_win_over_earlier_ones_and_the_file() -> None:
    assert parse({"train": {"seed": 1}}, ["train.seed=2", "train.seed=3"]).train.seed == 3


def test_an_override_may_add_a_feature() -> None:
    settings = parse({}, ["features.item.year={ kind = 'numeric' }", "features.item.item_id.kind=categorical"])
    assert settings.features.item["year"] == Numeric("numeric")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set train.epochs: write section.key=value"),
        ("=3", "--set =3: write section.key=value"),
        ("train..epochs=3", "write section.key=value"),
        ("train.epochs.x=3", "--set train.epochs.x=3: epochs is a value, not a section"),
        ("trian.epochs=3", "trian is no key; did you mean train?"),
        ("train=3", "train = 3: a section with keys is expected"),
    ],
)
def test_an_override_of_nothing_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse({"train": {"epochs": 1}}, [override])
    assert message in str(error.value)


def test_a_day_may_be_a_toml_date() -> None:
    settings = parse({"samples": {"first_day": datetime.date(2000, 4, 25), "last_day": "2000-04-26"}})
    assert (settings.samples.first_day, settings.samples.last_day) == ("2000-04-25", "2000-04-26")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no configuration file"),
        (b"[train\n", "is not TOML: "),
        (b"\xff\xfe", "is not TOML: "),
        (b"[train]\nepochs = 0\n", "train.epochs = 0: input should be greater than 0"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "my.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)
    assert "my.toml" in str(error.value)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_an_example_is_found_by_name_from_anywhere_unless_a_file_has_the_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load(Path(__file__).parents[2] / "examples" / "movielens.toml")
    assert load("movielens") == load("movielens.toml") == load(Path("movielens")) == example
    Path("movielens").mkdir()  # such as its workspace
    assert load("movielens") == example
    Path("movielens.toml").write_text("[train]\nepochs = 77\n")
    assert load("movielens.toml").train.epochs == 77


@pytest.mark.parametrize("name", ["movielenz", "elsewhere/movielens", "../movielens.toml"])
def test_a_configuration_that_does_not_exist_is_refused_with_the_names_of_the_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"no configuration file {name}, .* examples are demo, globo, ids_only, "):
        load(name)
