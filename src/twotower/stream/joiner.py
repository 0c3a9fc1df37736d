"""The joiner: events of one partition in, joined rows out, in an order that is a function of the log alone.

Time is the events' own, bounded by the log's clock (`twotower.stream.clock`), not counting what was put by a server.
The watermark stays `lateness_ms` behind it: requests and clicks may come in any order within that. A click leaves at
once with what its request knew. What was not clicked leaves when the watermark reaches the end of its window. A request
is remembered `late_ms` longer for late clicks.

What is remembered can be made again from the log: reading it from the offset of `replay` on, with the clock of that
moment, gives the same memory, because a request is remembered until its last event cannot matter any more. What was
erased in between is missing from it, and only that: event time runs through erased events as it did before.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pyarrow as pa

from twotower.logs import Event, Record, entities
from twotower.logs.events import (
    ALLOWED_SKEW_MS,
    CHANNELS,
    CLICK,
    CONTEXT,
    DELTA_SEQ,
    ERASED,
    FEATURES,
    HISTORY,
    IMPRESSION,
    ITEMS,
    OUTCOMES,
    POSITIONS,
    PROBABILITIES,
    PROPENSITIES,
    REQUEST,
    SCORES,
    UNUSABLE,
    USER,
    VERSION,
)
from twotower.logs.payload import MESSAGE, REASON, type_before
from twotower.schema import columns as c
from twotower.schema.tables import MAX_WEIGHT, is_id
from twotower.stream.clock import Clock
from twotower.stream.rows import Asked, ItemId, Row, Types, UserId, Value, as_value

log = logging.getLogger(__name__)

# Why something of an event is left out.
WAS_ERASED: Final = "erased"
OTHER_TYPE: Final = "other_type"
WRONG_USER_ID: Final = "wrong_user_id"
WRONG_ITEM_ID: Final = "wrong_item_id"
NO_ITEM: Final = "no_item"
NO_REQUEST_ID: Final = "impression_without_request_id"
BAD_REQUEST: Final = "bad_request"
BAD_VALUE: Final = "bad_value"
ITEM_TWICE: Final = "item_twice"

MOST_HELD: Final = 1_000_000
"""Items of open requests that are held in memory at most; other requests are read again when their window closes."""

_LEAVE, _CLOSE, _FORGET = range(3)
"""What is due at a moment: clicks that wait for their request leave, a window closes, a request is forgotten."""

_Key = tuple[UserId, str]


@dataclass(frozen=True)
class Replay:
    """Where to read the log again so that the joiner remembers what it remembered."""

    offset: int
    clock: Clock


@dataclass
class Counts:
    """What became of the events that were read."""

    events: int = 0
    late: int = 0
    """Clicks, impressions and requests that came after their window had closed."""
    duplicates: int = 0
    """Second clicks of an item in one request, and second requests of one id."""
    unjoined: int = 0
    """Clicks that left without a request: they name none, or one that did not come."""
    before_request: int = 0
    """Clicks stamped before their request; they take its time."""
    clock_jumps: int = 0
    """Times that the log's clock came back from a time beyond its own later ones."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Events, items or values left out, by reason."""


@dataclass(frozen=True, slots=True)
class _Place:
    """An item in the record of a request."""

    outcome: str
    position: int | None
    score: float | None
    channel: str | None
    probability: float | None
    propensity: float | None


@dataclass(frozen=True, slots=True)
class _Logged:
    """A request as it was logged."""

    asked: Asked
    places: Mapping[ItemId, _Place]
    """In the order of the record."""


@dataclass(slots=True)
class _Entry:
    """What is remembered of a request: the events that name it, in whatever order they come."""

    at_ms: int
    """Of the request, or until it comes, of the first event that names it."""
    last_ms: int
    first_offset: int
    clock: Clock
    """Before its first event."""
    offset: int = -1
    """Of the request; -1 while it has not come."""
    logged: _Logged | None = None
    """Until its window closes, if there is room; else it is read again at its offset where it is needed."""
    shown: dict[ItemId, Event] = field(default_factory=dict)
    """What impression events say was shown."""
    clicked: set[ItemId] = field(default_factory=set)
    waiting: list[tuple[int, Event, ItemId]] = field(default_factory=list)
    """Clicks that came before their request, each with the moment until which it waits."""
    closed: bool = False


