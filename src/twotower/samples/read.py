"""Samples as memory-mapped columns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.features.columns import Bag, Column, from_arrow, pointers
from twotower.features.feature_set import FeatureSet, load
from twotower.features.vocabulary import Positions
from twotower.samples import names as n
from twotower.samples.columns_file import map_columns
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.schema.files import MANIFEST, read_json

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Positives:
    """Training rows (P,), in the order of time."""

    user_row: Ints
    item_row: Ints
    history: Ints
    """How many of the user's clicks came before the request."""
    weight: npt.NDArray[np.float32]
    ts_ms: Longs
    context: dict[str, Column]
    copies: Ints
    """How often the row is fed in an epoch: 0 if it was down-sampled, more than 1 if it was over-sampled."""
    hard: dict[str, Bag]
    """By source, the catalogue rows of the items that were rejected in the row's request."""

    def __len__(self) -> int:
        return len(self.user_row)


@dataclass(frozen=True)
class Impressions:
    """What was shown (R,), in the order of time: what rankers learn from."""

    user_row: Ints
    item_row: Ints
    history: Ints
    """How many of the user's clicks came before the request."""
    clicked: npt.NDArray[np.int8]
    """1 = clicked, 0 = shown and not clicked."""
    position: Ints
    """Place on the page, from 1; 0 = the log does not say."""
    ts_ms: Longs
    context: dict[str, Column]

    def __len__(self) -> int:
        return len(self.user_row)


@dataclass(frozen=True)
class Entities:
    """Users or items, a row each, in ascending order of their ids."""

    ids: pa.Array
    features: dict[str, Column]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> Positions:
        """Where an id stands."""
        return Positions(self.ids)


@dataclass(frozen=True)
class Clicks:
    """Every user's clicked items in the order of time (CSR by user row)."""

    indptr: Longs
    """(users + 1,)"""
    item_row: Ints
    ts_ms: Longs

    @property
    def items(self) -> Bag:
        """The catalogue rows of each user's clicks."""
        return Bag(self.indptr, self.item_row)

    @property
    def owners(self) -> Longs:
        """(clicks,) the user row of each."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


@dataclass(frozen=True)
class Samples:
    """The samples of a range of days, mapped into memory."""

    path: Path
    manifest: dict[str, Any]
    features: FeatureSet
    positives: Positives
    users: Entities
    items: Entities
    clicks: Clicks
    item_positives: Longs
    """(items,) clicked training rows of each item, before sampling."""
    impressions: Impressions | None = None
    """None where no ranker is configured."""

    @property
    def timed(self) -> bool:
        """The data have a time, so that histories are what came before the request."""
        return len(self.positives) == 0 or int(self.positives.history[0]) != n.NO_HISTORY


def open_samples(folder: Path) -> Samples:
    """Open a samples folder; nothing is read until it is touched.

    Raises:
        DataError: the folder is missing, incomplete or of another format.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "samples" or manifest.get("format") != n.FORMAT:
        raise DataError(f"{folder} holds no samples of format {n.FORMAT}: build them again with `twotower samples`")
    impressions = folder / n.IMPRESSIONS_FILE
    return Samples(
        path=folder,
        manifest=manifest,
        features=load(folder),
        positives=_positives(folder),
        users=open_users(folder),
        items=open_items(folder),
        clicks=open_clicks(folder),
        item_positives=_numpy(map_columns(folder / n.ITEMS_FILE), n.POSITIVES),
        impressions=_impressions(impressions) if impressions.exists() else None,
    )


def _positives(folder: Path) -> Positives:
    rows = map_columns(folder / n.POSITIVES_FILE)
    hard = {}
    for name in rows.schema.names:
        if name.startswith(n.HARD):
            items = _numpy(map_columns(folder / f"{name}.arrow"), n.ITEM_ROW)
            hard[name.removeprefix(n.HARD)] = Bag(pointers(_numpy(rows, name)), items)
    return Positives(**_shared(rows), weight=_numpy(rows, c.WEIGHT), copies=_numpy(rows, n.COPIES), hard=hard)


def _impressions(path: Path) -> Impressions:
    rows = map_columns(path)
    return Impressions(**_shared(rows), clicked=_numpy(rows, n.LABEL), position=_numpy(rows, c.POSITION))


def _shared(rows: pa.RecordBatch) -> dict[str, Any]:
    """The fields that positives and impressions both have."""
    return {
        "user_row": _numpy(rows, n.USER_ROW),
        "item_row": _numpy(rows, n.ITEM_ROW),
        "history": _numpy(rows, n.HISTORY_COUNT),
        "ts_ms": _numpy(rows, c.TS_MS),
        "context": _prefixed(rows, n.CONTEXT),
    }


def open_users(folder: Path) -> Entities:
    """The users of a samples folder or of a version."""
    users = map_columns(folder / n.USERS_FILE)
    return Entities(users.column(c.USER_ID), _prefixed(users, n.FEATURE))


def open_items(folder: Path) -> Entities:
    """The items of a samples folder or of the rankers of a version."""
    items = map_columns(folder / n.ITEMS_FILE)
    return Entities(items.column(c.ITEM_ID), _prefixed(items, n.FEATURE))


def open_clicks(folder: Path) -> Clicks:
    """The users' clicks of a samples folder or of a version."""
    users, clicks = map_columns(folder / n.USERS_FILE), map_columns(folder / n.CLICKS_FILE)
    return Clicks(pointers(_numpy(users, n.CLICKS)), _numpy(clicks, n.ITEM_ROW), _numpy(clicks, c.TS_MS))


def _numpy(batch: pa.RecordBatch, name: str) -> Any:
    return batch.column(name).to_numpy(zero_copy_only=True)


def _prefixed(batch: pa.RecordBatch, prefix: str) -> dict[str, Column]:
    names = [name for name in batch.schema.names if name.startswith(prefix)]
    return {name.removeprefix(prefix): from_arrow(batch.column(name)) for name in names}
