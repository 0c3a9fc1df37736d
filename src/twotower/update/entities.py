"""What the event log says of users and items that were put or deleted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from twotower.logs import EventLog
from twotower.logs.entities import TYPES, Entity, EntityId, after, entity_of, is_deletion
from twotower.logs.events import ITEM
from twotower.logs.protocol import Event
from twotower.publish.overlay import Entities
from twotower.schema.tables import is_id

_EVENTS = 10_000
"""Events that are read at once."""

Named = tuple[str, EntityId]
"""The type of an event, `user` or `item`, and an id."""


@dataclass(frozen=True)
class EntityChanges:
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
    def stored(cls, state: Mapping[str, Any]) -> "EntityChanges":
        """Those of a delta."""
        return cls(
            {(kind, one): Entity(**entity) for kind, one, entity in state["entities"]},
            {(kind, one): ts_ms for kind, one, ts_ms in state.get("deleted", [])},
        )


def read_changes(
    event_log: EventLog,
    offsets: Mapping[str, Sequence[int]],
    known: Entities,
    types: Mapping[str, pa.DataType],
) -> EntityChanges:
    """What the log says of users and items between two offsets of each partition.

    Args:
        event_log: what is read.
        offsets: by partition, where to begin and where to end.
        known: what it said before.
        types: of the ids of the version, by the type of the event.
    """
    entities, deleted_ms, unusable = dict[Named, Entity](), dict[Named, int](), dict[str, int]()
    for offset, event in _entity_events(event_log, offsets):
        one = entity_of(event)
        if one is None or not is_id(one, types[event.type]):
            unusable[event.type] = unusable.get(event.type, 0) + 1
            continue
        before = known.items if event.type == ITEM else known.users
        entities[event.type, one] = after(entities.get((event.type, one), before.get(one)), event, offset)
        if is_deletion(event):
            deleted_ms[event.type, one] = event.ts_ms
    problems = [f"{count} events of an {kind}: their id is none of this version" for kind, count in unusable.items()]
    return EntityChanges(entities, deleted_ms, problems)


def read_entities(event_log: EventLog) -> Entities:
    """All users and items that were put or deleted, as the log tells."""
    entities = dict[Named, Entity]()
    whole = {str(partition): (0, end) for partition, end in enumerate(event_log.ends())}
    for offset, event in _entity_events(event_log, whole):
        if (one := entity_of(event)) is not None:
            entities[event.type, one] = after(entities.get((event.type, one)), event, offset)
    return split(entities)


def split(entities: Mapping[Named, Entity]) -> Entities:
    """Items and users apart."""
    return Entities(
        {one: entity for (kind, one), entity in entities.items() if kind == ITEM},
        {one: entity for (kind, one), entity in entities.items() if kind != ITEM},
    )


def _entity_events(event_log: EventLog, offsets: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, Event]]:
    """Offset and event of each event of a user or an item."""
    for partition, (begin, end) in offsets.items():
        offset = begin
        while offset < end and (records := event_log.read(int(partition), offset, _EVENTS)):
            for record in records:
                if record.offset < end and record.event.type in TYPES:
                    yield record.offset, record.event
            offset = records[-1].next_offset
