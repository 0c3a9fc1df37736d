"""The channels that run on an engine, on real data."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.item_to_item import FILE, ItemToItem
from twotower.channels.options import ItemCFOptions, SwingOptions
from twotower.channels.swing import fit_swing
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.features.options import Features
from twotower.samples.build import build_samples
from twotower.samples.options import EngineOptions
from twotower.samples.read import open_samples


def test_some_users_of_movielens_give_the_same_bytes(
    tmp_path: Path, some_movielens: Path, spark: EngineOptions
) -> None:
    """`benchmarks/soak/spark.py` does the same for all of them."""
    import_dataset("movielens-1m", some_movielens, tmp_path / "ml", ImportOptions(holdout="time:0.9", positive="4"))
    build_samples(tmp_path / "ml", tmp_path / "samples", Features(), 8)
    samples = open_samples(tmp_path / "samples")
    items = len(samples.items)
    weight = np.random.default_rng(0).random(len(samples.positives), np.float32)
    weighed = ItemCFOptions(items=30, interest="weight", activity=1.0)
    written: dict[str, set[bytes]] = {}
    for engine in (EngineOptions(), spark):
        channels: dict[str, ItemToItem] = {
            "item_cf": fit_item_cf(samples.clicks, items, ItemCFOptions(items=100), engine),
            "item_cf, weights": fit_item_cf(
                samples.clicks, items, weighed, engine, positives=replace(samples.positives, weight=weight)
            ),
            "swing": fit_swing(samples.clicks, items, SwingOptions(items=100, users=200), engine),
        }
        for name, channel in channels.items():
            channel.save(tmp_path)
            written.setdefault(name, set()).add((tmp_path / FILE).read_bytes())
    assert {name: len(files) for name, files in written.items()} == dict.fromkeys(channels, 1)
    assert min(len(file) for files in written.values() for file in files) > 100_000
