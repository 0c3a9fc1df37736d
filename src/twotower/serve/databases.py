"""Which channels of the served version cannot be searched, because their vector database does not answer."""

import logging
import time
from collections.abc import Callable, Mapping

from twotower.index.build import connect
from twotower.publish.collections import collections_named
from twotower.schema.errors import TwotowerError
from twotower.serve.snapshots import Snapshots

PATIENCE_S = 5.0
"""A look that takes longer says that nothing answers."""

log = logging.getLogger(__name__)


class DatabaseWatch:
    """Looks at the collections of the served version; a server does it every second.

    Requests leave out what it names, instead of waiting for it, and ask again once it has answered. Probes and metrics
    tell the same, also without traffic.
    """

    def __init__(self, snapshots: Snapshots, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._snapshots = snapshots
        self._clock_s = clock_s
        self._began_s: float | None = None
        """When the look began that has not ended."""
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """By channel, why it cannot be searched; empty where all can."""
        began_s = self._began_s
        if began_s is None or self._clock_s() - began_s < PATIENCE_S:
            return self._problems
        return {
            channel: f"{collection.url} gives no answer"
            for channel, collection in collections_named(self._snapshots.version.manifest).items()
        }

    @property
    def nothing_left(self) -> bool:
        """Whether no channel can be searched."""
        return len(self.problems) == len(self._snapshots.version.channels)

    def look(self) -> None:
        """Ask the database for each collection of the served version."""
        self._began_s = self._clock_s()
        problems: dict[str, str] = {}
        away: dict[str, str] = {}  # by address: one that does not answer is asked once, for all channels
        for channel, collection in collections_named(self._snapshots.version.manifest).items():
            if collection.url in away:
                problems[channel] = away[collection.url]
                continue
            try:
                if not connect(collection.kind, collection.url).has(collection.name):
                    problems[channel] = f"{collection.name} is missing in {collection.url}: roll back or publish again"
            except TwotowerError as error:
                problems[channel] = away[collection.url] = str(error)
        if problems.keys() != self._problems.keys():
            for channel in sorted(problems.keys() - self._problems.keys()):
                log.error("channel %s cannot be searched: %s", channel, problems[channel])
            for channel in sorted(self._problems.keys() - problems.keys()):
                log.warning("channel %s can be searched again", channel)
        self._problems, self._began_s = problems, None
