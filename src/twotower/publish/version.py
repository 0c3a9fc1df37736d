"""A version on disk, opened: everything that answering needs, mapped into memory."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.fit import LOADERS
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries, Retriever, WithoutItems
from twotower.channels.vector_channel import VectorChannel
from twotower.datasets.tables import end_of_day
from twotower.features.columns import Bag, Column, concatenate, take
from twotower.features.feature_set import FeatureSet, encode_request, load
from twotower.features.vocabulary import UNKNOWN
from twotower.fusion.fuse import Fused, Fusion
from twotower.index.build import load_index
from twotower.index.checks import ROWS
from twotower.index.protocol import VectorIndex
from twotower.logs.entities import Entity, EntityId
from twotower.logs.events import USER
from twotower.publish.catalogue import Attributes, ItemKeys, SetAside
from twotower.publish.onnx import OnnxTower
from twotower.publish.ranker import OnnxRanker
from twotower.publish.tables import LaidRows, map_tables
from twotower.samples.columns_file import map_columns
from twotower.samples.read import Clicks, Entities, open_clicks, open_items, open_users
from twotower.schema import columns as c
from twotower.schema.errors import DataError, VersionError, cut
from twotower.schema.files import MANIFEST, Kind, check_fields, check_listing, read_json, write_json
from twotower.towers.two_tower import table_of

FORMAT = 4
CATALOGUE = "catalogue.arrow"
GOLDEN = "golden.json"
FUSED = "fused"
TWO_TOWER = "two_tower"
VECTOR_CHANNELS = (TWO_TOWER, "mind", "mf")
"""The channels that are trained: a user encoder and item vectors each."""
RANKERS = "rankers"
PRE_RANK, RANK = "pre_rank", "rank"
"""The rankers that a version may have: what orders candidates, and what orders those that go on."""
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
_PIECE = 1 << 16
DIGEST = "digest"
"""Key of a manifest: the SHA-256 of all its other entries, because a flipped digit in JSON is still JSON."""


@dataclass(frozen=True)
class Since:
    """What was learned of users since the version was made."""

    tokens: Mapping[EntityId, int] = field(default_factory=dict)
    """Rows of the table of user ids, of users who have one of their own since."""
    users: Mapping[EntityId, Entity] = field(default_factory=dict)
    """Users who were put or deleted."""
    forgotten: Collection[EntityId] = ()
    """Users whose deletion is in `tokens`: what is there came after it."""
    aside: SetAside = field(default_factory=SetAside)
    """Notes what cannot be used."""

    def token(self, user_id: EntityId) -> int | None:
        """A user's row of the table of user ids; None = that of the version."""
        entity = self.users.get(user_id)
        if entity is not None and entity.fresh and user_id not in self.forgotten:
            return UNKNOWN
        return self.tokens.get(user_id)


