"""Options of the event log."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Positive, PositiveReal, Text


@dataclass(frozen=True, config=STRICT)
class EventLogOptions:
    """The append-only log of raw events."""

    kind: Literal["local", "redis", "kafka"] = "local"
    """`local` is embedded."""
    url: Text | None = None
    """Address of an external log: `redis://HOST:6379/0`, or `HOST:9092` of Kafka's brokers, with commas."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")] = "twotower"
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
