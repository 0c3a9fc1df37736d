from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Settings
from twotower.features.vocabulary import UNKNOWN
from twotower.publish.delta import Delta, Rows, delta_folder, write_delta
from twotower.publish.delta import base_digest as digest_of
from twotower.schema import columns as c
from twotower.serve.users import Recent

K = 1000


@pytest.fixture
def server(start, own_world: Settings):
    return start(own_world)


def a_user(server) -> Any:
    version = server.version
    return version.users.ids[int(np.flatnonzero(version.users.features[c.USER_ID] > UNKNOWN)[0])].as_py()


def features(server, row: int) -> dict[str, Any]:
    found = server.version.catalogue.slice(row, 1).to_pylist()[0]
    return {name: value for name, value in found.items() if name not in (c.ITEM_ID, c.AVAILABLE)}


def put(server, path: str, status: int = 200, **body: Any) -> Any:
    response = server.http.request("PUT", f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def delete(server, path: str, status: int = 200) -> Any:
    response = server.http.request("DELETE", f"/v1/{path}")
    assert response.status_code == status, response.text
    return response.json()


def new_item(server) -> Any:
    return 10**9 if server.version.item_ids.type == pa.int64() else "zz new"


def test_a_new_item_is_in_the_next_answer_without_a_restart_and_after_one(server, start, own_world: Settings) -> None:
    one = new_item(server)
    assert one not in server.items(k=K)
    put(server, f"items/{one}", features=features(server, 5))
    assert one in server.items(k=K, channels=["two_tower"])
    assert one in server.items(k=K)
    before = server.retrieve(k=K, user_id=a_user(server))
    server.close()
    again = start(own_world)
    assert again.retrieve(k=K, user_id=a_user(again)) == before


def test_availability_hides_an_item_and_shows_it_again(server) -> None:
    one = server.items(k=1)[0]
    put(server, f"items/{one}", available=False)
    assert one not in server.items(k=K)
    put(server, f"items/{one}", available=True)
    assert one in server.items(k=K)
    assert server.items(k=1) == [one]


def test_a_deleted_item_is_gone_and_may_come_back(server) -> None:
    one = server.items(k=1)[0]
    row = int(server.version.items.find(pa.array([one]))[0])
    attributes = features(server, row)
    delete(server, f"items/{one}")
    assert one not in server.items(k=K)
    delete(server, f"items/{one}", status=404)
    put(server, f"items/{one}", features=attributes)
    assert one in server.items(k=K)


def test_a_new_item_that_says_nothing_of_itself_or_what_no_item_has_is_refused(server) -> None:
    assert "is new" in put(server, f"items/{new_item(server)}", status=422)["error"]
    assert "no attribute" in put(server, f"items/{new_item(server)}", status=422, features={"colour": 1})["error"]
    put(server, f"items/{new_item(server)}", status=422, available=1)
    delete(server, f"items/{new_item(server)}", status=404)


def test_features_of_a_user_are_put_and_used(server) -> None:
    version, known = server.version, a_user(server)
    stranger = 10**9 if version.users.ids.type == pa.int64() else "stranger"
    told = {"age": 70, "gender": "f"}
    expected = server.retrieve(k=50, features=told, channels=["two_tower"])["items"]
    put(server, f"users/{stranger}", features=told)
    assert server.retrieve(k=50, user_id=stranger, channels=["two_tower"])["items"] == expected
    before = server.items(k=50, user_id=known, channels=["two_tower"])
    put(server, f"users/{known}", features=told)
    assert server.items(k=50, user_id=known, channels=["two_tower"]) != before
    assert "no feature" in put(server, f"users/{known}", status=422, features={"colour": 1})["error"]


def test_a_deleted_user_is_a_stranger_whose_clicks_are_forgotten(server, start, own_world: Settings) -> None:
    known, one = a_user(server), server.items(k=1)[0]
    stranger = server.retrieve(k=K, exclude="none")["items"]
    server.event("click", known, item_id=one)
    assert server.retrieve(k=K, user_id=known, exclude="none")["items"] != stranger
    delete(server, f"users/{known}")
    assert server.users.get(known) == Recent()
    assert server.retrieve(k=K, user_id=known, exclude="none")["items"] == stranger
    server.close()
    again = start(own_world)
    assert again.retrieve(k=K, user_id=known, exclude="none")["items"] == stranger
    again.event("click", known, item_id=one)
    assert len(again.users.get(known).clicks) == 1


def test_events_of_the_servers_own_types_are_refused(server) -> None:
    for kind in ("user", "item"):
        assert "PUT or DELETE" in server.event(kind, a_user(server), status=422, deleted=True)["error"]
    assert "are the log's own" in server.event("erased", a_user(server), status=422)["error"]


def learn(server, seq: int, follows: str | None = None) -> str:
    version, width = server.version, server.version.item_vectors.shape[1]
    row = int(version.users.features[c.USER_ID][version.users.positions.find(pa.array([a_user(server)]))[0]])
    delta = Delta(
        version.id,
        seq,
        server.now_ms - 5000,
        {c.USER_ID: Rows(np.array([row]), np.full((1, width), seq, np.float32))},
        {},
        pa.array([], version.item_ids.type),
        np.zeros((0, width), np.float32),
        {},
    )
    return write_delta(version.path.parent.parent / "deltas", delta, follows or digest_of(version.path))


def test_deltas_are_taken_up_in_order_and_shown(server) -> None:
    user = a_user(server)
    held = server.version
    before = server.items(k=K, user_id=user, channels=["two_tower"])
    digest = learn(server, 1)
    learn(server, 3, "of a delta that is not there yet")
    server.snapshots.reload()
    answer = server.retrieve(k=K, user_id=user, channels=["two_tower"])
    assert answer["delta_seq"] == 1
    assert [item["item_id"] for item in answer["items"]] != before
    assert (held.delta_seq, held.id) == (0, server.version.id)
    told = server.http.get("/v1/version").json()
    assert (told["delta_seq"], told["watermark_ms"], told["refused_delta"]) == (1, server.now_ms - 5000, None)
    assert server.metric("twotower_delta_seq") == 1
    assert server.metric("twotower_freshness_seconds") == 5
    learn(server, 2, digest)
    server.snapshots.reload()
    assert server.version.delta_seq == 2  # 3 does not follow 2
    assert server.http.get("/v1/version").json()["refused_delta"]["delta_seq"] == 3


def test_a_delta_of_another_base_and_a_damaged_one_are_refused_visibly(server) -> None:
    learn(server, 1, "another")
    server.snapshots.reload()
    told = server.http.get("/v1/version").json()
    assert told["delta_seq"] == 0
    assert "another base" in told["refused_delta"]["problem"]
    assert server.metric("twotower_delta_refused") == 1
    folder = delta_folder(server.version.path.parent.parent / "deltas", server.version.id, 1)
    folder.rename(folder.with_name(".gone"))
    learn(server, 1)
    server.snapshots.forget_refusal()
    server.snapshots.reload()
    assert server.version.delta_seq == 1
    assert server.metric("twotower_delta_refused") == 0


def test_a_new_replica_begins_with_the_version_and_its_deltas(server, start, own_world: Settings) -> None:
    learn(server, 2, learn(server, 1))
    server.snapshots.reload()
    answer = server.retrieve(k=K, user_id=a_user(server))
    server.close()
    again = start(own_world)
    assert again.retrieve(k=K, user_id=a_user(again)) == answer