@dataclass(frozen=True)
class Again:
    """Items that were deleted and put again: what happened to their ids before is not of them."""

    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) catalogue rows, ascending."""
    deleted_ms: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) when the one before was deleted."""

    def since(self, rows: npt.NDArray[np.int64], times_ms: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which events (n,) of some rows, at some times, are of the items that have these rows now."""
        if not len(self.rows):
            return np.ones(len(rows), np.bool_)
        place = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        kept: npt.NDArray[np.bool_] = (self.rows[place] != rows) | (times_ms > self.deleted_ms[place])
        return kept


@dataclass(frozen=True)
class Version:
    """An opened version, as it is or with what was learned since; immutable, shared by requests that began with it."""

    id: str
    path: Path
    manifest: dict[str, Any]
    features: FeatureSet
    users: Entities
    clicks: Clicks
    attributes: Attributes
    """Items with their attributes, in ascending order of ids; a row of it is what all channels mean by a row. Items put
    since the version was made follow."""
    item_vectors: npt.NDArray[np.float32] | LaidRows
    """(N, D) unit vectors of the item tower."""
    channels: Mapping[str, Retriever]
    fusion: Fusion
    user_tower: OnnxTower
    """Of the two towers."""
    items: ItemKeys
    """Where an item stands in the catalogue."""
    gone: npt.NDArray[np.bool_]
    """(N,) deleted or not available: in no answer."""
    delta_seq: int = 0
    """The latest delta that is laid over it."""
    since: Since = field(default_factory=Since)
    rankers: Mapping[str, OnnxRanker] = field(default_factory=dict)
    """By name, those that the version has."""
    again: Again = field(default_factory=Again)
    """Items that were deleted and put again."""

    @property
    def two_tower(self) -> VectorChannel:
        """The channel of the two towers; every version has it."""
        channel = self.channels[TWO_TOWER]
        assert isinstance(channel, VectorChannel)
        return channel

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
        return {one: row for one, row, kept in zip(ids, rows.tolist(), there.tolist(), strict=True) if kept}

    @property
    def item_ids(self) -> pa.Array:
        """(N,) ids of the catalogue."""
        return self.items.ids

    @property
    def base_items(self) -> int:
        """How many items are the version's own: rows from this one on were put since."""
        return self.items.base

    @property
    def item_hashes(self) -> npt.NDArray[np.uint64]:
        """(N,) hashes of the ids of the catalogue, which filters of shown items are asked with."""
        return self.items.hashes

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
        """The time up to which the version knows every click that was joined when it was made: later ones may be of
        requests of the next day.
        """
        if self.watermark_ms is None or self.last_day is None:
            return None
        return min(self.watermark_ms, end_of_day(self.last_day))

    def queries(
        self,
        user_rows: npt.NDArray[np.int64],
        context: dict[str, Column] | None = None,
        exclude: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]] | None = None,
    ) -> Queries:
        """Queries of stored users; see `queries_of_users`."""
        left_out = None if exclude is None else Bag(*exclude)
        return queries_of_users(self.features, self.users, self.clicks, user_rows, context=context, exclude=left_out)

    def queries_of(
        self,
        user_ids: pa.Array,
        context: dict[str, Column] | None = None,
        exclude: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]] | None = None,
    ) -> Queries:
        """Queries of users by id (B,), with what was learned and put of them since; others as of `queries_of_users`."""
        ids, known = user_ids.to_pylist(), self.users.positions.find(user_ids)
        since = [self.since.users.get(one) for one in ids]
        known[[entity is not None and (entity.deleted or entity.fresh) for entity in since]] = -1
        stored = self.queries(known, context, exclude)
        parts = {name: [column] for name, column in stored.features.items()}
        index = {name: np.arange(len(ids)) for name in parts}
        for place, one in enumerate(ids):
            if since[place] is not None or one in self.since.tokens:
                for name, column in self.columns_since(one).items():
                    index[name][place] = len(ids) + len(parts[name]) - 1
                    parts[name].append(column)
        newer = {name: take(concatenate(part), index[name]) for name, part in parts.items() if len(part) > 1}
        return Queries({**stored.features, **newer}, stored.clicks, stored.exclude)

    def columns_since(self, user_id: EntityId) -> dict[str, Column]:
        """What a user's encoded features are since the version was made, where that is something else."""
        columns: dict[str, Column] = {}
        entity = self.since.users.get(user_id)
        for feature in self.features.user_columns:
            if feature.name == c.USER_ID:
                if (token := self.since.token(user_id)) is not None:
                    columns[c.USER_ID] = np.array([token], np.int32)
            elif entity is not None and entity.features is not None:
                value = {feature.name: entity.features[feature.name]} if feature.name in entity.features else {}
                try:
                    columns |= encode_request([feature], value, feature.name)
                except DataError as error:  # put for a version whose feature was of another type
                    self.since.aside.note(USER, user_id, f"{feature.name} counts as missing: {error}")
                    columns[feature.name] = feature.absent(1)
        return columns

    def retrieve(self, queries: Queries, k: int, channels: Sequence[str]) -> Fused:
        """One list a user from one or several channels, fused in the version's way."""
        asked = self.fusion.asked(k, channels)
        return self.fusion.fuse({name: self.channels[name].retrieve(queries, asked) for name in channels}, k)

    def check_channels(self, names: Sequence[str]) -> None:
        """Refuse channels that this version does not have.

        Raises:
            DataError: with the names that it has.
        """
        if unknown := [name for name in names if name not in self.channels]:
            raise DataError(
                f"version {self.id} has no channel {cut(', '.join(unknown))}; it has {', '.join(self.channels)}"
            )


