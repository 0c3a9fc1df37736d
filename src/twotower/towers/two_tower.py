"""The two-tower model: tables and two dense towers that meet only in a cosine.

B batch, D vector. A tower's input is assembled in two ways that must agree: with gradients, from the rows that a step
touches (`Step`), and without, from whole tables in NumPy (`tower_inputs`), which evaluation, publishing and the server
share.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from twotower.features.columns import Bag, Beginnings, Column, Rows, padded
from twotower.features.feature_set import FeatureSet
from twotower.features.fitted import Bucket, Categories, Category, Fitted, Items
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.towers.embedding import Compactor, EmbeddingTable, TouchedRows, mean_of_bags
from twotower.towers.options import TowerOptions
from twotower.towers.towers import LENGTH, POPULARITY, ROW, Tower, WithPopularity, is_encoded

Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]

PREFERENCE = "popularity"
"""The table (rows of the table of item ids, 2) of what `WithPopularity` adds to items."""


class Table(Protocol):
    """An embedding table as a tower reads it: an array (rows, D), mapped or with an overlay."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and D."""

    def __getitem__(self, rows: Any, /) -> Any:
        """The values (n, D) of some rows (n,)."""


def table_of(feature: Fitted) -> str | None:
    """The embedding table that a feature reads, if it reads one."""
    if isinstance(feature, Category | Categories | Items):
        return feature.vocabulary.table
    return feature.table if isinstance(feature, Bucket) else None


class TwoTower(nn.Module):
    """Both towers, and the tables beside them.

    The tables are no parameters of the module: they are updated by the row (`EmbeddingTable.update`), the dense parts
    by an ordinary optimizer. `user` and `item` are the networks of the towers, `dimension` is D, `seed` seeds all
    initial weights, and `dropout` is the share of hidden units left out in training. If `adjusted`, served vectors have
    two more numbers than trained ones, which prefer popular items (`prefer`).

    Raises:
        ConfigError: `adjusted`, and items have no id to look the numbers up by.
    """

    def __init__(
        self,
        features: FeatureSet,
        dimension: int,
        user: TowerOptions,
        item: TowerOptions,
        *,
        seed: int = 0,
        dropout: float = 0.0,
        adjusted: bool = False,
    ) -> None:
        super().__init__()
        self.features = features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.user_tower = Tower((*features.user, *features.context), user, dimension, dropout)
            self.item_tower = Tower(features.item, item, dimension, dropout)
        generator = np.random.default_rng([seed, 1])
        self.tables = {
            name: EmbeddingTable.new(table.rows, table.dimension, generator) for name, table in features.tables.items()
        }
        if adjusted:
            if not any(feature.name == c.ITEM_ID for feature in features.item):
                raise ConfigError(
                    "train.logit_adjustment is known by item: add item_id to features.item, or set it to 0"
                )
            rows = len(self.tables[c.ITEM_ID].weights)
            self.tables[PREFERENCE] = EmbeddingTable(np.zeros((rows, 2), np.float32), np.zeros(rows, np.float32))
        self.calibration = nn.Parameter(torch.zeros(2))
        """(2,) log of the scale, and bias, that turn a cosine into a log-odds; learned by a pointwise loss alone."""

    def calibrate(self, scale: float) -> None:
        """Set the scale that a pointwise loss begins with, and a bias of 0."""
        self.calibration.data = torch.tensor([math.log(scale), 0.0])

    @property
    def served_user_tower(self) -> Tower | WithPopularity:
        """The user tower as it is served, with the numbers for popularity if there are any."""
        return WithPopularity(self.user_tower, of_items=False) if PREFERENCE in self.tables else self.user_tower

    @property
    def served_item_tower(self) -> Tower | WithPopularity:
        """The item tower as it is served."""
        return WithPopularity(self.item_tower, of_items=True) if PREFERENCE in self.tables else self.item_tower

    def prefer(self, columns: Mapping[str, Column], preferred: npt.NDArray[np.float64]) -> None:
        """Order items by the sum of their product with a user's vector and their preference (N,).

        `columns` are encoded features of the items. An item whose id has no row has the lowest preference.
        """
        most = np.ptp(preferred) / 2
        bias = np.full(len(self.tables[PREFERENCE].weights), -most)
        bias[np.asarray(columns[c.ITEM_ID])] = preferred - preferred.min() - most
        rest = np.sqrt(np.maximum(0, most**2 - bias**2))
        self.tables[PREFERENCE].weights[:] = np.stack([bias, rest], axis=1) / np.sqrt(1 + most**2)

    def as_trained(self, vectors: Floats) -> Floats:
        """Served vectors without the two numbers for popularity: (N, D)."""
        if PREFERENCE not in self.tables:
            return vectors
        lengths = np.linalg.norm(vectors[:, :-2], axis=1, keepdims=True)
        trained: Floats = vectors[:, :-2] / np.maximum(lengths, np.finfo(np.float32).tiny)
        return trained

    @torch.inference_mode()
    def encode_users(self, columns: Mapping[str, Column]) -> Floats:
        """Served vectors (B, D) of users, or (B, K, D) of their interests, from encoded columns with `history`."""
        return self._encode(self.served_user_tower, (*self.features.user, *self.features.context), columns)

    @torch.inference_mode()
    def encode_items(self, columns: Mapping[str, Column]) -> Floats:
        """Served vectors (B, D) of items from encoded columns."""
        return self._encode(self.served_item_tower, self.features.item, columns)

    def _encode(
        self, tower: Tower | WithPopularity, features: Sequence[Fitted], columns: Mapping[str, Column]
    ) -> Floats:
        tables = {name: table.weights for name, table in self.tables.items()}
        entered = tower_inputs(features, columns, tables, isinstance(tower, WithPopularity) and tower.of_items)
        inputs = {name: torch.tensor(value) for name, value in entered.items()}
        training = tower.training
        tower.eval()
        vectors: Floats = tower(inputs).numpy()
        tower.train(training)
        return vectors


