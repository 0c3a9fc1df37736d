import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.schema.errors import DataError
from twotower.schema.files import (
    MANIFEST,
    check_listing,
    folder_listing,
    map_batches,
    map_file,
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


def entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a/../x", "./x", "a//x", "", "x\0y", "\ud800"])
def test_a_listing_names_files_inside_the_folder_alone(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"0123456789")
    [problem] = check_listing(folder, {name: entry(tmp_path / "x")})
    assert "is no name of a file inside the folder" in problem


def test_a_pipe_a_folder_a_device_and_a_link_are_no_files_of_a_listing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "x").write_bytes(b"0123456789")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "null").symlink_to("/dev/null")
    (folder / "out").symlink_to(tmp_path)
    listing = dict.fromkeys(("pipe", "sub", "link", "null", "out/x"), entry(tmp_path / "x"))
    assert check_listing(folder, listing) == [
        "pipe is no regular file",
        "sub is no regular file",
        "link is a link, or behind one",
        "null is a link, or behind one",
        "out/x is a link, or behind one",
    ]


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    [problem] = check_listing(Path("/proc/self"), {"status": {"bytes": 10, "sha256": "0" * 64}})
    assert problem == "status has 0 bytes, the manifest says 10"


@pytest.mark.parametrize("listing", [None, [], "x", {"a": None}, {"a": {"bytes": "1", "sha256": ""}}, {"a": {}}])
def test_a_listing_of_another_shape_is_a_problem(tmp_path: Path, listing: object) -> None:
    (tmp_path / "a").write_bytes(b"")
    assert len(check_listing(tmp_path, listing)) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no finite number"),
        ('{"a": 1e999}', "1e999 is no finite number"),
        ("9" * 5000, "is not readable JSON"),
        (" " * 101, "has 101 bytes, where at most 100 are read"),
    ],
)
def test_json_that_no_writer_of_ours_makes_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_json(tmp_path / "x.json", *([100] if said.startswith("has") else []))


@pytest.mark.parametrize("read", [read_json, map_file, map_batches])
def test_what_is_no_regular_file_is_not_read_and_nothing_waits(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(DataError, match="is no regular file"):
            read(path)
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none")


def test_offsets_that_lead_out_of_an_arrow_file_are_found_before_they_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    table = pa.table({"text": ["a" * 1000, "b" * 1000, "c"]})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert map_batches(path)[0][0].column("text").to_pylist() == table["text"].to_pylist()
    content = path.read_bytes()
    offsets = struct.pack("<4i", 0, 1000, 2000, 2001)
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, struct.pack("<4i", 0, 1000, 2**30, 2**30 + 1)))
    with pytest.raises(DataError, match="cannot be read"):
        map_batches(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_arrow_file_with_any_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.arrow"
        lists = pa.array([[1, 2], [3], []], pa.large_list(pa.int32()))
        with pa.OSFile(str(path), "wb") as sink:
            table = pa.table({"list": lists, "text": pa.array(["ab", "c", "d"]).dictionary_encode()})
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
        with suppress(DataError):
            for batch in map_batches(path)[0]:
                batch.to_pylist()
