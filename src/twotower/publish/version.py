"""A version on disk, opened: everything that answering needs, mapped into memory.

N items of the catalogue, B users, D vector.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.als import ALS
from twotower.channels.fit import LOADERS
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries, Retriever, WithoutItems
from twotower.channels.vector_channel import VectorChannel
from twotower.datasets.tables import end_of_day
from twotower.features.columns import Bag, Column, concatenate, take
from twotower.features.feature_set import FeatureSet, encode_request, load
from twotower.features.fitted import Fitted
from twotower.features.vocabulary import UNKNOWN
from twotower.fusion.fuse import Fused, Fusion
from twotower.index.build import load_index
from twotower.index.protocol import VectorIndex
from twotower.logs.entities import Entity
from twotower.logs.events import USER, EntityId
from twotower.publish.catalogue import Attributes, ItemKeys, SetAside
from twotower.publish.manifest import checked_manifest
from twotower.publish.onnx import OnnxTower
from twotower.publish.ranker import OnnxRanker
from twotower.publish.tables import map_tables
from twotower.samples.columns_file import map_columns
from twotower.samples.read import Clicks, Entities, open_clicks, open_items, open_users
from twotower.schema import columns as c
from twotower.schema.errors import DataError, VersionError, cut
from twotower.schema.files import MANIFEST, Kind, check_fields, check_listing
from twotower.towers.two_tower import Table, table_of

FORMAT = 4
CATALOGUE = "catalogue.arrow"
GOLDEN = "golden.json"
FUSED = "fused"
TWO_TOWER = "two_tower"
VECTOR_CHANNELS = (TWO_TOWER, "mind", "mf")
"""The channels that are trained: a user encoder and item vectors each."""
RANKERS = "rankers"
PRE_RANK, RANK = "pre_rank", "rank"
"""The rankers that a version may have: the first orders all candidates, the second those that go on."""
NEW_ITEMS = "new_items"
"""The channel that searches the new items alone with the user's vector of the two towers."""
FIELDS: Mapping[str, Kind] = {
    "files": dict,
    "configuration": dict,
    "fusion": dict,
    "checkpoint_sha256": str,
    "parent": (str, type(None)),
    "created_ms": int,
    "watermark_ms": (int, type(None)),
    "last_day": (str, type(None)),
}
"""What is read of a manifest, with its types."""
_AT_ONCE = 1 << 16

Longs = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LearnedUsers:
    """What was learned about users since the version was made."""

    tokens: Mapping[EntityId, int] = field(default_factory=dict)
    """Vocabulary index of each user who was given one since."""
    users: Mapping[EntityId, Entity] = field(default_factory=dict)
    """Users who were put or deleted."""
    forgotten: Collection[EntityId] = ()
    """Users who were deleted before the entries in `tokens` were learned."""
    aside: SetAside = field(default_factory=SetAside)
    """Notes what cannot be used."""

    def token(self, user_id: EntityId) -> int | None:
        """A user's vocabulary index; None = that of the version."""
        entity = self.users.get(user_id)
        if entity is not None and entity.fresh and user_id not in self.forgotten:
            return UNKNOWN
        return self.tokens.get(user_id)

    def knows(self, user_id: EntityId) -> bool:
        """Something was learned of the user."""
        return user_id in self.users or user_id in self.tokens

    def replaced(self, user_id: EntityId) -> bool:
        """The user was deleted since: what the version has under the id belongs to someone else."""
        entity = self.users.get(user_id)
        return entity is not None and (entity.deleted or entity.fresh)


@dataclass(frozen=True)
class Again:
    """Items that were deleted and put again: earlier events of their ids belong to other items."""

    rows: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) catalogue rows, ascending."""
    deleted_ms: Longs = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) when the item that had the id before was deleted."""

    def since(self, rows: Longs, times_ms: Longs) -> Mask:
        """For events (n,) of some rows at some times: whether they belong to the items that have these rows now."""
        if not len(self.rows):
            return np.ones(len(rows), np.bool_)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        kept: Mask = (self.rows[place] != rows) | (times_ms > self.deleted_ms[place])
        return kept