def tower_inputs(
    features: Iterable[Fitted], columns: Mapping[str, Column], tables: Mapping[str, Table], preference: bool = False
) -> dict[str, Floats | Longs]:
    """What enters a tower, by feature name, each (B, width) float32: rows of tables, means of bags, numbers.

    A sequence that the tower encodes has (B, L, width) rows, zero behind its end, and (B,) lengths. With `preference`
    there is also the input of items that `WithPopularity` needs.
    """
    inputs: dict[str, Floats | Longs] = {}
    for feature in features:
        column, table = columns[feature.name], table_of(feature)
        if table is None:
            inputs[feature.name] = np.ascontiguousarray(column, np.float32)
        elif isinstance(column, Bag) and is_encoded(feature):
            position = padded(column)
            rows = np.concatenate([tables[table][column.rows], np.zeros((1, tables[table].shape[1]), np.float32)])
            inputs[feature.name] = rows[position]
            inputs[feature.name + LENGTH] = np.diff(column.indptr)
        elif isinstance(column, Bag):
            inputs[feature.name] = _mean_rows(tables[table], column)
        else:
            inputs[feature.name] = tables[table][column]
    if preference:
        inputs[POPULARITY] = np.asarray(tables[PREFERENCE][columns[c.ITEM_ID]])
    return inputs


def _mean_rows(table: Table, bag: Bag) -> Floats:
    counts = np.diff(bag.indptr)
    means = np.zeros((len(counts), table.shape[1]), np.float32)
    filled = np.flatnonzero(counts)
    if len(filled):
        sums = np.add.reduceat(table[bag.rows], bag.indptr[filled], axis=0)
        means[filled] = sums / counts[filled, None].astype(np.float32)
    return means


@dataclass(frozen=True)
class StepInputs:
    """The inputs of both towers in one step, and the table rows behind them."""

    user: dict[str, Tensor]
    item: dict[str, Tensor]
    touched: dict[str, TouchedRows]


class StepAssembler:
    """Assembles the inputs of both sides so that they pass gradients to the rows of the tables that they touch."""

    def __init__(self, features: FeatureSet, tables: Mapping[str, EmbeddingTable]) -> None:
        self._features = features
        self._tables = tables
        self._compactors = {name: Compactor(len(table.weights)) for name, table in tables.items()}

    def assemble(self, user: Mapping[str, Column | Beginnings], item: Mapping[str, Column | Beginnings]) -> StepInputs:
        """Inputs of both towers from encoded columns: `user` (B rows, context included), `item` (C rows)."""
        features = self._features
        read = [(f, user[f.name]) for f in (*features.user, *features.context)]
        split = len(read)
        read += [(f, item[f.name]) for f in features.item]
        asked: dict[str, list[Rows]] = {}
        for feature, column in read:
            if (table := table_of(feature)) is not None:
                asked.setdefault(table, []).append(_rows_of(column))
        touched: dict[str, TouchedRows] = {}
        positions: dict[str, Iterator[Tensor]] = {}
        for name, pieces in asked.items():
            distinct, where = self._compactors[name].compact(np.concatenate(pieces))
            values = torch.from_numpy(self._tables[name].weights[distinct]).requires_grad_()
            touched[name] = TouchedRows(distinct, values)
            lengths = [len(piece) for piece in pieces]
            positions[name] = iter(torch.split(torch.from_numpy(where), lengths))
        inputs: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for at, (feature, column) in enumerate(read):
            side, table = inputs[at >= split], table_of(feature)
            if table is None:
                side[feature.name] = torch.from_numpy(np.ascontiguousarray(column))
                continue
            values, position = touched[table].values, next(positions[table])
            if is_encoded(feature):
                side |= _sequence(feature.name, column, values, position)
            elif isinstance(column, Bag):
                side[feature.name] = mean_of_bags(values, position, torch.from_numpy(column.indptr))
            else:
                side[feature.name] = torch.nn.functional.embedding(position, values)
        return StepInputs(*inputs, touched)


def _sequence(name: str, column: Column | Beginnings, values: Tensor, position: Tensor) -> dict[str, Tensor]:
    """An encoded sequence: rows of its items (S, L, width), lengths, and the list of each row if rows share them.

    Positions behind the end of a list hold some row of the table, which is masked.
    """
    lists = column.lists if isinstance(column, Beginnings) else column
    assert isinstance(lists, Bag)
    where = torch.from_numpy(np.maximum(padded(lists), 0))
    rows = torch.nn.functional.embedding(position[where] if len(position) else torch.zeros_like(where), values)
    if isinstance(column, Beginnings):
        return {name: rows, name + LENGTH: torch.from_numpy(column.length), name + ROW: torch.from_numpy(column.row)}
    return {name: rows, name + LENGTH: torch.from_numpy(np.diff(lists.indptr))}


def _rows_of(column: Column | Beginnings) -> Rows:
    lists = column.lists if isinstance(column, Beginnings) else column
    rows: Rows = lists.rows if isinstance(lists, Bag) else lists  # type: ignore[assignment]
    return rows
