"""Embedding tables on disk: safetensors, read by mapping them into memory."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from twotower.schema.errors import DataError

FILE = "tables.safetensors"


def save_tables(tables: dict[str, npt.NDArray[np.float32]], folder: Path) -> None:
    """Write tables (rows, D) by name."""
    save_file({name: np.ascontiguousarray(table) for name, table in tables.items()}, folder / FILE)


def map_tables(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Map the tables into memory, read-only: a row is read from disk when it is touched.

    The format is a length, a JSON header and the numbers (safetensors' own reader copies whole tensors).

    Raises:
        DataError: the file is missing or is not of this format.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        tables = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "F32":
                raise DataError(f"{path}: {name} is of type {entry['dtype']}, where F32 is due")
            begin = 8 + length + entry["data_offsets"][0]
            tables[name] = (
                np.memmap(path, np.float32, "r", begin, tuple(entry["shape"]))
                if 0 not in entry["shape"]
                else (np.zeros(entry["shape"], np.float32))
            )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return tables