@dataclass(frozen=True)
class Version:
    """An opened version, as published or with what was learned since; immutable, shared by concurrent requests."""

    id: str
    path: Path
    manifest: dict[str, Any]
    features: FeatureSet
    users: Entities
    clicks: Clicks
    attributes: Attributes
    """By catalogue row: the items of the version in ascending order of ids, then those put since it was made."""
    channels: Mapping[str, Retriever]
    fusion: Fusion
    user_tower: OnnxTower
    """Of the two towers."""
    items: ItemKeys
    """Ids of the items, by catalogue row."""
    gone: Mask
    """(N,) deleted or not available: in no answer."""
    rankers: Mapping[str, OnnxRanker] = field(default_factory=dict)
    delta_seq: int = 0
    """The latest delta that is laid over it."""
    since: LearnedUsers = field(default_factory=LearnedUsers)
    again: Again = field(default_factory=Again)

    @property
    def two_tower(self) -> VectorChannel:
        """The channel of the two towers; every version has it."""
        channel = self.channels[TWO_TOWER]
        assert isinstance(channel, VectorChannel)
        return channel

    @property
    def item_vectors(self) -> Table:
        """(N, D) unit vectors of the item tower."""
        vectors = self.two_tower.item_vectors
        assert vectors is not None
        return vectors

    @property
    def catalogue(self) -> pa.RecordBatch:
        """Items with all their attributes."""
        return self.attributes.batch

    @property
    def put(self) -> dict[EntityId, int]:
        """Rows of the items whose features were put since, by id."""
        rows = self.attributes.put
        ids = self.items.at(rows)
        there = self.items.find(pa.array(ids, self.items.kind)) == rows  # else it was deleted
        return {item: row for item, row, kept in zip(ids, rows.tolist(), there.tolist(), strict=True) if kept}

    @property
    def item_ids(self) -> pa.Array:
        """(N,) ids of the catalogue."""
        return self.items.ids

    @property
    def watermark_ms(self) -> int | None:
        """Time of the latest event that the version knows of."""
        watermark: int | None = self.manifest["watermark_ms"]
        return watermark

    @property
    def last_day(self) -> str | None:
        """The last day whose requests the version knows, `YYYY-MM-DD`; clicks on them may be of the next one."""
        last: str | None = self.manifest["last_day"]
        return last

    @property
    def knows_until_ms(self) -> int | None:
        """The time up to which the version knows every click: later ones may belong to requests of the next day."""
        if self.watermark_ms is None or self.last_day is None:
            return None
        return min(self.watermark_ms, end_of_day(self.last_day))

    def user_rows(self, user_ids: pa.Array) -> Longs:
        """The row of each user (B,), -1 for null, an unknown user, or one deleted since."""
        rows = self.users.positions.find(user_ids)
        if self.since.users:
            rows[[self.since.replaced(user_id) for user_id in user_ids.to_pylist()]] = -1
        return rows

    def user_row(self, user_id: EntityId) -> int:
        """The row of one user, by an id of the type that the version's users have."""
        return int(self.user_rows(pa.array([user_id], self.users.ids.type))[0])

    def queries(
        self, user_rows: Longs, context: dict[str, Column] | None = None, exclude: Bag | None = None
    ) -> Queries:
        """Queries of stored users; see `queries_of_users`."""
        return queries_of_users(self.features, self.users, self.clicks, user_rows, context=context, exclude=exclude)

    def queries_of(
        self, user_ids: pa.Array, context: dict[str, Column] | None = None, exclude: Bag | None = None
    ) -> Queries:
        """Queries of users by id (B,), with what was learned and put since."""
        stored, ids = self.queries(self.user_rows(user_ids), context, exclude), user_ids.to_pylist()
        parts = {name: [column] for name, column in stored.features.items()}
        index = {name: np.arange(len(ids)) for name in parts}
        for place, user_id in enumerate(ids):
            if self.since.knows(user_id):
                for name, column in self._columns_since(user_id).items():
                    index[name][place] = len(ids) + len(parts[name]) - 1
                    parts[name].append(column)
        newer = {name: take(concatenate(part), index[name]) for name, part in parts.items() if len(part) > 1}
        return Queries({**stored.features, **newer}, stored.clicks, stored.exclude)

    def _columns_since(self, user_id: EntityId) -> dict[str, Column]:
        """A user's encoded features (one row each), where they changed since the version was made."""
        columns: dict[str, Column] = {}
        entity, token = self.since.users.get(user_id), self.since.token(user_id)
        own = self.features.user_columns
        if entity is not None and entity.features is not None:
            put = [feature for feature in own if feature.name != c.USER_ID]
            columns = encode_usable(put, entity.features, partial(self.since.aside.note, USER, user_id))
        if token is not None and any(feature.name == c.USER_ID for feature in own):
            columns[c.USER_ID] = np.array([token], np.int32)
        return columns

    def retrieve(self, queries: Queries, k: int, channels: Sequence[str]) -> Fused:
        """One list of k for each user from one or several channels, fused as the version says."""
        return self.fusion.retrieve({name: self.channels[name] for name in channels}, queries, k)

    def check_channels(self, names: Sequence[str]) -> None:
        """Raise a DataError for channels that this version does not have."""
        if unknown := [name for name in names if name not in self.channels]:
            raise DataError(
                f"version {self.id} has no channel {cut(', '.join(unknown))}; it has {', '.join(self.channels)}"
            )


