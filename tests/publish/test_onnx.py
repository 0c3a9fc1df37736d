from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.features.columns import Bag, pointers
from twotower.features.fitted import Category, Items, Number
from twotower.features.vocabulary import Vocabulary
from twotower.publish.onnx import OnnxTower, export_tower
from twotower.towers.options import TowerOptions
from twotower.towers.towers import Tower, WithPopularity
from twotower.towers.two_tower import PREFERENCE, tower_inputs


@pytest.mark.parametrize(
    ("encoder", "network"),
    [("mean", "dnn"), ("attention", "dcn"), ("transformer", "dnn"), ("interests", "dcn"), ("interests", "dnn")],
)
def test_an_exported_tower_gives_the_vectors_of_the_trained_one(encoder: str, network: str, tmp_path: Path) -> None:
    """For batches and histories of every length: both are free in the exported graph."""
    known = Vocabulary("item_id", pa.array(range(50)), 60)
    features = [Items("history", known, 16, 20, encoder, True, heads=4, blocks=2), Number("age", False, 0, 1)]
    torch.manual_seed(0)
    tower = Tower(features, TowerOptions(network, [32]), 8, dropout=0.5).eval()
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    export_tower(tower, features, tmp_path / "tower.onnx")
    generator = np.random.default_rng(0)
    tables = {"item_id": generator.standard_normal((60, 16), dtype=np.float32)}
    exported = OnnxTower(tmp_path / "tower.onnx", features, tables)
    for lengths in ([3, 0, 20], [0], [1], [7] * 40, [0, 0]):
        counts = np.array(lengths)
        columns = {
            "history": Bag(pointers(counts), generator.integers(2, 52, counts.sum()).astype(np.int32)),
            "age": generator.standard_normal((len(counts), 2), dtype=np.float32),
        }
        inputs = {name: torch.tensor(value) for name, value in tower_inputs(features, columns, tables).items()}
        with torch.no_grad():
            np.testing.assert_allclose(exported.encode(columns), tower(inputs).numpy(), atol=1e-6)


def test_an_exported_tower_of_added_features_gives_zero_for_nothing_known(tmp_path: Path) -> None:
    known = Vocabulary("user_id", pa.array(range(5)), 7)
    features = [Category("user_id", known, 4), Items("history", known, 4, 20, "mean", True)]
    export_tower(Tower(features, TowerOptions("none", []), 4), features, tmp_path / "tower.onnx")
    table = np.ones((7, 4), np.float32)
    table[:2] = 0
    exported = OnnxTower(tmp_path / "tower.onnx", features, {"user_id": table})
    columns = {"user_id": np.array([1, 3], np.int32), "history": Bag(np.zeros(3, np.int64), np.zeros(0, np.int32))}
    np.testing.assert_allclose(exported.encode(columns), [[0] * 4, [0.5] * 4], atol=1e-6)


def test_an_exported_tower_has_the_numbers_for_popularity(tmp_path: Path) -> None:
    known = Vocabulary("item_id", pa.array(range(5)), 7)
    features = [Category("item_id", known, 4)]
    preference = np.array([[0.3, 0.4]] * 3 + [[0.0, 0.5]] * 4, np.float32)
    tables = {"item_id": np.eye(7, 4, dtype=np.float32), PREFERENCE: preference}
    columns = {"item_id": np.array([2, 3, 6], np.int32)}
    for of_items, more in ((True, preference[[2, 3, 6]]), (False, np.array([[np.sqrt(0.5), 0]] * 3))):
        tower = WithPopularity(Tower(features, TowerOptions("none", []), 4), of_items)
        export_tower(tower, features, path := tmp_path / f"{of_items}.onnx")
        left = np.sqrt(1 - np.square(more).sum(axis=1, keepdims=True))
        expected = np.concatenate([left * tables["item_id"][[2, 3, 6]], more], axis=1)
        expected[2] = 0  # nothing is known of it
        np.testing.assert_allclose(OnnxTower(path, features, tables).encode(columns), expected, atol=1e-6)


def test_a_network_is_exported_to_the_same_bytes_again(tmp_path: Path) -> None:
    features = [Category("item_id", Vocabulary("item_id", pa.array(range(5)), 7), 4)]
    tower = Tower(features, TowerOptions("dnn", [8]), 4)
    for name in ("one", "other"):
        export_tower(tower, features, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
