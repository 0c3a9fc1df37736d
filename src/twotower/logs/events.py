"""The fields of events, and the one check that every event passes: before a log stores it, and when it is read.

A log stores nothing that `check_event` refuses. What others wrote into it, such as a producer of its own into a Kafka
topic, or an earlier release, passes the same check when it is read (`twotower.logs.payload`). So the size of what one
event can become is bounded for everybody who reads.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import orjson

from twotower.logs.protocol import Event
from twotower.schema import columns as c
from twotower.schema.errors import DataError, shown
from twotower.schema.limits import (
    MAX_CONTEXT_BYTES,
    MAX_DEPTH,
    MAX_ENTRIES,
    MAX_HISTORY,
    MAX_ID_BYTES,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    MAX_TYPE_BYTES,
)
from twotower.schema.tables import MAX_WEIGHT

CLICK: Final = "click"
IMPRESSION: Final = "impression"
REQUEST: Final = "request"
USER: Final = "user"
ITEM: Final = "item"

# Fields of a click, an impression or a request.
ITEMS: Final = "items"
CONTEXT: Final = "context"
FEATURES: Final = "features"
# Fields of a request's record. The first five are packed: one value for each of its items.
OUTCOMES: Final = "outcomes"
POSITIONS: Final = "positions"
SCORES: Final = "scores"
CHANNELS: Final = "channels"
PROBABILITIES: Final = "probabilities"
PROPENSITIES: Final = "propensities"
HISTORY: Final = "history"
COUNTS: Final = "counts"
RETRIEVED: Final = "retrieved"
VERSION: Final = "version"
DELTA_SEQ: Final = "delta_seq"
FAILED: Final = "failed_channels"

# Types and a user that only a log itself gives.
ERASED: Final = "erased"
"""Type of the events that a log gives in the place of those that were erased."""
UNUSABLE: Final = "unusable"
"""Type of the events that a log gives in the place of those that fail the check."""
NOBODY: Final = "@erased"
"""The user of both."""

ALLOWED_SKEW_MS: Final = 300_000
"""How far a time may lie ahead of the log's clock: the clocks of clients and servers differ a little."""

# Why an event cannot be used.
MALFORMED: Final = "malformed"
BEYOND_CLOCK: Final = "beyond_clock"
TOO_LARGE: Final = "too_large"
BAD_NUMBER: Final = "bad_number"

_INT64: Final = range(-(2**63), 2**63)
_NUMBERS: Final = {int, float, bool, type(None)}
_JSON: Final = {*_NUMBERS, str, list, dict}