def open_version(path: Path, *, check_hashes: bool = True, threads: int = 1) -> Version:
    """Open a version; every file is checked against the manifest before it is read.

    Args:
        path: its folder.
        check_hashes: False only where the caller has just checked them.
        threads: of one call of a tower.

    Raises:
        VersionError: missing, damaged, or of another format.
    """
    manifest = read_manifest(path)
    try:
        if check_hashes and (problems := check_listing(path, manifest["files"])):
            raise VersionError(f"version {path.name} is damaged: {'; '.join(problems)}. Restore it or publish again")
        return _checked(_opened(path, manifest, threads))
    except (VersionError, MemoryError):
        raise
    except Exception as error:  # Arrow, NumPy, FAISS and ONNX Runtime raise many kinds for files that are not theirs
        raise VersionError(f"version {path.name} cannot be opened: {error or repr(error)}") from error


def _opened(path: Path, manifest: dict[str, Any], threads: int) -> Version:
    catalogue = map_columns(path / CATALOGUE)
    gone, items = unavailable(catalogue), ItemKeys(catalogue.column(c.ITEM_ID))
    folder, models = path / "channels", manifest["configuration"]["models"]
    user_tower = _open_user_tower(folder / TWO_TOWER, threads)
    two_tower = _open_vector_channel(folder / TWO_TOWER, items.ids, gone, user_tower)
    channels: dict[str, Retriever] = {}
    for name in models["channels"]:
        if name == TWO_TOWER:
            channels[name] = two_tower
        elif name == NEW_ITEMS:
            channels[name] = two_tower.over(name, _open_index(folder / name, gone))
        elif name in VECTOR_CHANNELS:
            tower = _open_user_tower(folder / name, threads)
            channels[name] = _open_vector_channel(folder / name, items.ids, gone, tower)
        else:
            counted = LOADERS[name](folder / name)
            channels[name] = WithoutItems(counted, gone) if gone.any() else counted
    names = models.get("rankers", [])  # early versions have none
    encoded = open_items(path / RANKERS) if names else None
    return Version(
        path.name,
        path,
        manifest,
        load(folder / TWO_TOWER),
        open_users(path),
        open_clicks(path),
        Attributes(catalogue),
        channels,
        Fusion(**manifest["fusion"]),
        user_tower,
        items,
        gone,
        {name: OnnxRanker(path / RANKERS / name, encoded, threads) for name in names} if encoded else {},
    )


def _checked(version: Version) -> Version:
    """The version, if its files fit each other: the rows that one file names are in the other.

    Raises:
        DataError: they do not.
    """
    items, users, clicks = version.item_ids, version.users, version.clicks
    for name, ids in (("items", items), ("users", users.ids)):
        if ids.null_count or (len(ids) > 1 and not pc.all(pc.less(ids[:-1], ids[1:])).as_py()):
            raise DataError(f"the ids of {name} are not rising")
    if len(clicks.indptr) != len(users) + 1 or (np.diff(clicks.indptr) < 0).any():
        raise DataError("the numbers of clicks of users are not those of the users")
    if clicks.indptr[-1] != len(clicks.item_row) or len(clicks.item_row) != len(clicks.ts_ms):
        raise DataError(f"{len(clicks.item_row)} clicks are stored, the users have {clicks.indptr[-1]}")
    _within("clicks", clicks.item_row, len(items))
    for name, channel in version.channels.items():
        inner = channel.channel if isinstance(channel, WithoutItems) else channel
        if isinstance(inner, VectorChannel | ALS):
            _within(f"the index of {name}", inner.index.rows, len(items))
        if isinstance(inner, VectorChannel) and (vectors := inner.item_vectors) is not None:
            pieces = (vectors[start : start + _AT_ONCE] for start in range(0, vectors.shape[0], _AT_ONCE))
            if vectors.shape[0] != len(items) or not all(np.isfinite(piece).all() for piece in pieces):
                raise DataError(f"channel {name} does not have one finite vector for each item")
    tables = map_tables(version.path / "channels" / TWO_TOWER)
    for feature in version.features.user_columns:
        column, table = users.features[feature.name], table_of(feature)
        if len(column) != len(users):
            raise DataError(f"feature {feature.name} has {len(column)} rows, where {len(users)} users are")
        if table is not None:
            rows = column.rows if isinstance(column, Bag) else column
            _within(f"feature {feature.name}", rows, tables[table].shape[0])
    return version


