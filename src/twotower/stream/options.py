"""Options of the joiner."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from twotower.logs.options import EventLogOptions
from twotower.schema.options import STRICT, NotNegative, Positive, PositiveReal


@dataclass(frozen=True, config=STRICT)
class StreamOptions:
    """Events as they happen."""

    log: EventLogOptions = field(default_factory=EventLogOptions)
    """The append-only log of raw events."""
    window_s: PositiveReal = 600.0
    """How long a click may follow its request: what was not clicked leaves the joiner then. Event time."""
    lateness_s: NotNegative = 30.0
    """How far events may be out of order; a click waits so long for a request that comes after it."""
    late_s: NotNegative = 3600.0
    """How long after its window a request is remembered: a click that comes then still gets what was logged with it."""
    idle_s: NotNegative = 600.0
    """A partition of the log without new events no longer holds back the others once they are this far ahead of it, in
    event time."""
    shard_events: Positive = 10_000
    """Events of the log that one shard is made of at most."""
    merged_mb: Positive = 256
    """Shards of one hour are merged up to this size."""
    follow_s: PositiveReal = 0.25
    """`join --follow`: pause between two looks at the log."""