class UnusableEvent(DataError):
    """An event fails the check; `reason` is one of a few words, to be counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_event(event: Event, logged_ms: int) -> None:
    """Refuse an event that no reader could use, or that would cost each of them too much.

    Args:
        event: its own fields have the right types, as `Event` checks them.
        logged_ms: the log's clock when it stored the event, milliseconds since 1970.

    Raises:
        UnusableEvent: a time beyond the clock, an id, text or list that is too large, a number that is not finite, or
            items that are not of the form that the event's type has.

    >>> check_event(Event("e1", "click", 7, 1_893_456_000_000, body={"item_id": 3}), 1_700_000_000_000)
    Traceback (most recent call last):
    twotower.logs.events.UnusableEvent: event 'e1' has ts_ms=1893456000000, 193456000 s ahead of the log's clock ...
    """
    where = f"event {shown(event.event_id)}"
    _check_text(event.event_id, MAX_ID_BYTES, f"{where}: event_id")
    _check_text(event.type, MAX_TYPE_BYTES, f"{where}: type")
    _check_text(event.request_id, MAX_ID_BYTES, f"{where}: request_id")
    _check_text(event.user_id, MAX_ID_BYTES, f"{where}: user_id")
    if event.type in (ERASED, UNUSABLE) or event.user_id == NOBODY:
        raise UnusableEvent(
            MALFORMED, f"{where}: type {ERASED!r}, type {UNUSABLE!r} and user_id {NOBODY!r} are the log's own"
        )
    check_time(event.ts_ms, logged_ms, where)
    if event.type in (CLICK, IMPRESSION, REQUEST):
        _check_items(event, where)
    if event.type == REQUEST:
        _check_list(event.body.get(HISTORY), MAX_HISTORY, f"{where}: {HISTORY}")
        _check_ids(event.body.get(HISTORY) or [], f"{where}: {HISTORY}")
    if c.ITEM_ID in event.body or event.type == ITEM:
        _check_ids([event.body.get(c.ITEM_ID)], f"{where}: {c.ITEM_ID}")
    if not _is_plain_value(dict(event.body), 0):
        for name, value in event.body.items():
            _check_text(name, MAX_ID_BYTES, f"{where}: the name of a field")
            _check_value(value, f"{where}: {name}", 1)
    size = _bytes_of(event.body.get(CONTEXT), f"{where}: {CONTEXT}")
    if size > MAX_CONTEXT_BYTES:
        raise UnusableEvent(
            TOO_LARGE, f"{where}: {CONTEXT} takes {size} bytes, at most {MAX_CONTEXT_BYTES} are allowed"
        )


def check_time(ts_ms: int, logged_ms: int, where: str) -> None:
    """Refuse a time that lies ahead of a clock by more than `ALLOWED_SKEW_MS`.

    Raises:
        UnusableEvent: it does.
    """
    if ts_ms > logged_ms + ALLOWED_SKEW_MS:
        raise UnusableEvent(
            BEYOND_CLOCK,
            f"{where} has {c.TS_MS}={ts_ms}, {(ts_ms - logged_ms) // 1000} s ahead of the log's clock ({logged_ms}); "
            f"at most {ALLOWED_SKEW_MS // 1000} s are allowed: set the sender's clock",
        )


def _check_items(event: Event, where: str) -> None:
    """The items of a click, an impression or a request, and what a request says of each of them."""
    body = event.body
    items = body.get(ITEMS)
    if items is not None and c.ITEM_ID in body:
        raise UnusableEvent(MALFORMED, f"{where} has both item_id and items: put all items into items")
    _check_list(items, MAX_ITEMS, f"{where}: items")
    _check_ids(items or [], f"{where}: items")
    weight = body.get(c.WEIGHT)
    if event.type == CLICK and weight is not None and not _is_weight(weight):
        raise UnusableEvent(
            BAD_NUMBER,
            f"{where}: weight={shown(weight)}: a number from 0 to {MAX_WEIGHT:g} is required; only the ratios of "
            "weights matter, so divide all of them by the same number",
        )
    outcomes = body.get(OUTCOMES)
    if event.type != REQUEST or outcomes is None:
        return
    if not isinstance(outcomes, list) or len(outcomes) != len(items or []):
        raise UnusableEvent(
            MALFORMED, f"{where}: outcomes must be a list with one entry for each of the {len(items or [])} items"
        )
    unknown = [outcome for outcome in outcomes if not isinstance(outcome, str) or outcome not in c.OUTCOMES]
    if unknown:
        raise UnusableEvent(MALFORMED, f"{where}: outcome {shown(unknown[0])}: it is one of {', '.join(c.OUTCOMES)}")


def _is_weight(weight: object) -> bool:
    return type(weight) in (int, float) and 0 <= weight <= MAX_WEIGHT  # type: ignore[operator]


def _check_list(value: object, most: int, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise UnusableEvent(MALFORMED, f"{where} is of type {type(value).__name__}: a list is required")
    if len(value) > most:
        raise UnusableEvent(TOO_LARGE, f"{where} has {len(value)} entries, at most {most} are allowed")


def _check_ids(values: Sequence[Any], where: str) -> None:
    """Ids are integers of 64 bits or short strings. Nearly all lists are of integers, and checked at once."""
    kinds = set(map(type, values))
    if not kinds <= {int, str}:
        wrong = next(value for value in values if type(value) not in (int, str))
        raise UnusableEvent(MALFORMED, f"{where} holds {shown(wrong)}: an id is an integer or a string")
    if int in kinds:
        _check_integers([value for value in values if type(value) is int], where)
    if str in kinds:
        if "" in values:
            raise UnusableEvent(MALFORMED, f"{where} holds an empty id: leave it out, or give the item its id")
        for value in values:
            _check_text(value, MAX_ID_BYTES, where)


def _is_plain(values: Sequence[Any], depth: int) -> bool:
    """All values are surely within the limits. Nearly every event is: this looks at whole lists at once."""
    kinds = set(map(type, values))
    if kinds <= _NUMBERS:
        return _are_small(values)
    if kinds == {str}:
        return max(map(len, values)) <= MAX_TEXT_BYTES // 4
    if depth > MAX_DEPTH:
        return False
    if kinds == {list}:
        return max(map(len, values)) <= MAX_ENTRIES and _is_plain(list(chain.from_iterable(values)), depth + 1)
    return kinds <= _JSON and all(_is_plain_value(value, depth) for value in values)


def _is_plain_value(value: Any, depth: int) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT_BYTES // 4
    if isinstance(value, list):
        return len(value) <= MAX_ENTRIES and _is_plain(value, depth + 1)
    if isinstance(value, dict):
        named = set(map(type, value)) <= {str} and max(map(len, value), default=0) <= MAX_ID_BYTES // 4
        return named and len(value) <= MAX_ENTRIES and _is_plain(list(value.values()), depth + 1)
    return _are_small([value])


def _are_small(numbers: Sequence[Any]) -> bool:
    """Numbers, booleans and nulls are finite and within int64."""
    try:
        finite = all(map(math.isfinite, filter(None, numbers)))
    except OverflowError:
        return False
    return (
        finite and min(filter(None, numbers), default=0) >= -(2**63) and max(filter(None, numbers), default=0) < 2**63
    )


def _check_value(value: object, where: str, depth: int) -> None:
    """Any other value of JSON."""
    if isinstance(value, str):
        _check_text(value, MAX_TEXT_BYTES, where)
    elif isinstance(value, list | tuple | dict):
        if depth > MAX_DEPTH:
            raise UnusableEvent(TOO_LARGE, f"{where} has more than {MAX_DEPTH} lists or objects within each other")
        if len(value) > MAX_ENTRIES:
            raise UnusableEvent(TOO_LARGE, f"{where} has {len(value)} entries, at most {MAX_ENTRIES} are allowed")
        if isinstance(value, dict):
            for name in value:
                _check_text(name, MAX_ID_BYTES, f"{where}: the name of a field")
        _check_values(value.values() if isinstance(value, dict) else value, where, depth)
    else:
        _check_values([value], where, depth)


def _check_values(values: Iterable[Any], where: str, depth: int) -> None:
    """Several values: numbers at once, others one by one."""
    values = list(values)
    kinds = set(map(type, values))
    if int in kinds:
        _check_integers([value for value in values if type(value) is int], where)
    if float in kinds and not all(math.isfinite(value) for value in values if type(value) is float):
        raise UnusableEvent(BAD_NUMBER, f"{where} holds a number that is not finite: leave it out, or send null")
    if kinds - {int, float, bool, type(None)}:
        for value in values:
            if isinstance(value, str | list | tuple | dict):
                _check_value(value, where, depth + 1)
            elif not isinstance(value, int | float | None):
                raise UnusableEvent(MALFORMED, f"{where} holds {shown(value)}, which JSON does not have")


def _check_integers(values: Sequence[int], where: str) -> None:
    for value in (min(values), max(values)):
        if value not in _INT64:
            raise UnusableEvent(BAD_NUMBER, f"{where} holds {shown(value)}, which does not fit int64")


def _bytes_of(value: object, where: str) -> int:
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:
        raise UnusableEvent(MALFORMED, f"{where} cannot be written as JSON: {error}") from None


def _check_text(value: object, most: int, where: str) -> None:
    if not isinstance(value, str) or (len(value) * 4 <= most and value.isascii()):
        return
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise UnusableEvent(MALFORMED, f"{where} {shown(value)} is no valid text: {error.reason}") from None
    if size > most:
        raise UnusableEvent(TOO_LARGE, f"{where} {shown(value)} has {size} bytes, at most {most} are allowed")
