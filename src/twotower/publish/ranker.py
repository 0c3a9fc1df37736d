"""A ranker in a version: the dense part as ONNX, tables, features, and the encoded columns of the catalogue."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from twotower.channels.retriever import Queries
from twotower.channels.vector_channel import latest
from twotower.features.columns import Bag, Column, concatenate, take
from twotower.features.feature_set import load, save
from twotower.features.fitted import Category
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.index.protocol import Exclusions
from twotower.publish.catalogue import Encoded
from twotower.publish.onnx import example_inputs, export, open_session
from twotower.publish.tables import map_tables, save_tables
from twotower.samples.read import Entities
from twotower.schema import columns as c
from twotower.schema.files import read_json, write_json
from twotower.towers.ranker import Ranker
from twotower.towers.two_tower import tower_inputs

NETWORK = "ranker.onnx"
ABOUT = "ranker.json"
PROBABILITY = "probability"
USER, ITEM = "user.", "item."
"""Before the names of inputs: a column of users and one of items may have the same name."""


class OnnxRanker:
    """A ranker run by ONNX Runtime over memory-mapped tables; safe to call from several threads.

    `items` are the catalogue with its encoded features, `threads` are those of one call.
    """

    def __init__(self, folder: Path, items: Entities, threads: int = 1) -> None:
        self._features = load(folder)
        self._tables = map_tables(folder)
        self._session = open_session(folder / NETWORK, threads)
        self._items = items
        history = self._features.history
        self._tokens = history.vocabulary.rows(items.ids) if history else np.zeros(len(items), np.int32)
        self._put: tuple[Encoded, ...] = ()
        self.about: dict[str, Any] = read_json(folder / ABOUT)
        """`calibration` and `position`, from training."""

    def score(self, user: Mapping[str, Column], clicks: Bag, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Calibrated probabilities (n,) that a user clicks candidates at the first position.

        Args:
            user: encoded features of one user and the context, one row each.
            clicks: catalogue rows of what the user clicked, oldest first.
            rows: (n,) catalogue rows. One beyond the catalogue that the ranker knows is an item without features.
        """
        if not len(rows):
            return np.zeros(0, np.float32)
        columns = dict(user)
        self._known_user(columns)
        if (history := self._features.history) is not None:
            known = Bag(clicks.indptr, np.minimum(clicks.rows, len(self._items)).astype(np.int32))
            columns[history.name] = latest(known, np.append(self._tokens, np.int32(UNKNOWN)), history.last)
        sides = (
            (USER, (*self._features.user, *self._features.context), columns),
            (ITEM, self._features.item, self._columns_of(rows)),
        )
        inputs = {
            f"{side}{name}": value
            for side, features, of in sides
            for name, value in tower_inputs(features, of, self._tables).items()
        }
        probabilities: npt.NDArray[np.float32] = self._session.run([PROBABILITY], inputs)[0]
        return probabilities

    def with_items(self, put: tuple[Encoded, ...]) -> Self:
        """The same with other features of some items, or of new ones beyond the catalogue; the newest piece is last."""
        laid = copy(self)
        laid._put = put
        return laid

    def _columns_of(self, rows: npt.NDArray[np.int64]) -> dict[str, Column]:
        """Encoded features of candidates (n,): as they were put, else as published, else missing."""
        size = len(self._items)
        if not self._put and rows.max() < size:
            return {f.name: take(self._items.features[f.name], rows) for f in self._features.item}
        # One after the other: the rows of each piece, the newest first; the published rows; a row of missing values.
        where, begin = np.full(len(rows), -1), 0
        parts: dict[str, list[Column]] = {feature.name: [] for feature in self._features.item}
        for piece in reversed(self._put):
            place = np.minimum(np.searchsorted(piece.rows, rows), len(piece.rows) - 1)
            mine = (piece.rows[place] == rows) & (where < 0)
            where[mine] = begin + np.arange(mine.sum())
            begin += int(mine.sum())
            for name, part in parts.items():
                part.append(take(piece.columns[name], place[mine]))
        published = (where < 0) & (rows < size)
        where[published] = begin + np.arange(published.sum())
        where[where < 0] = begin + int(published.sum())
        columns: dict[str, Column] = {}
        for feature in self._features.item:
            nothing = np.full(1, UNKNOWN, np.int32) if feature.name == c.ITEM_ID else feature.absent(1)
            own = take(self._items.features[feature.name], rows[published])
            columns[feature.name] = take(concatenate([*parts[feature.name], own, nothing]), where)
        return columns

    def _known_user(self, columns: dict[str, Column]) -> None:
        """Make a user unknown, in place, whose vocabulary index came after the version: rankers never trained it."""
        ids = next((f for f in self._features.user if isinstance(f, Category) and f.name == c.USER_ID), None)
        if ids is not None:
            row = columns[c.USER_ID]
            assert not isinstance(row, Bag)
            columns[c.USER_ID] = np.where(row < FIRST + len(ids.vocabulary.values), row, np.int32(UNKNOWN))


def user_of(queries: Queries, place: int) -> Queries:
    """The queries of one of the users alone, with their clicks; nothing is left out for them."""
    alone = np.array([place])
    clicks = take(queries.clicks, alone)
    assert isinstance(clicks, Bag)
    columns = {name: take(column, alone) for name, column in queries.features.items()}
    return Queries(columns, clicks, Exclusions.of([[]]))


def write_ranker(folder: Path, model: Ranker, about: Mapping[str, Any]) -> None:
    """Write all that `OnnxRanker` needs beside the items into a new folder: a calibrated model, and JSON about it."""
    folder.mkdir(parents=True)
    export_ranker(model, folder / NETWORK)
    save_tables({name: table.weights for name, table in model.tables.items()}, folder)
    save(model.features, folder)
    write_json(folder / ABOUT, dict(about))


def export_ranker(model: Ranker, path: Path) -> None:
    """Write the dense part for one user: its inputs (1, width), those of candidates (n, width), probabilities (n,)."""
    candidates = {0: torch.export.Dim("candidates", min=1)}
    sides = {
        USER: example_inputs(model.user_features, 1, {}),
        ITEM: example_inputs(model.features.item, 7, candidates),
    }
    inputs = {f"{side}{name}": given for side, given_of in sides.items() for name, given in given_of.items()}
    export(model, inputs, PROBABILITY, path, _probability)


def _probability(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    assert isinstance(model, Ranker)
    user, item = (
        {name.removeprefix(side): value for name, value in inputs.items() if name.startswith(side)}
        for side in (USER, ITEM)
    )
    return model.probability(model(user, item))
