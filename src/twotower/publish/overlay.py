"""What was learned since a version, laid over it: deltas, and users and items that were put or deleted.

The version stays as it is, mapped into memory. A new overlay is a new `Version` that shares everything which did not
change; who answers swaps one reference. It is a function of the version, of its deltas in their order and of what the
log says of entities, so all replicas have the same bytes.

N items of the version, A items put since, D vector.
"""

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.columns import Bag, Column, concatenate, pointers
from twotower.features.columns import Rows as Tokens
from twotower.features.feature_set import encode_request
from twotower.features.vocabulary import UNKNOWN
from twotower.index.checks import ROWS
from twotower.index.overlaid import OverlaidIndex
from twotower.index.protocol import PADDING, Exclusions
from twotower.logs.entities import Entity, EntityId
from twotower.models.channel import VectorChannel
from twotower.models.retriever import Candidates, Queries, Retriever, WithoutItems, similar_items
from twotower.models.two_tower import Table, table_of
from twotower.publish.delta import Delta, Rows, base_digest, read_next
from twotower.publish.onnx import OnnxTower
from twotower.publish.ranker import OnnxRanker
from twotower.publish.tables import LaidRows, map_tables
from twotower.publish.version import NEW_ITEMS, TWO_TOWER, ItemKeys, Since, Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError

log = logging.getLogger(__name__)

_SMALLER = 16
"""How many times a piece of a table is smaller than the one below it, at least."""

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entities:
    """The users and items that were put or deleted, by id."""

    items: Mapping[EntityId, Entity] = field(default_factory=dict)
    users: Mapping[EntityId, Entity] = field(default_factory=dict)


@dataclass(frozen=True)
class _Catalogue:
    """The items of a version and those put since."""

    batch: pa.RecordBatch
    keys: ItemKeys
    gone: npt.NDArray[np.bool_]
    """(N + A,) deleted or not available."""
    put: dict[EntityId, int]
    """Rows of the items whose features were put."""


