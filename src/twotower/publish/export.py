"""Both towers of a version as one folder that works without this package and without PyTorch."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twotower.channels.vector_channel import VectorChannel
from twotower.features.feature_set import HISTORY, FeatureSet, describe, load
from twotower.features.fitted import LIMIT, Categories, Category, Fitted, Items
from twotower.features.vocabulary import FIRST, MISSING, UNKNOWN
from twotower.logs.events import EntityId
from twotower.publish import tower as standalone
from twotower.publish.manifest import write_manifest
from twotower.publish.tables import map_tables
from twotower.publish.version import TWO_TOWER, Version
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.schema.files import folder_listing, whole_folder, write_json
from twotower.towers.towers import POPULARITY
from twotower.towers.two_tower import PREFERENCE, Table

FORMAT = 1
_AT_ONCE = 1 << 16
"""Rows of a table that are read together."""

README = """# The towers of version {version}, channel {channel}

`tower.py` computes vectors from raw features. It needs Python, NumPy and ONNX Runtime, and nothing else:

```python
from tower import ExportedTower

users = ExportedTower()
users.vector({{{example}}})
```

The result is a unit vector ({dimension} numbers). Its inner product with the vector of an item is the cosine by which
the version orders items. `ExportedTower(side="item")` computes vectors of items.

- Users are described by {user}.
- Items are described by {item}.
- `history` are the ids of the items that the user clicked, oldest first, without items that are not in the catalogue.
- A feature that is absent or None is a missing value. A value that training did not see is an unknown one.

| file | content |
|---|---|
| `user_tower.onnx`, `item_tower.onnx` | the networks |
| `tables/`, `vocabulary.json` | embedding tables, and the row of each known value |
| `features.json` | how each feature is encoded |
| `manifest.json` | the version, its delta, and the SHA-256 of every file, which `ExportedTower` checks |
"""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    out: str
    version: str
    delta_seq: int
    channel: str
    user_features: list[str]
    item_features: list[str]


def export_towers(version: Version, channel: VectorChannel, out: Path) -> ExportReport:
    """Write the towers of a channel, with what was learned since the version was made, into a new folder.

    Raises:
        ConfigError: something stands there already; the channel has no towers of its own.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: something stands there: give the name of a new folder")
    source = version.path / "channels" / channel.name
    if not (source / "user_tower.onnx").exists():
        raise ConfigError(f"the channel {channel.name} has no towers of its own: ask {TWO_TOWER}")
    features = load(source)
    tables: Mapping[str, Table] = version.user_tower.tables if channel.name == TWO_TOWER else map_tables(source)
    sides = {"user": _inputs((*features.user, *features.context)), "item": _inputs(features.item)}
    if PREFERENCE in tables:
        preference = {"kind": "category", "input": POPULARITY, "table": PREFERENCE, "vocabulary": c.ITEM_ID}
        sides["item"].append({**preference, "column": c.ITEM_ID, "missing": UNKNOWN})
    with whole_folder(out) as folder:
        (folder / "tables").mkdir()
        stored = {}
        for place, (name, table) in enumerate(sorted(tables.items())):
            stored[name] = {"file": f"tables/{place}.npy"}
            _write_table(table, folder / stored[name]["file"])
        write_json(folder / "features.json", {**sides, "tables": stored})
        write_json(folder / "vocabulary.json", _vocabularies(version, channel, features))
        for name in ("user_tower.onnx", "item_tower.onnx"):
            shutil.copyfile(source / name, folder / name)
        shutil.copyfile(standalone.__file__, folder / "tower.py")
        (folder / "README.md").write_text(_readme(version, channel, sides))
        made = {"kind": "towers", "format": FORMAT, "version": version.id, "delta_seq": version.delta_seq}
        write_manifest(folder, {**made, "channel": channel.name, "files": folder_listing(folder)})
    return ExportReport(
        str(out), version.id, version.delta_seq, channel.name, _names(sides["user"]), _names(sides["item"])
    )


def _inputs(features: Iterable[Fitted]) -> list[dict[str, Any]]:
    """How each feature of a tower is encoded."""
    inputs = []
    for feature in features:
        encoding = describe(feature)
        name = encoding.pop("name")
        if isinstance(feature, Category | Categories | Items):
            encoding["vocabulary"] = feature.vocabulary.table
        # A user without an id is unknown, not one whose id is missing: see `queries_of_users`.
        missing = UNKNOWN if name in (c.USER_ID, c.ITEM_ID) else MISSING
        inputs.append({**encoding, "input": name, "column": name, "missing": missing, "limit": LIMIT})
    return inputs


def _vocabularies(version: Version, channel: VectorChannel, features: FeatureSet) -> dict[str, dict[str, list[Any]]]:
    """The row of each value, by table."""
    rows: dict[str, dict[EntityId, int]] = {
        name: {value: FIRST + place for place, value in enumerate(vocabulary.values.to_pylist())}
        for name, vocabulary in features.vocabularies.items()
    }
    if channel.name == TWO_TOWER:
        if c.ITEM_ID in rows and features.history is not None:
            count = len(channel.item_tokens)
            rows[c.ITEM_ID] |= zip(version.item_ids[:count].to_pylist(), channel.item_tokens.tolist(), strict=True)
        if c.USER_ID in rows:
            for user_id in (*version.since.tokens, *version.since.users):
                token = version.since.token(user_id)
                if token is not None or version.since.replaced(user_id):
                    rows[c.USER_ID][user_id] = UNKNOWN if token is None else token
    return {name: {"values": list(known), "rows": list(known.values())} for name, known in rows.items()}


def _write_table(table: Table, path: Path) -> None:
    """Write a table (rows, D), a piece at a time."""
    shape = (table.shape[0], table.shape[1])
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, shape[0], _AT_ONCE):
        written[start : start + _AT_ONCE] = table[np.arange(start, min(start + _AT_ONCE, shape[0]))]
    written.flush()


def _names(inputs: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(feature["column"] for feature in inputs))


def _readme(version: Version, channel: VectorChannel, sides: Mapping[str, list[dict[str, Any]]]) -> str:
    assert channel.item_vectors is not None
    names = {side: ", ".join(f"`{name}`" for name in _names(inputs)) for side, inputs in sides.items()}
    history = f'"{HISTORY}": {version.item_ids[:2].to_pylist()!r}' if HISTORY in _names(sides["user"]) else ""
    dimension = channel.item_vectors.shape[1]
    return README.format(version=version.id, channel=channel.name, dimension=dimension, example=history, **names)
