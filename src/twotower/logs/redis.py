"""An event log in Redis Streams: any number of writers and readers, on any machine.

    <name>:log                 format and number of partitions
    <name>:{<partition>}:events    a stream; the entry 0-7 is the event at offset 7
    <name>:{<partition>}:ids       the offset of each id that the stream holds, by digest
    <name>:{<partition>}:erased    what stands in the place of erased events, by offset

A script on the server looks an event's id up and adds the event in one step, so that writers need not know of each
other. Offsets count the events of a partition from 1 and are never used again.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final

import redis

from twotower.logs.events import Event
from twotower.logs.partition import by_partition, digest
from twotower.logs.payload import digest_of, erased_payload, payload_of, record_of, user_of
from twotower.logs.protocol import Ack, EventLogError, Record, Sync, check_kept, check_range
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.secrets import credentials, without_user

_LOGGER = logging.getLogger(__name__)

_FORMAT: Final = 1
_EVENT: Final = b"event"
_DIGEST: Final = b"id"
_OLDEST: Final = 7
"""The oldest usable Redis, which can choose the second half of an entry's id."""
_TIMEOUT_S: Final = 10.0
_ASKED_S: Final = 2.0
"""How long a server may take to say what it is."""
_AT_ONCE: Final = 1000
"""Entries that are forgotten, or looked through, in one step."""

_APPEND: Final = """
local acks = {}
for i = 1, #ARGV, 2 do
  local known = redis.call('HGET', KEYS[2], ARGV[i])
  if known then
    acks[#acks + 1] = -tonumber(known)
  else
    local id = redis.call('XADD', KEYS[1], '0-*', 'id', ARGV[i], 'event', ARGV[i + 1])
    local offset = string.sub(id, 3)
    redis.call('HSET', KEYS[2], ARGV[i], offset)
    acks[#acks + 1] = tonumber(offset)
  end
end
return acks
"""
"""Gives the offset of each event, negative where the id was there already."""

_ERASE: Final = """
local number = 0
for i = 1, #ARGV, 2 do
  if redis.call('XDEL', KEYS[1], '0-' .. ARGV[i]) == 1 then
    redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i] .. ':' .. ARGV[i + 1])
    number = number + 1
  end
end
return number
"""
"""Puts a stub in the place of each event."""

_DESCRIBE: Final = """
redis.call('HSETNX', KEYS[1], 'format', ARGV[1])
redis.call('HSETNX', KEYS[1], 'partitions', ARGV[2])
return redis.call('HMGET', KEYS[1], 'format', 'partitions')
"""