class KnownItems:
    """A channel of a version that is asked about items put since: it knows nothing of them.

    Args:
        channel: what it asks.
        count: N, the items that the channel knows.
    """

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
        found = similar_items(self.channel, np.where(known, rows, 0), k)
        if found is not None:
            found.rows[~known], found.scores[~known] = PADDING, -np.inf
        return found


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
    """

    def __init__(self, base: Version) -> None:
        self.base = base
        self.seq = 0
        self.watermark_ms: int | None = base.watermark_ms
        self._tables: dict[str, tuple[Rows, ...]] = {}
        """By table, the rows that are newer than the version's: the pieces of `_piled`."""
        self._vectors = Rows.none(base.item_vectors.shape[1])
        self._ids: dict[str, dict[EntityId, int]] = {c.USER_ID: {}, c.ITEM_ID: {}}
        self._forgotten: dict[str, set[EntityId]] = {c.USER_ID: set(), c.ITEM_ID: set()}
        self._mapped = map_tables(base.path / "channels" / TWO_TOWER)
        self._item_tower: OnnxTower | None = None
        self._base_gone = base.gone
        self._of_entities: Mapping[EntityId, Entity] = {}
        self._catalogue = _Catalogue(base.catalogue, base.items, self._base_gone, {})
        self._put: dict[EntityId, tuple[Entity, int, Floats]] = {}
        self._moved: set[int] = set()
        self._new_rows = _rows_of_index(base)
        self._rankers = dict(base.rankers)
        ids = base.features.vocabularies.get(c.ITEM_ID)
        self._item_tokens = base.two_tower.item_tokens
        if ids is not None and base.features.history is None:
            self._item_tokens = ids.rows(base.item_ids)

    def copied(self) -> "Overlay":
        """The same, to try a delta on."""
        other = copy.copy(self)
        other._tables, other._moved, other._put = dict(self._tables), set(self._moved), dict(self._put)
        other._ids = {name: dict(ids) for name, ids in self._ids.items()}
        other._forgotten = {name: set(ids) for name, ids in self._forgotten.items()}
        return other

    def learn(self, delta: Delta) -> None:
        """Take in the next delta; `lay` shows it."""
        for name, rows in delta.tables.items():
            if name not in self._mapped or rows.values.shape[1] != self._mapped[name].shape[1]:
                raise DataError(f"delta {delta.seq} has rows of a table {name} that version {self.base.id} has not so")
            if len(rows.rows) and rows.rows[-1] >= self._mapped[name].shape[0]:
                raise DataError(
                    f"delta {delta.seq} has row {rows.rows[-1]} of table {name}, which has "
                    f"{self._mapped[name].shape[0]} in version {self.base.id}"
                )
        kinds = {c.USER_ID: self.base.users.ids.type, c.ITEM_ID: self.base.item_ids.type}
        for name, ids in delta.new_ids.items():
            if name not in kinds or ids.column("id").type != kinds[name]:
                raise DataError(f"delta {delta.seq} has ids of {name} that version {self.base.id} has not so")
            if name in self._mapped and ids.num_rows and pc.max(ids.column("row")).as_py() >= len(self._mapped[name]):
                raise DataError(f"delta {delta.seq} has ids of {name} with rows beyond its table")
        if delta.item_vectors.shape[1] != self._vectors.values.shape[1]:
            raise DataError(f"delta {delta.seq} has vectors of {delta.item_vectors.shape[1]} numbers")
        for name, rows in delta.tables.items():
            self._tables[name] = _piled(self._tables.get(name, ()), rows)
        for name, ids in delta.new_ids.items():
            for one, row in zip(ids.column("id").to_pylist(), ids.column("row").to_pylist(), strict=True):
                self._ids[name][one] = row
                if row == UNKNOWN:
                    self._forgotten[name].add(one)
        found = self.base.items.find(delta.item_ids)
        known = np.flatnonzero(found >= 0)
        order = known[np.argsort(found[known], kind="stable")]
        self._vectors = self._vectors.with_newer(Rows(found[order], delta.item_vectors[order]))
        if c.ITEM_ID in delta.tables:
            self._moved |= set(delta.tables[c.ITEM_ID].rows.tolist())
        self.seq, self.watermark_ms = delta.seq, delta.watermark_ms

    def folded(self) -> Delta:
        """What a reader is to know of all that was learned, as one delta."""
        base = self.base
        kinds = {c.USER_ID: base.users.ids.type, c.ITEM_ID: base.item_ids.type}
        new_ids = {}
        for name, kind in kinds.items():
            ids = {one: row for one, row in self._ids[name].items() if row != UNKNOWN}
            known = [*sorted(self._forgotten[name]), *sorted(ids)]  # a forgotten one may have come again
            rows = [UNKNOWN] * len(self._forgotten[name]) + [ids[one] for one in sorted(ids)]
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

    def lay(self, entities: Entities) -> Version:
        """The version with all that was learned and put."""
        base = self.base
        if entities.items is not self._of_entities:
            self._catalogue = self._merge(entities.items)
            self._of_entities = entities.items
            self._rankers = self._with_put(entities.items)
        catalogue = self._catalogue
        tables: dict[str, Table] = dict(self._mapped)
        for name, pieces in self._tables.items():
            for piece in pieces:
                tables[name] = LaidRows(tables[name], piece.rows, piece.values)
        tokens = self._tokens(entities.items)
        put = self._put_vectors(entities.items, tokens, tables)
        back = np.flatnonzero(self._base_gone & ~catalogue.gone[: base.base_items])
        since = Since(self._user_tokens(entities.users), entities.users)
        encode = base.user_tower.with_tables(tables)
        channels: dict[str, Retriever] = {}
        for name, channel in base.channels.items():
            if isinstance(channel, VectorChannel) and name in (TWO_TOWER, NEW_ITEMS):
                newer = _vectors_of(base.two_tower, back).with_newer(self._vectors).with_newer(put)
                channels[name] = self._laid(
                    channel, newer if name == TWO_TOWER else self._of_new(newer), tokens, encode
                )
            elif isinstance(channel, VectorChannel):
                others = np.concatenate(
                    [channel.item_tokens, np.full(len(tokens) - base.base_items, UNKNOWN, np.int32)]
                )
                channels[name] = self._laid(channel, _vectors_of(channel, back), others, None)
            else:
                channels[name] = self._without(channel)
        all_newer = self._vectors.with_newer(put)
        return replace(
            base,
            catalogue=catalogue.batch,
            items=catalogue.keys,
            item_vectors=_lay_vectors(base.two_tower, all_newer),
            channels=channels,
            user_tower=encode,
            delta_seq=self.seq,
            since=since,
            gone=catalogue.gone,
            rankers=self._rankers,
            put=catalogue.put,
        )

    def _laid(self, channel: VectorChannel, newer: Rows, tokens: Tokens, encode: OnnxTower | None) -> VectorChannel:
        gone = np.flatnonzero(self._catalogue.gone)
        kept = ~np.isin(newer.rows, gone)
        index = OverlaidIndex.over(channel.index, newer.rows[kept], np.ascontiguousarray(newer.values[kept]))
        return channel.newer(
            tokens,
            index.without(gone) if len(gone) else index,
            None if channel.item_vectors is None else _lay_vectors(channel, newer),
            None if encode is None else encode.encode,
        )

    def _without(self, channel: Retriever) -> Retriever:
        """A counted channel without what is gone, that is not asked about what it does not know."""
        gone = self._catalogue.gone[: self.base.base_items]
        if not np.array_equal(gone, self._base_gone):
            channel = channel.channel if isinstance(channel, WithoutItems) else channel
            channel = WithoutItems(channel, gone) if gone.any() else channel
        added = len(self._catalogue.gone) > self.base.base_items
        return KnownItems(channel, self.base.base_items) if added else channel

    def _with_put(self, items: Mapping[EntityId, Entity]) -> dict[str, OnnxRanker]:
        """The rankers with the features of the items that were put; new ones and those that came back have no id."""
        put = sorted(self._catalogue.put.items(), key=lambda one: one[1])
        if not put or not self.base.rankers:
            return dict(self.base.rankers)
        known = self._item_tokens
        tokens = [UNKNOWN if row >= len(known) or items[one].fresh else int(known[row]) for one, row in put]
        each = [item_columns(self.base, one, items[one], token) for (one, _), token in zip(put, tokens, strict=True)]
        columns = {name: concatenate([one[name] for one in each]) for name in each[0]}
        rows = np.array([row for _, row in put], np.int64)
        return {name: ranker.with_items(rows, columns) for name, ranker in self.base.rankers.items()}

    def _merge(self, items: Mapping[EntityId, Entity]) -> _Catalogue:
        """The catalogue with the items that were put, new ones in ascending order behind the others."""
        base = self.base
        kind = base.item_ids.type
        items = {one: entity for one, entity in items.items() if type(one) is (int if kind == pa.int64() else str)}
        ids = [one for one, entity in items.items() if not entity.deleted]
        rows = dict(zip(ids, base.items.find(pa.array(ids, kind)).tolist(), strict=True))
        added = pa.array(sorted(one for one, row in rows.items() if row < 0 and items[one].features is not None), kind)
        keys = ItemKeys(pa.concat_arrays([base.item_ids, added]), base.base_items) if len(added) else base.items
        rows |= {one: base.base_items + place for place, one in enumerate(added.to_pylist())}
        put = {one: row for one, row in rows.items() if row >= 0 and items[one].features is not None}
        batch = base.catalogue
        if put:
            batch = _with_attributes(
                base.catalogue, [(row, one, items[one]) for one, row in put.items()], len(keys.ids)
            )
        gone = np.concatenate([self._base_gone, np.zeros(len(added), np.bool_)])
        for one, row in rows.items():
            available = items[one].available
            if row >= 0 and (available is not None or one in put):
                gone[row] = available is False
        deleted = pa.array([one for one, entity in items.items() if entity.deleted], kind)
        out = base.items.find(deleted)
        gone[out[out >= 0]] = True
        return _Catalogue(batch, keys, gone, put)

    def _tokens(self, items: Mapping[EntityId, Entity]) -> Tokens:
        """(N + A,) row of each item in the table of item ids."""
        base, catalogue = self.base, self._catalogue
        added = len(catalogue.gone) - base.base_items
        tokens = np.concatenate([self._item_tokens, np.full(added, UNKNOWN, np.int32)])
        if self._ids[c.ITEM_ID]:
            learned = self._ids[c.ITEM_ID]
            rows = catalogue.keys.find(pa.array(list(learned), base.item_ids.type))
            there = rows >= 0
            tokens[rows[there]] = np.array(list(learned.values()), np.int32)[there]
        again = [one for one, entity in items.items() if entity.fresh and one not in self._forgotten[c.ITEM_ID]]
        if again:
            rows = catalogue.keys.find(pa.array(again, base.item_ids.type))
            tokens[rows[rows >= 0]] = UNKNOWN
        return tokens

    def _user_tokens(self, users: Mapping[EntityId, Entity]) -> dict[EntityId, int]:
        tokens = dict(self._ids[c.USER_ID])
        for one, entity in users.items():
            if entity.fresh and one not in self._forgotten[c.USER_ID]:
                tokens[one] = UNKNOWN
        return tokens

    def _put_vectors(self, items: Mapping[EntityId, Entity], tokens: Tokens, tables: Mapping[str, Table]) -> Rows:
        """Vectors of the items whose features were put, by the frozen item tower; each by itself, so that the bytes do
        not depend on which others there are.
        """
        put, moved = self._catalogue.put, self._moved
        tower = self._tower().with_tables(tables) if put else None
        fresh: dict[EntityId, tuple[Entity, int, Floats]] = {}
        for one, row in put.items():
            token, before = int(tokens[row]), self._put.get(one)
            same = before is not None and before[0] == items[one] and before[1] == token
            if before is not None and same and token not in moved and not self._reads_others:
                fresh[one] = before
            elif tower is not None:
                fresh[one] = (items[one], token, tower.encode(item_columns(self.base, one, items[one], token))[0])
        self._put, self._moved = fresh, set()
        order = sorted(put, key=lambda one: put[one])
        if not order:
            return Rows.none(self._vectors.values.shape[1])
        return Rows(np.array([put[one] for one in order], np.int64), np.stack([fresh[one][2] for one in order]))

    @property
    def _reads_others(self) -> bool:
        """An item's vector depends on rows of the table of item ids beside its own."""
        return any(table_of(feature) == c.ITEM_ID and feature.name != c.ITEM_ID for feature in self.base.features.item)

    def _tower(self) -> OnnxTower:
        if self._item_tower is None:
            folder = self.base.path / "channels" / TWO_TOWER
            self._item_tower = OnnxTower(folder / "item_tower.onnx", self.base.features.item, self._mapped)
        return self._item_tower

    def _of_new(self, vectors: Rows) -> Rows:
        kept = np.isin(vectors.rows, self._new_rows) | (vectors.rows >= self.base.base_items)
        return Rows(vectors.rows[kept], vectors.values[kept])


