"""The way of a request, top to bottom: who asks, what they did, every channel, one list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import Queries, similar_items
from twotower.features.bloom import Seen
from twotower.features.columns import Bag, Column
from twotower.features.feature_set import encode_request
from twotower.fusion.fuse import Fused
from twotower.index.protocol import Exclusions
from twotower.logs.events import ALLOWED_SKEW_MS
from twotower.publish.version import TWO_TOWER, Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError, TwotowerError, shown
from twotower.schema.tables import is_id
from twotower.serve.channels import ERROR, Ask, ask_in_turn
from twotower.serve.filters import Filter, passing
from twotower.serve.users import ItemId, Recent, UserId

EXCLUDE = ("clicked", "impressed", "none")


class Unanswerable(TwotowerError):
    """No channel answered."""


@dataclass(frozen=True)
class Asked:
    """A request for candidates, as its sender wrote it."""

    k: int
    exclude: str
    user_id: UserId | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    """Feature values that replace the stored ones, or describe a new user; None is a missing value."""
    context: Mapping[str, Any] = field(default_factory=dict)
    filters: Mapping[str, Filter] = field(default_factory=dict)
    """What attributes of an item may be."""
    channels: Sequence[str] = ()
    """Channels to ask; empty = all."""


@dataclass(frozen=True)
class Candidate:
    """One item of an answer."""

    item_id: ItemId
    score: float
    channels: list[str]


@dataclass(frozen=True)
class Answer:
    """Candidates, best first, all from one version."""

    version: str
    delta_seq: int
    items: list[Candidate]
    failed_channels: list[str]


@dataclass(frozen=True)
class Found:
    """What the channels of one request found."""

    queries: Queries
    """Who asked, as the channels saw them."""
    fused: Fused
    left_out: dict[str, str]
    """Why a channel is not among them."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(n,) catalogue rows, best first."""
        rows: npt.NDArray[np.int64] = self.fused.candidates.rows[0]
        found: npt.NDArray[np.int64] = rows[rows >= 0]
        return found


def retrieve(
    version: Version,
    asked: Asked,
    recent: Recent,
    now_ms: int,
    impressed_window_ms: int,
    ask: Ask = ask_in_turn,
) -> Answer:
    """Answer a request from one version.

    Args:
        version: the snapshot that the request holds.
        asked: the request.
        recent: what the user did since the version was made.
        now_ms: milliseconds since 1970.
        impressed_window_ms: how long an impression is left out.
        ask: how the channels are asked.

    Raises:
        DataError: an unknown feature, channel, attribute or kind of exclusion, or a value of another type.
        Unanswerable: no channel answered.
    """
    queries = queries_of(version, asked, recent, impressed_window(now_ms, impressed_window_ms))
    found = find(version, asked.channels, queries, asked.k, ask)
    ids = version.items.at(found.rows)
    scores = found.fused.candidates.scores[0].tolist()
    by = found.fused.brought_by[0].tolist()
    places = {bits: place for place, bits in enumerate(by)}  # few combinations of channels, many items
    channels = {bits: found.fused.channels_of(0, place) for bits, place in places.items()}
    items = [Candidate(ids[i], scores[i], channels[by[i]]) for i in range(len(ids))]
    return Answer(version.id, version.delta_seq, items, list(found.left_out))


def find(version: Version, channels: Sequence[str], queries: Queries, k: int, ask: Ask = ask_in_turn) -> Found:
    """The k candidates of one user as catalogue rows; arguments and errors as of `retrieve`."""
    names = tuple(channels) or tuple(version.channels)
    version.check_channels(names)
    asked = {name: version.channels[name] for name in names}
    brought = ask(asked, queries, version.fusion.asked(k, names), version.id)
    if not brought.lists:
        reasons = [name if why == ERROR else f"{name} ({why})" for name, why in brought.left_out.items()]
        raise Unanswerable(f"every channel failed: {', '.join(reasons)}")
    return Found(queries, version.fusion.fuse(brought.lists, k), brought.left_out)


def impressed_window(now_ms: int, window_ms: int) -> range:
    """The times of impressions that count. Later ones are of a clock that was ahead, and must not count for years."""
    return range(now_ms - window_ms, now_ms + ALLOWED_SKEW_MS + 1)


def queries_of(version: Version, asked: Asked, recent: Recent, window: range) -> Queries:
    """Who asks, as the channels see them; impressions count whose time is within the window."""
    user_row = find_user(version, asked.user_id)
    clicks = clicked_rows(version, user_row, recent)
    return Queries(
        user_columns(version, user_row, asked),
        Bag(np.array([0, len(clicks)]), clicks),
        Exclusions.of([left_out(version, asked, clicks, recent, window)]),
    )


def find_user(version: Version, user_id: UserId | None) -> int:
    """The user's row in the version, -1 for someone it does not know.

    Raises:
        DataError: an id of another type than the version's users have.
    """
    if user_id is None:
        return -1
    known = version.users.ids.type
    if not is_id(user_id, known):
        raise DataError(f"user_id {shown(user_id)} is a {type(user_id).__name__}: the ids of users are {known}")
    if (entity := version.since.users.get(user_id)) is not None and (entity.deleted or entity.fresh):
        return -1
    return int(version.users.positions.find(pa.array([user_id], known))[0])


