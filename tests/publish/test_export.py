import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.features.feature_set import encode_request
from twotower.features.fitted import Bucket, Categories, Category, Items, Number, PrecomputedVector
from twotower.features.vocabulary import Vocabulary
from twotower.logs.entities import Entity
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.versions import PublishedVersion, open_version
from twotower.publish.delta import Delta, Rows
from twotower.publish.export import _inputs
from twotower.publish.overlay import EntityChanges, Overlay
from twotower.publish.tables import map_tables
from twotower.publish.tower import ExportedTower
from twotower.schema.errors import ConfigError
from twotower.towers.two_tower import tower_inputs

ALONE = """
import json, sys
for name in ("torch", "twotower", "pyarrow", "pandas"):
    sys.modules[name] = None  # an import of it fails
sys.path.insert(0, sys.argv[1])
from tower import ExportedTower
raw = json.load(sys.stdin)
print(json.dumps({side: [ExportedTower(side=side).vector(one).tolist() for one in raw[side]] for side in raw}))
"""


@pytest.fixture(scope="module", params=["world", "odd_world"])
def version(request: pytest.FixtureRequest) -> PublishedVersion:
    return open_version(request.getfixturevalue(request.param))


def raw_users(version: PublishedVersion, count: int) -> list[dict[str, Any]]:
    """The features of the first users as the workspace has them, with their clicks."""
    opened = version._version
    names = [feature.name for feature in opened.features.user_columns]
    rows = {row["user_id"]: row for row in pq.read_table(version._workspace / "users.parquet").to_pylist()}
    users = []
    for place, user_id in enumerate(opened.users.ids[:count].to_pylist()):
        begin, end = opened.clicks.indptr[place : place + 2]
        clicks = opened.item_ids.take(pa.array(opened.clicks.item_row[begin:end])).to_pylist()
        history = {"history": clicks} if opened.features.history else {}
        users.append({**{name: rows[user_id][name] for name in names}, **history})
    return users


def raw_items(version: PublishedVersion, count: int) -> list[dict[str, Any]]:
    opened = version._version
    names = [feature.name for feature in opened.features.item]
    return opened.catalogue.slice(0, count).select(names).to_pylist()


def test_exported_towers_give_the_vectors_of_the_version_without_pytorch_and_without_this_package(version, tmp_path):
    report = version.export_towers(tmp_path / "towers")
    assert (report.version, report.delta_seq, report.channel) == (version.id, 0, "two_tower")
    raw = {"user": raw_users(version, 12), "item": raw_items(version, 12)}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "towers"],
        input=json.dumps(raw),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    vectors = json.loads(done.stdout)
    ids = version._version.users.ids[:12].to_pylist()
    np.testing.assert_allclose(vectors["user"], version.user_vectors(ids).vectors, atol=1e-5)
    np.testing.assert_allclose(vectors["item"], version.item_vectors().vectors[:12], atol=1e-5)


def test_a_user_of_whom_nothing_is_known_has_the_vector_of_an_unknown_user(version, tmp_path):
    version.export_towers(tmp_path / "towers")
    stranger = 999_999 if version._version.users.ids.type == pa.int64() else "nobody"
    vector = version.user_vectors([stranger]).vectors[0]
    np.testing.assert_allclose(ExportedTower(tmp_path / "towers").vector({}), vector, atol=1e-5)


