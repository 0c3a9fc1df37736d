"""Events: as they are sent and stored (`Event`), and what they say (`Event.content`).

The names of an event's fields stand only here. Every event passes `check_event` before a log stores it, and again when
it is read (`twotower.logs.payload`), because an earlier release or another producer may have written it. So the size
of what one event can become is bounded for every reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import orjson

from twotower.schema import columns as c
from twotower.schema.errors import DataError, shown
from twotower.schema.limits import (
    BAD_NUMBER,
    MALFORMED,
    MAX_CONTEXT_BYTES,
    MAX_HISTORY,
    MAX_ID_BYTES,
    MAX_ITEMS,
    MAX_TYPE_BYTES,
    TOO_LARGE,
    Refused,
    check_fields_json,
    check_id,
    check_names,
    check_text,
)
from twotower.schema.tables import MAX_WEIGHT, mistaken_time

EntityId = int | str
"""An id of a user or an item, as it is sent: int64 or string; 1 and "1" are different ids."""

# Types of events.
CLICK: Final = "click"
IMPRESSION: Final = "impression"
REQUEST: Final = "request"
USER: Final = "user"
ITEM: Final = "item"
ERASED: Final = "erased"
"""Type of the events that a log gives in the place of those that were erased."""
UNUSABLE: Final = "unusable"
"""Type of the events that a log gives in the place of those that fail the check."""
CATALOGUE: Final = "@catalogue"
"""The user of the events of items, so that they stand in one partition, in one order."""
NOBODY: Final = "@erased"
"""The user of erased and unusable events."""

EVENT_ID: Final = "event_id"
TYPE: Final = "type"
LOGGED_MS: Final = "logged_ms"
"""Field of a stored event that only the log itself writes: its clock."""

ALLOWED_SKEW_MS: Final = 300_000
"""How far a time may lie ahead of the log's clock: the clocks of clients and servers differ a little."""
BEYOND_CLOCK: Final = "beyond_clock"
"""Why an event is refused: it has a time further ahead."""

_REQUIRED: Final = (EVENT_ID, TYPE, c.USER_ID, c.TS_MS)
_NAMED: Final = frozenset((*_REQUIRED, c.REQUEST_ID))
_ITEMS, _CONTEXT, _FEATURES, _DELETED, _WAS = "items", "context", "features", "deleted", "was"


