"""Which channels of the served version cannot be searched, because their vector database does not answer."""

import logging
from collections.abc import Mapping

from twotower.index.build import connect
from twotower.publish.collections import collections_of_version
from twotower.schema.errors import TwotowerError
from twotower.serve.snapshots import Snapshots

log = logging.getLogger(__name__)


class DatabaseWatch:
    """Looks at the collections of the served version; a server does it every second.

    Requests do not wait for it: they ask every channel and leave out those that fail. It is for probes and metrics,
    which must tell the truth without traffic too.
    """

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots
        self._problems: dict[str, str] = {}

    @property
    def problems(self) -> Mapping[str, str]:
        """By channel, why it cannot be searched; empty where all can."""
        return self._problems

    @property
    def nothing_left(self) -> bool:
        """Whether no channel can be searched."""
        return len(self._problems) == len(self._snapshots.version.channels)

    def look(self) -> None:
        """Ask the database for each collection of the served version."""
        problems: dict[str, str] = {}
        for channel, collection in collections_of_version(self._snapshots.version.manifest).items():
            try:
                if not connect(collection.kind, collection.url).has(collection.name):
                    problems[channel] = f"{collection.name} is missing in {collection.url}: roll back or publish again"
            except TwotowerError as error:
                problems[channel] = str(error)
        if problems.keys() != self._problems.keys():
            for channel in sorted(problems.keys() - self._problems.keys()):
                log.error("channel %s cannot be searched: %s", channel, problems[channel])
            for channel in sorted(self._problems.keys() - problems.keys()):
                log.warning("channel %s can be searched again", channel)
        self._problems = problems