def as_served(base: Version, deltas: Path, entities: Entities) -> Version:
    """A version with its deltas and with what was put or deleted, as a server that starts now shows it.

    Args:
        base: as `open_version` gives it.
        deltas: the folder of the chains of all versions.
        entities: what was put or deleted.

    Raises:
        VersionError: a delta is damaged or missing.
    """
    overlay = Overlay(base)
    digest = follows = base_digest(base.path)
    while (delta := read_next(deltas, base.id, digest, overlay.seq, follows)) is not None:
        overlay.learn(delta)
        follows = delta.digest
    return overlay.lay(entities) if overlay.seq or entities.items or entities.users else base


def item_columns(base: Version, item_id: EntityId, entity: Entity, token: int) -> dict[str, Column]:
    """What enters the item tower for one item that was put (N = 1)."""
    columns: dict[str, Column] = {}
    for feature in base.features.item:
        try:
            columns |= encode_request([feature], _only(feature.name, entity.features or {}), f"item {item_id!r}")
        except DataError as error:  # it was put for a version whose features were of other types
            log.warning("counts as missing: %s", error)
            columns[feature.name] = feature.absent(1)
    if c.ITEM_ID in columns:
        columns[c.ITEM_ID] = np.array([token], np.int32)
    return columns


def _only(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name]} if name in values else {}


