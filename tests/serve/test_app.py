import asyncio
import json
import threading
from collections.abc import Callable

import anyio.to_thread
import httpx
import numpy as np
import pytest

from twotower.channels.popular import Popular
from twotower.config import Settings
from twotower.logs import EventLogError
from twotower.pipeline.places import places
from twotower.publish.version import Version
from twotower.schema.errors import DataError
from twotower.schema.limits import MAX_BODY_BYTES, MAX_EVENTS_BODY_BYTES
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import Recent

DAY_MS = 86_400_000


def known_user(version: Version, least: int = 5) -> int:
    """A user with some clicks."""
    row = int(np.flatnonzero(np.diff(version.clicks.indptr) >= least)[0])
    return version.users.ids[row].as_py()


def clicked(version: Version, user_id: int) -> set[str]:
    row = version.users.ids.to_pylist().index(user_id)
    indptr = version.clicks.indptr
    return set(version.item_ids.take(version.clicks.item_row[indptr[row] : indptr[row + 1]]).to_pylist())


def test_an_answer_has_what_the_contract_names(server) -> None:
    answer = server.retrieve(user_id=known_user(server.version), k=7)
    assert answer.keys() == {"version", "delta_seq", "items", "failed_channels"}
    assert answer["version"] == server.version.id
    assert (answer["delta_seq"], answer["failed_channels"]) == (0, [])
    assert len(answer["items"]) == 7
    assert all(item.keys() == {"item_id", "score", "channels"} for item in answer["items"])
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert {name for item in answer["items"] for name in item["channels"]} <= {"two_tower", "item_cf", "popular"}


def test_one_channel_keeps_its_own_scores_and_order(server) -> None:
    user_id = known_user(server.version)
    answer = server.retrieve(user_id=user_id, k=5, channels=["two_tower"])
    row = server.version.users.ids.to_pylist().index(user_id)
    clicks = server.version.clicks.items
    offline = server.version.two_tower.retrieve(server.version.queries(np.array([row]), None, clicks), 5)
    assert [item["item_id"] for item in answer["items"]] == server.version.item_ids.take(offline.rows[0]).to_pylist()
    np.testing.assert_allclose([item["score"] for item in answer["items"]], offline.scores[0], rtol=1e-5)
    assert all(item["channels"] == ["two_tower"] for item in answer["items"])


def test_someone_unknown_is_answered_from_features_and_different_ones_get_different_answers(server) -> None:
    def features(age: int, gender: str) -> dict:
        return {"age": age, "gender": gender}

    genders = server.version.features.user_columns
    assert {"age", "gender"} <= {feature.name for feature in genders}
    young = server.retrieve(features=features(18, "f"), k=50, channels=["two_tower"])
    old = server.retrieve(features=features(70, "m"), k=50, channels=["two_tower"])
    assert young["items"] != old["items"]
    same = server.retrieve(user_id=999_999_999, features=features(18, "f"), k=50, channels=["two_tower"])
    assert same["items"] == young["items"]


def test_someone_of_whom_nothing_is_known_is_answered(server) -> None:
    nothing = server.retrieve(k=10)
    assert len(nothing["items"]) == 10
    assert server.retrieve(user_id=999_999_999, k=10)["items"] == nothing["items"]
    assert len(server.retrieve()["items"]) == 100


def test_given_features_replace_the_stored_ones_and_null_is_a_missing_value(server) -> None:
    user_id = known_user(server.version)

    def vector_answer(**body: object) -> list:
        return server.retrieve(user_id=user_id, k=50, channels=["two_tower"], **body)["items"]

    stored = vector_answer()
    assert vector_answer(features={"age": 95}) != stored
    assert vector_answer(features={"age": None}) != stored
    assert vector_answer(features={}) == stored
    assert vector_answer(features={"city": "never seen", "device": "never seen"}) != stored


def test_context_changes_the_answer(server) -> None:
    answers = [server.retrieve(k=50, context=context)["items"] for context in ({}, {"hour": 3}, {"hour": 21})]
    assert answers[1] != answers[2]
    assert server.retrieve(k=50, context={"hour": None})["items"] == answers[0]


