"""The channels that run on an engine, on real data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from twotower.channels import item_cf, swing
from twotower.channels.item_cf import ItemCF
from twotower.channels.item_to_item import FILE
from twotower.channels.swing import Swing
from twotower.datasets.importers import import_dataset
from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import EngineOptions
from twotower.samples.read import open_samples


def test_movielens_gives_the_same_bytes(tmp_path: Path, real_data: Callable[[str], Path], spark: EngineOptions) -> None:
    """Few items of each user count, so that their pairs come by the million, not by ten millions."""
    import_dataset("movielens-1m", real_data("ml-1m"), tmp_path / "ml", holdout="time:0.9", positive="4")
    build_samples(tmp_path / "ml", tmp_path / "samples", Features(), 8)
    samples = open_samples(tmp_path / "samples")
    items = len(samples.items)
    weight = np.random.default_rng(0).random(len(samples.positives), np.float32)
    weighed = item_cf.Options(items=30, interest="weight", activity=1.0)
    written: dict[str, set[bytes]] = {}
    for engine in (EngineOptions(), replace(spark, options={})):
        channels: dict[str, ItemCF | Swing] = {
            "item_cf": ItemCF.fit(samples.clicks, items, item_cf.Options(items=100), engine),
            "item_cf, weights": ItemCF.fit(
                samples.clicks, items, weighed, engine, positives=replace(samples.positives, weight=weight)
            ),
            "swing": Swing.fit(samples.clicks, items, swing.Options(items=100, users=200), engine),
        }
        for name, channel in channels.items():
            channel.save(tmp_path)
            written.setdefault(name, set()).add((tmp_path / FILE).read_bytes())
    assert {name: len(files) for name, files in written.items()} == dict.fromkeys(channels, 1)
    assert min(len(file) for files in written.values() for file in files) > 1_000_000
