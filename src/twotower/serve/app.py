"""HTTP: the public API under `/v1`, health and metrics."""

import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated, Any

import orjson
import pyarrow as pa
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    field_validator,
)
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.features.store import FeatureStoreError
from twotower.logs import Event, EventLog, EventLogError
from twotower.logs.events import (
    CATALOGUE,
    ITEM,
    NOBODY,
    USER,
    Click,
    EntityDeleted,
    EntityPut,
    Impression,
    check_event,
    check_time,
)
from twotower.logs.events import Request as LoggedRequest
from twotower.publish.version import Version
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import DataError, cut, shown
from twotower.schema.limits import (
    MAX_BODIES_BYTES,
    MAX_BODY_BYTES,
    MAX_EVENTS_BODY_BYTES,
    MAX_FILTER_VALUES,
    MAX_ID_BYTES,
    check_id,
)
from twotower.schema.tables import EARLIEST_MS, LATEST_MS, is_id
from twotower.serve.bodies import Bounded, StrictRoute
from twotower.serve.channels import Ask, SideBySide
from twotower.serve.filters import Filter
from twotower.serve.funnel import Sizes, explain, page_of, recommend
from twotower.serve.health import Health
from twotower.serve.monitors import monitors
from twotower.serve.request import Asked, Unanswerable, retrieve, similar
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import Recent, RecentUsers

log = logging.getLogger(__name__)

EVENTS_PATH = "/v1/events"
MOST_K = 10_000
MOST_PAGE = 200
MOST_EVENTS = 10_000
MOST_CHANNELS = 100
MOST_MESSAGE = 1000
"""Characters of an error's sentence; what is longer loses its middle."""
MOST_SENTENCES = 5
"""Mistakes that the answer to one request names."""
AT_ONCE = max(1, min(2, (os.cpu_count() or 1) // 2))
"""Searches that run at the same time; more fight for the interpreter's lock and all take longer."""


def _writable(text: str) -> str:
    if len(text.encode()) > MAX_ID_BYTES:  # half a surrogate pair raises a ValueError
        raise ValueError(f"at most {MAX_ID_BYTES} bytes are allowed")
    return text


Id = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Annotated[StrictStr, AfterValidator(_writable)]


class FilterBody(BaseModel):
    """What an attribute of an item may be: a list of the values that it may have is short for `allow`."""

    model_config = ConfigDict(extra="forbid")

    allow: list[Any] | None = Field(None, description="The item has one of these; absent = anything.")
    deny: list[Any] = Field(default_factory=list, description="The item has none of these.")


def _allowed(value: Any) -> Any:
    return {"allow": value} if isinstance(value, list) else value


Filtered = Annotated[FilterBody, BeforeValidator(_allowed, json_schema_input_type=list[Any] | FilterBody)]


class AskedBody(BaseModel):
    """Who asks, and what may be answered."""

    model_config = ConfigDict(extra="forbid")

    user_id: Id | None = Field(
        None, description="Absent for someone of whom nothing is known; a page is not logged then."
    )
    features: dict[str, Any] = Field(
        default_factory=dict, description="Replace the stored features, by name; null is a missing value."
    )
    context: dict[str, Any] = Field(default_factory=dict, description="Context features, by name.")
    exclude: str | None = Field(None, description="clicked, impressed or none; absent = as configured.")
    filters: dict[str, Filtered] = Field(
        default_factory=dict, description="By attribute: values that it may have, or `allow` and `deny`."
    )
    channels: Annotated[list[str], Field(max_length=MOST_CHANNELS)] = Field(
        default_factory=list, description="Channels to ask; empty = all."
    )

    @field_validator("filters")
    @classmethod
    def _bounded(cls, filters: dict[str, FilterBody]) -> dict[str, FilterBody]:
        values = sum(len(one.allow or ()) + len(one.deny) for one in filters.values())
        if values > MAX_FILTER_VALUES or len(filters) > MAX_FILTER_VALUES:
            raise ValueError(f"{values} values in all, at most {MAX_FILTER_VALUES} are allowed")
        return filters


class RetrieveBody(AskedBody):
    """A request for candidates."""

    k: Annotated[int, Field(ge=1, le=MOST_K, description="Number of candidates.")] = 100


class RecommendBody(AskedBody):
    """A request for a page."""

    k: Annotated[int, Field(ge=1, le=MOST_PAGE)] | None = Field(None, description="Items; absent = as configured.")
    request_id: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_writable)] | None = Field(
        None, description="Names the request in the log; absent = made by the server."
    )
    ts_ms: Annotated[StrictInt, Field(ge=EARLIEST_MS, le=LATEST_MS)] | None = Field(
        None, description="When it happened, milliseconds since 1970; absent = now."
    )