def test_a_click_counts_from_the_next_request_on_and_is_not_offered_again(server) -> None:
    user_id = known_user(server.version)
    before = server.retrieve(user_id=user_id, k=20)
    first = before["items"][0]["item_id"]
    assert server.event("click", user_id, item_id=first) == {"accepted": 1, "duplicates": 0}
    after = server.retrieve(user_id=user_id, k=20)
    assert first not in [item["item_id"] for item in after["items"]]
    vectors = [
        server.retrieve(user_id=user_id, k=1000, exclude="none", channels=["two_tower"])["items"],
        server.retrieve(k=1000, exclude="none", channels=["two_tower"])["items"],
    ]
    assert vectors[0] != vectors[1]
    assert first in [item["item_id"] for item in vectors[0]]


def test_clicks_give_a_stranger_a_history(server) -> None:
    stranger = 123_456_789
    before = server.retrieve(user_id=stranger, k=20)
    item_cf = server.retrieve(user_id=stranger, k=20, channels=["item_cf"])
    assert item_cf["items"] == []
    server.event("click", stranger, item_id=before["items"][0]["item_id"])
    after = server.retrieve(user_id=stranger, k=20)
    assert {name for item in after["items"] for name in item["channels"]} >= {"two_tower", "item_cf", "popular"}


def test_clicks_up_to_the_watermark_are_those_of_the_version(server) -> None:
    user_id = known_user(server.version)
    offered = server.items(user_id=user_id, k=5)
    server.now_ms = server.version.watermark_ms
    server.event("click", user_id, item_id=offered[0])
    server.now_ms += 1
    server.event("click", user_id, item_id=offered[1])
    assert offered[0] in server.items(user_id=user_id, k=300)
    assert offered[1] not in server.items(user_id=user_id, k=300)


def test_impressions_are_left_out_for_the_window_and_clicks_for_ever(server) -> None:
    user_id = known_user(server.version)
    shown, pressed, packed, dropped = server.items(user_id=user_id, k=4)
    server.event("impression", user_id, items=[shown])
    server.event("click", user_id, item_id=pressed)
    server.event("request", user_id, items=[packed, dropped], outcomes=["impressed", "rank_rejected"])
    answered = server.items(user_id=user_id, k=300)
    assert {shown, pressed, packed, dropped} & set(answered) == {dropped}
    assert {shown, pressed, packed} & set(server.items(user_id=user_id, k=300, exclude="clicked")) == {shown, packed}
    assert {shown, pressed, packed} <= set(server.items(user_id=user_id, k=300, exclude="none"))
    server.now_ms += DAY_MS
    assert not {shown, packed} & set(server.items(user_id=user_id, k=300))
    server.now_ms += 1
    assert {shown, pressed, packed} & set(server.items(user_id=user_id, k=300)) == {shown, packed}


def test_clicks_of_the_version_are_never_offered_unless_asked_for(server) -> None:
    user_id = known_user(server.version)
    assert not clicked(server.version, user_id) & set(server.items(user_id=user_id, k=300))
    assert clicked(server.version, user_id) <= set(server.items(user_id=user_id, k=300, exclude="none"))


def test_an_event_of_an_item_that_is_not_in_the_catalogue_is_logged_and_changes_no_answer(server) -> None:
    user_id = known_user(server.version)
    before = server.retrieve(user_id=user_id, k=20)
    assert server.event("click", user_id, item_id="not published yet")["accepted"] == 1
    assert server.retrieve(user_id=user_id, k=20) == before


def test_a_retry_is_a_duplicate_and_other_types_are_only_logged(server) -> None:
    event = {"event_id": "e", "type": "purchase", "user_id": 1, "ts_ms": server.now_ms, "anything": {"deep": [1]}}
    first = server.http.post("/v1/events", json={"events": [event, event]}).json()
    again = server.http.post("/v1/events", json={"events": [event]}).json()
    assert (first, again) == ({"accepted": 2, "duplicates": 1}, {"accepted": 1, "duplicates": 1})
    assert server.metric('twotower_events_total{result="accepted"}') == 1
    assert server.metric('twotower_events_total{result="duplicate"}') == 2