class RedisEventLog:
    """An event log in Redis; implements `EventLog`.

    Args:
        url: such as `redis://localhost:6379/0`, or `rediss://` for TLS with parameters such as `?ssl_ca_certs=FILE`.
            User and password come from `TWOTOWER_LOG_USER` and `TWOTOWER_LOG_PASSWORD`.
        name: before the names of its keys, so that logs can share a server.
        partitions: fixed when the log is made; None = as it was made.
        sync: what an acknowledgement promises: with `always` the server must flush before it answers
            (`appendfsync always`), with `interval` every second (`everysec`); `never` asks for nothing.

    Raises:
        ConfigError: the log has another number of partitions, or the server keeps less than `sync` promises.
        DataError: the keys are of another format, or, without `partitions`, there is no log.
        EventLogError: the server cannot be reached.
    """

    def __init__(
        self, url: str, name: str, partitions: int | None = 4, sync: Sync = "always", clock_ms: ClockMs = now_ms
    ) -> None:
        if partitions is not None and partitions < 1:
            raise ConfigError(f"partitions={partitions}: a log has at least one")
        self._name = name
        self._where = f"the log {name} in {without_user(url)}"
        self._redis = _client(url, _TIMEOUT_S)
        self._clock_ms = clock_ms
        self._closed = False
        self._append = self._redis.register_script(_APPEND)
        self._erase = self._redis.register_script(_ERASE)
        with self._refusals("cannot be opened"):
            self._partitions = self._describe(partitions)
            _check_durable(self._redis, self._where, sync)

    @property
    def partitions(self) -> int:
        """See `EventLog`."""
        return self._partitions

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See `EventLog`."""
        self._check_open()
        logged_ms = self._clock_ms()
        rows = [(digest(event.event_id, event.user_id), payload_of(event, logged_ms)) for event in events]
        acks: dict[int, Ack] = {}
        for number, mine in by_partition(events, self._partitions).items():
            arguments = [argument for place in mine for argument in rows[place]]
            with self._refusals("cannot take the events, send them again"):
                offsets = self._append(keys=[self._events(number), self._ids(number)], args=arguments)
            for place, offset in zip(mine, offsets, strict=True):
                acks[place] = Ack(number, abs(offset), duplicate=offset < 0)
        return [acks[place] for place in range(len(events))]

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """See `EventLog`."""
        self._check_open()
        check_range(partition, self._partitions, offset, limit)
        with self._refusals("cannot be read"):
            payloads = self._payloads(partition, offset, limit)
            if offset and next(iter(payloads), None) != offset:
                payloads = self._check_gap(partition, offset, limit)
        return [record_of(place, place + 1, payload) for place, payload in payloads.items()]

    def ends(self) -> list[int]:
        """See `EventLog`."""
        self._check_open()
        with self._refusals("cannot be read"):
            return [self._last(number) + 1 for number in range(self._partitions)]

    def forget(self, partition: int, before: int) -> int:
        """Remove the events before an offset, which every consumer has read, and their ids; gives their number."""
        self._check_open()
        check_range(partition, self._partitions, before, 1)
        forgotten = 0
        with self._refusals("cannot forget"):
            while entries := self._redis.xrange(self._events(partition), max=_id(max(0, before - 1)), count=_AT_ONCE):
                with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.hdel(self._ids(partition), *(fields.get(_DIGEST, b"") for _, fields in entries))
                    pipeline.xtrim(self._events(partition), minid=_id(_offset(entries[-1][0]) + 1), approximate=False)
                    pipeline.execute()
                forgotten += len(entries)
            last = max(0, before - 1)
            while stubs := self._redis.zrangebyscore(self._erased(partition), "-inf", last, start=0, num=_AT_ONCE):
                with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.hdel(self._ids(partition), *(digest_of(_stub(stub)[1]) for stub in stubs))
                    pipeline.zrem(self._erased(partition), *stubs)
                    pipeline.execute()
                forgotten += len(stubs)
        return forgotten

    def erase(self, partition: int, users: Mapping[int | str, int]) -> int:
        """See `EventLog`; the server's append-only file holds the events until it is written anew."""
        self._check_open()
        check_range(partition, self._partitions, 0, 1)
        number, offset, end = 0, 0, max(users.values(), default=0)
        with self._refusals("cannot be erased from"):
            while entries := self._redis.xrange(
                self._events(partition), min=_id(offset), max=_id(max(0, end - 1)), count=_AT_ONCE
            ):
                arguments: list[int | bytes] = []
                for entry, fields in entries:
                    user_id = user_of(fields.get(_EVENT, b""))
                    if user_id is not None and _offset(entry) < users.get(user_id, 0):
                        arguments += (_offset(entry), erased_payload(fields[_EVENT]))
                if arguments:
                    number += self._erase(keys=[self._events(partition), self._erased(partition)], args=arguments)
                offset = _offset(entries[-1][0]) + 1
        return number

    def close(self) -> None:
        """See `EventLog`."""
        self._closed = True
        self._redis.close()

    def _events(self, partition: int) -> str:
        return f"{self._name}:{{{partition}}}:events"

    def _ids(self, partition: int) -> str:
        return f"{self._name}:{{{partition}}}:ids"

    def _erased(self, partition: int) -> str:
        return f"{self._name}:{{{partition}}}:erased"

    def _payloads(self, partition: int, offset: int, limit: int) -> dict[int, bytes]:
        """What is stored from an offset on, by offset in ascending order: events, and what stands for erased ones."""
        with self._redis.pipeline(transaction=False) as pipeline:  # in this order: nothing that moves is missed
            pipeline.xrange(self._events(partition), min=_id(offset), count=limit)
            pipeline.zrangebyscore(self._erased(partition), offset, "+inf", start=0, num=limit)
            entries, stubs = pipeline.execute()
        payloads = {_offset(entry): fields.get(_EVENT, b"") for entry, fields in entries} | dict(map(_stub, stubs))
        return dict(sorted(payloads.items())[:limit])

    def _check_gap(self, partition: int, offset: int, limit: int) -> dict[int, bytes]:
        """What stands from an offset on, where nothing did before; a `DataError` where it is no offset to read at."""
        end = self._last(partition) + 1  # before the rest: others write
        payloads = self._payloads(partition, offset, limit)
        check_kept(offset, next(iter(payloads), end), end, self._where)
        return payloads

    def _last(self, partition: int) -> int:
        """The offset of the latest event that ever was in a partition, 0 without one."""
        if not self._redis.exists(self._events(partition)):
            return 0
        return _offset(self._redis.xinfo_stream(self._events(partition))["last-generated-id"])

    def _describe(self, partitions: int | None) -> int:
        """Write what the log is, or check that what is there agrees; gives the number of its partitions."""
        key = f"{self._name}:log"
        if partitions is None:
            found = self._redis.hmget(key, "format", "partitions")
            if found == [None, None]:
                raise DataError(f"{self._where} does not exist: a server makes it, or the first writer")
        else:
            found = self._redis.eval(_DESCRIBE, 1, key, _FORMAT, partitions)
        if found[0] != str(_FORMAT).encode() or not (found[1] or b"").isdigit():
            raise DataError(f"{self._where} says {found}, where format {_FORMAT} is expected: another version wrote it")
        there = int(found[1])
        if partitions not in (None, there):
            raise ConfigError(
                f"{self._where} has {there} partitions, {partitions} are configured: a log keeps the number it "
                f"was made with; set stream.log.partitions = {there}, or another stream.log.name"
            )
        return there

    def _check_open(self) -> None:
        if self._closed:
            raise EventLogError(f"{self._where} is closed")

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Give what the server or the connection refuses as the log's own error."""
        try:
            yield
        except (redis.RedisError, OSError) as error:  # OSError: a file of certificates that cannot be read
            raise EventLogError(f"{self._where} {what}: {error}") from error


