"""What `/metrics` shows."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.logs.events import ITEM, USER
from twotower.serve.databases import DatabaseWatch
from twotower.serve.health import Health
from twotower.serve.monitors import monitors
from twotower.serve.snapshots import Snapshots

BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class Metrics:
    """Counters that routes raise, and gauges that are read off when somebody asks."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"twotower_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"twotower_{name}", text, labels, registry=registry)

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.latency = Histogram(
            "twotower_request_seconds", "Time of a request.", ["route"], buckets=BUCKETS_S, registry=registry
        )
        self.events = counter("events", "Events by what became of them.", "result")
        self.passed_over = counter("events_passed_over", "Events of the log that cannot be used, by reason.", "reason")
        self.failed = counter(
            "failed_channels",
            "Channels left out of an answer: error, late (over serve.channel_timeout_ms), busy (with a late call), "
            "unavailable (its vector database).",
            "channel",
            "reason",
        )
        self.unavailable = gauge(
            "channel_unavailable", "1 for a channel whose vector database does not answer.", "channel"
        )
        self.funnel = counter("funnel_items", "Candidates of recommend by the stage that they reached.", "outcome")
        self.unlogged = counter("unlogged_requests", "Pages whose record could not be logged.")
        self.version = gauge("version", "1 for the served version.", "version")
        self.refused = gauge("version_refused", "1 while CURRENT is refused.")
        self.delta_seq = gauge("delta_seq", "The latest delta that is served.")
        self.refused_delta = gauge("delta_refused", "1 while a delta is refused.")
        self.freshness = gauge("freshness_seconds", "Age of the latest event that the served vectors include.")
        self.gated = gauge("deltas_gated", "How many of the latest deltas the gate rejected as a whole.")
        self.held_back = gauge(
            "positives_held_back",
            "Positives of the latest delta that were not trained, by the bound that they exceed.",
            "bound",
        )
        self.failing = gauge("thread_failing", "1 for a background thread that fails or has ended.", "thread")
        self.set_aside = gauge(
            "entities_set_aside", "Users and items in the log that the served version cannot use wholly.", "kind"
        )
        self.recall_next = gauge(
            "recall_next",
            "recall@20 of positives before they are trained on, by hour of their time (UTC), with its positives.",
            "hour",
            "figure",
        )
        self.unknown = gauge(
            "unknown_id_share",
            "Share of the latest delta's positives whose user or item has no embedding of its own.",
            "side",
        )
        self.drift = gauge(
            "popularity_drift",
            "Distance of the latest positives from the version's clicks: 0 = alike, 1 = nothing in common.",
        )

    def page(self, snapshots: Snapshots, health: Health, databases: DatabaseWatch, now_ms: int) -> bytes:
        """All of it as Prometheus reads it."""
        self.refused.set(snapshots.refused is not None)
        self.delta_seq.set(snapshots.version.delta_seq)
        self.refused_delta.set(snapshots.refused_delta is not None)
        self.failing.clear()
        for name in health.problems():
            self.failing.labels(name).set(1)
        self.unavailable.clear()
        for channel in databases.problems:
            self.unavailable.labels(channel).set(1)
        for kind in (USER, ITEM):
            self.set_aside.labels(kind).set(snapshots.set_aside.get(kind, 0))
        self._set_monitors(snapshots, now_ms)
        return generate_latest(self.registry)

    def _set_monitors(self, snapshots: Snapshots, now_ms: int) -> None:
        seen = monitors(snapshots, now_ms)
        self.gated.set(seen.gated)
        for bound, count in seen.held_back.items():
            self.held_back.labels(bound).set(count)
        self.recall_next.clear()
        for hour in seen.recall_next:
            name = datetime.fromtimestamp(hour.ts_ms / 1000, UTC).strftime("%Y-%m-%dT%H")
            self.recall_next.labels(name, "recall").set(hour.recall)
            self.recall_next.labels(name, "positives").set(hour.positives)
        known: Mapping[Gauge, float | None] = {
            self.freshness: seen.freshness_s,
            self.unknown.labels("user"): seen.unknown_user_share,
            self.unknown.labels("item"): seen.unknown_item_share,
            self.drift: seen.popularity_drift,
        }
        for shown, value in known.items():
            if value is not None:
                shown.set(value)

    def switched(self, version_id: str) -> None:
        """Note the version that went live."""
        self.version.clear()
        self.version.labels(version_id).set(1)


class Counted:
    """Counts and times every HTTP request; plain ASGI, because Starlette's own middleware costs as much as a search."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - started)
