"""The served version, and its replacement while requests go on.

A request takes the snapshot once and keeps it to its end; a switch replaces one reference. A version that is damaged or
does not repeat its golden answers is refused, visibly, and the old one stays.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from twotower.publish.golden import replay
from twotower.publish.publish import current, existing_path
from twotower.publish.version import Version, open_version
from twotower.schema.errors import TwotowerError, VersionError

log = logging.getLogger(__name__)

POLL_S = 0.2


@dataclass(frozen=True)
class Refusal:
    """A version that did not go live."""

    version: str
    problem: str


class Snapshots:
    """Opens the version that `CURRENT` names and follows it.

    Args:
        versions: the folder of all versions.
        on_switch: called with the id of each version that goes live.

    Raises:
        VersionError: there is none yet, or it cannot be opened.
    """

    def __init__(self, versions: Path, on_switch: Callable[[str], None] = lambda _: None) -> None:
        self._versions = versions
        self._on_switch = on_switch
        self._stop = threading.Event()
        self._reloading = threading.Lock()
        self._follower: threading.Thread | None = None
        self.refused: Refusal | None = None
        version_id = current(versions)
        if version_id is None:
            raise VersionError(f"{versions} names no served version: run `twotower run` or `twotower publish` first")
        self._version = self._open(version_id)
        on_switch(version_id)

    @property
    def version(self) -> Version:
        """The served version; hold on to it for the whole of a request."""
        return self._version

    def reload(self) -> str:
        """Switch to what `CURRENT` names, if it is another version; gives the id that is served then."""
        with self._reloading:
            version_id = current(self._versions)
            if version_id is None or version_id == self._version.id:
                self.refused = None
                return self._version.id
            if self.refused is not None and self.refused.version == version_id:
                return self._version.id
            try:
                opened = self._open(version_id)
            except Exception as error:  # whatever is wrong with the new version, the old one answers on
                self.refused = Refusal(version_id, str(error) or repr(error))
                unexpected = not isinstance(error, TwotowerError)
                log.error("%s is refused, %s stays: %s", version_id, self._version.id, error, exc_info=unexpected)
                return self._version.id
            self._version = opened
            self.refused = None
            self._on_switch(version_id)
            log.info("now serving %s", version_id)
            return version_id

    def follow(self) -> None:
        """Start to look for another version every fifth of a second."""
        self._follower = threading.Thread(target=self._follow, name="versions", daemon=True)
        self._follower.start()

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._follower is not None:
            self._follower.join()

    def forget_refusal(self) -> None:
        """Let the next reload try a refused version again, after it was restored."""
        self.refused = None

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.reload()
            except OSError:
                log.exception("looking for a new version failed; the served one stays")

    def _open(self, version_id: str) -> Version:
        version = open_version(existing_path(self._versions, version_id))
        if problems := replay(version):
            raise VersionError(f"version {version_id} does not repeat its golden answers: {'; '.join(problems[:3])}")
        return version
