"""A published version from Python: recommendations, similar items, and vectors for a database of your own.

B users, N items, K interests, D vector.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import similar_items
from twotower.channels.vector_channel import VectorChannel
from twotower.config.settings import Settings
from twotower.pipeline.data import Table, as_arrow
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.updating import open_as_served
from twotower.publish.export import ExportReport, export_towers
from twotower.publish.retrieve import BATCH, queries_asked, recommend, stored_users, users_asked, users_of_file
from twotower.publish.version import FUSED, TWO_TOWER, Version
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import whole_file
from twotower.schema.formats import ARRAY, CSV, FORMATS, check_writable, write_rows
from twotower.schema.tables import recommendations

SIMILAR_ID = f"similar_{c.ITEM_ID}"
INTEREST = "interest"

Users = Literal["all"] | Sequence[int] | Sequence[str] | Table
"""`all` users of the version, ids, or a table with `user_id` and columns that are context features."""


@dataclass(frozen=True)
class Recommendations:
    """Rows of items for users or for items, best first."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame; pandas has to be installed."""
        return self.table.to_pandas()


@dataclass(frozen=True)
class Vectors:
    """Ids and their unit vectors, whose inner product is the cosine that the towers were trained for."""

    name: str
    """Name of the ids: `user_id` or `item_id`."""
    ids: pa.Array
    """(N,) int64 or string."""
    vectors: npt.NDArray[np.float32]
    """(N, D); of users of the channel `mind` (N, K, D), one vector per interest."""

    def __len__(self) -> int:
        return len(self.ids)

    def to_arrow(self) -> pa.Table:
        """Columns of the ids and `vector` (a list of D float32); with several interests, `interest` and a row each."""
        interests = self.vectors.shape[1] if self.vectors.ndim == 3 else 1
        flat = np.ascontiguousarray(self.vectors.reshape(-1, self.vectors.shape[-1]))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
        if self.vectors.ndim == 2:
            return pa.table({self.name: self.ids, c.VECTOR: vectors})
        owner = np.repeat(np.arange(len(self.ids)), interests)
        interest = pa.array(np.tile(np.arange(interests), len(self.ids)))
        return pa.table({self.name: self.ids.take(pa.array(owner)), INTEREST: interest, c.VECTOR: vectors})

    def to_pandas(self) -> Any:
        """The rows of `to_arrow` as a pandas DataFrame; pandas has to be installed."""
        return self.to_arrow().to_pandas()

    def write(self, path: str | Path) -> None:
        """Write a file, whole or not at all, in the format that its name says.

        - `.parquet`, `.jsonl`: the rows of `to_arrow`.
        - `.csv`: the same, and each vector as the text `[0.1,0.2]`, as pgvector reads it.
        - `.npy`: the vectors alone; the ids are in a second file, `items.ids.npy` beside `items.npy`.

        Raises:
            ConfigError: another end of its name; it cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() == ARRAY:
            ids = self.ids.to_numpy(zero_copy_only=False)
            _save_array(path.with_suffix(".ids.npy"), ids if self.ids.type == pa.int64() else ids.astype(np.str_))
            _save_array(path, self.vectors)
            return
        check_vectors_file(path, "path")
        table = self.to_arrow()
        if path.suffix.lower() == CSV:
            texts = [json.dumps(vector, separators=(",", ":")) for vector in table[c.VECTOR].to_pylist()]
            table = table.set_column(table.num_columns - 1, c.VECTOR, pa.array(texts, pa.string()))
        with write_rows(path, table.schema) as write:
            write(table)


def check_vectors_file(path: Path, option: str) -> None:
    """Refuse a file that `Vectors.write` cannot write.

    Raises:
        ConfigError: another end of its name; a folder has this name; no permission.
    """
    check_writable(path, option, (*FORMATS, ARRAY))


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


class PublishedVersion:
    """A version that answers as a server would that starts now; the workspace's `events/` say what was impressed."""

    def __init__(self, version: Version, workspace: Path) -> None:
        self._version = version
        self._workspace = workspace

    def __repr__(self) -> str:
        return f"PublishedVersion({self.id!r}, delta_seq={self.delta_seq}, channels={self.channels})"

    @property
    def id(self) -> str:
        """The name of the version's folder."""
        return self._version.id

    @property
    def delta_seq(self) -> int:
        """The latest delta that is applied to it; 0 = none."""
        return self._version.delta_seq

    @property
    def channels(self) -> list[str]:
        """The channels that it can be asked for, besides `fused`."""
        return list(self._version.channels)

    def retrieve(
        self, users: Users = "all", k: int = 50, *, channel: str = FUSED, exclude: str = "clicked"
    ) -> Recommendations:
        """The best items for users.

        Args:
            users: see `Users`. Unknown users are answered too. A user's first row counts.
            k: items per user, at least 1.
            channel: a channel of the version, or `fused`.
            exclude: `clicked`, `impressed` (or clicked) or `none`.

        Returns:
            Rows of `user_id`, `item_id`, `rank` (from 1), `score`, `channel`.

        Raises:
            ConfigError: an unknown channel or way to exclude, k below 1.
            DataError: ids of another type than the version's users have.
        """
        _check_k(k)
        asked = self._asked(users)
        schema = recommendations(self._version.users.ids.type, self._version.item_ids.type)
        parts = recommend(self._version, self._workspace, asked, k=k, channel=channel, exclude=exclude)
        return Recommendations(pa.concat_tables([schema.empty_table(), *parts]))

    def similar(
        self, items: Sequence[int] | Sequence[str], k: int = 20, *, channel: str = TWO_TOWER
    ) -> Recommendations:
        """The items most like some items, by one channel.

        Args:
            items: their ids.
            k: similar items of each, at least 1.
            channel: a channel that can say; `popular` and `new_items` cannot.

        Returns:
            Rows of `item_id`, `similar_item_id`, `rank` (from 1), `score`.

        Raises:
            ConfigError: the channel cannot say what is like an item, k below 1.
            DataError: an item that the version does not have.
        """
        _check_k(k)
        version = self._version
        version.check_channels([channel])
        ids = self._ids(items, version.item_ids.type, "items")
        rows = version.items.find(ids)
        if (rows < 0).any():
            missing = ids[int(np.flatnonzero(rows < 0)[0])].as_py()
            raise DataError(f"version {version.id} has no item {missing!r}")
        candidates = similar_items(version.channels[channel], rows, min(k, len(version.item_ids)))
        if candidates is None:
            raise ConfigError(f"the channel {channel} cannot say which items are like an item: ask another one")
        owner, rank = np.nonzero(candidates.rows >= 0)
        return Recommendations(
            pa.table(
                {
                    c.ITEM_ID: ids.take(pa.array(owner)),
                    SIMILAR_ID: version.item_ids.take(pa.array(candidates.rows[owner, rank])),
                    c.RANK: pa.array((rank + 1).astype(np.int32)),
                    c.SCORE: pa.array(candidates.scores[owner, rank]),
                }
            )
        )

    def item_vectors(self, channel: str = TWO_TOWER) -> Vectors:
        """The vectors of all items that can be retrieved, for a vector database of your own.

        Args:
            channel: a channel with item vectors: `two_tower`, `mf`, `mind`.

        Raises:
            ConfigError: the channel has no item vectors.
        """
        stored = self._vector_channel(channel).item_vectors
        if stored is None:
            raise ConfigError(f"the channel {channel} has no item vectors of its own: ask {TWO_TOWER}")
        rows = np.flatnonzero(~self._version.gone[: stored.shape[0]])
        return Vectors(c.ITEM_ID, self._version.item_ids.take(pa.array(rows)), np.asarray(stored[rows], np.float32))

    def user_vectors(self, users: Users = "all", channel: str = TWO_TOWER) -> Vectors:
        """The vectors of users: of what the version knows of them, and of the context that their rows carry.

        Args:
            users: see `Users`.
            channel: a channel with a user tower: `two_tower`, `mf`, `mind`.

        Raises:
            ConfigError: the channel has no user tower.
            DataError: ids of another type than the version's users have.
        """
        tower, asked = self._vector_channel(channel), self._asked(users)
        batches = [asked.slice(start, BATCH) for start in range(0, max(asked.num_rows, 1), BATCH)]
        vectors = [tower.user_vectors(queries_asked(self._version, batch)) for batch in batches]
        return Vectors(c.USER_ID, asked[c.USER_ID].combine_chunks(), np.concatenate(vectors))

    def export_towers(self, folder: str | Path, channel: str = TWO_TOWER) -> ExportReport:
        """Write both towers into a new folder that works without this package and without PyTorch: see its README.

        Args:
            folder: must not exist.
            channel: a channel with towers: `two_tower`, `mf`, `mind`.

        Raises:
            ConfigError: the folder exists; the channel has no towers.
        """
        return export_towers(self._version, self._vector_channel(channel), Path(folder))

    def _asked(self, users: Users) -> pa.Table:
        if isinstance(users, str):
            if users != "all":
                raise ConfigError(f"users = {users!r}: give `all`, ids, or a table with {c.USER_ID}")
            return stored_users(self._version)
        if hasattr(users, "__arrow_c_stream__") or hasattr(users, "keys"):
            table = as_arrow(users, "users")
        else:
            table = pa.table({c.USER_ID: self._ids(users, self._version.users.ids.type, "users")})
        return users_asked(self._version, table, "users")

    def _ids(self, ids: Any, kind: pa.DataType, name: str) -> pa.Array:
        try:
            return pa.array(ids, kind)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise DataError(f"{name}: an id is not of type {kind}, as the version's {name} are") from None

    def _vector_channel(self, name: str) -> VectorChannel:
        self._version.check_channels([name])
        channel = self._version.channels[name]
        if not isinstance(channel, VectorChannel):
            raise ConfigError(f"the channel {name} has no vectors: ask one of two_tower, mf and mind")
        return channel


