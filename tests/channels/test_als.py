import sys
from pathlib import Path

import numpy as np
import pytest

from twotower.channels.als import ALS
from twotower.channels.options import ALSOptions
from twotower.channels.retriever import Queries
from twotower.features.columns import Bag
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions
from twotower.samples.read import Clicks
from twotower.schema.errors import ConfigError


def two_tastes() -> Clicks:
    """Twenty users who click eight of the items 0..9, and twenty who click eight of 10..19."""
    generator = np.random.default_rng(0)
    rows = [np.sort(generator.permutation(10)[:8]) + 10 * (user % 2) for user in range(40)]
    return Clicks(np.arange(41) * 8, np.concatenate(rows).astype(np.int32), np.zeros(320, np.int64))


def queries(clicks: list[list[int]], exclude: list[list[int]]) -> Queries:
    rows = np.array([row for each in clicks for row in each], np.int32)
    return Queries({}, Bag(np.cumsum([0, *map(len, clicks)]), rows), Exclusions.of(exclude))


def test_the_items_of_a_users_taste_come_first() -> None:
    channel = ALS.fit(two_tastes(), 21, ALSOptions(factors=2), threads=1, seed=0)
    asked = [[0, 1, 2, 1], [15, 13]]
    found = channel.retrieve(queries(asked, asked), 7)
    assert set(found.rows[0].tolist()) == set(range(3, 10))
    assert set(found.rows[1].tolist()) <= set(range(10, 20)) - {15, 13}
    assert (found.scores[:, 0] > 0.5).all()


def test_scores_are_the_preferences_of_a_least_squares_by_hand() -> None:
    """argmin over x of sum_i c_i (p_i - x y_i)^2 + lambda |x|^2, c = 10 and p = 1 for the clicked, else 1 and 0."""
    generator = np.random.default_rng(1)
    factors = generator.standard_normal((12, 3)).astype(np.float32)
    channel = ALS(factors, ALSOptions(3, regularization=0.5, confidence=10.0))
    clicked = [2, 7, 11]
    weight, preferred = np.ones(12), np.zeros(12)
    weight[clicked], preferred[clicked] = 10.0, 1.0
    root = np.sqrt(weight)[:, None]
    system = np.concatenate([root * factors, np.sqrt(0.5) * np.eye(3)])
    user = np.linalg.lstsq(system, np.concatenate([root[:, 0] * preferred, np.zeros(3)]), rcond=None)[0]
    found = channel.retrieve(queries([clicked], [[]]), 12)
    expected = factors @ user
    assert found.rows[0].tolist() == np.argsort(-expected).tolist()
    np.testing.assert_allclose(found.scores[0], np.sort(expected)[::-1], rtol=1e-4, atol=1e-5)


def test_items_like_an_item_are_the_nearest_by_the_cosine_of_the_factors() -> None:
    factors = np.array([[1, 0], [3, 1], [0, 2], [0, 0], [1, 1]], np.float32)
    found = ALS(factors, ALSOptions(2)).similar(np.array([0, 3, 2]), 3)
    assert found.rows.tolist() == [[1, 4, 2], [-1, -1, -1], [4, 1, 0]]
    np.testing.assert_allclose(found.scores[0], [3 / 10**0.5, 1 / 2**0.5, 0], atol=1e-6)


def test_nobody_and_nothing_clicked_have_no_candidates(tmp_path: Path) -> None:
    channel = ALS.fit(two_tastes(), 25, ALSOptions(factors=4), threads=1, seed=0)
    found = channel.retrieve(queries([[], [20], [0]], [[], [], []]), 25)
    assert (found.rows[:2] == -1).all()
    assert np.isneginf(found.scores[:2]).all()
    assert set(found.rows[2].tolist()) - {-1} == set(range(20))  # what nobody clicked is not found


def test_a_saved_channel_answers_alike_behind_any_index(tmp_path: Path) -> None:
    channel = ALS.fit(two_tastes(), 20, ALSOptions(factors=4), threads=1, seed=0)
    rows, vectors = channel.unit_vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    channel.with_index(ExactIndex.build(rows, vectors)).save(tmp_path)
    asked = queries([[0, 3], [12]], [[0], []])
    for one, other in zip(
        vars(ALS.load(tmp_path).retrieve(asked, 9)).values(), vars(channel.retrieve(asked, 9)).values(), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_the_threads_do_not_change_the_factors() -> None:
    one, two = (ALS.fit(two_tastes(), 20, ALSOptions(factors=4), threads=n, seed=3).unit_vectors[1] for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    with pytest.raises(ConfigError, match=r"pip install 'twotower\[als\]'"):
        ALS.fit(two_tastes(), 20, ALSOptions(), threads=1, seed=0)