def open_version(path: Path, *, check_hashes: bool = True, threads: int = 1) -> Version:
    """Open a version; every file is checked against the manifest before it is read.

    Args:
        path: its folder.
        check_hashes: False only where the caller has just done it.
        threads: threads of one call of the user tower.

    Raises:
        VersionError: missing, damaged, or of another format.
    """
    manifest = read_manifest(path)
    try:
        if check_hashes and (problems := check_listing(path, manifest["files"])):
            raise VersionError(f"version {path.name} is damaged: {'; '.join(problems)}. Restore it or publish again")
        catalogue = map_columns(path / CATALOGUE)
        gone = unavailable(catalogue)
        item_ids, folder = catalogue.column(c.ITEM_ID), path / "channels"
        user_tower = _open_user_tower(folder / TWO_TOWER, threads)
        two_tower = _open_vector_channel(folder / TWO_TOWER, item_ids, gone, user_tower)
        channels: dict[str, Retriever] = {}
        for name in manifest["configuration"]["models"]["channels"]:
            if name == TWO_TOWER:
                channels[name] = two_tower
            elif name == NEW_ITEMS:
                channels[name] = two_tower.over(name, _open_index(folder / name, gone))
            elif name in VECTOR_CHANNELS:
                channels[name] = _open_vector_channel(
                    folder / name, item_ids, gone, _open_user_tower(folder / name, threads)
                )
            else:
                counted = LOADERS[name](folder / name)
                channels[name] = WithoutItems(counted, gone) if gone.any() else counted
        rankers = manifest["configuration"]["models"].get("rankers", [])  # versions of before there were any
        version = Version(
            path.name,
            path,
            manifest,
            load(path / "channels" / TWO_TOWER),
            open_users(path),
            open_clicks(path),
            Attributes(catalogue),
            _item_vectors(path / "channels" / TWO_TOWER),
            channels,
            Fusion(**manifest["fusion"]),
            user_tower,
            ItemKeys(item_ids),
            gone,
            rankers=_open_rankers(path / RANKERS, rankers, threads),
        )
        return _checked(version)
    except (VersionError, MemoryError):
        raise
    except Exception as error:  # whatever Arrow, NumPy, FAISS and ONNX Runtime say of files that are none of theirs
        raise VersionError(f"version {path.name} cannot be opened: {error or repr(error)}") from error


