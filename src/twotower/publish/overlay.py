"""What was learned since a version, laid over it: deltas, and users and items that were put or deleted.

The version stays as it is, mapped into memory. The result is a new `Version` that shares everything which did not
change; a server swaps one reference. It is a function of the version, of its deltas in their order and of the changes
of entities in the log, so all replicas have the same bytes.

One more item costs the same however many were put before (see `twotower.publish.catalogue`). The other state of an
overlay is read only by the thread that lays it.

N items of the version, A items put since, D vector.
"""

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.retriever import Candidates, Queries, Retriever, WithoutItems, similar_items
from twotower.channels.vector_channel import UserEncoder, VectorChannel
from twotower.features.columns import Bag, Column, concatenate, pointers
from twotower.features.columns import Rows as Tokens
from twotower.features.feature_set import encode_request
from twotower.features.vocabulary import UNKNOWN
from twotower.index.exact import ExactIndex
from twotower.index.overlaid import OverlaidIndex
from twotower.index.protocol import PADDING, Exclusions, VectorIndex
from twotower.logs.entities import Entity
from twotower.logs.events import ITEM, EntityId
from twotower.publish.catalogue import (
    SMALLER,
    Attributes,
    Encoded,
    Layered,
    PutRows,
    SetAside,
    changes,
    plain_type,
    put_row,
)
from twotower.publish.delta import Delta, Rows, read_chain
from twotower.publish.onnx import OnnxTower
from twotower.publish.tables import LaidRows, map_tables
from twotower.publish.version import NEW_ITEMS, TWO_TOWER, Again, LearnedUsers, Mask, Version, encode_usable
from twotower.schema import columns as c
from twotower.schema.errors import DataError, cut, shown
from twotower.schema.limits import check_value
from twotower.schema.tables import column_of, is_id
from twotower.towers.two_tower import Table, table_of

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EntityChanges:
    """The users and items that were put or deleted, by id."""

    items: Mapping[EntityId, Entity] = field(default_factory=Layered[EntityId, Entity])
    users: Mapping[EntityId, Entity] = field(default_factory=Layered[EntityId, Entity])

    def with_newer(self, items: Mapping[EntityId, Entity], users: Mapping[EntityId, Entity]) -> "EntityChanges":
        """These changes and newer ones."""
        return EntityChanges(_layered(self.items).with_newer(items), _layered(self.users).with_newer(users))


def _layered(entities: Mapping[EntityId, Entity]) -> Layered[EntityId, Entity]:
    return entities if isinstance(entities, Layered) else Layered[EntityId, Entity]().with_newer(entities)


@dataclass(frozen=True)
class _Put:
    """An item whose features were put."""

    entity: Entity
    row: int
    token: int
    """Its vocabulary index."""


@dataclass(frozen=True)
class _Hidden:
    """An index of a channel without some rows of the version."""

    rows: Mask
    """(N,)"""
    index: VectorIndex


class _Items:
    """The items of a version and those put since, as they are now; `tokens` (N,) are their vocabulary indexes."""

    def __init__(self, base: Version, tokens: Tokens) -> None:
        self.ids: list[EntityId] = []
        """(A,) of the items put since, in the order of their rows."""
        self.rows: dict[EntityId, int] = {}
        """See `ItemKeys`."""
        self.births: dict[EntityId, tuple[int, int | None]] = {}
        """By id, which of the items that had the id one after the other has its row; see `_birth`."""
        self.last: tuple[int, Any] = (-1, "")
        """The sort key of the latest item put since; see `_order`."""
        self.put: dict[EntityId, _Put] = {}
        self.gone = base.gone
        """(N + A,) deleted or not available."""
        self.attributes: tuple[PutRows, ...] = ()
        self.encoded: tuple[Encoded, ...] = ()
        self.vectors: tuple[Rows, ...] = ()
        self.again = Again()
        self.tokens = _with_room(tokens, base.items.base)
        """(N + A and more,) vocabulary indexes; unknown behind the end."""

    def copied(self) -> "_Items":
        other = copy.copy(self)
        for name in ("ids", "rows", "births", "put", "tokens"):
            setattr(other, name, copy.copy(getattr(self, name)))
        return other


