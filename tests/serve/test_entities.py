from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Settings
from twotower.features.vocabulary import UNKNOWN
from twotower.logs import Event, payload
from twotower.logs.events import CATALOGUE
from twotower.publish import overlay
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
        {"shards": {}, "log": {}},
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


def odd_put(server, one: Any, status: int, **features: Any) -> str:
    response = server.http.request("PUT", f"/v1/items/{one}", json={"features": features})
    assert response.status_code == status, response.text
    return str(response.json().get("error"))


@pytest.mark.parametrize("one", [2**63, -(2**63) - 1, "007", "1.0", "x" * 600])
def test_an_id_that_items_cannot_have_is_refused_and_not_logged(odd_server, one: Any) -> None:
    for method in ("PUT", "DELETE"):
        response = odd_server.http.request(method, f"/v1/items/{one}", json={"features": {}})
        assert (response.status_code, list(response.json())) == (422, ["error"])
    assert sum(odd_server.log.ends()) == 0


def test_an_id_that_is_too_long_is_refused_and_not_logged(server) -> None:
    for path in ("items/" + "x" * 513, "items/" + "é" * 257):
        assert "at most 512 are allowed" in put(server, path, status=422, features={})["error"]
    assert sum(server.log.ends()) == 0


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"labels": "rain"}, "labels = 'rain', where list"),
        ({"labels": ["a", 1]}, "labels = ['a', 1]"),
        ({"labels": [["a"]]}, "holds ['a']"),
        ({"labels": ["a"] * 5000}, "a list of 5000 entries"),
        ({"labels": {"a": 1}}, "holds {'a': 1}"),
        ({"kind": ["a"]}, "kind = ['a'], where string is expected"),
        ({"kind": "x" * 20_000}, "has 20000 bytes"),
        ({"price": "dear"}, "price = 'dear', where double is expected"),
        ({"fresh": 1}, "fresh = 1, where bool is expected"),
        ({"added": 10**18}, "added = 1000000000000000000, where timestamp"),
        ({"colour": 1}, "no attribute colour"),
    ],
)
def test_features_of_another_type_are_refused_and_not_logged(odd_server, features: Any, message: str) -> None:
    assert message in odd_put(odd_server, 50, 422, **features)
    assert sum(odd_server.log.ends()) == 0


