"""The joiner: events of one partition in, joined rows out, in an order that is a function of the log alone.

Time is the events' own, bounded by the log's clock (`twotower.stream.clock`), not counting what was put by a server.
The watermark stays the allowed lateness behind it: requests and clicks may come in any order within that. A click
leaves at once with what its request knew. What was not clicked leaves when the watermark reaches the end of its window.
A request is remembered `remember_s` longer for late clicks.

What is remembered can be made again from the log: reading it from the offset of `replay` on, with the clock of that
moment, gives the same memory, because a request is remembered until its last event cannot matter any more. What was
erased in between is missing from it, and only that: event time runs through erased events as it did before.
"""

import heapq
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pyarrow as pa

from twotower.logs import Event, Record
from twotower.logs.events import (
    ALLOWED_SKEW_MS,
    ITEM,
    REQUEST,
    UNUSABLE,
    USER,
    Click,
    EntityDeleted,
    EntityId,
    Erased,
    Impression,
    LoggedRequest,
    Unusable,
)
from twotower.schema import columns as c
from twotower.schema.tables import is_id
from twotower.stream.clock import Clock
from twotower.stream.options import StreamOptions
from twotower.stream.rows import FUNNEL, Row, RowRequest, Types, Value, as_value

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

MAX_HELD: Final = 1_000_000
"""Largest number of items of open requests in memory; other requests are read again when their window closes."""
_INT32_MAX: Final = 2**31 - 1
_FLOAT32_MAX: Final = 1e38
_RANK: Final = {outcome: rank for rank, outcome in enumerate(c.OUTCOMES)}

_LEAVE, _CLOSE, _FORGET = range(3)
"""What happens at a moment: clicks that wait for their request leave, a window closes, a request is forgotten."""

_Key = tuple[EntityId, str]
"""A user and the id of a request."""


@dataclass(frozen=True)
class Replay:
    """Where to read the log again so that the joiner remembers what it remembered."""

    offset: int
    clock: Clock


@dataclass
class JoinCounts:
    """What became of the events that were read."""

    events: int = 0
    late: int = 0
    """Clicks, impressions and requests that came after their window had closed."""
    duplicates: int = 0
    """Second clicks of an item in one request, and second requests of one id."""
    unjoined: int = 0
    """Clicks that left without a request: they name no request, or one that did not come."""
    before_request: int = 0
    """Clicks stamped before their request; they take its time."""
    clock_jumps: int = 0
    """Times that the log's clock came back from a time beyond its own later ones."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Events, items or values left out, by reason."""


@dataclass(frozen=True, slots=True)
class _Logged:
    """A request as it was logged."""

    request: RowRequest
    rows: Mapping[EntityId, Row]
    """By item in the order of the record, the row that leaves if no more events name the item."""


@dataclass(slots=True)
class _Entry:
    """What is remembered of a request: the events that name it, in whatever order they come."""

    at_ms: int
    """Time of the request, or of the first event that names it until the request comes."""
    last_ms: int
    first_offset: int
    clock: Clock
    """Before its first event."""
    offset: int = -1
    """Offset of the request; -1 while it has not come."""
    logged: _Logged | None = None
    """Until its window closes, if there is room; else it is read again at its offset where it is needed."""
    shown: dict[EntityId, Event] = field(default_factory=dict)
    """What impression events say was shown."""
    clicked: set[EntityId] = field(default_factory=set)
    waiting: list[tuple[int, Event, EntityId]] = field(default_factory=list)
    """Clicks that came before their request, each with the moment until which it waits."""
    closed: bool = False


