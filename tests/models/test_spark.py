"""The channels that run on an engine, on real data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from twotower.config import settings as spec
from twotower.datasets.importers import import_dataset
from twotower.models import item_cf, swing
from twotower.models.item_cf import ItemCF
from twotower.models.item_to_item import FILE
from twotower.models.swing import Swing
from twotower.samples import build_samples, open_samples


def test_movielens_gives_the_same_bytes(tmp_path: Path, real_data: Callable[[str], Path], spark: spec.Engine) -> None:
    """Few items of each user count, so that their pairs come by the million, not by ten millions."""
    import_dataset("movielens-1m", real_data("ml-1m"), tmp_path / "ml", holdout="time:0.9", positive="4")
    build_samples(tmp_path / "ml", tmp_path / "samples", spec.Features(), 8)
    samples = open_samples(tmp_path / "samples")
    items = len(samples.items)
    written: dict[str, set[bytes]] = {}
    for engine in (spec.Engine(), replace(spark, options={})):
        for channel in (
            ItemCF.fit(samples.clicks, items, item_cf.Options(items=100), engine),
            Swing.fit(samples.clicks, items, swing.Options(items=100, users=200), engine),
        ):
            channel.save(tmp_path)
            written.setdefault(channel.name, set()).add((tmp_path / FILE).read_bytes())
    assert {name: len(files) for name, files in written.items()} == {"item_cf": 1, "swing": 1}
    assert min(len(file) for files in written.values() for file in files) > 1_000_000
