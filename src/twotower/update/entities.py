"""What the event log says of users and items that were put or deleted."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from twotower.logs import EventLog, Record
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
        """What `stored` reads from the state of a delta."""
        return {
            "entities": [[*named, asdict(entity)] for named, entity in self.entities.items()],
            "deleted": [[*named, ts_ms] for named, ts_ms in self.deleted_ms.items()],
        }

    @classmethod
    def stored(cls, state: Mapping[str, Any]) -> "LoggedEntities":
        """The users and items of a delta's state."""
        return cls(
            {(kind, entity_id): Entity(**entity) for kind, entity_id, entity in state["entities"]},
            {(kind, entity_id): ts_ms for kind, entity_id, ts_ms in state.get("deleted", [])},
        )


def read_changes(
    event_log: EventLog,
    offsets: Mapping[str, Sequence[int]],
    known: EntityChanges,
    types: Mapping[str, pa.DataType] | None = None,
) -> LoggedEntities:
    """What the log says of users and items between two offsets of each partition.

    Args:
        event_log: what is read.
        offsets: by partition, where to begin and where to end.
        known: what the log said before.
        types: of the version's ids, by the type of the event; None = ids of all types are read.
    """
    entities, deleted_ms, unusable = dict[Named, Entity](), dict[Named, int](), Counter[str]()
    for partition, (begin, end) in offsets.items():
        for record in _records(event_log, int(partition), begin, end):
            event, content = record.event, record.event.content
            if not isinstance(content, EntityPut | EntityDeleted):
                continue
            kind, entity_id = content.kind, content.entity_id
            if types is not None and not is_id(entity_id, types[kind]):
                unusable[kind] += 1
                continue
            before = (known.items if kind == ITEM else known.users).get(entity_id)
            entities[kind, entity_id] = after(
                entities.get((kind, entity_id), before), content, event.ts_ms, record.offset
            )
            if isinstance(content, EntityDeleted):
                deleted_ms[kind, entity_id] = event.ts_ms
    problems = [f"{count} events of an {kind}: their id is none of this version" for kind, count in unusable.items()]
    return LoggedEntities(entities, deleted_ms, problems)


def read_entities(event_log: EventLog) -> EntityChanges:
    """All users and items that were put or deleted, according to the log."""
    whole = {str(partition): (0, end) for partition, end in enumerate(event_log.ends())}
    return split(read_changes(event_log, whole, EntityChanges()).entities)


def split(entities: Mapping[Named, Entity]) -> EntityChanges:
    """Items and users apart."""
    return EntityChanges(
        {entity_id: entity for (kind, entity_id), entity in entities.items() if kind == ITEM},
        {entity_id: entity for (kind, entity_id), entity in entities.items() if kind != ITEM},
    )


def _records(event_log: EventLog, partition: int, begin: int, end: int) -> Iterator[Record]:
    """The records of a partition between two offsets."""
    while begin < end and (records := event_log.read(partition, begin, _EVENTS)):
        yield from (record for record in records if record.offset < end)
        begin = records[-1].next_offset