def _within(what: str, rows: npt.NDArray[Any], count: int) -> None:
    if len(rows) and not (rows.min() >= 0 and rows.max() < count):
        raise DataError(f"{what}: the rows are from {rows.min()} to {rows.max()}, but there are {count}")


def _open_user_tower(folder: Path, threads: int) -> OnnxTower:
    features = load(folder)
    return OnnxTower(folder / "user_tower.onnx", (*features.user, *features.context), map_tables(folder), threads)


def _open_vector_channel(folder: Path, item_ids: pa.Array, gone: Mask, tower: OnnxTower) -> VectorChannel:
    features = load(folder)
    column = map_columns(folder / "items.arrow").column(c.VECTOR)
    vectors = column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)
    tokens = item_tokens(features, item_ids)
    return VectorChannel(folder.name, features, tokens, tower.encode, _open_index(folder, gone), vectors)


def _open_index(folder: Path, gone: Mask) -> VectorIndex:
    """The index of a channel, without the items that are not available."""
    index = load_index(folder / "index")
    return index.without(np.flatnonzero(gone)) if gone.any() else index


def unavailable(catalogue: pa.Table | pa.RecordBatch) -> Mask:
    """(N,) which items are never retrieved: those whose `available` is false.

    Raises:
        DataError: `available` holds something else than booleans.
    """
    if c.AVAILABLE not in catalogue.schema.names:
        return np.zeros(catalogue.num_rows, np.bool_)
    column = catalogue.column(c.AVAILABLE)
    if not pa.types.is_boolean(column.type):
        raise DataError(
            f"items.parquet: {c.AVAILABLE} is of type {column.type}, where booleans are expected (an item with false "
            "is never retrieved). Cast it, or give the column another name"
        )
    gone: Mask = ~column.fill_null(True).to_numpy(zero_copy_only=False)
    return gone


def read_manifest(path: Path) -> dict[str, Any]:
    """A version's manifest, checked against its own hash; the files that it lists are not.

    Raises:
        VersionError: missing, damaged, or of another format.
    """
    manifest = checked_manifest(path, "version", FORMAT, FIELDS)
    try:
        models = check_fields(manifest["configuration"].get("models"), {"channels": list}, f"{path.name}: models")
    except DataError as error:
        raise VersionError(str(error)) from None
    if not all(isinstance(name, str) for name in models["channels"]):
        raise VersionError(f"version {path.name}: {MANIFEST} has channels that are no names: it was damaged")
    return manifest


def encode_usable(
    features: Iterable[Fitted], values: Mapping[str, Any], note: Callable[[str], None] | None
) -> dict[str, Column]:
    """Encoded features of a user or an item that was put (one row each); `note` is told what cannot be used of them.

    A value may have been put for a version whose feature was of another type: it counts as missing.
    """
    columns: dict[str, Column] = {}
    for feature in features:
        own = {name: value for name, value in values.items() if name == feature.name}
        try:
            columns |= encode_request([feature], own, "features")
        except DataError as error:
            if note is not None:
                note(f"{feature.name} counts as missing: {error}")
            columns[feature.name] = feature.absent(1)
    return columns


def item_tokens(features: FeatureSet, item_ids: pa.Array) -> npt.NDArray[np.int32]:
    """Vocabulary index of each item (N,); zeros where no feature reads it."""
    history = features.history
    return history.vocabulary.rows(item_ids) if history else np.zeros(len(item_ids), np.int32)