def test_filters_keep_items_with_one_of_the_values_of_every_attribute(server) -> None:
    attributes = {row["item_id"]: row for row in server.version.catalogue.to_pylist()}
    category = next(iter(attributes.values()))["category"]
    expected = {item for item, row in attributes.items() if row["category"] == category}
    assert set(server.items(k=300, exclude="none", filters={"category": [category]})) == expected
    author = attributes[min(expected)]["author"]
    both = {item for item in expected if attributes[item]["author"] == author}
    assert set(server.items(k=300, filters={"category": [category], "author": [author]})) == both
    assert server.items(k=300, filters={"category": []}) == []
    assert server.items(k=300, filters={"category": ["no such"]}) == []


def test_filters_take_missing_values_booleans_and_whole_numbers(odd_server) -> None:
    rows = odd_server.version.catalogue.to_pylist()

    def expected(attribute: str, *values: object) -> set[int]:
        return {row["item_id"] for row in rows if row[attribute] in values}

    def found(**filters: list) -> set[int]:
        return set(odd_server.items(k=300, filters=filters))

    assert found(fresh=[True]) == expected("fresh", True)
    assert found(fresh=[False, None]) == expected("fresh", False, None)
    assert found(kind=["kind 1", None]) == expected("kind", "kind 1", None)
    assert found(size=[2]) == found(size=[2.0]) == expected("size", 2.0)
    assert found(item_id=[3, 5]) == {3, 5}
    assert found(size=[None]) == {row["item_id"] for row in rows if row["size"] != row["size"]}


def test_filters_deny_values_and_allow_others(odd_server) -> None:
    rows = odd_server.version.catalogue.to_pylist()
    everything = {row["item_id"] for row in rows}

    def having(attribute: str, *values: object) -> set[int]:
        return {row["item_id"] for row in rows if row[attribute] in values}

    def found(**filters: dict) -> set[int]:
        return set(odd_server.items(k=300, exclude="none", filters=filters))

    assert found(kind={"deny": ["kind 1"]}) == everything - having("kind", "kind 1")  # those without a kind remain
    assert found(kind={"deny": ["kind 1", None]}) == having("kind", "kind 0", "kind 2")
    assert found(fresh={"deny": [True]}) == having("fresh", False, None)
    assert found(size={"allow": [1, 2], "deny": [2]}) == having("size", 1.0)
    assert found(kind={}) == found(kind={"deny": []}) == found(kind={"allow": None}) == everything
    assert found(kind={"allow": []}) == set()
    assert found(kind={"deny": ["kind 1"]}, fresh={"allow": [True]}) == having("fresh", True) - having("kind", "kind 1")


def test_a_list_has_each_of_its_values(odd_server) -> None:
    labels = {row["item_id"]: row["labels"] for row in odd_server.version.catalogue.to_pylist()}

    def found(allowed: list | None, denied: list) -> set[int]:
        filters = {"labels": {"allow": allowed, "deny": denied}}
        return set(odd_server.items(k=300, exclude="none", filters=filters))

    assert found(["b"], []) == {item for item, has in labels.items() if "b" in has}
    assert found(["a", "b"], []) == {item for item, has in labels.items() if has}
    assert found(["a"], ["b"]) == {item for item, has in labels.items() if has == ["a"]}
    assert found([None], []) == found(None, ["a"]) == {item for item, has in labels.items() if not has}


def test_an_attribute_that_a_feature_splits_has_each_of_its_parts(server) -> None:
    tags = {row["item_id"]: row["tags"].split("|") for row in server.version.catalogue.to_pylist()}
    tag = next(iter(tags.values()))[0]
    expected = {item for item, has in tags.items() if tag in has}
    assert set(server.items(k=300, exclude="none", filters={"tags": [tag]})) == expected
    assert len(expected) < len(tags)


