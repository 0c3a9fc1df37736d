"""`join`: the joiner of `twotower.stream`, out of a configuration."""

import logging
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.datasets.places import Places
from twotower.logs import open_reader
from twotower.pipeline.places import places
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.stream.join import JoinReport, join
from twotower.stream.rows import read_types

log = logging.getLogger(__name__)


def join_log(settings: Settings, *, follow: bool, flush: bool, share: str) -> JoinReport:
    """Join a workspace's event log, up to its end or until a signal ends it."""
    check_available(settings)
    where, options = places(settings), settings.stream
    types = read_types(where.workspace, settings.features.user, settings.features.context)
    with closing(open_reader(options.log, where.log)) as event_log, until_signals(follow) as stopped:
        return join(
            event_log,
            where.shards,
            where.events if _has_days(where) else None,
            types,
            options,
            share=_share(share),
            flush=flush,
            follow=follow,
            stopped=stopped.is_set,
        )


def _share(text: str) -> tuple[int, int]:
    """Which of how many joiners this is.

    >>> _share("2/3")
    (2, 3)
    """
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ConfigError(f"--share {text}: write K/N with K from 1 to N, such as 1/2 and 2/2 for two joiners")
    return int(match[1]), int(match[2])


def _has_days(where: Places) -> bool:
    """Joined days are written; not beside events without time."""
    if (where.events / f"{c.DATE}={c.UNKNOWN_DATE}").is_dir():
        log.warning("%s has events without time: no daily partitions are written beside them", where.events)
        return False
    return True


@contextmanager
def until_signals(follow: bool) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that what was begun is ended; without `follow` they stop the command."""
    stopped = threading.Event()
    if not follow:
        yield stopped
        return
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
