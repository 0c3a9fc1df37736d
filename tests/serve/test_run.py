"""The server as a process: its start, its signals, what it refuses."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from twotower.config import Settings
from twotower.pipeline.places import places
from twotower.publish.manifest import write_manifest
from twotower.publish.publish import current_path
from twotower.publish.version import read_manifest

TOKEN = "token"
OTHER = "29990101T000000000-other"


class Process:
    """A running `twotower serve`."""

    def __init__(self, settings: Settings, *overrides: str, **environment: str) -> None:
        options = [f"workspace.path={json.dumps(settings.workspace.path)}", "serve.port=0", "serve.admin_port=0"]
        arguments = [part for option in (*options, *overrides) for part in ("--set", option)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twotower", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.line = self.process.stdout.readline()
        self.ready: Any = json.loads(self.line) if self.line else None

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, what followed the JSON line on stdout, stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.fixture
def serve(own_world: Settings) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def started(*overrides: str, **environment: str) -> Process:
            process = Process(own_world, *overrides, **environment)
            stack.callback(process.process.communicate)
            stack.callback(process.process.kill)
            return process

        yield started


def test_a_server_says_where_it_is_answers_what_it_began_and_ends_with_0(
    serve: Callable[..., Process], own_world: Settings
) -> None:
    server = serve()
    assert server.ready.keys() == {"url", "admin_url", "version"}
    assert server.ready["admin_url"] is None
    assert server.ready["version"] == current_path(places(own_world).versions).name

    second = serve()
    assert second.line == ""
    second.process.wait(20)
    assert second.process.returncode == 1
    assert "is in use by another process" in second.process.stderr.read()

    address = urlsplit(server.ready["url"])
    body = json.dumps({"k": 5}).encode()
    slow = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    slow.putrequest("POST", "/v1/retrieve")
    slow.putheader("Content-Type", "application/json")
    slow.putheader("Content-Length", str(len(body)))
    slow.endheaders(body[:3])
    assert httpx.get(server.ready["url"] + "/healthz").json() == {"ok": True}
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    slow.send(body[3:])
    assert len(json.loads(slow.getresponse().read())["items"]) == 5
    slow.close()
    code, out, err = server.end(0)
    assert (code, out) == (0, "")
    assert "Traceback" not in err


def test_a_deleted_users_events_are_erased_from_the_log_while_the_server_runs_and_when_it_starts(
    serve: Callable[..., Process], own_world: Settings
) -> None:
    def logged() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(places(own_world).log.iterdir()))

    def send(server: Process, user_id: int) -> None:
        body = {"event_id": f"secret-{user_id}", "type": "click", "user_id": user_id, "ts_ms": 1_700_000_000_000}
        events = {"events": [{**body, "item_id": "i000001"}]}
        assert httpx.post(server.ready["url"] + "/v1/events", json=events).status_code == 202

    server = serve("stream.log.erase_every_s=0.1")
    for user_id in (1001, 1002, 1003):
        send(server, user_id)
    assert httpx.delete(server.ready["url"] + "/v1/users/1001").status_code == 200
    until(lambda: b"secret-1001" not in logged())
    server.end()
    server = serve()  # the next pass is an hour away
    assert httpx.delete(server.ready["url"] + "/v1/users/1002").status_code == 200
    assert b"secret-1002" in logged()
    server.process.kill()
    server.process.wait()
    server = serve()
    until(lambda: b"secret-1002" not in logged())
    assert b"secret-1003" in logged()
    code, _, err = server.end()
    assert code == 0
    assert "1 events of deleted users erased from the log" in err


def test_ctrl_c_ends_a_server_with_0(serve: Callable[..., Process]) -> None:
    code, out, err = serve().end(signal.SIGINT)
    assert (code, out) == (0, "")
    assert "Traceback" not in err


def test_a_taken_port_is_refused_with_what_to_set(serve: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve(f"serve.port={port}")
        assert server.line == ""
        server.process.wait(20)
        assert server.process.returncode == 2
        err = server.process.stderr.read()
        assert f"cannot listen on 127.0.0.1:{port}" in err
        assert "Set serve.port" in err


def test_the_admin_port_promotes_and_a_store_left_from_another_log_is_made_again(
    serve: Callable[..., Process], own_world: Settings
) -> None:
    versions = places(own_world).versions
    source = current_path(versions)
    for path in source.rglob("*"):
        if path.is_file():
            target = versions / OTHER / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    manifest = {key: value for key, value in read_manifest(source).items() if key != "digest"}
    write_manifest(versions / OTHER, {**manifest, "id": OTHER, "parent": source.name})
    server = serve(TWOTOWER_ADMIN_TOKEN=TOKEN)
    url, admin_url = server.ready["url"], server.ready["admin_url"]
    assert admin_url.startswith("http://127.0.0.1:")
    user_id = 1000
    first = httpx.post(f"{url}/v1/retrieve", json={"user_id": user_id}).json()["items"][0]["item_id"]
    click = {"event_id": "e", "type": "click", "user_id": user_id, "item_id": first, "ts_ms": 1_790_000_000_000}
    assert httpx.post(f"{url}/v1/events", json={"events": [click]}).status_code == 202
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert httpx.post(f"{admin_url}/promote", json={"version": OTHER}).status_code == 401
    assert httpx.post(f"{admin_url}/promote", json={"version": OTHER}, headers=headers).json() == {"served": OTHER}
    assert httpx.get(f"{url}/v1/version").json()["version"] == OTHER
    assert httpx.post(f"{url}/promote", json={"version": OTHER}, headers=headers).status_code == 404
    flip(versions / source.name / "users.arrow")
    (versions / "CURRENT").write_text(source.name)
    until(lambda: httpx.get(f"{url}/v1/version").json()["refused"])
    assert "users.arrow does not have" in httpx.get(f"{url}/v1/version").json()["refused"]["problem"]
    assert "\ntwotower_version_refused 1.0" in httpx.get(f"{url}/metrics").text
    assert httpx.get(f"{url}/v1/version").json()["version"] == OTHER
    (versions / "CURRENT").write_text(OTHER)
    until(lambda: httpx.get(f"{url}/v1/version").json()["refused"] is None)
    code, out, err = server.end()
    assert (code, out) == (0, "")
    assert "is refused" in err

    shutil.rmtree(places(own_world).log)
    again = serve()
    offered = httpx.post(f"{again.ready['url']}/v1/retrieve", json={"user_id": user_id}).json()["items"]
    assert first == offered[0]["item_id"]
    assert "is not of this log and settings: reading the log again" in again.end()[2]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def until(condition: Callable[[], object]) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the server never came to it")


def test_a_server_without_its_feature_store_says_so_and_builds_an_emptied_one_again(
    serve: Callable[..., Process], redis_server: Any, tmp_path: Path
) -> None:
    redis_server.kill()
    redis_server.options += ["--user", "shop", "on", ">hidden-4711", "~*", "&*", "+@all", "--user", "default", "off"]
    redis_server.start()
    environment = {"TWOTOWER_FEATURE_STORE_USER": "shop", "TWOTOWER_FEATURE_STORE_PASSWORD": "hidden-4711"}
    server = serve(
        f'serve.feature_store={{ kind = "redis", url = "{redis_server.url}", name = "shop" }}', **environment
    )
    url = server.ready["url"]

    def offered() -> list[str]:
        body = {"user_id": 1000, "k": 5, "exclude": "clicked"}
        return [item["item_id"] for item in httpx.post(f"{url}/v1/retrieve", json=body).json()["items"]]

    def send(event_id: str, item_id: str) -> int:
        click = {"event_id": event_id, "type": "click", "user_id": 1000, "item_id": item_id, "ts_ms": 1_790_000_000_000}
        return httpx.post(f"{url}/v1/events", json={"events": [click]}).status_code

    first, second, *_ = offered()
    assert send("a", first) == 202
    assert first not in offered()
    another = serve("serve.feature_store.kind=lmdb")
    another.process.wait(20)
    assert "is in use by another process" in another.process.stderr.read()

    redis_server.kill()
    refused = httpx.post(f"{url}/v1/retrieve", json={"user_id": 1000})
    assert refused.status_code == 503
    assert "the feature store shop in redis://127.0.0.1:" in refused.json()["error"]
    assert send("b", second) == 503  # it is in the log
    until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
    said = [httpx.get(url + path).text for path in ("/readyz", "/metrics", "/v1/version")]
    assert "the reader of the log has failed" in said[0]
    assert httpx.get(f"{url}/healthz").status_code == 200

    redis_server.start()
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    assert not {first, second} & {*offered()}

    redis_server.kill()
    shutil.rmtree(tmp_path / "appendonlydir")
    redis_server.start()
    until(lambda: httpx.get(f"{url}/readyz").status_code == 200 and not {first, second} & {*offered()})
    code, _, err = server.end()
    assert code == 0
    assert "the feature store is empty: reading the log again" in err
    assert "the feature store is complete again: 2 events applied" in err
    assert not any("hidden-4711" in text for text in (err, refused.text, *said))
    assert "Traceback" not in err
