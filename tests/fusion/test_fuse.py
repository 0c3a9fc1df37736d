from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.channels.retriever import Candidates
from twotower.fusion.fuse import Fused, Fusion, reciprocal_rank
from twotower.schema.errors import ConfigError

Lists = dict[str, list[list[int]]]
lists_of_users = st.integers(1, 4).flatmap(
    lambda users: st.dictionaries(
        st.sampled_from(["two_tower", "item_cf", "popular", "swing"]),
        st.lists(st.lists(st.integers(0, 12), unique=True, max_size=8), min_size=users, max_size=users),
        min_size=1,
    )
)
some_weights = st.dictionaries(st.sampled_from(["two_tower", "item_cf", "popular"]), st.sampled_from([0.5, 1.0, 3.0]))


def candidates(users: list[list[int]]) -> Candidates:
    width = max(1, *map(len, users), 1)
    rows = np.array([rows + [-1] * (width - len(rows)) for rows in users])
    return Candidates(rows, np.where(rows >= 0, np.float32(0.5), np.float32(-np.inf)))


def check(fused: Fused, lists: Lists, k: int, score: Callable[[int, int], float]) -> None:
    """`score` gives an item's score for a user; brute force sorts all items by it."""
    users = len(next(iter(lists.values())))
    assert fused.candidates.rows.shape == fused.candidates.scores.shape == fused.retrieved_by.shape == (users, k)
    for user in range(users):
        items = {row for brought in lists.values() for row in brought[user]}
        ordered = sorted(items, key=lambda row: (-score(user, row), row))[:k]
        assert fused.candidates.rows[user].tolist() == ordered + [-1] * (k - len(ordered))
        for place, row in enumerate(ordered):
            assert fused.candidates.scores[user, place] == pytest.approx(score(user, row), rel=1e-6)
            assert fused.channels_of(user, place) == [name for name, brought in lists.items() if row in brought[user]]
        assert np.isneginf(fused.candidates.scores[user, len(ordered) :]).all()
        assert not fused.retrieved_by[user, len(ordered) :].any()


@given(lists_of_users, some_weights, st.integers(1, 20))
def test_reciprocal_rank_adds_weight_over_60_plus_rank(lists: Lists, weights: dict[str, float], k: int) -> None:
    weights = {name: weight for name, weight in weights.items() if name in lists}

    def score(user: int, row: int) -> float:
        ranks = {name: brought[user].index(row) + 1 for name, brought in lists.items() if row in brought[user]}
        return sum(weights.get(name, 1.0) / (60 + rank) for name, rank in ranks.items())

    check(reciprocal_rank({n: candidates(u) for n, u in lists.items()}, k, weights), lists, k, score)


def test_an_item_keeps_all_its_channels() -> None:
    fused = reciprocal_rank({"a": candidates([[5, 6]]), "b": candidates([[7]]), "c": candidates([[6, 5]])}, 3)
    assert fused.candidates.rows.tolist() == [[5, 6, 7]]
    assert [fused.channels_of(0, place) for place in range(3)] == [["a", "c"], ["a", "c"], ["b"]]


def test_lists_that_are_all_empty_give_padding() -> None:
    fused = reciprocal_rank({"a": candidates([[], []]), "b": candidates([[], []])}, 2)
    assert fused.candidates.rows.tolist() == [[-1, -1]] * 2
    assert np.isneginf(fused.candidates.scores).all()
    assert fused.channels_of(1, 0) == []


def test_no_users_give_no_lists() -> None:
    nobody = Candidates(np.zeros((0, 3), np.int64), np.zeros((0, 3), np.float32))
    assert reciprocal_rank({"a": nobody}, 2).candidates.rows.shape == (0, 2)


def test_what_cannot_be_fused_is_refused() -> None:
    one = {"a": candidates([[1]])}
    with pytest.raises(ConfigError, match="no channel returned a list"):
        reciprocal_rank({}, 2)
    with pytest.raises(ConfigError, match="weights for b, but the channels are a"):
        reciprocal_rank(one, 2, {"b": 1.0})
    with pytest.raises(ConfigError, match="a weight is at least 0 and finite"):
        reciprocal_rank(one, 2, {"a": -1.0})