def describe(url: str, name: str, sync: Sync) -> tuple[str, int | None]:
    """Name and version of a server, and the number of partitions of a log in it; None where there is no log yet.

    Raises:
        ConfigError: the server keeps less than `sync` promises.
        EventLogError: it does not answer, or is too old.
    """
    where = without_user(url)
    with closing(_client(url, _ASKED_S)) as client:
        try:
            version = client.info("server")["redis_version"]
            if int(version.partition(".")[0]) < _OLDEST:
                raise EventLogError(f"{where} is Redis {version}: {_OLDEST} or newer is needed")
            _check_durable(client, where, sync)
            partitions = client.hget(f"{name}:log", "partitions")
        except (redis.RedisError, OSError) as error:
            raise EventLogError(f"{where} does not answer: {error}") from error
    return f"Redis {version}", None if partitions is None else int(partitions)


def _client(url: str, timeout_s: float) -> Any:
    """A client of the server at an address; it connects when it is first used.

    Raises:
        ConfigError: it is no address.
    """
    try:
        client: Any = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # it refuses unknown parameters
    except (ValueError, TypeError) as error:
        raise ConfigError(f"stream.log.url = {without_user(url)}: {error}") from None
    pool.connection_kwargs.update(credentials("LOG").given("username", "password"))
    return client


def _check_durable(client: Any, where: str, sync: Sync) -> None:
    """Refuse a server that keeps less than is promised; one that does not say is trusted, with a warning."""
    if sync == "never":
        return
    try:
        said: dict[str, Any] = client.config_get("appendonly", "appendfsync")
    except redis.ResponseError as error:
        _LOGGER.warning("%s does not say how it flushes (%s): stream.log.sync = %r is its own", where, error, sync)
        return
    enough = ("always",) if sync == "always" else ("always", "everysec")
    if said.get("appendonly") != "yes" or said.get("appendfsync") not in enough:
        raise ConfigError(
            f"{where} has appendonly {said.get('appendonly')} and appendfsync {said.get('appendfsync')}, "
            f"less than stream.log.sync = {sync!r} promises: configure the server with appendonly yes and "
            f"appendfsync {enough[-1]}, or set stream.log.sync to what it keeps"
        )


def _id(offset: int) -> str:
    return f"0-{offset}"


def _offset(entry: bytes) -> int:
    """The offset of an entry; an id of another program is a `DataError`, because nothing can be appended behind it."""
    time, _, offset = entry.partition(b"-")
    if time != b"0":
        raise DataError(
            f"the stream has an entry {entry.decode()}, which something else wrote: remove it with XDEL, and let "
            "writers add entries as 0-*"
        )
    return int(offset)


def _stub(member: bytes) -> tuple[int, bytes]:
    """The offset and the payload that stands there for an erased event."""
    offset, _, payload = member.partition(b":")
    return int(offset), payload