class KnownItems:
    """A channel that knows only the first `count` items; queries that name items put since work too."""

    def __init__(self, channel: Retriever, count: int) -> None:
        self.name = channel.name
        self.channel = channel
        self._count = count

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        clicks = _below(queries.clicks.indptr, queries.clicks.rows, self._count)
        exclude = _below(queries.exclude.indptr, queries.exclude.rows, self._count)
        known = Queries(queries.features, Bag(*clicks), Exclusions(*exclude))
        return self.channel.retrieve(known, k)

    def similar(self, rows: Longs, k: int) -> Candidates | None:
        """See `SimilarItems.similar`."""
        known = rows < self._count
        similar = similar_items(self.channel, np.where(known, rows, 0), k)
        if similar is not None:
            similar.rows[~known], similar.scores[~known] = PADDING, -np.inf
        return similar


def _below(indptr: Longs, rows: npt.NDArray[Any], count: int) -> tuple[Longs, npt.NDArray[Any]]:
    kept = rows < count
    if kept.all():
        return indptr, rows
    owner = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return pointers(np.bincount(owner[kept], minlength=len(indptr) - 1)), rows[kept]


class Overlay:
    """Lays deltas and entities over a version.

    Args:
        base: as `open_version` gives it.
        by_id: an id has one row, even if its item was deleted and put again, and none if it was put and deleted. Rows
            are then a function of the items that exist now, as the updater's state requires. Without it, items that
            had the same id one after the other have a row each, as a server requires.
    """

    def __init__(self, base: Version, *, by_id: bool = False) -> None:
        self.base = base
        self._by_id = by_id
        self.seq = 0
        self.watermark_ms: int | None = base.watermark_ms
        self._tables: dict[str, tuple[Rows, ...]] = {}
        """By table, the rows that are newer than the version's: the pieces of `_piled`."""
        self._vectors = Rows.none(base.item_vectors.shape[1])
        self._ids: dict[str, dict[EntityId, int]] = {c.USER_ID: {}, c.ITEM_ID: {}}
        self._forgotten: dict[str, set[EntityId]] = {c.USER_ID: set(), c.ITEM_ID: set()}
        self._mapped = map_tables(base.path / "channels" / TWO_TOWER)
        self._count = base.items.base
        """N"""
        self._shown = EntityChanges()
        """The changes that the latest snapshot has."""
        self._laid: Version | None = None
        self._hidden: dict[str, _Hidden] = {}
        """By channel, its index in the latest snapshot."""
        self.aside = SetAside()
        self._moved: set[int] = set()
        """Rows of the table of item ids that were touched since `lay`."""
        self._admitted: set[EntityId] = set()
        """Items whose vocabulary index changed since."""
        self._learned = False
        self._back = np.zeros(0, np.int64)
        """Rows of the version's items that are available again."""
        self._below: dict[str, Rows] = {}
        """By channel, newer vectors below those of items that were put."""
        self._other_tokens: dict[str, Tokens] = {}
        """By channel, the same as `_Items.tokens` for channels that do not learn between versions."""
        self._user_tower = base.user_tower
        ids = base.features.vocabularies.get(c.ITEM_ID)
        self._item_tokens = base.two_tower.item_tokens
        if ids is not None and base.features.history is None:
            self._item_tokens = ids.rows(base.item_ids)
        self._items = _Items(base, self._item_tokens)

    def copied(self) -> "Overlay":
        """A copy, for trying a delta."""
        other = copy.copy(self)
        other._tables, other._moved, other._admitted = dict(self._tables), set(self._moved), set(self._admitted)
        other._items, other._hidden = self._items.copied(), dict(self._hidden)
        other._below, other._other_tokens = dict(self._below), dict(self._other_tokens)
        other._ids = {name: dict(ids) for name, ids in self._ids.items()}
        other._forgotten = {name: set(ids) for name, ids in self._forgotten.items()}
        return other

    def learn(self, delta: Delta) -> None:
        """Take in the next delta; `lay` shows it."""
        self._check(delta)
        for name, rows in delta.tables.items():
            self._tables[name] = _piled(self._tables.get(name, ()), rows)
        for name, ids in delta.new_ids.items():
            for entity_id, row in zip(ids.column("id").to_pylist(), ids.column("row").to_pylist(), strict=True):
                self._ids[name][entity_id] = row
                if name == c.ITEM_ID:
                    self._admitted.add(entity_id)
                if row == UNKNOWN:
                    self._forgotten[name].add(entity_id)
        item_rows = self.base.items.find(delta.item_ids)
        known = np.flatnonzero(item_rows >= 0)
        order = known[np.argsort(item_rows[known], kind="stable")]
        self._vectors = self._vectors.with_newer(Rows(item_rows[order], delta.item_vectors[order]))
        if c.ITEM_ID in delta.tables:
            self._moved |= set(delta.tables[c.ITEM_ID].rows.tolist())
        self.seq, self.watermark_ms, self._learned = delta.seq, delta.watermark_ms, True

    def _check(self, delta: Delta) -> None:
        """Refuse a delta whose rows, ids or vectors do not fit the version."""
        for name, rows in delta.tables.items():
            if name not in self._mapped or rows.values.shape[1] != self._mapped[name].shape[1]:
                raise DataError(f"delta {delta.seq} has rows of table {name} that do not fit version {self.base.id}")
            if len(rows.rows) and rows.rows[-1] >= self._mapped[name].shape[0]:
                raise DataError(
                    f"delta {delta.seq} has row {rows.rows[-1]} of table {name}, which has "
                    f"{self._mapped[name].shape[0]} in version {self.base.id}"
                )
        kinds = {c.USER_ID: self.base.users.ids.type, c.ITEM_ID: self.base.item_ids.type}
        for name, ids in delta.new_ids.items():
            if name not in kinds or ids.column("id").type != kinds[name]:
                raise DataError(f"delta {delta.seq} has ids of {name} that do not fit version {self.base.id}")
            if name in self._mapped and ids.num_rows and pc.max(ids.column("row")).as_py() >= len(self._mapped[name]):
                raise DataError(f"delta {delta.seq} has ids of {name} with rows beyond its table")
        if delta.item_vectors.shape[1] != self._vectors.values.shape[1]:
            raise DataError(f"delta {delta.seq} has vectors of {delta.item_vectors.shape[1]} numbers")

    def folded(self) -> Delta:
        """All that was learned, as one delta for readers."""
        base = self.base
        kinds = {c.USER_ID: base.users.ids.type, c.ITEM_ID: base.item_ids.type}
        new_ids = {}
        for name, kind in kinds.items():
            ids = {entity_id: row for entity_id, row in self._ids[name].items() if row != UNKNOWN}
            known = [*sorted(self._forgotten[name]), *sorted(ids)]  # a forgotten one may have come again
            rows = [UNKNOWN] * len(self._forgotten[name]) + [ids[entity_id] for entity_id in sorted(ids)]
            if known:
                new_ids[name] = pa.table({"id": pa.array(known, kind), "row": pa.array(rows, pa.int32())})
        return Delta(
            base.id,
            self.seq,
            self.watermark_ms,
            {name: functools.reduce(Rows.with_newer, self._tables[name]) for name in sorted(self._tables)},
            new_ids,
            base.item_ids.take(pa.array(self._vectors.rows)),
            self._vectors.values,
            {},
            folded=True,
        )

    def lay(self, entities: EntityChanges) -> Version:
        """The version with all that was learned and put."""
        items = changes(self._shown.items, entities.items)
        own = self._own_rows(items or {})
        if items is None or not self._in_order(items, own) or (self._by_id and self._leaves_gap(items)):
            self._items, self._laid = _Items(self.base, self._item_tokens), None
            items, self._learned = dict(entities.items), True
            self._admitted = set(self._ids[c.ITEM_ID])
            own = self._own_rows(items)
        if self._laid is None or items or self._learned:
            self._take({item_id: entity for item_id, entity in items.items() if item_id in own}, own)
            self._laid = self._snapshot()
        self._shown, self._learned = entities, False
        since = LearnedUsers(self._ids[c.USER_ID], entities.users, self._forgotten[c.USER_ID], self.aside)
        return replace(self._laid, since=since, delta_seq=self.seq)

    def _own_rows(self, items: Iterable[EntityId]) -> dict[EntityId, int]:
        """The version's own rows of some ids, -1 without one; an id of another type is set aside."""
        kind = self.base.items.kind
        usable = []
        for item_id in items:
            if is_id(item_id, kind):
                usable.append(item_id)
            else:
                self.aside.note(ITEM, item_id, f"the ids of items are {kind}")
        return dict(zip(usable, self.base.items.find(pa.array(usable, kind)).tolist(), strict=True))

    def _in_order(self, items: Mapping[EntityId, Entity], own: Mapping[EntityId, int]) -> bool:
        """Whether new items come after those put before: rows stand in the order of the log."""
        now = self._items
        new = [
            _order(item_id, entity)
            for item_id, entity in items.items()
            if item_id in own and self._needs_row(entity, own[item_id]) and now.births.get(item_id) != _birth(entity)
        ]
        return not new or min(new) > now.last

    def _leaves_gap(self, items: Mapping[EntityId, Entity]) -> bool:
        """Whether an item that was put gives up its row."""
        births = self._items.births
        return any(
            item_id in births and (entity.deleted or births[item_id] != _birth(entity))
            for item_id, entity in items.items()
        )

    def _needs_row(self, entity: Entity, own: int) -> bool:
        """Whether the item needs another row than the version's own of that id."""
        another = not self._by_id and self.is_another(entity)
        return not entity.deleted and entity.features is not None and (own < 0 or another)

    def is_another(self, entity: Entity) -> bool:
        """Whether it was deleted and put again since the version was made: it is not the version's item of that id."""
        if not entity.fresh or entity.deleted_ms is None:
            return entity.fresh
        return self.base.watermark_ms is None or entity.deleted_ms > self.base.watermark_ms

    def _take(self, changed: Mapping[EntityId, Entity], own: Mapping[EntityId, int]) -> None:
        """Take up items that were put or deleted, and what deltas changed for those put before."""
        now = self._items
        columns: dict[EntityId, dict[str, Column]] = {}
        usable: dict[EntityId, Entity] = {}
        for item_id, entity in sorted(changed.items(), key=lambda entry: _order(*entry)):
            try:
                if entity.features is not None and not entity.deleted:
                    columns[item_id] = item_columns(self.base, item_id, entity, self.aside)
            except Exception as error:  # the other items are served in any case
                self.aside.note(ITEM, item_id, repr(error))
                continue
            usable[item_id] = entity
        before = {item_id: now.rows.get(item_id, -1) for item_id in usable}
        rows = {item_id: self._row_of(item_id, entity, own[item_id]) for item_id, entity in usable.items()}
        now.gone = self._gone(usable, {item_id: (own[item_id], before[item_id]) for item_id in usable}, rows)
        put = [item_id for item_id in columns if rows[item_id] >= 0]
        if put:
            schema = self.base.attributes.schema
            parts = [put_row(schema, rows[item_id], _attributes(item_id, usable[item_id])) for item_id in put]
            now.attributes = _piled(now.attributes, PutRows.of(parts))
            for item_id, part in zip(put, parts, strict=True):
                self._note_lost(item_id, usable[item_id], part)
        for item_id in put:
            now.put[item_id] = _Put(
                usable[item_id], rows[item_id], self._token(item_id, usable[item_id], rows[item_id])
            )
        self._set_tokens(put)
        self._encode(self._moved_items() | set(put), columns)
        self._moved, self._admitted = set(), set()

    def _note_lost(self, item_id: EntityId, entity: Entity, put: PutRows) -> None:
        """Note attributes that were put for a version where they were of other types, or did not exist."""
        given = {name for name, value in (entity.features or {}).items() if value is not None}
        kept = {name for name in put.batch.schema.names if put.batch.column(name).null_count == 0}
        if lost := sorted(given - kept):
            self.aside.note(ITEM, item_id, f"{', '.join(lost)} counts as missing: not an attribute of that type here")

    def _row_of(self, item_id: EntityId, entity: Entity, own: int) -> int:
        """The catalogue row of an item, a new one where it needs it; -1 where it has none."""
        now, before = self._items, self._items.rows.get(item_id, -1)
        if not self._needs_row(entity, own):
            if entity.deleted:
                now.put.pop(item_id, None)
            if own >= 0 and (self._by_id or not entity.deleted):
                now.rows.pop(item_id, None)
                return own
            now.put.pop(item_id, None)
            now.births.pop(item_id, None)
            if own >= 0 or before >= 0:
                now.rows[item_id] = -1
            return -1
        if now.births.get(item_id) == _birth(entity):
            return before
        row = self._count + len(now.ids)
        now.ids.append(item_id)
        now.births[item_id], now.rows[item_id], now.last = _birth(entity), row, _order(item_id, entity)
        if entity.deleted_ms is not None:
            again = now.again
            now.again = Again(np.append(again.rows, row), np.append(again.deleted_ms, entity.deleted_ms))
        return row

    def _gone(
        self,
        changed: Mapping[EntityId, Entity],
        before: Mapping[EntityId, tuple[int, int]],
        rows: Mapping[EntityId, int],
    ) -> Mask:
        """(N + A,) which items are deleted or not available, after some have changed.

        `before` has the version's own rows of these items and the rows that they had, `rows` those of now; -1 = none.
        """
        count = self._count + len(self._items.ids)
        gone = np.concatenate([self._items.gone, np.zeros(count - len(self._items.gone), np.bool_)])
        for item_id, entity in changed.items():
            row = rows[item_id]
            gone[[earlier for earlier in before[item_id] if earlier >= 0 and earlier != row]] = True
            if row >= 0 and entity.deleted:
                gone[row] = True
            elif row >= 0 and (entity.available is not None or entity.features is not None):
                gone[row] = entity.available is False
            elif row >= 0:
                gone[row] = self.base.gone[row]
        return gone

    def _token(self, item_id: EntityId, entity: Entity, row: int) -> int:
        """The vocabulary index of an item."""
        if self.is_another(entity) and item_id not in self._forgotten[c.ITEM_ID]:
            return UNKNOWN
        if item_id in self._ids[c.ITEM_ID]:
            return self._ids[c.ITEM_ID][item_id]
        return int(self._item_tokens[row]) if row < self._count else UNKNOWN

    def _set_tokens(self, put: Sequence[EntityId]) -> None:
        """Update the vocabulary indexes, in a new array if a snapshot may read the old one."""
        now, count = self._items, self._count + len(self._items.ids)
        published = 0 if self._laid is None else len(self._laid.items)
        if len(now.tokens) < count:
            now.tokens = _with_room(now.tokens[: max(published, self._count)], count)
        token_of: dict[int, int] = {}
        if self._admitted:
            ids = [item_id for item_id in self._admitted if is_id(item_id, self.base.items.kind)]
            rows = self.base.items.grown(now.ids, now.rows).find(pa.array(ids, self.base.items.kind))
            for item_id, row in zip(ids, rows.tolist(), strict=True):
                if row >= 0:
                    entity = now.put[item_id].entity if item_id in now.put else Entity()
                    token_of[row] = self._token(item_id, entity, row)
        token_of |= {now.put[item_id].row: now.put[item_id].token for item_id in put}
        changed = {row: token for row, token in token_of.items() if now.tokens[row] != token}
        if any(row < published for row in changed):
            now.tokens = now.tokens.copy()
        for row, token in changed.items():
            now.tokens[row] = token
        for item_id in self._admitted & now.put.keys():
            item = now.put[item_id]
            now.put[item_id] = replace(item, token=int(now.tokens[item.row]))

    def _moved_items(self) -> set[EntityId]:
        """Items put before whose vectors must be computed again, because rows that they read have changed."""
        if not self._moved and not self._admitted:
            return set()
        put = self._items.put
        if self._moved and self._reads_others:
            return set(put)
        return {item_id for item_id, item in put.items() if item.token in self._moved or item_id in self._admitted}

    def _encode(self, items: Iterable[EntityId], columns: Mapping[EntityId, dict[str, Column]]) -> None:
        """Compute the vectors of items that were put, by the frozen item tower; one at a time, so that the bytes do not
        depend on the other items.
        """
        now = self._items
        order = sorted(items, key=lambda item_id: now.put[item_id].row)
        if not order:
            return
        tower, each, vectors = self._tower.with_tables(self._all_tables()), [], []
        for item_id in order:
            item = now.put[item_id]
            encoded = dict(columns[item_id] if item_id in columns else item_columns(self.base, item_id, item.entity))
            if c.ITEM_ID in encoded:
                encoded[c.ITEM_ID] = np.array([item.token], np.int32)
            try:
                vector = tower.encode(encoded)[0]
                problem = None if np.isfinite(vector).all() else "its features give no finite vector"
            except Exception as error:  # the other items are served in any case
                problem = repr(error)
            if problem is not None:
                vector = np.zeros(self._vectors.values.shape[1], np.float32)
                self.aside.note(ITEM, item_id, problem)
                now.gone = now.gone.copy()
                now.gone[item.row] = True
            vectors.append(vector)
            if c.ITEM_ID in encoded:  # rankers do not learn between versions
                known = item.row < self._count
                encoded[c.ITEM_ID] = self._item_tokens[[item.row]] if known else np.array([UNKNOWN], np.int32)
            each.append(encoded)
        rows = np.array([now.put[item_id].row for item_id in order], np.int64)
        now.vectors = _piled(now.vectors, Rows(rows, np.stack(vectors)))
        if self.base.rankers:
            together = {name: concatenate([item[name] for item in each]) for name in each[0]}
            now.encoded = _piled(now.encoded, Encoded(rows, together))

    def _all_tables(self) -> dict[str, Table]:
        tables: dict[str, Table] = dict(self._mapped)
        for name, pieces in self._tables.items():
            for piece in pieces:
                tables[name] = LaidRows(tables[name], piece.rows, piece.values)
        return tables

    def _snapshot(self) -> Version:
        """The version with the items as they are now."""
        base, now = self.base, self._items
        count = self._count + len(now.ids)
        back = np.flatnonzero(base.gone & ~now.gone[: self._count])
        if self._learned or self._laid is None or not np.array_equal(back, self._back):
            self._user_tower = base.user_tower.with_tables(self._all_tables())
            self._back, self._hidden, self._below = back, {}, {}
            for name, channel in base.channels.items():
                if isinstance(channel, VectorChannel) and (vectors := channel.item_vectors) is not None:
                    self._below[name] = Rows(back, np.array(vectors[back], np.float32))
            self._below[TWO_TOWER] = self._below[TWO_TOWER].with_newer(self._vectors)
            if NEW_ITEMS in base.channels:
                self._below[NEW_ITEMS] = self._of_new(self._below[TWO_TOWER])
        towers = self._laid_channel(base.two_tower, now.vectors, now.tokens[:count], self._user_tower.encode)
        channels: dict[str, Retriever] = {}
        for name, channel in base.channels.items():
            if name == TWO_TOWER:
                channels[name] = towers
            elif name == NEW_ITEMS and isinstance(channel, VectorChannel):
                pieces = (self._below[name], *(self._of_new(piece) for piece in now.vectors))
                channels[name] = towers.over(name, self._laid_index(channel, pieces))
            elif isinstance(channel, VectorChannel):
                if len(self._other_tokens.get(name, ())) < count:
                    self._other_tokens[name] = _with_room(channel.item_tokens, count)
                tokens = self._other_tokens[name][:count]
                channels[name] = self._laid_channel(channel, (), tokens, channel.encode_users)
            else:
                channels[name] = self._without(channel)
        changed = count > self._count or now.attributes
        return replace(
            base,
            attributes=Attributes(base.catalogue, now.attributes, count) if changed else base.attributes,
            items=base.items.grown(now.ids, now.rows) if changed or now.rows else base.items,
            channels=channels,
            user_tower=self._user_tower,
            gone=now.gone,
            rankers={name: ranker.with_items(now.encoded) for name, ranker in base.rankers.items()},
            again=now.again,
        )

    def _laid_channel(
        self, channel: VectorChannel, pieces: tuple[Rows, ...], tokens: Tokens, encode: UserEncoder
    ) -> VectorChannel:
        """A channel with newer vectors of some items, without what is gone; the last piece is the newest."""
        newer, vectors = (self._below[channel.name], *pieces), channel.item_vectors
        assert vectors is not None
        for piece in newer:
            vectors = LaidRows(vectors, piece.rows, piece.values) if len(piece) else vectors
        index = self._laid_index(channel, newer)
        return replace(channel, item_tokens=tokens, index=index, item_vectors=vectors, encode_users=encode)

    def _laid_index(self, channel: VectorChannel, newer: Sequence[Rows]) -> VectorIndex:
        """The index of a channel with newer vectors, without what is gone."""
        newer = [piece for piece in newer if len(piece)]
        gone, indexes = self._items.gone, list[ExactIndex]()
        for place, piece in enumerate(newer):
            out = gone[piece.rows]
            for above in newer[place + 1 :]:
                at = np.minimum(np.searchsorted(piece.rows, above.rows), len(piece) - 1)
                out[at[piece.rows[at] == above.rows]] = True
            indexes.append(piece.index.without(piece.rows[out]) if out.any() else piece.index)
        hidden = gone[: self._count] & ~self.base.gone
        for piece in newer:
            hidden[piece.rows[: np.searchsorted(piece.rows, self._count)]] = True
        before = self._hidden.get(channel.name)
        if before is None or not np.array_equal(before.rows, hidden):
            left = channel.index.without(np.flatnonzero(hidden)) if hidden.any() else channel.index
            before = self._hidden[channel.name] = _Hidden(hidden, left)
        return functools.reduce(OverlaidIndex, indexes, before.index)

    def _without(self, channel: Retriever) -> Retriever:
        """A counted channel without the items that are gone, and without those that it does not know."""
        gone = self._items.gone[: self._count]
        if not np.array_equal(gone, self.base.gone):
            channel = channel.channel if isinstance(channel, WithoutItems) else channel
            channel = WithoutItems(channel, gone) if gone.any() else channel
        return KnownItems(channel, self._count) if self._items.ids else channel

    @property
    def _reads_others(self) -> bool:
        """Whether an item's vector depends on other rows of the table of item ids than its own."""
        return any(table_of(feature) == c.ITEM_ID and feature.name != c.ITEM_ID for feature in self.base.features.item)

    @cached_property
    def _tower(self) -> OnnxTower:
        folder = self.base.path / "channels" / TWO_TOWER
        return OnnxTower(folder / "item_tower.onnx", self.base.features.item, self._mapped)

    def _of_new(self, piece: Rows) -> Rows:
        """The rows of a piece that belong to new items."""
        channel = self.base.channels[NEW_ITEMS]
        assert isinstance(channel, VectorChannel)
        kept = np.isin(piece.rows, channel.index.rows) | (piece.rows >= self._count)
        return piece if kept.all() else Rows(piece.rows[kept], piece.values[kept])


