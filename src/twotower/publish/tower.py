"""A trained tower without twotower and without PyTorch: raw features in, a vector out.

`twotower export towers` copies this file into the folder that it writes, so it imports nothing but NumPy and ONNX
Runtime. The rules are those of `twotower.features`: a missing value reads row 0 of a table, an unknown one row 1.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Inputs = dict[str, Any]


class ExportedTower:
    """One tower of an exported folder; safe to call from several threads.

    Args:
        folder: what `twotower export towers` wrote.
        side: `user` or `item`.

    Raises:
        ValueError: a file does not have the SHA-256 of the manifest.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, side: str = "user") -> None:
        folder = Path(folder)
        for name, file in json.loads((folder / "manifest.json").read_text())["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != file["sha256"]:
                raise ValueError(f"{folder / name} does not have the SHA-256 of the manifest: export again")
        description = json.loads((folder / "features.json").read_text())
        self.features = description[side]
        self.tables = {
            name: np.load(folder / table["file"], mmap_mode="r") for name, table in description["tables"].items()
        }
        self.rows = {
            name: dict(zip(table["values"], table["rows"], strict=True))
            for name, table in json.loads((folder / "vocabulary.json").read_text()).items()
        }
        self.session = onnxruntime.InferenceSession(str(folder / f"{side}_tower.onnx"))

    def vector(self, raw: Mapping[str, Any]) -> Any:
        """The unit vector (D,) of raw features by name, or the vectors (K, D) of a user's interests.

        Features that are absent or None are missing values.

        Raises:
            ValueError: a name that is no feature, text where numbers are known, or the other way round.
        """
        if unknown := set(raw) - {feature["column"] for feature in self.features}:
            raise ValueError(f"{', '.join(sorted(unknown))} is no feature of this tower")
        inputs: Inputs = {}
        for feature in self.features:
            encode = getattr(self, f"_{feature['kind']}")
            inputs |= encode(f"input.{feature['input']}", feature, raw.get(feature["column"]))
        return self.session.run(None, inputs)[0][0]

    def _category(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        row = feature["missing"] if _is_missing(value) else self._row(feature, value)
        return {name: self.tables[feature["table"]][[row]]}

    def _categories(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        values = [] if value is None else value
        if feature["separator"] is not None:
            parts = values if isinstance(values, list) else [values]
            values = [cut.strip() or None for part in parts for cut in (part or "").split(feature["separator"])]
        rows = sorted({self._row(feature, part) for part in values if not _is_missing(part)}) or [0]
        return {name: self.tables[feature["table"]][rows].mean(axis=0, keepdims=True)}

    def _number(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        number = np.nan if value is None else float(value)
        if not np.isfinite(number):
            return {name: np.array([[0, 1]], np.float32)}
        number = np.sign(number) * np.log1p(abs(number)) if feature["log"] else number
        score = np.clip((number - feature["mean"]) / feature["deviation"], -feature["limit"], feature["limit"])
        return {name: np.array([[score, 0]], np.float32)}

    def _bucket(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        number = np.nan if value is None else float(value)
        row = 2 + int(np.searchsorted(feature["boundaries"], number, side="right")) if np.isfinite(number) else 0
        return {name: self.tables[feature["table"]][[row]]}

    def _items(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        rows = [self._row(feature, item) for item in value or [] if item is not None][-feature["last"] :]
        table = self.tables[feature["table"]]
        vectors = table[rows] if rows else np.zeros((1, table.shape[1]), np.float32)
        if feature["encoder"] == "mean":
            return {name: vectors.mean(axis=0, keepdims=True)}
        return {name: vectors[None], f"{name}.length": np.array([len(rows)], np.int64)}

    def _ready(self, name: str, feature: Mapping[str, Any], value: Any) -> Inputs:
        given = [np.nan if number is None else number for number in value or []]
        if len(given) not in (0, feature["size"]):
            raise ValueError(f"{feature['column']} has {len(given)} numbers where {feature['size']} are expected")
        with np.errstate(over="ignore"):
            numbers = np.array(given, np.float32)
        whole = len(given) > 0 and bool(np.isfinite(numbers).all())
        vector = [*numbers, 0] if whole else [0] * feature["size"] + [1]
        return {name: np.array([vector], np.float32)}

    def _row(self, feature: Mapping[str, Any], value: Any) -> int:
        known = self.rows[feature["vocabulary"]]
        if known and isinstance(value, str) != isinstance(next(iter(known)), str):
            raise ValueError(
                f"{feature['column']} holds {value!r}, where values such as {next(iter(known))!r} are known"
            )
        return int(known.get(value, 1))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not np.isfinite(value))