def test_every_channel_respects_filters_and_exclusions(server) -> None:
    user_id = known_user(server.version)
    categories = {row["item_id"]: row["category"] for row in server.version.catalogue.to_pylist()}
    denied = next(iter(categories.values()))
    for channel in server.version.channels:
        before = server.items(user_id=user_id, k=300, channels=[channel])
        server.event("impression", user_id, items=before[:1])
        after = server.items(user_id=user_id, k=300, channels=[channel], filters={"category": {"deny": [denied]}})
        assert set(after) == {item for item in before[1:] if categories[item] != denied}, channel


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"labels": [1]}, "filters: labels is of type list"),
        ({"kind": {"deny": [1]}}, "filters: kind is of type dictionary"),
        ({"kind": {"allow": ["kind 1"], "deny": [1]}}, "filters: kind is of type dictionary"),
        ({"colour": {"deny": ["red"]}}, "items have no attribute colour"),
        ({"kind": {"forbid": ["kind 1"]}}, "body.filters.kind.forbid: "),
        ({"kind": {"allow": "kind 1"}}, "body.filters.kind.allow: "),
        ({"added": [5]}, "added is of type timestamp"),
        ({"price": [1.5]}, "price holds numbers with a fraction, and a filter compares for equality"),
        ({"item_id": list(range(10_001))}, "10001 values in all, at most 10000 are allowed"),
        ({"size": [1.5]}, "filters: size is of type double, not [1.5]"),
        ({"item_id": ["3"]}, "filters: item_id is of type int64, not ['3']"),
        ({"item_id": [2**70]}, "filters: item_id is of type int64"),
        ({"kind": [1]}, "filters: kind is of type dictionary"),
        ({"kind": [{"a": 1}]}, "filters: kind is of type dictionary"),
        ({"kind": ["kind 1", 1]}, "filters: kind is of type dictionary"),
        ({"colour": ["red"]}, "items have no attribute colour; they have item_id, labels"),
    ],
)
def test_filters_that_fit_no_attribute_are_refused(odd_server, filters: dict, message: str) -> None:
    response = odd_server.http.post("/v1/retrieve", json={"filters": filters})
    assert response.status_code == 422
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"user_id": "7"}, "user_id '7' is a str: the ids of users are int64"),
        ({"user_id": 1.5}, "user_id"),
        ({"user_id": True}, "user_id"),
        ({"user_id": [1]}, "user_id"),
        ({"user_id": 2**63}, "user_id"),
        ({"k": 0}, "body.k: "),
        ({"k": 10_001}, "body.k: "),
        ({"k": "many"}, "body.k: "),
        ({"k": None}, "body.k: "),
        ({"exclude": "seen"}, "exclude = 'seen': it is one of clicked, impressed, none"),
        ({"channels": ["two_tower", "mind"]}, "has no channel mind; it has two_tower, item_cf, popular"),
        ({"channels": "two_tower"}, "body.channels: "),
        ({"features": {"height": 3}}, "features: height is no feature of this model; its features are age"),
        ({"features": {"height": None}}, "features: height is no feature of this model"),
        ({"features": {"user_id": 5}}, "features: user_id is no feature"),
        ({"features": {"history": []}}, "features: history is no feature"),
        ({"features": {"age": "old"}}, "age is of type string, where numbers are expected"),
        ({"features": {"gender": 1}}, "type int64 where string is known"),
        ({"features": {"gender": {"a": 1}}}, "gender"),
        ({"context": {"weather": "rain"}}, "context: weather is no feature of this model; its features are hour"),
        ({"filters": {"category": "x"}}, "body.filters.category: "),
        ({"item_id": 3}, "body.item_id: "),
        ([], "body: "),
        ({"user_id": "x" * 513}, "at most 512 bytes are allowed"),
        ({"features": {"gender": "x" * 20_000}}, "has 20000 bytes, at most 16384 are allowed"),
        ({"features": {"age": [1] * 5000}}, "features: age: a list of 5000 entries"),
        ({"features": {"age": 2**64}}, "does not fit int64"),
        ({"features": {"x" * 10_000: 1}}, "xxx... is no feature of this model"),
        ({"channels": ["x" * 10_000]}, "xxx...; it has two_tower"),
        ({"exclude": "x" * 10_000}, "xxx...': it is one of"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_with_a_sentence(server, body: object, message: str) -> None:
    response = server.http.post("/v1/retrieve", json=body)
    assert response.status_code == 422, response.text
    assert list(response.json()) == ["error"]
    assert message in response.json()["error"]
    assert len(response.content) < 1200


def test_a_batch_is_answered_as_its_requests_alone_from_one_version(server, monkeypatch) -> None:
    requests = [{"user_id": known_user(server.version), "k": 7}, {"k": 3, "context": {"hour": 20}}, {}]
    alone = [server.retrieve(**request) for request in requests]
    asked = []
    monkeypatch.setattr(Snapshots, "version", property(lambda snapshots: asked.append(0) or snapshots._serving.version))
    response = server.http.post("/v1/retrieve/batch", json={"requests": requests})
    assert response.json() == {"answers": alone}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "body.requests: List should have at least 1 item"),
        ([{"k": 1}] * 1_001, "body.requests: List should have at most 1000 items"),
        ([{"k": 10_000}] * 11, "110000 candidates in all, at most 100000 are allowed"),
        ([{}, {"k": 0}], "body.requests.1.k: Input should be greater than or equal to 1"),
        ([{}, {"nothing": 1}], "body.requests.1.nothing: Extra inputs are not permitted"),
        ([{}, {"channels": ["none"]}], "requests[1]: version "),
        ([{}, {}, {"user_id": "x"}], "requests[2]: user_id 'x' is a str"),
    ],
)
def test_a_batch_with_a_wrong_request_names_its_position(server, requests: list, message: str) -> None:
    response = server.http.post("/v1/retrieve/batch", json={"requests": requests})
    assert response.status_code == 422, response.text
    assert message in response.json()["error"]


