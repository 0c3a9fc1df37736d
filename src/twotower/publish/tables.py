"""Embedding tables on disk: safetensors, read by mapping them into memory."""

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from twotower.schema.errors import DataError
from twotower.schema.files import map_file
from twotower.towers.two_tower import Table

FILE = "tables.safetensors"


class LaidRows:
    """A table with newer values for some rows, read row by row; the base stays mapped and unchanged.

    Args:
        base: (N, D); it may be a `LaidRows` itself.
        rows: (M,) int64, ascending; some may be beyond the base.
        values: (M, D) of these rows.

    >>> table = LaidRows(np.zeros((3, 1), np.float32), np.array([1, 3]), np.array([[5], [7]], np.float32))
    >>> table[np.array([0, 1, 3])].ravel().tolist(), table.shape
    ([0.0, 5.0, 7.0], (4, 1))
    """

    def __init__(self, base: Table, rows: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        self._base = base
        self._rows = rows
        self._values = values
        self.shape: tuple[int, ...] = (max(base.shape[0], int(rows[-1]) + 1 if len(rows) else 0), base.shape[1])

    def __getitem__(self, index: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The values of some rows (n,)."""
        place = np.searchsorted(self._rows, index)
        newer = self._rows[np.minimum(place, len(self._rows) - 1)] == index if len(self._rows) else index < 0
        values: npt.NDArray[np.float32] = self._base[np.where(newer, 0, index)]
        values[newer] = self._values[place[newer]]
        return values


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
    data = map_file(path)
    try:
        length = int.from_bytes(data[:8], "little")
        if not 0 < length <= len(data) - 8:
            raise ValueError(f"its header has {length} bytes, the file {len(data)}")
        header = json.loads(bytes(data[8 : 8 + length]))
        return {
            name: _mapped(data, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _mapped(data: mmap.mmap | bytes, start: int, name: str, entry: Any) -> npt.NDArray[np.float32]:
    """The table (rows, D) of an entry of the header; the numbers begin at `start`."""
    (rows, dimension), (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "F32":
        raise ValueError(f"{name} is of type {entry['dtype']}, where F32 is expected")
    if any(type(number) is not int or number < 0 for number in (rows, dimension, begin, end)):
        raise ValueError(f"{name} has the shape {entry['shape']} at {entry['data_offsets']}")
    if end - begin != 4 * rows * dimension or start + end > len(data):
        raise ValueError(f"{name} of shape {entry['shape']} does not stand at {begin} to {end}")
    return np.frombuffer(data, np.float32, rows * dimension, start + begin).reshape(rows, dimension)