def test_the_snippet_of_the_readme_runs(version, tmp_path):
    version.export_towers(tmp_path / "towers")
    code = (tmp_path / "towers" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(len(_))".replace("users.vector", "_ = users.vector")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "towers",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == version.item_vectors().vectors.shape[1]


def test_wrong_features_and_changed_files_are_refused(world: Settings, tmp_path):
    version, folder = open_version(world), tmp_path / "towers"
    version.export_towers(folder)
    tower = ExportedTower(folder)
    with pytest.raises(ValueError, match="height is no feature of this tower"):
        tower.vector({"height": 180})
    with pytest.raises(ValueError, match="user_id holds '7', where values such as "):
        tower.vector({"user_id": "7"})
    with pytest.raises(ConfigError, match="something stands there"):
        version.export_towers(folder)
    with pytest.raises(ConfigError, match="has no vectors"):
        version.export_towers(tmp_path / "other", "popular")
    (folder / "tables" / "0.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0.npy does not have the SHA-256"):
        ExportedTower(folder)


@dataclass
class Recorded:
    """Takes the place of a network: gives back what entered it."""

    def run(self, _: object, inputs: dict[str, Any]) -> Any:
        self.inputs = inputs
        return [[None]]


NAMES = Vocabulary("names", pa.array(["a", "b", "c"]), 6)
NUMBERS = Vocabulary("numbers", pa.array([3, 7]), 5)
KINDS = [
    Category("name", NAMES, 2),
    Category("number", NUMBERS, 2),
    Categories("tags", NAMES, 2, "|"),
    Categories("list", NUMBERS, 2, None),
    Number("plain", False, 2.0, 3.0),
    Number("damped", True, 2.0, 3.0),
    Bucket("bucket", "buckets", (1.0, 5.0), 2),
    Items("mean", NUMBERS, 2, 3, "mean", False),
    Items("sequence", NUMBERS, 2, 3, "transformer", False),
    PrecomputedVector("vector", 2),
]


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"name": "b", "number": 7, "tags": "c| a|x|", "list": [7, None, 3, 3], "plain": 4, "damped": -9.5},
        {"name": "x", "number": 8, "tags": "", "list": [], "plain": 1e300, "damped": float("inf"), "bucket": 5},
        {"name": None, "number": 7.0, "tags": ["a", "b"], "list": [8, 9], "bucket": -1, "vector": [0.5, 1e300]},
        {"number": True, "tags": "|", "plain": True, "bucket": float("nan"), "vector": [0.5, 2]},
        {"number": float("nan"), "mean": [3, 7, 7, 3, None], "sequence": [3, 7, 8, 7], "vector": []},
        {"mean": [], "sequence": [3], "vector": [None, 1], "bucket": 1e9},
    ],
)
def test_every_kind_of_feature_enters_the_network_as_in_training(raw):
    generator = np.random.default_rng(0)
    tables = {name: generator.normal(size=(9, 2)).astype(np.float32) for name in ("names", "numbers", "buckets")}
    columns = encode_request(KINDS, raw, "raw")
    expected = {f"input.{name}": value for name, value in tower_inputs(KINDS, columns, tables).items()}
    tower = object.__new__(ExportedTower)
    tower.features, tower.tables, tower.session = json.loads(json.dumps(_inputs(KINDS))), tables, Recorded()
    tower.rows = {"names": {"a": 2, "b": 3, "c": 4}, "numbers": {3: 2, 7: 3}}
    tower.vector(raw)
    assert tower.session.inputs.keys() == expected.keys()
    for name, value in expected.items():
        given = tower.session.inputs[name]
        assert (given.dtype, given.shape) == (value.dtype, value.shape), name
        np.testing.assert_allclose(given, value, rtol=1e-6, err_msg=name)


def test_vectors_are_written_in_each_format(world: Settings, tmp_path):
    items = open_version(world).item_vectors()
    for end in ("parquet", "jsonl", "csv", "npy"):
        items.write(tmp_path / f"items.{end}")
    assert pq.read_table(tmp_path / "items.parquet").equals(items.to_arrow())
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    texts = pa_csv.read_csv(tmp_path / "items.csv").to_pylist()
    for rows in (lines, [{**row, "vector": json.loads(row["vector"])} for row in texts]):
        assert [row["item_id"] for row in rows] == items.ids.to_pylist()
        np.testing.assert_allclose([row["vector"] for row in rows], items.vectors, rtol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "items.npy"), items.vectors)
    assert np.load(tmp_path / "items.ids.npy").tolist() == items.ids.to_pylist()
    users = open_version(world).user_vectors([3, 1])
    users.write(tmp_path / "users.npy")
    assert np.load(tmp_path / "users.ids.npy").dtype == np.int64
    with pytest.raises(ConfigError, match=r"ends in .parquet or .csv or .jsonl or .npy"):
        items.write(tmp_path / "items.txt")


def test_what_was_learned_since_is_in_the_export(world: Settings, tmp_path):
    base, workspace = open_served(world), places(world).workspace
    spare = map_tables(base.path / "channels" / "two_tower")["user_id"].shape[0] - 1
    learned = {"user_id": Rows(np.array([spare]), np.full((1, base.item_vectors.shape[1]), 3, np.float32))}
    known, deleted = base.users.ids[:2].to_pylist()
    new_ids = {"user_id": pa.table({"id": [987_654], "row": pa.array([spare], pa.int32())})}
    nothing, vectors = pa.array([], base.item_ids.type), np.zeros((0, base.item_vectors.shape[1]), np.float32)
    overlay = Overlay(base)
    overlay.learn(Delta(base.id, 1, 1, learned, new_ids, nothing, vectors, {}))
    laid = PublishedVersion(overlay.lay(EntityChanges(users={deleted: Entity(deleted=True)})), workspace)
    report = laid.export_towers(tmp_path / "towers")
    assert report.delta_seq == 1
    tower = ExportedTower(tmp_path / "towers")
    for user_id, raw in ((987_654, {}), (deleted, {}), (known, raw_users(laid, 1)[0])):
        vector = tower.vector({**raw, "user_id": user_id})
        np.testing.assert_allclose(vector, laid.user_vectors([user_id]).vectors[0], atol=1e-5)
    assert not np.allclose(tower.vector({"user_id": 987_654}), tower.vector({}))
