"""The served version with what was learned since, and its replacement while requests go on.

Deltas, and users and items that were put or deleted, are applied in their order within a fifth of a second, each in one
step. A request takes the snapshot once and keeps it to its end; a switch replaces one reference. A delta or a version
that fails any check is rejected visibly, and the server keeps serving what it served.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.publish.collections import check_collections
from twotower.publish.delta import Delta, Reports, folded_seqs, read_folded, read_next
from twotower.publish.golden import replay
from twotower.publish.manifest import DIGEST
from twotower.publish.overlay import EntityChanges, Overlay
from twotower.publish.publish import current, existing_path
from twotower.publish.version import Version, open_version
from twotower.schema.errors import TwotowerError, UnavailableError, VersionError
from twotower.serve.health import Health

log = logging.getLogger(__name__)

POLL_S = 0.2
AWAY_S = 5.0
"""Pause before a version whose vector database does not answer is tried again: all its files are read for that."""
FOLLOWER = "the follower of versions and deltas"
"""Names its thread."""
_NOTHING = EntityChanges()


@dataclass(frozen=True)
class Refusal:
    """A version or a delta that did not go live."""

    version: str
    problem: str
    delta_seq: int | None = None
    """The delta; None = the version itself."""
    passing: bool = False
    """It is tried again, because a system outside did not answer."""


@dataclass
class _Serving:
    """A version with what was learned since."""

    overlay: Overlay
    base: str
    """Digest of the version."""
    follows: str
    """Digest of the latest delta, or of the version."""
    version: Version
    """What requests see; replaced in one step."""
    shown: EntityChanges = _NOTHING
    refused: Refusal | None = None
    """The delta that did not go live."""
    skipped_to: int = 0
    """A folded delta of a higher number replaces the refused one."""
    reports: Reports = field(default_factory=Reports)


class Snapshots:
    """Opens the version that `CURRENT` names and follows it.

    Args:
        versions: the folder of all versions.
        on_switch: called with the id of each version that goes live.
        deltas: the folder of the deltas of all versions; None = there are none.
        entities: gives the users and items that were put or deleted.
        without_index: open a version although its vector database does not answer.

    Raises:
        UnavailableError: the vector database does not answer.
        VersionError: there is none yet, or it cannot be opened.
    """

    def __init__(
        self,
        versions: Path,
        on_switch: Callable[[str], None] = lambda _: None,
        deltas: Path | None = None,
        entities: Callable[[], EntityChanges] = lambda: _NOTHING,
        without_index: bool = False,
    ) -> None:
        self._versions = versions
        self._on_switch = on_switch
        self._deltas = deltas
        self._entities = entities
        self._without_index = without_index
        self._stop = threading.Event()
        self._switching = threading.Lock()
        self._advancing = threading.Lock()
        """Held for a moment only: opening a version goes on beside puts."""
        self._follower: threading.Thread | None = None
        self.refused: Refusal | None = None
        self._pauses_until_s = 0.0
        version_id = current(versions)
        if version_id is None:
            raise VersionError(f"{versions} names no served version: run `twotower run` or `twotower publish` first")
        self._serving = self._open(version_id)
        on_switch(version_id)

    @property
    def version(self) -> Version:
        """The served version; hold on to it for the whole of a request."""
        return self._serving.version

    @property
    def refused_delta(self) -> Refusal | None:
        """The delta of the served version that did not go live."""
        return self._serving.refused

    @property
    def gated(self) -> tuple[Refusal, ...]:
        """The latest deltas of the served version that the gate rejected."""
        serving = self._serving
        return tuple(Refusal(serving.version.id, "; ".join(reasons), seq) for seq, reasons in serving.reports.gated)

    @property
    def report(self) -> Mapping[str, Any]:
        """The updater's report of the latest delta, with the recall by hour over all deltas."""
        return {**self._serving.reports.latest, "recall": dict(self._serving.reports.recall)}

    @property
    def set_aside(self) -> Mapping[str, int]:
        """By kind, how many users and items have changes in the log that the served version cannot use."""
        return dict(self._serving.overlay.aside.count)

    @property
    def watermark_ms(self) -> int | None:
        """Event time up to which the served version has learned."""
        return self._serving.overlay.watermark_ms

    def reload(self) -> str:
        """Switch to the version that `CURRENT` names, apply what was learned and put since, and give its id."""
        with self._switching:
            self._switch()
            self.refresh()
            return self._serving.version.id

    def _look(self) -> None:
        """As `reload`; a version that has to wait for its database is not tried each time."""
        with self._switching:
            waits = self.refused is not None and self.refused.passing and time.monotonic() < self._pauses_until_s
            if not waits or self.refused is None or current(self._versions) != self.refused.version:
                self._switch()
            self.refresh()

    def heed(self, entities: Callable[[], EntityChanges]) -> None:
        """Take the users and items that were put or deleted from another source, now and from now on."""
        self._entities = entities
        self.refresh()

    def refresh(self) -> None:
        """Apply what was learned and put since."""
        with self._advancing:
            self._advance(self._serving)

    def follow(self, health: Health) -> None:
        """Start to look for another version, deltas and entities every fifth of a second."""
        self._follower = health.repeat(FOLLOWER, self._look, POLL_S, self._stop)

    def close(self) -> None:
        """Stop following."""
        self._stop.set()
        if self._follower is not None:
            self._follower.join()

    def forget_refusal(self) -> None:
        """Let the next reload try a refused version or delta again, after it was restored."""
        self.refused = self._serving.refused = None

    def _switch(self) -> None:
        """Serve what `CURRENT` names, with all that was learned since, in one step."""
        version_id = current(self._versions)
        if version_id is None or version_id == self._serving.version.id:
            self.refused = None
            return
        if self.refused is not None and self.refused.version == version_id and not self.refused.passing:
            return
        try:
            opened = self._open(version_id)
            with self._advancing:
                self._advance(opened)
                self._serving = opened
        except Exception as error:  # the old version goes on answering in any case
            again = self.refused is not None and self.refused.version == version_id  # it was told already
            problem = str(error) if again else _refused(version_id, self._serving.version.id, error)
            self.refused = Refusal(version_id, problem, passing=isinstance(error, UnavailableError))
            self._pauses_until_s = time.monotonic() + AWAY_S
            return
        self.refused = None
        self._on_switch(version_id)
        log.info("now serving %s", version_id)

    def _open(self, version_id: str) -> _Serving:
        version = open_version(existing_path(self._versions, version_id))
        try:
            check_collections(version.path, content=False)
            problems = replay(version)
        except UnavailableError as error:
            if not self._without_index:
                raise
            log.error(
                "%s is opened without its vector database, and not checked by golden queries: %s", version_id, error
            )
            problems = []
        if problems:
            raise VersionError(f"version {version_id} does not repeat its golden answers: {'; '.join(problems[:3])}")
        base = version.manifest[DIGEST]
        serving = _Serving(Overlay(version), base, base, version)
        self._advance(serving)
        return serving

    def _advance(self, serving: _Serving) -> None:
        """Apply further deltas and entities, in one step."""
        learned = self._learn(serving)
        entities = self._entities()
        if learned or (entities is not serving.shown and (entities.items or entities.users)):
            serving.version = serving.overlay.lay(entities)
        serving.shown = entities

    def _learn(self, serving: _Serving) -> bool:
        """Read the deltas after the served one, in order, up to one that is refused; gives whether there was one."""
        overlay, base, learned = serving.overlay, serving.overlay.base.id, False
        while self._deltas is not None:
            try:
                if (delta := self._next(self._deltas, serving)) is None:
                    break
                overlay.learn(delta)
                serving.reports.note(delta)
                serving.follows, serving.refused = delta.digest, None
                learned = True
            except Exception as error:  # what is served stays in any case
                what = f"delta {overlay.seq + 1} of {base}"
                serving.refused = Refusal(base, _refused(what, overlay.seq, error), overlay.seq + 1)
                serving.skipped_to = max(folded_seqs(self._deltas, base), default=0)
        return learned

    def _next(self, deltas: Path, serving: _Serving) -> Delta | None:
        """The next delta, or a folded one that replaces a refused one."""
        overlay = serving.overlay
        if serving.refused is None:
            return read_next(deltas, overlay.base.id, serving.base, overlay.seq, serving.follows)
        after = max(overlay.seq, serving.skipped_to)
        serving.skipped_to = max(folded_seqs(deltas, overlay.base.id), default=0)
        return read_folded(deltas, overlay.base.id, serving.base, after)


def _refused(what: str, kept: object, error: Exception) -> str:
    """Log that something is refused, and give the reason."""
    log.error("%s is refused, %s stays: %s", what, kept, error, exc_info=not isinstance(error, TwotowerError))
    return str(error) or repr(error)
