"""Joined rows of the shards as training positives of a version: raw ids and values in, encoded columns out.

B rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.vector_channel import latest
from twotower.features.columns import Bag, Column, concatenate, pointers, take
from twotower.features.feature_set import HISTORY, FeatureSet
from twotower.features.fitted import Fitted
from twotower.logs.events import EntityId
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.schema.tables import EARLIEST_MS, LATEST_MS, MAX_WEIGHT, require_columns

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StreamPositives:
    """Clicked rows of the shards, in their order."""

    user_ids: pa.Array
    item_ids: pa.Array
    item_row: Longs
    """(B,) catalogue rows."""
    ts_ms: Longs
    weight: npt.NDArray[np.float32]
    user: dict[str, Column]
    """What enters the user tower: stored features or those that came with the request, context, history, and the user's
    own id as the version knows it."""
    clicked: Bag
    """(B) catalogue rows of what the user clicked, in the version and before the request."""

    def __len__(self) -> int:
        return len(self.item_row)

    def take(self, index: Longs) -> "StreamPositives":
        """Some rows, in that order."""
        return StreamPositives(
            self.user_ids.take(pa.array(index)),
            self.item_ids.take(pa.array(index)),
            self.item_row[index],
            self.ts_ms[index],
            self.weight[index],
            {name: take(column, index) for name, column in self.user.items()},
            take(self.clicked, index),
        )

    @classmethod
    def together(cls, parts: Sequence["StreamPositives"]) -> "StreamPositives":
        """Those of several parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            pa.concat_arrays([part.user_ids for part in parts]),
            pa.concat_arrays([part.item_ids for part in parts]),
            np.concatenate([part.item_row for part in parts]),
            np.concatenate([part.ts_ms for part in parts]),
            np.concatenate([part.weight for part in parts]),
            {name: concatenate([part.user[name] for part in parts]) for name in parts[0].user},
            concatenate([part.clicked for part in parts]),
        )


def usable(rows: pa.Table, version: Version) -> npt.NDArray[np.bool_]:
    """Which clicked rows (B,) can be learned: those with ids, a time, and a weight from 0 to `MAX_WEIGHT`.

    Raises:
        DataError: the rows are of another shape: a column is missing, or of another type than the version's.
    """
    kinds = {
        c.USER_ID: version.users.ids.type,
        c.ITEM_ID: version.item_ids.type,
        c.REQUEST_TS_MS: pa.int64(),
        c.CLICK_TS_MS: pa.int64(),
    }
    require_columns(rows, kinds, "a shard")
    for name, kind in kinds.items():
        if rows.column(name).type != kind:
            raise DataError(f"column {name} is of type {rows.column(name).type}, where {kind} is expected")
    kept: npt.NDArray[np.bool_] = pc.and_(
        rows.column(c.USER_ID).is_valid(), rows.column(c.ITEM_ID).is_valid()
    ).to_numpy()
    times = pc.coalesce(rows.column(c.CLICK_TS_MS), rows.column(c.REQUEST_TS_MS)).fill_null(0).to_numpy()
    kept &= (times >= EARLIEST_MS) & (times <= LATEST_MS)
    if c.WEIGHT in rows.column_names:
        weights = rows.column(c.WEIGHT).fill_null(1.0).to_numpy()
        with np.errstate(invalid="ignore"):
            kept &= (weights >= 0) & (weights <= MAX_WEIGHT)
    return kept


def positives_of(version: Version, rows: pa.Table, item_tokens: npt.NDArray[np.int32]) -> StreamPositives:
    """Clicked rows of items that the version has, encoded for it with what was learned and put since.

    `item_tokens` (N,) is the row of each item in the table of item ids.
    """
    user_ids = rows.column(c.USER_ID).combine_chunks()
    item_ids = rows.column(c.ITEM_ID).combine_chunks()
    stored = version.queries_of(user_ids)
    columns = dict(stored.features)
    for feature in version.features.user_columns:
        if feature.name != c.USER_ID:
            columns[feature.name] = _came_with(feature, rows, c.FEATURES, columns[feature.name])
    for feature in version.features.context:
        columns[feature.name] = _came_with(feature, rows, c.CONTEXT, feature.absent(rows.num_rows))
    history = _histories(version, rows, stored.clicks)
    if (reads := version.features.history) is not None:
        columns[reads.name] = latest(history, item_tokens, reads.last)
    return StreamPositives(
        user_ids,
        item_ids,
        version.items.find(item_ids),
        times_of(rows),
        _weights(rows),
        columns,
        _both(stored.clicks, history),
    )


def tokens_of(features: FeatureSet, name: str, ids: pa.Array, learned: Mapping[EntityId, int]) -> npt.NDArray[np.int32]:
    """Row of each id (n,) in its table, as the version knows it or as was learned since."""
    vocabulary = features.vocabularies.get(name)
    if vocabulary is None:
        return np.zeros(len(ids), np.int32)
    rows = vocabulary.rows(ids)
    if learned:
        for place, entity_id in enumerate(ids.to_pylist()):
            rows[place] = learned.get(entity_id, rows[place])
    return rows


def _came_with(feature: Fitted, rows: pa.Table, prefix: str, otherwise: Column) -> Column:
    """A column of the values that came with the requests, and of `otherwise` where none did."""
    name = f"{prefix}{feature.name}"
    if name not in rows.column_names or rows.column(name).null_count == rows.num_rows:
        return otherwise
    column = rows.column(name).combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    return take(concatenate([otherwise, feature.encode(column)]), np.arange(len(there)) + len(there) * there)


def _histories(version: Version, rows: pa.Table, stored: Bag) -> Bag:
    """Catalogue rows of the clicks before each request; those of the version where the request has no history."""
    if HISTORY not in rows.column_names or rows.column(HISTORY).null_count == rows.num_rows:
        return stored
    lists = rows.column(HISTORY).combine_chunks()
    logged = lists.is_valid().to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    item_rows = version.items.find(lists.flatten())
    owner = np.repeat(np.arange(len(lengths)), lengths)[item_rows >= 0]
    own = Bag(pointers(np.bincount(owner, minlength=len(lengths))), item_rows[item_rows >= 0].astype(np.int32))
    return take(concatenate([stored, own]), np.arange(len(logged)) + len(logged) * logged)


def _both(first: Bag, other: Bag) -> Bag:
    """The rows of two bags together, without repeats."""
    count, size = len(first), 1 + int(max(first.rows.max(initial=0), other.rows.max(initial=0)))
    owner = np.concatenate([np.repeat(np.arange(count), np.diff(bag.indptr)) for bag in (first, other)])
    pairs = np.unique(owner * size + np.concatenate([first.rows, other.rows]))
    return Bag(pointers(np.bincount(pairs // size, minlength=count)), (pairs % size).astype(np.int32))


def times_of(rows: pa.Table) -> Longs:
    """Times (B,) of the clicks, or of the requests where a click has none."""
    at = pc.coalesce(rows.column(c.CLICK_TS_MS), rows.column(c.REQUEST_TS_MS))
    times: Longs = at.combine_chunks().to_numpy(zero_copy_only=False)
    return times


def _weights(rows: pa.Table) -> npt.NDArray[np.float32]:
    if c.WEIGHT not in rows.column_names:
        return np.ones(rows.num_rows, np.float32)
    weights: npt.NDArray[np.float32] = rows.column(c.WEIGHT).fill_null(1.0).to_numpy().astype(np.float32)
    return weights