def test_a_batch_that_no_channel_answers_names_the_position(server, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Popular, "retrieve", fail)
    response = server.http.post("/v1/retrieve/batch", json={"requests": [{"channels": ["popular"]}]})
    assert response.status_code == 503
    assert response.json()["error"].startswith("requests[0]: every channel failed: popular")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b'{"k": NaN}',
        b'{"user_id": "\\ud800"}',
        b'{"channels": ["\\ud800"]}',
        b'{"k": ' + b"9" * 5000,
        b'{"features": {"age": NaN}}',
        b'{"features": {"age": -Infinity}}',
        b'{"features": {"age": 1e309}}',
        b'{"k": 3, "k": 4}',
        b'{"context": ' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"context": ' + b"[" * 100_000,
        b'{"filters": {"\\ud800": []}}',
        b'\xef\xbb\xbf{"k": 3}',
        '{"k": 3}'.encode("utf-16"),
    ],
)
def test_what_is_no_json_is_the_senders_fault(server, content: bytes) -> None:
    response = server.http.post("/v1/retrieve", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert list(response.json()) == ["error"]


def test_a_body_that_is_too_large_is_refused(server) -> None:
    for path, most in [("/v1/events", MAX_EVENTS_BODY_BYTES), ("/v1/retrieve", MAX_BODY_BYTES)]:
        answer = server.http.post(path, content=b" " * (most + 1))
        assert answer.status_code == 413
        assert f"more than {most} bytes" in answer.json()["error"]


def test_nan_is_never_in_an_answer(server) -> None:
    huge = server.retrieve(k=10_000, exclude="none")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    text = server.http.post("/v1/retrieve", json={"k": 10_000, "exclude": "none"}).text
    assert json.loads(text, parse_constant=refuse) == huge
    assert len(huge["items"]) == len(server.version.item_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ts_ms": 1_800_000_000}, "it looks like seconds: multiply by 1000"),
        ({"ts_ms": 1_800_000_000_000_000}, "it looks like microseconds"),
        ({"ts_ms": "now"}, "an integer of milliseconds is expected"),
        ({"user_id": "7"}, "user_id '7', but the ids of users are int64"),
        ({"user_id": None}, "user_id=None"),
        ({"event_id": ""}, "empty event_id"),
        ({"type": None}, "type=None"),
        ({"item_id": 3}, "item 3, but the ids of items are string"),
        ({"item_id": None}, "item_id holds None: an id is an integer or a string"),
        ({"items": "abc"}, "items is of type str: a list is required"),
        ({"items": ["a", 3]}, "item 3, but"),
        ({"type": "request", "items": ["a"], "outcomes": []}, "one entry for each of the 1 items"),
        ({"type": "request", "items": ["a"], "outcomes": ["bought"]}, "outcome 'bought': it is one of"),
        ({"ts_ms": 1_893_456_000_000}, "ahead of the log's clock"),
        ({"item_id": ""}, "item_id holds an empty id"),
        ({"item_id": "a", "items": ["b"]}, "has both item_id and items"),
        ({"event_id": "x" * 513}, "has 513 bytes, at most 512 are allowed"),
        ({"item_id": "x" * 513}, "has 513 bytes, at most 512 are allowed"),
        ({"items": ["a"] * 10_001}, "items has 10001 entries, at most 10000 are allowed"),
        ({"type": "request", "history": ["a"] * 1_001}, "history has 1001 entries, at most 1000 are allowed"),
        ({"weight": 1e29}, "weight=1e+29: a number from 0 to 1000 is required"),
        ({"weight": "heavy"}, "weight='heavy': a number from 0 to 1000 is required"),
        ({"context": {"scene": "x" * 2000}}, "context takes 2012 bytes, at most 1024 are allowed"),
        ({"features": {"bio": "x" * 20_000}}, "has 20000 bytes, at most 16384 are allowed"),
        ({"note": [[[[[1]]]]]}, "more than 4 lists or objects within each other"),
        ({"size": 2**63}, "does not fit int64"),
        ({"logged_ms": 1}, "names logged_ms, which only the log writes"),
        ({"type": "unusable"}, "the log's own"),
    ],
)
def test_events_that_no_one_could_use_are_refused_and_none_of_the_batch_is_logged(
    server, change: dict, message: str
) -> None:
    good = {"event_id": "e", "type": "click", "user_id": 1, "ts_ms": server.now_ms, "item_id": "a"}
    named = {} if "items" in change else {"item_id": "a"}
    bad = {**{name: value for name, value in good.items() if name != "item_id"}, **named, **change}
    response = server.http.post("/v1/events", json={"events": [good, bad]})
    assert response.status_code == 422, response.text
    assert response.json()["error"].startswith("events[1]: ")
    assert message in response.json()["error"]
    assert sum(server.log.ends()) == 0


