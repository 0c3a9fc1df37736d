"""Random requests to every route: each is answered, with a sentence where it is refused, and the server goes on."""

import json
import random
from typing import Any
from urllib.parse import quote

REQUESTS = 400
SCALARS = [
    None, True, 0, -1, 7, 2**53, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308, 5e-324, "", "a", "kind 1", "7", "é名", "\x00",
    "\n", "x" * 600, "y" * 20_000, "user/3", "clicked", "two_tower", "popular", 1_800_000_000_000,
]  # fmt: skip
NAMES = ["labels", "kind", "size", "price", "added", "fresh", "item_id", "user_id", "available", "x" * 500, ""]
FITTING: dict[str, list[Any]] = {
    "labels": [["a", "b"], [None], []],
    "kind": ["kind 1", "new"],
    "size": [1, 2.5],
    "price": [1, 2.5],
    "added": [5, 10**12, 10**17],
    "fresh": [True],
}
ADDRESSES = [
    "%0A",
    "%FF",
    "a%2Fb",
    "..",
    "%2e%2e",
    "7%0A",
    "-0",
    "007",
    "%00",
    "x" * 2000,
    "%40catalogue",
    "similar",
    "",
]


class Sender:
    """Draws requests."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def value(self, depth: int = 0) -> Any:
        kind = self.draw.random()
        if depth > 2 or kind < 0.6:
            return self.draw.choice(SCALARS)
        if kind < 0.8:
            return [self.value(depth + 1) for _ in range(self.draw.choice([0, 1, 3]))]
        if kind < 0.85:
            return [self.draw.choice(SCALARS)] * 5000
        return {self.draw.choice(["a", "allow", "deny", "é"]): self.value(depth + 1)}

    def features(self) -> dict[str, Any]:
        names = [self.draw.choice(NAMES) for _ in range(self.draw.choice([0, 1, 2]))]
        return {
            name: self.draw.choice(FITTING.get(name, SCALARS)) if self.chance(0.7) else self.value() for name in names
        }

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def user(self) -> Any:
        return f"user/{self.draw.randrange(40)}" if self.chance(0.7) else self.draw.choice(SCALARS)

    def item(self) -> Any:
        return self.draw.randrange(60) if self.chance(0.7) else self.draw.choice(SCALARS)

    def address(self, one: Any) -> str:
        return quote(str(one), safe="") if self.chance(0.8) else self.draw.choice(ADDRESSES)

    def asked(self, **more: Any) -> Any:
        body = {
            "user_id": self.user(),
            "features": self.features() if self.chance(0.2) else {},
            "context": self.features() if self.chance(0.1) else {},
            "filters": {name: [value] for name, value in self.features().items()},
            "channels": [self.draw.choice(["two_tower", "popular", "nope"])],
            "exclude": self.draw.choice(["none", "clicked", "impressed"]),
            "k": self.draw.choice([1, 50]),
            **more,
        }
        kept = {name: value for name, value in body.items() if self.chance(0.5) or name in more}
        return {name: value if self.chance(0.95) else self.value() for name, value in kept.items()}

    def event(self) -> dict[str, Any]:
        kind = self.draw.choice(["click", "impression", "request", "user", "item", "erased", "buy"])
        event = {"event_id": f"e{self.draw.random()}", "type": kind, "user_id": self.user(), "ts_ms": 1_799_999_999_000}
        return {
            **event,
            self.draw.choice(["item_id", "items", "outcomes", "body"]): self.value(),
            "item_id": self.item(),
        }

    def request(self) -> tuple[str, str, Any]:
        ways = [
            ("POST", "/v1/retrieve", self.asked()),
            ("POST", "/v1/retrieve/batch", {"requests": [self.asked(), self.asked()]}),
            ("POST", "/v1/recommend", self.asked(request_id=self.draw.choice(["r1", "r2"]))),
            ("POST", "/v1/explain", self.asked(item_id=self.item())),
            ("POST", "/v1/events", {"events": [self.event()]}),
            ("PUT", f"/v1/items/{self.address(self.item())}", {"features": self.features()}),
            ("PUT", f"/v1/items/{self.draw.randrange(80)}", {"features": self.features()}),
            ("PUT", f"/v1/items/{self.draw.randrange(80)}", {"available": self.chance(0.5)}),
            ("DELETE", f"/v1/items/{self.address(self.item())}", None),
            ("PUT", f"/v1/users/{self.address(self.user())}", {"features": self.features()}),
            ("DELETE", f"/v1/users/{self.address(self.user())}", None),
            ("GET", f"/v1/items/{self.address(self.item())}/similar?k={self.draw.choice(['3', '0', '1e5', ''])}", None),
            ("GET", self.draw.choice(["/v1/version", "/readyz", "/metrics", "/nothing"]), None),
            (self.draw.choice(["POST", "PUT"]), self.draw.choice(["/v1/retrieve", "/v1/items/5"]), self.value()),
        ]
        return self.draw.choice(ways)

    def text(self, body: Any) -> bytes:
        if body is None:
            return b""
        text = json.dumps(body).encode()
        kind = self.draw.random()
        if kind < 0.04:
            return text.replace(b"1", self.draw.choice([b"NaN", b"1e999", b"-Infinity", b"01"]), 1)
        if kind < 0.06:
            return text[: self.draw.randrange(len(text) + 1)]
        if kind < 0.08:
            return text.replace(b"a", b"\xff", 1)
        if kind < 0.10:
            return text.replace(b'"', b'"\\ud800', 1)
        return b"[" * self.draw.choice([70, 990, 5000]) + text if kind < 0.12 else text


def test_every_request_is_answered_and_the_server_goes_on(odd_server, start, odd_world) -> None:
    sender, statuses = Sender(0), set[int]()
    for _ in range(REQUESTS):
        method, path, body = sender.request()
        content = sender.text(body)
        response = odd_server.http.request(method, path, content=content, headers={"Content-Type": "application/json"})
        told = (method, path, content[:300], response.status_code, response.text[:300])
        assert response.status_code < 500, told
        statuses.add(response.status_code)
        if response.status_code >= 400:
            assert list(response.json()) == ["error"], told
            assert len(response.content) < 2500, told
        elif '"failed_channels"' in response.text:
            given = response.json().get("answers", [response.json()])
            assert all(answer["failed_channels"] == [] for answer in given), told
    assert statuses >= {200, 202, 400, 404, 422}

    def answers(server) -> Any:
        assert server.http.get("/readyz").status_code == 200
        return server.retrieve(user_id="user/1", k=30)

    before = answers(odd_server)
    assert before["items"]
    odd_server.close()
    assert answers(start(odd_world)) == before