@given(lists_of_users, st.integers(1, 20))
def test_every_channel_may_have_its_own_constant(lists: Lists, k: int) -> None:
    constants = dict.fromkeys(list(lists)[:1], 7.0)

    def score(user: int, row: int) -> float:
        ranks = {name: brought[user].index(row) + 1 for name, brought in lists.items() if row in brought[user]}
        return sum(1 / (constants.get(name, 60) + rank) for name, rank in ranks.items())

    check(reciprocal_rank({n: candidates(u) for n, u in lists.items()}, k, None, constants), lists, k, score)


def test_a_channel_of_weight_0_only_fills_what_is_left_in_its_own_order() -> None:
    lists = {"long": candidates([[1, 2, 3], [5]]), "filler": candidates([[9, 2, 8, 7], [6, 5, 4, 3]])}
    fused = Fusion({"filler": 0.0}).fuse(lists, 5)
    assert [set(row[:3]) for row in fused.candidates.rows.tolist()] == [{1, 2, 3}, {5, 6, 4}]
    assert fused.candidates.rows[:, 3:].tolist() == [[9, 8], [3, -1]]
    assert fused.channels_of(1, 0) == ["long", "filler"]


def test_a_fusion_takes_the_weights_of_the_channels_that_answered() -> None:
    fusion = Fusion({"a": 3.0, "b": 1.0, "gone": 2.0}, {"gone": 5.0}, depth=100)
    lists = {"a": candidates([[1, 2]]), "b": candidates([[2, 3]])}
    same = reciprocal_rank(lists, 3, {"a": 3.0, "b": 1.0})
    assert fusion.fuse(lists, 3).candidates.rows.tolist() == same.candidates.rows.tolist()


def test_one_list_keeps_its_scores_and_is_cut() -> None:
    one = Candidates(np.array([[4, 2, -1]]), np.array([[0.9, 0.1, -np.inf]], np.float32))
    fused = Fusion().fuse({"a": one}, 1)
    assert (fused.candidates.rows.tolist(), fused.candidates.scores.tolist()) == ([[4]], [[pytest.approx(0.9)]])
    assert fused.channels_of(0, 0) == ["a"]


def test_constants_are_checked_like_weights() -> None:
    one = {"a": candidates([[1]])}
    with pytest.raises(ConfigError, match="constants for b, but the channels are a"):
        reciprocal_rank(one, 2, None, {"b": 1.0})
    with pytest.raises(ConfigError, match="a constant is at least 0 and finite"):
        reciprocal_rank(one, 2, None, {"a": -2.0})


def test_reserved_places_are_even_and_what_stands_early_enough_stays() -> None:
    near = Candidates(np.arange(40).reshape(1, 40), np.arange(40, 0, -1, dtype=np.float32).reshape(1, 40))
    new = Candidates(np.array([[1, 90, 91, 92, 93, -1]]), np.ones((1, 6), np.float32))
    lists = {"two_tower": near, "new_items": new}
    fused = Fusion({"new_items": 1e-6}, reserved={"new_items": 0.25}).fuse(lists, 16)
    rows = fused.candidates.rows[0].tolist()
    assert [rows.index(item) for item in (1, 90, 91, 92)] == [1, 7, 11, 15]
    assert 93 not in rows
    assert [row for row in rows if row < 40] == list(range(13))
    assert fused.channels_of(0, 1) == ["two_tower", "new_items"]
    assert fused.channels_of(0, 7) == ["new_items"]
    assert (np.diff(fused.candidates.scores[0]) <= 0).all()


def test_reserved_places_of_two_channels_and_of_a_short_one() -> None:
    def one(*rows: int) -> Candidates:
        return Candidates(np.array([rows]), np.ones((1, len(rows)), np.float32))

    lists = {"a": one(*range(20)), "b": one(50, 51, 52), "c": one(70, -1, -1)}
    fusion = Fusion({"b": 0.0, "c": 0.0}, reserved={"b": 0.2, "c": 0.2})
    rows = fusion.fuse(lists, 10).candidates.rows[0].tolist()
    assert sorted(set(rows) & {50, 51, 52, 70}) == [50, 51, 70]
    assert {rows.index(50), rows.index(70)} == {4, 5}
    assert rows.index(51) == 9
    assert fusion.fuse({"a": one(3, 4), "b": one(4, -1)}, 5).candidates.rows.tolist() == [[3, 4, -1, -1, -1]]
    with pytest.raises(ConfigError, match="sum to less than 1"):
        Fusion(reserved={"a": 0.5, "b": 0.5}).fuse(lists, 4)
