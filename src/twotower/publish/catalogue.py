"""The items of a version and those put since, in data structures to which adding one more item is cheap.

Putting an item costs the same whether ten or ten thousand were put before. So nothing here is copied as a whole:

- A list that only grows is shared by all snapshots, and each snapshot knows its own length. Entries behind that length
  belong to later snapshots.
- What may also change is kept in pieces, each far smaller than the one below it. A new piece is laid on top and merged
  with those that are not much larger. So each entry is copied a few times in all, and a look-up goes through few
  pieces. No piece is ever changed.

Both can be read without a lock while one writer adds: no reader sees an entry that is written again.

N items of the version, A items put since.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.features.bloom import Hashes, hash_ids
from twotower.features.columns import Column, concatenate, take
from twotower.features.vocabulary import Positions
from twotower.logs.events import EntityId
from twotower.schema.errors import cut, shown
from twotower.schema.tables import column_of

log = logging.getLogger(__name__)

SMALLER = 16
"""A piece is at least this many times smaller than the one below it."""
_FEWER = 4
"""The same for the pieces of a mapping, whose entries are cheap to copy."""
_MAX_TOLD = 10_000
"""Entities set aside that are remembered; the others are counted again whenever they are met."""

Longs = npt.NDArray[np.int64]
K = TypeVar("K")
V = TypeVar("V")


class Layered(Mapping[K, V], Generic[K, V]):
    """An immutable mapping; one with a few more entries shares most of what it holds.

    >>> first = Layered[str, int]().with_newer({"a": 1, "b": 2})
    >>> second = first.with_newer({"b": 3})
    >>> dict(second), dict(first), second.since(first)
    ({'a': 1, 'b': 3}, {'a': 1, 'b': 2}, {'b': 3})
    """

    __slots__ = ("_count", "_layers")

    def __init__(self, layers: tuple[Mapping[K, V], ...] = (), count: int = 0) -> None:
        """Use `with_newer`."""
        self._layers = layers
        self._count = count

    def with_newer(self, entries: Mapping[K, V]) -> "Layered[K, V]":
        """The same with other values of some keys, or of new ones."""
        if not entries:
            return self
        added = sum(key not in self for key in entries)
        layers, newer = self._layers, entries
        while layers and len(layers[-1]) < _FEWER * len(newer):
            newer = {**layers[-1], **newer}
            layers = layers[:-1]
        return Layered((*layers, dict(newer)), self._count + added)

    def since(self, earlier: "Layered[K, V]") -> dict[K, V]:
        """The entries that differ from an earlier one; the cost is that of what was added since."""
        kept = {id(layer) for layer in earlier._layers}
        keys = [key for layer in self._layers if id(layer) not in kept for key in layer]
        return {key: self[key] for key in keys if key not in earlier or earlier[key] != self[key]}

    def __getitem__(self, key: K) -> V:
        for layer in reversed(self._layers):
            if key in layer:
                return layer[key]
        raise KeyError(key)

    def __iter__(self) -> Iterator[K]:
        return iter({key: None for layer in self._layers for key in layer})

    def __len__(self) -> int:
        return self._count


def changes(earlier: Mapping[K, V], now: Mapping[K, V]) -> dict[K, V] | None:
    """The entries of a mapping that differ from an earlier one; None where some are gone."""
    if now is earlier:
        return {}
    if isinstance(now, Layered) and isinstance(earlier, Layered) and len(now) >= len(earlier):
        return now.since(earlier)
    if any(key not in now for key in earlier):
        return None
    return {key: value for key, value in now.items() if key not in earlier or earlier[key] != value}


class ItemKeys:
    """The ids of a catalogue, by row: those of the version in ascending order, then those put since.

    Args:
        base: (N,) ids of the version.
        added: (A,) ids put since, in the order of the log; later entries of this list belong to later snapshots.
        rows: by id, the row of an item put since, or -1 for one that was deleted. It is shared with later snapshots,
            whose rows are beyond the end of this one.
    """

    def __init__(
        self, base: pa.Array, added: Sequence[EntityId] = (), rows: Mapping[EntityId, int] | None = None
    ) -> None:
        self._base = base
        self._added = added
        self._rows = rows or {}
        self.base = len(base)
        self._count = self.base + len(added)

    def __len__(self) -> int:
        return self._count

    @property
    def _added_ids(self) -> pa.Array:
        return pa.array(self._added[: self._count - self.base], self.kind)

    @property
    def kind(self) -> pa.DataType:
        """The type of ids."""
        return self._base.type

    @cached_property
    def ids(self) -> pa.Array:
        """(N + A,) all ids; an item that was deleted keeps its row."""
        return pa.concat_arrays([self._base, self._added_ids]) if len(self) > self.base else self._base

    def at(self, rows: Longs) -> list[Any]:
        """The ids of some rows (n,)."""
        if len(self) == self.base:
            return self._base.take(pa.array(rows)).to_pylist()  # type: ignore[no-any-return]
        own = rows < self.base
        ids = iter(self._base.take(pa.array(rows[own])).to_pylist())
        return [next(ids) if row < self.base else self._added[row - self.base] for row in rows.tolist()]

    def find(self, ids: pa.Array) -> Longs:
        """The row of each id (n,), -1 for null, an unknown id, or a deleted item."""
        rows = Positions(self._base).find(ids)
        if self._rows:
            for place, item_id in enumerate(ids.to_pylist()):
                row = self._rows.get(item_id)
                if row is not None and row < len(self):
                    rows[place] = row
        return rows

    @cached_property
    def hashes(self) -> Hashes:
        """(N + A,) hashes of the ids, for look-ups in the filters of shown items."""
        return np.concatenate([self._base_hashes, hash_ids(self._added_ids)])

    @cached_property
    def _base_hashes(self) -> Hashes:
        return hash_ids(self._base)

    def grown(self, added: Sequence[EntityId], rows: Mapping[EntityId, int]) -> "ItemKeys":
        """The same ids of the version with others put since."""
        other = ItemKeys(self._base, added, rows)
        if "_base_hashes" in self.__dict__:
            other.__dict__["_base_hashes"] = self._base_hashes
        return other


def newest(newer: Longs, older: Longs) -> tuple[Longs, Longs]:
    """The rows of two pieces together, ascending, and where each stands in the newer followed by the older piece.

    >>> rows, first = newest(np.array([2, 3]), np.array([1, 3]))
    >>> rows.tolist(), first.tolist()
    ([1, 2, 3], [2, 0, 1])
    """
    distinct, first = np.unique(np.concatenate([newer, older]), return_index=True)
    return distinct, first


@dataclass(frozen=True)
class Encoded:
    """Encoded features of some items."""

    rows: Longs
    """(n,) catalogue rows, ascending."""
    columns: Mapping[str, Column]

    def with_newer(self, other: "Encoded") -> "Encoded":
        """Both, where the other's values hold for the rows that both have."""
        rows, first = newest(other.rows, self.rows)
        columns = self.columns.items()
        return Encoded(rows, {name: take(concatenate([other.columns[name], own]), first) for name, own in columns})

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PutRows:
    """Attributes of items as they were put."""

    rows: Longs
    """(n,) catalogue rows, ascending."""
    batch: pa.RecordBatch
    """Of plain types: no dictionaries."""

    @classmethod
    def of(cls, parts: Sequence["PutRows"]) -> "PutRows":
        """Parts of different rows together."""
        rows = np.concatenate([part.rows for part in parts])
        order = np.argsort(rows)
        return cls(rows[order], pa.concat_batches([part.batch for part in parts]).take(pa.array(order)))

    def with_newer(self, other: "PutRows") -> "PutRows":
        """Both, where the other's values hold for the rows that both have."""
        rows, first = newest(other.rows, self.rows)
        return PutRows(rows, pa.concat_batches([other.batch, self.batch]).take(pa.array(first)))

    def __len__(self) -> int:
        return len(self.rows)


