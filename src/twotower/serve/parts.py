"""What the routes of a server share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.logs import Ack, Event, EventLog, EventLogError
from twotower.publish.version import Version
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import DataError
from twotower.serve.health import Health
from twotower.serve.metrics import Metrics
from twotower.serve.options import FunnelOptions, ServeOptions
from twotower.serve.request import impressed_window
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import RecentUsers


@dataclass(frozen=True)
class ServerParts:
    """The parts of a running server."""

    snapshots: Snapshots
    event_log: EventLog
    users: RecentUsers
    """Users' clicks and impressions, and users and items that were put, since the version was made."""
    serve: ServeOptions = field(default_factory=ServeOptions)
    funnel: FunnelOptions = field(default_factory=FunnelOptions)
    metrics: Metrics = field(default_factory=Metrics)
    health: Health = field(default_factory=Health)
    clock_ms: ClockMs = now_ms

    @property
    def version(self) -> Version:
        """The served version; a request reads it once."""
        return self.snapshots.version

    def window(self, now_ms: int) -> range:
        """The times of impressions that count for a request at a moment."""
        return impressed_window(now_ms, int(1000 * self.serve.impressed_window_s))

    def append(self, events: Sequence[Event]) -> list[Ack]:
        """Put events into the log and apply them, so that they count from the next request on.

        Raises:
            EventLogError: the log cannot be written; or the events are in it, but it cannot be read.
        """
        acks = self.event_log.append(events)
        try:
            self.users.catch_up(ack.partition for ack in acks)
        except DataError as error:  # the log's damage, not the sender's
            raise EventLogError(f"the events are in the log, but it cannot be read: {error}") from error
        return acks
