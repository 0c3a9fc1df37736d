"""The state of a chain: a version with its deltas, from which the updater goes on.

`ChainState.apply` takes in a delta that is read when a chain is opened, and one that was just made. So a chain that is
opened again has the bytes of the one that wrote them.

N items of the version and those put since, D vector.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.columns import Column, concatenate, take
from twotower.features.feature_set import encode_table
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs.events import ITEM, USER, EntityId
from twotower.publish.delta import Delta, Rows
from twotower.publish.overlay import EntityChanges, Overlay, item_columns
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.towers.embedding import EmbeddingTable
from twotower.towers.two_tower import TwoTower
from twotower.update.bounds import ClickWindows
from twotower.update.entities import LoggedEntities, Named, split
from twotower.update.learner import Learner, Touched
from twotower.update.options import ChainOptions
from twotower.update.rows import StreamPositives, positives_of, tokens_of

log = logging.getLogger(__name__)

WINDOW = "window"
VECTORS = "vectors"
"""Vectors of items that were put or deleted, as the updater has them."""

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Witness:
    """A positive of a held-out user, on which recall is judged."""

    item_id: EntityId
    vector: Floats
    """(D,) of the user, when the click was seen."""


@dataclass(frozen=True)
class Base:
    """What is computed of a version once, whatever its deltas hold."""

    version: Version

    @cached_property
    def columns(self) -> dict[str, Column]:
        """Encoded features of its items."""
        return encode_table(self.version.features.item, pa.Table.from_batches([self.version.catalogue]))

    @cached_property
    def clicks(self) -> Longs:
        """Clicks of each of its items."""
        return np.bincount(self.version.clicks.item_row, minlength=self.version.items.base).astype(np.int64)


class ChainState:
    """A version and what deltas change in it; the tables of `model`, that of its checkpoint, are changed in place.

    `first_rows` are, by partition of the shards, the numbers of the first rows that the version may not know.
    """

    def __init__(self, base: Base, model: TwoTower, first_rows: Mapping[str, int], options: ChainOptions) -> None:
        self.options = options
        self.version = base.version
        self.laid = base.version
        """The version with what was learned and put."""
        self.entities = EntityChanges()
        self.seq, self.watermark_ms = 0, base.version.watermark_ms
        self.offsets: dict[str, dict[str, int]] = {"shards": dict(first_rows), "log": {}}
        """How far the shards (rows) and the log (offsets of users and items) were read, by partition."""
        self.witnesses: list[Witness] = []
        self.windows = ClickWindows(options.update.bounds)
        self.repaired = 0
        """Accumulators of the checkpoint or of deltas that were not finite; each has the table's median instead."""
        for name, table in model.tables.items():
            self._repair(name, table, np.arange(len(table.accumulator)))
        columns, ids = dict(base.columns), base.columns.get(c.ITEM_ID)
        if isinstance(ids, np.ndarray):
            columns[c.ITEM_ID] = ids.copy()  # an item that is admitted gets another row
        vectors = np.array(base.version.item_vectors)
        self.learner = Learner(model, columns, vectors, base.clicks, options)
        clicks = base.version.clicks
        latest = np.argsort(clicks.ts_ms, kind="stable")[-options.update.recent :]
        self.learner.recent = clicks.item_row[latest].astype(np.int64)
        self._base = base
        self._overlay = Overlay(base.version, by_id=True)

    @property
    def told_aside(self) -> Mapping[tuple[str, EntityId], str]:
        """Users and items that cannot be used as they were put, with the reason."""
        return self._overlay.aside.told

    @property
    def items_have_ids(self) -> bool:
        """The item tower reads them; otherwise only histories do, and the rows of items do not move."""
        return c.ITEM_ID in self._base.columns

    def id_type(self, table: str) -> pa.DataType:
        """Type of the ids of a table."""
        return (self.version.item_ids if table == c.ITEM_ID else self.version.users.ids).type

    def encode(self, rows: pa.Table) -> StreamPositives:
        """Clicked rows of known items, as the state encodes them before anything is learned from them."""
        tokens = self.learner.item_tokens if self.items_have_ids else self.laid.two_tower.item_tokens
        encoded = positives_of(self.laid, rows, tokens)
        if any(feature.name == c.USER_ID for feature in self.version.features.user):
            learned = self.learner.learned[c.USER_ID]
            encoded.user[c.USER_ID] = tokens_of(self.version.features, c.USER_ID, encoded.user_ids, learned)
        return encoded

    def known_items(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        """Which items the state has and are not deleted."""
        rows = self.laid.items.find(ids)
        known: npt.NDArray[np.bool_] = (rows >= 0) & ~self.laid.gone[np.maximum(rows, 0)]
        return known

    def rows_of(self, item_ids: Sequence[EntityId]) -> Longs:
        """Catalogue rows of items, -1 for unknown ones."""
        return self.laid.items.find(pa.array(item_ids, self.version.item_ids.type))

    def accumulators(self, tables: Mapping[str, Rows]) -> dict[str, Floats]:
        """Optimizer state of the rows of a delta, under their names in it."""
        own = self.learner.model.tables
        return {f"{name}.accumulator": own[name].accumulator[rows.rows] for name, rows in tables.items()}

    def apply(self, delta: Delta) -> None:
        """Take in the next delta: one that was read, or one that this state has learned."""
        state, learner = delta.state, self.learner
        if delta.folded:  # it holds these whole
            learner.recent, self.witnesses = np.zeros(0, np.int64), []
            self.windows = ClickWindows(self.options.update.bounds)
            learner.next_row |= state["next_row"]
        self.take(LoggedEntities.stored(state))
        self.windows.restore(state.get("counted", [[]] * 4), state.get("risen", []))
        for name, rows in delta.tables.items():
            table = learner.model.tables[name]
            table.weights[rows.rows] = rows.values
            table.accumulator[rows.rows] = delta.optimizer[f"{name}.accumulator"]
            self._repair(name, table, rows.rows)
        for name, ids in delta.new_ids.items():
            known, rows_of_ids = ids.column("id").to_pylist(), ids.column("row").to_pylist()
            learner.learned[name].update(zip(known, rows_of_ids, strict=True))
            learner.next_row[name] = max([learner.next_row[name], *(row + 1 for row in rows_of_ids)])
            if name == c.ITEM_ID:
                self._set_tokens(ids)
        for name, changes in state["pending"].items():
            for entity_id, count in changes:
                learner.pending[name][entity_id] = count
                if not count:
                    del learner.pending[name][entity_id]
        self._overlay.learn(delta)
        learner.vectors[self.laid.items.find(delta.item_ids)] = delta.item_vectors
        if delta.folded:
            learner.vectors[self._rows_put()] = delta.optimizer[VECTORS]
        recent = self.rows_of(state["recent"])
        learner.recent = np.concatenate([learner.recent, recent[recent >= 0]])[-self.options.update.recent :]
        vectors = delta.optimizer.get(WINDOW, np.zeros((0, 0), np.float32))
        self.witnesses = self.with_latest([Witness(*pair) for pair in zip(state["window"], vectors, strict=True)])
        self.offsets = {name: {key: int(end) for key, end in ends.items()} for name, ends in delta.offsets.items()}
        self.seq, self.watermark_ms = delta.seq, delta.watermark_ms

    def lay(self) -> Version:
        """The version with everything that was learned and put, as a server has it."""
        self.laid = self._overlay.lay(self.entities)
        return self.laid

    def with_latest(self, witnesses: Sequence[Witness]) -> list[Witness]:
        """The latest positives of held-out users, some more included."""
        return [*self.witnesses, *witnesses][-self.options.update.gate.window :]

    def take(self, changes: LoggedEntities) -> None:
        """Take in users and items that were put or deleted; what is already known changes nothing."""
        known = {ITEM: self.entities.items, USER: self.entities.users}
        if all(known[kind].get(entity_id) == entity for (kind, entity_id), entity in changes.entities.items()):
            return
        newer = split(changes.entities)
        former = {item_id for kind, item_id in changes.deleted_ms if kind == ITEM}
        self.witnesses = [witness for witness in self.witnesses if witness.item_id not in former]
        self.entities = EntityChanges(
            {**self.entities.items, **newer.items} if newer.items else self.entities.items,
            {**self.entities.users, **newer.users},
        )
        before, laid = self.laid, self.lay()
        if not newer.items:
            return
        recent = before.item_ids.take(pa.array(self.learner.recent))
        gone = pc.is_in(recent, pa.array(sorted(former), recent.type))
        recent = laid.items.find(recent.filter(pc.invert(gone)))
        self._set_items(laid)
        self.learner.recent = recent[recent >= 0]

    def _set_items(self, laid: Version) -> None:
        """Give the learner the items of the version and those put since."""
        learner, base, count = self.learner, self.version.items.base, len(laid.item_ids)
        more = np.zeros((count - base, learner.vectors.shape[1]), np.float32)
        vectors = np.concatenate([learner.vectors[:base], more])
        index = np.arange(count)
        parts: dict[str, list[Column]] = {name: [column] for name, column in self._base.columns.items()}
        for number, (item_id, row) in enumerate(sorted(laid.put.items(), key=lambda entry: entry[1])):
            for name, column in item_columns(self.version, item_id, self.entities.items[item_id]).items():
                parts[name].append(column)
            index[row] = base + number
            vectors[row] = laid.item_vectors[np.array([row])][0]
        columns = {name: take(concatenate(part), index) for name, part in parts.items()}
        clicks = np.concatenate([self._base.clicks, np.zeros(count - base, np.int64)])
        fresh = [
            item_id for item_id, entity in self.entities.items.items() if entity.fresh and not self._is_trained(item_id)
        ]
        rows = self.rows_of(fresh)
        clicks[rows[rows >= 0]] = 0  # the version counted the clicks of other items with these ids
        if c.ITEM_ID in columns:
            learned = learner.learned[c.ITEM_ID]
            columns[c.ITEM_ID] = tokens_of(self.version.features, c.ITEM_ID, laid.item_ids, learned)
        learner.set_items(columns, vectors, clicks)

    def forget(self, deleted: Iterable[Named], touched: Touched) -> dict[str, list[tuple[EntityId, int]]]:
        """Clear the rows of deleted users and items, and make their ids unknown; gives these, by table."""
        learner, forgotten = self.learner, dict[str, list[tuple[EntityId, int]]]()
        for kind, entity_id in deleted:
            table = c.ITEM_ID if kind == ITEM else c.USER_ID
            if table not in learner.model.tables or (kind == ITEM and self._is_trained(entity_id)):
                continue
            ids = pa.array([entity_id], self.id_type(table))
            token = int(tokens_of(self.version.features, table, ids, learner.learned[table])[0])
            learner.pending[table].pop(entity_id, None)
            if token >= FIRST:
                learner.forget(table, entity_id, token, touched)
            forgotten.setdefault(table, []).append((entity_id, UNKNOWN))
            if table == c.ITEM_ID:
                self._set_tokens(pa.table({"id": ids, "row": pa.array([UNKNOWN], pa.int32())}))
        return forgotten

    def _is_trained(self, item_id: EntityId) -> bool:
        """The version was trained on the item that has the id now: it was put again before the version's watermark."""
        entity = self.entities.items.get(item_id)
        return entity is not None and entity.fresh and not entity.deleted and not self._overlay.is_another(entity)

    def _set_tokens(self, ids: pa.Table) -> None:
        """Note the rows of items in their table."""
        if self.items_have_ids:
            rows = self.laid.items.find(ids.column("id").combine_chunks())
            self.learner.item_tokens[rows[rows >= 0]] = ids.column("row").to_numpy()[rows >= 0]

    def _repair(self, name: str, table: EmbeddingTable, rows: Longs) -> None:
        """Give rows whose accumulator is not finite the median of the others; otherwise they would never move again."""
        if count := table.repair(rows):
            self.repaired += count
            log.warning(
                "%d accumulators of %s in %s were not finite: they have the median now", count, name, self.version.id
            )

    def _rows_put(self) -> Longs:
        """Catalogue rows of all items that were put or deleted: their vectors do not come from deltas alone."""
        rows = self.rows_of(list(self.entities.items))
        return rows[rows >= 0]

    def folded(self) -> Delta:
        """All deltas so far as one that replaces them; its digest and report come from the chain."""
        learner, delta, entities = self.learner, self._overlay.folded(), self.entities
        put = {(ITEM, entity_id): entity for entity_id, entity in entities.items.items()}
        put |= {(USER, entity_id): entity for entity_id, entity in entities.users.items()}
        deleted_ms = {named: put[named].deleted_ms for named in sorted(put)}
        return replace(
            delta,
            watermark_ms=self.watermark_ms,
            offsets=self.offsets,
            optimizer={
                **self.accumulators(delta.tables),
                **window_of(self.witnesses),
                VECTORS: learner.vectors[self._rows_put()],
            },
            state={
                **LoggedEntities(
                    put, {named: ts_ms for named, ts_ms in deleted_ms.items() if ts_ms is not None}
                ).state(),
                "pending": pending_changes({}, learner.pending),
                "recent": self.laid.item_ids.take(pa.array(learner.recent)).to_pylist(),
                "window": [witness.item_id for witness in self.witnesses],
                "next_row": dict(learner.next_row),
                **self.windows.folded(),
            },
        )


def window_of(witnesses: Sequence[Witness]) -> dict[str, Floats]:
    """The array of a delta that keeps the vectors of witnesses."""
    return {WINDOW: np.stack([witness.vector for witness in witnesses])} if witnesses else {}


def pending_changes(
    before: Mapping[str, Mapping[EntityId, int]], now: Mapping[str, Mapping[EntityId, int]]
) -> dict[str, list[list[Any]]]:
    """By table, counts of ids that differ from before; 0 = not counted any more."""
    return {
        name: sorted(
            [entity_id, counts.get(entity_id, 0)]
            for entity_id in {**before.get(name, {}), **counts}
            if counts.get(entity_id) != before.get(name, {}).get(entity_id)
        )
        for name, counts in now.items()
    }
