"""What is known of users and items that are put or deleted while a system runs.

Their events go through the log, so that every server, the joiner and the updater see them in one order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from twotower.logs.events import EntityDeleted, EntityPut


@dataclass(frozen=True, slots=True)
class Entity:
    """What events say of a user or an item beyond its row in the tables."""

    features: Mapping[str, Any] | None = None
    """All its raw features by name, in place of those of the tables; None = those of the tables hold."""
    available: bool | None = None
    """Whether an item may be retrieved; None = as the tables say."""
    deleted: bool = False
    """It is gone. What is put later under its id is another entity: `fresh`."""
    fresh: bool = False
    """It was deleted and put again: what the tables have under its id belongs to an earlier entity."""
    deleted_ms: int | None = None
    """When this id was deleted last: what happened before is not about this entity. None = never, or an older release
    noted it."""
    began: int = 0
    """Place in the log of the first event of this entity. Items get their rows in the order of these places."""


def after(before: Entity | None, said: EntityPut | EntityDeleted, ts_ms: int, place: int = 0) -> Entity:
    """What is known of an entity after one more of its events; `place` is the event's offset in the log.

    >>> put = EntityPut("user", 7, {"age": 3}, None)
    >>> gone = after(after(None, put, 1_700_000_000_000), EntityDeleted("user", 7), 1_700_000_000_001)
    >>> gone.deleted, gone.features, after(gone, put, 1_700_000_000_002).fresh
    (True, None, True)
    """
    if isinstance(said, EntityDeleted):
        return Entity(deleted=True, fresh=True, deleted_ms=ts_ms)
    known = before or Entity()
    began = place if known.deleted or (known.features is None and said.features is not None) else known.began
    features = known.features if said.features is None else said.features
    if features is None and known.fresh:
        features = {}
    available = known.available if said.available is None else said.available
    return replace(known, features=features, available=available, began=began, deleted=False)
