"""What the store in Redis does beyond the conformance suite; the server is Debian's, on loopback."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from twotower.features.open import open_store
from twotower.features.options import FeatureStoreOptions
from twotower.features.redis_store import RedisFeatureStore
from twotower.features.store import FeatureStoreError
from twotower.schema.errors import ConfigError


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def store(redis_url: str, name: str) -> RedisFeatureStore:
    return RedisFeatureStore(redis_url, name)


def test_stores_of_two_names_share_a_server(redis_url: str, name: str, store: RedisFeatureStore) -> None:
    other = RedisFeatureStore(redis_url, f"{name}-2")
    store.write({b"a": b"1"})
    assert other.scan(b"") == {}
    other.clear()
    assert store.get(b"a") == b"1"


def test_a_store_belongs_to_the_process_that_opened_it_last(
    redis_url: str, name: str, store: RedisFeatureStore
) -> None:
    store.write({b"a": b"1"})
    last = RedisFeatureStore(redis_url, name)
    for change in (lambda: store.write({b"a": b"2"}), store.clear, lambda: store.get(b"a"), lambda: store.scan(b"")):
        with pytest.raises(FeatureStoreError, match="another server has opened"):
            change()
    last.write({b"b": b"3"})
    assert last.scan(b"") == {b"a": b"1", b"b": b"3"}


def losing(answer: Callable[..., Any], made: bool) -> Callable[..., Any]:
    """A call that makes a change, or does not, and whose answer is lost."""

    def call(**arguments: Any) -> Any:
        if made:
            answer(**arguments)
        raise redis.TimeoutError("no answer")

    return call


@pytest.mark.parametrize("made", [True, False])
def test_after_a_lost_answer_the_store_says_what_it_has_and_goes_on(store: RedisFeatureStore, made: bool) -> None:
    store.write({b"a": b"1"})
    script = store._write
    store._write = losing(script, made)
    with pytest.raises(FeatureStoreError, match="cannot be written: no answer"):
        store.write({b"a": b"2"})
    store._write = script
    assert store.get(b"a") == (b"2" if made else b"1")
    store.write({b"b": b"3"})
    assert store.get(b"b") == b"3"


def test_a_change_that_comes_after_its_time_out_is_not_made(store: RedisFeatureStore) -> None:
    late: list[dict[str, Any]] = []
    script = store._write

    def delayed(**arguments: Any) -> Any:
        late.append(arguments)
        raise redis.TimeoutError("no answer")

    store._write = delayed
    with pytest.raises(FeatureStoreError):
        store.write({b"a": b"late"})
    assert store.get(b"a") is None
    script(**late[0])
    assert store.get(b"a") is None


@pytest.mark.parametrize("lost", ["emptied", "restored"])
def test_a_store_that_lost_changes_refuses_the_next_one(
    redis_url: str, name: str, store: RedisFeatureStore, lost: str
) -> None:
    client = redis.Redis.from_url(redis_url)
    store.write({b"a": b"1"})
    copy = client.dump(f"{name}:features")
    store.write({b"a": b"2"})
    if lost == "emptied":
        client.delete(f"{name}:features")
    else:
        client.restore(f"{name}:features", 0, copy, replace=True)
    with pytest.raises(FeatureStoreError, match="emptied or restored"):
        store.write({b"b": b"3"})
    assert store.scan(b"") == ({} if lost == "emptied" else {b"a": b"1"})
    store.write({b"b": b"3"})
    assert store.get(b"b") == b"3"


def test_a_killed_server_has_what_was_written_and_a_store_goes_on_with_it(redis_server: Any, name: str) -> None:
    store = RedisFeatureStore(redis_server.url, name)
    for step in range(3):
        store.write({b"a": b"%d" % step})
        redis_server.kill()
        began = time.monotonic()
        for use in (lambda: store.get(b"a"), lambda: store.write({b"b": b""}), lambda: store.scan(b"")):
            with pytest.raises(FeatureStoreError, match=rf"the feature store {name} in redis://127\.0\.0\.1:"):
                use()
        assert time.monotonic() - began < 10
        redis_server.start()
        assert store.scan(b"") == {b"a": b"%d" % step}


def test_a_server_that_cannot_be_reached_is_refused_at_once(name: str) -> None:
    with pytest.raises(FeatureStoreError, match=rf"{name} in redis://127\.0\.0\.1:1/0 cannot be opened"):
        RedisFeatureStore("redis://127.0.0.1:1/0", name)


def test_the_configured_store_is_opened(redis_url: str, name: str, tmp_path: Path) -> None:
    options = FeatureStoreOptions("redis", redis_url, name)
    store = open_store(options, tmp_path / "store")
    store.write({b"a": b"1"})
    assert isinstance(store, RedisFeatureStore)
    assert not (tmp_path / "store").exists()
    with pytest.raises(ConfigError, match=r"serve\.feature_store\.url = redis://h:6/0: .*ssl_ca_cert"):
        open_store(FeatureStoreOptions("redis", "redis://h:6/0?ssl_ca_cert=x"), tmp_path).get(b"a")