def _checked(version: Version) -> Version:
    """A version whose files fit each other: what one of them says of rows is within the other.

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
    for channel in version.channels.values():
        if isinstance(channel, VectorChannel):
            vectors = channel.item_vectors
            if vectors is not None and (vectors.shape[0] != len(items) or not _all_finite(vectors)):
                raise DataError(f"channel {channel.name} has other vectors than one of each item")
    for path in sorted((version.path / "channels").glob(f"*/index/{ROWS}")):
        _within(f"the index of {path.parent.parent.name}", np.load(path, "r", allow_pickle=False), len(items))
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
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < count):
        raise DataError(f"{what}: a row is {int(rows.max())} or {int(rows.min())}, where {count} are")


def _all_finite(vectors: Any) -> bool:
    """Whether no number (N, D) is infinite or none at all; in pieces, for they are mapped."""
    pieces = range(0, vectors.shape[0], _PIECE)
    return all(bool(np.isfinite(vectors[start : start + _PIECE]).all()) for start in pieces)


def _open_user_tower(folder: Path, threads: int) -> OnnxTower:
    features = load(folder)
    return OnnxTower(folder / "user_tower.onnx", (*features.user, *features.context), map_tables(folder), threads)


def _open_vector_channel(
    folder: Path, item_ids: pa.Array, gone: npt.NDArray[np.bool_], tower: OnnxTower
) -> VectorChannel:
    features = load(folder)
    tokens = item_tokens(features, item_ids)
    index, vectors = _open_index(folder, gone), _item_vectors(folder)
    return VectorChannel(folder.name, features, tokens, tower.encode, index, vectors)


def _open_rankers(folder: Path, names: Sequence[str], threads: int) -> dict[str, OnnxRanker]:
    if not names:
        return {}
    items = open_items(folder)
    return {name: OnnxRanker(folder / name, items, threads) for name in names}


def _open_index(folder: Path, gone: npt.NDArray[np.bool_]) -> VectorIndex:
    """The index of a channel, without the items that are not available."""
    index = load_index(folder / "index")
    return index.without(np.flatnonzero(gone)) if gone.any() else index


def _item_vectors(folder: Path) -> npt.NDArray[np.float32]:
    vectors = map_columns(folder / "items.arrow").column(c.VECTOR)
    stored: npt.NDArray[np.float32] = vectors.flatten().to_numpy(zero_copy_only=True)
    return stored.reshape(-1, vectors.type.list_size)


def unavailable(catalogue: pa.Table | pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """(N,) which items are not to be retrieved: those whose `available` is false.

    Raises:
        DataError: `available` holds something else than booleans.
    """
    if c.AVAILABLE not in catalogue.schema.names:
        return np.zeros(catalogue.num_rows, np.bool_)
    column = catalogue.column(c.AVAILABLE)
    if not pa.types.is_boolean(column.type):
        raise DataError(
            f"items.parquet: {c.AVAILABLE} is of type {column.type}, where booleans are due: an item that is false is "
            "never retrieved. Cast it, or give the column another name"
        )
    gone: npt.NDArray[np.bool_] = ~column.fill_null(True).to_numpy(zero_copy_only=False)
    return gone


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a version's manifest, with the hash of its own content."""
    write_json(folder / MANIFEST, {**content, DIGEST: digest(content)})


def read_manifest(path: Path) -> dict[str, Any]:
    """A version's manifest, checked against its own hash; the files that it lists are not.

    Raises:
        VersionError: missing, damaged, or of another format.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except DataError as error:
        raise VersionError(f"{path} is no whole version: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "version" or manifest.get("format") != FORMAT:
        raise VersionError(f"{path} is no version of format {FORMAT}: publish again with this release")
    if manifest.get(DIGEST) != digest({key: value for key, value in manifest.items() if key != DIGEST}):
        raise VersionError(
            f"version {path.name} is damaged: {MANIFEST} does not have its own SHA-256. Restore it or publish again"
        )
    try:
        check_fields(manifest, FIELDS, f"version {path.name}: {MANIFEST}")
        models = check_fields(manifest["configuration"].get("models"), {"channels": list}, f"{path.name}: models")
    except DataError as error:
        raise VersionError(str(error)) from None
    if not all(isinstance(name, str) for name in models["channels"]):
        raise VersionError(f"version {path.name}: {MANIFEST} has channels that are no names: it was damaged")
    return manifest


def digest(content: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def item_tokens(features: FeatureSet, item_ids: pa.Array) -> npt.NDArray[np.int32]:
    """Row of each item (N,) in the table of item ids; zeros where no feature reads it."""
    history = features.history
    return history.vocabulary.rows(item_ids) if history else np.zeros(len(item_ids), np.int32)
