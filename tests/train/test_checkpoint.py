from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.channels.options import MindOptions, ModelsOptions
from twotower.features.columns import Bag
from twotower.samples.options import NegativesOptions
from twotower.samples.read import Samples
from twotower.schema.files import MANIFEST, read_json, write_json
from twotower.towers.options import PreRankOptions, TowerOptions
from twotower.train.checkpoint import _digest, _present_settings, load_model, open_checkpoint
from twotower.train.options import TrainOptions
from twotower.train.towers import train

BuildWorld = Callable[..., Samples]


def network(options: TowerOptions | PreRankOptions) -> dict[str, Any]:
    return {"kind": options.network, "layers": options.layers, "crosses": options.crosses}


def to_format_3(path: Path, models: ModelsOptions, channel: str) -> None:
    """Rewrite the manifest of a checkpoint as earlier releases wrote it."""
    manifest = {key: value for key, value in read_json(path / MANIFEST).items() if key not in ("digest", "settings")}
    shape = {
        "dimension": models.dimension,
        "user": network(models.user_tower),
        "item": network(models.item_tower),
        "dropout": 0.1,
        "ids_alone": channel == "mf",
        "interests": models.mind.interests if channel == "mind" else 0,
        "rounds": models.mind.rounds,
        "popularity": True,
    }
    manifest |= {"format": 3, "shape": shape}
    write_json(path / MANIFEST, {**manifest, "digest": _digest(manifest)})


@pytest.mark.parametrize("channel", ["two_tower", "mind", "mf"])
def test_a_checkpoint_of_format_3_is_read(
    build_world: BuildWorld, two_camps: list[Any], tmp_path: Path, channel: str
) -> None:
    samples = build_world(two_camps, 32, 16)
    models = ModelsOptions(
        dimension=8,
        user_tower=TowerOptions("dcn", [16], crosses=1),
        item_tower=TowerOptions("dnn", []),
        mind=MindOptions(interests=3),
    )
    options = TrainOptions(epochs=1, batch_size=48, logit_adjustment=0.4, threads=1)
    report = train(samples, tmp_path, options, models, NegativesOptions(), channel=channel)
    path = Path(report.checkpoint)
    present = load_model(open_checkpoint(path))
    to_format_3(path, models, channel)
    former = load_model(open_checkpoint(path))
    nobody = {**samples.users.features, "history": Bag(np.zeros(33, np.int64), np.zeros(0, np.int32))}
    nobody["hour"] = np.zeros(32, np.int32)
    np.testing.assert_array_equal(former.encode_users(nobody), present.encode_users(nobody))
    items = samples.items.features
    np.testing.assert_array_equal(former.encode_items(items), present.encode_items(items))


def test_the_shape_of_a_ranker_of_format_3_is_read() -> None:
    options = PreRankOptions(
        network="dcn", layers=[5, 3], crosses=3, dropout=0.2, history="target", attention=7, positions=9
    )
    former = {name: getattr(options, name) for name in ("dropout", "history", "attention", "positions")}
    read = _present_settings({"format": 3, "shape": {"network": network(options), **former}})["ranker"]
    assert PreRankOptions(**read) == options


def test_a_checkpoint_says_what_it_was_trained_with(
    build_world: BuildWorld, two_camps: list[Any], tmp_path: Path
) -> None:
    models = ModelsOptions(dimension=8)
    report = train(
        build_world(two_camps, 32, 16), tmp_path, TrainOptions(epochs=1, batch_size=48, threads=1), models,
        NegativesOptions(),
    )  # fmt: skip
    settings = open_checkpoint(Path(report.checkpoint)).manifest["settings"]
    assert settings["channel"] == "two_tower"
    assert settings["train"]["epochs"] == 1
    assert settings["models"] == {
        "dimension": 8,
        "user_tower": asdict(models.user_tower),
        "item_tower": asdict(models.item_tower),
    }
    assert settings["negatives"] == asdict(NegativesOptions())
