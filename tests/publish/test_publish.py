import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.channels.options import ModelsOptions
from twotower.config import Settings
from twotower.fusion.fuse import Fusion
from twotower.index.options import IndexOptions
from twotower.pipeline.line import latest_checkpoint, publish_version
from twotower.pipeline.places import places
from twotower.publish import publish as module
from twotower.publish.manifest import write_manifest
from twotower.publish.publish import (
    VersionParts,
    current,
    current_path,
    existing_path,
    list_versions,
    promote,
    publish,
    roll_back,
    verify,
)
from twotower.publish.version import open_version, read_manifest
from twotower.samples.columns_file import map_columns, write_table
from twotower.samples.read import open_samples
from twotower.schema.errors import DataError, VersionError
from twotower.schema.files import MANIFEST, folder_listing
from twotower.schema.locks import locked
from twotower.towers.two_tower import TwoTower


def versions_of(settings: Settings) -> Path:
    return places(settings).versions


def second(settings: Settings, parent: str | None, version_id: str = "29990101T000000000-second") -> str:
    """A copy of the served version under another id; a whole publication takes seconds."""
    versions = versions_of(settings)
    source = current_path(versions)
    for path in source.rglob("*"):
        if path.is_file():
            target = versions / version_id / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    rewrite(versions / version_id, id=version_id, parent=parent)
    return version_id


def rewrite(path: Path, **changes: object) -> None:
    manifest = {key: value for key, value in read_manifest(path).items() if key != "digest"}
    write_manifest(path, {**manifest, **changes})


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def kinds_of_files(settings: Settings) -> list[str]:
    path = current_path(versions_of(settings))
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_a_version_has_the_parts_that_its_layout_promises(world: Settings) -> None:
    assert kinds_of_files(world) == [
        "catalogue.arrow",
        "channels/item_cf/answering.json",
        "channels/item_cf/neighbours.arrow",
        "channels/popular/popular.arrow",
        "channels/two_tower/features.json",
        "channels/two_tower/index/index.faiss",
        "channels/two_tower/index/index.json",
        "channels/two_tower/index/rows.npy",
        "channels/two_tower/item_tower.onnx",
        "channels/two_tower/items.arrow",
        "channels/two_tower/tables.safetensors",
        "channels/two_tower/user_tower.onnx",
        "channels/two_tower/vocab.arrow",
        "clicks.arrow",
        "golden.json",
        "manifest.json",
        "rankers/items.arrow",
        "rankers/pre_rank/features.json",
        "rankers/pre_rank/ranker.json",
        "rankers/pre_rank/ranker.onnx",
        "rankers/pre_rank/tables.safetensors",
        "rankers/pre_rank/vocab.arrow",
        "rankers/rank/features.json",
        "rankers/rank/ranker.json",
        "rankers/rank/ranker.onnx",
        "rankers/rank/tables.safetensors",
        "rankers/rank/vocab.arrow",
        "users.arrow",
    ]
    path = current_path(versions_of(world))
    manifest = read_manifest(path)
    assert manifest["files"] == folder_listing(path)
    assert manifest["id"] == path.name
    assert manifest["parent"] is None
    assert manifest["checkpoint_sha256"] == latest_checkpoint(world).tensors_sha256
    assert manifest["watermark_ms"] == open_samples(places(world).samples).manifest["watermark_ms"]
    assert verify(path) == []


@pytest.mark.parametrize("place", [3, -7])
def test_one_flipped_bit_in_any_file_is_found_and_never_promoted(own_world: Settings, place: int) -> None:
    versions = versions_of(own_world)
    served = current(versions)
    version_id = second(own_world, parent=served)
    for name in kinds_of_files(own_world):
        file = versions / version_id / name
        flip(file, place)
        assert verify(versions / version_id), name
        with pytest.raises(VersionError):
            promote(versions, version_id)
        with pytest.raises(VersionError):
            open_version(versions / version_id)
        flip(file, place)
    assert current(versions) == served
    assert verify(versions / version_id) == []


