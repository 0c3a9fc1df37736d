from math import log
from pathlib import Path

import numpy as np
import pytest

from twotower.channels import lists
from twotower.channels.item_to_item import Answering, ItemToItem, Nearest
from twotower.channels.retriever import Queries
from twotower.features.columns import Bag, pointers
from twotower.index.protocol import Exclusions

Lists = list[list[int]]


def queries(lists: Lists, exclude: Lists | None = None) -> Queries:
    rows = np.array([item for items in lists for item in items], np.int32)
    clicks = Bag(pointers(np.array([len(items) for items in lists], np.int64)), rows)
    return Queries({}, clicks, Exclusions.of(exclude or [[]] * len(lists)))


def channel(answering: Answering, normalise: bool = False) -> ItemToItem:
    """0 is near 2 and 3, 1 is near 3, 2 is near 0; nothing is near 3."""
    nearest = Nearest(np.array([0, 0, 1, 2]), np.array([2, 3, 3, 0], np.int32), np.array([3.0, 1.0, 2.0, 8.0]))
    return ItemToItem.of("item_cf", nearest, 4, answering, normalise=normalise)


def scores(channel: ItemToItem, clicks: list[int]) -> dict[int, float]:
    found = channel.retrieve(queries([clicks]), 4)
    pairs = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
    return {row: score for row, score in pairs if row >= 0}


def test_a_score_is_the_sum_of_similarities_to_the_different_clicks() -> None:
    assert scores(channel(Answering(9, 0.0)), [0, 1, 0]) == {2: 3.0, 3: 3.0}


def test_normalised_each_click_has_one_vote() -> None:
    assert scores(channel(Answering(9, 0.0), normalise=True), [0, 1, 2]) == {0: 1.0, 2: 0.75, 3: 1.25}


def test_only_the_latest_clicks_are_looked_up() -> None:
    assert scores(channel(Answering(1, 0.0)), [0, 1]) == {3: 2.0}


def test_the_longer_ago_a_click_the_less_it_counts() -> None:
    found = scores(channel(Answering(9, 0.5)), [0, 2, 1])
    assert found == pytest.approx({0: 8 / 2**0.5, 2: 3 / 3**0.5, 3: 2 + 1 / 3**0.5})


def test_a_repeated_click_is_as_old_as_its_latest() -> None:
    assert scores(channel(Answering(9, 1.0)), [2, 1, 2]) == pytest.approx({0: 8.0, 3: 1.0})


def test_repeated_clicks_count_more_where_that_is_asked_for() -> None:
    assert scores(channel(Answering(9, 0.0, repeats=True)), [2, 1, 2]) == pytest.approx({0: 8 * (1 + log(2)), 3: 2.0})


def test_few_users_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = queries([[0, 1], [], [2], [3, 2, 1]], [[2], [], [], [0]])
    whole = channel(Answering(9, 0.3)).retrieve(asked, 3)
    monkeypatch.setattr(lists, "ENTRIES", 1)
    parts = channel(Answering(9, 0.3)).retrieve(asked, 3)
    np.testing.assert_array_equal(whole.rows, parts.rows)
    np.testing.assert_array_equal(whole.scores, parts.scores)


def test_how_it_answers_is_saved_too(tmp_path: Path) -> None:
    channel(Answering(2, 0.7, repeats=True)).save(tmp_path)
    saved = ItemToItem.load("item_cf", tmp_path)
    for clicks in ([0, 1, 2], [2, 2], []):
        assert scores(saved, clicks) == scores(channel(Answering(2, 0.7, repeats=True)), clicks)