class ExplainBody(RecommendBody):
    """A question why an item is, or is not, on a user's page."""

    item_id: Id


class EventsBody(BaseModel):
    """Raw events for the log."""

    model_config = ConfigDict(extra="forbid")

    events: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MOST_EVENTS)]


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "twotower_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "twotower_request_seconds",
            "Time of a request.",
            ["route"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.events = Counter("twotower_events", "Events by what became of them.", ["result"], registry=self.registry)
        self.passed_over = Counter(
            "twotower_events_passed_over",
            "Events of the log that cannot be used, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.failed = Counter(
            "twotower_failed_channels",
            "Channels left out of an answer: error, late (over serve.channel_timeout_ms), busy (with a late call).",
            ["channel", "reason"],
            registry=self.registry,
        )
        self.funnel = Counter(
            "twotower_funnel_items",
            "Candidates of recommend by how far they came.",
            ["outcome"],
            registry=self.registry,
        )
        self.unlogged = Counter(
            "twotower_unlogged_requests", "Pages whose record could not be logged.", registry=self.registry
        )
        self.version = Gauge("twotower_version", "1 for the served version.", ["version"], registry=self.registry)
        self.refused = Gauge("twotower_version_refused", "1 while CURRENT is refused.", registry=self.registry)
        self.delta_seq = Gauge("twotower_delta_seq", "The latest delta that is served.", registry=self.registry)
        self.refused_delta = Gauge("twotower_delta_refused", "1 while a delta is refused.", registry=self.registry)
        self.freshness = Gauge(
            "twotower_freshness_seconds", "Age of the latest event that what is served has learned of.",
            registry=self.registry,
        )  # fmt: skip

        self.gated = Gauge(
            "twotower_deltas_gated", "Of the latest deltas, those that the gate let nothing of through.",
            registry=self.registry,
        )  # fmt: skip
        self.held_back = Gauge(
            "twotower_positives_held_back",
            "Of the latest delta, positives that were not trained, by the bound that they are beyond.",
            ["bound"],
            registry=self.registry,
        )
        self.failing = Gauge(
            "twotower_thread_failing", "1 for a background thread that fails or has ended.", ["thread"],
            registry=self.registry,
        )  # fmt: skip
        self.set_aside = Gauge(
            "twotower_entities_set_aside", "Users and items in the log of which the served version can use nothing, or "
            "not all.", ["kind"], registry=self.registry,
        )  # fmt: skip
        self.found = Gauge(
            "twotower_recall_next",
            "recall@20 of positives before they are trained on, by hour of their time (UTC), with its positives.",
            ["hour", "figure"],
            registry=self.registry,
        )
        self.unknown = Gauge(
            "twotower_unknown_id_share",
            "Of the latest delta's positives, those whose user or item has no embedding of its own.",
            ["side"],
            registry=self.registry,
        )
        self.drift = Gauge(
            "twotower_popularity_drift",
            "How far the latest positives are from the version's clicks: 0 = alike, 1 = nothing in common.",
            registry=self.registry,
        )

    def learned(self, snapshots: Snapshots, now_ms: int) -> None:
        """Note how far what is served has learned."""
        self.delta_seq.set(snapshots.version.delta_seq)
        self.refused_delta.set(snapshots.refused_delta is not None)
        seen = monitors(snapshots, now_ms)
        self.gated.set(seen.gated)
        for bound, count in seen.held_back.items():
            self.held_back.labels(bound).set(count)
        self.found.clear()
        for hour in seen.recall_next:
            name = datetime.fromtimestamp(hour.ts_ms / 1000, UTC).strftime("%Y-%m-%dT%H")
            self.found.labels(name, "recall").set(hour.recall)
            self.found.labels(name, "positives").set(hour.positives)
        for gauge, value in (
            (self.freshness, seen.freshness_s),
            (self.unknown.labels("user"), seen.unknown_user_share),
            (self.unknown.labels("item"), seen.unknown_item_share),
            (self.drift, seen.popularity_drift),
        ):
            if value is not None:
                gauge.set(value)

    def noted(self, health: Health, set_aside: Mapping[str, int]) -> None:
        """Note what fails, and what cannot be used."""
        self.failing.clear()
        for name in health.problems():
            self.failing.labels(name).set(1)
        for kind in (USER, ITEM):
            self.set_aside.labels(kind).set(set_aside.get(kind, 0))

    def switched(self, version_id: str) -> None:
        """Note the version that went live."""
        self.version.clear()
        self.version.labels(version_id).set(1)


def json_response(content: Any, status: int = 200) -> Response:
    """An answer written by orjson, which takes a fraction of the time of the default on long lists."""
    return Response(orjson.dumps(content), status, media_type="application/json")


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as every route gives it."""
    if len(message) > MOST_MESSAGE:
        message = f"{message[: MOST_MESSAGE // 2]} ... {message[-MOST_MESSAGE // 2 :]}"
    response = json_response({"error": message.encode(errors="backslashreplace").decode()}, status)
    response.headers.update(headers or {})
    return response


class Counted:
    """Counts and times every HTTP request; plain ASGI, because Starlette's own middleware costs as much as a search.

    Args:
        app: what answers.
        metrics: counted into.
    """

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


def answer_errors(app: FastAPI) -> None:
    """Read bodies strictly, and give every error as `{"error": sentence}`."""
    app.router.route_class = StrictRoute

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        told = list(islice(error.errors(), MOST_SENTENCES))
        sentences = [f"{cut('.'.join(str(part) for part in e['loc']))}: {cut(e['msg'])}" for e in told]
        left = len(error.errors()) - len(told)
        return problem(422, "; ".join(sentences) + (f"; and {left} more" if left else ""))

    @app.exception_handler(HTTPException)
    async def no_such(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return problem(500, f"a defect of the server, see its log: {type(error).__name__}")


def make_app(
    snapshots: Snapshots,
    event_log: EventLog,
    users: RecentUsers,
    metrics: Metrics,
    *,
    exclude: str,
    impressed_window_ms: int,
    channel_timeout_ms: float,
    sizes: Sizes,
    page: int,
    health: Health | None = None,
    clock_ms: ClockMs = now_ms,
) -> FastAPI:
    """The public application.

    Args:
        snapshots: the served version.
        event_log: where posted events go.
        users: what they did since the version.
        metrics: counted into.
        exclude: what is left out unless a request says otherwise.
        impressed_window_ms: how long an impression is left out.
        channel_timeout_ms: how long a request waits for its channels, where it has several.
        sizes: of the stages of a request for a page.
        page: items of a page, unless a request says otherwise.
        health: of the background threads; None = there are none.
        clock_ms: milliseconds since 1970.
    """
    health = health or Health()
    app = FastAPI(
        title="twotower",
        version="1",
        description="Candidates for a recommender, and events back into it.",
        docs_url=None,  # these pages load their scripts from elsewhere; /openapi.json has all that they show
        redoc_url=None,
    )

    channels = SideBySide(channel_timeout_ms / 1000, lambda channel, why: metrics.failed.labels(channel, why).inc())
    searching = threading.BoundedSemaphore(AT_ONCE)
    app.add_middleware(
        Bounded,
        refuse=problem,
        most_bytes=MAX_BODY_BYTES,
        most_of={EVENTS_PATH: MAX_EVENTS_BODY_BYTES},
        most_together=MAX_BODIES_BYTES,
    )
    app.add_middleware(Counted, metrics=metrics)
    answer_errors(app)

    @app.exception_handler(DataError)
    async def refused(_: Request, error: DataError) -> Response:
        return problem(422, str(error))

    @app.exception_handler(EventLogError)
    @app.exception_handler(FeatureStoreError)
    @app.exception_handler(Unanswerable)
    async def unable(_: Request, error: EventLogError | FeatureStoreError | Unanswerable) -> Response:
        log.error("a request failed: %s", error)
        return problem(503, str(error))

    @app.post("/v1/retrieve")
    def post_retrieve(body: RetrieveBody) -> Response:
        """Candidates for a user, best first."""
        asked, recent = _asked(body, body.k, exclude), _recent(body, users)
        with searching:
            answer = retrieve(snapshots.version, asked, recent, clock_ms(), impressed_window_ms, channels.ask)
        return json_response(answer)

    @app.post(EVENTS_PATH, status_code=202)
    def post_events(body: EventsBody) -> Response:
        """Put events into the log; they count from the user's next request on."""
        version = snapshots.version
        events = [_checked(document, place, version, clock_ms()) for place, document in enumerate(body.events)]
        acks = event_log.append(events)
        try:
            users.catch_up(ack.partition for ack in acks)
        except DataError as error:  # the log's damage, not the sender's
            raise EventLogError(f"the events are in the log, but it cannot be read: {error}") from error
        duplicates = sum(ack.duplicate for ack in acks)
        metrics.events.labels("accepted").inc(len(acks) - duplicates)
        metrics.events.labels("duplicate").inc(duplicates)
        return json_response({"accepted": len(acks), "duplicates": duplicates}, 202)

    _add_funnel(
        app, snapshots, event_log, users, metrics, exclude, impressed_window_ms, channels.ask, searching, sizes, page,
        clock_ms,
    )  # fmt: skip

    @app.get("/v1/items/{item_id:path}/similar")
    def get_similar(item_id: str, k: Annotated[int, Query(ge=1, le=MOST_K)] = 20) -> Response:
        """The items most like an item, by every channel that can say."""
        version = snapshots.version
        try:
            return json_response(similar(version, parse_id(item_id, version.items.kind), k))
        except KeyError:
            return problem(404, f"version {version.id} has no item {cut(item_id)}")

    @app.get("/v1/version")
    def get_version() -> Response:
        """The served version, and one that was refused, if any."""
        version = snapshots.version
        return json_response(
            {
                "version": version.id,
                "delta_seq": version.delta_seq,
                "created_ms": version.manifest["created_ms"],
                "watermark_ms": snapshots.watermark_ms,
                "channels": list(version.channels),
                "refused": asdict(snapshots.refused) if snapshots.refused else None,
                "gated": [asdict(one) for one in snapshots.gated],
                "monitors": asdict(monitors(snapshots, clock_ms())),
                "refused_delta": asdict(snapshots.refused_delta) if snapshots.refused_delta else None,
            }
        )

    # Probes run on the event loop itself, and wait for nothing: threads may all be busy with searches.
    @app.get("/healthz")
    async def healthz() -> Response:
        """The process answers."""
        return json_response({"ok": True})

    @app.get("/readyz")
    async def readyz() -> Response:
        """A version is served, and every background thread does its work."""
        if problems := health.problems():
            return problem(503, ". ".join(problems.values()))
        return json_response({"ok": True, "version": snapshots.version.id})

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Counters and gauges for Prometheus."""
        metrics.refused.set(snapshots.refused is not None)
        metrics.noted(health, snapshots.set_aside)
        metrics.learned(snapshots, clock_ms())
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_funnel(
    app: FastAPI,
    snapshots: Snapshots,
    event_log: EventLog,
    users: RecentUsers,
    metrics: Metrics,
    exclude: str,
    impressed_window_ms: int,
    ask: Ask,
    searching: threading.BoundedSemaphore,
    sizes: Sizes,
    page: int,
    clock_ms: Callable[[], int],
) -> None:
    """The routes of pages: recommend and explain."""

    @app.post("/v1/recommend")
    def post_recommend(body: RecommendBody) -> Response:
        """A page for a user, through the whole funnel; what became of every candidate goes into the log."""
        asked, recent = _asked(body, body.k or page, exclude), _recent(body, users)
        now_ms = _time_of(body.ts_ms, clock_ms())
        request_id = body.request_id or uuid.uuid4().hex
        with searching:
            served = recommend(snapshots.version, asked, recent, now_ms, impressed_window_ms, sizes, request_id, ask)
        page_given, logged = served.page, False
        if served.record is not None:
            try:
                ack = event_log.append([served.record])[0]
                users.catch_up([ack.partition])
                if ack.duplicate:
                    page_given = page_of(event_log.read(ack.partition, ack.offset, 1)[0].event)
                metrics.events.labels("duplicate" if ack.duplicate else "accepted").inc()
                logged = True
            except (EventLogError, FeatureStoreError, DataError):
                # a page is worth more than its record
                log.exception("the record of request %s is not logged", request_id)
                metrics.unlogged.inc()
        for outcome, count in page_given.counts.items():
            metrics.funnel.labels(outcome).inc(count)
        return json_response({**asdict(page_given), "logged": logged})

    @app.post("/v1/explain")
    def post_explain(body: ExplainBody) -> Response:
        """Why, or why not, an item for a user: its place in each channel and stage, and what leaves it out."""
        asked, recent = _asked(body, body.k or page, exclude), _recent(body, users)
        now_ms = _time_of(body.ts_ms, clock_ms())
        with searching:
            told = explain(snapshots.version, asked, body.item_id, recent, now_ms, impressed_window_ms, sizes)
        return json_response(told)


def _asked(body: AskedBody, k: int, exclude: str) -> Asked:
    if body.user_id in (NOBODY, CATALOGUE):
        raise DataError(f"user_id {shown(body.user_id)} is the log's own: users have other ids")
    filters = {name: Filter(wanted.allow, wanted.deny) for name, wanted in body.filters.items()}
    return Asked(k, body.exclude or exclude, body.user_id, body.features, body.context, filters, body.channels)


def _recent(body: AskedBody, users: RecentUsers) -> Recent:
    return Recent() if body.user_id is None else users.get(body.user_id)


def parse_id(text: str, kind: pa.DataType) -> int | str:
    """An id out of an address, in the type of the ids that it is looked up among.

    Raises:
        DataError: no integer where ids are integers, or one with leading zeros; too long; beyond int64.

    >>> parse_id("-7", pa.int64()), parse_id("-7", pa.string())
    (-7, '-7')
    """
    found: int | str = text
    if kind == pa.int64():
        if not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
            raise DataError(f"{shown(text)} is no id: ids are integers here")
        found = int(text)
    check_id(found, "the id")
    return found


def _checked(document: dict[str, Any], place: int, version: Version, now_ms: int) -> Event:
    """An event that this server can use.

    Raises:
        DataError: what the log refuses; a user or an item by an id of another type; a click of nothing.
    """
    where = f"events[{place}]"
    try:
        event = Event.from_json(document)
        said = event.content
        if isinstance(said, EntityPut | EntityDeleted) or event.user_id == CATALOGUE:
            raise DataError(f"type {shown(event.type)} is the server's own: PUT or DELETE /v1/items/ID or /v1/users/ID")
        check_event(event, now_ms)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    known = version.users.ids.type
    if not is_id(event.user_id, known):
        raise DataError(f"{where}: user_id {shown(event.user_id)}, but the ids of users are {known}")
    if isinstance(said, LoggedRequest | Click | Impression):
        if said.items is None and not isinstance(said, LoggedRequest):
            raise DataError(f"{where}: {event.type} of nothing: name item_id, or a list of items")
        items = version.items.kind
        if strange := [item for item in said.items or () if not is_id(item, items)]:
            raise DataError(f"{where}: item {shown(strange[0])}, but the ids of items are {items}")
    return event


def _time_of(ts_ms: int | None, now_ms: int) -> int:
    """When a request happened; now, if it does not say.

    Raises:
        DataError: a time beyond the clock.
    """
    if ts_ms is None:
        return now_ms
    check_time(ts_ms, now_ms, "the request")
    return ts_ms
