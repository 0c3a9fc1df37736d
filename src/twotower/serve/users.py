"""What a server has learned since the version: users' latest clicks and impressions, users and items put or deleted.

It is a function of the event log alone: events are applied in the order of the log, in one change of the store together
with the offset up to which the log was read. A killed server continues from there. A store that is lost, or belongs to
another log or other settings, is built again. A store in another process can be lost while the server runs: how far the
log was read is therefore looked up in the store before every change.
"""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

import orjson
import pyarrow as pa

from twotower.features.bloom import FilterShape, Seen, hash_ids
from twotower.features.store import FeatureStore
from twotower.logs import Event, EventLog, Record
from twotower.logs.entities import Entity, after
from twotower.logs.events import (
    ITEM,
    USER,
    Click,
    Content,
    EntityDeleted,
    EntityId,
    EntityPut,
    Impression,
    LoggedRequest,
    Unusable,
)
from twotower.logs.payload import mark_of
from twotower.publish.overlay import EntityChanges
from twotower.schema import columns as c
from twotower.schema.errors import DataError

_LOGGER = logging.getLogger(__name__)

MAX_CLICKS = 500
MAX_SHOWN = 2000
"""Latest clicks and impressions kept of a user; earlier impressions are in filters."""

_BATCH = 1000
_MAX_KEY_BYTES = 256
_PLACES = b"places"
"""Key of how far the log was read."""
_ENTITY = b"entity/"
"""Prefix of the keys of users and items that were put or deleted."""
_ERASE = b"erase/"
"""Prefix of the keys of deleted users whose events are not yet erased from the log."""
_SHAPE = b"shape"
"""Key of the shape of the filters."""

UserId = EntityId
ItemId = EntityId


@dataclass(frozen=True)
class Recent:
    """One user's latest events, in the order of the log."""

    clicks: tuple[tuple[int, ItemId], ...] = ()
    """(time in milliseconds, item) of each click."""
    shown: tuple[tuple[int, ItemId], ...] = ()
    """The same of each impression."""
    seen: Seen | None = None
    """Filters of the earlier impressions; None where there are none."""


@dataclass(frozen=True)
class _Applied:
    """How far a partition was read: the last event that was applied, and the next offset."""

    offset: int
    next_offset: int
    mark: str


