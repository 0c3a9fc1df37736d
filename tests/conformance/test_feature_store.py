"""What every feature store promises."""

import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from twotower.features.redis_store import RedisFeatureStore
from twotower.features.store import FeatureStore, FeatureStoreError, LmdbFeatureStore

Open = Callable[[], FeatureStore]


@pytest.fixture(params=["lmdb", "redis"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same store each time; close it before it is opened again."""
    if request.param == "lmdb":
        return lambda: LmdbFeatureStore(tmp_path / "store")
    url, name = request.getfixturevalue("redis_url"), f"test-{uuid.uuid4().hex}"
    return lambda: RedisFeatureStore(url, name)


@pytest.fixture
def store(open_store: Open) -> Iterator[FeatureStore]:
    opened = open_store()
    yield opened
    opened.close()


def test_a_key_that_was_never_written_has_no_value(store: FeatureStore) -> None:
    assert store.get(b"user/i/1") is None


def test_a_change_sets_replaces_and_deletes(store: FeatureStore) -> None:
    store.write({b"a": b"1", b"b": b"2"})
    store.write({b"a": b"3", b"b": None, b"absent": None})
    assert [store.get(key) for key in (b"a", b"b", b"absent")] == [b"3", None, None]


def test_values_may_be_empty_large_and_binary(store: FeatureStore) -> None:
    values = {b"empty": b"", b"large": bytes(300_000), b"\x00\xff": b"\x00\xff"}
    store.write(values)
    assert {key: store.get(key) for key in values} == values


def test_a_key_of_511_bytes_is_held_and_longer_or_empty_ones_are_refused(store: FeatureStore) -> None:
    store.write({b"k" * 511: b"v"})
    assert store.get(b"k" * 511) == b"v"
    for key in (b"k" * 512, b""):
        with pytest.raises(FeatureStoreError):
            store.write({b"beside": b"v", key: b"v"})
    assert store.get(b"beside") is None


def test_what_was_written_is_there_when_the_store_is_opened_again(open_store: Open) -> None:
    first = open_store()
    first.write({b"a": b"1"})
    first.close()
    first.close()
    again = open_store()
    assert again.get(b"a") == b"1"
    again.close()


def test_a_scan_gives_what_begins_with_a_prefix_and_nothing_else(store: FeatureStore) -> None:
    content = {b"a": b"0", b"b/1": b"1", b"b/2": b"2", b"b": b"3", b"b0": b"4", b"c": b"5"}
    store.write(content)
    assert store.scan(b"b/") == {b"b/1": b"1", b"b/2": b"2"}
    assert store.scan(b"d") == {}
    assert store.scan(b"") == content


def test_a_scan_takes_every_byte_of_a_prefix_as_it_is(store: FeatureStore) -> None:
    prefixes = [b"*", b"?", b"[a-c]", b"[^a]", b"\\", b"\\*", b"\xff\xfe", b"\n", b"\x00"]
    store.write({b"a": b"", b"abc": b"", b"b\n": b""} | {prefix + b"1": prefix for prefix in prefixes})
    for prefix in prefixes:
        assert store.scan(prefix)[prefix + b"1"] == prefix
        assert all(key.startswith(prefix) for key in store.scan(prefix))


def test_a_scan_of_many_keys_is_complete(store: FeatureStore) -> None:
    written = {b"%s/%d" % (kind, number): b"%d" % number for kind in (b"x", b"y") for number in range(5000)}
    store.write(written)
    assert store.scan(b"x/") == {key: value for key, value in written.items() if key.startswith(b"x/")}
    assert store.scan(b"") == written
    store.clear()
    assert store.scan(b"") == {}


def test_clear_deletes_every_key_and_leaves_a_store_to_write_to(store: FeatureStore) -> None:
    store.write({b"a": b"1", b"b": b"2"})
    store.clear()
    assert [store.get(b"a"), store.get(b"b")] == [None, None]
    store.write({b"a": b"3"})
    assert store.get(b"a") == b"3"


def test_threads_never_see_half_a_change(store: FeatureStore) -> None:
    store.write({b"n": b"0"})
    seen: list[bytes | None] = []

    def write() -> None:
        for step in range(200):
            store.write({b"n": b"%d" % step})

    def read() -> None:
        seen.extend(store.get(b"n") for _ in range(500))

    threads = [threading.Thread(target=work) for work in (write, read, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1500
    assert set(seen) <= {b"%d" % step for step in range(200)}
    assert store.get(b"n") == b"199"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FeatureStoreError, match="cannot be opened"):
        LmdbFeatureStore(tmp_path / "file")