class Attributes:
    """Items with their attributes, by catalogue row; a column is put together on first use.

    Args:
        base: of the version.
        put: pieces of what was put since, the newest last.
        count: N + A.
    """

    def __init__(self, base: pa.RecordBatch, put: tuple[PutRows, ...] = (), count: int | None = None) -> None:
        self._base = base
        self._put = put
        self.num_rows: int = base.num_rows if count is None else count
        self.schema: pa.Schema = base.schema
        self._columns: dict[str, pa.Array] = {}

    def column(self, name: str) -> pa.Array:
        """(N + A,) an attribute; null for an item without it."""
        if not self._put:
            return self._base.column(name)
        if name not in self._columns:
            own = self._base.column(name)
            parts = [own, *(piece.batch.column(name).cast(own.type) for piece in self._put)]
            index = np.arange(self.num_rows)
            begin = len(own)
            for piece in self._put:
                index[piece.rows] = begin + np.arange(len(piece.rows))
                begin += len(piece.rows)
            self._columns[name] = pa.chunked_array(parts).unify_dictionaries().combine_chunks().take(pa.array(index))
        return self._columns[name]

    def at(self, rows: Longs, names: Sequence[str]) -> list[dict[str, Any]]:
        """Some attributes of some rows (n,), without putting whole columns together."""
        where: dict[int, dict[str, Any]] = {}
        for piece in reversed(self._put):
            place = np.minimum(np.searchsorted(piece.rows, rows), len(piece.rows) - 1)
            mine = np.flatnonzero(piece.rows[place] == rows)
            some = [at for at in mine.tolist() if at not in where]
            where |= zip(some, piece.batch.select(names).take(pa.array(place[some])).to_pylist(), strict=True)
        others = [at for at in range(len(rows)) if at not in where]
        where |= zip(others, self._base.select(names).take(pa.array(rows[others])).to_pylist(), strict=True)
        return [where[at] for at in range(len(rows))]

    @cached_property
    def batch(self) -> pa.RecordBatch:
        """All columns."""
        if not self._put:
            return self._base
        return pa.record_batch([self.column(name) for name in self.schema.names], schema=self.schema)

    @cached_property
    def put(self) -> Longs:
        """Rows whose attributes were put, ascending."""
        return np.unique(np.concatenate([np.zeros(0, np.int64), *(piece.rows for piece in self._put)]))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a dictionary; any other type as it is."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def put_row(schema: pa.Schema, row: int, values: Mapping[str, Any]) -> PutRows:
    """The attributes of one item as they were put; a value of another type is null."""
    plain = pa.schema([(attribute.name, plain_type(attribute.type)) for attribute in schema])
    columns = []
    for attribute in plain:
        column = column_of(values.get(attribute.name), attribute.type)
        columns.append(pa.nulls(1, attribute.type) if column is None else column)
    return PutRows(np.array([row], np.int64), pa.record_batch(columns, schema=plain))


@dataclass
class SetAside:
    """Changes of users and items in the log that this version cannot use: counted, and logged once each."""

    count: dict[str, int] = field(default_factory=dict)
    """Entities by kind."""
    told: dict[tuple[str, EntityId], str] = field(default_factory=dict)
    """Reasons by kind and id, of the first entities."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, entity_id: EntityId, reason: str) -> None:
        """Note that an entity, or a feature of it, cannot be used."""
        with self._lock:
            if (kind, entity_id) in self.told:
                return
            self.count[kind] = self.count.get(kind, 0) + 1
            if len(self.told) < _MAX_TOLD:
                self.told[kind, entity_id] = cut(reason)
        log.warning("the change of %s %s cannot be used and is set aside: %s", kind, shown(entity_id), cut(reason))
