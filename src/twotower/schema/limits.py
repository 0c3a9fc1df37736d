"""Limits of what enters: one place for the sizes of ids, values and bodies, and the checks that refuse larger ones.

They are far above what real data need, and keep one sender from filling the memory, the log or the store.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

from twotower.schema.errors import DataError, shown

MAX_ID_BYTES: Final = 512
"""Bytes of an id, as UTF-8."""
MAX_TEXT_BYTES: Final = 16 * 2**10
"""Bytes of any other string, such as a value of a feature, as UTF-8."""
MAX_FEATURE_ENTRIES: Final = 4096
"""Entries of a list among the values of a feature, such as a vector."""
MAX_TYPE_BYTES: Final = 64
"""Bytes of an event's type."""
MAX_ITEMS: Final = 10_000
"""Items of one event, as many as a request for candidates may ask for."""
MAX_HISTORY: Final = 1_000
"""Items in the history of a request."""
MAX_CONTEXT_BYTES: Final = 2**10
"""Bytes of a request's context as JSON: each row that a request becomes has it."""
MAX_ENTRIES: Final = 10_000
"""Entries of any other list or object of an event."""
MAX_DEPTH: Final = 4
"""Lists and objects within each other in an event."""
MAX_EVENT_BYTES: Final = 2 * 2**20
"""Bytes of an event as JSON."""
MAX_FILTER_VALUES: Final = 10_000
"""Values of all filters of a request together."""
MAX_BATCH: Final = 1_000
"""Requests for candidates that are sent together."""
MAX_BATCH_CANDIDATES: Final = 100_000
"""Candidates that they may ask for in all."""
MAX_BODY_BYTES: Final = 2**20
"""Bytes of a request's body."""
MAX_EVENTS_BODY_BYTES: Final = 16 * 2**20
"""Bytes of a body with events."""
MAX_BODIES_BYTES: Final = 64 * 2**20
"""Bytes of all bodies that a server holds at one time."""

MALFORMED: Final = "malformed"
TOO_LARGE: Final = "too_large"
BAD_NUMBER: Final = "bad_number"

_LISTS: Final = (list, tuple)
_JSON: Final = {int, float, bool, type(None), str, list, tuple, dict}


class Refused(DataError):
    """A value or an event is refused; `reason` is one of a few words, to be counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_id(value: int | str, where: str) -> None:
    """Refuse an id that is empty, too long, no Unicode text, or beyond int64.

    Raises:
        Refused: with what was seen.
    """
    if value == "":
        raise Refused(MALFORMED, f"{where} is empty")
    if isinstance(value, int):
        _check_integers([value], where)
    else:
        check_text(value, MAX_ID_BYTES, where)


def check_text(text: str, most: int, where: str) -> None:
    """Refuse a string that is no Unicode text, or takes more than `most` bytes as UTF-8.

    Raises:
        Refused: with what was seen.
    """
    size = len(text)
    if size <= most and not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise Refused(
                MALFORMED, f"{where} {shown(text)} holds half a surrogate pair, which is no character"
            ) from None
    if size > most:
        raise Refused(TOO_LARGE, f"{where} {shown(text)} has {size} bytes, at most {most} are allowed")


def check_value(value: Any, where: str) -> None:
    """Refuse a value of a feature that is larger than any real one, or no plain value.

    None, booleans, numbers, strings and lists of these pass; the feature itself checks the type.

    Raises:
        Refused: with what was seen.

    >>> check_value(["rain", None, 3, 0.5], "tags")
    >>> check_value([["rain"]], "tags")
    Traceback (most recent call last):
    twotower.schema.limits.Refused: tags holds ['rain'], where strings, numbers or booleans are allowed
    """
    values = value if isinstance(value, _LISTS) else [value]
    if len(values) > MAX_FEATURE_ENTRIES:
        raise Refused(TOO_LARGE, f"{where}: a list of {len(values)} entries, at most {MAX_FEATURE_ENTRIES} are allowed")
    for entry in values:
        if isinstance(entry, list | tuple | dict):
            raise Refused(MALFORMED, f"{where} holds {shown(entry)}, where strings, numbers or booleans are allowed")
    if integers := [entry for entry in values if type(entry) is int]:
        _check_integers(integers, where)
    if texts := [entry for entry in values if type(entry) is str]:
        _check_texts(texts, where)


def check_fields_json(fields: Mapping[str, Any], where: str) -> None:
    """Refuse a field whose value JSON does not have, or that is too large or too deep for an event.

    Raises:
        Refused: with what was seen.
    """
    try:
        _check_levels(list(fields.values()), where)
    except Refused:
        for name, value in fields.items():
            _check_levels([value], f"{where}: {name}")
        raise


def _check_levels(level: Sequence[Any], where: str) -> None:
    """Check values, then all that they hold, and so on, a level at a time."""
    for depth in range(MAX_DEPTH + 1):
        kinds = set(map(type, level))
        if not kinds <= _JSON:
            strange = next(value for value in level if type(value) not in _JSON)
            raise Refused(MALFORMED, f"{where} holds {shown(strange)}, which JSON does not have")
        if int in kinds:
            _check_integers([value for value in level if type(value) is int], where)
        if float in kinds and not all(map(math.isfinite, [value for value in level if type(value) is float])):
            raise Refused(BAD_NUMBER, f"{where} holds a number that is not finite: leave it out, or send null")
        if str in kinds:
            _check_texts([value for value in level if type(value) is str], where)
        if kinds.isdisjoint((*_LISTS, dict)):
            return
        lists = [value for value in level if type(value) in _LISTS]
        objects = [value for value in level if type(value) is dict] if dict in kinds else []
        if depth == MAX_DEPTH:
            raise Refused(TOO_LARGE, f"{where} has more than {MAX_DEPTH} lists or objects within each other")
        if (most := max(map(len, [*lists, *objects]))) > MAX_ENTRIES:
            raise Refused(TOO_LARGE, f"{where} has {most} entries, at most {MAX_ENTRIES} are allowed")
        check_names(chain.from_iterable(objects), where)
        level = [*chain.from_iterable(lists), *chain.from_iterable(one.values() for one in objects)]


def check_names(names: Iterable[Any], where: str) -> None:
    """Refuse a name of a field that is no string, or longer than an id.

    Raises:
        Refused: with what was seen.
    """
    where = f"{where}: the name of a field"
    for name in names:
        if type(name) is not str:
            raise Refused(MALFORMED, f"{where} is {shown(name)}, where a string is expected")
        check_text(name, MAX_ID_BYTES, where)


def _check_texts(texts: Sequence[str], where: str) -> None:
    if max(map(len, texts)) > MAX_TEXT_BYTES or not all(map(str.isascii, texts)):
        for text in texts:
            check_text(text, MAX_TEXT_BYTES, f"{where}: a string")


def _check_integers(values: Sequence[int], where: str) -> None:
    for value in (min(values), max(values)):
        if not -(2**63) <= value < 2**63:
            raise Refused(BAD_NUMBER, f"{where}: {shown(value)} does not fit int64")
