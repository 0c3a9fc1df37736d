"""Recommendations for many users at once, as a file."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.channels.retriever import Queries
from twotower.features.columns import Bag, pointers
from twotower.features.fitted import Bucket, Categories, Category, Fitted, Number
from twotower.publish.version import FUSED, Version
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms, until_now
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files
from twotower.schema.formats import check_writable, format_of, read_rows, write_rows
from twotower.schema.options import EXCLUDE
from twotower.schema.tables import as_ids, is_id, recommendations, require_columns

log = logging.getLogger(__name__)

BATCH = 1024


@dataclass(frozen=True)
class RetrieveReport:
    """What was asked for."""

    users: int
    context: list[str]
    """The context features that requests carried."""


def retrieve_file(
    version: Version, workspace: Path, users: str, out: Path, *, k: int, channel: str, exclude: str
) -> RetrieveReport:
    """Write `user_id`, `item_id`, `rank`, `score`, `channel` for many users.

    Args:
        version: the version that answers, as it is or as it is served, with what was learned and put since.
        workspace: whose `events/` say what was impressed.
        users: `all` users of the version who were not deleted since, or a file with `user_id`, in the format that its
            name says; its columns that are context features are each request's context. A user's first row counts.
        out: a file, whole or not at all, in the format that its name says.
        k: items of each user; a number above the catalogue's size means the whole catalogue.
        channel: a channel of the version, or `fused`.
        exclude: `clicked`, `impressed` (or clicked) or `none`.

    Raises:
        ConfigError: an unknown channel, or what `check_retrieval` refuses.
        DataError: an unreadable users file.
    """
    check_retrieval(users, k, out, exclude)
    asked = stored_users(version) if users == "all" else users_of_file(version, Path(users))
    features = [feature.name for feature in version.features.context]
    carried = [name for name in features if name in asked.column_names]
    if without := [name for name in features if name not in carried]:
        log.warning("--users %s has no %s: requests carry none", users, ", ".join(without))
    parts = recommend(version, workspace, asked, k=k, channel=channel, exclude=exclude)
    with write_rows(out, recommendations(version.users.ids.type, version.item_ids.type)) as write:
        for part in parts:
            write(part)
    return RetrieveReport(asked.num_rows, carried)


def recommend(
    version: Version, workspace: Path, asked: pa.Table, *, k: int, channel: str = FUSED, exclude: str = "clicked"
) -> Iterator[pa.Table]:
    """Recommendations for a table of users (see `users_asked`), in tables of at most 1,024 users; see `retrieve_file`.

    Raises:
        ConfigError: an unknown channel or way to exclude.
    """
    _check_exclude(exclude)
    if channel not in (*version.channels, FUSED):
        raise ConfigError(f"--channel {channel}: version {version.id} has {', '.join(version.channels)} and {FUSED}")
    k = min(k, len(version.item_ids))
    names = tuple(version.channels) if channel == FUSED else (channel,)
    left_out = None
    if exclude == "impressed":
        left_out = shown_items(version, workspace / "events")
    elif exclude == "clicked":
        left_out = version.clicks.items
    schema = recommendations(version.users.ids.type, version.item_ids.type)

    def answered(part: pa.Table) -> pa.Table:
        candidates = version.retrieve(queries_asked(version, part, left_out), k, names).candidates
        owner, rank = np.nonzero(candidates.rows >= 0)
        columns = {
            c.USER_ID: part[c.USER_ID].combine_chunks().take(pa.array(owner)),
            c.ITEM_ID: version.item_ids.take(pa.array(candidates.rows[owner, rank])),
            c.RANK: pa.array((rank + 1).astype(np.int32)),
            c.SCORE: pa.array(candidates.scores[owner, rank]),
            c.CHANNEL: pa.array(np.full(len(owner), channel)),
        }
        return pa.table(columns, schema=schema)

    return (answered(asked.slice(start, BATCH)) for start in range(0, asked.num_rows, BATCH))


def queries_asked(version: Version, asked: pa.Table, exclude: Bag | None = None) -> Queries:
    """Queries of a table of users with their context; see `Version.queries_of`."""
    context = {
        feature.name: feature.encode(asked.column(feature.name).combine_chunks())
        if feature.name in asked.column_names
        else feature.absent(asked.num_rows)
        for feature in version.features.context
    }
    return version.queries_of(asked[c.USER_ID].combine_chunks(), context, exclude)


def check_retrieval(users: str, k: int, out: Path, exclude: str) -> None:
    """Check the arguments of `retrieve_file`, without a version.

    Raises:
        ConfigError: an unknown way to exclude; k below 1; files of an unknown format; `out` cannot be written.
    """
    _check_exclude(exclude)
    if k < 1:
        raise ConfigError(f"--k {k}: at least one item")
    if users != "all":
        format_of(Path(users), "--users")
    check_writable(out, "--out")


def _check_exclude(exclude: str) -> None:
    if exclude not in EXCLUDE:
        raise ConfigError(f"--exclude {exclude}: it is one of {', '.join(EXCLUDE)}")


def stored_users(version: Version) -> pa.Table:
    """All users of the version who were not deleted since, as `recommend` takes them."""
    known = version.users.ids.type
    deleted = [user_id for user_id, entity in version.since.users.items() if entity.deleted and is_id(user_id, known)]
    gone = version.users.positions.find(pa.array(deleted, known))
    kept = np.setdiff1d(np.arange(len(version.users)), gone)
    return pa.table({c.USER_ID: version.users.ids.take(pa.array(kept))})


def users_of_file(version: Version, path: Path) -> pa.Table:
    """The users of a file that `--users` names, as `recommend` takes them; see `users_asked`."""
    types = {feature.name: _text_type(feature) for feature in version.features.context}
    types[c.USER_ID] = version.users.ids.type
    return users_asked(version, read_rows(path, types, "--users"), str(path))


def users_asked(version: Version, table: pa.Table, where: str) -> pa.Table:
    """A table of users as `recommend` takes it: ids of the version's type, the first row of each user.

    It has `user_id`, and columns that are context features; other columns are ignored. `where` names it in errors.

    Raises:
        DataError: there is no `user_id`, or its type is not that of the version's users.
    """
    require_columns(table, [c.USER_ID], where)
    ids = as_ids(table.column(c.USER_ID), f"{where}, column {c.USER_ID}")
    if ids.type != version.users.ids.type:
        raise DataError(f"{where}: {c.USER_ID} is of type {ids.type}, the version's users are {version.users.ids.type}")
    table = table.set_column(table.schema.get_field_index(c.USER_ID), c.USER_ID, ids)
    first = np.unique(pc.dictionary_encode(ids.combine_chunks()).indices.to_numpy(), return_index=True)[1]
    return table.take(pa.array(np.sort(first)))


def _text_type(feature: Fitted) -> pa.DataType:
    """The type of a feature's values where a file has them as text."""
    if isinstance(feature, Category):
        return feature.vocabulary.values.type
    if isinstance(feature, Number | Bucket):
        return pa.float64()
    separated = isinstance(feature, Categories) and feature.separator is not None
    return pa.string() if separated else pa.list_(pa.string())


