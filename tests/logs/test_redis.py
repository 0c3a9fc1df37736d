"""What the log in Redis does beyond the conformance suite; the server is Debian's, on loopback."""

import logging
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis

from twotower.logs import Event, EventLogError, open_log, open_reader
from twotower.logs.options import EventLogOptions
from twotower.logs.redis import RedisEventLog
from twotower.schema.errors import ConfigError, DataError

NOW_MS = 1_700_000_000_000


@pytest.fixture
def name() -> str:
    return f"test-{uuid.uuid4().hex}"


def event(event_id: str, user_id: int = 1) -> Event:
    return Event(event_id, "click", user_id, NOW_MS, body={"item_id": 1})


def test_two_writers_write_an_id_once(redis_url: str, name: str) -> None:
    one, two = RedisEventLog(redis_url, name), RedisEventLog(redis_url, name)
    [first] = one.append([event("a")])
    [again, other] = two.append([event("a"), event("b")])
    assert (again.offset, again.duplicate) == (first.offset, True)
    assert (other.offset, other.duplicate) == (first.offset + 1, False)
    assert [record.event.event_id for record in one.read(first.partition, 0, 10)] == ["a", "b"]


def test_logs_of_two_names_share_a_server(redis_url: str, name: str) -> None:
    one, two = RedisEventLog(redis_url, name), RedisEventLog(redis_url, f"{name}-2")
    one.append([event("a")])
    assert two.ends() == [1, 1, 1, 1]
    assert not two.append([event("a")])[0].duplicate


def test_a_log_keeps_its_number_of_partitions(redis_url: str, name: str) -> None:
    RedisEventLog(redis_url, name, partitions=3).close()
    with pytest.raises(ConfigError, match=r"has 3 partitions, 4 are configured.*set stream\.log\.partitions = 3"):
        RedisEventLog(redis_url, name, partitions=4)
    assert RedisEventLog(redis_url, name, partitions=None).partitions == 3


