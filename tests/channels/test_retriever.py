import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.channels.lists import top_of_groups
from twotower.channels.retriever import Candidates, Queries, WithoutItems, similar_items
from twotower.features.columns import Bag
from twotower.index.protocol import Exclusions

NOBODY = Queries({}, Bag(np.array([0, 0]), np.zeros(0, np.int32)), Exclusions.of([[]]))

entries = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(-2, 2)), unique_by=lambda e: e[:2])


@given(entries, st.integers(1, 6))
def test_the_best_of_each_owner_by_score_then_row(found: list[tuple[int, int, int]], k: int) -> None:
    owner, rows = (np.array([entry[i] for entry in found], np.int64) for i in (0, 1))
    top = top_of_groups(owner, rows, np.array([entry[2] for entry in found], np.float32), 4, k)
    for user in range(4):
        expected = sorted((-score, row) for o, row, score in found if o == user)[:k]
        assert top.rows[user].tolist() == [row for _, row in expected] + [-1] * (k - len(expected))
        assert top.scores[user].tolist() == [-score for score, _ in expected] + [-np.inf] * (k - len(expected))


def test_scores_that_are_equal_only_as_float32_keep_their_order() -> None:
    scores = np.array([1.0, 1.0 + 1e-12])
    assert top_of_groups(np.zeros(2, np.int64), np.array([1, 2]), scores, 1, 2).rows.tolist() == [[2, 1]]


class Lists:
    """Answers with items 0, 1, 2, ... and counts how often it was asked."""

    name = "lists"

    def __init__(self, items: int) -> None:
        self.items = items
        self.asked: list[int] = []

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        self.asked.append(k)
        rows = np.arange(k)
        rows = np.where(rows < self.items, rows, -1)[None]
        return Candidates(rows, np.where(rows < 0, -np.inf, -rows).astype(np.float32))


@pytest.mark.parametrize(
    ("out", "k", "expected", "asked"),
    [
        ([], 3, [0, 1, 2], [3]),
        ([1], 3, [0, 2, 3], [4]),
        ([50, 51], 3, [0, 1, 2], [5]),
        (range(40), 2, [40, 41], [4, 10, 34, 42]),
        (range(99), 2, [99, -1], [4, 10, 34, 101]),
        (range(100), 2, [-1, -1], [4, 10, 34, 102]),
        ([1], 99, [0, *range(2, 100)], [100]),
        ([1], 100, [0, *range(2, 100), -1], [101]),
    ],
)
def test_a_channel_is_asked_for_more_until_enough_is_left(out: list[int], k: int, expected: list[int], asked) -> None:
    left_out = np.zeros(100, np.bool_)
    left_out[list(out)] = True
    lists = Lists(100)
    found = WithoutItems(lists, left_out).retrieve(NOBODY, k)
    assert found.rows.tolist() == [expected]
    assert found.scores.tolist() == [[-row if row >= 0 else -np.inf for row in expected]]
    assert lists.asked == asked


def test_a_channel_without_similar_items_has_none_either() -> None:
    assert similar_items(WithoutItems(Lists(5), np.zeros(5, np.bool_)), np.array([0]), 3) is None