def as_served(base: Version, deltas: Path, entities: EntityChanges) -> Version:
    """A version with its deltas and with what was put or deleted, as a server that starts now serves it.

    Raises:
        VersionError: a delta is damaged or missing.
    """
    overlay = Overlay(base)
    for delta in read_chain(deltas, base.path):
        overlay.learn(delta)
    return overlay.lay(entities) if overlay.seq or entities.items or entities.users else base


def item_columns(base: Version, item_id: EntityId, entity: Entity, aside: SetAside | None = None) -> dict[str, Column]:
    """The inputs of the item tower for one item that was put, its id unknown; `aside` notes what cannot be used."""
    note = None if aside is None else functools.partial(aside.note, ITEM, item_id)
    columns = encode_usable(base.features.item, entity.features or {}, note)
    if c.ITEM_ID in columns:
        columns[c.ITEM_ID] = np.array([UNKNOWN], np.int32)
    return columns


def check_item(base: Version, features: Mapping[str, Any]) -> None:
    """Raise a DataError for a name that is no attribute of the version's items, or a value of another type."""
    names = [name for name in base.attributes.schema.names if name not in (c.ITEM_ID, c.AVAILABLE)]
    if strange := sorted(set(features) - set(names)):
        raise DataError(f"features: items have no attribute {cut(', '.join(strange))}; they have {', '.join(names)}")
    for name, value in features.items():
        check_value(value, f"features: {name}")
        kind = base.attributes.schema.field(name).type
        if column_of(value, kind) is None:
            raise DataError(f"features: {name} = {shown(value)}, where {plain_type(kind)} is expected")
    own = [feature for feature in base.features.item if feature.name != c.ITEM_ID]
    given = [feature.name for feature in own if feature.name in features]
    encode_request(own, {name: features[name] for name in given}, "features")


