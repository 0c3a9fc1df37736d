"""Hold the files that Spark makes of MovieLens-1M against those of DuckDB: they have the same bytes.

    python benchmarks/soak/spark.py --data DIR

Samples and the channels that are counted, on Spark with the options that a user gets. Tests do the same for a few
users. The last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.item_to_item import FILE, ItemToItem
from twotower.channels.options import ItemCFOptions, SwingOptions
from twotower.channels.swing import fit_swing
from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.pipeline.line import build_samples
from twotower.samples.options import EngineOptions
from twotower.samples.read import open_samples

CONFIG = Path(__file__).parents[2] / "examples" / "movielens.toml"
ENGINES = (EngineOptions(), EngineOptions("spark"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def compare_samples(workspace: Path, folder: Path) -> int:
    """Build the samples on both engines; gives the bytes of one of them."""
    settings = load(CONFIG, [f"workspace.path={json.dumps(str(workspace))}"])
    for engine in ENGINES:
        build_samples(replace(settings, engine=engine))
        (workspace / "samples").rename(folder / engine.name)
    duckdb, spark = (files_of(folder / engine.name) for engine in ENGINES)
    assert duckdb.keys() == spark.keys()
    other = [name for name in duckdb if duckdb[name] != spark[name]]
    assert not other, f"{other} have other bytes on Spark"
    return sum(map(len, duckdb.values()))


def compare_channels(samples_folder: Path, folder: Path) -> int:
    """Fit the channels on both engines; gives the bytes of one of them."""
    samples = open_samples(samples_folder)
    items = len(samples.items)
    weight = np.random.default_rng(0).random(len(samples.positives), np.float32)
    weighed = ItemCFOptions(items=30, interest="weight", activity=1.0)
    positives = replace(samples.positives, weight=weight)
    written: dict[str, set[bytes]] = {}
    for engine in ENGINES:
        channels: dict[str, ItemToItem] = {
            "item_cf": fit_item_cf(samples.clicks, items, ItemCFOptions(items=100), engine),
            "item_cf, weights": fit_item_cf(samples.clicks, items, weighed, engine, positives=positives),
            "swing": fit_swing(samples.clicks, items, SwingOptions(items=100, users=200), engine),
        }
        for name, channel in channels.items():
            channel.save(folder)
            written.setdefault(name, set()).add((folder / FILE).read_bytes())
    other = [name for name, files in written.items() if len(files) > 1]
    assert not other, f"{other} have other bytes on Spark"
    return sum(len(file) for files in written.values() for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of MovieLens-1M")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        import_dataset("movielens-1m", arguments.data, folder / "ml", ImportOptions(holdout="time:0.9", positive="4"))
        sizes = {"samples_bytes": compare_samples(folder / "ml", folder)}
        sizes["channels_bytes"] = compare_channels(folder / ENGINES[0].name, folder)
    print(json.dumps({**sizes, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
