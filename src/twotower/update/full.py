"""What the full update needs beside the stages that it runs: days that are not learned, the rows of a day, its gate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_held_out
from twotower.features.columns import take
from twotower.features.feature_set import HISTORY
from twotower.logs import EventLog
from twotower.logs.entities import Entity
from twotower.logs.events import EntityId
from twotower.publish.catalogue import plain_type
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
from twotower.update.gate import Recall, check_spread, recall_among
from twotower.update.options import GateOptions
from twotower.update.rows import positives_of


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

    A day is whole when everything that is joined is of later days; without shards, when it is in `events/`. An idle
    partition (`joined_until`) does not hold back the others, but its own rows of the day must be in `events/`.

    Args:
        events: joined events, a folder a day.
        shards: joined samples.
        learned: the last day of the full chain.
        watermark_ms: where the chain began, if in the middle of that day: the rest of the day must then be learned.
            None = it learned the whole day.
        event_log: the log of the shards, if there is one.
        idle_ms: how far a partition without new events may be behind the others.
    """
    days = sorted(path.name.removeprefix(f"{c.DATE}=") for path in events.glob(f"{c.DATE}=*") if path.is_dir())
    reached = progress_of(shards, event_log)
    whole, unwritten = None, set[str]()
    if any(progress.watermark_ms is not None for progress in reached.values()):
        until_ms = joined_until(reached.values(), idle_ms)
        whole = "" if until_ms is None else day_of(until_ms)
        for partition, progress in reached.items():
            if until_ms is not None and progress.watermark_ms is not None and progress.watermark_ms < until_ms:
                unwritten.update(stale_days(events, manifests(shards, partition)))
    return [
        day
        for day in days
        if day != c.UNKNOWN_DATE
        and (whole is None or (day < whole and day not in unwritten))
        and (day > learned or (day == learned and watermark_ms is not None and _goes_on(events, day, watermark_ms)))
    ]


def _goes_on(events: Path, day: str, watermark_ms: int) -> bool:
    """A day has requests after some time."""
    return any(
        (pc.max(pq.read_table(path, columns=[c.REQUEST_TS_MS], partitioning=None).column(0)).as_py() or 0)
        > watermark_ms
        for path in parquet_files(events / f"{c.DATE}={day}")
    )


def fold(workspace: Path, entities: EntityChanges, files: Iterable[Path]) -> None:
    """Write what was put or deleted into a workspace's tables of users and items, and new users of joined events.

    Of a new user who was never put, only the id is known.
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
    entities = {entity_id: entity for entity_id, entity in entities.items() if type(entity_id) is own}
    known = {entity_id: row for row, entity_id in enumerate(table.column(id_column).to_pylist())}
    hidden = {entity_id for entity_id, entity in entities.items() if entity.available is False}
    if hidden and c.AVAILABLE not in table.column_names:
        table = table.append_column(c.AVAILABLE, pa.nulls(table.num_rows, pa.bool_()))
    out, rows = set[EntityId](), list[dict[str, Any]]()
    for entity_id, entity in entities.items():
        if entity.deleted:
            out.add(entity_id)
        elif entity.features is not None or entity.available is not None or entity_id not in known:
            before = table.slice(known[entity_id], 1).to_pylist()[0] if entity_id in known else {}
            kept = before if entity.features is None and not entity.fresh else {}
            available = {} if entity.available is None else {c.AVAILABLE: entity.available}
            rows.append({**kept, **(entity.features or {}), **available, id_column: entity_id})
            out.add(entity_id)
    left = table.filter(pa.array([entity_id not in out for entity_id in known], pa.bool_()))
    columns = []
    for field in table.schema:
        plain = plain_type(field.type)
        values = [row.get(field.name) for row in rows]
        fitting = [value if column_of(value, plain) is not None else None for value in values]  # of another version
        columns.append(pa.array(fitting, plain).cast(field.type))
    return pa.concat_tables([left, pa.table(columns, schema=table.schema)]).unify_dictionaries().sort_by(id_column)


def rows_of_day(samples: Samples, day: str, after_ms: int = 0) -> Samples:
    """Samples with the positives of one day alone, each once; histories, clicks and counts stay those of all days.

    Requests up to `after_ms` are left out: they were learned already.
    """
    end = end_of_day(day)
    positives = samples.positives
    own = np.flatnonzero((positives.ts_ms > max(end - DAY_MS, after_ms)) & (positives.ts_ms <= end))
    arrays = {name: getattr(positives, name)[own] for name in ("user_row", "item_row", "history", "weight", "ts_ms")}
    return replace(
        samples,
        positives=replace(
            positives,
            **arrays,
            context={name: take(column, own) for name, column in positives.context.items()},
            copies=np.ones(len(own), np.int32),
            hard={name: take(bag, own) for name, bag in positives.hard.items()},
        ),
    )


def check_version(
    old: Version, new: Version, files: Iterable[Path], held_out_users: float, options: GateOptions
) -> list[str]:
    """What the gate has against a full version; one sentence each, none where it may go live.

    Args:
        old: the served version.
        new: the version to be served.
        files: joined events of the days that were learned; the held-out users' clicks in them judge.
        held_out_users: share of users who are never used in training.
        options: what the version must keep.
    """
    spread = check_spread(np.asarray(new.item_vectors), old, options)
    rows = _held_out_rows([old, new], files, held_out_users, options.window)
    if len(rows) < options.min_positives:
        return spread
    clicks = old.queries(old.users.positions.find(rows.column(c.USER_ID).combine_chunks())).clicks
    lists = pa.ListArray.from_arrays(clicks.indptr.astype(np.int32), old.item_ids.take(pa.array(clicks.rows)))
    rows = rows.append_column(HISTORY, lists)
    recall = Recall(*(_recall(version, rows, options.k) for version in (old, new)))
    return [*spread, *recall.problems(options)]


def _recall(version: Version, rows: pa.Table, k: int) -> float:
    """Recall of a version on clicked rows with their histories."""
    encoded = positives_of(version, rows, version.two_tower.item_tokens)
    users = version.user_tower.encode(encoded.user)
    return recall_among(users, encoded.item_row, np.asarray(version.item_vectors), k)


def _held_out_rows(versions: Sequence[Version], files: Iterable[Path], held_out_users: float, count: int) -> pa.Table:
    """The latest clicks of held-out users on items that all versions have, at most this many."""
    names = [c.USER_ID, c.ITEM_ID, c.REQUEST_TS_MS, c.CLICK_TS_MS, c.OUTCOME]
    tables = [pq.read_table(path, columns=names, partitioning=None) for path in files]
    if not tables or not held_out_users:
        return pa.table({})
    rows = pa.concat_tables(tables, promote_options="permissive")
    for name in (c.USER_ID, c.ITEM_ID):
        rows = rows.set_column(rows.schema.get_field_index(name), name, as_ids(rows.column(name), name))
    kept = is_held_out(rows.column(c.USER_ID).combine_chunks(), held_out_users)
    kept &= pc.equal(rows.column(c.OUTCOME).cast(pa.string()), c.CLICKED).fill_null(False).to_numpy()
    for version in versions:
        kept &= version.items.find(rows.column(c.ITEM_ID).combine_chunks()) >= 0
    return rows.filter(pa.array(kept))[-count:]
