"""Events as they happen: the append-only event log, where every later stage reads them again."""

from twotower.logs.local import LocalEventLog
from twotower.logs.partition import partition_of
from twotower.logs.protocol import Ack, Event, EventLog, EventLogError, Record

__all__ = ["Ack", "Event", "EventLog", "EventLogError", "LocalEventLog", "Record", "partition_of"]
