"""An event log in a Kafka topic.

An offset is Kafka's own. Kafka does not know the ids of events. So a writer reads each partition when it is opened,
keeps the digests of the ids, and before it writes reads what others have written since. A retry is then recognised on
every server, unless two servers write the same event in the same instant.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qsl

import confluent_kafka as kafka
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from twotower.logs.events import Event
from twotower.logs.partition import DIGEST_BYTES, by_partition, digest
from twotower.logs.payload import digest_of, payload_of, record_of
from twotower.logs.protocol import Ack, EventLogError, Record, check_kept, check_range
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.secrets import credentials, without_user

_LOGGER = logging.getLogger(__name__)

_TIMEOUT_S: Final = 10.0
_ASKED_S: Final = 2.0
"""How long brokers may take to say what they are."""
_BATCH: Final = 1000
_WAIT_MS: Final = 50
"""How long a fetch waits at the end of a partition; reading elsewhere goes on only after it."""
_MESSAGE_BYTES: Final = (16 << 20) + (1 << 10)
"""The largest message."""


PROPERTIES: Final = (
    "security.protocol",
    "sasl.mechanism",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.key.location",
    "ssl.endpoint.identification.algorithm",
)
"""Properties of librdkafka that the address of a log may have, under its own names."""


class KafkaEventLog:
    """An event log in a Kafka topic; implements `EventLog`.

    Args:
        url: `HOST:PORT` of some brokers, with commas; behind a `?`, properties of the client out of `PROPERTIES`. User
            and password come from `TWOTOWER_LOG_USER` and `TWOTOWER_LOG_PASSWORD`.
        topic: made where it does not exist.
        partitions: of the topic; None = as it was made.
        writes: read the ids of all kept events, so that `append` can tell retries. Without, `append` is refused.

    Raises:
        ConfigError: the topic has another number of partitions; the properties do not fit.
        DataError: without `partitions`, there is no such topic.
        EventLogError: no broker can be reached.
    """

    def __init__(
        self,
        url: str,
        topic: str,
        partitions: int | None = 4,
        writes: bool = True,
        clock_ms: ClockMs = now_ms,
    ) -> None:
        if partitions is not None and partitions < 1:
            raise ConfigError(f"partitions={partitions}: a log has at least one")
        self._topic = topic
        self._clock_ms = clock_ms
        self._where = f"the topic {topic} of {without_user(url)}"
        self._closed = False
        self._common = _common(url)
        with self._refusals("cannot be opened"):
            self._partitions = self._describe(partitions)
            self._extents = [_Extents(self._common) for _ in range(1 + writes)]
            self._readers = self._each(self._extents[0])
            self._writers: list[_PartitionWriter] = []
            if writes:
                settings = {
                    **self._common,
                    "acks": "all",
                    "enable.idempotence": True,
                    "linger.ms": 0,
                    "delivery.timeout.ms": int(_TIMEOUT_S * 1000),
                }
                self._writers = [
                    _PartitionWriter(kafka.Producer(settings), reader) for reader in self._each(self._extents[1])
                ]
                for writer in self._writers:
                    writer.catch_up()

    @property
    def partitions(self) -> int:
        """See `EventLog`."""
        return self._partitions

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """See `EventLog`."""
        self._check_open()
        if not self._writers:
            raise EventLogError(f"{self._where} was opened to read only: open it to write")
        logged_ms = self._clock_ms()
        payloads = [payload_of(event, logged_ms) for event in events]
        acks: dict[int, Ack] = {}
        for number, mine in by_partition(events, self._partitions).items():
            digests = [digest(events[place].event_id, events[place].user_id) for place in mine]
            with self._refusals("cannot take the events, send them again"):
                written = self._writers[number].write(digests, [payloads[place] for place in mine])
            acks.update(zip(mine, written, strict=True))
        return [acks[place] for place in range(len(events))]

    def read(self, partition: int, offset: int, limit: int) -> list[Record]:
        """See `EventLog`."""
        self._check_open()
        check_range(partition, self._partitions, offset, limit)
        reader = self._readers[partition]
        with self._refusals("cannot be read"):
            first, end = reader.extent()
            check_kept(offset, first, end, self._where)
            begin = max(offset, first)
            messages = reader.read(begin, min(end, begin + limit))
        return [record_of(message.offset(), message.offset() + 1, message.value()) for message in messages]

    def ends(self) -> list[int]:
        """See `EventLog`."""
        self._check_open()
        with self._refusals("cannot be read"):
            return [reader.extent()[1] for reader in self._readers]

    def erase(self, partition: int, users: Mapping[int | str, int]) -> None:  # noqa: ARG002
        """See `EventLog`: nothing can be changed in a topic, its retention is what ends there."""
        self._check_open()
        check_range(partition, self._partitions, 0, 1)

    def close(self) -> None:
        """See `EventLog`."""
        if self._closed:
            return
        self._closed = True
        connections: list[Any] = [*self._extents, *self._readers, *self._writers]
        with ExitStack() as closing:
            for connection in connections:
                closing.callback(connection.close)

    def _describe(self, partitions: int | None) -> int:
        """Make the topic, or check that what is there agrees; gives the number of its partitions."""
        admin = AdminClient(self._common)
        found = admin.list_topics(timeout=_TIMEOUT_S).topics.get(self._topic)
        if found is None:
            if partitions is None:
                raise DataError(f"{self._where} does not exist: a server makes it, or the first writer")
            settings = {"max.message.bytes": str(_MESSAGE_BYTES), "cleanup.policy": "delete"}
            new = NewTopic(self._topic, num_partitions=partitions, config=settings)
            admin.create_topics([new], operation_timeout=_TIMEOUT_S)[self._topic].result(timeout=_TIMEOUT_S)
            return partitions
        there = len(found.partitions)
        if partitions not in (None, there):
            raise ConfigError(
                f"{self._where} has {there} partitions, {partitions} are configured: adding some would move users to "
                f"others; set stream.log.partitions = {there}, or another stream.log.name"
            )
        return there

    def _each(self, extents: "_Extents") -> list["_Reader"]:
        return [_Reader(self._common, extents, self._topic, number) for number in range(self._partitions)]

    def _check_open(self) -> None:
        if self._closed:
            raise EventLogError(f"{self._where} is closed")

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """Give what brokers or the client refuse as the log's own error."""
        try:
            yield
        except (kafka.KafkaException, BufferError, TimeoutError) as error:
            raise EventLogError(f"{self._where} {what}: {error}") from error