def open_version(settings: Settings, version: str | None = None, *, deltas: bool = True) -> PublishedVersion:
    """Open a published version.

    Args:
        settings: their `workspace.path` says where it was published.
        version: its id; None = the served one.
        deltas: with what was learned, put and deleted since; False = as it was published.

    Raises:
        VersionError: there is no such version, or it is damaged.
    """
    opened = open_as_served(settings, version) if deltas else open_served(settings, version)
    return PublishedVersion(opened, places(settings).workspace)


def export_vectors(
    opened: Callable[[], PublishedVersion], out: Path, channel: str, users: str | None = None
) -> dict[str, Any]:
    """Write the vectors of the items of a version, or of users: `all` or those of a file.

    Raises:
        ConfigError: the file cannot be written; the channel has no vectors.
        DataError: an unreadable file of users.
    """
    check_vectors_file(out, "--out")
    version = opened()
    if users is None:
        vectors = version.item_vectors(channel)
    else:
        asked: Users = "all" if users == "all" else users_of_file(version._version, Path(users))
        vectors = version.user_vectors(asked, channel)
    vectors.write(out)
    source = {"version": version.id, "delta_seq": version.delta_seq, "channel": channel}
    return {"out": str(out), "count": len(vectors), "dimension": vectors.vectors.shape[-1], **source}


def _check_k(k: int) -> None:
    if k < 1:
        raise ConfigError(f"k = {k}: at least one item")
