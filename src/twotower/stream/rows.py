"""A joined row: one item of one request, with what became of it and what was known at the request.

Shards and daily partitions have the same rows. Values are those that the request carried, in the types of the
workspace's own tables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.datasets.workspace import ITEMS, USERS
from twotower.features import options as spec
from twotower.logs.events import EntityId
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files
from twotower.schema.tables import require_columns

_LARGEST: Final = 3.4e38
"""About the largest float32."""

Value = int | float | str | bool | Sequence[Any] | None

FUNNEL: Final = {
    c.POSITION: pa.int32(),
    c.SCORE: pa.float32(),
    c.CHANNEL: pa.string(),
    c.PROBABILITY: pa.float32(),
    c.PROPENSITY: pa.float32(),
}
"""Columns of what the funnel knew of an item, with their types."""


@dataclass(frozen=True)
class Types:
    """The types of ids and of raw values, as a workspace has them."""

    user_id: pa.DataType
    """int64 or string."""
    item_id: pa.DataType
    features: Mapping[str, pa.DataType]
    """By user feature that a request may carry."""
    context: Mapping[str, pa.DataType]
    """By context feature."""

    def schema(self) -> pa.Schema:
        """The columns of a shard."""
        return pa.schema(
            {
                c.REQUEST_ID: pa.string(),
                c.USER_ID: self.user_id,
                c.ITEM_ID: self.item_id,
                c.REQUEST_TS_MS: pa.int64(),
                c.CLICK_TS_MS: pa.int64(),
                c.OUTCOME: pa.string(),
                c.WEIGHT: pa.float32(),
                **FUNNEL,
                c.VERSION: pa.string(),
                c.DELTA_SEQ: pa.int64(),
                **{f"{c.CONTEXT}{name}": kind for name, kind in self.context.items()},
                **{f"{c.FEATURES}{name}": kind for name, kind in self.features.items()},
                c.HISTORY: pa.list_(self.item_id),
            }
        )


@dataclass(frozen=True, slots=True)
class RowRequest:
    """What the rows of one request share."""

    user_id: EntityId
    request_id: str | None
    ts_ms: int
    context: Mapping[str, Value] = field(default_factory=dict)
    features: Mapping[str, Value] = field(default_factory=dict)
    history: Sequence[EntityId] | None = None
    """Clicks that the model saw, oldest first; None = the request does not say."""
    version: str | None = None
    delta_seq: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One item of one request."""

    request: RowRequest
    item_id: EntityId
    outcome: str
    click_ts_ms: int | None = None
    weight: float | None = None
    position: int | None = None
    score: float | None = None
    channel: str | None = None
    probability: float | None = None
    propensity: float | None = None


def read_types(workspace: Path, user: Mapping[str, spec.Feature], context: Mapping[str, spec.Feature]) -> Types:
    """The types of a workspace's ids, and of its configured features of users and of requests.

    Raises:
        DataError: a table is missing.
        ConfigError: a configured user feature is no column of `users.parquet`.
    """
    users, items = (read_schema(workspace / name) for name in (USERS, ITEMS))
    require_columns(users, [c.USER_ID], USERS)
    require_columns(items, [c.ITEM_ID], ITEMS)
    item_id = _id_type(items.field(c.ITEM_ID).type)
    features = {}
    for name, feature in user.items():
        if name == c.USER_ID or (name == c.HISTORY and isinstance(feature, spec.Sequence)):
            continue
        if name not in users.names:
            raise ConfigError(
                f"features.user.{name}: users.parquet has no such column; it has {', '.join(users.names)}"
            )
        features[name] = _raw_type(users.field(name).type, feature, item_id)
    stored = _context_types(workspace / "events", set(context))
    return Types(
        _id_type(users.field(c.USER_ID).type),
        item_id,
        features,
        {name: _raw_type(stored.get(name, pa.null()), feature, item_id) for name, feature in context.items()},
    )


def as_value(value: Any, kind: pa.DataType) -> Value:
    """A value of JSON in the type of a column; whole floats and booleans count as integers, NaN as null.

    Raises:
        ValueError: the value is not of that type.

    >>> as_value(3.0, pa.int64()), as_value(3, pa.float32()), as_value(["a"], pa.list_(pa.string()))
    (3, 3.0, ['a'])
    """
    if value is None:
        return None
    if pa.types.is_list(kind) and isinstance(value, list):
        return [as_value(entry, kind.value_type) for entry in value if entry is not None]
    if (pa.types.is_string(kind) and isinstance(value, str)) or (pa.types.is_boolean(kind) and isinstance(value, bool)):
        return value
    if isinstance(value, int | float) and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        if not math.isfinite(value):
            return None
        if pa.types.is_floating(kind):
            if abs(value) <= _LARGEST:
                return float(value)
        elif value == math.floor(value) and -(2 ** (kind.bit_width - 1)) <= value < 2 ** (kind.bit_width - 1):
            return int(value)
    raise ValueError(f"{value!r} is not of type {kind}")


def read_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: import or simulate a workspace first") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None


def _id_type(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if pa.types.is_integer(kind) else pa.string()


def _context_types(events: Path, wanted: set[str]) -> dict[str, pa.DataType]:
    """The type of each context column in the first file that has values of it."""
    known: dict[str, pa.DataType] = {}
    for folder in sorted(events.glob(f"{c.DATE}=*")):
        for path in parquet_files(folder):
            if wanted <= known.keys():
                return known
            stored = read_schema(path)
            for name in wanted.intersection(stored.names) - known.keys():
                if not pa.types.is_null(stored.field(name).type):
                    known[name] = stored.field(name).type
    return known


def _raw_type(kind: pa.DataType, feature: spec.Feature, item_id: pa.DataType) -> pa.DataType:
    """The type of a feature's raw values: of numbers and sequences by their kind, of categories that of their column.

    Categories without any value in a file are strings.
    """
    if isinstance(feature, spec.Numeric):
        return pa.float32()
    if isinstance(feature, spec.Vector):
        return pa.list_(pa.float32())
    if isinstance(feature, spec.Sequence):
        return pa.list_(item_id)
    if pa.types.is_null(kind):
        listed = isinstance(feature, spec.MultiCategorical) and feature.separator is None
        return pa.list_(pa.string()) if listed else pa.string()
    return _category_type(kind)


def _category_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _category_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(_category_type(kind.value_type))
    if pa.types.is_boolean(kind):
        return pa.bool_()
    whole = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return pa.int64() if whole else pa.string()
