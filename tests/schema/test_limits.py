from typing import Any

import pytest

from twotower.schema.limits import (
    MAX_ENTRIES,
    MAX_FEATURE_ENTRIES,
    MAX_TEXT_BYTES,
    Refused,
    check_fields_json,
    check_value,
)

LONG = "é" * (MAX_TEXT_BYTES // 2)


@pytest.mark.parametrize("value", [None, True, -(2**63), 0.5, float("nan"), LONG, [1, "a", None], [0] * 4096, ()])
def test_plain_values_and_lists_of_them_are_values_of_features(value: Any) -> None:
    check_value(value, "tags")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2**63, "bad_number"), ([1, -(2**63) - 1], "bad_number"), (LONG + "x", "too_large"), ("\ud800", "malformed"),
        ([0] * (MAX_FEATURE_ENTRIES + 1), "too_large"), ({"a": 1}, "malformed"), ([[1]], "malformed"),
    ],
)  # fmt: skip
def test_other_values_are_refused_with_a_reason(value: Any, reason: str) -> None:
    with pytest.raises(Refused, match="tags") as refused:
        check_value(value, "tags")
    assert refused.value.reason == reason


@pytest.mark.parametrize("value", [None, [[[[1, "a"]]]], {"a": {"b": [True, 2.5]}}, [0] * MAX_ENTRIES, (1, "x")])
def test_json_up_to_four_lists_or_objects_deep_is_taken(value: Any) -> None:
    check_fields_json({"field": value}, "event")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([[[[[1]]]]], "too_large"), ({"a": [0] * (MAX_ENTRIES + 1)}, "too_large"), ([{"a" * 513: 1}], "too_large"),
        ([[float("inf")]], "bad_number"), ({"a": [2**63]}, "bad_number"), ([LONG, LONG + "x"], "too_large"),
        ([{1: 2}], "malformed"), ([object()], "malformed"), ({"a": "\udc00"}, "malformed"),
        ({"a": {1, 2}}, "malformed"),
    ],
)  # fmt: skip
def test_other_json_is_refused_with_a_reason(value: Any, reason: str) -> None:
    with pytest.raises(Refused, match="field") as refused:
        check_fields_json({"field": value}, "event")
    assert refused.value.reason == reason
