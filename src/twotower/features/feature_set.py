"""All features of the two towers: fitted once on training data, saved beside the model, used everywhere."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.features.columns import Column
from twotower.features.fitted import (
    INTERESTS,
    Bucket,
    Categories,
    Category,
    Fitted,
    Items,
    Number,
    PrecomputedVector,
    as_numbers,
    damp,
    raw_column,
    split,
)
from twotower.features.options import Categorical, Feature, Features, MultiCategorical, Numeric, Sequence, Vector
from twotower.features.vocabulary import FIRST, IDS_SCHEMA, Vocabulary, as_values, fit_vocabulary, id_rows
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError, cut
from twotower.schema.files import map_batches, read_json, write_json
from twotower.schema.limits import check_value

HISTORY = "history"
"""The sequence feature that is the user's clicks before the request."""
FEATURES_FILE = "features.json"
VOCABULARY_FILE = "vocab.arrow"


@dataclass(frozen=True)
class TableShape:
    """The shape of one embedding table."""

    name: str
    rows: int
    dimension: int


@dataclass(frozen=True)
class FeatureSet:
    """The fitted features of users, of items and of the request's context."""

    user: tuple[Fitted, ...]
    item: tuple[Fitted, ...]
    context: tuple[Fitted, ...]

    @property
    def history(self) -> Items | None:
        """The feature that reads the user's clicks, if there is one."""
        return next((f for f in self.user if isinstance(f, Items) and f.from_clicks), None)

    @property
    def user_columns(self) -> tuple[Fitted, ...]:
        """The features that are read from `users.parquet`: all but the click history."""
        return tuple(f for f in self.user if not (isinstance(f, Items) and f.from_clicks))

    def of_ids(self) -> "FeatureSet":
        """The ids of users and of items alone, as matrix factorisation reads them."""
        user = tuple(f for f in self.user if f.name == c.USER_ID)
        item = tuple(f for f in self.item if f.name == c.ITEM_ID)
        return FeatureSet(user, item, ())

    def with_interests(self, count: int, rounds: int) -> "FeatureSet":
        """The same features, but the click history becomes `count` interests by this many rounds of routing."""
        history = self.history
        assert history is not None
        routed = replace(history, encoder=INTERESTS, heads=count, blocks=rounds)
        return replace(self, user=tuple(routed if f is history else f for f in self.user))

    @property
    def tables(self) -> dict[str, TableShape]:
        """The embedding tables that the features read, by name."""
        tables: dict[str, TableShape] = {}
        for feature in (*self.user, *self.item, *self.context):
            if isinstance(feature, Category | Categories | Items | Bucket):
                table = feature if isinstance(feature, Bucket) else feature.vocabulary
                tables[table.table] = TableShape(table.table, table.capacity, feature.dimension)
        return dict(sorted(tables.items()))

    @property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """The vocabularies, by the name of their table."""
        found = {
            f.vocabulary.table: f.vocabulary
            for f in (*self.user, *self.item, *self.context)
            if isinstance(f, Category | Categories | Items)
        }
        return dict(sorted(found.items()))


def fit(
    features: Features,
    users: pa.Table,
    items: pa.Table,
    context: Mapping[str, pa.Array],
    dimension: int,
    room: float,
) -> FeatureSet:
    """Fit every feature to the users, items and contexts of the training positives.

    Ids and values that only other rows have stay unknown: their embedding would never be trained.

    Args:
        features: the configured features.
        users: users with a training positive.
        items: items with a training positive.
        context: values of each context column among the training positives; distinct ones are enough for a category,
            a fair sample for a number.
        dimension: width of the id embeddings, the widest of all.
        room: spare rows of the id tables, as a share of the known ids.

    Raises:
        ConfigError: a configured column does not exist.
        DataError: a column does not fit its kind.
    """
    ids = fit_vocabulary(c.ITEM_ID, as_values(items.column(c.ITEM_ID), c.ITEM_ID), room)
    sides = [
        _Side("user", features.user, dict(zip(users.column_names, users.columns, strict=True))),
        _Side("item", features.item, dict(zip(items.column_names, items.columns, strict=True))),
        _Side("context", features.context, context),
    ]
    tables = {c.ITEM_ID: SharedTable(ids, dimension), **_fit_shared(sides, dimension)}
    return FeatureSet(
        *(
            tuple(_fit_feature(side, name, kind, tables, room) for name, kind in sorted(side.wanted.items()))
            for side in sides
        )
    )


@dataclass(frozen=True)
class _Side:
    """The configured features of one side, and the columns that they are fitted to."""

    name: str
    wanted: Mapping[str, Feature]
    columns: Mapping[str, Any]

    def column(self, name: str) -> pa.Array:
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise ConfigError(f"features.{self.name}.{name}: no such column; there are {known}")
        column = self.columns[name]
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


@dataclass(frozen=True)
class SharedTable:
    """What the features of one table have in common."""

    vocabulary: Vocabulary
    dimension: int


