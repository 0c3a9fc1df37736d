"""From the log to shards and daily partitions, one partition after the other, once or for ever."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from twotower.logs import Event, EventLog, Record
from twotower.logs.events import USER, EntityDeleted
from twotower.schema.clock import HOUR_MS, day_of
from twotower.schema.errors import DataError, TwotowerError
from twotower.schema.locks import take_lock
from twotower.schema.tables import is_id
from twotower.stream.clock import joined_until
from twotower.stream.days import stale_days, write_day
from twotower.stream.joiner import JoinCounts, Joiner
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Row, Types
from twotower.stream.shards import (
    DeletedUser,
    JoinState,
    Manifest,
    manifests,
    merge,
    partition_folder,
    progress_of,
    summed,
    tidy,
    total,
    write_shard,
)

log = logging.getLogger(__name__)

_BATCH: Final = 1000
_SHARD_ROWS: Final = 200_000
"""A shard ends once it has this many rows, however few events they are of."""
_DAYS_EVERY_S: Final = 60.0
"""How often a joiner that follows looks for days that are over in partitions without new events."""


class Taken(TwotowerError):
    """Another joiner has the partition."""


@dataclass(frozen=True)
class JoinReport:
    """What `twotower join` did."""

    shards: int
    """Shards that were written, before any merging."""
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
    """Days whose files were written."""


class PartitionJoin:
    """Joins one partition of the log into its shards, from where these end; holds the partition's lock.

    Raises:
        Taken: another joiner has the partition.
        DataError: shards are damaged, or are of another log.
    """

    def __init__(self, event_log: EventLog, folder: Path, partition: int, types: Types, options: StreamOptions) -> None:
        self.partition = partition
        self._log = event_log
        self._folder = folder
        self._types = types
        self._options = options
        own = partition_folder(folder, partition)
        own.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(
            own / "joiner.lock",
            lambda holder: Taken(
                f"another joiner has {own}, in {holder}: stop it, or share the partitions with `--share K/N`"
            ),
        )
        try:
            tidy(folder, partition)
            self.shards = manifests(folder, partition)
            last = self.shards[-1] if self.shards else None
            self._offset = last.end if last else 0
            self._flushes = last.state.flushes if last else ()
            self._joiner = Joiner(types, options, self._fetch)
            if last is not None:
                replay = last.state.replay
                self._joiner.resume(replay, self._flushes, self._records(replay.offset, last.end), last.end)
        except BaseException:
            self._lock.release()
            raise

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
        begin, hour, events, rows, most = self._offset, self._hour, 0, 0, self._options.shard_events
        batches = list[list[Row]]()
        deleted, user_id = list[DeletedUser](), self._types.user_id
        while events < most and rows < _SHARD_ROWS and self._hour == hour:
            records = self._log.read(self.partition, self._offset, min(_BATCH, most - events))
            for record in records:
                content = record.event.content
                if batch := self._joiner.feed(record):
                    batches.append(batch)
                    rows += len(batch)
                if isinstance(content, EntityDeleted) and content.kind == USER and is_id(content.entity_id, user_id):
                    deleted.append(DeletedUser(content.entity_id, self._first_row + rows))
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
            last = groups[-1][0] if groups else shard
            apart = shard.hour != last.hour or shard.files.keys() != last.files.keys()
            if not groups or apart or size > self._options.merged_mb << 20:
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
        """One shard in place of several; they stay as they are where one of them is damaged."""
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

        With `only_over`, without the day that event time is in. `over_ms` is the event time that all partitions have
        reached, where it is known.
        """
        reached = [ms for ms in (self._joiner.clock.latest_ms, over_ms) if ms is not None]
        today = day_of(max(reached)) if reached else ""
        days = [day for day in stale_days(events, self.shards) if not only_over or day < today]
        for day in days:
            rows = write_day(events, self._folder, day, self.shards, self._types, partitions)
            log.info("partition %d: %s has %d joined rows", self.partition, day, rows)
        return days

    def close(self) -> None:
        """Release the partition."""
        self._lock.release()

    @property
    def _first_row(self) -> int:
        return self.shards[-1].end_row if self.shards else 0

    def _commit(self, begin: int, hour: int | None, batches: list[list[Row]], deleted: list[DeletedUser]) -> Manifest:
        replay = self._joiner.replay(self._offset)
        self._flushes = tuple(offset for offset in self._flushes if offset > replay.offset)
        manifest = write_shard(
            self._folder,
            batches,
            self._types,
            Manifest(
                partition=self.partition,
                begin=begin,
                end=self._offset,
                first_row=self._first_row,
                hour=hour,
                watermark_ms=self._joiner.watermark_ms,
                counts=self._joiner.take_counts(),
                state=JoinState(replay, self._flushes),
                deleted=tuple(deleted),
            ),
        )
        self.shards.append(manifest)
        return manifest

    def _fetch(self, offset: int) -> Event:
        return self._log.read(self.partition, offset, 1)[0].event

    def _records(self, offset: int, end: int) -> Iterator[Record]:
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
    options: StreamOptions,
    *,
    share: tuple[int, int] = (1, 1),
    flush: bool = False,
    follow: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> JoinReport:
    """Join the log up to its end, or for ever.

    Args:
        event_log: where events are read.
        folder: the folder of all shards.
        events: the folder of all days; None = no daily partitions.
        types: the types of ids and values.
        options: the options of the joiner.
        share: (k, n): this is the k-th of n joiners, and has every n-th partition.
        flush: close every open window at the end.
        follow: wait for more at the end of the log.
        stopped: asked between two steps whether to end.

    Raises:
        Taken: another joiner has one of the partitions.
        DataError: shards or the log are damaged.
    """
    written: list[Manifest] = []
    days: list[str] = []
    with ExitStack() as opened:
        opened.enter_context(_rare_collection())
        joins = [
            opened.enter_context(closing(PartitionJoin(event_log, folder, partition, types, options)))
            for partition in range(share[0] - 1, event_log.partitions, share[1])
        ]
        looked_s = time.monotonic()
        while not stopped():
            stepped = [manifest for partition_join in joins if (manifest := partition_join.step())]
            written += stepped
            for partition_join in joins:
                if partition_join.hour_ended:
                    partition_join.merge_hours()
                    if follow and events is not None:
                        days += partition_join.write_days(events, event_log.partitions)
            if follow and events is not None and time.monotonic() - looked_s >= _DAYS_EVERY_S:
                looked_s = time.monotonic()
                over_ms = joined_until(progress_of(folder, event_log).values(), options.idle_ms)
                for partition_join in joins:
                    days += partition_join.write_days(events, event_log.partitions, over_ms)
            if not stepped and not follow:
                break
            if follow and sum(manifest.counts.events for manifest in stepped) < options.shard_events:
                time.sleep(options.follow_s)
        for partition_join in joins:
            if flush and (manifest := partition_join.flush()):
                written.append(manifest)
            if events is not None:
                days += partition_join.write_days(events, event_log.partitions, only_over=False)
        reached = progress_of(folder, event_log)
    return _report(
        written, days, joined_until([reached[partition_join.partition] for partition_join in joins], options.idle_ms)
    )


def _report(written: list[Manifest], days: list[str], watermark_ms: int | None) -> JoinReport:
    counts: JoinCounts = total(manifest.counts for manifest in written)
    return JoinReport(
        **(vars(counts) | {"dropped": dict(sorted(counts.dropped.items()))}),
        shards=len(written),
        rows=sum(manifest.rows for manifest in written),
        watermark_ms=watermark_ms,
        outcomes=summed(manifest.outcomes for manifest in written),
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
    """Collect cyclic garbage less often: nearly everything here lives until its window closes, and collecting at the
    default rate takes a third of the joiner's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
