"""Users and items that are put or deleted while a system runs: events of the log like others, of types of their own.

They go through the log so that every server, the joiner and the updater see them in one order. What is known of an
entity is what its events say, one after the other: `after`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from twotower.logs.events import ITEM, USER
from twotower.logs.protocol import Event
from twotower.schema import columns as c

TYPES: Final = (USER, ITEM)
"""Types of events that only a server writes."""
CATALOGUE: Final = "@catalogue"
"""Whom events of items belong to, so that they stand in one partition, in one order."""

_FEATURES, _DELETED = "features", "deleted"

EntityId = int | str


@dataclass(frozen=True, slots=True)
class Entity:
    """What events say of a user or an item beyond its row in the tables."""

    features: Mapping[str, Any] | None = None
    """All its raw features by name, in place of those of the tables; None = those of the tables hold."""
    available: bool | None = None
    """Of an item; None = as the tables say."""
    deleted: bool = False
    """It is gone. What is put later under its id is another one: `fresh`."""
    fresh: bool = False
    """It was deleted and put again: what the tables have under its id is not meant."""
    deleted_ms: int | None = None
    """When one of this id was deleted last: what happened before is not of this one; None = it never was, or an older
    release noted it."""
    began: int = 0
    """Place in the log of the event that began this one: the first after there was none. In its order items get their
    rows."""


def item_event(
    event_id: str, ts_ms: int, item_id: EntityId, features: Mapping[str, Any] | None, available: bool | None
) -> Event:
    """An item is put: with features, they replace all that it had; without, only its availability is said."""
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


def is_deletion(event: Event) -> bool:
    """The event deletes a user or an item."""
    return event.type in TYPES and event.body.get(_DELETED) is True


def entity_of(event: Event) -> EntityId | None:
    """The id of the user or item that an event puts or deletes; None for an event of another type.

    >>> entity_of(item_event("e", 1_700_000_000_000, 7, {"colour": "red"}, None))
    7
    """
    if event.type == USER:
        return event.user_id
    item_id = event.body.get(c.ITEM_ID) if event.type == ITEM else None
    if type(item_id) is int:  # a record may be of a server that did not check it
        return item_id if -(2**63) <= item_id < 2**63 else None
    return item_id if type(item_id) is str else None


def after(before: Entity | None, event: Event, place: int = 0) -> Entity:
    """What is known of an entity after one more of its events.

    Args:
        before: what was known; None = nothing.
        event: of that entity.
        place: of the event in its partition of the log.

    >>> put = user_event("a", 1_700_000_000_000, 7, {"age": 3})
    >>> gone = after(after(None, put), user_deleted("b", 1_700_000_000_001, 7))
    >>> gone.deleted, gone.features, after(gone, put).fresh
    (True, None, True)
    """
    if is_deletion(event):
        return Entity(deleted=True, fresh=True, deleted_ms=event.ts_ms)
    features, available = event.body.get(_FEATURES), event.body.get(c.AVAILABLE)
    before = before or Entity()
    if before.deleted or (before.features is None and features is not None):
        before = replace(before, began=place)
    if isinstance(features, dict):
        before = replace(before, features=features)
    elif before.fresh and before.features is None:
        before = replace(before, features={})
    if isinstance(available, bool):
        before = replace(before, available=available)
    return replace(before, deleted=False)
