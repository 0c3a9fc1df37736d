"""The configured event log, to write or to read only."""

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


def _external(options: EventLogOptions, *, writes: bool) -> EventLog:
    kind, partitions = options.kind, options.partitions if writes else None
    if not options.url:
        example = _ADDRESSES[kind]
        raise ConfigError(f'stream.log.kind = "{kind}" needs an address: set stream.log.url, such as "{example}"')
    try:
        if kind == "redis":
            from twotower.logs.redis import RedisEventLog

            return RedisEventLog(options.url, options.name, partitions, options.sync if writes else "never")
        from twotower.logs.kafka import KafkaEventLog

        return KafkaEventLog(options.url, options.name, partitions, writes)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'stream.log.kind = "{kind}" needs a client that is not installed ({error}): pip install "twotower[{kind}]"'
        ) from None
