import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.towers.embedding import EPSILON, Compactor, EmbeddingTable, mean_of_bags


def test_rows_are_updated_like_a_dense_row_wise_adagrad_and_others_not_at_all() -> None:
    generator = np.random.default_rng(0)
    table = EmbeddingTable.new(20, 5, generator)
    before = table.weights.copy()
    weights, sums = table.weights.astype(np.float64), np.zeros(20)
    touched: set[int] = set()
    for _ in range(6):
        rows = np.sort(generator.permutation(15)[:6])
        gradient = generator.normal(size=(6, 5)).astype(np.float32)
        table.update(rows, gradient, 0.1)
        dense = np.zeros((20, 5))
        dense[rows] = gradient
        sums += (dense**2).mean(axis=1)
        weights -= 0.1 * dense / (np.sqrt(sums)[:, None] + EPSILON)
        touched |= set(rows.tolist())
    np.testing.assert_allclose(table.weights, weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.accumulator, sums, rtol=1e-5)
    rest = sorted(set(range(20)) - touched)
    assert rest[-5:] == [15, 16, 17, 18, 19]
    assert table.weights[rest].tobytes() == before[rest].tobytes()


def test_a_zero_gradient_moves_nothing_even_at_first() -> None:
    table = EmbeddingTable.new(4, 3, np.random.default_rng(0))
    before = table.weights.copy()
    table.update(np.array([2]), np.zeros((1, 3), np.float32), 0.1)
    assert table.weights.tobytes() == before.tobytes()


def test_missing_and_unknown_begin_at_zero_and_the_rest_at_a_length_of_about_a_tenth() -> None:
    table = EmbeddingTable.new(3000, 16, np.random.default_rng(0))
    assert not table.weights[:2].any()
    lengths = np.sqrt(np.square(table.weights[2:]).sum(axis=1))
    assert np.sqrt(np.square(lengths).mean()) == pytest.approx(0.1, abs=0.002)


@given(st.lists(st.lists(st.integers(0, 30), max_size=50), min_size=1, max_size=5))
def test_distinct_rows_and_places_are_those_of_unique_step_after_step(steps: list[list[int]]) -> None:
    compactor = Compactor(31)
    for step in steps:
        rows = np.array(step, np.int32)
        distinct, place = compactor.compact(rows)
        assert np.sort(distinct).tolist() == np.unique(rows).tolist()
        assert distinct[place].tolist() == rows.tolist()


def test_the_mean_of_an_empty_bag_is_zero_and_takes_no_gradient() -> None:
    values = torch.arange(6.0).reshape(3, 2).requires_grad_()
    means = mean_of_bags(values, torch.tensor([0, 2, 2]), torch.tensor([0, 0, 2, 3, 3]))
    assert means.tolist() == [[0, 0], [2, 3], [4, 5], [0, 0]]
    means.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5], [0, 0], [1.5, 1.5]]


def test_bags_that_are_all_empty_have_means_of_zero() -> None:
    values = torch.zeros((0, 2)).requires_grad_()
    means = mean_of_bags(values, torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert means.tolist() == [[0, 0]] * 3
    means.sum().backward()  # type: ignore[no-untyped-call]
