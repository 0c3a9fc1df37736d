"""How every route answers: JSON by orjson, and an error as `{"error": sentence}`."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from twotower.schema.errors import cut

MAX_MESSAGE = 1000
"""Characters of an error's sentence; what is longer loses its middle."""
MAX_SENTENCES = 5
"""Mistakes that the answer to one request names."""


def json_response(content: Any, status: int = 200) -> Response:
    """An answer written by orjson, which is several times as fast as the default on long lists."""
    return Response(orjson.dumps(content), status, media_type="application/json")


def problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as every route gives it."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
    response = json_response({"error": message.encode(errors="backslashreplace").decode()}, status)
    response.headers.update(headers or {})
    return response


def answer_errors(app: FastAPI) -> None:
    """Give every error that a route raises as `problem` does."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        named = list(islice(error.errors(), MAX_SENTENCES))
        sentences = [f"{cut('.'.join(str(part) for part in e['loc']))}: {cut(e['msg'])}" for e in named]
        others = len(error.errors()) - len(named)
        return problem(422, "; ".join(sentences) + (f"; and {others} more" if others else ""))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, error.headers)

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return problem(500, f"a defect of the server, see its log: {type(error).__name__}")
