"""Events as they happen: the append-only event log, where every later stage reads them again."""

from twotower.logs.events import Event
from twotower.logs.local import LocalEventLog
from twotower.logs.open import open_log, open_reader
from twotower.logs.partition import partition_of
from twotower.logs.protocol import Ack, EventLog, EventLogError, Record, Sync

__all__ = [
    "Ack",
    "Event",
    "EventLog",
    "EventLogError",
    "LocalEventLog",
    "Record",
    "Sync",
    "open_log",
    "open_reader",
    "partition_of",
]
