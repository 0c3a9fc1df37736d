"""A feature store in Redis: values that outlive the machine of the server. The only file here that imports its client.

One hash, `<name>:features`, holds a store: a field for each key. Its field without a name holds the *mark*: the session
of the process that has the store, and the number of its latest change. A script on the server compares the mark and
makes the change in one step. So a change is never made twice, and never on top of content that was lost or that another
process wrote.
"""

import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from twotower.features.store import FeatureStoreError
from twotower.schema.errors import ConfigError
from twotower.schema.secrets import credentials, without_user

_TIMEOUT_S: Final = 2.0
"""How long an operation may take. Requests wait for `get`."""
_AT_ONCE: Final = 1000
"""Fields that one step of a scan looks at, about: other clients of the server wait for no more than that."""
_MAX_KEY_BYTES: Final = 511
_MARK: Final = b""

_WRITE: Final = """
local mark = redis.call('HGET', KEYS[1], '')
if mark == ARGV[2] then
  return mark
end
if mark ~= ARGV[1] then
  return mark or ''
end
local deleted = tonumber(ARGV[3])
for i = 4, 3 + deleted do
  redis.call('HDEL', KEYS[1], ARGV[i])
end
for i = 4 + deleted, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('HSET', KEYS[1], '', ARGV[2])
return ARGV[2]
"""
"""Makes a change if the mark is the expected one; gives the mark after it. A change that was made already stays."""

_CLEAR: Final = """
redis.call('UNLINK', KEYS[1])
redis.call('HSET', KEYS[1], '', ARGV[1])
"""

_RENEW: Final = """
local mark = redis.call('HGET', KEYS[1], '')
if mark and string.sub(mark, 1, #ARGV[1]) ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], '', ARGV[2])
return 1
"""
"""Gives a store a new mark, unless it has one of another session; 1 = it was done."""


class RedisFeatureStore:
    """A store in Redis; implements `FeatureStore`.

    After an error of `write` it is not known whether the change was made: read again what is there. `write` also fails
    once where the store lost earlier changes (it was emptied, or restored from a copy). Whoever opens a store takes it:
    the process that had it before gets errors from then on.

    Args:
        url: such as `redis://localhost:6379/0`, or `rediss://` for TLS with parameters such as `?ssl_ca_certs=FILE`.
            User and password come from `TWOTOWER_FEATURE_STORE_USER` and `TWOTOWER_FEATURE_STORE_PASSWORD`.
        name: before the name of its key, so that stores can share a server.

    Raises:
        ConfigError: the address cannot be read.
        FeatureStoreError: the server cannot be reached, or refuses.
    """

    def __init__(self, url: str, name: str) -> None:
        self._key = f"{name}:features"
        self._where = f"the feature store {name} in {without_user(url)}"
        self._redis: Any = _client(url)
        self._write = self._redis.register_script(_WRITE)
        self._clear = self._redis.register_script(_CLEAR)
        self._renew = self._redis.register_script(_RENEW)
        self._session = uuid.uuid4().hex.encode()
        self._changes = 0
        self._lock = threading.Lock()
        self._mark = self._next_mark()
        """What the store is expected to hold."""
        self._unsure = False
        """Whether the latest change was made is not known."""
        self._closed = False
        with self._refusals("cannot be opened"):
            self._redis.hset(self._key, _MARK, self._mark)

    def get(self, key: bytes) -> bytes | None:
        """See `FeatureStore.get`."""
        self._check_open()
        with self._refusals("cannot be read"):
            self._settle()
            value: bytes | None = self._redis.hget(self._key, key) if key else None
        return value

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """See `FeatureStore.write`."""
        self._check_open()
        for key in changes:
            if not 1 <= len(key) <= _MAX_KEY_BYTES:
                raise FeatureStoreError(f"a key has {len(key)} bytes: 1 to {_MAX_KEY_BYTES} are expected")
        deleted = [key for key, value in changes.items() if value is None]
        put = [part for key, value in changes.items() if value is not None for part in (key, value)]
        with self._refusals("cannot be written"), self._changing() as mark:
            found = self._write(keys=[self._key], args=[self._mark, mark, len(deleted), *deleted, *put])
            if found != mark:
                raise FeatureStoreError(
                    f"{self._where} does not hold what was written last: it was emptied or restored, or another server "
                    "has opened it. Nothing was changed"
                )

    def scan(self, prefix: bytes) -> dict[bytes, bytes]:
        """See `FeatureStore.scan`."""
        self._check_open()
        pattern = re.sub(rb"([\\*?\[\]^-])", rb"\\\1", prefix) + b"*"
        with self._refusals("cannot be read"):
            self._settle()
            found = dict(self._redis.hscan_iter(self._key, match=pattern, count=_AT_ONCE))
        found.pop(_MARK, None)
        return found

    def clear(self) -> None:
        """See `FeatureStore.clear`."""
        self._check_open()
        with self._refusals("cannot be emptied"), self._changing() as mark:
            self._clear(keys=[self._key], args=[mark])

    def close(self) -> None:
        """See `FeatureStore.close`."""
        self._closed = True
        self._redis.close()

    def _next_mark(self) -> bytes:
        self._changes += 1
        return b"%s:%d" % (self._session, self._changes)

    @contextmanager
    def _changing(self) -> Iterator[bytes]:
        """Make a change, one at a time; gives the mark that it leaves."""
        with self._lock:
            self._renew_mark()
            mark = self._next_mark()
            try:
                yield mark
            except BaseException:
                self._unsure = True
                raise
            self._mark = mark

    def _settle(self) -> None:
        """Before a read: a change that failed must not be made after it."""
        if self._unsure:
            with self._lock:
                self._renew_mark()

    def _renew_mark(self) -> None:
        """After a failed change: let the store have another mark than the one that the change expects."""
        if self._unsure:
            mark = self._next_mark()
            if not self._renew(keys=[self._key], args=[self._session, mark]):
                raise FeatureStoreError(
                    f"another server has opened {self._where}: stop one of the two, or set serve.feature_store.name"
                )
            self._mark, self._unsure = mark, False

    def _check_open(self) -> None:
        if self._closed:
            raise FeatureStoreError(f"{self._where} is closed")

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Give what the server or the connection refuses as the store's own error."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise FeatureStoreError(f"{self._where} {what}: {error}") from error


def _client(url: str) -> Any:
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            # Once, at once: an idle connection may be from before a restart of the server.
            retry=Retry(NoBackoff(), 1),
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # it refuses unknown parameters
    except (ValueError, TypeError) as error:
        raise ConfigError(f"serve.feature_store.url = {without_user(url)}: {error}") from None
    pool.connection_kwargs.update(credentials("FEATURE_STORE").given("username", "password"))
    return client


def describe(url: str) -> str:
    """The server at an address, with its version.

    Raises:
        ConfigError: the address cannot be read.
        FeatureStoreError: the server cannot be reached, or refuses.
    """
    client = _client(url)
    try:
        return f"Redis {client.info('server')['redis_version']} at {without_user(url)}"
    except (redis.RedisError, OSError) as error:
        raise FeatureStoreError(f"Redis at {without_user(url)} does not answer: {error}") from None
    finally:
        client.close()
