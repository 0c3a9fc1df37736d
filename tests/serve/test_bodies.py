import asyncio
from typing import Any

import pytest

from twotower.serve import bodies
from twotower.serve.bodies import Bounded, read_json


def test_an_address_with_a_control_character_or_no_utf8_is_none(server) -> None:
    one = server.items(k=1)[0]
    for path in (
        f"items/{one}%0A",
        f"items/%0A{one}",
        f"items/{one}%00",
        f"items/{one}%C2%85",
        "users/1007%0A",
        "items/%FF",
    ):
        response = server.http.request("DELETE", f"/v1/{path}")
        assert (response.status_code, list(response.json())) == (404, ["error"]), path
    assert sum(server.log.ends()) == 0
    assert server.items(k=1) == [one]


def ask(app: Bounded, *chunks: bytes, path: str = "/", headers: Any = ()) -> Any:
    """Status and headers of the answer to a body that comes in chunks."""

    async def send() -> Any:
        left = [{"type": "http.request", "body": one, "more_body": True} for one in chunks]
        left.append({"type": "http.request", "body": b"", "more_body": False})
        told: list[Any] = []

        async def receive() -> Any:
            return left.pop(0)

        async def answer(message: Any) -> None:
            told.append(message)

        try:
            await app({"type": "http", "path": path, "headers": list(headers)}, receive, answer)
        except bodies.HTTPException as error:
            return error.status_code, dict(error.headers or {})
        return told[0]["status"], {}

    return asyncio.run(send())


async def reading(_: Any, receive: Any, send: Any) -> None:
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_a_body_is_bounded_by_its_address_as_announced_and_as_it_comes() -> None:
    app = Bounded(reading, 10, 100, {"/events": 20})
    assert ask(app, b"x" * 10)[0] == 200
    assert ask(app, b"x" * 6, b"x" * 6)[0] == 413
    assert ask(app, b"x" * 12, path="/events")[0] == 200
    assert ask(app, headers=[(b"content-length", b"11")])[0] == 413
    assert ask(app, headers=[(b"content-length", b"9" * 30)])[0] == 413


def test_bodies_are_bounded_together_until_their_requests_are_answered() -> None:
    app = Bounded(reading, 10, 15)
    assert ask(app, b"x" * 10)[0] == 200
    assert app._held == 0
    held = 0

    async def noting(_: Any, receive: Any, send: Any) -> None:
        nonlocal held
        await reading(_, receive, send)
        held = counted._held

    counted = Bounded(noting, 10, 15)
    assert ask(counted, b"x" * 4, b"x" * 5)[0] == 200
    assert (held, counted._held) == (9, 0)
    app._held = 6  # of another request
    assert ask(app, b"x" * 9)[0] == 200
    assert ask(app, b"x" * 5, b"x" * 5) == (503, {"Retry-After": "1"})
    assert app._held == 6


@pytest.mark.parametrize("depth", [bodies.MAX_DEPTH, bodies.MAX_DEPTH + 1])
def test_bodies_nest_only_so_deep(depth: int) -> None:
    text = b"[" * depth + b"]" * depth
    if depth <= bodies.MAX_DEPTH:
        assert read_json(text) is not None
    else:
        with pytest.raises(bodies.HTTPException, match="400"):
            read_json(text)
