import math

import numpy as np
import pytest
import torch
from torch import Tensor

from twotower.towers.encoders import AttentionPooling, CausalTransformer, Interests, label_aware


def alive(module: torch.nn.Module) -> torch.nn.Module:
    """With weights that make everything matter, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def sequences() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 5, 6), torch.tensor([5, 2, 0, 1])


@pytest.fixture(params=["attention", "transformer"])
def encoder(request: pytest.FixtureRequest) -> torch.nn.Module:
    return alive(AttentionPooling(6, 5, 2) if request.param == "attention" else CausalTransformer(6, 5, 2, 2, 0.3))


def test_attention_begins_as_the_mean() -> None:
    items, length = sequences()
    found = AttentionPooling(6, 5, 3)(items, length)
    for row, count in enumerate(length.tolist()):
        expected = items[row, :count].mean(dim=0) if count else torch.zeros(6)
        torch.testing.assert_close(found[row], expected)


def test_attention_is_a_softmax_of_item_and_age_by_hand() -> None:
    pooling = AttentionPooling(2, 4, 1)
    with torch.no_grad():
        pooling.score.weight.copy_(torch.tensor([[1.0, 0.0]]))
        pooling.age.copy_(torch.tensor([[0.0], [-1.0], [-2.0], [-3.0]]))
    items = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [0.0, 30.0]]])
    # ages 2, 1, 0: scores 1 - 2, 2 - 1, 0 - 0
    weights = np.exp([-1.0, 1.0, 0.0]) / np.exp([-1.0, 1.0, 0.0]).sum()
    found = pooling(items, torch.tensor([3])).detach().numpy()[0]
    np.testing.assert_allclose(found, weights @ np.array([[1, 10], [2, 20], [0, 30]]), rtol=1e-6)


def test_an_empty_sequence_is_zero_and_nothing_is_nan(encoder: torch.nn.Module) -> None:
    items, length = sequences()
    items.requires_grad_()
    found = encoder(items, length)
    assert found[2].tolist() == [0.0] * 6
    found.square().sum().backward()
    assert items.grad is not None
    assert torch.isfinite(items.grad).all()


def test_what_is_behind_the_end_is_not_looked_at(encoder: torch.nn.Module) -> None:
    items, length = sequences()
    found = encoder(items, length)
    for row, count in enumerate(length.tolist()):
        items[row, count:] = 1e3
    torch.testing.assert_close(encoder(items, length), found)


def test_rows_that_share_a_sequence_have_the_vectors_of_their_own_beginnings(encoder: torch.nn.Module) -> None:
    items, _ = sequences()
    row, length = torch.tensor([0, 3, 0, 0, 1]), torch.tensor([5, 2, 1, 0, 4])
    found = encoder(items, length, row)
    for place, (sequence, count) in enumerate(zip(row.tolist(), length.tolist(), strict=True)):
        alone = encoder(items[sequence : sequence + 1, : max(1, count)], torch.tensor([count]))
        torch.testing.assert_close(found[place], alone[0], rtol=1e-5, atol=1e-6)


def test_the_order_of_items_matters_and_each_of_them_does(encoder: torch.nn.Module) -> None:
    items, _ = sequences()
    length = torch.full((4,), 5)
    found = encoder(items, length)
    assert not torch.allclose(found, encoder(items.flip(1), length), atol=1e-3)
    for place in range(5):
        changed = items.clone()
        changed[:, place] = torch.randn(4, 6)
        assert not torch.allclose(found, encoder(changed, length), atol=1e-4)


def test_a_transformer_does_not_know_where_its_window_was_cut() -> None:
    """Distances alone enter, so one block gives a shifted sequence the same states for what both have seen."""
    block = alive(CausalTransformer(6, 9, 2, 1, 0.0))
    items = torch.randn(1, 4, 6)
    longer = torch.cat([items, torch.randn(1, 3, 6)], dim=1)
    torch.testing.assert_close(block(items, torch.tensor([4])), block(longer, torch.tensor([4])))


def test_a_longer_sequence_than_any_in_training_is_no_error(encoder: torch.nn.Module) -> None:
    assert torch.isfinite(encoder(torch.randn(1, 12, 6), torch.tensor([12]))).all()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="heads = 4 does not divide the width 6"):
        CausalTransformer(6, 5, 4, 1, 0.0)


def test_interests_are_those_of_a_routing_by_hand() -> None:
    torch.manual_seed(0)
    encoder = Interests(4, 6, 3, 3)
    torch.nn.init.normal_(encoder.matrix.weight)
    items = torch.randn(4, 6, 4)
    length = torch.tensor([6, 3, 1, 0])
    with torch.no_grad():
        found = encoder(items, length).numpy()
    for user, n in enumerate(length.tolist()):
        kinds = max(1, min(3, int(math.log2(n)))) if n else 1
        spoken = (items[user, :n] @ encoder.matrix.weight.T).detach().numpy()
        logits = encoder.first.numpy()[np.arange(n)[::-1], :kinds].copy()
        for _ in range(3):
            share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            z = share.T @ spoken
            square = (z**2).sum(axis=1, keepdims=True)
            interests = z * np.sqrt(square) / (1 + square)
            logits += spoken @ interests.T
        np.testing.assert_allclose(found[user, :kinds], interests, atol=1e-5)
        np.testing.assert_allclose(found[user, kinds:], np.repeat(interests[:1], 3 - kinds, axis=0), atol=1e-5)
    assert not found[3].any()


def test_two_kinds_of_items_become_two_interests() -> None:
    torch.manual_seed(0)
    encoder = Interests(2, 20, 2, 20)
    items = torch.tensor([[[3.0, 0.0]] * 10 + [[0.0, 3.0]] * 10])
    with torch.no_grad():
        found = encoder(items[:, torch.randperm(20)], torch.tensor([20]))[0]
    unit = found / found.norm(dim=1, keepdim=True)
    assert sorted(unit.argmax(dim=1).tolist()) == [0, 1]
    assert (unit.max(dim=1).values > 0.99).all()


def test_attention_to_the_positive_takes_the_nearest_interest_the_sharper_the_more() -> None:
    interests = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    item = torch.tensor([[0.6, 0.8]])
    even, sharp = label_aware(interests, item, 1e-6), label_aware(interests, item, 1000.0)
    np.testing.assert_allclose(even.numpy(), [[0.5**0.5, 0.5**0.5]], atol=1e-5)
    np.testing.assert_allclose(sharp.numpy(), [[0, 1]], atol=1e-5)
    one = interests[:, :1].expand(-1, 3, -1)
    np.testing.assert_allclose(label_aware(one, item, 20.0).numpy(), [[1, 0]], atol=1e-5)
