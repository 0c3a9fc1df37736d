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
    """Join window: how long a click may follow its request, in event time. At its end the items that were not clicked
    leave the joiner."""
    allowed_lateness_s: NotNegative = 30.0
    """Allowed lateness: how long the joiner waits for events that arrive out of order, such as the request of a click
    that came first."""
    remember_s: NotNegative = 3600.0
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

    @property
    def window_ms(self) -> int:
        """The join window in milliseconds."""
        return round(self.window_s * 1000)

    @property
    def allowed_lateness_ms(self) -> int:
        """The allowed lateness in milliseconds."""
        return round(self.allowed_lateness_s * 1000)

    @property
    def remember_ms(self) -> int:
        """`remember_s` in milliseconds."""
        return round(self.remember_s * 1000)

    @property
    def idle_ms(self) -> int:
        """`idle_s` in milliseconds."""
        return round(self.idle_s * 1000)