@pytest.mark.parametrize("key", ["parent", "watermark_ms", "metrics"])
def test_a_changed_value_of_the_manifest_is_found(own_world: Settings, key: str) -> None:
    path = current_path(versions_of(own_world))
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, key: 5}))
    [problem] = verify(path)
    assert "does not have its own SHA-256" in problem


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"kind": "version", "format": 99}', '"\\udcff'])
def test_a_manifest_that_is_none_is_a_version_error(own_world: Settings, content: str) -> None:
    path = current_path(versions_of(own_world))
    (path / MANIFEST).write_text(content)
    assert len(verify(path)) == 1
    with pytest.raises(VersionError):
        open_version(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": []},
        {"files": None},
        {"configuration": {}},
        {"configuration": {"models": {"channels": [1]}}},
        {"fusion": "x"},
        {"watermark_ms": "x"},
        {"created_ms": True},
        {"parent": 1},
    ],
)
def test_a_manifest_of_another_shape_is_a_version_error(own_world: Settings, changes: dict[str, object]) -> None:
    path = current_path(versions_of(own_world))
    rewrite(path, **changes)
    with pytest.raises(VersionError, match=r"is of type|has no|no names|lists its files"):
        open_version(path)
    assert len(verify(path)) == 1


def test_a_version_that_lists_a_pipe_or_a_file_outside_of_it_is_refused_and_nothing_waits(own_world: Settings) -> None:
    path = current_path(versions_of(own_world))
    listing = read_manifest(path)["files"]
    os.mkfifo(path / "pipe")
    (path / "link").symlink_to("/proc/kmsg")
    entry = {"bytes": 0, "sha256": "0" * 64}
    rewrite(path, files={**listing, "pipe": entry, "link": entry, "/proc/kmsg": entry, "../x": entry})
    assert verify(path) == [
        "'../x' is no name of a file inside the folder",
        "'/proc/kmsg' is no name of a file inside the folder",
        "link is a link, or behind one",
        "pipe is no regular file",
    ]
    with pytest.raises(VersionError, match="pipe is no regular file"):
        open_version(path)


@pytest.mark.parametrize("name", ["clicks.arrow", "users.arrow", "catalogue.arrow", "channels/two_tower/items.arrow"])
def test_an_arrow_file_that_was_cut_and_hashed_again_is_refused(own_world: Settings, name: str) -> None:
    path = current_path(versions_of(own_world))
    content = (path / name).read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 8):
        (path / name).write_bytes(content[:size])
        rewrite(path, files=folder_listing(path))
        assert len(verify(path)) == 1
        with pytest.raises(VersionError, match="cannot be"):
            open_version(path)


def test_clicks_on_items_that_there_are_not_are_refused(own_world: Settings) -> None:
    path = current_path(versions_of(own_world))
    clicks = map_columns(path / "clicks.arrow")
    rows = clicks.column("item_row").to_numpy().copy()
    rows[0] = 10**6
    at = clicks.schema.get_field_index("item_row")
    write_table(path / "new", pa.table(clicks).set_column(at, "item_row", pa.array(rows)))
    (path / "new").replace(path / "clicks.arrow")
    rewrite(path, files=folder_listing(path))
    with pytest.raises(VersionError, match="clicks: the rows are from 0 to 1000000"):
        open_version(path)


def test_a_missing_file_is_found(own_world: Settings) -> None:
    path = current_path(versions_of(own_world))
    (path / "clicks.arrow").unlink()
    assert verify(path) == ["clicks.arrow is missing"]


