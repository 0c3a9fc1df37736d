"""Options of the event log."""

from typing import Literal

from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Address, Name, Positive, PositiveReal


@dataclass(frozen=True, config=STRICT)
class EventLogOptions:
    """The append-only log of raw events."""

    kind: Literal["local", "redis", "kafka"] = "local"
    """`local` is embedded."""
    url: Address | None = None
    """Address of an external log: `redis://HOST:6379/0` (`rediss` for TLS), or `HOST:9092` of Kafka's brokers, with
    commas; either takes parameters of its client, such as `?ssl_ca_certs=FILE` or `?security.protocol=SASL_SSL`. User
    and password come from the environment: `TWOTOWER_LOG_USER`, `TWOTOWER_LOG_PASSWORD`."""
    name: Name = "twotower"
    """`redis`, `kafka`: before the log's keys, or the name of its topic."""
    partitions: Positive = 4
    """Partitions by user, fixed when a log is made."""
    sync: Literal["always", "interval", "never"] = "always"
    """When an event counts as on disk: `always` flushes before it is acknowledged, `interval` flushes every `sync_s`
    seconds, `never` leaves it to the operating system (safe from a killed process, not from a power cut). A Redis
    server that does less is refused; Kafka acknowledges what all its replicas have."""
    sync_s: PositiveReal = 1.0
    """Seconds between flushes with `interval`."""
    erase_every_s: PositiveReal = 3600.0
    """Seconds between passes of the server over the log in which it erases the events of deleted users; a pass reads
    the whole log, and is made only if somebody was deleted since the last. In Kafka only retention erases."""