def test_what_a_log_says_that_cannot_be_used_is_set_aside_and_stops_nobody(
    odd_server, start, odd_world, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def event(number: int, body: dict[str, Any]) -> Event:
        return Event(f"by hand {number}", "item", CATALOGUE, odd_server.now_ms, body=body)

    bodies = [
        {"item_id": 2**63, "features": {}},
        {"item_id": "a word", "features": {}},
        {"item_id": None, "features": {}},
        {"features": {}},
        {"item_id": 60, "features": {"labels": "rain", "kind": {"a": [1]}, "price": "dear", "size": [[[]]]}},
        {"item_id": 61, "features": "none", "available": "no"},
        {"item_id": "another", "deleted": True},
        {"item_id": 2**64 - 1, "deleted": True},
    ]
    with monkeypatch.context() as unchecked:  # as an earlier release, or somebody else's producer, writes
        unchecked.setattr(payload, "check_event", lambda *_: None)
        odd_server.log.append([event(number, body) for number, body in enumerate(bodies)])

    def works(server) -> None:
        assert odd_put(server, 50, 200, labels=["a"]) == "None"
        assert {50, 60} <= set(server.items(k=100, exclude="none"))
        assert server.version.attributes.at(server.version.items.find(pa.array([60])), ["labels"]) == [{"labels": None}]
        assert server.http.request("DELETE", "/v1/items/50").status_code == 200
        assert 50 not in server.items(k=100, exclude="none")
        assert server.items(k=5, user_id="user/3")
        assert server.snapshots.reload() == server.version.id
        assert server.metric('twotower_entities_set_aside{kind="item"}') == 3
        assert server.http.get("/readyz").status_code == 200

    odd_server.users.catch_up()
    odd_server.snapshots.refresh()
    works(odd_server)
    for reason in ("bad_number", "malformed"):
        assert odd_server.metric(f'twotower_events_passed_over_total{{reason="{reason}"}}') == 2
    odd_server.close()
    caplog.clear()
    works(start(odd_world))
    assert sum("'a word'" in record.getMessage() for record in caplog.records) == 1


def test_a_user_who_was_put_for_another_version_is_answered(server, caplog) -> None:
    user = a_user(server)
    told = {"age": {"a": 1}, "gender": "f", "colour": 3}
    server.log.append([Event("by hand", "user", user, server.now_ms, body={"features": told})])
    server.users.catch_up()
    server.snapshots.refresh()
    for _ in range(2):
        assert len(server.items(user_id=user, k=20)) == 20
    assert server.metric('twotower_entities_set_aside{kind="user"}') == 1
    assert sum("age counts as missing" in record.getMessage() for record in caplog.records) == 1
    assert put(server, f"users/{user}", features={"gender": "f"})["user_id"] == user


def test_an_item_that_was_deleted_and_put_again_is_another_one_in_every_answer(server) -> None:
    user, one = a_user(server), server.items(k=1, channels=["popular"], exclude="none")[0]
    attributes = features(server, int(server.version.items.find(pa.array([one]))[0]))
    server.event("click", user, item_id=one)
    server.event("impression", user, items=[one])
    server.now_ms += 1000
    delete(server, f"items/{one}")
    assert server.http.get(f"/v1/items/{one}/similar").status_code == 404
    assert "is new" in put(server, f"items/{one}", status=422, available=True)["error"]
    server.now_ms += 1000
    put(server, f"items/{one}", features=attributes)
    assert one in server.items(k=K, user_id=user)  # neither clicked nor shown
    for channel in ("popular", "item_cf"):
        assert one not in server.items(k=K, user_id=user, channels=[channel], exclude="none")
    assert one in server.items(k=K, user_id=user, channels=["two_tower"])
    similar = server.http.get(f"/v1/items/{one}/similar").json()
    assert similar["channels"]["item_cf"] == []
    assert similar["items"]
    assert one not in [item["item_id"] for item in similar["items"]]
    told = server.http.post("/v1/explain", json={"user_id": user, "item_id": one}).json()
    assert (told["filtered"], told["channels"]["popular"]["rank"]) == ([], None)
    server.now_ms += 1000
    server.event("impression", user, items=[one])
    assert one not in server.items(k=K, user_id=user)
    assert server.items(k=K, exclude="none").count(one) == 1


def test_every_route_answers_for_items_that_were_put_deleted_hidden_or_say_nothing(server) -> None:
    known = [server.version.item_ids[row].as_py() for row in (3, 4)]
    put(server, "items/bare", features={})
    put(server, "items/full", features=features(server, 5))
    put(server, "items/hidden", features=features(server, 5), available=False)
    delete(server, f"items/{known[0]}")
    put(server, f"items/{known[1]}", available=False)
    expected = {"bare": 200, "full": 200, "hidden": 200, known[0]: 404, known[1]: 200, "never": 404}
    for one, status in expected.items():
        assert server.http.get(f"/v1/items/{one}/similar").status_code == status, one
        told = server.http.post("/v1/explain", json={"user_id": a_user(server), "item_id": one})
        assert told.status_code == 200
        assert (told.json()["outcome"] == "unknown_item") == (status == 404)
        assert told.json()["failed_channels"] == []
    answered = server.retrieve(k=K, user_id=a_user(server), exclude="none")
    assert answered["failed_channels"] == []
    assert {item["item_id"] for item in answered["items"]} & expected.keys() == {"bare", "full"}


def test_the_next_put_touches_no_item_that_was_put_before(server, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    encode = overlay.item_columns

    def counting(base: Any, one: Any, *rest: Any) -> Any:
        made.append(one)
        return encode(base, one, *rest)

    monkeypatch.setattr(overlay, "item_columns", counting)
    kept, largest = 0, None
    for number in range(40):
        put(server, f"items/zz {number:02}", features=features(server, number))
        assert made.pop() == f"zz {number:02}"
        assert made == []
        pieces = server.version.attributes._put
        assert len(pieces) <= 2
        kept, largest = kept + (pieces[0] is largest), pieces[0]
    assert kept >= 14  # most of what was put is not copied by every put
    before = server.version
    put(server, "items/zz 40", features={})
    assert (len(before.items), len(server.version.items)) == (340, 341)
    assert before.items.find(pa.array(["zz 40"])).tolist() == [-1]
    assert before.items.ids.to_pylist()[-1] == "zz 39"


def test_recommend_says_which_delta_is_served_and_a_retry_says_the_same(server) -> None:
    digest = learn(server, 1)
    server.snapshots.reload()
    body = {"user_id": a_user(server), "request_id": "r"}
    first = server.http.post("/v1/recommend", json=body).json()
    learn(server, 2, digest)
    server.snapshots.reload()
    again = server.http.post("/v1/recommend", json=body).json()
    assert (first["delta_seq"], server.version.delta_seq) == (1, 2)
    assert again == first
