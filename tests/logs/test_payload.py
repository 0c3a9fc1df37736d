"""What a log gives back of whatever is stored in it."""

import struct
from dataclasses import replace
from typing import Any

import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.logs import Event
from twotower.logs.events import ALLOWED_SKEW_MS, NOBODY, UNUSABLE
from twotower.logs.payload import digest_of, erased_payload, mark_of, payload_of, record_of, user_of
from twotower.schema.errors import DataError
from twotower.schema.limits import Refused
from twotower.serve.users import items_of
from twotower.stream.joiner import Joiner
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Types

T0 = 1_700_000_000_000
TYPES = Types(pa.int64(), pa.string(), {"age": pa.float32()}, {"scene": pa.string()})

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(), st.text(max_size=20), st.just("x" * 600)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAMES = [
    "event_id", "type", "user_id", "ts_ms", "request_id", "item_id", "items", "outcomes", "positions", "scores",
    "channels", "probabilities", "propensities", "history", "context", "features", "weight", "version",
    "delta_seq", "logged_ms", "available", "deleted", "other",
]  # fmt: skip
GOOD: dict[str, Any] = {"event_id": "e", "type": "click", "user_id": 1, "ts_ms": T0}
kinds = st.sampled_from(["click", "impression", "request", "item", "user", "other"])
documents = st.builds(
    lambda kind, changed, dropped: {
        name: value for name, value in {**GOOD, "type": kind, **changed}.items() if name not in dropped
    },
    kinds,
    st.dictionaries(st.sampled_from(NAMES), values | st.lists(scalars, max_size=3), max_size=6),
    st.sets(st.sampled_from(NAMES), max_size=1),
)


def clock_ms() -> int:
    return T0


def fits(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | documents.filter(fits).map(orjson.dumps))
def test_whatever_is_stored_is_read_and_joined_and_can_be_erased(payload: bytes) -> None:
    record = record_of(0, 1, payload, clock_ms)
    if payload[:1] not in (b"\0", b"\1"):
        stub = record_of(0, 1, erased_payload(payload), clock_ms)
        assert mark_of(stub.event) == mark_of(record.event) == digest_of(payload).hex()
    user_of(payload)
    items_of(record.event.content)
    joiner = Joiner(TYPES, StreamOptions(window_s=1, allowed_lateness_s=0.1, remember_s=1), lambda _: record.event)
    joiner.feed(record)
    joiner.flush()
    if record.event.type == UNUSABLE:
        assert record.event.user_id == NOBODY
        assert len(record.event.body["message"]) < 1000
    else:
        assert record.event.ts_ms <= record.logged_ms + ALLOWED_SKEW_MS


@settings(max_examples=300, deadline=None)
@given(documents)
def test_an_event_is_stored_and_read_as_it_is_or_refused(document: dict[str, Any]) -> None:
    try:
        event = Event.from_json(document)
        payload = payload_of(event, T0)
    except DataError:
        return
    record = record_of(0, 1, payload)
    assert (record.event, record.logged_ms) == (replace(event, ts_ms=min(event.ts_ms, T0)), T0)


def test_a_payload_of_an_earlier_release_has_the_clock_of_its_reader() -> None:
    record = record_of(0, 1, orjson.dumps(GOOD), lambda: T0 + 5)
    assert (record.event.type, record.logged_ms) == ("click", T0 + 5)
    late = record_of(0, 1, orjson.dumps(GOOD), lambda: T0 - ALLOWED_SKEW_MS - 1)
    assert (late.event.type, late.event.body["reason"]) == (UNUSABLE, "beyond_clock")


def test_an_event_of_a_clock_that_is_a_little_ahead_happened_when_it_was_logged() -> None:
    ahead = Event("e", "click", 1, T0 + 200_000, body={"item_id": 3})
    assert record_of(0, 1, payload_of(ahead, T0)).event.ts_ms == T0


def test_a_stub_of_an_earlier_release_is_read() -> None:
    stub = struct.pack("<xqH16s", T0, 5, b"m" * 16) + b"click" + b"\0" * 30
    record = record_of(0, 1, stub, clock_ms)
    assert (record.event.type, record.event.ts_ms, record.event.event_id) == ("erased", T0, (b"m" * 16).hex())


@pytest.mark.parametrize("depth", [5, 5_000])
def test_deep_values_are_refused_and_not_followed(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    with pytest.raises(Refused, match="more than 4 lists or objects within each other"):
        payload_of(Event("e", "click", 1, T0, body={"deep": value}), T0)