def check_item(base: Version, features: Mapping[str, Any]) -> None:
    """Refuse features of an item that the version cannot use.

    Raises:
        DataError: a name that is no attribute of items, or a value of another type.
    """
    names = [name for name in base.catalogue.schema.names if name not in (c.ITEM_ID, c.AVAILABLE)]
    if strange := sorted(set(features) - set(names)):
        raise DataError(f"features: items have no attribute {', '.join(strange)}; they have {', '.join(names)}")
    for name, value in features.items():
        kind = base.catalogue.schema.field(name).type
        if _one(value, kind) is None:
            raise DataError(f"features: {name} = {value!r}, where {plain_type(kind)} is due")
    own = [feature for feature in base.features.item if feature.name != c.ITEM_ID]
    given = [feature.name for feature in own if feature.name in features]
    encode_request(own, {name: features[name] for name in given}, "features")


def _one(value: Any, kind: pa.DataType) -> pa.Array | None:
    """A value as a column of one row, None where it is not of the type."""
    try:
        return pa.array([value], plain_type(kind)).cast(kind)
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError, ValueError):
        return None


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; any other as it is."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _with_attributes(
    catalogue: pa.RecordBatch, put: Sequence[tuple[int, EntityId, Entity]], count: int
) -> pa.RecordBatch:
    """A catalogue of `count` rows, the given ones with the attributes that were put."""
    take = np.arange(count)
    for place, (row, _, _) in enumerate(put):
        take[row] = catalogue.num_rows + place
    columns = []
    for field_ in catalogue.schema:
        if field_.name == c.ITEM_ID:
            values: list[Any] = [one for _, one, _ in put]
        elif field_.name == c.AVAILABLE:
            values = [entity.available is not False for _, _, entity in put]
        else:
            values = [(entity.features or {}).get(field_.name) for _, _, entity in put]
        column = catalogue.column(field_.name)
        parts = [_one(value, field_.type) for value in values]
        newer = pa.concat_arrays([pa.nulls(1, field_.type) if part is None else part for part in parts])
        both = pa.chunked_array([column, newer]).unify_dictionaries().combine_chunks()
        columns.append(both.take(pa.array(take)))
    return pa.record_batch(columns, schema=catalogue.schema)


