"""The configured event log, to write or to read alone."""

from pathlib import Path
from typing import Literal

from twotower.logs.local import LocalEventLog
from twotower.logs.protocol import EventLog, Sync
from twotower.schema.errors import ConfigError

Kind = Literal["local", "redis", "kafka"]


def open_log(
    kind: Kind, folder: Path, url: str | None, name: str, partitions: int, sync: Sync, sync_s: float
) -> EventLog:
    """An event log to write and to read.

    Args:
        kind: of the log.
        folder: `local`: its files.
        url: `redis`, `kafka`: its address.
        name: `redis`, `kafka`: of the log there.
        partitions: fixed when the log is made.
        sync: when an event is acknowledged; `kafka` has its own rule.
        sync_s: `local`: seconds between flushes with `interval`.

    Raises:
        ConfigError: no address, a client that is not installed, another number of partitions.
        EventLogError: it cannot be opened.
    """
    if kind == "local":
        return LocalEventLog.open(folder, partitions, sync, sync_s)
    if kind == "redis":
        return _redis(url, name, partitions, sync)
    return _kafka(url, name, partitions, writes=True)


def open_reader(kind: Kind, folder: Path, url: str | None, name: str) -> EventLog:
    """The same log to read alone, while others write.

    Raises:
        ConfigError: no address, or a client that is not installed.
        DataError: there is no log.
        EventLogError: it cannot be opened.
    """
    if kind == "local":
        return LocalEventLog.reader(folder)
    if kind == "redis":
        return _redis(url, name, None, "never")
    return _kafka(url, name, None, writes=False)


def _redis(url: str | None, name: str, partitions: int | None, sync: Sync) -> EventLog:
    try:
        from twotower.logs.redis import RedisEventLog
    except ModuleNotFoundError as error:
        raise _absent("redis", error) from None
    return RedisEventLog(_given("redis", url, "redis://localhost:6379/0"), name, partitions, sync)


def _kafka(url: str | None, name: str, partitions: int | None, *, writes: bool) -> EventLog:
    try:
        from twotower.logs.kafka import KafkaEventLog
    except ModuleNotFoundError as error:
        raise _absent("kafka", error) from None
    return KafkaEventLog(_given("kafka", url, "localhost:9092"), name, partitions, writes)


def _given(kind: str, url: str | None, example: str) -> str:
    if not url:
        raise ConfigError(f'stream.log.kind = "{kind}" needs an address: set stream.log.url, such as "{example}"')
    return url


def _absent(extra: str, error: ModuleNotFoundError) -> ConfigError:
    return ConfigError(
        f'stream.log.kind = "{extra}" needs a client that is not installed ({error}): pip install "twotower[{extra}]"'
    )
