"""HTTP: the public application under `/v1`, with health and metrics."""

import logging

from fastapi import FastAPI, Request
from fastapi.responses import Response

from twotower.features.store import FeatureStoreError
from twotower.logs import EventLogError
from twotower.schema.errors import DataError, TwotowerError, UnavailableError
from twotower.schema.limits import MAX_BODIES_BYTES, MAX_BODY_BYTES, MAX_EVENTS_BODY_BYTES
from twotower.serve.answers import answer_errors, problem
from twotower.serve.bodies import Bounded, StrictRoute
from twotower.serve.candidates import add_candidates
from twotower.serve.entities import add_entities
from twotower.serve.events import EVENTS_PATH, add_events
from twotower.serve.metrics import Counted
from twotower.serve.operations import add_operations
from twotower.serve.parts import ServerParts
from twotower.serve.request import Unanswerable

log = logging.getLogger(__name__)


def make_app(parts: ServerParts) -> FastAPI:
    """The public application."""
    app = FastAPI(
        title="twotower",
        version="1",
        description="Candidates for a recommender, and events back into it.",
        docs_url=None,  # these pages load their scripts from elsewhere; /openapi.json has all that they show
        redoc_url=None,
    )
    app.router.route_class = StrictRoute
    app.add_middleware(
        Bounded,
        max_bytes=MAX_BODY_BYTES,
        max_together=MAX_BODIES_BYTES,
        max_by_path={EVENTS_PATH: MAX_EVENTS_BODY_BYTES},
    )
    app.add_middleware(Counted, metrics=parts.metrics)
    answer_errors(app)

    @app.exception_handler(DataError)
    async def refused(_: Request, error: DataError) -> Response:
        return problem(422, str(error))

    @app.exception_handler(EventLogError)
    @app.exception_handler(FeatureStoreError)
    @app.exception_handler(UnavailableError)
    @app.exception_handler(Unanswerable)
    async def unable(_: Request, error: TwotowerError) -> Response:
        log.error("a request failed: %s", error)
        return problem(503, str(error))

    for add in (add_candidates, add_events, add_operations, add_entities):
        add(app, parts)
    return app