def _piled(pieces: tuple[Rows, ...], newer: Rows) -> tuple[Rows, ...]:
    """Pieces of a table with a newer one on top: few, and each far smaller than the one below it.

    A delta of a few rows is laid on a million without copying them, and a look-up goes through a handful.

    >>> piece = Rows(np.arange(3), np.zeros((3, 1), np.float32))
    >>> below = Rows(np.arange(100), np.ones((100, 1), np.float32))
    >>> [len(one.rows) for one in _piled((below, piece), piece)]
    [100, 3]
    """
    if pieces and not len(newer.rows):
        return pieces
    while pieces and len(pieces[-1].rows) < _SMALLER * len(newer.rows):
        *below, last = pieces
        pieces, newer = tuple(below), last.with_newer(newer)
    return (*pieces, newer)


def _vectors_of(channel: VectorChannel, rows: Longs) -> Rows:
    """The channel's own vectors of some rows: items that are available again."""
    vectors = channel.item_vectors
    assert vectors is not None
    return Rows(rows, np.array(vectors[rows], np.float32))


def _lay_vectors(channel: VectorChannel, newer: Rows) -> LaidRows:
    vectors = channel.item_vectors
    assert isinstance(vectors, np.ndarray)
    return LaidRows(vectors, newer.rows, newer.values)


def _rows_of_index(base: Version) -> Longs:
    """The rows that the channel of new items searches."""
    path = base.path / "channels" / NEW_ITEMS / "index" / ROWS
    return np.load(path, allow_pickle=False) if path.exists() else np.zeros(0, np.int64)