def _fit_feature(side: _Side, name: str, kind: Feature, tables: Mapping[str, SharedTable], room: float) -> Fitted:
    """One feature of a side; `tables` are the shared ones by name, that of item ids among them."""
    ids, own = tables[c.ITEM_ID], f"{side.name}.{name}"
    if isinstance(kind, Sequence):
        if side.name != "user":
            raise ConfigError(f"features.{own}: a sequence of items belongs to features.user")
        if name != HISTORY:
            side.column(name)  # it must exist
        shape = (kind.last, kind.encoder, name == HISTORY, kind.heads, kind.blocks)
        return Items(name, ids.vocabulary, ids.dimension, *shape)
    column = side.column(name)
    if isinstance(kind, Numeric):
        return fit_numeric(name, own, kind, column, ids.dimension)
    if isinstance(kind, Vector):
        return PrecomputedVector(name, kind.size)
    single = isinstance(kind, Categorical)
    if single and own == f"item.{c.ITEM_ID}":
        table = ids
    elif kind.table is not None:
        table = tables[kind.table]
    elif single and own == f"user.{c.USER_ID}":
        table = SharedTable(fit_vocabulary(name, as_values(column, name), room), ids.dimension)
    else:
        known = fit_vocabulary(own, _values(kind, column, name))
        table = SharedTable(known, kind.dimension or width(len(known.values), ids.dimension))
    if isinstance(kind, Categorical):
        return Category(name, table.vocabulary, table.dimension)
    return Categories(name, table.vocabulary, table.dimension, kind.separator)


def _values(kind: Categorical | MultiCategorical, column: pa.Array, name: str) -> pa.Array:
    """The values of a column of categories; of several a row, one below the other."""
    flat = split(column, kind.separator, name).flatten() if isinstance(kind, MultiCategorical) else column
    return as_values(flat, name)


def _fit_shared(sides: Iterable[_Side], dimension: int) -> dict[str, SharedTable]:
    """The tables that features share by name, each over the values of all its features.

    Raises:
        ConfigError: features of one table have other types of values, or other dimensions.
    """
    members: dict[str, list[tuple[str, pa.Array, int | None]]] = {}
    for side in sides:
        for name, kind in sorted(side.wanted.items()):
            if isinstance(kind, Categorical | MultiCategorical) and kind.table is not None and name in side.columns:
                values = _values(kind, side.column(name), name)
                members.setdefault(kind.table, []).append((f"features.{side.name}.{name}", values, kind.dimension))
    tables: dict[str, SharedTable] = {}
    for table, fitted in members.items():
        types = {str(values.type): where for where, values, _ in fitted if len(values) > values.null_count}
        wide = {given: where for where, _, given in fitted if given is not None}
        for what, found in (("type", types), ("dimension", wide)):
            if len(found) > 1:
                told = " and ".join(f"{where} has {seen}" for seen, where in found.items())
                raise ConfigError(
                    f"table = {table!r} is of one {what}, but {told}: write them alike, or take two tables"
                )
        if table == c.ITEM_ID:
            if set(wide) - {dimension}:
                raise ConfigError(f"{next(iter(wide.values()))}: the table of item ids is {dimension} wide")
            continue
        kind = next((values.type for _, values, _ in fitted if str(values.type) in types), pa.string())
        known = fit_vocabulary(f"shared.{table}", pa.concat_arrays([values.cast(kind) for _, values, _ in fitted]))
        tables[table] = SharedTable(known, next(iter(wide), None) or width(len(known.values), dimension))
    return tables


def fit_numeric(name: str, table: str, kind: Numeric, column: pa.Array, dimension: int) -> Number | Bucket:
    """Mean and deviation, or quantiles, of the finite values of a column; their order does not matter.

    Raises:
        DataError: no numbers, or so great that they have no deviation in float64.
    """
    values = as_numbers(column, name)
    values = np.sort(values[np.isfinite(values)])  # sums of floats depend on their order
    if kind.transform == "buckets":
        cuts = np.unique(np.quantile(values, np.arange(1, kind.buckets) / kind.buckets)) if len(values) else np.zeros(0)
        return Bucket(name, table, tuple(cuts.tolist()), width(len(cuts) + 1, dimension))
    if kind.transform == "log":
        values = damp(values)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = float(values.mean()) if len(values) else 0.0
        deviation = float(values.std()) if len(values) else 0.0
    if not np.isfinite(deviation):
        raise DataError(
            f"{name} holds numbers as great as {np.abs(values).max():g}: use transform = 'log' or 'buckets'"
        )
    return Number(name, kind.transform == "log", mean, deviation if deviation > 1e-12 * max(1.0, abs(mean)) else 1.0)


