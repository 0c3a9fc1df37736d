import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twotower.models.retriever import top_of_groups

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