class Joiner:
    """Joins the events of one partition; `fetch` gives the event at an offset of the partition."""

    def __init__(self, types: Types, options: StreamOptions, fetch: Callable[[int], Event]) -> None:
        self._types = types
        self._window_ms = options.window_ms
        self._allowed_lateness_ms = options.allowed_lateness_ms
        self._remember_ms = options.window_ms + options.remember_ms
        self._fetch = fetch
        self._clock = Clock()
        self._entries: dict[_Key, _Entry] = {}
        self._due: list[tuple[int, int, int, _Key]] = []
        self._open = 0
        self._held = 0
        self._latest_request: tuple[Event, RowRequest] | None = None
        self._counts = JoinCounts()

    def resume(self, replay: Replay, flushes: Sequence[int], records: Iterable[Record], end: int) -> None:
        """Take the state that another joiner had when it had read everything before the offset `end`.

        Args:
            replay: the other's `replay` there.
            flushes: offsets before which it was flushed, ascending.
            records: the log from `replay.offset` to `end`.
            end: the offset up to which the other had read.
        """
        self._clock = replay.clock
        pending = deque(offset for offset in flushes if replay.offset < offset <= end)
        for record in records:
            while pending and pending[0] <= record.offset:
                pending.popleft()
                self.flush()
            self.feed(record)
        for _ in pending:
            self.flush()
        self.take_counts()

    @property
    def clock(self) -> Clock:
        """How far event time has come."""
        return self._clock

    @property
    def watermark_ms(self) -> int | None:
        """Event time up to which everything has left; never beyond the latest event."""
        watermark_ms = self._clock.watermark_ms(self._allowed_lateness_ms)
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

    def take_counts(self) -> JoinCounts:
        """The counts since they were last taken."""
        counts, self._counts = self._counts, JoinCounts()
        return counts

    def feed(self, record: Record) -> list[Row]:
        """Take the next event of the partition; gives the rows that leave."""
        event, content, rows = record.event, record.event.content, list[Row]()
        self._counts.events += 1
        if event.original_type == UNUSABLE:
            self._pass_over(record)
            return rows
        if self._clock.is_beyond(record.logged_ms):
            self._come_back(record, rows)
        if event.original_type in (USER, ITEM):  # their time is a server's, not event time
            if isinstance(content, EntityDeleted) and content.kind == USER:
                self._forget_user(event.user_id)
            return rows
        if isinstance(content, Erased):
            self._counts.dropped[WAS_ERASED] += 1
        elif not isinstance(content, LoggedRequest | Click | Impression):
            self._counts.dropped[OTHER_TYPE] += 1
        elif not is_id(event.user_id, self._types.user_id):
            self._counts.dropped[WRONG_USER_ID] += 1
        elif isinstance(content, LoggedRequest):
            self._take_request(record, content, rows)
        elif isinstance(content, Click):
            self._take_click(record, content, rows)
        else:
            self._take_impression(record, content, rows)
        self._clock = self._clock.after(event, record.logged_ms, self._window_ms)
        watermark_ms = self._clock.watermark_ms(self._allowed_lateness_ms)
        while self._due and watermark_ms is not None and self._due[0][0] <= watermark_ms:
            self._do(heapq.heappop(self._due), watermark_ms, rows)
        return rows

    def flush(self) -> list[Row]:
        """Close every window that is open, as if its time had passed; gives the rows that leave."""
        rows = list[Row]()
        if self._clock.latest_ms is not None:
            self._clock = replace(self._clock, floor_ms=self._clock.latest_ms + self._window_ms)
        due, self._due = sorted(self._due), []
        for task in due:
            if task[2] == _FORGET:
                heapq.heappush(self._due, task)
            else:
                self._do(task, None, rows)
        return rows

    def _pass_over(self, record: Record) -> None:
        """Count an event that no reader can use, and log the first with each reason."""
        content = record.event.content
        if not isinstance(content, Unusable):
            self._counts.dropped[WAS_ERASED] += 1
            return
        reason = f"{UNUSABLE}_{content.reason}"
        self._counts.dropped[reason] += 1
        if self._counts.dropped[reason] == 1:
            log.warning("offset %d: an event is passed over: %s", record.offset, content.message)

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
        limit_ms = record.logged_ms + ALLOWED_SKEW_MS
        for key, entry in [(key, entry) for key, entry in self._entries.items() if entry.last_ms > limit_ms]:
            self._do((limit_ms, entry.first_offset, _LEAVE, key), None, rows)
            self._do((limit_ms, entry.first_offset, _CLOSE, key), None, rows)
            del self._entries[key]
        self._due = [due for due in self._due if due[3] in self._entries]
        heapq.heapify(self._due)

    def _forget_user(self, user_id: EntityId) -> None:
        """A user was deleted: nothing more leaves of what they did before."""
        for key in [key for key in self._entries if key[0] == user_id and type(key[0]) is type(user_id)]:
            entry = self._entries.pop(key)
            self._open -= not entry.closed
            self._let_go(entry)

    def _let_go(self, entry: _Entry) -> None:
        if entry.logged is not None:
            self._held -= len(entry.logged.rows)
            entry.logged = None

    def _do(self, due: tuple[int, int, int, _Key], watermark_ms: int | None, rows: list[Row]) -> None:
        """Do what is due at a moment that has come; without a watermark, whatever the moment is."""
        due_ms, first_offset, what, key = due
        entry = self._entries.get(key)
        if entry is None or entry.first_offset != first_offset:
            return
        if what == _FORGET:
            due_ms = entry.last_ms + self._remember_ms
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
                forget_ms = entry.last_ms + self._remember_ms
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
        """When an event happened; never further ahead than it may move the clock."""
        if event.type == REQUEST or self._clock.request_ms is None:
            return event.ts_ms
        return min(event.ts_ms, self._clock.request_ms + self._window_ms)

    def _take_request(self, record: Record, content: LoggedRequest, rows: list[Row]) -> None:
        event = record.event
        request_id = event.request_id or event.event_id
        before = self._entries.get((event.user_id, request_id))
        if before is not None and before.offset >= 0:
            self._counts.duplicates += 1
            self._entry(record, request_id)
            return
        logged = self._logged(event, content)
        if logged is None:
            return
        entry = self._entry(record, request_id)
        entry.offset, entry.at_ms = record.offset, event.ts_ms
        if self._held + len(logged.rows) <= MAX_HELD:
            entry.logged = logged
            self._held += len(logged.rows)
        rows.extend(self._click_row(click, item, logged) for _, click, item in entry.waiting)
        entry.waiting = []
        for item, row in logged.rows.items():
            if row.outcome == c.CLICKED and item not in entry.clicked:
                entry.clicked.add(item)
                rows.append(self._click_row(event, item, logged))
        watermark_ms = self._clock.watermark_ms(self._allowed_lateness_ms)
        if watermark_ms is not None and event.ts_ms + self._window_ms <= watermark_ms:
            self._counts.late += 1
        if entry.closed:  # it was held for the request of its clicks or impressions, which have left without it
            self._close(entry, rows)
        else:
            key = (event.user_id, request_id)
            heapq.heappush(self._due, (event.ts_ms + self._window_ms, entry.first_offset, _CLOSE, key))

    def _take_click(self, record: Record, content: Click, rows: list[Row]) -> None:
        event = record.event
        items = self._items(content)
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

    def _take_impression(self, record: Record, content: Impression, rows: list[Row]) -> None:
        event = record.event
        items = self._items(content)
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
            row = logged.rows.get(item) if logged else None
            if item not in entry.clicked and not (row and row.outcome == c.IMPRESSED):
                rows.append(self._shown_row(event, item, logged))

    def _close(self, entry: _Entry, rows: list[Row]) -> None:
        """The rows of what was not clicked, in the order of the request's record."""
        if not entry.closed:
            self._open -= 1
        logged = self._known(entry)
        recorded = logged.rows if logged else {}
        for item, row in recorded.items():
            if item in entry.clicked:
                continue
            if item not in entry.shown:
                rows.append(row)
            elif not entry.closed:
                rows.append(self._shown_row(entry.shown[item], item, logged))
        if not entry.closed:
            for item, event in entry.shown.items():
                if item not in entry.clicked and item not in recorded:
                    rows.append(self._shown_row(event, item, logged))
        self._let_go(entry)
        entry.closed = True

    def _known(self, entry: _Entry) -> _Logged | None:
        """The request, if it has come."""
        if entry.logged is not None or entry.offset < 0:
            return entry.logged
        counts, self._counts = self._counts, JoinCounts()  # it was counted when it came
        event = self._fetch(entry.offset)
        content = event.content
        # An erased one is that of a user whose deletion is still to be read.
        logged = self._logged(event, content) if isinstance(content, LoggedRequest) else None
        self._counts = counts
        return logged

    def _click_row(self, event: Event, item: EntityId, logged: _Logged | None) -> Row:
        row = self._row(event, item, logged)
        if event.ts_ms < row.request.ts_ms:
            self._counts.before_request += 1
        content = event.content
        weight = content.weight if isinstance(content, Click) and content.weight is not None else 1.0
        click_ts_ms = max(event.ts_ms, row.request.ts_ms)
        return replace(row, outcome=c.CLICKED, click_ts_ms=click_ts_ms, weight=float(weight))

    def _shown_row(self, event: Event, item: EntityId, logged: _Logged | None) -> Row:
        """The row of an item that was shown according to an impression event, even if its request differs."""
        return replace(self._row(event, item, logged), outcome=c.IMPRESSED)

    def _row(self, event: Event, item: EntityId, logged: _Logged | None) -> Row:
        """What is known of an item: by its request, or else by the event that names it."""
        if logged is None:
            return Row(self._request_of(event), item, c.IMPRESSED)
        return logged.rows.get(item) or Row(logged.request, item, c.IMPRESSED)

    def _items(self, content: Click | Impression) -> list[EntityId]:
        """The distinct items that a click or an impression names."""
        if not content.items:
            self._counts.dropped[NO_ITEM] += 1
            return []
        return list(dict.fromkeys(self._right(content.items)))

    def _right(self, items: Sequence[Any]) -> list[EntityId]:
        right = [item for item in items if is_id(item, self._types.item_id)]
        if wrong := len(items) - len(right):
            self._counts.dropped[WRONG_ITEM_ID] += wrong
        return right

    def _request_of(self, event: Event) -> RowRequest:
        """The request that an event describes, the same object for all of its items."""
        if self._latest_request is not None and self._latest_request[0] is event:
            return self._latest_request[1]
        content = event.content
        assert isinstance(content, LoggedRequest | Click | Impression)
        request = RowRequest(
            event.user_id,
            event.request_id or (event.event_id if event.type == REQUEST else None),
            event.ts_ms,
            self._values(content.context, self._types.context),
            self._values(content.features, self._types.features),
            self._right(content.history) if isinstance(content.history, list) else None,
            content.version if isinstance(content.version, str) else None,
            content.delta_seq if is_id(content.delta_seq, pa.int64()) else None,
        )
        self._latest_request = event, request
        return request

    def _values(self, given: Any, types: Mapping[str, pa.DataType]) -> dict[str, Value]:
        """The values of configured features, in their types; others are passed over."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            self._counts.dropped[BAD_VALUE] += 1
            return {}
        values = {name: self._value(given.get(name), kind) for name, kind in types.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _value(self, value: Any, kind: pa.DataType) -> Value:
        """A value in its type; one that is not of the type is null, and counted."""
        try:
            return as_value(value, kind)
        except ValueError:
            self._counts.dropped[BAD_VALUE] += 1
            return None

    def _logged(self, event: Event, content: LoggedRequest) -> _Logged | None:
        """A request, or None where its lists have not one value for each item, which is counted."""
        items: Sequence[EntityId] = content.items or ()
        outcomes: Sequence[str] = content.outcomes or ()
        packed = (content.positions, content.scores, content.channels, content.probabilities, content.propensities)
        if len(items) != len(outcomes) or any(
            column is not None and not (isinstance(column, list) and len(column) == len(items)) for column in packed
        ):
            self._counts.dropped[BAD_REQUEST] += 1
            return None
        request, rows = self._request_of(event), dict[EntityId, Row]()
        columns = [self._column(column, len(items), kind) for column, kind in zip(packed, FUNNEL.values(), strict=True)]
        for item, outcome, *values in zip(items, outcomes, *columns, strict=True):
            if not is_id(item, self._types.item_id):
                self._counts.dropped[WRONG_ITEM_ID] += 1
                continue
            if item in rows:
                self._counts.dropped[ITEM_TWICE] += 1
                if _RANK[rows[item].outcome] >= _RANK[outcome]:
                    continue
            if outcome not in (c.IMPRESSED, c.CLICKED):
                values[0] = None  # it had no position
            rows[item] = Row(request, item, outcome, None, None, *values)
        return _Logged(request, rows)

    def _column(self, column: Sequence[Any] | None, size: int, kind: pa.DataType) -> Sequence[Any]:
        """A packed column of a request in its type; what is not of the type is null, and counted."""
        if column is None:
            return [None] * size
        if pa.types.is_string(kind):  # names of channels
            named = [
                [name for name in names if isinstance(name, str)] if isinstance(names, list) else [] for names in column
            ]
            return ["|".join(names) or None for names in named]
        usual, most = (float, _FLOAT32_MAX) if pa.types.is_floating(kind) else (int, _INT32_MAX)
        return [  # nearly all are as they should be
            value if value is None or (type(value) is usual and -most <= value <= most) else self._value(value, kind)
            for value in column
        ]