class Joiner:
    """Joins the events of one partition.

    Args:
        types: of ids and raw values.
        window_ms: how long a click may follow its request.
        lateness_ms: how far events may be out of order.
        late_ms: how long a request is remembered for clicks that come after its window.
        fetch: the event at an offset of the partition.
    """

    def __init__(
        self, types: Types, window_ms: int, lateness_ms: int, late_ms: int, fetch: Callable[[int], Event]
    ) -> None:
        self._types = types
        self._window_ms = window_ms
        self._lateness_ms = lateness_ms
        self._late_ms = late_ms
        self._fetch = fetch
        self._clock = Clock()
        self._entries: dict[_Key, _Entry] = {}
        self._due: list[tuple[int, int, int, _Key]] = []
        self._open = 0
        self._held = 0
        self._latest_asked: tuple[Event, Asked] | None = None
        self._counts = Counts()

    @classmethod
    def resume(
        cls,
        types: Types,
        window_ms: int,
        lateness_ms: int,
        late_ms: int,
        fetch: Callable[[int], Event],
        *,
        replay: Replay,
        flushes: Sequence[int],
        records: Iterator[Record],
        end: int,
    ) -> "Joiner":
        """A joiner that remembers what another did that had read everything before the offset `end`.

        Args:
            types: as of the other, and so are the next four.
            window_ms: -
            lateness_ms: -
            late_ms: -
            fetch: -
            replay: what the other gave as its `replay` there.
            flushes: offsets before which it was flushed, ascending.
            records: the log from `replay.offset` on, up to `end`.
            end: -
        """
        joiner = cls(types, window_ms, lateness_ms, late_ms, fetch)
        joiner._clock = replay.clock
        pending = [offset for offset in flushes if offset > replay.offset]
        for record in records:
            while pending and pending[0] <= record.offset:
                pending.pop(0)
                joiner.flush()
            joiner.feed(record)
        while pending and pending[0] <= end:
            pending.pop(0)
            joiner.flush()
        joiner.take_counts()
        return joiner

    @property
    def clock(self) -> Clock:
        """How far event time has come."""
        return self._clock

    @property
    def watermark_ms(self) -> int | None:
        """Event time up to which everything has left; never beyond the latest event."""
        watermark_ms = self._clock.watermark_ms(self._lateness_ms)
        return None if watermark_ms is None else min(watermark_ms, self._clock.latest_ms or 0)

    @property
    def has_open(self) -> bool:
        """Some window is open."""
        return self._open > 0

    def replay(self, end: int) -> Replay:
        """Where to read the log again to remember what is remembered now, when everything before `end` was read."""
        for entry in self._entries.values():  # in the order of their first events
            return Replay(entry.first_offset, entry.clock)
        return Replay(end, self._clock)

    def take_counts(self) -> Counts:
        """The counts since they were last taken."""
        counts, self._counts = self._counts, Counts()
        return counts

    def feed(self, record: Record) -> list[Row]:
        """Take the next event of the partition; gives the rows that leave."""
        event, rows = record.event, list[Row]()
        self._counts.events += 1
        if type_before(event) == UNUSABLE:
            self._pass_over(record)
            return rows
        if self._clock.is_beyond(record.logged_ms):
            self._come_back(record, rows)
        if type_before(event) in entities.TYPES:  # stamped by a server, whatever time requests carry: no event time
            if entities.is_deletion(event) and event.type == USER:
                self._forget_user(event.user_id)
            return rows
        if event.type == ERASED:
            self._counts.dropped[WAS_ERASED] += 1
        elif event.type not in (REQUEST, IMPRESSION, CLICK):
            self._counts.dropped[OTHER_TYPE] += 1
        elif not is_id(event.user_id, self._types.user_id):
            self._counts.dropped[WRONG_USER_ID] += 1
        elif event.type == REQUEST:
            self._take_request(record, rows)
        elif event.type == CLICK:
            self._take_click(record, rows)
        else:
            self._take_impression(record, rows)
        self._clock = self._clock.after(event, record.logged_ms, self._window_ms)
        watermark_ms = self._clock.watermark_ms(self._lateness_ms)
        while self._due and watermark_ms is not None and self._due[0][0] <= watermark_ms:
            self._do(heapq.heappop(self._due), watermark_ms, rows)
        return rows

    def flush(self) -> list[Row]:
        """Close every window that is open, as if its time had passed; gives the rows that leave."""
        rows = list[Row]()
        if self._clock.latest_ms is not None:
            self._clock = replace(self._clock, floor_ms=self._clock.latest_ms + self._window_ms)
        due, self._due = sorted(self._due), []
        for one in due:
            if one[2] == _FORGET:
                heapq.heappush(self._due, one)
            else:
                self._do(one, None, rows)
        return rows

    def _pass_over(self, record: Record) -> None:
        """Count an event that no reader can use, and say the first of its kind."""
        body = record.event.body
        reason = f"{UNUSABLE}_{body[REASON]}" if REASON in body else WAS_ERASED
        self._counts.dropped[reason] += 1
        if self._counts.dropped[reason] == 1 and MESSAGE in body:
            log.warning("offset %d: an event is passed over: %s", record.offset, body[MESSAGE])

    def _come_back(self, record: Record, rows: list[Row]) -> None:
        """The log's clock was ahead and has come back: requests of the wrong time leave, and are forgotten."""
        self._counts.clock_jumps += 1
        log.warning(
            "offset %d: the log's clock comes back from %s to %s, and event time with it: the server's clock was wrong",
            record.offset,
            self._clock.latest_ms,
            record.logged_ms,
        )
        self._clock = self._clock.back_to(record.logged_ms)
        most_ms = record.logged_ms + ALLOWED_SKEW_MS
        for key, entry in [(key, entry) for key, entry in self._entries.items() if entry.last_ms > most_ms]:
            self._do((most_ms, entry.first_offset, _LEAVE, key), None, rows)
            self._do((most_ms, entry.first_offset, _CLOSE, key), None, rows)
            del self._entries[key]
        self._due = [due for due in self._due if due[3] in self._entries]
        heapq.heapify(self._due)

    def _forget_user(self, user_id: UserId) -> None:
        """A user was deleted: nothing more leaves of what they did before."""
        for key in [key for key in self._entries if key[0] == user_id and type(key[0]) is type(user_id)]:
            entry = self._entries.pop(key)
            self._open -= not entry.closed
            self._let_go(entry)

    def _hold(self, entry: _Entry, logged: _Logged) -> None:
        """Keep a request in memory until its window closes, if there is room."""
        if self._held + len(logged.places) <= MOST_HELD:
            entry.logged = logged
            self._held += len(logged.places)

    def _let_go(self, entry: _Entry) -> None:
        if entry.logged is not None:
            self._held -= len(entry.logged.places)
            entry.logged = None

    def _do(self, one: tuple[int, int, int, _Key], watermark_ms: int | None, rows: list[Row]) -> None:
        """What is due; without a watermark, whatever its time."""
        due_ms, first_offset, what, key = one
        entry = self._entries.get(key)
        if entry is None or entry.first_offset != first_offset:
            return
        if what == _FORGET:
            due_ms = entry.last_ms + self._window_ms + self._late_ms
            if watermark_ms is not None and due_ms <= watermark_ms:
                del self._entries[key]
            else:
                heapq.heappush(self._due, (due_ms, first_offset, _FORGET, key))
        elif what == _LEAVE:
            waiting, entry.waiting = entry.waiting, []
            for moment_ms, event, item in waiting:
                if watermark_ms is not None and moment_ms > watermark_ms:
                    entry.waiting.append((moment_ms, event, item))
                else:
                    self._counts.unjoined += 1
                    rows.append(self._click_row(event, item, None))
        elif not entry.closed:
            due_ms = entry.at_ms + self._window_ms
            if watermark_ms is None or due_ms <= watermark_ms:
                self._close(entry, rows)
                forget_ms = entry.last_ms + self._window_ms + self._late_ms
                heapq.heappush(self._due, (forget_ms, first_offset, _FORGET, key))
            else:
                heapq.heappush(self._due, (due_ms, first_offset, _CLOSE, key))

    def _entry(self, record: Record, request_id: str) -> _Entry:
        """What is remembered of a request, now that one more event names it."""
        key, moment_ms = (record.event.user_id, request_id), self._moment_ms(record.event)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(moment_ms, moment_ms, record.offset, self._clock)
            self._open += 1
            heapq.heappush(self._due, (moment_ms + self._window_ms, record.offset, _CLOSE, key))
        entry.last_ms = max(entry.last_ms, moment_ms)
        return entry

    def _moment_ms(self, event: Event) -> int:
        """When an event happened, for what is due; never further ahead than it may move the clock."""
        if event.type == REQUEST or self._clock.request_ms is None:
            return event.ts_ms
        return min(event.ts_ms, self._clock.request_ms + self._window_ms)

    def _take_request(self, record: Record, rows: list[Row]) -> None:
        event = record.event
        request_id = event.request_id or event.event_id
        before = self._entries.get((event.user_id, request_id))
        if before is not None and before.offset >= 0:
            self._counts.duplicates += 1
            self._entry(record, request_id)
            return
        logged = self._logged(event)
        if logged is None:
            return
        entry = self._entry(record, request_id)
        entry.offset, entry.at_ms = record.offset, event.ts_ms
        self._hold(entry, logged)
        rows.extend(self._click_row(click, item, logged) for _, click, item in entry.waiting)
        entry.waiting = []
        for item, place in logged.places.items():
            if place.outcome == c.CLICKED and item not in entry.clicked:
                entry.clicked.add(item)
                rows.append(self._click_row(event, item, logged))
        watermark_ms = self._clock.watermark_ms(self._lateness_ms)
        if watermark_ms is not None and event.ts_ms + self._window_ms <= watermark_ms:
            self._counts.late += 1
        if entry.closed:  # it was held for the request of its clicks or impressions, which have left without it
            self._close(entry, rows)
        else:
            key = (event.user_id, request_id)
            heapq.heappush(self._due, (event.ts_ms + self._window_ms, entry.first_offset, _CLOSE, key))

    def _take_click(self, record: Record, rows: list[Row]) -> None:
        event = record.event
        items = self._items(event)
        if event.request_id is None:
            self._counts.unjoined += len(items)
            rows.extend(self._click_row(event, item, None) for item in items)
            return
        if not items:
            return
        entry = self._entry(record, event.request_id)
        fresh = [item for item in items if item not in entry.clicked]
        self._counts.duplicates += len(items) - len(fresh)
        if not fresh:
            return
        entry.clicked.update(fresh)
        self._counts.late += len(fresh) * entry.closed
        if entry.offset >= 0:
            logged = self._known(entry)
            rows.extend(self._click_row(event, item, logged) for item in fresh)
        else:
            moment_ms = self._moment_ms(event)
            entry.waiting.extend((moment_ms, event, item) for item in fresh)
            key = (event.user_id, event.request_id)
            heapq.heappush(self._due, (moment_ms, entry.first_offset, _LEAVE, key))

    def _take_impression(self, record: Record, rows: list[Row]) -> None:
        event = record.event
        items = self._items(event)
        if event.request_id is None:
            self._counts.dropped[NO_REQUEST_ID] += len(items)
            return
        if not items:
            return
        entry = self._entry(record, event.request_id)
        fresh = [item for item in items if item not in entry.shown]
        entry.shown.update(dict.fromkeys(fresh, event))
        if not entry.closed or not fresh:
            return
        self._counts.late += len(fresh)
        logged = self._known(entry)
        for item in fresh:
            place = logged.places.get(item) if logged else None
            if item not in entry.clicked and not (place and place.outcome == c.IMPRESSED):
                rows.append(self._shown_row(event, item, logged))

    def _close(self, entry: _Entry, rows: list[Row]) -> None:
        """The rows of what was not clicked, in the order of the request's record."""
        if not entry.closed:
            self._open -= 1
        logged = self._known(entry)
        places = logged.places if logged else {}
        for item, place in places.items():
            if item in entry.clicked:
                continue
            if item in entry.shown:
                if not entry.closed:
                    rows.append(self._shown_row(entry.shown[item], item, logged))
            else:
                assert logged is not None
                rows.append(_row(logged.asked, item, place, place.outcome))
        if not entry.closed:
            for item, event in entry.shown.items():
                if item not in entry.clicked and item not in places:
                    rows.append(self._shown_row(event, item, logged))
        self._let_go(entry)
        entry.closed = True

    def _known(self, entry: _Entry) -> _Logged | None:
        """The request, if it has come."""
        if entry.logged is not None or entry.offset < 0:
            return entry.logged
        counts, self._counts = self._counts, Counts()  # it was counted when it came
        event = self._fetch(entry.offset)
        logged = self._logged(event) if event.type == REQUEST else None  # erased: its deletion is still to be read
        self._counts = counts
        return logged

    def _click_row(self, event: Event, item: ItemId, logged: _Logged | None) -> Row:
        asked = logged.asked if logged else self._asked(event)
        place = logged.places.get(item) if logged else None
        if event.ts_ms < asked.ts_ms:
            self._counts.before_request += 1
        row = _row(asked, item, place, c.CLICKED)
        return replace(row, click_ts_ms=max(event.ts_ms, asked.ts_ms), weight=self._weight(event))

    def _shown_row(self, event: Event, item: ItemId, logged: _Logged | None) -> Row:
        """Of an item that an impression event says was shown, whatever its request says."""
        if logged:
            return _row(logged.asked, item, logged.places.get(item), c.IMPRESSED)
        return _row(self._asked(event), item, None, c.IMPRESSED)

    def _weight(self, event: Event) -> float:
        """A click's own weight, which is a number of at least 0, or 1."""
        weight = event.body.get(c.WEIGHT) if event.type == CLICK else None
        if weight is None:
            return 1.0
        if isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= MAX_WEIGHT:
            return float(weight)
        self._counts.dropped[BAD_VALUE] += 1
        return 1.0

    def _items(self, event: Event) -> list[ItemId]:
        """The distinct items that a click or an impression names."""
        body = event.body
        items = body.get(ITEMS, [body[c.ITEM_ID]] if c.ITEM_ID in body else [])
        if not isinstance(items, list) or not items:
            self._counts.dropped[NO_ITEM] += 1
            return []
        return list(dict.fromkeys(self._right(items)))

    def _right(self, items: Sequence[Any]) -> list[ItemId]:
        right = [item for item in items if is_id(item, self._types.item_id)]
        if wrong := len(items) - len(right):
            self._counts.dropped[WRONG_ITEM_ID] += wrong
        return right

    def _asked(self, event: Event) -> Asked:
        """What an event says of its request: one for all of its items."""
        if self._latest_asked is None or self._latest_asked[0] is not event:
            self._latest_asked = event, self._read_asked(event)
        return self._latest_asked[1]

    def _read_asked(self, event: Event) -> Asked:
        history = event.body.get(HISTORY)
        version, delta_seq = event.body.get(VERSION), event.body.get(DELTA_SEQ)
        return Asked(
            event.user_id,
            event.request_id or (event.event_id if event.type == REQUEST else None),
            event.ts_ms,
            self._values(event.body.get(CONTEXT), self._types.context),
            self._values(event.body.get(FEATURES), self._types.features),
            self._right(history) if isinstance(history, list) else None,
            version if isinstance(version, str) else None,
            delta_seq if type(delta_seq) is int and is_id(delta_seq, pa.int64()) else None,
        )

    def _values(self, given: Any, types: Mapping[str, pa.DataType]) -> dict[str, Value]:
        """The values of configured features, in their types; others are passed over."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            self._counts.dropped[BAD_VALUE] += 1
            return {}
        values: dict[str, Value] = {}
        for name, kind in types.items():
            try:
                value = as_value(given.get(name), kind)
            except ValueError:
                self._counts.dropped[BAD_VALUE] += 1
                continue
            if value is not None:
                values[name] = value
        return values

    def _logged(self, event: Event) -> _Logged | None:
        """A request, or None where its record is not of its form, which is counted."""
        body = event.body
        items, outcomes = body.get(ITEMS) or [], body.get(OUTCOMES) or []
        packed = [body.get(name) for name in _PACKED]
        if (
            not isinstance(items, list)
            or not isinstance(outcomes, list)
            or len(items) != len(outcomes)
            or any(outcome not in c.OUTCOMES for outcome in outcomes)
            or any(column is not None and not _is_packed(column, len(items)) for column in packed)
        ):
            self._counts.dropped[BAD_REQUEST] += 1
            return None
        places: dict[ItemId, _Place] = {}
        columns = [
            [None] * len(items) if column is None else column if kind is None else self._numbers(column, kind)
            for column, kind in zip(packed, _PACKED.values(), strict=True)
        ]
        for item, outcome, *values in zip(items, outcomes, *columns, strict=True):
            if not is_id(item, self._types.item_id):
                self._counts.dropped[WRONG_ITEM_ID] += 1
                continue
            before = places.get(item)
            if before is not None:
                self._counts.dropped[ITEM_TWICE] += 1
                if _RANK[before.outcome] >= _RANK[outcome]:
                    continue
            places[item] = self._place(outcome, values)
        return _Logged(self._asked(event), places)

    def _place(self, outcome: str, values: Sequence[Any]) -> _Place:
        position, score, channels, probability, propensity = values
        shown = outcome in (c.IMPRESSED, c.CLICKED)
        names = [name for name in channels if isinstance(name, str)] if isinstance(channels, list) else []
        return _Place(
            outcome, position if shown else None, score, "|".join(names) or None, probability, propensity
        )  # fmt: skip

    def _numbers(self, column: Sequence[Any], kind: pa.DataType) -> list[Any]:
        """A packed column in its type; what is of none is null, and counted. Nearly all is right as it is."""
        usual, most = (float, 1e38) if pa.types.is_floating(kind) else (int, 2**31 - 1)
        return [
            value if value is None or (type(value) is usual and -most <= value <= most) else self._number(value, kind)
            for value in column
        ]

    def _number(self, value: Any, kind: pa.DataType) -> Any:
        try:
            return as_value(value, kind)
        except ValueError:
            self._counts.dropped[BAD_VALUE] += 1
            return None


_PACKED: Final = {
    POSITIONS: pa.int32(),
    SCORES: pa.float32(),
    CHANNELS: None,
    PROBABILITIES: pa.float32(),
    PROPENSITIES: pa.float32(),
}
"""Columns of a request's record beside its items, and the type of their numbers."""
_RANK: Final = {outcome: rank for rank, outcome in enumerate(c.OUTCOMES)}


def _is_packed(column: Any, size: int) -> bool:
    return isinstance(column, list) and len(column) == size


def _row(asked: Asked, item: ItemId, place: _Place | None, outcome: str) -> Row:
    if place is None:
        return Row(asked, item, outcome)
    shown = outcome in (c.IMPRESSED, c.CLICKED)
    position = place.position if shown else None
    return Row(
        asked,
        item,
        outcome,
        None,
        None,
        position,
        place.score,
        place.channel,
        place.probability,
        place.propensity,
    )