class RecentUsers:
    """Recent events by user, kept up to date with the log.

    Args:
        log: the event log.
        store: where they are kept; emptied if its content comes from another log, or has another shape.
        shape: of the filters of earlier impressions; None = these are forgotten.
        passed_over: called with the reason of each event that cannot be used.
    """

    def __init__(
        self,
        log: EventLog,
        store: FeatureStore,
        shape: FilterShape | None = None,
        passed_over: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._log = log
        self._store = store
        self._shape = shape
        self._passed_over = passed_over
        self._applying = threading.Lock()
        self._behind = False
        self._stored = store.get(_PLACES)
        """The places as the store had them last."""
        self._places = _decode_places(self._stored)
        if not self.is_of_this_log() or (store.get(_SHAPE) or b"null") != orjson.dumps(shape):
            if self._stored:
                _LOGGER.warning("what was learned of users is not of this log and settings: reading the log again")
            self._begin_again()
        self._entities = _read_entities(store)

    @property
    def entities(self) -> EntityChanges:
        """The users and items that were put or deleted; the same object until one changes."""
        return self._entities

    @property
    def behind(self) -> bool:
        """The store was lost, and what it held is not yet read from the log again."""
        return self._behind

    def get(self, user_id: UserId) -> Recent:
        """A user's recent events; empty for an unknown user."""
        user_key = _user_key(user_id)
        value = self._store.get(user_key)
        if value is None:
            return Recent()
        clicks, shown = orjson.loads(value)
        seen = self._store.get(_seen_key(user_key)) if self._shape and len(shown) == MAX_SHOWN else None
        filters = None if seen is None or self._shape is None else Seen.decode(self._shape, seen)
        return Recent(tuple(map(tuple, clicks)), tuple(map(tuple, shown)), filters)

    def catch_up(self, partitions: Iterable[int] | None = None) -> int:
        """Apply what is new in some partitions of the log, or in all; gives the number of events.

        If the store lost what was applied, that is read from the log again: only by a call for all partitions, so that
        nobody who writes an event waits for it.

        Raises:
            DataError: the log is damaged; or the store and the log lost what was read before.
            EventLogError: the log cannot be read.
            FeatureStoreError: the store cannot be read or written.
        """
        applied = 0
        if self._behind and partitions is not None:
            return 0
        with self._applying:
            self._look_at_store()
            if self._behind and partitions is not None:
                return 0
            for partition in range(self._log.partitions) if partitions is None else sorted(set(partitions)):
                place = self._places[partition]
                offset = 0 if place is None else place.next_offset
                while records := self._log.read(partition, offset, _BATCH):
                    self._apply(partition, records)
                    offset = records[-1].next_offset
                    applied += len(records)
            if self._behind:
                self._behind = False
                _LOGGER.warning("the feature store is complete again: %d events applied", applied)
        return applied

    def _look_at_store(self) -> None:
        """Continue from the place that the store has, where it was emptied or restored since the last look."""
        stored = self._store.get(_PLACES)
        if stored == self._stored:
            return
        self.check_log()  # with both lost, users and items that were put would be forgotten
        if stored is None:
            self._behind = True
            _LOGGER.warning("the feature store is empty: reading the log again")
            self._begin_again()
            return
        places = _decode_places(stored)
        if all(_end(new) >= _end(old) for new, old in zip(places, self._places, strict=True)):
            self._entities = _read_entities(self._store)  # the latest change was made, although it gave an error
        else:
            self._behind = True
            _LOGGER.warning("the feature store was restored to an earlier state: reading the log from there")
        self._stored, self._places = stored, places

    def _begin_again(self) -> None:
        self._store.clear()
        self._store.write({_SHAPE: orjson.dumps(self._shape)})
        self._stored, self._places = None, [None] * self._log.partitions

    def _apply(self, partition: int, records: Sequence[Record]) -> None:
        """Apply the next records of a partition, in one change of the store."""
        changed: dict[bytes, Recent] = {}
        put: dict[tuple[str, EntityId], Entity] = {}
        values: dict[bytes, bytes | None] = {}
        unusable: dict[str, tuple[int, str]] = {}
        for record in records:
            event, content = record.event, record.event.content
            if isinstance(content, Unusable):
                unusable.setdefault(content.reason, (record.offset, content.message))
                self._passed_over(content.reason)
            elif isinstance(content, EntityPut | EntityDeleted):
                entity_key = (content.kind, content.entity_id)
                known = self._entities.items if content.kind == ITEM else self._entities.users
                before = put.get(entity_key, known.get(content.entity_id))
                put[entity_key] = after(before, content, event.ts_ms, record.offset)
                if isinstance(content, EntityDeleted) and content.kind == USER:  # all earlier events are forgotten
                    changed[_user_key(content.entity_id)] = Recent()
                    values[_erase_key(event.user_id)] = orjson.dumps([partition, event.user_id, record.offset])
            else:
                user_key = _user_key(event.user_id)
                changed[user_key] = self._after(changed.get(user_key) or self.get(event.user_id), event)
        for offset, why in unusable.values():  # one line for each reason
            _LOGGER.warning("partition %d, offset %d: an event is skipped: %s", partition, offset, why)
        last = records[-1]
        places = list(self._places)
        places[partition] = _Applied(last.offset, last.next_offset, mark_of(last.event))
        for user_key, recent in changed.items():
            values[user_key] = orjson.dumps([recent.clicks, recent.shown])
            if recent.seen is not None:
                values[_seen_key(user_key)] = recent.seen.encode()
            if recent == Recent():
                values[user_key] = values[_seen_key(user_key)] = None
        for (kind, entity_id), entity in put.items():
            values[_ENTITY + kind.encode() + b"/" + _user_key(entity_id)] = orjson.dumps([kind, entity_id, entity])
        stored = orjson.dumps([place and astuple(place) for place in places])
        self._store.write({**values, _PLACES: stored})
        self._stored, self._places = stored, places
        if put:
            self._entities = _with_entities(self._entities, put)

    def erase_deleted(self) -> int:
        """Erase deleted users' earlier events from the log; gives the number of events.

        After an error or a kill, the next call continues with the remaining users.

        Raises:
            DataError: the log is damaged; the events in other partitions are erased.
            EventLogError: the log cannot be written.
        """
        stored = self._store.scan(_ERASE)
        deleted: dict[int, dict[UserId, int]] = {}
        for partition, user_id, offset in map(orjson.loads, stored.values()):
            deleted.setdefault(partition, {})[user_id] = offset
        number, damaged = 0, list[str]()
        for partition, users in sorted(deleted.items()):
            try:
                number += self._log.erase(partition, users) or 0
            except DataError as error:
                damaged.append(str(error))
                continue
            with self._applying:  # a user who was deleted again meanwhile stays
                done = {_erase_key(user_id) for user_id in users}
                self._store.write({key: None for key in done if self._store.get(key) == stored[key]})
        if damaged:
            raise DataError("; ".join(damaged))
        return number

    def _after(self, recent: Recent, event: Event) -> Recent:
        """A user's recent events with one more; impressions beyond the latest go into filters."""
        clicked, shown = items_of(event.content)
        if not clicked and not shown:
            return recent
        clicks = (*recent.clicks, *((event.ts_ms, item) for item in clicked))
        impressions = (*recent.shown, *((event.ts_ms, item) for item in shown))
        earlier, seen = impressions[:-MAX_SHOWN], recent.seen
        if earlier and self._shape is not None:
            seen = seen or Seen(self._shape)
            for kind, type_ in ((int, pa.int64()), (str, pa.string())):
                some = [(ts_ms, item) for ts_ms, item in earlier if type(item) is kind]
                if some:
                    ids = pa.array([item for _, item in some], type_)
                    seen = seen.add([ts_ms for ts_ms, _ in some], hash_ids(ids))
        return Recent(clicks[-MAX_CLICKS:], impressions[-MAX_SHOWN:], seen)

    def check_log(self) -> None:
        """See that the log holds what was read of it before.

        Raises:
            DataError: it does not: it is another one, emptied, or damaged.
        """
        if not self.is_of_this_log():
            raise DataError(
                "the log does not hold what was read of it before: it was emptied, replaced or damaged. Restore it, or "
                "restart the server: it then reads the log from its beginning, and forgets what only the lost log said"
            )

    def is_of_this_log(self) -> bool:
        """Whether the log still holds the last applied event of each partition at its offset."""
        if len(self._places) != self._log.partitions:
            return False
        for partition, place in enumerate(self._places):
            if place is None:
                continue
            try:
                stored = [(r.next_offset, mark_of(r.event)) for r in self._log.read(partition, place.offset, 1)]
            except DataError:
                return False
            if stored != [(place.next_offset, place.mark)]:
                return False
        return True


def items_of(content: Content) -> tuple[Sequence[ItemId], Sequence[ItemId]]:
    """The items that an event says were clicked, and those that were shown.

    >>> items_of(LoggedRequest(items=[4, 5], outcomes=["clicked", "rank_rejected"]))
    ([4], [4])
    """
    match content:
        case Click():
            return content.items or [], []
        case Impression():
            return [], content.items or []
        case LoggedRequest():
            return content.ended(c.CLICKED), content.ended(c.CLICKED, c.IMPRESSED)
    return [], []


def _end(place: _Applied | None) -> int:
    return -1 if place is None else place.next_offset


def _decode_places(stored: bytes | None) -> list[_Applied | None]:
    return [None if place is None else _Applied(*place) for place in orjson.loads(stored or b"[]")]


def _read_entities(store: FeatureStore) -> EntityChanges:
    entities: dict[tuple[str, EntityId], Entity] = {}
    for value in store.scan(_ENTITY).values():
        kind, entity_id, entity = orjson.loads(value)
        entities[kind, entity_id] = Entity(**entity)
    return _with_entities(EntityChanges(), entities)


def _with_entities(entities: EntityChanges, put: dict[tuple[str, EntityId], Entity]) -> EntityChanges:
    parts: dict[str, dict[EntityId, Entity]] = {ITEM: {}, USER: {}}
    for (kind, entity_id), entity in put.items():
        parts[kind][entity_id] = entity
    return entities.with_newer(parts[ITEM], parts[USER])


def _user_key(user_id: UserId) -> bytes:
    """The user's key; 1 and "1" are different users, and the digest replaces an id too long for a key."""
    if isinstance(user_id, int):
        return b"user/i/%d" % user_id
    name = user_id.encode()
    return b"user/s/" + name if len(name) <= _MAX_KEY_BYTES else b"user/d/" + hashlib.blake2b(name).digest()


def _erase_key(user_id: UserId) -> bytes:
    return _ERASE + _user_key(user_id)


def _seen_key(user_key: bytes) -> bytes:
    return b"seen/" + user_key
