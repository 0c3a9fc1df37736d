from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from twotower.config import Settings
from twotower.pipeline.places import places
from twotower.publish.manifest import write_manifest
from twotower.publish.publish import current, current_path, existing_path
from twotower.publish.version import read_manifest
from twotower.serve import snapshots as module
from twotower.serve.admin import make_admin_app
from twotower.serve.snapshots import Snapshots

OTHER = "29990101T000000000-other"
TOKEN = "tökén"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def versions(own_world: Settings) -> Path:
    """Two versions with the same content; the first is promoted."""
    folder = places(own_world).versions
    source = current_path(folder)
    for path in source.rglob("*"):
        if path.is_file():
            target = folder / OTHER / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    manifest = {key: value for key, value in read_manifest(source).items() if key != "digest"}
    write_manifest(folder / OTHER, {**manifest, "id": OTHER, "parent": source.name})
    return folder


def point_to(versions: Path, version_id: str) -> None:
    """Replace CURRENT without a check, as someone else's tool may."""
    (versions / "CURRENT").write_text(version_id)


def test_a_reload_switches_and_a_request_keeps_the_snapshot_that_it_took(versions: Path) -> None:
    switched: list[str] = []
    snapshots = Snapshots(versions, switched.append)
    first = snapshots.version
    assert snapshots.reload() == first.id
    point_to(versions, OTHER)
    assert snapshots.reload() == OTHER == snapshots.version.id
    assert switched == [first.id, OTHER]
    assert first.item_ids.equals(snapshots.version.item_ids)


@pytest.mark.parametrize(
    "name", ["manifest.json", "users.arrow", "channels/two_tower/tables.safetensors", "golden.json"]
)
def test_a_damaged_version_is_refused_visibly_and_the_old_one_stays(versions: Path, name: str) -> None:
    snapshots = Snapshots(versions)
    first = snapshots.version
    flip(versions / OTHER / name)
    point_to(versions, OTHER)
    assert snapshots.reload() == first.id
    assert snapshots.version is first
    assert snapshots.refused is not None
    assert snapshots.refused.version == OTHER
    assert OTHER in snapshots.refused.problem
    point_to(versions, first.id)
    assert snapshots.reload() == first.id
    assert snapshots.refused is None


def test_a_version_that_fails_in_a_way_that_no_one_foresaw_is_refused_too(
    versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(versions)
    monkeypatch.setattr(module, "replay", lambda _: 1 / 0)
    point_to(versions, OTHER)
    assert snapshots.reload() != OTHER
    assert snapshots.refused == module.Refusal(OTHER, "division by zero")


@pytest.mark.parametrize("content", [b"no such version", b"\xff\xfe\x00", b"../versions"])
def test_a_current_that_names_no_version_is_refused(versions: Path, content: bytes) -> None:
    snapshots = Snapshots(versions)
    (versions / "CURRENT").write_bytes(content)
    assert snapshots.reload() == snapshots.version.id
    assert snapshots.refused is not None
    (versions / "CURRENT").unlink()
    assert snapshots.reload() == snapshots.version.id
    assert snapshots.refused is None


class Admin:
    """The admin port of a server in this process."""

    def __init__(self, versions: Path) -> None:
        self.snapshots = Snapshots(versions)
        self._app = make_admin_app(self.snapshots, versions, TOKEN)

    def ask(self, method: str, path: str, body: object = None, token: str | None = f"Bearer {TOKEN}") -> httpx.Response:
        import asyncio

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                headers = {} if token is None else {"Authorization": token.encode()}
                return await client.request(method, path, headers=headers, json=body)

        return asyncio.run(send())


@pytest.fixture
def admin(versions: Path) -> Iterator[Admin]:
    return Admin(versions)


def test_without_the_token_nothing_is_answered(admin: Admin, versions: Path) -> None:
    served = current(versions)
    for token in (None, "", "Bearer ", "Bearer wrong", TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN} "):
        for method, path in [("GET", "/versions"), ("POST", "/promote"), ("GET", "/openapi.json"), ("GET", "/nothing")]:
            response = admin.ask(method, path, {"version": OTHER}, token)
            if token != f"Bearer {TOKEN} ":  # clients strip it
                assert response.status_code == 401, (token, path)
    assert current(versions) == served


def test_promote_list_and_roll_back(admin: Admin, versions: Path) -> None:
    first = admin.snapshots.version.id
    assert admin.ask("POST", "/promote", {"version": OTHER}).json() == {"served": OTHER}
    listed = admin.ask("GET", "/versions").json()
    assert (listed["current"], listed["served"]) == (OTHER, OTHER)
    assert [version["id"] for version in listed["versions"]] == [first, OTHER]
    assert admin.ask("POST", "/rollback").json() == {"served": first}
    assert admin.ask("POST", "/rollback", {"version": OTHER}).json() == {"served": OTHER}
    assert admin.ask("POST", "/rollback", {}).json() == {"served": first}
    response = admin.ask("POST", "/rollback", {})
    assert (response.status_code, "has no parent" in response.json()["error"]) == (409, True)
    assert current(versions) == first


def test_a_refused_version_goes_live_after_it_was_restored_and_reloaded(admin: Admin, versions: Path) -> None:
    first = admin.snapshots.version.id
    flip(versions / OTHER / "clicks.arrow")
    response = admin.ask("POST", "/promote", {"version": OTHER})
    assert response.status_code == 409
    assert "clicks.arrow does not have the SHA-256" in response.json()["error"]
    assert current(versions) == first
    point_to(versions, OTHER)
    assert admin.ask("POST", "/reload").status_code == 409
    flip(existing_path(versions, OTHER) / "clicks.arrow")
    assert admin.snapshots.reload() == first
    assert admin.ask("POST", "/reload").json() == {"served": OTHER}


def test_admin_requests_that_cannot_be_meant_are_refused_with_a_sentence(admin: Admin) -> None:
    for path, body, status in [
        ("/promote", {"version": "no such"}, 409),
        ("/promote", {}, 422),
        ("/promote", {"version": 3}, 422),
        ("/rollback", {"id": "x"}, 422),
        ("/nothing", {}, 404),
    ]:
        response = admin.ask("POST", path, body)
        assert (response.status_code, list(response.json())) == (status, ["error"]), path
