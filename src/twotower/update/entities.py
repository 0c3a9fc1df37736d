"""What the event log says of users and items that were put or deleted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from twotower.logs import EventLog
from twotower.logs.entities import Entity, after
from twotower.logs.events import ITEM, EntityDeleted, EntityId, EntityPut
from twotower.publish.overlay import EntityChanges
from twotower.schema.tables import is_id

_EVENTS = 10_000
"""Events that are read at once."""

Named = tuple[str, EntityId]
"""The type of an event, `user` or `item`, and an id."""


@dataclass(frozen=True)
class LoggedEntities:
    """The users and items that were put or deleted since a delta."""

    entities: Mapping[Named, Entity]
    deleted_ms: Mapping[Named, int]
    """When those that were deleted were, the last time."""
    problems: list[str] = field(default_factory=list)
    """Events that cannot be used, a sentence for each type."""

    def state(self) -> dict[str, Any]:
        """As `stored` reads it from the state of a delta."""
        return {
            "entities": [[*named, asdict(entity)] for named, entity in self.entities.items()],
            "deleted": [[*named, ts_ms] for named, ts_ms in self.deleted_ms.items()],
        }

    @classmethod
    def stored(cls, state: Mapping[str, Any]) -> "LoggedEntities":
        """Those of a delta."""
        return cls(
            {(kind, one): Entity(**entity) for kind, one, entity in state["entities"]},
            {(kind, one): ts_ms for kind, one, ts_ms in state.get("deleted", [])},
        )


def read_changes(
    event_log: EventLog,
    offsets: Mapping[str, Sequence[int]],
    known: EntityChanges,
    types: Mapping[str, pa.DataType],
) -> LoggedEntities:
    """What the log says of users and items between two offsets of each partition.

    Args:
        event_log: what is read.
        offsets: by partition, where to begin and where to end.
        known: what it said before.
        types: of the ids of the version, by the type of the event.
    """
    entities, deleted_ms, unusable = dict[Named, Entity](), dict[Named, int](), dict[str, int]()
    for event in _entity_events(event_log, offsets):
        kind, one = event.named
        if not is_id(one, types[kind]):
            unusable[kind] = unusable.get(kind, 0) + 1
            continue
        before = (known.items if kind == ITEM else known.users).get(one)
        entities[kind, one] = event.added_to(entities.get((kind, one), before))
        if isinstance(event.content, EntityDeleted):
            deleted_ms[kind, one] = event.ts_ms
    problems = [f"{count} events of an {kind}: their id is none of this version" for kind, count in unusable.items()]
    return LoggedEntities(entities, deleted_ms, problems)


def read_entities(event_log: EventLog) -> EntityChanges:
    """All users and items that were put or deleted, as the log tells."""
    entities = dict[Named, Entity]()
    whole = {str(partition): (0, end) for partition, end in enumerate(event_log.ends())}
    for event in _entity_events(event_log, whole):
        entities[event.named] = event.added_to(entities.get(event.named))
    return split(entities)


def split(entities: Mapping[Named, Entity]) -> EntityChanges:
    """Items and users apart."""
    return EntityChanges(
        {one: entity for (kind, one), entity in entities.items() if kind == ITEM},
        {one: entity for (kind, one), entity in entities.items() if kind != ITEM},
    )


@dataclass(frozen=True)
class _EntityEvent:
    content: EntityPut | EntityDeleted
    ts_ms: int
    offset: int

    @property
    def named(self) -> Named:
        return self.content.kind, self.content.entity_id

    def added_to(self, before: Entity | None) -> Entity:
        """What is known of the entity after this event."""
        return after(before, self.content, self.ts_ms, self.offset)


def _entity_events(event_log: EventLog, offsets: Mapping[str, Sequence[int]]) -> Iterator[_EntityEvent]:
    """The events of users and items between two offsets of each partition."""
    for partition, (begin, end) in offsets.items():
        offset = begin
        while offset < end and (records := event_log.read(int(partition), offset, _EVENTS)):
            for record in records:
                content = record.event.content
                if record.offset < end and isinstance(content, EntityPut | EntityDeleted):
                    yield _EntityEvent(content, record.event.ts_ms, record.offset)
            offset = records[-1].next_offset
