"""Admin verbs on a port of their own, on loopback, behind a token."""

import secrets
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from twotower.publish.publish import current, list_versions, promote, roll_back
from twotower.schema.errors import ConfigError, TwotowerError
from twotower.schema.secrets import ADMIN_TOKEN
from twotower.serve.answers import answer_errors, json_response, problem
from twotower.serve.bodies import Body, Bounded, StrictRoute
from twotower.serve.snapshots import Snapshots

MAX_BYTES = 2**16
MAX_TOGETHER = 2**22
"""Bytes of a request's body, and of all bodies at one time."""


class PromoteBody(Body):
    """Names a version."""

    version: str


class RollBackBody(Body):
    """Names a version, or leaves it to the server."""

    version: str | None = None


class Authorised:
    """Lets only requests with `Authorization: Bearer TOKEN` pass."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401."""
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                refusal = problem(401, f"give the token of ${ADMIN_TOKEN} as `Authorization: Bearer TOKEN`")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_admin_app(snapshots: Snapshots, versions: Path, token: str) -> FastAPI:
    """The admin application: promote, roll back, reload, list. Every request carries `Authorization: Bearer TOKEN`.

    Raises:
        ConfigError: the token is blank, has blanks around it, or no character that a header can carry.
    """
    if not token.strip() or token != token.strip() or not token.isprintable():
        raise ConfigError("the admin token is blank, or has blanks or control characters in it: set another one")
    app = FastAPI(title="twotower admin", version="1")
    app.router.route_class = StrictRoute
    app.add_middleware(Bounded, max_bytes=MAX_BYTES, max_together=MAX_TOGETHER)
    app.add_middleware(Authorised, token=token)
    answer_errors(app)

    @app.exception_handler(TwotowerError)
    async def refused(_: Request, error: TwotowerError) -> Response:
        return problem(409, str(error))

    @app.get("/versions")
    def get_versions() -> Response:
        """All versions, the promoted and the served one."""
        listed = [asdict(version) for version in list_versions(versions)]
        return json_response({"current": current(versions), "served": snapshots.version.id, "versions": listed})

    @app.post("/promote")
    def post_promote(body: PromoteBody) -> Response:
        """Promote a version and serve it."""
        promote(versions, body.version)
        return _reloaded()

    @app.post("/rollback")
    def post_rollback(body: RollBackBody | None = None) -> Response:
        """Go back to the given version, or to the parent of the promoted one."""
        roll_back(versions, None if body is None else body.version)
        return _reloaded()

    @app.post("/reload")
    def post_reload() -> Response:
        """Look for another promoted version now, and try a rejected one again."""
        return _reloaded()

    def _reloaded() -> Response:
        snapshots.forget_refusal()
        served = snapshots.reload()
        if snapshots.refused is not None:
            return problem(409, f"{snapshots.refused.version} is refused: {snapshots.refused.problem}")
        return json_response({"served": served})

    return app