@pytest.mark.parametrize("events", [[], [3], "e", None, [{}] * 10_001])
def test_a_batch_of_events_is_a_list_of_1_to_10000_objects(server, events: object) -> None:
    response = server.http.post("/v1/events", json={"events": events})
    assert response.status_code == 422
    assert "body.events" in response.json()["error"]


def test_a_request_beyond_the_clock_is_refused_and_nothing_is_logged(server) -> None:
    body = {"user_id": known_user(server.version), "ts_ms": server.now_ms + 400 * 86_400_000}
    for route in ("recommend", "explain"):
        more = {"item_id": "i000001"} if route == "explain" else {}
        response = server.http.post(f"/v1/{route}", json={**body, **more})
        assert response.status_code == 422
        assert "ahead of the log's clock" in response.json()["error"]
    assert sum(server.log.ends()) == 0


@pytest.mark.parametrize("user_id", ["@erased", "@catalogue"])
def test_a_user_of_the_logs_own_is_answered_nothing(odd_server, user_id: str) -> None:
    for route in ("retrieve", "recommend", "explain"):
        more = {"item_id": 3} if route == "explain" else {}
        response = odd_server.http.post(f"/v1/{route}", json={"user_id": user_id, **more})
        assert (response.status_code, "the log's own" in response.text) == (422, True)


def test_impressions_of_a_clock_that_was_ahead_do_not_count_once_it_is_right(server) -> None:
    user_id, years_ms = known_user(server.version), 10 * 365 * 86_400_000
    before = server.items(user_id=user_id, k=10, exclude="impressed")
    server.now_ms += years_ms
    server.event("impression", user_id, items=before)
    assert not set(before) & set(server.items(user_id=user_id, k=10, exclude="impressed"))
    server.now_ms -= years_ms
    assert server.items(user_id=user_id, k=10, exclude="impressed") == before


