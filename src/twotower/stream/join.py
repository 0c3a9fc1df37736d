"""From the log to shards and daily partitions, one partition after the other, once or for ever."""

import fcntl
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from twotower.logs import Event, EventLog, Record, entities
from twotower.logs.events import USER
from twotower.schema.clock import day_of
from twotower.schema.errors import DataError, TwotowerError
from twotower.schema.tables import is_id
from twotower.stream.clock import joined_until
from twotower.stream.days import stale_days, write_day
from twotower.stream.joiner import Counts, Joiner
from twotower.stream.rows import Row, Types
from twotower.stream.shards import (
    Deleted,
    Manifest,
    State,
    manifests,
    merge,
    partition_folder,
    progress_of,
    tidy,
    total,
    write_shard,
)

log = logging.getLogger(__name__)

HOUR_MS: Final = 3_600_000
_BATCH: Final = 1000
_SHARD_ROWS: Final = 200_000
"""A shard ends once it has this many rows, however few events they are of."""
_DAYS_EVERY_S: Final = 60.0
"""How often a joiner that follows looks for days that are over in partitions without new events."""


class Taken(TwotowerError):
    """Another joiner has the partition."""


@dataclass(frozen=True)
class Windows:
    """How long things are waited for, in event time."""

    window_ms: int
    """A click may follow its request for so long."""
    lateness_ms: int
    """Events may be out of order by so much."""
    late_ms: int
    """A request is remembered for so long after its window, for late clicks."""
    idle_ms: int = 600_000
    """A partition without new events is left out of what all have reached once the others are this far ahead."""


@dataclass(frozen=True)
class JoinReport:
    """What `twotower join` did."""

    shards: int
    """Written, before any merging."""
    rows: int
    late: int
    duplicates: int
    watermark_ms: int | None
    """Event time up to which all partitions are joined, apart from idle ones."""
    events: int
    unjoined: int
    before_request: int
    clock_jumps: int
    dropped: dict[str, int]
    outcomes: dict[str, int]
    days: list[str] = field(default_factory=list)
    """Whose files were written."""


