"""How large what enters may be: one place for all limits on ids, values and bodies.

They are far above what real data need, and keep one sender from filling the memory, the log or the store of all.
"""

from typing import Any, Final

from twotower.schema.errors import DataError, shown

MAX_ID_BYTES: Final = 512
"""Of an id, as UTF-8."""
MAX_TEXT_BYTES: Final = 16 * 2**10
"""Of any other string, such as a value of a feature, as UTF-8."""
MAX_FEATURE_ENTRIES: Final = 4096
"""Of a list among the values of a feature, such as a vector."""
MAX_TYPE_BYTES: Final = 64
"""Of an event's type."""
MAX_ITEMS: Final = 10_000
"""Items of one event, as many as a request for candidates may ask for."""
MAX_HISTORY: Final = 1_000
"""Items in the history of a request."""
MAX_CONTEXT_BYTES: Final = 2**10
"""Of a request's context as JSON: each row that a request becomes has it."""
MAX_ENTRIES: Final = 10_000
"""Of any other list or object of an event."""
MAX_DEPTH: Final = 4
"""Lists and objects within each other in an event."""
MAX_EVENT_BYTES: Final = 2 * 2**20
"""Of an event as JSON."""
MAX_FILTER_VALUES: Final = 10_000
"""Of all filters of a request together."""
MAX_BODY_BYTES: Final = 2**20
"""Of a request's body."""
MAX_EVENTS_BODY_BYTES: Final = 16 * 2**20
"""Of a body with events."""
MAX_BODIES_BYTES: Final = 64 * 2**20
"""Of all bodies that a server holds at one time."""


def check_id(value: int | str, where: str) -> None:
    """Refuse an id that is empty, too long, no Unicode text, or beyond int64.

    Raises:
        DataError: with what was seen.
    """
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise DataError(f"{where} {shown(value)} does not fit int64")
        return
    if not value:
        raise DataError(f"{where} is empty")
    if len(value) > MAX_ID_BYTES or (size := _size(value, where)) > MAX_ID_BYTES:
        size = len(value) if len(value) > MAX_ID_BYTES else size
        raise DataError(f"{where} {shown(value)} has {size} bytes, at most {MAX_ID_BYTES} are allowed")


def check_value(value: Any, where: str) -> None:
    """Refuse a value of a feature that is larger than any real one, or no plain value.

    None, booleans, numbers, strings and lists of these pass; whether the type is that of the feature is for the feature
    to say.

    Raises:
        DataError: with what was seen.

    >>> check_value(["rain", None, 3, 0.5], "tags")
    >>> check_value([["rain"]], "tags")
    Traceback (most recent call last):
    twotower.schema.errors.DataError: tags: a list holds ['rain'], where strings, numbers or booleans are allowed
    """
    if not isinstance(value, list | tuple):
        _check_plain(value, where)
        return
    if len(value) > MAX_FEATURE_ENTRIES:
        raise DataError(f"{where}: a list of {len(value)} entries, at most {MAX_FEATURE_ENTRIES} are allowed")
    for entry in value:
        if isinstance(entry, list | tuple | dict):
            raise DataError(f"{where}: a list holds {shown(entry)}, where strings, numbers or booleans are allowed")
        _check_plain(entry, where)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        raise DataError(
            f"{where}: {shown(value)} is an object, where a string, a number, a boolean or a list is allowed"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise DataError(f"{where}: {shown(value)} does not fit int64")
    if isinstance(value, str) and (size := max(len(value), _size(value, where))) > MAX_TEXT_BYTES:
        raise DataError(f"{where}: a string of {size} bytes, at most {MAX_TEXT_BYTES} are allowed")


def _size(text: str, where: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise DataError(f"{where}: {shown(text)} holds half a surrogate pair, which is no character") from None
