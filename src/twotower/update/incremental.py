"""The incremental update: deltas out of joined samples, up to their end or for ever.

One updater at a time writes the chain of a version: it holds a lock in the chain's folder. Another one that follows
waits for it, and continues where it ended.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from twotower.publish.delta import chain_folder
from twotower.publish.publish import current_path
from twotower.schema.errors import UnavailableError, VersionError
from twotower.schema.locks import take_lock
from twotower.update.chain import Chain, Done
from twotower.update.learn import TOLD, Plan

log = logging.getLogger(__name__)

LOCK = ".lock"
AWAY_S = 2.0
"""Pause of a run that follows, while the vector database does not answer."""

OpenChain = Callable[[Path], Chain]
"""Opens the chain of the version in a folder."""


@dataclass(frozen=True)
class UpdateReport:
    """What `twotower update` did."""

    kind: str
    version: str
    seq: int
    """The latest delta."""
    rows: int = 0
    """Rows of the shards, or of the days, that were learned from."""
    watermark_ms: int | None = None
    refused: list[int] = field(default_factory=list)
    """Deltas that the gate refused; of a full update, positions in the list of days."""
    plan: object = None
    """With `--dry-run`: what would be done."""
    held_back: dict[str, int] = field(default_factory=dict)
    """Positives that were not trained, by the bound of `update.bounds` that they were beyond, or `risen`."""
    set_aside: list[str] = field(default_factory=list)
    """What could not be used, and why: shards, users, items, records of the log."""
    reasons: list[str] = field(default_factory=list)
    """Why deltas were refused."""

    def after(self, done: Done) -> "UpdateReport":
        """The report with one more delta."""
        held_back = Counter(self.held_back) + Counter(done.held_back)  # without zeros
        return replace(
            self,
            rows=self.rows + done.rows,
            refused=[*self.refused, *([done.seq] if done.refused else [])],
            held_back=dict(sorted(held_back.items())),
            set_aside=[*self.set_aside, *done.set_aside][-TOLD:],
            reasons=[*self.reasons, *done.refused][-TOLD:],
        )

    def of(self, chain: Chain) -> "UpdateReport":
        """The report with the current state of a chain."""
        aside = list(dict.fromkeys([*self.set_aside, *chain.unreadable]))
        return replace(
            self, version=chain.version.id, seq=chain.seq, watermark_ms=chain.state.watermark_ms, set_aside=aside
        )


def update_incremental(
    versions: Path,
    deltas: Path,
    open_chain: OpenChain,
    *,
    dry_run: bool = False,
    follow_s: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
) -> UpdateReport:
    """Learn what there is for the served version, in deltas.

    Args:
        versions: the folder of all versions.
        deltas: the folder of the chains of all versions.
        open_chain: opens a version's chain.
        dry_run: say what the next delta would be made of, and write nothing.
        follow_s: seconds between two looks for more, without end. Another updater is waited for, and when another
            version is served, its chain is learned. None = up to the end of what there is.
        stopped: asked whether a run that follows should end.
        sleep: waits.

    Raises:
        VersionError: no version is served, or another updater is at work.
        UnavailableError: the vector database of the version does not answer; a run that follows waits for it.
    """
    report = UpdateReport("incremental", "", 0)
    while True:
        path = current_path(versions)
        with _only_updater(deltas, path.name, dry_run) as alone:
            if not alone and follow_s is None:
                raise VersionError(f"another updater learns for {path.name}: stop it, or wait with --follow")
            if alone:
                with closing(open_chain(path)) as chain:
                    log.info("learning for %s from delta %d on", path.name, chain.seq + 1)
                    if dry_run:
                        plan = chain.plan()
                        return replace(report.of(chain), plan=plan)
                    chain.tidy()
                    while not stopped() and (follow_s is None or current_path(versions) == path):
                        plan = chain.plan()
                        if plan is None and follow_s is None:
                            break
                        if plan is None:
                            sleep(follow_s or 0.0)
                        elif done := _made(chain, plan, patient=follow_s is not None):
                            report = report.after(done)
                        else:
                            sleep(AWAY_S)
                    if follow_s is None or stopped():
                        return report.of(chain)
        if stopped():
            return replace(report, version=path.name)
        sleep(follow_s or 0.0)


def _made(chain: Chain, plan: Plan, patient: bool) -> Done | None:
    """What came of a plan; None where the vector database does not answer, which only a patient caller is told so."""
    try:
        return chain.make(plan)
    except UnavailableError as error:
        if not patient:
            raise
        log.error("delta %d of %s waits: %s", plan.seq, chain.version.id, error)
        return None


def catch_up(path: Path, deltas: Path, open_chain: OpenChain) -> UpdateReport:
    """Learn what there is for a version, given by its folder, that is not served yet.

    Raises:
        VersionError: another updater learns for it.
    """
    report = UpdateReport("incremental", path.name, 0)
    with _only_updater(deltas, path.name, False) as alone:
        if not alone:
            raise VersionError(f"another updater learns for {path.name}: stop it")
        with closing(open_chain(path)) as chain:
            chain.tidy()
            while (plan := chain.plan()) is not None:
                report = report.after(chain.make(plan))
            return report.of(chain)


@contextmanager
def _only_updater(deltas: Path, version_id: str, dry_run: bool) -> Iterator[bool]:
    """Whether this is the only updater of a version; it stays so until the end of the context."""
    if dry_run:
        yield True
        return
    folder = chain_folder(deltas, version_id)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(folder / LOCK, VersionError)
    except VersionError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
