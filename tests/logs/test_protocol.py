from typing import Any

import orjson
import pytest

from twotower.logs import Event
from twotower.schema.errors import DataError

CLICK: dict[str, Any] = {
    "event_id": "e1",
    "type": "click",
    "request_id": "r1",
    "user_id": 7,
    "ts_ms": 1_700_000_000_000,
    "item_id": "i1",
    "context": {"device": "phone"},
}


def test_json_becomes_named_fields_and_a_body() -> None:
    assert Event.from_json(CLICK) == Event(
        "e1", "click", 7, 1_700_000_000_000, "r1", {"item_id": "i1", "context": {"device": "phone"}}
    )


def test_json_comes_back_the_same() -> None:
    event = Event.from_json(CLICK)
    assert orjson.loads(event.to_json()) == CLICK
    assert Event.from_json(orjson.loads(event.to_json())) == event


def test_an_event_without_a_request_has_none() -> None:
    document = {name: value for name, value in CLICK.items() if name != "request_id"}
    event = Event.from_json(document)
    assert event.request_id is None
    assert orjson.loads(event.to_json()) == document
    assert Event.from_json({**document, "request_id": None}) == event


@pytest.mark.parametrize("name", ["event_id", "type", "user_id", "ts_ms"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"an event has no {name}; it has"):
        Event.from_json({key: value for key, value in CLICK.items() if key != name})


@pytest.mark.parametrize("document", [None, [CLICK], "click", 3])
def test_what_is_no_object_is_refused(document: Any) -> None:
    with pytest.raises(DataError, match="an event is a JSON object, not"):
        Event.from_json(document)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("event_id", "", "an event has an empty event_id"),
        ("event_id", 5, "event_id=5 of type int: a string is expected"),
        ("type", "", "event 'e1' has an empty type"),
        ("type", None, "type=None of type NoneType: a string is expected"),
        ("request_id", "", "has an empty request_id"),
        ("request_id", 1, "request_id=1 of type int"),
        ("user_id", "", "has an empty user_id"),
        ("user_id", True, "user_id=True of type bool: an integer or a string is expected"),
        ("user_id", 1.0, "user_id=1.0 of type float"),
        ("user_id", None, "user_id=None of type NoneType"),
        ("user_id", 2**63, "does not fit int64: send it as a string"),
        ("user_id", -(2**63) - 1, "does not fit int64"),
        ("ts_ms", True, "ts_ms=True of type bool"),
        ("ts_ms", 1.7e12, "of type float: an integer of milliseconds is expected"),
        ("ts_ms", "1700000000000", "of type str"),
        ("ts_ms", 1_700_000_000, "looks like seconds: multiply by 1000"),
        ("ts_ms", 1_700_000_000_000_000, "looks like microseconds: divide by 1000"),
        ("ts_ms", 0, "lies outside 1980 to 2100"),
        ("ts_ms", 10**30, "lies outside 1980 to 2100"),
        ("ts_ms", -1, "lies outside 1980 to 2100"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_seen(name: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Event.from_json({**CLICK, name: value})


@pytest.mark.parametrize("user_id", [2**63 - 1, -(2**63), 0, "0", " "])
def test_every_int64_and_every_text_is_a_user(user_id: int | str) -> None:
    assert Event.from_json(orjson.loads(Event("e", "click", user_id, CLICK["ts_ms"]).to_json())).user_id == user_id


def test_a_body_does_not_name_the_fields_of_the_event() -> None:
    with pytest.raises(DataError, match="names ts_ms, user_id in its body"):
        Event("e", "click", 1, CLICK["ts_ms"], body={"user_id": 2, "ts_ms": 3})


def test_a_body_is_a_mapping() -> None:
    with pytest.raises(DataError, match="body of type list"):
        Event("e", "click", 1, CLICK["ts_ms"], body=[1])  # type: ignore[arg-type]