class PartitionJoin:
    """Joins one partition of the log into its shards; holds its lock.

    Args:
        event_log: read from where the shards end.
        folder: of all shards.
        partition: of the log.
        types: of ids and values.
        windows: how long things are waited for.
        shard_events: a shard is of at most so many events.
        merged_bytes: shards of one hour are merged up to this size.

    Raises:
        Taken: another joiner has the partition.
        DataError: shards are damaged, or are of another log.
    """

    def __init__(
        self,
        event_log: EventLog,
        folder: Path,
        partition: int,
        types: Types,
        windows: Windows,
        shard_events: int,
        merged_bytes: int,
    ) -> None:
        self.partition = partition
        self._log = event_log
        self._folder = folder
        self._types = types
        self._shard_events = shard_events
        self._merged_bytes = merged_bytes
        own = partition_folder(folder, partition)
        own.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(own / "joiner.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tidy(folder, partition)
            self.shards = manifests(folder, partition)
            last = self.shards[-1] if self.shards else None
            self._offset = last.end if last else 0
            self._flushes = last.state.flushes if last else ()
            settings = (types, windows.window_ms, windows.lateness_ms, windows.late_ms, self._fetch)
            if last is None:
                self._joiner = Joiner(*settings)
            else:
                replay = last.state.replay
                self._joiner = Joiner.resume(
                    *settings,
                    replay=replay,
                    flushes=self._flushes,
                    records=self._records(replay.offset, last.end),
                    end=last.end,
                )
        except BlockingIOError:
            os.close(self._lock)
            raise Taken(f"another joiner has {own}: stop it, or share the partitions with `--share K/N`") from None
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def watermark_ms(self) -> int | None:
        """Event time that is joined; None before any event."""
        return self._joiner.watermark_ms

    @property
    def hour_ended(self) -> bool:
        """The last shard ended with its hour."""
        return bool(self.shards) and self.shards[-1].hour != self._hour

    @property
    def _hour(self) -> int | None:
        latest_ms = self._joiner.clock.latest_ms
        return None if latest_ms is None else latest_ms // HOUR_MS

    def step(self) -> Manifest | None:
        """Join what comes next in the log, up to a shard's events or the end of an hour; None at the end of the log."""
        begin, hour, events, rows = self._offset, self._hour, 0, 0
        batches = list[list[Row]]()
        deleted, user_id = list[Deleted](), self._types.user_id
        while events < self._shard_events and rows < _SHARD_ROWS and self._hour == hour:
            records = self._log.read(self.partition, self._offset, min(_BATCH, self._shard_events - events))
            for record in records:
                event = record.event
                if batch := self._joiner.feed(record):
                    batches.append(batch)
                    rows += len(batch)
                if event.type == USER and entities.is_deletion(event) and is_id(event.user_id, user_id):
                    deleted.append(Deleted(event.user_id, self._first_row + rows))
                self._offset, events = record.next_offset, events + 1
                hour = self._hour if hour is None else hour
                if self._hour != hour or rows >= _SHARD_ROWS:
                    break
            if not records:
                break
        return self._commit(begin, hour, batches, deleted) if events else None

    def flush(self) -> Manifest | None:
        """Close every open window; None where there is none."""
        if not self._joiner.has_open:
            return None
        hour = self._hour
        rows = self._joiner.flush()
        self._flushes = (*self._flushes, self._offset)
        return self._commit(self._offset, hour, [rows], [])

    def merge_hours(self) -> None:
        """Merge the small shards of each hour that is over."""
        groups: list[list[Manifest]] = []
        size = 0
        for shard in self.shards:
            size += shard.bytes
            if not groups or shard.hour != groups[-1][0].hour or size > self._merged_bytes:
                groups.append([])
                size = shard.bytes
            groups[-1].append(shard)
        shards: list[Manifest] = []
        for group in groups:
            if group[0].hour == self._hour:
                shards += group
                continue
            for part in _mergeable(group):
                shards += self._merged(part)
        self.shards = shards

    def _merged(self, part: Sequence[Manifest]) -> Sequence[Manifest]:
        """One shard in the place of several; they stay as they are where one of them is damaged."""
        if len(part) == 1:
            return part
        try:
            return [merge(self._folder, part)]
        except (DataError, FileNotFoundError) as error:
            log.error("%d shards are not merged: %s", len(part), error)
            return part

    def write_days(
        self, events: Path, partitions: int, over_ms: int | None = None, only_over: bool = True
    ) -> list[str]:
        """Write the days that have new rows; gives their names.

        Args:
            events: the folder of all days.
            partitions: of the log.
            over_ms: the event time that all partitions have reached, where it is known.
            only_over: leave out the day that event time is in.
        """
        reached = [ms for ms in (self._joiner.clock.latest_ms, over_ms) if ms is not None]
        today = day_of(max(reached)) if reached else ""
        days = [day for day in stale_days(events, self.shards) if not only_over or day < today]
        for day in days:
            rows = write_day(events, self._folder, day, self.shards, self._types, partitions)
            log.info("partition %d: %s has %d joined rows", self.partition, day, rows)
        return days

    def close(self) -> None:
        """Let go of the partition."""
        os.close(self._lock)

    @property
    def _first_row(self) -> int:
        return self.shards[-1].end_row if self.shards else 0

    def _commit(self, begin: int, hour: int | None, batches: list[list[Row]], deleted: list[Deleted]) -> Manifest:
        replay = self._joiner.replay(self._offset)
        self._flushes = tuple(offset for offset in self._flushes if offset > replay.offset)
        manifest = write_shard(
            self._folder,
            batches,
            self._types,
            partition=self.partition,
            begin=begin,
            end=self._offset,
            first_row=self._first_row,
            hour=hour,
            watermark_ms=self._joiner.watermark_ms,
            counts=self._joiner.take_counts(),
            state=State(replay, self._flushes),
            deleted=deleted,
        )
        self.shards.append(manifest)
        return manifest

    def _fetch(self, offset: int) -> Event:
        return self._log.read(self.partition, offset, 1)[0].event

    def _records(self, offset: int, end: int) -> Iterator[Record]:
        """What the log holds from an offset up to another."""
        while offset < end:
            records = self._log.read(self.partition, offset, _BATCH)
            if not records:
                raise DataError(
                    f"partition {self.partition} was joined up to offset {end}, but the log ends at {offset}: "
                    "is it another log? Give it back, or remove the shards to join it anew"
                )
            for record in records:
                if record.offset >= end:
                    return
                yield record
            offset = records[-1].next_offset


def join(
    event_log: EventLog,
    folder: Path,
    events: Path | None,
    types: Types,
    windows: Windows,
    *,
    shard_events: int,
    merged_bytes: int,
    share: tuple[int, int] = (1, 1),
    flush: bool = False,
    follow_s: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> JoinReport:
    """Join the log up to its end, or for ever.

    Args:
        event_log: where events are read.
        folder: of the shards.
        events: the folder of all days; None = no daily partitions.
        types: of ids and values.
        windows: how long things are waited for.
        shard_events: a shard is of at most so many events.
        merged_bytes: shards of one hour are merged up to this size.
        share: (k, n): of n joiners this is the k-th, and has every n-th partition.
        flush: close every open window at the end.
        follow_s: wait so long at the end of the log and go on; None = end there.
        stopped: asked between two steps when to end.

    Raises:
        Taken: another joiner has one of the partitions.
        DataError: shards are damaged, or the log is.
    """
    written: list[Manifest] = []
    days: list[str] = []
    with ExitStack() as opened:
        opened.enter_context(_rare_collection())
        joins = [
            opened.enter_context(_closing(PartitionJoin(
                event_log, folder, partition, types, windows, shard_events, merged_bytes
            )))
            for partition in range(share[0] - 1, event_log.partitions, share[1])
        ]  # fmt: skip
        looked_s = time.monotonic()
        while not stopped():
            found = [manifest for one in joins if (manifest := one.step())]
            written += found
            for one in joins:
                if one.hour_ended:
                    one.merge_hours()
                    if follow_s is not None and events is not None:
                        days += one.write_days(events, event_log.partitions)
            if follow_s is not None and events is not None and time.monotonic() - looked_s >= _DAYS_EVERY_S:
                looked_s = time.monotonic()
                over_ms = joined_until(progress_of(folder, event_log).values(), windows.idle_ms)
                for one in joins:
                    days += one.write_days(events, event_log.partitions, over_ms)
            if not found and follow_s is None:
                break
            if follow_s is not None and sum(manifest.counts.events for manifest in found) < shard_events:
                time.sleep(follow_s)
        for one in joins:
            if flush and (manifest := one.flush()):
                written.append(manifest)
            if events is not None:
                days += one.write_days(events, event_log.partitions, only_over=False)
        reached = progress_of(folder, event_log)
    return _report(written, days, joined_until([reached[one.partition] for one in joins], windows.idle_ms))


def _report(written: list[Manifest], days: list[str], watermark_ms: int | None) -> JoinReport:
    counts: Counts = total(manifest.counts for manifest in written)
    outcomes: dict[str, int] = {}
    for manifest in written:
        for outcome, rows in manifest.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + rows
    return JoinReport(
        shards=len(written),
        rows=sum(manifest.rows for manifest in written),
        late=counts.late,
        duplicates=counts.duplicates,
        watermark_ms=watermark_ms,
        events=counts.events,
        unjoined=counts.unjoined,
        before_request=counts.before_request,
        clock_jumps=counts.clock_jumps,
        dropped=dict(sorted(counts.dropped.items())),
        outcomes=dict(sorted(outcomes.items())),
        days=sorted(set(days)),
    )


def _mergeable(group: list[Manifest]) -> list[list[Manifest]]:
    """A group with the empty shards of flushes at its edges apart: a merged shard has a name of its own."""
    inner = [place for place, shard in enumerate(group) if shard.begin < shard.end]
    if not inner:
        return [[shard] for shard in group]
    first, last = inner[0], inner[-1] + 1
    return [*([shard] for shard in group[:first]), group[first:last], *([shard] for shard in group[last:])]


@contextmanager
def _rare_collection() -> Iterator[None]:
    """Look for cyclic garbage less often: nearly everything here lives until its window closes, and looking through it
    again and again takes a third of the joiner's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def _closing(one: PartitionJoin) -> Iterator[PartitionJoin]:
    try:
        yield one
    finally:
        one.close()