def _security(parameters: str) -> dict[str, str]:
    """The properties by which a client encrypts connections and says who it is.

    Raises:
        ConfigError: a property that is not one of `PROPERTIES`; a user without SASL.

    >>> _security("security.protocol=SSL&ssl.ca.location=ca.pem")
    {'security.protocol': 'SSL', 'ssl.ca.location': 'ca.pem'}
    """
    properties = dict(parse_qsl(parameters, keep_blank_values=True))
    if unknown := sorted(properties.keys() - set(PROPERTIES)):
        raise ConfigError(
            f"stream.log.url has the property {unknown[0]} of a client: those that it may have are "
            f"{', '.join(PROPERTIES)}"
        )
    given = credentials("LOG").given("sasl.username", "sasl.password")
    if given and not properties.get("security.protocol", "").upper().startswith("SASL_"):
        raise ConfigError(
            "TWOTOWER_LOG_USER or TWOTOWER_LOG_PASSWORD is set, but stream.log.url does not ask for SASL: add "
            "?security.protocol=SASL_SSL to it"
        )
    return {**({"sasl.mechanism": "SCRAM-SHA-512"} if given else {}), **properties, **given}


def describe(url: str, topic: str) -> tuple[str, int | None]:
    """Name and number of the brokers, and the number of partitions of a topic; None where it does not exist yet.

    Raises:
        EventLogError: no broker answers.
    """
    try:
        told = AdminClient(_common(url)).list_topics(timeout=_ASKED_S)
    except kafka.KafkaException as error:
        raise EventLogError(f"no broker of {without_user(url)} answers: {error}") from error
    found = told.topics.get(topic)
    return f"Kafka, {len(told.brokers)} brokers", None if found is None else len(found.partitions)


def _common(url: str) -> dict[str, Any]:
    """What all clients of some brokers are made with."""
    servers, _, parameters = url.partition("?")
    return {
        "bootstrap.servers": servers,
        **_security(parameters),
        "socket.timeout.ms": int(_TIMEOUT_S * 1000),
        "message.max.bytes": _MESSAGE_BYTES,
        "log_level": 3,
        "logger": _LOGGER,
    }


def _consumer(common: dict[str, Any]) -> Any:
    """A consumer that keeps no offsets and is in no group: whoever reads keeps its own."""
    return kafka.Consumer(
        {
            **{name: value for name, value in common.items() if name != "logger"},
            "group.id": "none",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "fetch.wait.max.ms": _WAIT_MS,
            "fetch.message.max.bytes": _MESSAGE_BYTES,
        },
        logger=common["logger"],
    )


