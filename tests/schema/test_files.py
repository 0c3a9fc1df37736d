from pathlib import Path

import pytest

from twotower.schema.errors import DataError
from twotower.schema.files import (
    MANIFEST,
    check_listing,
    folder_listing,
    read_json,
    sha256,
    whole_file,
    whole_folder,
    write_json,
)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_appears_when_its_writer_is_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.txt"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(tmp_path) == ["deep", "deep/x.txt"]


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x.txt"]


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".tmp-x.txt").write_text("half")
    (tmp_path / ".tmp-y").mkdir()
    (tmp_path / ".tmp-y" / "half").write_text("half")
    with whole_file(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    with whole_folder(tmp_path / "y") as temporary:
        (temporary / "a").write_text("new")
    assert names(tmp_path) == ["x.txt", "y", "y/a"]


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    for content in ("a", "b"):
        with whole_folder(path) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
    assert names(tmp_path) == ["samples", "samples/sub", "samples/sub/b"]


def test_a_failed_writer_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "samples"
    with whole_folder(path) as folder:
        (folder / "a").write_text("old")

    def interrupted() -> None:
        with whole_folder(path) as folder:
            (folder / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["samples", "samples/a"]


def test_the_same_content_gives_the_same_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    write_json(tmp_path / "b.json", {"a": "é", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json") == {"a": "é", "b": 1}


def test_json_that_is_none_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_json(tmp_path / "x.json")
    for content in (b"{", b"\xff"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(DataError, match="is not readable JSON"):
            read_json(tmp_path / "x.json")


def test_a_listing_tells_a_flipped_byte_a_cut_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c", "d"):
        (tmp_path / name).write_bytes(b"0123456789")
    write_json(tmp_path / MANIFEST, {})
    listing = folder_listing(tmp_path)
    assert list(listing) == ["a", "b", "d", "sub/c"]
    assert listing["a"] == {"bytes": 10, "sha256": sha256(tmp_path / "a")}
    assert check_listing(tmp_path, listing) == []
    (tmp_path / "a").write_bytes(b"0123456788")
    (tmp_path / "b").write_bytes(b"012345678")
    (tmp_path / "sub" / "c").unlink()
    assert check_listing(tmp_path, listing) == [
        "a does not have the SHA-256 of the manifest",
        "b has 9 bytes, the manifest says 10",
        "sub/c is missing",
    ]


def test_a_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
