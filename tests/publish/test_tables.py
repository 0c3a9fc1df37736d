import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.publish.tables import FILE, map_tables, save_tables
from twotower.schema.errors import DataError

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)


def rewritten(path: Path, **changes: Any) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["one"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_tables_are_mapped_as_they_were_saved_and_cannot_be_written_to(tmp_path: Path) -> None:
    save_tables({"one": TABLE, "none": np.zeros((0, 3), np.float32)}, tmp_path)
    tables = map_tables(tmp_path)
    assert tables["one"].tolist() == TABLE.tolist()
    assert tables["none"].shape == (0, 3)
    with pytest.raises(ValueError, match="read-only"):
        tables["one"][0, 0] = 1


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [5, 3]},
        {"shape": [-4, -3]},
        {"shape": [12]},
        {"shape": [2**62, 4], "data_offsets": [0, 2**62]},
        {"data_offsets": [48, 96]},
        {"data_offsets": [-48, 0]},
        {"data_offsets": "x"},
        {"dtype": "F64"},
        {"dtype": None},
    ],
)
def test_a_table_that_leads_out_of_its_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_tables({"one": TABLE}, tmp_path)
    rewritten(tmp_path / FILE, **changes)
    with pytest.raises(DataError, match="cannot be read"):
        map_tables(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, b"\xff" * 7, struct.pack("<Q", 2) + b"[]", b"\2" + bytes(7) + b"{"]
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        map_tables(tmp_path)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    save_tables({"one": TABLE}, tmp_path)
    content = (tmp_path / FILE).read_bytes()
    for size in range(len(content)):
        (tmp_path / FILE).write_bytes(content[:size])
        with pytest.raises(DataError, match="cannot be read"):
            map_tables(tmp_path)
