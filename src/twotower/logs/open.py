"""The configured event log, to write or to read only."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.logs.local import LocalEventLog
from twotower.logs.options import EventLogOptions
from twotower.logs.protocol import EventLog
from twotower.schema.errors import ConfigError

_ADDRESSES = {"redis": "redis://localhost:6379/0", "kafka": "localhost:9092"}
"""Examples for the addresses of external logs."""


def open_log(options: EventLogOptions, folder: Path) -> EventLog:
    """An event log to write and to read; `folder` is for the files of a `local` one.

    Raises:
        ConfigError: no address, a client that is not installed, another number of partitions.
        EventLogError: it cannot be opened.
    """
    if options.kind == "local":
        return LocalEventLog.open(folder, options.partitions, options.sync, options.sync_s)
    return _external(options, writes=True)


def open_reader(options: EventLogOptions, folder: Path) -> EventLog:
    """The same log to read only, while others write.

    Raises:
        ConfigError: no address, or a client that is not installed.
        DataError: there is no log.
        EventLogError: it cannot be opened.
    """
    return LocalEventLog.reader(folder) if options.kind == "local" else _external(options, writes=False)


def describe_log(options: EventLogOptions, folder: Path) -> str:
    """What keeps the log, its version, and whether there is a log yet; nothing is made.

    Raises:
        ConfigError: no address, a client that is not installed, another number of partitions, a server that keeps less
            than is promised.
        DataError: the log is damaged, or of another format.
        EventLogError: the server does not answer, or is too old.
    """
    name = "" if options.kind == "local" else f" {options.name}"
    server, partitions = _described(options, folder)
    if partitions is None:
        return f"{server}; no log{name} yet, the server makes it"
    if partitions != options.partitions:
        raise ConfigError(
            f"the log{name} has {partitions} partitions, {options.partitions} are configured: set "
            f"stream.log.partitions = {partitions}"
        )
    return f"{server}; the log{name} with {partitions} partitions"


def _described(options: EventLogOptions, folder: Path) -> tuple[str, int | None]:
    if options.kind == "local":
        return LocalEventLog.describe(folder)
    url = _address(options)
    with _client_of(options.kind):
        if options.kind == "redis":
            from twotower.logs.redis import describe as describe_redis

            return describe_redis(url, options.name, options.sync)
        from twotower.logs.kafka import describe as describe_kafka

        return describe_kafka(url, options.name)


def _external(options: EventLogOptions, *, writes: bool) -> EventLog:
    url, partitions = _address(options), options.partitions if writes else None
    with _client_of(options.kind):
        if options.kind == "redis":
            from twotower.logs.redis import RedisEventLog

            return RedisEventLog(url, options.name, partitions, options.sync if writes else "never")
        from twotower.logs.kafka import KafkaEventLog

        return KafkaEventLog(url, options.name, partitions, writes)


def _address(options: EventLogOptions) -> str:
    if options.url:
        return options.url
    raise ConfigError(
        f'stream.log.kind = "{options.kind}" needs an address: set stream.log.url, such as "{_ADDRESSES[options.kind]}"'
    )


@contextmanager
def _client_of(kind: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'stream.log.kind = "{kind}" needs a client that is not installed ({error}): pip install "twotower[{kind}]"'
        ) from None