def test_answers_that_are_not_the_golden_ones_are_found(own_world: Settings) -> None:
    path = current_path(versions_of(own_world))
    golden = json.loads((path / "golden.json").read_text())
    golden["queries"][0]["scores"][0] += 0.01
    swapped = next(query for query in golden["queries"] if query["channel"] == "popular")
    swapped["items"][0] = "no such item"
    (path / "golden.json").write_text(json.dumps(golden))
    rewrite(path, files=folder_listing(path))
    first, other = verify(path)
    assert "channel two_tower: a score is off by 0.01" in first
    assert "channel popular: 'no such item' is not among the items" in other


def test_tied_items_may_change_places(own_world: Settings) -> None:
    path = current_path(versions_of(own_world))
    golden = json.loads((path / "golden.json").read_text())
    items, scores = golden["queries"][0]["items"], golden["queries"][0]["scores"]
    items[3], items[4], scores[4] = items[4], items[3], scores[3]
    scores[3:5] = [(scores[3] + scores[4]) / 2] * 2
    (path / "golden.json").write_text(json.dumps(golden))
    rewrite(path, files=folder_listing(path))
    assert [problem for problem in verify(path) if "is not among" in problem] == []


def test_stray_and_half_written_folders_are_no_versions(own_world: Settings) -> None:
    versions = versions_of(own_world)
    served = current(versions)
    (versions / "notes").mkdir()
    (versions / "file").write_text("")
    (versions / ".tmp-half").mkdir()
    (versions / ".tmp-half" / MANIFEST).write_text("{}")
    (versions / "damaged").mkdir()
    (versions / "damaged" / MANIFEST).write_text("{")
    assert [version.id for version in list_versions(versions)] == [served]
    for name in ("notes", "file", ".tmp-half", "..", ".", "", f"../versions/{served}", "x" * 5000, "a\x00b"):
        with pytest.raises(VersionError, match="has no version"):
            existing_path(versions, name)
    with pytest.raises(VersionError, match="no whole version"):
        promote(versions, "damaged")


def test_a_roll_back_goes_to_the_parent_or_to_a_named_version(own_world: Settings) -> None:
    versions = versions_of(own_world)
    first = current(versions)
    assert first is not None
    with pytest.raises(VersionError, match="has no parent: name the version"):
        roll_back(versions)
    later = second(own_world, parent=first)
    promote(versions, later)
    assert roll_back(versions) == first == current(versions)
    assert roll_back(versions, later) == later == current(versions)


def test_a_roll_back_to_a_removed_parent_names_what_is_there(own_world: Settings) -> None:
    versions = versions_of(own_world)
    promote(versions, second(own_world, parent="20200101T000000000-gone"))
    with pytest.raises(VersionError, match="has no version 20200101T000000000-gone; it has 2"):
        roll_back(versions)


