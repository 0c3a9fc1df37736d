import logging
import os
from pathlib import Path

import pytest

from twotower.features.store import LmdbFeatureStore, damage_of


def filled(folder: Path) -> Path:
    store = LmdbFeatureStore(folder)
    store.write({b"%04d" % number: bytes(2000) for number in range(500)})
    store.close()
    return folder / "data.mdb"


@pytest.mark.parametrize("damage", ["cut", "pages", "noise", "pipe"])
def test_a_damaged_store_is_set_aside_and_an_empty_one_takes_its_place(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = filled(tmp_path / "store")
    content = path.read_bytes()
    if damage == "cut":
        os.truncate(path, len(content) // 2)
    elif damage == "pages":
        path.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    elif damage == "noise":
        path.write_bytes(b"something else" * 1000)
    else:
        path.unlink()
        os.mkfifo(path)
    with caplog.at_level(logging.ERROR):
        store = LmdbFeatureStore(tmp_path / "store")
    assert store.scan(b"") == {}
    store.write({b"a": b"1"})
    store.close()
    [aside] = tmp_path.glob("store.damaged-*")
    assert aside.name in caplog.text
    assert damage_of(tmp_path / "store") is None


def test_a_whole_store_stays(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    assert damage_of(tmp_path / "store") is None
    store = LmdbFeatureStore(tmp_path / "store")
    assert len(store.scan(b"")) == 500
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
