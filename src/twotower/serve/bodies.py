"""What comes in over HTTP, before a route sees it: addresses, sizes of bodies, and strict JSON.

JSON is read as RFC 8259 has it: UTF-8, no NaN or Infinity, no number beyond float64, no half of a surrogate pair, and
no name twice in an object. Python's own reader takes all of these.
"""

import json
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twotower.schema.errors import DataError, cut, shown
from twotower.schema.limits import MAX_ID_BYTES, check_id
from twotower.serve.answers import problem

MAX_DEPTH = 64
"""Objects and lists within each other, in a body."""
RETRY_AFTER_S = 1


class Body(BaseModel):
    """A body whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


def check_bytes(text: str) -> str:
    """Refuse a text that is longer than an id may be, or holds half a surrogate pair."""
    if len(text.encode()) > MAX_ID_BYTES:  # half a surrogate pair raises a ValueError
        raise ValueError(f"at most {MAX_ID_BYTES} bytes are allowed")
    return text


Id = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | Annotated[StrictStr, AfterValidator(check_bytes)]


def parse_id(text: str, kind: pa.DataType) -> int | str:
    """An id in an address, in the type of the ids that it is looked up among.

    Raises:
        DataError: no integer where ids are integers, or one with leading zeros; too long; beyond int64.

    >>> parse_id("-7", pa.int64()), parse_id("-7", pa.string())
    (-7, '-7')
    """
    parsed: int | str = text
    if kind == pa.int64():
        if not re.fullmatch(r"0|-?[1-9][0-9]{0,18}", text):
            raise DataError(f"{shown(text)} is no id: ids are integers here")
        parsed = int(text)
    check_id(parsed, "the id")
    return parsed


class Bounded:
    """Refuses a request whose body is too large, alone or with all others, before it is held; plain ASGI.

    A body counts from its first byte until its request is answered. `max_together` is for all bodies at one time,
    `max_by_path` for single bodies at some addresses.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_together: int, max_by_path: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_together = max_together
        self._max_by_path = max_by_path or {}
        self._held = 0  # read and changed by the event loop alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on while its body is small enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not is_readable(scope):
            await problem(404, "no such address: it holds a control character, or is no UTF-8")(scope, receive, send)
            return
        most = self._max_by_path.get(scope["path"], self._max_bytes)
        too_large = f"the body has more than {most} bytes, which is the limit at this address: send less"
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > most):
            await problem(413, too_large)(scope, receive, send)
            return
        taken = 0

        async def counting() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            if taken + size > most:
                raise HTTPException(413, too_large)
            if self._held + size > self._max_together:
                raise HTTPException(
                    503, "too many large bodies at once: try again in a second", {"Retry-After": str(RETRY_AFTER_S)}
                )
            taken += size
            self._held += size
            return message

        try:
            await self._app(scope, counting, send)
        finally:
            self._held -= taken


def is_readable(scope: Scope) -> bool:
    r"""An address is UTF-8 without control characters.

    A router's pattern may ignore a line break at the end (`$` matches before it), so that `DELETE` of `7%0A` would
    delete `7`; and an address that is no UTF-8 is decoded to another one.

    >>> is_readable({"path": "/v1/items/7", "raw_path": b"/v1/items/7"})
    True
    >>> is_readable({"path": "/v1/items/7\n", "raw_path": b"/v1/items/7%0A"})
    False
    """
    try:
        path = unquote_to_bytes(scope.get("raw_path") or scope["path"].encode()).decode()
    except UnicodeError:
        return False
    return all(ord(sign) >= 32 and not 127 <= ord(sign) < 160 for sign in path + scope["path"])


class StrictRoute(APIRoute):
    """A route whose body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Give the handler a request that reads its body by `read_json`."""
        answer = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await answer(_Strict(request.scope, request.receive))

        return strictly


class _Strict(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        HTTPException: 400, with what is wrong.

    >>> read_json(b'{"k": [1, 0.5]}')
    {'k': [1, 0.5]}
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
        if b"\\u" in body and isinstance(value, dict | list | str):
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair has no encoding
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            _check_depth(value)
    except HTTPException:
        raise
    except RecursionError:
        raise HTTPException(400, _TOO_DEEP) from None
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is no UTF-8: byte {error.start} is {body[error.start]:#x}") from None
    except UnicodeEncodeError:
        raise HTTPException(400, "the body holds half a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise HTTPException(400, f"the body holds a number that cannot be read: {cut(str(error))}") from None
    return value


_TOO_DEEP = f"the body nests objects and lists more than {MAX_DEPTH} deep"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [entry for nested in level for entry in (nested.values() if isinstance(nested, dict) else nested)]
        level = [nested for nested in inner if isinstance(nested, dict | list)]
        if not level:
            return
    raise HTTPException(400, _TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HTTPException(400, f"the body has {shown(twice)} twice in one object: give it once")
    return unique


def _constant(name: str) -> Any:
    raise HTTPException(400, f"the body holds {name}, which is no JSON: give null where a number is missing")


def _number(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise HTTPException(400, f"the body holds the number {cut(text)}, which is beyond float64")
    return number