def test_a_version_that_is_pruned_while_it_is_checked_is_not_promoted(
    own_world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = versions_of(own_world)
    served = current(versions)
    later = second(own_world, parent=served)
    monkeypatch.setattr(module, "verify", lambda path: shutil.rmtree(path) or [])
    with pytest.raises(VersionError, match=f"has no version {later}"):
        promote(versions, later)
    assert current(versions) == served


def test_without_a_promoted_version_there_is_no_current_one(tmp_path: Path) -> None:
    assert current(tmp_path) is None
    with pytest.raises(VersionError, match="publish and promote a version first"):
        current_path(tmp_path)
    (tmp_path / "CURRENT").write_bytes(b"\xff\xfe")
    with pytest.raises(VersionError, match="has no version"):
        current_path(tmp_path)


def test_many_promotions_at_once_all_succeed(own_world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = versions_of(own_world)
    ids = [str(current(versions)), second(own_world, parent=None)]
    monkeypatch.setattr(module, "verify", lambda _: [])
    failures: list[Exception] = []

    def work(place: int) -> None:
        try:
            for turn in range(20):
                promote(versions, ids[(place + turn) % 2])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert current(versions) in ids


def test_a_second_publisher_is_refused_and_the_first_one_promotes_on(own_world: Settings) -> None:
    versions = versions_of(own_world)
    with locked(versions / module.LOCK, VersionError):
        with pytest.raises(VersionError, match=rf"another process \({os.getpid()}\) is publishing"):
            publish_version(own_world, promoted=False)
        promote(versions, str(current(versions)))  # a roll back need not wait for a publisher


def test_a_catalogue_that_changed_since_the_samples_is_refused(own_world: Settings) -> None:
    path = places(own_world).workspace / "items.parquet"
    items = pq.read_table(path)
    for changed in (items.slice(1), pa.concat_tables([items, with_id(items.slice(0, 1), "another")])):
        pq.write_table(changed, path)
        with pytest.raises(DataError, match="has other items"):
            publish_version(own_world, promoted=False)


def with_id(items: pa.Table, item_id: str) -> pa.Table:
    return items.set_column(items.column_names.index("item_id"), "item_id", pa.array([item_id]))


def test_samples_that_changed_since_the_checkpoint_are_refused(own_world: Settings) -> None:
    samples, checkpoint = open_samples(places(own_world).samples), latest_checkpoint(own_world)
    for name in ("features.json", "vocab.arrow"):
        files = {**samples.manifest["files"], name: {"sha256": "0" * 64}}
        with pytest.raises(DataError, match="was trained on other samples"):
            publish(
                versions_of(own_world),
                VersionParts(
                    replace(samples, manifest={**samples.manifest, "files": files}),
                    places(own_world).workspace / "items.parquet",
                    {"two_tower": checkpoint},
                    {},
                    {},
                    Fusion(),
                ),
                ModelsOptions(),
                IndexOptions("exact", 1.0),
                ks=[10],
                seed=0,
                recorded={},
            )


def test_a_tower_that_is_not_exported_as_trained_is_never_published(
    own_world: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(versions_of(own_world).iterdir())

    def spoiled(path: Path) -> TwoTower:
        def encode_users(columns: object) -> object:
            return original(columns) + np.float32(1e-3)

        model = load_model(path)
        original, model.encode_users = model.encode_users, encode_users
        return model

    load_model = module.load_model
    monkeypatch.setattr(module, "load_model", spoiled)
    with pytest.raises(VersionError, match=r"user_tower.onnx differs by 0.001 from the trained one"):
        publish_version(own_world, promoted=True)
    assert sorted(versions_of(own_world).iterdir()) == before


def test_publishing_again_removes_leftovers_and_gives_the_same_content_with_the_served_one_as_parent(
    own_world: Settings,
) -> None:
    versions = versions_of(own_world)
    first = str(current(versions))
    (versions / ".tmp-killed").mkdir()
    (versions / ".tmp-killed" / "half").write_text("")
    report = publish_version(own_world, promoted=False)
    assert current(versions) == first
    assert not list(versions.glob(".tmp-*"))
    old, new = (read_manifest(versions / name) for name in (first, report["version"]))
    assert new["parent"] == first
    changed = {name for name in old["files"] if old["files"][name] != new["files"][name]}
    assert changed <= {"channels/two_tower/index/index.json"}  # it tells the measured latency


def test_a_version_of_the_same_moment_is_not_replaced(own_world: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    served = current_path(versions_of(own_world))
    created_ms = read_manifest(served)["created_ms"]
    monkeypatch.setattr("twotower.pipeline.line.now_ms", lambda: created_ms)
    with pytest.raises(VersionError, match="a version is never replaced"):
        publish_version(own_world, promoted=False)
    assert verify(served) == []


def test_the_catalogue_keeps_every_attribute_in_the_order_of_ids(world: Settings) -> None:
    version = open_version(current_path(versions_of(world)))
    items = pq.read_table(places(world).workspace / "items.parquet").sort_by("item_id")
    assert version.catalogue.to_pydict() == items.to_pydict()
    assert pc.all(pc.equal(version.item_ids, open_samples(places(world).samples).items.ids)).as_py()
