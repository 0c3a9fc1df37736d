"""The incremental update: deltas out of joined samples, up to their end or for ever.

One updater at a time writes the chain of a version: it holds a lock in the chain's folder. Another one that follows
waits for it, and takes over where it ended.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from twotower.publish.delta import chain_folder
from twotower.publish.publish import current_path
from twotower.schema.errors import VersionError
from twotower.update.chain import Chain, Done, Plan

log = logging.getLogger(__name__)

LOCK = ".lock"

OpenChain = Callable[[Path], Chain]
"""Opens the chain of the version in a folder."""


@dataclass(frozen=True)
class UpdateReport:
    """What `twotower update` did."""

    kind: str
    version: str
    seq: int
    """The latest delta."""
    rows: int
    """Of the shards, or of the days, that were learned from."""
    watermark_ms: int | None
    refused: list[int] = field(default_factory=list)
    """Deltas that the gate refused."""
    plan: object = None
    """With `--dry-run`: what would be done."""


def update_incremental(
    versions: Path,
    deltas: Path,
    open_chain: OpenChain,
    *,
    dry_run: bool = False,
    follow_s: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], None] = time.sleep,
) -> UpdateReport:
    """Learn what there is for the served version, in deltas.

    Args:
        versions: the folder of all versions.
        deltas: the folder of the chains of all versions.
        open_chain: opens a version's chain.
        dry_run: say what the next delta would be made of, and write nothing.
        follow_s: go on for ever, looking so often for more; another updater is waited for, and another served version
            is changed to. None = up to the end of what there is.
        stopped: ends a run that follows.
        sleep: waits.

    Raises:
        VersionError: no version is served, or another updater is at work.
    """
    rows, refused = 0, list[int]()
    while True:
        path = current_path(versions)
        with _only_updater(deltas, path.name, dry_run) as alone:
            if not alone and follow_s is None:
                raise VersionError(f"another updater learns for {path.name}: stop it, or wait with --follow")
            if alone:
                with closing(open_chain(path)) as chain:
                    log.info("learning for %s from delta %d on", path.name, chain.seq + 1)
                    if dry_run:
                        return _report(chain, 0, [], chain.plan())
                    chain.tidy()
                    while not stopped() and (follow_s is None or current_path(versions) == path):
                        done = _next(chain)
                        if done is not None:
                            rows += done.rows
                            refused += [done.seq] if done.refused else []
                        elif follow_s is None:
                            break
                        else:
                            sleep(follow_s)
                    if follow_s is None or stopped():
                        return _report(chain, rows, refused, None)
        if stopped():
            return UpdateReport("incremental", path.name, 0, rows, None, refused)
        sleep(follow_s or 0.0)


def catch_up(path: Path, deltas: Path, open_chain: OpenChain) -> UpdateReport:
    """Learn what there is for a version that is not served yet.

    Args:
        path: its folder.
        deltas: the folder of the chains of all versions.
        open_chain: opens a version's chain.

    Raises:
        VersionError: another updater learns for it.
    """
    rows, refused = 0, list[int]()
    with _only_updater(deltas, path.name, False) as alone:
        if not alone:
            raise VersionError(f"another updater learns for {path.name}: stop it")
        with closing(open_chain(path)) as chain:
            chain.tidy()
            while (done := _next(chain)) is not None:
                rows += done.rows
                refused += [done.seq] if done.refused else []
            return _report(chain, rows, refused, None)


def _next(chain: Chain) -> Done | None:
    plan = chain.plan()
    return None if plan is None else chain.make(plan)


def _report(chain: Chain, rows: int, refused: list[int], plan: Plan | None) -> UpdateReport:
    return UpdateReport("incremental", chain.version.id, chain.seq, rows, chain.watermark_ms, refused, plan)


@contextmanager
def _only_updater(deltas: Path, version_id: str, dry_run: bool) -> Iterator[bool]:
    """Whether this is the one updater of a version; it is until the end of the context."""
    if dry_run:
        yield True
        return
    folder = chain_folder(deltas, version_id)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)
