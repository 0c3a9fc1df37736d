"""What the full update needs beside the stages that it runs: which days are due, the rows of a day, the gate's figures.

D vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_untrained
from twotower.features.columns import Bag, take
from twotower.features.feature_set import HISTORY
from twotower.logs import EventLog
from twotower.logs.entities import Entity, after
from twotower.logs.events import ITEM, EntityDeleted, EntityId, EntityPut
from twotower.publish.overlay import EntityChanges
from twotower.publish.version import Version
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, day_of
from twotower.schema.files import parquet_files, whole_file
from twotower.schema.tables import as_ids, check_entities, column_of
from twotower.stream.clock import joined_until
from twotower.stream.days import stale_days
from twotower.stream.shards import manifests, progress_of
from twotower.update.gate import Limits, alikeness, recall_among
from twotower.update.rows import positives_of

_EVENTS = 10_000


def due_days(
    events: Path,
    shards: Path,
    learned: str,
    watermark_ms: int | None = None,
    *,
    event_log: EventLog | None = None,
    idle_ms: int = 0,
) -> list[str]:
    """The days that are whole and that the full chain has not learned, in order.

    A day is whole when everything that is joined is of later days; without shards, when it is in `events/`. A partition
    that is idle (`joined_until`) does not hold the others, but its own rows of the day must be in `events/`.

    Args:
        events: joined events, a folder a day.
        shards: joined samples.
        learned: the last day of the full chain.
        watermark_ms: where the chain began, which may be in the middle of that day: then its rest is due. None = it
            learned the whole day.
        event_log: which the shards are of, if there is one.
        idle_ms: how far a partition without new events may be behind the others.
    """
    days = sorted(path.name.removeprefix(f"{c.DATE}=") for path in events.glob(f"{c.DATE}=*") if path.is_dir())
    reached = progress_of(shards, event_log)
    whole, unwritten = None, set[str]()
    if any(one.watermark_ms is not None for one in reached.values()):
        until_ms = joined_until(reached.values(), idle_ms)
        whole = "" if until_ms is None else day_of(until_ms)
        for partition, one in reached.items():
            if until_ms is not None and one.watermark_ms is not None and one.watermark_ms < until_ms:
                unwritten.update(stale_days(events, manifests(shards, partition)))
    return [
        day
        for day in days
        if day != c.UNKNOWN_DATE
        and (whole is None or (day < whole and day not in unwritten))
        and (day > learned or (day == learned and watermark_ms is not None and _goes_on(events, day, watermark_ms)))
    ]


def _goes_on(events: Path, day: str, watermark_ms: int) -> bool:
    """Whether a day has requests after some time."""
    return any(
        (pc.max(pq.read_table(path, columns=[c.REQUEST_TS_MS], partitioning=None).column(0)).as_py() or 0)
        > watermark_ms
        for path in parquet_files(events / f"{c.DATE}={day}")
    )


def read_entities(event_log: EventLog) -> EntityChanges:
    """All users and items that were put or deleted, as the log tells."""
    found: dict[tuple[str, EntityId], Entity] = {}
    for partition, end in enumerate(event_log.ends()):
        offset = 0
        while offset < end and (records := event_log.read(partition, offset, _EVENTS)):
            for place, event in ((record.offset, record.event) for record in records):
                said = event.content
                if isinstance(said, EntityPut | EntityDeleted):
                    named = said.kind, said.entity_id
                    found[named] = after(found.get(named), said, event.ts_ms, place)
            offset = records[-1].next_offset
    return EntityChanges(
        {one: entity for (kind, one), entity in found.items() if kind == ITEM},
        {one: entity for (kind, one), entity in found.items() if kind != ITEM},
    )


def fold(workspace: Path, entities: EntityChanges, files: Iterable[Path]) -> None:
    """Write what was put or deleted into the tables of a workspace, and users who are new in joined events.

    Args:
        workspace: with `users.parquet` and `items.parquet`.
        entities: what was put or deleted.
        files: joined events whose users are to be known; of one who was never put nothing else is.
    """
    clicked: dict[EntityId, Entity] = {}
    for path in files:
        ids = pq.read_table(path, columns=[c.USER_ID], partitioning=None).column(c.USER_ID)
        clicked |= dict.fromkeys(as_ids(ids, path.name).unique().to_pylist(), Entity())
    users = {**clicked, **entities.users}
    for name, id_column, changed in (("users", c.USER_ID, users), ("items", c.ITEM_ID, entities.items)):
        path = workspace / f"{name}.parquet"
        table = check_entities(pq.read_table(path), id_column, path.name)
        folded = _folded(table, id_column, changed)
        if not folded.equals(table):
            with whole_file(path) as temporary:
                pq.write_table(folded, temporary)


def _folded(table: pa.Table, id_column: str, entities: Mapping[EntityId, Entity]) -> pa.Table:
    """A table with the rows of entities as they are now."""
    own = int if table.schema.field(id_column).type == pa.int64() else str
    entities = {one: entity for one, entity in entities.items() if type(one) is own}
    known = {one: row for row, one in enumerate(table.column(id_column).to_pylist())}
    hidden = {one for one, entity in entities.items() if entity.available is False}
    if hidden and c.AVAILABLE not in table.column_names:
        table = table.append_column(c.AVAILABLE, pa.nulls(table.num_rows, pa.bool_()))
    out, rows = set[EntityId](), list[dict[str, Any]]()
    for one, entity in entities.items():
        if entity.deleted:
            out.add(one)
        elif entity.features is not None or entity.available is not None or one not in known:
            before = table.slice(known[one], 1).to_pylist()[0] if one in known else {}
            kept = before if entity.features is None and not entity.fresh else {}
            said = {} if entity.available is None else {c.AVAILABLE: entity.available}
            rows.append({**kept, **(entity.features or {}), **said, id_column: one})
            out.add(one)
    left = table.filter(pa.array([one not in out for one in known], pa.bool_()))
    columns = []
    for field in table.schema:
        plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        values = [value_or_none(row.get(field.name), plain) for row in rows]
        columns.append(pa.array(values, plain).cast(field.type))
    return pa.concat_tables([left, pa.table(columns, schema=table.schema)]).unify_dictionaries().sort_by(id_column)


def value_or_none(value: Any, kind: pa.DataType) -> Any:
    """A value, None where it is not of a type: it was put for a version whose attributes were of others.

    >>> value_or_none("dear", pa.float64()), value_or_none(3, pa.float64())
    (None, 3)
    """
    return value if column_of(value, kind) is not None else None


def rows_of_day(samples: Samples, day: str, after_ms: int = 0) -> Samples:
    """Samples with the positives of one day alone, each once; histories, clicks and counts stay those of all days.

    Args:
        samples: of all days up to this one.
        day: YYYY-MM-DD.
        after_ms: requests up to this time are left out: they were learned.
    """
    end = end_of_day(day)
    positives = samples.positives
    own = np.flatnonzero((positives.ts_ms > max(end - DAY_MS, after_ms)) & (positives.ts_ms <= end))
    return replace(
        samples,
        positives=replace(
            positives,
            user_row=positives.user_row[own],
            item_row=positives.item_row[own],
            history=positives.history[own],
            weight=positives.weight[own],
            ts_ms=positives.ts_ms[own],
            context={name: take(column, own) for name, column in positives.context.items()},
            copies=np.ones(len(own), np.int32),
            hard={name: _bag(take(bag, own)) for name, bag in positives.hard.items()},
        ),
    )


def _bag(column: object) -> Bag:
    assert isinstance(column, Bag)
    return column


def check_version(old: Version, new: Version, files: Iterable[Path], untrained: float, limits: Limits) -> list[str]:
    """What the gate has against a full version; one sentence each, none where it may go live.

    Args:
        old: what is served.
        new: what is to be.
        files: joined events of the days that were learned.
        untrained: share of users whom nothing is trained on: their clicks of these days judge.
        limits: of the gate.
    """
    problems = []
    alike = alikeness(np.asarray(new.item_vectors)) - alikeness(np.asarray(old.item_vectors))
    if alike > limits.most_alike:
        problems.append(f"items are more alike than in {old.id}, by {alike:.3f} in the mean cosine")
    before, after = _recalls([old, new], files, untrained, limits)
    if before is not None and after is not None and after < before - limits.margin:
        problems.append(f"recall@{limits.k} of the untrained users falls from {before:.4f} to {after:.4f}")
    return problems


def _recalls(
    versions: Sequence[Version], files: Iterable[Path], untrained: float, limits: Limits
) -> list[float | None]:
    """Recall of each version on the clicks of untrained users, with the histories that the first one knows."""
    wanted = [c.USER_ID, c.ITEM_ID, c.REQUEST_TS_MS, c.CLICK_TS_MS, c.OUTCOME]
    tables = [pq.read_table(path, columns=wanted, partitioning=None) for path in files]
    nothing: list[float | None] = [None] * len(versions)
    if not tables or not untrained:
        return nothing
    rows = pa.concat_tables(tables, promote_options="permissive")
    for name in (c.USER_ID, c.ITEM_ID):
        rows = rows.set_column(rows.schema.get_field_index(name), name, as_ids(rows.column(name), name))
    first = versions[0]
    kept = is_untrained(rows.column(c.USER_ID).combine_chunks(), untrained)
    kept &= np.array([outcome == c.CLICKED for outcome in rows.column(c.OUTCOME).to_pylist()])
    for version in versions:
        kept &= version.items.find(rows.column(c.ITEM_ID).combine_chunks()) >= 0
    rows = rows.filter(pa.array(kept))[-limits.window :] if kept.any() else rows.slice(0, 0)
    if rows.num_rows < limits.least:
        return nothing
    clicks = first.queries(first.users.positions.find(rows.column(c.USER_ID).combine_chunks())).clicks
    lists = pa.ListArray.from_arrays(clicks.indptr.astype(np.int32), first.item_ids.take(pa.array(clicks.rows)))
    rows = rows.append_column(HISTORY, lists)
    found: list[float | None] = []
    for version in versions:
        encoded = positives_of(version, rows, version.two_tower.item_tokens)
        users = version.user_tower.encode(encoded.user)
        found.append(recall_among(users, encoded.item_row, np.asarray(version.item_vectors), limits.k))
    return found