def test_a_log_that_is_not_there_cannot_be_read(redis_url: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the log {name} in redis://127.* does not exist"):
        open_reader(EventLogOptions(kind="redis", url=redis_url, name=name), tmp_path)


def test_another_format_is_refused(redis_url: str, name: str) -> None:
    redis.Redis.from_url(redis_url).hset(f"{name}:log", mapping={"format": 9, "partitions": 4})
    with pytest.raises(DataError, match="another version wrote it"):
        RedisEventLog(redis_url, name)


def test_what_is_forgotten_is_gone_with_its_ids_and_offsets_go_on(redis_url: str, name: str) -> None:
    log = RedisEventLog(redis_url, name)
    acks = log.append([event(f"e{n}") for n in range(2500)])
    partition = acks[0].partition
    assert log.forget(partition, acks[2100].offset) == 2100
    assert [record.event.event_id for record in log.read(partition, 0, 2)] == ["e2100", "e2101"]
    with pytest.raises(DataError, match=f"keeps events from offset {acks[2100].offset} on, not from 5"):
        log.read(partition, 5, 1)
    [again, kept] = log.append([event("e7"), event("e2200")])
    assert (again.duplicate, again.offset) == (False, acks[-1].offset + 1)
    assert (kept.duplicate, kept.offset) == (True, acks[2200].offset)
    assert redis.Redis.from_url(redis_url).hlen(f"{name}:{{{partition}}}:ids") == 401


def test_what_was_erased_is_forgotten_with_the_rest(redis_url: str, name: str) -> None:
    log = RedisEventLog(redis_url, name)
    acks = log.append([event(f"e{number}") for number in range(30)])
    partition = acks[0].partition
    assert log.erase(partition, {1: acks[10].offset}) == 10
    assert log.forget(partition, acks[5].offset) == 5
    assert [record.offset for record in log.read(partition, 0, 100)] == [ack.offset for ack in acks[5:]]
    assert log.forget(partition, acks[-1].offset + 1) == 25
    client = redis.Redis.from_url(redis_url)
    assert client.hlen(f"{name}:{{{partition}}}:ids") == client.zcard(f"{name}:{{{partition}}}:erased") == 0
    assert log.ends()[partition] == acks[-1].offset + 1


def test_when_everything_is_forgotten_offsets_still_go_on(redis_url: str, name: str) -> None:
    log = RedisEventLog(redis_url, name)
    [ack] = log.append([event("a")])
    assert log.forget(ack.partition, ack.offset + 1) == 1
    assert log.read(ack.partition, 0, 10) == log.read(ack.partition, ack.offset + 1, 10) == []
    assert log.ends()[ack.partition] == ack.offset + 1
    with pytest.raises(DataError, match="keeps events from offset 2 on, not from 1"):
        log.read(ack.partition, 1, 10)
    assert log.append([event("b")])[0].offset == ack.offset + 1


def test_a_server_that_keeps_less_than_is_promised_is_refused(redis_url: str, name: str) -> None:
    client = redis.Redis.from_url(redis_url)
    try:
        client.config_set("appendfsync", "everysec")
        with pytest.raises(ConfigError, match=r"appendfsync everysec, less than stream\.log\.sync = 'always' promises"):
            RedisEventLog(redis_url, name)
        RedisEventLog(redis_url, name, sync="interval").close()
        client.config_set("appendfsync", "no")
        with pytest.raises(ConfigError, match="less than"):
            RedisEventLog(redis_url, name, sync="interval")
        RedisEventLog(redis_url, name, sync="never").close()
    finally:
        client.config_set("appendfsync", "always")


def test_a_server_that_does_not_say_how_it_flushes_is_trusted_with_a_warning(
    redis_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis.Redis.from_url(redis_url).execute_command(
        "ACL", "SETUSER", "plain", "on", ">secret", "~*", "&*", "+@all", "-config"
    )
    with caplog.at_level(logging.WARNING):
        log = RedisEventLog(redis_url.replace("redis://", "redis://plain:secret@"), name)
    assert "does not say how it flushes" in caplog.text
    assert "secret" not in caplog.text
    assert not log.append([event("a")])[0].duplicate


def test_a_server_that_cannot_be_reached_is_named_without_its_password(name: str) -> None:
    with pytest.raises(EventLogError, match=rf"the log {name} in redis://127\.0\.0\.1:1/0 cannot be opened"):
        RedisEventLog("redis://:secret@127.0.0.1:1/0", name)


@pytest.mark.parametrize(("kind", "example"), [("redis", "redis://localhost:6379/0"), ("kafka", "localhost:9092")])
def test_an_external_log_needs_an_address(kind: str, example: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf'stream\.log\.kind = "{kind}" needs an address.*{example}'):
        open_log(EventLogOptions(kind=kind), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "client"), [("redis", "redis"), ("kafka", "confluent_kafka")])
def test_a_client_that_is_not_installed_is_named(
    kind: str, client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, f"twotower.logs.{kind}", raising=False)
    monkeypatch.setitem(sys.modules, client, None)
    with pytest.raises(ConfigError, match=rf'a client that is not installed .*pip install "twotower\[{kind}\]"'):
        open_log(EventLogOptions(kind=kind, url="somewhere"), tmp_path)  # type: ignore[arg-type]


def test_an_address_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stream\.log\.url = http://localhost"):
        open_log(EventLogOptions(kind="redis", url="http://localhost"), tmp_path)


def test_a_killed_server_has_what_it_acknowledged_and_a_log_goes_on_with_it(redis_server: Any, name: str) -> None:
    log = RedisEventLog(redis_server.url, name)
    for step in range(5):
        sent = [event(f"{step}-{n}", n) for n in range(40)]
        acks = log.append(sent)
        redis_server.kill()
        with pytest.raises(EventLogError, match="send them again"):
            log.append([event("lost")])
        redis_server.start()
        again = log.append(sent)
        assert all(ack.duplicate for ack in again)
        assert [ack.offset for ack in again] == [ack.offset for ack in acks]
    found = [record.event.event_id for partition in range(4) for record in log.read(partition, 0, 1000)]
    assert sorted(found) == sorted(f"{step}-{n}" for step in range(5) for n in range(40))
