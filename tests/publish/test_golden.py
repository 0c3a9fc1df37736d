from typing import Any

import pytest

from twotower.publish.golden import _missed


def of(items: str, scores: list[float]) -> dict[str, Any]:
    return {"items": [*items], "scores": scores}


SCORES = [0.9, 0.8, 0.7, 0.6, 0.5]


@pytest.mark.parametrize(
    ("items", "scores", "told"),
    [
        ("abcde", SCORES, None),
        ("abcdx", [0.9, 0.8, 0.7, 0.6, 0.45], None),
        ("abcxy", [0.9, 0.8, 0.7, 0.5, 0.4], "3 of 5 items are found again"),
        ("abcd", SCORES[:4], "4 of 5 items are found again"),
        ("abcde", [0.9, 0.8, 0.7, 0.6, 0.4], "a score is off by 0.1"),
    ],
)
def test_a_vector_database_must_find_most_of_a_golden_list_with_the_same_scores(
    items: str, scores: list[float], told: str | None
) -> None:
    assert _missed(of("abcde", SCORES), of(items, scores)) == told


def test_an_empty_list_is_found_again() -> None:
    assert _missed(of("", []), of("", [])) is None
