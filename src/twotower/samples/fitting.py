"""Features fitted to the training rows, or yesterday's with today's ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from ibis import _

from twotower.features.columns import to_arrow
from twotower.features.feature_set import FeatureSet, encode_table, extended, fit
from twotower.features.fitted import Fitted
from twotower.features.options import Features, Numeric, Vector
from twotower.samples.known import KnownEvents
from twotower.samples.names import CONTEXT, FEATURE, ITEM_ROW, USER_ROW
from twotower.samples.rows import LearnedRows
from twotower.samples.sampling import turned
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS

_FITTED_NUMBERS = 1_000_000
"""About this many positives are enough for the mean or the quantiles of a number."""


@dataclass(frozen=True)
class PreviousFeatures:
    """Fitted features that a full update goes on with: only their ids change."""

    features: FeatureSet
    evict_after_days: int | None = None
    """An id without a positive in this many days before the last is out of vocabulary; None = every id stays."""


@dataclass(frozen=True)
class FittedFeatures:
    """The features of some training rows."""

    features: FeatureSet
    users: int
    """Users that have a row in the table of user ids."""
    items: int
    """Items that have a row in the table of item ids."""


def fit_features(
    known: KnownEvents,
    rows: LearnedRows,
    features: Features,
    previous: PreviousFeatures | None,
    *,
    dimension: int,
    room: float,
) -> FittedFeatures:
    """Fit the configured features to the users, items and contexts of the training rows, or give `previous` new ids."""
    latest = rows.fed
    if previous is not None and previous.evict_after_days is not None and known.counts.watermark_ms is not None:
        latest = latest.filter(latest[c.REQUEST_TS_MS] > known.counts.watermark_ms - previous.evict_after_days * DAY_MS)
    users, items = (pa.array(np.flatnonzero(known.tally(latest, row))) for row in (USER_ROW, ITEM_ROW))
    trained = {c.USER_ID: known.users.take(users), c.ITEM_ID: known.items.take(items)}
    if previous is None:
        values = _context_values(known, rows, features)
        fitted = fit(features, trained[c.USER_ID], trained[c.ITEM_ID], values, dimension, room)
    else:
        ids = {name: table.column(name).combine_chunks() for name, table in trained.items()}
        fitted = extended(previous.features, ids, room)
    return FittedFeatures(fitted, len(users), len(items))


def _context_values(known: KnownEvents, rows: LearnedRows, features: Features) -> dict[str, pa.ChunkedArray]:
    """What each context feature is fitted to, never all rows: distinct values, and of numbers about a million.

    The million is chosen by a hash of `event_seq`, so that every engine and every order of rows chooses the same.
    """
    fed, step = rows.fed, -(-int(rows.item_positives.sum()) // _FITTED_NUMBERS)
    some = fed.filter(turned(_[c.EVENT_SEQ]) % step == 0) if step > 1 else fed
    values = {}
    for name, kind in features.context.items():
        column = f"{CONTEXT}{name}"
        query = some.select(column) if isinstance(kind, Numeric) else fed.select(column).distinct()
        if isinstance(kind, Vector):
            query = fed.select(column).limit(0)
        values[name] = as_stored(known.context[column], known.engine.fetch(query).column(column))
    return values


def as_stored(kind: pa.DataType, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column in the type of the files: engines have fewer types than files."""
    return pa.nulls(len(column)) if pa.types.is_null(kind) else column.cast(kind)


def encoded_entities(
    features: tuple[Fitted, ...], table: pa.Table, id_column: str, counts: Mapping[str, Any]
) -> pa.Table:
    """Ids, counts and encoded features, one row for each user or item."""
    encoded = {f"{FEATURE}{name}": to_arrow(column) for name, column in encode_table(features, table).items()}
    return pa.table({id_column: table.column(id_column), **{k: pa.array(v) for k, v in counts.items()}, **encoded})