@dataclass(frozen=True, slots=True)
class Click:
    """Items that a user clicked (None = it names none), and what was known when they were shown.

    The other values stand here as they were sent: a reader compares them with the types of its workspace.
    """

    items: Sequence[EntityId] | None = None
    context: Any = None
    features: Any = None
    history: Any = None
    version: Any = None
    delta_seq: Any = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Impression:
    """Items that were shown to a user, as `Click` has them."""

    items: Sequence[EntityId] | None = None
    context: Any = None
    features: Any = None
    history: Any = None
    version: Any = None
    delta_seq: Any = None


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request with what became of its candidates: up to `propensities`, lists with a value for each of its items."""

    items: Sequence[EntityId] | None = None
    outcomes: Sequence[str] | None = None
    positions: Any = None
    scores: Any = None
    channels: Any = None
    """Names of the channels that retrieved each item."""
    probabilities: Any = None
    propensities: Any = None
    context: Any = None
    features: Any = None
    history: Sequence[EntityId] | None = None
    """Clicks that the model saw, oldest first."""
    version: Any = None
    delta_seq: Any = None
    counts: Any = None
    """How many items ended in each stage, by name."""
    failed_channels: Any = None

    def ended(self, *outcomes: str) -> list[EntityId]:
        """The items that had one of some outcomes."""
        pairs = zip(self.items or (), self.outcomes or (), strict=False)
        return [item for item, outcome in pairs if outcome in outcomes]

    def body(self) -> dict[str, Any]:
        """The JSON fields of its event."""
        return {name: getattr(self, name) for name in _FIELDS[LoggedRequest]}


@dataclass(frozen=True, slots=True)
class EntityPut:
    """A user or an item is put."""

    kind: str
    """`user` or `item`."""
    entity_id: EntityId
    features: Mapping[str, Any] | None
    """All its features; None = they stay."""
    available: bool | None
    """Whether an item may be retrieved; None = that stays."""


@dataclass(frozen=True, slots=True)
class EntityDeleted:
    """A user or an item is deleted."""

    kind: str
    entity_id: EntityId


@dataclass(frozen=True, slots=True)
class Erased:
    """An event was erased."""

    was: Any
    """Its type."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """An event fails the check."""

    reason: str
    """One of a few words."""
    message: str


@dataclass(frozen=True, slots=True)
class Other:
    """An event of any other type."""


Content = LoggedRequest | Click | Impression | EntityPut | EntityDeleted | Erased | Unusable | Other

_WITH_ITEMS: Final = {REQUEST: LoggedRequest, CLICK: Click, IMPRESSION: Impression}
_FIELDS: Final = {kind: tuple(one.name for one in fields(kind)) for kind in _WITH_ITEMS.values()}


@dataclass(frozen=True, slots=True)
class Event:
    """A raw event as a client or a server sent it, checked when it is made.

    Raises:
        DataError: a field of another type, an empty id, a time that is not in milliseconds, a body that names one of
            the other fields.
    """

    event_id: str
    """Names the event; a retry carries the same id and the same user."""
    type: str
    """`request`, `impression`, `click`, or any other word."""
    user_id: EntityId
    ts_ms: int
    """When it happened, milliseconds since 1970."""
    request_id: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    """Its further JSON fields, such as items and context."""

    def __post_init__(self) -> None:
        _require(self.event_id, str, "a string", EVENT_ID, "an event")
        where = f"event {shown(self.event_id)}"
        _require(self.type, str, "a string", TYPE, where)
        if self.request_id is not None:
            _require(self.request_id, str, "a string", c.REQUEST_ID, where)
        _require(self.user_id, (int, str), "an integer or a string", c.USER_ID, where)
        if isinstance(self.user_id, int) and not -(2**63) <= self.user_id < 2**63:
            raise DataError(
                f"{where} has {c.USER_ID}={shown(self.user_id)}, which does not fit int64: send it as a string"
            )
        _require(self.ts_ms, int, "an integer of milliseconds", c.TS_MS, where)
        if likely := mistaken_time(self.ts_ms):
            raise DataError(
                f"{where} has {c.TS_MS}={shown(self.ts_ms)}, where milliseconds since 1970 are expected; {likely}"
            )
        if not isinstance(self.body, Mapping):
            raise DataError(
                f"{where} has a body of type {type(self.body).__name__}: a mapping of JSON fields is expected"
            )
        if LOGGED_MS in self.body:
            raise DataError(f"{where} names {LOGGED_MS}, which only the log writes: leave it out")
        if not _NAMED.isdisjoint(self.body):
            raise DataError(
                f"{where} names {', '.join(sorted(_NAMED & self.body.keys()))} in its body: leave it out there"
            )

    @classmethod
    def from_json(cls, document: Any) -> Event:
        """The event of a parsed JSON object; fields that are not named above become its body.

        Raises:
            DataError: no object, missing fields, or what the class refuses.

        >>> document = {"event_id": "e1", "type": "click", "user_id": 7, "ts_ms": 1700000000000, "item_id": 3}
        >>> Event.from_json(document).body
        {'item_id': 3}
        """
        if not isinstance(document, dict):
            raise DataError(f"an event is a JSON object, not {type(document).__name__}")
        if missing := [name for name in _REQUIRED if name not in document]:
            raise DataError(
                f"an event has no {', '.join(missing)}; it has {shown(list(document)) if document else 'no fields'}: "
                f"{', '.join(_REQUIRED)} are required"
            )
        body = {name: value for name, value in document.items() if name not in _NAMED}
        return cls(
            document[EVENT_ID],
            document[TYPE],
            document[c.USER_ID],
            document[c.TS_MS],
            document.get(c.REQUEST_ID),
            body,
        )

    def to_json(self) -> bytes:
        """The event as one JSON object in UTF-8, which is what a log stores; `from_json` reads it back.

        Raises:
            DataError: the body holds what JSON or UTF-8 cannot.
        """
        document = {name: getattr(self, name) for name in _REQUIRED}
        if self.request_id is not None:
            document[c.REQUEST_ID] = self.request_id
        try:
            return orjson.dumps({**document, **self.body})
        except orjson.JSONEncodeError as error:
            raise DataError(f"event {self.event_id!r} cannot be written as JSON: {error}") from None

    @property
    def content(self) -> Content:
        """What the event says. The types of its fields hold for an event that passed `check_event`.

        >>> Event("e1", "click", 7, 1_700_000_000_000, body={"item_id": 3}).content.items
        [3]
        """
        body = self.body
        if (kind := _WITH_ITEMS.get(self.type)) is not None:
            items = body.get(_ITEMS)
            if items is None and c.ITEM_ID in body:
                items = [body[c.ITEM_ID]]
            content: Content = kind(items, *map(body.get, _FIELDS[kind][1:]))
            return content
        if self.type in (USER, ITEM):
            entity_id: Any = self.user_id if self.type == USER else body.get(c.ITEM_ID)
            if body.get(_DELETED) is True:
                return EntityDeleted(self.type, entity_id)
            features, available = body.get(_FEATURES), body.get(c.AVAILABLE)
            return EntityPut(
                self.type,
                entity_id,
                features if isinstance(features, dict) else None,
                available if isinstance(available, bool) else None,
            )
        if self.type == ERASED:
            return Erased(body.get(_WAS))
        return Unusable(**body) if self.type == UNUSABLE else Other()

    @property
    def original_type(self) -> Any:
        """The type of an event; of an erased one, the type that it had before."""
        return self.body.get(_WAS) if self.type == ERASED else self.type


def item_event(
    event_id: str, ts_ms: int, item_id: EntityId, features: Mapping[str, Any] | None, available: bool | None
) -> Event:
    """An item is put: given features replace all that it had; without them, only its availability changes."""
    body: dict[str, Any] = {c.ITEM_ID: item_id, _FEATURES: None if features is None else dict(features)}
    if available is not None:
        body[c.AVAILABLE] = available
    return Event(event_id, ITEM, CATALOGUE, ts_ms, body=body)


def item_deleted(event_id: str, ts_ms: int, item_id: EntityId) -> Event:
    """An item is deleted."""
    return Event(event_id, ITEM, CATALOGUE, ts_ms, body={c.ITEM_ID: item_id, _DELETED: True})


def user_event(event_id: str, ts_ms: int, user_id: EntityId, features: Mapping[str, Any]) -> Event:
    """A user is put: the features replace all that they had."""
    return Event(event_id, USER, user_id, ts_ms, body={_FEATURES: dict(features)})


def user_deleted(event_id: str, ts_ms: int, user_id: EntityId) -> Event:
    """A user is deleted: what the log holds of them before this is to be forgotten."""
    return Event(event_id, USER, user_id, ts_ms, body={_DELETED: True})


def check_event(event: Event, logged_ms: int) -> None:
    """Refuse an event that no reader could use, or that would cost each of them too much.

    `logged_ms` is the log's clock when it stored the event, milliseconds since 1970.

    Raises:
        Refused: a time beyond the clock, an id, text or list that is too large, a number that is not finite, or items
            that are not of the form that the event's type has.

    >>> check_event(Event("e1", "click", 7, 1_893_456_000_000, body={"item_id": 3}), 1_700_000_000_000)
    Traceback (most recent call last):
    twotower.schema.limits.Refused: event 'e1' has ts_ms=1893456000000, 193456000 s ahead of the log's clock ...
    """
    where, body = f"event {shown(event.event_id)}", event.body
    check_text(event.event_id, MAX_ID_BYTES, f"{where}: {EVENT_ID}")
    check_text(event.type, MAX_TYPE_BYTES, f"{where}: {TYPE}")
    check_text(event.request_id or "", MAX_ID_BYTES, f"{where}: {c.REQUEST_ID}")
    check_id(event.user_id, f"{where}: {c.USER_ID}")
    if event.type in (ERASED, UNUSABLE) or event.user_id == NOBODY:
        raise Refused(
            MALFORMED, f"{where}: type {ERASED!r}, type {UNUSABLE!r} and user_id {NOBODY!r} are the log's own"
        )
    check_time(event.ts_ms, logged_ms, where)
    if event.type == ITEM or c.ITEM_ID in body:
        _check_ids([body.get(c.ITEM_ID)], 1, f"{where}: {c.ITEM_ID}")
    said = event.content
    if isinstance(said, LoggedRequest | Click | Impression):
        if body.get(_ITEMS) is not None and c.ITEM_ID in body:
            raise Refused(MALFORMED, f"{where} has both item_id and items: put all items into items")
        _check_ids(said.items, MAX_ITEMS, f"{where}: {_ITEMS}")
    if isinstance(said, LoggedRequest):
        _check_ids(said.history, MAX_HISTORY, f"{where}: {c.HISTORY}")
        _check_outcomes(said.outcomes, len(said.items or ()), where)
    if isinstance(said, Click):
        _check_weight(said.weight, where)
    check_names(body, where)
    check_fields_json(body, where)
    _check_context(body.get(_CONTEXT), where)


def check_time(ts_ms: int, logged_ms: int, where: str) -> None:
    """Refuse (`Refused`) a time that lies ahead of a clock by more than `ALLOWED_SKEW_MS`."""
    if ts_ms > logged_ms + ALLOWED_SKEW_MS:
        raise Refused(
            BEYOND_CLOCK,
            f"{where} has {c.TS_MS}={ts_ms}, {(ts_ms - logged_ms) // 1000} s ahead of the log's clock ({logged_ms}); "
            f"at most {ALLOWED_SKEW_MS // 1000} s are allowed: set the sender's clock",
        )


def _check_ids(values: Any, most: int, where: str) -> None:
    """Refuse a list of ids that is too long, or an id that is no integer of 64 bits and no short string."""
    if values is None:
        return
    if not isinstance(values, list):
        raise Refused(MALFORMED, f"{where} is of type {type(values).__name__}: a list is required")
    if len(values) > most:
        raise Refused(TOO_LARGE, f"{where} has {len(values)} entries, at most {most} are allowed")
    if set(map(type, values)) == {int} and min(values) >= -(2**63) and max(values) < 2**63:
        return  # nearly all lists
    for value in values:
        if type(value) not in (int, str):
            raise Refused(MALFORMED, f"{where} holds {shown(value)}: an id is an integer or a string")
        if value == "":
            raise Refused(MALFORMED, f"{where} holds an empty id: leave it out, or give the item its id")
        check_id(value, where)


def _check_outcomes(outcomes: Any, items: int, where: str) -> None:
    if outcomes is None:
        return
    if not isinstance(outcomes, list) or len(outcomes) != items:
        raise Refused(MALFORMED, f"{where}: outcomes must be a list with one entry for each of the {items} items")
    unknown = [outcome for outcome in outcomes if not isinstance(outcome, str) or outcome not in c.OUTCOMES]
    if unknown:
        raise Refused(MALFORMED, f"{where}: outcome {shown(unknown[0])}: it is one of {', '.join(c.OUTCOMES)}")


def _check_weight(weight: Any, where: str) -> None:
    if weight is not None and not (type(weight) in (int, float) and 0 <= weight <= MAX_WEIGHT):
        raise Refused(
            BAD_NUMBER,
            f"{where}: weight={shown(weight)}: a number from 0 to {MAX_WEIGHT:g} is required; only the ratios of "
            "weights matter, so divide all of them by the same number",
        )


def _check_context(context: Any, where: str) -> None:
    try:
        size = len(orjson.dumps(context))
    except orjson.JSONEncodeError as error:
        raise Refused(MALFORMED, f"{where}: context cannot be written as JSON: {error}") from None
    if size > MAX_CONTEXT_BYTES:
        raise Refused(TOO_LARGE, f"{where}: context takes {size} bytes, at most {MAX_CONTEXT_BYTES} are allowed")


def _require(value: object, kinds: type | tuple[type, ...], expected: str, name: str, where: str) -> None:
    """Refuse a field of another type, or an empty one."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = type(value).__name__
        raise DataError(f"{where} has {name}={shown(value)} of type {kind}: {expected} is expected")
    if value == "":
        raise DataError(f"{where} has an empty {name}")
