"""Which joined rows a delta is learned from, which of them judge it, and which are left out.

B positives.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_held_out
from twotower.features.vocabulary import UNKNOWN
from twotower.logs.entities import Entity
from twotower.logs.events import EntityId
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.update.bounds import ITEM, PAIR, RISEN, USER
from twotower.update.rows import StreamPositives, times_of, usable
from twotower.update.state import ChainState

log = logging.getLogger(__name__)

Bools = npt.NDArray[np.bool_]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """What becomes of joined rows."""

    trained: StreamPositives
    held_out: StreamPositives
    """Positives of held-out users: they judge, and nothing is trained on them."""
    counts: dict[str, int]
    latest_ms: int | None
    """The latest time of a positive, left out or not."""
    held_back: dict[str, int]
    """Positives that are not trained, by the bound that they are beyond."""
    problems: list[str]
    """Why shards could not be used."""


@dataclass(frozen=True)
class _Part:
    """The positives of one shard, of held-out users and of others."""

    positives: StreamPositives
    counts: dict[str, int]
    times: list[int]


def select(
    state: ChainState, tables: Sequence[pa.Table], *, held_out_users: float, risen: frozenset[EntityId]
) -> Selection:
    """Select the positives of joined rows, by shard, before the state learns anything from them.

    Nothing is trained on `held_out_users`, a share of the users, and nothing is learned of items that rose too far.
    """
    counts = Counter(dict.fromkeys(("rows", "positives", "held_out", "known_before", "unusable"), 0))
    parts, times, problems = [state.encode(_no_rows(state.version))], list[int](), list[str]()
    for table in tables:
        counts["rows"] += table.num_rows
        try:
            part = _select_part(state, table)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            log.exception("%d rows cannot be encoded", table.num_rows)
            problems.append(f"{table.num_rows} rows: they cannot be encoded: {error!r}")
            continue
        parts.append(part.positives)
        times += part.times
        counts.update(part.counts)
    positives = StreamPositives.together(parts)
    users, items = positives.user_ids.to_pylist(), positives.item_ids.to_pylist()
    why = state.windows.admit(users, items, positives.ts_ms.tolist())
    why[np.array([item in risen for item in items], np.bool_)] = RISEN
    held_back = {name: int((why == name).sum()) for name in (PAIR, USER, ITEM, RISEN)}
    if any(held_back.values()):
        log.warning("%s: positives beyond update.bounds are not trained: %s", state.version.id, held_back)
    out = is_held_out(positives.user_ids, held_out_users) if len(positives) else np.zeros(0, np.bool_)
    trained = positives.take(np.flatnonzero((why == "") & ~out))
    held_out = positives.take(np.flatnonzero((why == "") & out))
    counts.update(positives=len(trained), held_out=len(held_out))
    if len(positives):
        counts["without_user_row"] = _unknown(trained.user.get(c.USER_ID))
        counts["without_item_row"] = _unknown(state.learner.item_tokens[trained.item_row])
    return Selection(trained, held_out, dict(counts), max(times, default=None), held_back, problems)


def _select_part(state: ChainState, rows: pa.Table) -> _Part:
    """The positives of one shard, without what is late, unknown, deleted or unusable."""
    version, fine = state.version, usable(rows, state.version)
    positives = rows.filter(pa.array(fine))
    times = times_of(positives)
    late = np.zeros(len(times), np.bool_)
    if version.watermark_ms is not None and version.last_day is not None:
        asked_ms = pc.coalesce(positives.column(c.REQUEST_TS_MS), positives.column(c.CLICK_TS_MS)).combine_chunks()
        late = (asked_ms.to_numpy() <= end_of_day(version.last_day)) & (times <= version.watermark_ms)
    item_ids, user_ids = (positives.column(name).combine_chunks() for name in (c.ITEM_ID, c.USER_ID))
    there = state.known_items(item_ids)
    items = [state.entities.items.get(entity_id) for entity_id in item_ids.to_pylist()]
    users = [state.entities.users.get(entity_id) for entity_id in user_ids.to_pylist()]
    deleted = np.array([user is not None and user.deleted for user in users], np.bool_)
    former = _before_deletion(items, times) | _before_deletion(users, times)
    counts = {
        "unusable": int((~fine).sum()),
        "known_before": int(late.sum()),
        "unknown_items": int((~late & ~there).sum()),
        "deleted_users": int((~late & deleted).sum()),
        "before_deletion": int((~late & there & ~deleted & former).sum()),
    }
    kept = positives.filter(pa.array(~late & there & ~deleted & ~former))
    return _Part(state.encode(kept), counts, times[~late].tolist())


def _before_deletion(entities: Sequence[Entity | None], times: Longs) -> Bools:
    """Which clicks (B,) are of a user or an item that was deleted after them: another one has its id now."""
    deleted_ms = [-1 if entity is None or entity.deleted_ms is None else entity.deleted_ms for entity in entities]
    before: Bools = times <= np.array(deleted_ms, np.int64)
    return before


def _unknown(tokens: Any) -> int:
    return int((tokens == UNKNOWN).sum()) if isinstance(tokens, np.ndarray) else 0


def _no_rows(version: Version) -> pa.Table:
    kinds = {c.USER_ID: version.users.ids.type, c.ITEM_ID: version.item_ids.type, c.OUTCOME: pa.string()}
    times = dict.fromkeys((c.REQUEST_TS_MS, c.CLICK_TS_MS), pa.int64())
    return pa.schema([*kinds.items(), *times.items()]).empty_table()
