"""The way of a request, top to bottom: the user, what they did, every channel, one list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.retriever import Queries, similar_items
from twotower.features.bloom import Seen
from twotower.features.columns import Bag
from twotower.features.feature_set import encode_request
from twotower.fusion.fuse import Fused
from twotower.index.protocol import Exclusions
from twotower.logs.events import ALLOWED_SKEW_MS
from twotower.publish.version import TWO_TOWER, Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError, TwotowerError, shown
from twotower.schema.options import EXCLUDE
from twotower.schema.tables import is_id
from twotower.serve.channels import ERROR, Ask, ask_in_turn
from twotower.serve.filters import Filter, passing
from twotower.serve.users import ItemId, Recent, UserId

Longs = npt.NDArray[np.int64]


class Unanswerable(TwotowerError):
    """No channel answered."""


@dataclass(frozen=True)
class Request:
    """A request for candidates, as it was sent."""

    k: int
    exclude: str
    user_id: UserId | None = None
    features: Mapping[str, Any] = field(default_factory=dict)
    """Feature values that replace the stored ones, or describe a new user; None is a missing value."""
    context: Mapping[str, Any] = field(default_factory=dict)
    filters: Mapping[str, Filter] = field(default_factory=dict)
    """By attribute of an item."""
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
class Retrieved:
    """The candidates of one request."""

    queries: Queries
    fused: Fused
    left_out: dict[str, str]
    """By channel, why it did not answer."""

    @property
    def rows(self) -> Longs:
        """(n,) catalogue rows, best first."""
        rows: Longs = self.fused.candidates.rows[0]
        return rows[rows >= 0]


def retrieve(version: Version, request: Request, recent: Recent, window: range, ask: Ask = ask_in_turn) -> Answer:
    """Answer a request from one version.

    `recent` is what the user did since the version was made; `window`, the times of impressions that count, comes from
    `impressed_window`.

    Raises:
        DataError: an unknown feature, channel, attribute or kind of exclusion, or a value of another type.
        Unanswerable: no channel answered.
    """
    queries = queries_of(version, request, recent, window)
    retrieved = candidates_of(version, request.channels, queries, request.k, ask)
    fused, ids = retrieved.fused, version.items.at(retrieved.rows)
    scores, by = fused.candidates.scores[0].tolist(), fused.retrieved_by[0].tolist()
    places = {bits: place for place, bits in enumerate(by)}  # few combinations of channels, many items
    channels = {bits: fused.channels_of(0, place) for bits, place in places.items()}
    items = [Candidate(item_id, scores[i], channels[by[i]]) for i, item_id in enumerate(ids)]
    return Answer(version.id, version.delta_seq, items, list(retrieved.left_out))


def candidates_of(
    version: Version, channels: Sequence[str], queries: Queries, k: int, ask: Ask = ask_in_turn
) -> Retrieved:
    """The k candidates of one user, from some channels or, where none is named, from all.

    Raises:
        DataError: an unknown channel.
        Unanswerable: no channel answered.
    """
    names = tuple(channels) or tuple(version.channels)
    version.check_channels(names)
    chosen = {name: version.channels[name] for name in names}
    answers = ask(chosen, queries, version.fusion.asked(k, names), version.id)
    if not answers.lists:
        reasons = [name if why == ERROR else f"{name} ({why})" for name, why in answers.left_out.items()]
        raise Unanswerable(f"every channel failed: {', '.join(reasons)}")
    return Retrieved(queries, version.fusion.fuse(answers.lists, k), answers.left_out)


def impressed_window(now_ms: int, window_ms: int) -> range:
    """The times of impressions that count: a later time comes from a clock that is ahead, and must not count."""
    return range(now_ms - window_ms, now_ms + ALLOWED_SKEW_MS + 1)


def queries_of(version: Version, request: Request, recent: Recent, window: range) -> Queries:
    """The user as the channels see them: what the version and the request say, and what the user did since.

    Raises:
        DataError: an unknown feature or kind of exclusion, or a value or an id of another type.
    """
    known = version.users.ids.type
    if request.user_id is not None and not is_id(request.user_id, known):
        raise DataError(
            f"user_id {shown(request.user_id)} is a {type(request.user_id).__name__}: the ids of users are {known}"
        )
    if request.exclude not in EXCLUDE:
        raise DataError(f"exclude = {shown(request.exclude)}: it is one of {', '.join(EXCLUDE)}")
    stored = version.queries_of(pa.array([request.user_id], known))
    own = [feature for feature in version.features.user_columns if feature.name != c.USER_ID]
    given = encode_request(own, request.features, "features")
    columns = {**stored.features, **{name: given[name] for name in request.features}}
    columns |= encode_request(version.features.context, request.context, "context")
    clicks = np.concatenate([stored.clicks.rows, newer_clicks(version, recent)])
    left_out = excluded_rows(version, request, clicks, recent, window)
    return Queries(columns, Bag(np.array([0, len(clicks)]), clicks), Exclusions.of([left_out]))


def find_items(version: Version, item_ids: Sequence[ItemId]) -> Longs:
    """Catalogue rows (n,) of items, -1 for items that the version does not have."""
    known = version.items.kind
    return version.items.find(pa.array([item if is_id(item, known) else None for item in item_ids], known))


def newer_clicks(version: Version, recent: Recent) -> npt.NDArray[np.int32]:
    """Catalogue rows of the clicks after those that the version knows, oldest first."""
    newer = sorted(clicks_since(version, recent), key=lambda click: click[0])
    return _rows_of_events(version, newer).astype(np.int32)


def clicks_since(version: Version, recent: Recent) -> list[tuple[int, ItemId]]:
    """The recent clicks (time, item) after those that the version knows, in the order of the log."""
    known_ms = version.knows_until_ms
    return [click for click in recent.clicks if known_ms is None or click[0] > known_ms]


def _rows_of_events(version: Version, events: Sequence[tuple[int, ItemId]]) -> Longs:
    """Catalogue rows of the items of events, without items that the version does not have.

    An item that was deleted and put again is another one: earlier events do not count for it.
    """
    rows = find_items(version, [item for _, item in events])
    times = np.array([ts_ms for ts_ms, _ in events], np.int64)
    return rows[(rows >= 0) & version.again.since(rows, times)]


def excluded_rows(
    version: Version, request: Request, clicks: npt.NDArray[np.int32], recent: Recent, window: range
) -> Longs:
    """Catalogue rows that are left out: clicked, impressed within the window, outside the filters."""
    parts = [np.zeros(0, np.int64)]
    if request.exclude != "none":
        parts.append(clicks.astype(np.int64))
    if request.exclude == "impressed":
        parts.append(impressed_rows(version, recent, window))
    if not request.filters:
        return np.unique(np.concatenate(parts))
    out = np.zeros(len(version.items), np.bool_)
    out[np.concatenate(parts)] = True
    for attribute, wanted in request.filters.items():
        out |= ~passing(version, attribute, wanted)
    return np.flatnonzero(out)


def impressed_rows(version: Version, recent: Recent, window: range) -> Longs:
    """Catalogue rows of the items that a user was shown within a window."""
    rows = _rows_of_events(version, [event for event in recent.shown if event[0] in window])
    return rows if recent.seen is None else np.concatenate([rows, _seen(version, recent.seen, window.start)])


def _seen(version: Version, seen: Seen, since_ms: int) -> Longs:
    """Catalogue rows of the items in the filters of impressions; of an item put again, only later impressions count."""
    within = seen.contains(version.items.hashes, since_ms)
    again = version.again
    for deleted_ms in np.unique(again.deleted_ms[again.deleted_ms >= since_ms]).tolist():
        rows = again.rows[again.deleted_ms == deleted_ms]
        rows = rows[within[rows]]
        within[rows] = seen.contains(version.items.hashes[rows], deleted_ms + 1)
    return np.flatnonzero(within)


@dataclass(frozen=True)
class Neighbour:
    """One similar item of one channel."""

    item_id: ItemId
    score: float


@dataclass(frozen=True)
class Similar:
    """Items like an item, best first."""

    version: str
    items: list[Candidate]
    """The nearest by the vectors of the two towers."""
    channels: dict[str, list[Neighbour]]


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
        nearest = similar_items(channel, row, k)
        if nearest is not None:
            ids = version.items.at(nearest.rows[0][nearest.rows[0] >= 0])
            scores = nearest.scores[0].tolist()
            by_channel[name] = [Neighbour(item, score) for item, score in zip(ids, scores, strict=False)]
    items = [Candidate(near.item_id, near.score, [TWO_TOWER]) for near in by_channel[TWO_TOWER]]
    return Similar(version.id, items, by_channel)
