"""Daily partitions: every joined row of a day once, out of the shards, for `samples` and the full update.

    events/date=YYYY-MM-DD/joined-0000.parquet      the rows of one partition of the log

They are in the folders of imported files and have the same columns. A file is written again, as a whole, when its day
has new rows. It depends on the log alone, however often a joiner was killed.
"""

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.tables import codes
from twotower.logs.events import EntityId
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import DataError
from twotower.schema.files import whole_file
from twotower.schema.tables import joined_events
from twotower.stream.rows import FUNNEL, Types
from twotower.stream.shards import DeletedUser, Manifest, read_shard

log = logging.getLogger(__name__)

ROWS: Final = b"twotower.rows"
"""Key of a file's metadata: all rows of its day with a number below are in it."""
_DAY_BITS: Final = 40


def joined_path(events: Path, day: str, partition: int) -> Path:
    """The file of a day and a partition."""
    return events / f"{c.DATE}={day}" / f"joined-{partition:04d}.parquet"


def stale_days(events: Path, shards: Sequence[Manifest]) -> list[str]:
    """The days that have rows in some shard of a partition which their file lacks, or rows of users deleted since."""
    last_row: dict[str, int] = {}
    for shard in shards:
        last_row.update((day, rows.last_row) for day, rows in shard.days.items())
    stale = []
    for day, last in sorted(last_row.items()):
        path = joined_path(events, day, shards[0].partition)
        end_row = _written(path)
        if end_row <= last or _has_any(path, {user.user_id for user in _deleted(shards) if user.row >= end_row}):
            stale.append(day)
    return stale


def write_day(events: Path, folder: Path, day: str, shards: Sequence[Manifest], types: Types, partitions: int) -> int:
    """Write a day's file of one partition, whole or not at all; gives its number of rows.

    Of the rows of one request, user and item only the one that came furthest is kept, the latest of equals: a click
    that came after its window replaces the impression. What users did before they were deleted is left out. So are the
    rows of a damaged shard; the log says which.

    Args:
        events: the folder of all days.
        folder: the folder of all shards.
        day: `YYYY-MM-DD`.
        shards: all shards of the partition.
        types: the types of ids and values.
        partitions: how many the log has, so that no two partitions have the same `event_seq`.
    """
    holding = [shard for shard in shards if day in shard.days]
    partition, end_row = holding[0].partition, 1 + max(shard.days[day].last_row for shard in holding)
    begin_ms = DAY_MS * (datetime.date.fromisoformat(day) - datetime.date(1970, 1, 1)).days
    funnel = pa.schema({**FUNNEL, **types.context})
    schema = pa.schema([*joined_events(types.user_id, types.item_id), *funnel])
    kept = {*schema.names, *(f"{c.CONTEXT}{name}" for name in types.context)}
    nothing = pa.schema([field for field in holding[0].schema if field.name in kept]).empty_table()
    parts = [nothing.append_column(c.ROW, pa.array([], pa.int64()))]
    for shard in holding:
        try:
            rows = read_shard(folder, shard, columns=[name for name in shard.schema.names if name in kept])
        except DataError as error:
            log.error("%s is written without %d rows of a damaged shard: %s", day, shard.days[day].rows, error)
            end_row = min(end_row, shard.first_row)  # the day is written again until the shard is restored
            continue
        at = rows[c.REQUEST_TS_MS]
        parts.append(rows.filter(pc.and_(pc.greater_equal(at, begin_ms), pc.less(at, begin_ms + DAY_MS))))
    rows = _furthest(_without(pa.concat_tables(parts, promote_options="default"), _deleted(shards)))
    numbers = ((begin_ms // DAY_MS) << _DAY_BITS) + np.arange(rows.num_rows, dtype=np.int64) * partitions + partition
    columns = {name.removeprefix(c.CONTEXT): rows[name] for name in rows.column_names} | {c.EVENT_SEQ: numbers}
    missing = {field.name: pa.nulls(rows.num_rows, field.type) for field in schema}
    try:
        table = pa.table({name: (missing | columns)[name] for name in schema.names}).cast(schema)
    except pa.ArrowInvalid as error:
        raise DataError(f"the shards of {day} hold values of another type than events/ ({error})") from None
    with whole_file(joined_path(events, day, partition)) as temporary:
        pq.write_table(table.replace_schema_metadata({ROWS: str(end_row)}), temporary, compression="zstd")
    return len(numbers)


def _written(path: Path) -> int:
    """The number of the first row that is not in a day's file; 0 without a readable file, which is then written."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return 0
    return int(metadata.get(ROWS, b"0"))


def _deleted(shards: Sequence[Manifest]) -> list[DeletedUser]:
    return [user for shard in shards for user in shard.deleted]


def _has_any(path: Path, users: set[EntityId]) -> bool:
    """A day's file has rows of some users."""
    if not users:
        return False
    stored = pq.ParquetFile(path).read([c.USER_ID])[c.USER_ID]
    return bool(pc.any(pc.is_in(stored, pa.array(list(users), stored.type))).as_py())


def _without(rows: pa.Table, deleted: Sequence[DeletedUser]) -> pa.Table:
    """The rows without those of users who were deleted after them."""
    if not deleted:
        return rows
    until = {user.user_id: user.row for user in deleted}  # the last deletion of a user counts
    place = pc.index_in(rows[c.USER_ID], pa.array(list(until), rows.schema.field(c.USER_ID).type))
    before = pc.less(rows[c.ROW], pa.array(list(until.values()), pa.int64()).take(place))
    return rows.filter(pc.invert(pc.fill_null(before, False)))


def _furthest(rows: pa.Table) -> pa.Table:
    """One row for each item of a request, in the order of time, then of the rows' numbers."""
    ranks = pc.index_in(rows[c.OUTCOME], pa.array(c.OUTCOMES)).to_numpy()
    number = rows[c.ROW].to_numpy()
    request, user, item = (codes(rows[name]) for name in (c.REQUEST_ID, c.USER_ID, c.ITEM_ID))
    named = rows[c.REQUEST_ID].is_valid().to_numpy()
    request = np.where(named, request, -1 - number)  # a row without a request stands alone
    best = np.lexsort((number, ranks, item, request, user))
    keys = np.stack([user, request, item])[:, best]
    kept = best[np.append((keys[:, 1:] != keys[:, :-1]).any(axis=0), True)[: len(best)]]
    order = np.lexsort((number[kept], rows[c.REQUEST_TS_MS].to_numpy()[kept]))
    return rows.take(pa.array(kept[order]))
