"""HTTP: candidates, pages, explanations and similar items."""

import logging
import os
import threading
import uuid
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, field_validator

from twotower.features.store import FeatureStoreError
from twotower.logs import EventLogError
from twotower.logs.events import CATALOGUE, NOBODY, check_time
from twotower.publish.version import Version
from twotower.schema.errors import DataError, cut, shown
from twotower.schema.limits import MAX_BATCH, MAX_BATCH_CANDIDATES, MAX_FILTER_VALUES
from twotower.schema.tables import EARLIEST_MS, LATEST_MS
from twotower.serve.answers import json_response, problem
from twotower.serve.bodies import Body, Id, check_bytes, parse_id
from twotower.serve.channels import SideBySide
from twotower.serve.explain import explain
from twotower.serve.filters import Filter
from twotower.serve.funnel import Page, Served, page_of, recommend
from twotower.serve.parts import ServerParts
from twotower.serve.request import Answer, Request, Unanswerable, retrieve, similar
from twotower.serve.users import Recent

log = logging.getLogger(__name__)

MAX_K = 10_000
MAX_PAGE = 200
MAX_CHANNELS = 100
AT_ONCE = max(1, min(2, (os.cpu_count() or 1) // 2))
"""Searches that run at the same time; with more, all compete for the interpreter's lock and take longer."""


def _allowed(value: Any) -> Any:
    return {"allow": value} if isinstance(value, list) else value


Filtered = Annotated[Filter, BeforeValidator(_allowed, json_schema_input_type=list[Any] | Filter)]
"""A list of values is short for `allow`."""


class UserBody(Body):
    """The user, and what may be answered."""

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
    channels: Annotated[list[str], Field(max_length=MAX_CHANNELS)] = Field(
        default_factory=list, description="Channels to ask; empty = all."
    )

    @field_validator("filters")
    @classmethod
    def _bounded(cls, filters: dict[str, Filter]) -> dict[str, Filter]:
        values = sum(len(wanted.allow or ()) + len(wanted.deny) for wanted in filters.values())
        if values > MAX_FILTER_VALUES or len(filters) > MAX_FILTER_VALUES:
            raise ValueError(f"{values} values in all, at most {MAX_FILTER_VALUES} are allowed")
        return filters


class RetrieveBody(UserBody):
    """A request for candidates."""

    k: Annotated[int, Field(ge=1, le=MAX_K, description="Number of candidates.")] = 100


class BatchBody(Body):
    """Requests for candidates, answered from one version."""

    requests: Annotated[list[RetrieveBody], Field(min_length=1, max_length=MAX_BATCH)]

    @field_validator("requests")
    @classmethod
    def _bounded(cls, requests: list[RetrieveBody]) -> list[RetrieveBody]:
        if (candidates := sum(request.k for request in requests)) > MAX_BATCH_CANDIDATES:
            raise ValueError(f"{candidates} candidates in all, at most {MAX_BATCH_CANDIDATES} are allowed")
        return requests


class RecommendBody(UserBody):
    """A request for a page."""

    k: Annotated[int, Field(ge=1, le=MAX_PAGE)] | None = Field(None, description="Items; absent = as configured.")
    request_id: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(check_bytes)] | None = Field(
        None, description="Names the request in the log; absent = made by the server."
    )
    ts_ms: Annotated[StrictInt, Field(ge=EARLIEST_MS, le=LATEST_MS)] | None = Field(
        None, description="When it happened, milliseconds since 1970; absent = now."
    )


class ExplainBody(RecommendBody):
    """A question why an item is, or is not, on a user's page."""

    item_id: Id


def add_candidates(app: FastAPI, parts: ServerParts) -> None:
    """Add `/v1/retrieve`, `/v1/retrieve/batch`, `/v1/recommend`, `/v1/explain` and `/v1/items/{id}/similar`."""
    timeout_s = parts.serve.channel_timeout_ms / 1000
    channels = SideBySide(
        timeout_s,
        lambda name, reason: parts.metrics.failed.labels(name, reason).inc(),
        away=lambda: parts.databases.problems,
    )
    searching = threading.BoundedSemaphore(AT_ONCE)

    def request_of(body: UserBody, k: int) -> Request:
        if body.user_id in (NOBODY, CATALOGUE):
            raise DataError(f"user_id {shown(body.user_id)} is the log's own: users have other ids")
        exclude = body.exclude or parts.serve.exclude
        return Request(k, exclude, body.user_id, body.features, body.context, body.filters, body.channels)

    def recent_of(body: UserBody) -> Recent:
        return Recent() if body.user_id is None else parts.users.get(body.user_id)

    def time_of(body: RecommendBody) -> int:
        now_ms = parts.clock_ms()
        if body.ts_ms is None:
            return now_ms
        check_time(body.ts_ms, now_ms, "the request")
        return body.ts_ms

    def answer_of(version: Version, body: RetrieveBody, window: range) -> Answer:
        request, recent = request_of(body, body.k), recent_of(body)
        with searching:
            return retrieve(version, request, recent, window, channels.ask)

    @app.post("/v1/retrieve")
    def post_retrieve(body: RetrieveBody) -> Response:
        """Candidates for a user, best first."""
        return json_response(answer_of(parts.version, body, parts.window(parts.clock_ms())))

    @app.post("/v1/retrieve/batch")
    def post_retrieve_batch(body: BatchBody) -> Response:
        """Candidates for several users, in the order of the requests, all from one version."""
        version, window = parts.version, parts.window(parts.clock_ms())
        answers = []
        for place, request in enumerate(body.requests):
            try:
                answers.append(answer_of(version, request, window))
            except (DataError, Unanswerable) as error:
                kind = DataError if isinstance(error, DataError) else Unanswerable
                raise kind(f"requests[{place}]: {error}") from None
        return json_response({"answers": answers})

    @app.post("/v1/recommend")
    def post_recommend(body: RecommendBody) -> Response:
        """A page for a user, through the whole funnel; the outcome of every candidate goes into the log."""
        request, recent = request_of(body, body.k or parts.funnel.page), recent_of(body)
        now_ms, request_id = time_of(body), body.request_id or uuid.uuid4().hex
        with searching:
            served = recommend(
                parts.version,
                request,
                recent,
                parts.window(now_ms),
                parts.funnel,
                now_ms=now_ms,
                request_id=request_id,
                ask=channels.ask,
            )
        page, logged = _logged(parts, served)
        for outcome, count in page.counts.items():
            parts.metrics.funnel.labels(outcome).inc(count)
        return json_response({**asdict(page), "logged": logged})

    @app.post("/v1/explain")
    def post_explain(body: ExplainBody) -> Response:
        """Why an item is, or is not, on a user's page: its rank in each channel and stage, and what leaves it out."""
        request, recent = request_of(body, body.k or parts.funnel.page), recent_of(body)
        window = parts.window(time_of(body))
        with searching:
            answer = explain(parts.version, request, recent, window, parts.funnel, item_id=body.item_id)
        return json_response(answer)

    @app.get("/v1/items/{item_id:path}/similar")
    def get_similar(item_id: str, k: Annotated[int, Query(ge=1, le=MAX_K)] = 20) -> Response:
        """The items most like an item, by every channel that can say."""
        version = parts.version
        try:
            return json_response(similar(version, parse_id(item_id, version.items.kind), k))
        except KeyError:
            return problem(404, f"version {version.id} has no item {cut(item_id)}")


def _logged(parts: ServerParts, served: Served) -> tuple[Page, bool]:
    """The page, and whether its record is in the log; a request that is sent again gets the page of its record."""
    if served.record is None:
        return served.page, False
    try:
        ack = parts.append([served.record])[0]
        parts.metrics.events.labels("duplicate" if ack.duplicate else "accepted").inc()
        if ack.duplicate:
            return page_of(parts.event_log.read(ack.partition, ack.offset, 1)[0].event), True
    except (EventLogError, FeatureStoreError, DataError):  # a page is worth more than its record
        log.exception("the record of request %s is not logged", served.page.request_id)
        parts.metrics.unlogged.inc()
        return served.page, False
    return served.page, True