def find_items(version: Version, item_ids: Sequence[ItemId]) -> npt.NDArray[np.int64]:
    """Catalogue rows of items (n,), -1 for those that the version does not have."""
    known = version.items.kind
    return version.items.find(pa.array([item if is_id(item, known) else None for item in item_ids], known))


def clicked_rows(version: Version, user_row: int, recent: Recent) -> npt.NDArray[np.int32]:
    """Catalogue rows of the user's clicks, oldest first: those in the version, then those after what it knows."""
    stored = np.zeros(0, np.int32)
    if user_row >= 0:
        indptr = version.clicks.indptr
        stored = version.clicks.item_row[indptr[user_row] : indptr[user_row + 1]]
    known_ms = version.knows_until_ms
    newer = [click for click in recent.clicks if known_ms is None or click[0] > known_ms]
    rows = rows_of_events(version, sorted(newer, key=lambda click: click[0]))
    return np.concatenate([stored, rows.astype(np.int32)])


def rows_of_events(version: Version, events: Sequence[tuple[int, ItemId]]) -> npt.NDArray[np.int64]:
    """Catalogue rows of the items of events, without those that the version does not have.

    An item that was deleted and put again is another one: events before that are not of it.
    """
    rows = find_items(version, [item for _, item in events])
    times = np.array([ts_ms for ts_ms, _ in events], np.int64)
    return rows[(rows >= 0) & version.again.since(rows, times)]


def user_columns(version: Version, user_row: int, asked: Asked) -> dict[str, Column]:
    """The user's encoded features: stored ones, replaced by those of the request, and the context."""
    columns = dict(version.queries(np.array([user_row])).features)
    own = [feature for feature in version.features.user_columns if feature.name != c.USER_ID]
    if asked.user_id is not None:
        columns |= version.columns_since(asked.user_id)
    encoded = encode_request(own, asked.features, "features")
    columns |= {name: encoded[name] for name in asked.features}
    return columns | encode_request(version.features.context, asked.context, "context")


def left_out(
    version: Version, asked: Asked, clicks: npt.NDArray[np.int32], recent: Recent, window: range
) -> npt.NDArray[np.int64]:
    """Catalogue rows that the answer must not hold: clicked, impressed lately, outside the filters."""
    if asked.exclude not in EXCLUDE:
        raise DataError(f"exclude = {shown(asked.exclude)}: it is one of {', '.join(EXCLUDE)}")
    parts = [np.zeros(0, np.int64)]
    if asked.exclude != "none":
        parts.append(clicks.astype(np.int64))
    if asked.exclude == "impressed":
        parts.append(rows_of_events(version, [event for event in recent.shown if event[0] in window]))
        if recent.seen is not None:
            parts.append(_seen(version, recent.seen, window.start))
    if not asked.filters:
        return np.unique(np.concatenate(parts))
    out = np.zeros(len(version.items), np.bool_)
    out[np.concatenate(parts)] = True
    for attribute, wanted in asked.filters.items():
        out |= ~passing(version, attribute, wanted)
    return np.flatnonzero(out)


def _seen(version: Version, seen: Seen, since_ms: int) -> npt.NDArray[np.int64]:
    """Catalogue rows of the items in filters; of an item that was put again only what was shown after that counts."""
    within = seen.contains(version.item_hashes, since_ms)
    again = version.again
    for deleted_ms in np.unique(again.deleted_ms[again.deleted_ms >= since_ms]).tolist():
        rows = again.rows[again.deleted_ms == deleted_ms]
        rows = rows[within[rows]]
        within[rows] = seen.contains(version.item_hashes[rows], deleted_ms + 1)
    return np.flatnonzero(within)


@dataclass(frozen=True)
class Neighbour:
    """One item like another, as one channel has it."""

    item_id: ItemId
    score: float


@dataclass(frozen=True)
class Similar:
    """Items like an item, best first."""

    version: str
    items: list[Candidate]
    """The nearest by the vectors of the two towers."""
    channels: dict[str, list[Neighbour]]
    """The same of every channel that can say."""


def similar(version: Version, item_id: ItemId, k: int) -> Similar:
    """The items most like an item, by every channel that can say.

    Raises:
        KeyError: the version does not have the item.
    """
    row = find_items(version, [item_id])
    if row[0] < 0:
        raise KeyError(item_id)
    by_channel: dict[str, list[Neighbour]] = {}
    for name, channel in version.channels.items():
        found = similar_items(channel, row, k)
        if found is not None:
            ids = version.items.at(found.rows[0][found.rows[0] >= 0])
            by_channel[name] = [Neighbour(ids[i], float(found.scores[0, i])) for i in range(len(ids))]
    nearest = by_channel[TWO_TOWER]
    return Similar(version.id, [Candidate(one.item_id, one.score, [TWO_TOWER]) for one in nearest], by_channel)