def width(values: int, most: int) -> int:
    """Width of an embedding for a vocabulary: six times the fourth root of its size, at most that of an id.

    A common rule of thumb; set `dimension` on the feature to choose otherwise.

    >>> width(2, 64), width(21, 64), width(100_000, 64)
    (8, 13, 64)
    """
    return int(min(most, np.ceil(6 * max(values, 1) ** 0.25)))


def extended(features: FeatureSet, known: Mapping[str, pa.Array], room: float) -> FeatureSet:
    """The same features with other ids, for the full update, which continues yesterday's training.

    Everything else stays as it was fitted, because the networks were trained on it. `known` holds the ids of `user_id`
    and `item_id` that get a row; `room` is the number of spare rows, as a share of these.
    """
    tables = {table: fit_vocabulary(table, ids, room) for table, ids in known.items()}

    def other(feature: Fitted) -> Fitted:
        if isinstance(feature, Category | Categories | Items) and feature.vocabulary.table in tables:
            return replace(feature, vocabulary=tables[feature.vocabulary.table])
        return feature

    return FeatureSet(*(tuple(map(other, side)) for side in (features.user, features.item, features.context)))


def encode_table(features: Iterable[Fitted], table: pa.Table) -> dict[str, Column]:
    """Encode columns of a whole table (N rows), by feature name."""
    return {feature.name: feature.encode(table.column(feature.name).combine_chunks()) for feature in features}


def encode_request(features: Iterable[Fitted], values: Mapping[str, Any], where: str) -> dict[str, Column]:
    """Encode the values of one request (N = 1): what is absent is missing, what is not a feature is an error.

    Raises:
        DataError: an unknown name, or a value of another type than in training.
    """
    features = tuple(features)
    unknown = set(values) - {feature.name for feature in features}
    if unknown:
        names = ", ".join(feature.name for feature in features) or "none"
        told = cut(", ".join(sorted(unknown)))
        raise DataError(f"{where}: {told} is no feature of this model; its features are {names}")
    for name, value in values.items():
        check_value(value, f"{where}: {name}")
    return {
        feature.name: feature.absent(1)
        if values.get(feature.name) is None
        else feature.encode(raw_column(feature, values[feature.name]))
        for feature in features
    }


def save(features: FeatureSet, folder: Path) -> None:
    """Write `features.json` (kinds and statistics) and `vocab.arrow` (table, raw id, row) into a folder."""
    write_json(
        folder / FEATURES_FILE,
        {side: [describe(f) for f in getattr(features, side)] for side in ("user", "item", "context")},
    )
    with pa.OSFile(str(folder / VOCABULARY_FILE), "wb") as sink, pa.ipc.new_file(sink, IDS_SCHEMA) as writer:
        for table, vocabulary in features.vocabularies.items():
            rows = np.arange(len(vocabulary.values), dtype=np.int32) + FIRST
            writer.write_table(id_rows(table, vocabulary.values, pa.array(rows)))


def load(folder: Path) -> FeatureSet:
    """Read what `save` wrote; vocabularies stay memory-mapped.

    Raises:
        DataError: a file is missing or is not of this format.
    """
    document = read_json(folder / FEATURES_FILE)
    batches, _ = map_batches(folder / VOCABULARY_FILE)
    values: dict[str, pa.Array] = {}
    try:
        for batch in batches:
            column = batch.column("number") if batch.column("text").null_count else batch.column("text")
            values[batch.column("table")[0].as_py()] = column
        return FeatureSet(
            *(tuple(_restore(entry, values) for entry in document[side]) for side in ("user", "item", "context"))
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / FEATURES_FILE} and {VOCABULARY_FILE} are not of this format: {error!r}") from None


_KINDS: dict[str, type[Fitted]] = {
    "category": Category,
    "categories": Categories,
    "number": Number,
    "bucket": Bucket,
    "items": Items,
    "ready": PrecomputedVector,
}


def describe(feature: Fitted) -> dict[str, Any]:
    """A fitted feature as `features.json` has it."""
    kind = next(name for name, cls in _KINDS.items() if type(feature) is cls)
    if isinstance(feature, Category | Categories | Items):
        rest = {k: v for k, v in vars(feature).items() if k != "vocabulary"}
        known = feature.vocabulary
        type_name = "int64" if known.values.type == pa.int64() else "string"
        return {"kind": kind, **rest, "table": known.table, "capacity": known.capacity, "values": type_name}
    return {"kind": kind, **asdict(feature)}


def _restore(entry: dict[str, Any], values: Mapping[str, pa.Array]) -> Fitted:
    entry = dict(entry)
    kind = entry.pop("kind")
    if kind in ("category", "categories", "items"):
        table, capacity, type_name = entry.pop("table"), entry.pop("capacity"), entry.pop("values")
        empty = pa.array([], pa.int64() if type_name == "int64" else pa.string())
        entry["vocabulary"] = Vocabulary(table, values.get(table, empty), capacity)
    if kind == "bucket":
        entry["boundaries"] = tuple(entry["boundaries"])
    return _KINDS[kind](**entry)