class _Extents:
    """Asks how far partitions reach, one thread at a time: of two threads on one client, the second may never end."""

    def __init__(self, common: dict[str, Any]) -> None:
        self._consumer = _consumer(common)
        self._lock = threading.Lock()

    def of(self, place: Any) -> tuple[int, int]:
        """The earliest offset that is kept, and the end."""
        with self._lock:
            first, end = self._consumer.get_watermark_offsets(place, timeout=_TIMEOUT_S)
        return first, end

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


class _Reader:
    """Reads one partition. Another connection asks where it ends, because on this one a waiting fetch comes first."""

    def __init__(self, common: dict[str, Any], extents: "_Extents", topic: str, partition: int) -> None:
        self.place = kafka.TopicPartition(topic, partition)
        self.extents = extents
        self._consumer = _consumer(common)
        self._lock = threading.Lock()
        self._next = -1

    def extent(self) -> tuple[int, int]:
        """The earliest offset that is kept, and the end."""
        return self.extents.of(self.place)

    def read(self, begin: int, end: int) -> list[Any]:
        """The messages from an offset up to another, all of which there are."""
        messages: list[Any] = []
        with self._lock:
            if begin < end and begin != self._next:
                self._consumer.assign([kafka.TopicPartition(self.place.topic, self.place.partition, begin)])
            self._next = -1  # after an error nothing is known
            position, deadline = begin, time.monotonic() + _TIMEOUT_S
            while position < end:
                found = self._consumer.consume(min(end - position, _BATCH), timeout=max(0, deadline - time.monotonic()))
                if not found:
                    raise TimeoutError(f"no message of offset {position} within {_TIMEOUT_S:g} s")
                for message in found:
                    if message.error():
                        raise kafka.KafkaException(message.error())
                messages += found
                position = found[-1].offset() + 1
            self._next = position
        return messages

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()


class _PartitionWriter:
    """Writes one partition, and knows the ids in it. It has its own producer, so that no writer waits for another."""

    def __init__(self, producer: Any, reader: _Reader) -> None:
        self._producer = producer
        self._reader = reader
        self._lock = threading.Lock()
        self._offsets: dict[bytes, int] = {}
        self._end = 0
        """Everything before this offset is in `_offsets`."""

    def catch_up(self) -> None:
        """Learn the ids of what was written since."""
        first, end = self._reader.extent()
        position = max(self._end, first)
        while position < end:
            upto = min(end, position + _BATCH)
            for message in self._reader.read(position, upto):
                self._offsets.setdefault(_mark(message), message.offset())
            position = upto
        self._end = max(self._end, end)

    def write(self, digests: Sequence[bytes], payloads: Sequence[bytes]) -> list[Ack]:
        """Write those whose digest is new; returns when all brokers that must have them do."""
        number = self._reader.place.partition
        with self._lock:
            self.catch_up()
            fresh: dict[bytes, bytes] = {}
            for key, payload in zip(digests, payloads, strict=True):
                if key not in self._offsets:
                    fresh.setdefault(key, payload)
            failures: list[Any] = []
            for key, payload in fresh.items():
                self._produce(number, key, payload, partial(self._delivered, key, failures))
            if self._producer.flush(2 * _TIMEOUT_S):
                raise TimeoutError(f"no report of a delivery within {2 * _TIMEOUT_S:g} s")
            if failures:
                raise kafka.KafkaException(failures[0])
            return [Ack(number, self._offsets[key], duplicate=fresh.pop(key, None) is None) for key in digests]

    def close(self) -> None:
        """Close the connection; everything acknowledged is written."""
        self._reader.close()

    def _produce(self, number: int, key: bytes, payload: bytes, delivered: Callable[[Any, Any], None]) -> None:
        """Put a message into the client's queue, when there is room in it."""
        while True:
            try:
                self._producer.produce(
                    self._reader.place.topic, payload, key=key, partition=number, on_delivery=delivered
                )
                return
            except BufferError:
                self._producer.poll(0.01)

    def _delivered(self, key: bytes, failures: list[Any], error: Any, message: Any) -> None:
        if error is not None:
            failures.append(error)
            return
        self._offsets[key] = message.offset()
        if message.offset() == self._end:
            self._end += 1


def _mark(message: Any) -> bytes:
    """The digest of a message's event: its key, except where another producer wrote it."""
    key = message.key()
    return key if key and len(key) == DIGEST_BYTES else digest_of(message.value() or b"")
