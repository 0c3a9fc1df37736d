"""What the log in Kafka does beyond the conformance suite, against librdkafka's own brokers."""

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.logs import Event, EventLogError, open_log, open_reader
from twotower.logs.kafka import KafkaEventLog
from twotower.logs.options import EventLogOptions
from twotower.schema.errors import ConfigError, DataError

NOW_MS = 1_700_000_000_000


@pytest.fixture
def topic() -> str:
    return f"test-{uuid.uuid4().hex}"


def event(event_id: str, user_id: int = 1) -> Event:
    return Event(event_id, "click", user_id, NOW_MS, body={"item_id": 1})


def test_what_another_server_wrote_is_a_duplicate_here(kafka_servers: Callable[[str], str], topic: str) -> None:
    servers = kafka_servers(topic)
    one, two = KafkaEventLog(servers, topic), KafkaEventLog(servers, topic)
    [first] = one.append([event("a")])
    [again, other] = two.append([event("a"), event("b")])
    assert (again.offset, again.duplicate) == (first.offset, True)
    [third, known] = one.append([event("c"), event("b")])
    assert (third.offset, third.duplicate) == (other.offset + 1, False)
    assert (known.offset, known.duplicate) == (other.offset, True)
    assert [record.event.event_id for record in one.read(first.partition, 0, 10)] == ["a", "b", "c"]
    one.close()
    two.close()


def test_a_log_that_is_opened_to_read_refuses_to_write(
    kafka_servers: Callable[[str], str], topic: str, tmp_path: Path
) -> None:
    servers = kafka_servers(topic)
    writer = open_log(EventLogOptions(kind="kafka", url=servers, name=topic), tmp_path)
    [ack] = writer.append([event("a")])
    reader = open_reader(EventLogOptions(kind="kafka", url=servers, name=topic), tmp_path)
    assert [record.event.event_id for record in reader.read(ack.partition, 0, 10)] == ["a"]
    with pytest.raises(EventLogError, match="opened to read only"):
        reader.append([event("b")])
    reader.close()
    writer.close()


def test_a_topic_keeps_its_number_of_partitions(kafka_servers: Callable[[str], str], topic: str) -> None:
    servers = kafka_servers(topic)
    with pytest.raises(ConfigError, match=r"has 4 partitions, 3 are configured.*set stream\.log\.partitions = 4"):
        KafkaEventLog(servers, topic, partitions=3)


def test_a_topic_that_is_not_there_cannot_be_read(
    kafka_servers: Callable[[str], str], topic: str, tmp_path: Path
) -> None:
    servers = kafka_servers(f"{topic}-other")
    with pytest.raises(DataError, match=f"the topic {topic} of 127.* does not exist"):
        open_reader(EventLogOptions(kind="kafka", url=servers, name=topic), tmp_path)


def test_reading_goes_back_and_forth(kafka_servers: Callable[[str], str], topic: str) -> None:
    log = KafkaEventLog(kafka_servers(topic), topic)
    acks = log.append([event(f"e{n}") for n in range(50)])
    partition, offsets = acks[0].partition, [ack.offset for ack in acks]
    for place in (40, 3, 4, 5, 0, 49, 48):
        assert [record.offset for record in log.read(partition, offsets[place], 2)] == offsets[place : place + 2]
    log.close()


def test_brokers_that_cannot_be_reached_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.logs.kafka._TIMEOUT_S", 0.5)
    with pytest.raises(EventLogError, match=r"the topic t of 127\.0\.0\.1:1 cannot be opened"):
        KafkaEventLog("127.0.0.1:1", "t")