def _attributes(item_id: EntityId, entity: Entity) -> dict[str, Any]:
    return {**(entity.features or {}), c.ITEM_ID: item_id, c.AVAILABLE: entity.available is not False}


def _order(item_id: EntityId, entity: Entity) -> tuple[int, Any]:
    """The sort key of items that need a row."""
    return entity.began, item_id


def _birth(entity: Entity) -> tuple[int, int | None]:
    """What tells an item from those that had its id before."""
    return entity.began, entity.deleted_ms


def _with_room(tokens: Tokens, count: int) -> Tokens:
    """The same vocabulary indexes, with unknown ones behind them as room for more items."""
    return np.concatenate([tokens, np.full(2 * max(count, len(tokens)) + SMALLER - len(tokens), UNKNOWN, np.int32)])


class _Piece(Protocol):
    def __len__(self) -> int: ...

    def with_newer(self, other: Self, /) -> Self: ...


P = TypeVar("P", bound=_Piece)


def _piled(pieces: tuple[P, ...], newer: P) -> tuple[P, ...]:
    """Pieces of a table with a newer one on top: few, and each far smaller than the one below it.

    A delta of a few rows is laid on a million without copying them, and a look-up goes through a few pieces.

    >>> piece = Rows(np.arange(3), np.zeros((3, 1), np.float32))
    >>> below = Rows(np.arange(100), np.ones((100, 1), np.float32))
    >>> [len(rows) for rows in _piled((below, piece), piece)]
    [100, 3]
    """
    if pieces and not len(newer):
        return pieces
    while pieces and len(pieces[-1]) < SMALLER * len(newer):
        *below, last = pieces
        pieces, newer = tuple(below), last.with_newer(newer)
    return (*pieces, newer)