def test_a_click_of_nothing_is_refused(server) -> None:
    assert "click of nothing" in server.event("click", 1, status=422)["error"]


def test_a_log_that_cannot_write_is_a_503_and_nothing_is_acknowledged(server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(events: object) -> None:
        raise EventLogError("no space left on device")

    monkeypatch.setattr(server.log, "append", full)
    assert server.event("click", 1, status=503, item_id="a") == {"error": "no space left on device"}
    assert server.metric('twotower_requests_total{route="/v1/events",status="503"}') == 1


def test_a_log_that_cannot_be_read_is_a_503_of_the_server(server, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise DataError("damaged at byte 5")

    monkeypatch.setattr(server.log, "read", damaged)
    assert "the events are in the log, but" in server.event("click", 1, status=503, item_id="a")["error"]


def test_a_channel_that_fails_is_named_and_the_others_answer(server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Popular, "retrieve", broken)
    answer = server.retrieve(user_id=known_user(server.version), k=10)
    assert answer["failed_channels"] == ["popular"]
    assert len(answer["items"]) == 10
    response = server.http.post("/v1/retrieve", json={"channels": ["popular"]})
    assert (response.status_code, response.json()) == (503, {"error": "every channel failed: popular"})
    assert server.metric('twotower_failed_channels_total{channel="popular",reason="error"}') == 2


def test_a_defect_is_a_500_with_a_sentence_and_is_counted(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.users, "get", lambda _: 1 / 0)
    response = server.http.post("/v1/retrieve", json={"user_id": 1})
    assert (response.status_code, list(response.json())) == (500, ["error"])
    assert server.metric('twotower_requests_total{route="/v1/retrieve",status="500"}') == 1


def test_similar_items_are_the_nearest_vectors_without_the_item_itself(server) -> None:
    item_id = server.version.item_ids[5].as_py()
    answer = server.http.get(f"/v1/items/{item_id}/similar", params={"k": 3}).json()
    scores = server.version.item_vectors @ server.version.item_vectors[5]
    scores[5] = -np.inf
    assert [item["item_id"] for item in answer["items"]] == server.version.item_ids.take(
        np.argsort(-scores, kind="stable")[:3]
    ).to_pylist()
    assert answer["version"] == server.version.id
    assert [item["channels"] for item in answer["items"]] == [["two_tower"]] * 3


def test_similar_items_come_from_every_channel_that_can_say(server) -> None:
    row = int(np.argmax(np.bincount(server.version.clicks.item_row)))
    item_id = server.version.item_ids[row].as_py()
    answer = server.http.get(f"/v1/items/{item_id}/similar", params={"k": 4}).json()
    assert list(answer["channels"]) == ["two_tower", "item_cf"]
    two_tower, item_cf = answer["channels"].values()
    assert two_tower == [{key: item[key] for key in ("item_id", "score")} for item in answer["items"]]
    table = server.version.channels["item_cf"]._nearest.lists
    nearest = table.rows[table.indptr[row] : table.indptr[row + 1]]
    assert [one["item_id"] for one in item_cf] == server.version.item_ids.take(nearest[:4]).to_pylist()
    assert all(one["item_id"] != item_id for one in two_tower + item_cf)


def test_similar_items_of_an_integer_id(odd_server) -> None:
    assert len(odd_server.http.get("/v1/items/7/similar").json()["items"]) == 20
    for text, status in [("41", 404), ("-1", 404), (str(2**63), 422), ("seven", 422), ("1_0", 422), ("9" * 40, 422)]:
        response = odd_server.http.get(f"/v1/items/{text}/similar")
        assert (response.status_code, list(response.json())) == (status, ["error"]), text
    assert odd_server.http.get("/v1/items/7/similar?k=0").status_code == 422


def test_an_id_in_an_address_may_hold_any_character(server) -> None:
    response = server.http.get("/v1/items/a%2Fb%20%C3%A9/similar")
    assert (response.status_code, response.json()["error"]) == (404, f"version {server.version.id} has no item a/b é")


def test_a_user_with_a_string_id_is_served_and_an_integer_is_refused(odd_server) -> None:
    known = odd_server.version.users.ids[3].as_py()
    before = odd_server.items(user_id=known, k=300)
    assert before
    odd_server.event("click", known, item_id=before[0])
    assert odd_server.items(user_id=known, k=300) != before
    response = odd_server.http.post("/v1/retrieve", json={"user_id": 3})
    assert "user_id 3 is a int: the ids of users are string" in response.json()["error"]
    for stranger in ("", "x" * 512, "名前", "user/999"):
        assert odd_server.items(user_id=stranger, k=300) == odd_server.items(k=300)


def test_health_version_and_metrics(server) -> None:
    assert server.http.get("/healthz").json() == {"ok": True}
    assert server.http.get("/readyz").json() == {
        "ok": True,
        "version": server.version.id,
        "unavailable_channels": {},
    }
    assert server.http.get("/v1/version").json() == {
        "version": server.version.id,
        "delta_seq": 0,
        "created_ms": server.version.manifest["created_ms"],
        "watermark_ms": server.version.watermark_ms,
        "channels": ["two_tower", "item_cf", "popular"],
        "refused": None,
        "gated": [],
        "monitors": {
            "freshness_s": (server.now_ms - server.version.watermark_ms) / 1000,
            "recall_next": [],
            "unknown_user_share": None,
            "unknown_item_share": None,
            "popularity_drift": None,
            "gated": 0,
            "held_back": {},
        },
        "refused_delta": None,
    }
    assert server.metric(f'twotower_version{{version="{server.version.id}"}}') == 1
    assert server.metric("twotower_version_refused") == 0
    assert server.metric('twotower_requests_total{route="/healthz",status="200"}') == 1
    assert server.metric('twotower_request_seconds_count{route="/v1/version"}') == 1


def test_probes_answer_while_every_thread_is_busy(server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    waiting = threading.Semaphore(0)

    def wait(_: object) -> Recent:
        waiting.release()
        free.wait()
        return Recent()

    monkeypatch.setattr(server.users, "get", wait)

    async def ask() -> None:
        transport = httpx.ASGITransport(server.http._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            busy = [asyncio.create_task(client.post("/v1/retrieve", json={"user_id": 1, "k": 1})) for _ in range(60)]
            threads = int(anyio.to_thread.current_default_thread_limiter().total_tokens)
            for _ in range(threads):
                while not waiting.acquire(blocking=False):
                    await asyncio.sleep(0.001)
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 200
            free.set()
            assert {(await one).status_code for one in busy} == {200}

    asyncio.run(ask())


def test_readyz_names_a_thread_that_fails_and_recovers_with_it(server) -> None:
    def broken() -> None:
        raise DataError("the log was emptied")

    stop = threading.Event()
    for _ in range(3):
        assert server.http.get("/readyz").status_code == 200
        server.health.attempt("the reader of the log", broken, 0.2, stop)
    response = server.http.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"error": "the reader of the log has failed 3 times in a row: the log was emptied"}
    assert server.metric('twotower_thread_failing{thread="the reader of the log"}') == 1
    server.health.attempt("the reader of the log", lambda: None, 0.2, stop)
    assert server.http.get("/readyz").status_code == 200


def test_an_unknown_address_and_a_wrong_verb_say_so(server) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/v1/retrieve", 405)]:
        response = server.http.request(method, path)
        assert (response.status_code, list(response.json())) == (status, ["error"])
    assert server.metric('twotower_requests_total{route="other",status="404"}') == 1


def test_a_restarted_server_knows_what_users_did(start: Callable[[Settings], object], world: Settings, server) -> None:
    user_id = known_user(server.version)
    first = server.items(user_id=user_id, k=5)[0]
    server.event("click", user_id, item_id=first)
    answer = server.retrieve(user_id=user_id, k=20)
    server.log.close()
    server.users._store.close()
    assert start(world).retrieve(user_id=user_id, k=20) == answer
    assert places(world).versions.exists()
