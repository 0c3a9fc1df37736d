import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import twotower as tt
from twotower.schema.errors import ConfigError

HEAVY = {"torch", "onnxruntime", "faiss", "ibis", "duckdb", "fastapi"}
ROOT = Path(__file__).parents[1]


def loaded(code: str) -> set[str]:
    """Modules that are loaded after some code ran in an interpreter of its own."""
    told = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    return set(json.loads(out.splitlines()[-1]))


def test_no_public_function_has_the_name_of_a_subpackage():
    assert not {module.name for module in pkgutil.iter_modules(tt.__path__)} & set(tt.__all__)


def test_every_public_name_is_there_and_documented():
    for name in tt.__all__:
        assert getattr(tt, name).__doc__, name
    assert set(tt.__all__) <= set(dir(tt))
    with pytest.raises(AttributeError, match=r"no attribute 'trainn'; it has .*train_model"):
        tt.trainn  # noqa: B018


def test_every_public_name_is_on_the_page():
    page = (ROOT / "docs" / "python.md").read_text()
    assert not [name for name in tt.__all__ if f"`{name}" not in page]


def test_importing_the_package_loads_none_of_its_stages():
    assert not [name for name in loaded("import twotower") if name.startswith("twotower.")]


def test_tables_are_imported_and_configurations_loaded_without_pytorch(tmp_path):
    code = f"""
import twotower as tt
tt.import_tables({str(tmp_path / "w")!r}, {{"user_id": [1, 2], "item_id": [3, 4]}}, without_time=True)
tt.load({{"train": {{"epochs": 1}}}}, workspace={str(tmp_path / "w")!r})
"""
    assert not loaded(code) & HEAVY


def test_a_configuration_is_a_file_or_a_dict_with_overrides_of_both_forms(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[train]\nepochs = 3\n")
    settings = tt.load(file, ["train.seed=7"], workspace=tmp_path)
    assert (settings.train.epochs, settings.train.seed, settings.workspace.path) == (3, 7, str(tmp_path))
    content = {"train": {"epochs": 3}}
    assert tt.load(content, {"train.seed": 7, "models.dimension": 8}).models.dimension == 8
    assert content == {"train": {"epochs": 3}}
    for overrides in (["update.seed=1"], {"update.seed": 1}):  # only the file's own section holds users out
        assert tt.load(content, overrides).samples.held_out_users == 0
    with pytest.raises(ConfigError, match=r"train.epoch is no key; did you mean epochs\?"):
        tt.load({"train": {"epoch": 3}})
    with pytest.raises(ConfigError, match=r"train.epochs.x: epochs is a value, not a section"):
        tt.load(content, {"train.epochs.x": 1})
    with pytest.raises(ConfigError, match="is no value of a configuration"):
        tt.load(content, {"train.epochs": object()})
