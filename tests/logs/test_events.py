"""What events say, by their type."""

from typing import Any

import pytest

from twotower.logs import Event
from twotower.logs.events import (
    Click,
    Content,
    EntityDeleted,
    EntityPut,
    Erased,
    Impression,
    LoggedRequest,
    Other,
    Unusable,
    item_deleted,
    item_event,
    user_deleted,
    user_event,
)

T0 = 1_700_000_000_000


def said(kind: str, **body: Any) -> Content:
    return Event("e", kind, 7, T0, body=body).content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (said("click", item_id=3, weight=2, other=1), Click([3], weight=2)),
        (said("click", items=[3, "a"], context={"scene": "home"}), Click([3, "a"], context={"scene": "home"})),
        (said("click"), Click(None)),
        (said("impression", items=[], weight=2), Impression([])),
        (said("request", items=[3], outcomes=["clicked"]), LoggedRequest([3], ["clicked"])),
        (said("erased", was="click"), Erased("click")),
        (said("unusable", reason="malformed", message="it is no JSON"), Unusable("malformed", "it is no JSON")),
        (said("purchase", item_id=3), Other()),
        (item_event("e", T0, 3, {"age": 1}, False).content, EntityPut("item", 3, {"age": 1}, False)),
        (item_event("e", T0, 3, None, None).content, EntityPut("item", 3, None, None)),
        (item_deleted("e", T0, 3).content, EntityDeleted("item", 3)),
        (user_event("e", T0, 7, {}).content, EntityPut("user", 7, {}, None)),
        (user_deleted("e", T0, 7).content, EntityDeleted("user", 7)),
    ],
)
def test_an_event_says_what_its_fields_say(content: Content, expected: Content) -> None:
    assert content == expected


def test_a_request_is_read_as_it_was_written() -> None:
    request = LoggedRequest(
        items=[1, 2], outcomes=["impressed", "rank_rejected"], scores=[0.5, None], history=[9], version="v", delta_seq=3
    )
    assert Event("e", "request", 7, T0, "r", request.body()).content == request
    assert (request.ended("impressed", "clicked"), request.ended("clicked")) == ([1], [])


def test_an_erased_event_has_the_type_that_it_had() -> None:
    assert Event("e", "erased", "@erased", T0, body={"was": "request"}).original_type == "request"
    assert Event("e", "click", 7, T0).original_type == "click"