def shown_items(
    version: Version,
    events: Path,
    outcomes: Sequence[str] = (c.IMPRESSED, c.CLICKED),
    clock_ms: ClockMs = now_ms,
) -> Bag:
    """Distinct items that each user was shown, as catalogue rows by user row; events later than now do not count."""
    files = [path for folder in sorted(events.glob(f"{c.DATE}=*")) for path in parquet_files(folder)]
    if not files:
        raise DataError(f"{events} has no date=*/*.parquet: --exclude impressed needs the events")
    size, now = len(version.item_ids), clock_ms()
    wanted = [c.USER_ID, c.ITEM_ID, c.REQUEST_TS_MS, c.CLICK_TS_MS]
    pairs = [np.zeros(0, np.int64)]
    for path in files:
        stored = pq.read_schema(path)
        require_columns(stored, [*wanted, c.OUTCOME], "/".join(path.parts[-3:]))
        table = pq.read_table(path, columns=wanted, filters=[(c.OUTCOME, "in", list(outcomes))], partitioning=None)
        table, _ = until_now(table, wanted[2:], now, "/".join(path.parts[-3:]))
        user = version.users.positions.find(as_ids(table.column(c.USER_ID), path.name).combine_chunks())
        item = version.items.find(as_ids(table.column(c.ITEM_ID), path.name).combine_chunks())
        times = table.column(c.REQUEST_TS_MS).fill_null(0).to_numpy()
        known = (user >= 0) & (item >= 0) & version.again.since(item, times)
        pairs.append(np.unique(user[known] * size + item[known]))
    distinct = np.unique(np.concatenate(pairs))
    indptr = pointers(np.bincount(distinct // size, minlength=len(version.users)))
    return Bag(indptr, (distinct % size).astype(np.int32))
