from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.models.losses import Mask, in_batch_log_weight, in_batch_softmax


@dataclass(frozen=True)
class Step:
    users: Tensor
    items: Tensor
    positive: Tensor
    log_weight: Tensor
    mask: Mask
    weight: Tensor


def unit(generator: torch.Generator, rows: int, dimension: int, dtype: torch.dtype) -> Tensor:
    vectors = torch.randn(rows, dimension, generator=generator, dtype=torch.float64)
    return (vectors / vectors.norm(dim=1, keepdim=True)).to(dtype)


def random_step(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Step:
    """Items repeat, rows are masked at random (some wholly, own columns too), some weigh nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = np.random.default_rng(seed)
    positive = torch.from_numpy(np.concatenate([np.arange(columns), draw.integers(columns, size=rows - columns)]))
    copies = torch.bincount(positive, minlength=columns).to(dtype)
    lists = [np.flatnonzero(draw.random(columns) < draw.choice([0.0, 0.3, 1.0])) for _ in range(rows)]
    mask = Mask(np.cumsum([0, *map(len, lists)]), np.concatenate(lists))
    weight = torch.from_numpy(draw.choice([0.0, 0.5, 2.0], size=rows)).to(dtype)
    frequency = torch.from_numpy(draw.dirichlet(np.ones(columns))).to(dtype)
    log_weight = in_batch_log_weight(copies, frequency)
    return Step(unit(generator, rows, 6, dtype), unit(generator, columns, 6, dtype), positive, log_weight, mask, weight)


def naive(step: Step, users: Tensor, items: Tensor, temperature: float) -> Tensor:
    """The formula of the docstring over the whole B x C matrix, by autograd."""
    scores = users @ items.T / temperature
    rows = torch.arange(len(users))
    right = scores[rows, step.positive]
    negative = torch.ones_like(scores, dtype=torch.bool)
    for row in range(len(users)):
        negative[row, step.mask.columns[step.mask.indptr[row] : step.mask.indptr[row + 1]]] = False
    negative[rows, step.positive] = False
    others = (scores + step.log_weight).masked_fill(~negative, -torch.inf)
    loss = torch.logsumexp(torch.cat([right[:, None], others], dim=1), dim=1) - right
    return (loss * step.weight).sum() / step.weight.sum()


@pytest.mark.parametrize("chunk", [1, 7, 16, 37, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_value_and_gradients_are_those_of_the_whole_matrix(chunk: int, temperature: float) -> None:
    step = random_step(37, 20)
    found, expected = [], []
    for results, chunked in ((found, True), (expected, False)):
        users, items = step.users.clone().requires_grad_(), step.items.clone().requires_grad_()
        if chunked:
            loss = in_batch_softmax(
                users, items, step.positive, step.log_weight, step.mask, temperature, step.weight, chunk
            )
        else:
            loss = naive(step, users, items, temperature)
        (3 * loss).backward()
        results += [loss.detach(), users.grad, items.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_float32_is_as_good_as_float32_can_be() -> None:
    step = random_step(300, 180, seed=2, dtype=torch.float32)
    users, items = step.users.clone().requires_grad_(), step.items.clone().requires_grad_()
    loss = in_batch_softmax(users, items, step.positive, step.log_weight, step.mask, 0.07, step.weight, 64)
    loss.backward()  # type: ignore[no-untyped-call]
    exact = random_step(300, 180, seed=2)
    exact_users, exact_items = exact.users.clone().requires_grad_(), exact.items.clone().requires_grad_()
    expected = naive(exact, exact_users, exact_items, 0.07)
    expected.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert exact_users.grad is not None
    assert exact_items.grad is not None
    torch.testing.assert_close(users.grad, exact_users.grad.float(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(items.grad, exact_items.grad.float(), rtol=1e-3, atol=1e-6)


class Largest(TorchDispatchMode):
    """The size of the largest tensor of reals that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_the_whole_matrix_is_never_held() -> None:
    rows, columns, chunk = 400, 300, 32
    step = random_step(rows, columns)
    users, items = step.users.clone().requires_grad_(), step.items.clone().requires_grad_()
    with Largest() as largest:
        loss = in_batch_softmax(users, items, step.positive, step.log_weight, step.mask, 0.1, step.weight, chunk)
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.numbers == chunk * columns
    with Largest() as largest:
        naive(step, users, items, 0.1)
    assert largest.numbers >= rows * columns  # the measure sees it where it is held


def test_two_rows_by_hand() -> None:
    users = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = in_batch_softmax(
        users,
        users,
        torch.tensor([0, 1]),
        torch.log(torch.tensor([1.0, 3.0])),
        Mask(np.zeros(3, np.int64), np.zeros(0, np.int64)),
        0.5,
        torch.ones(2),
    )
    e = np.exp(2.0)
    assert float(loss.detach()) == pytest.approx(0.5 * (np.log((e + 3) / e) + np.log((e + 1) / e)))


def test_a_row_whose_every_other_column_is_masked_has_no_loss() -> None:
    step = random_step(9, 5)
    everything = Mask(np.arange(10) * 5, np.tile(np.arange(5), 9))
    users = step.users.clone().requires_grad_()
    loss = in_batch_softmax(users, step.items, step.positive, step.log_weight, everything, 0.1, step.weight)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert users.grad is not None
    assert float(users.grad.abs().max()) < 1e-14


def test_a_batch_of_one_item_has_no_loss() -> None:
    weight = in_batch_log_weight(torch.tensor([4.0]), torch.tensor([1.0]))
    users = unit(torch.Generator().manual_seed(0), 4, 3, torch.float32)
    none = Mask(np.zeros(5, np.int64), np.zeros(0, np.int64))
    assert float(in_batch_softmax(users, users[:1], torch.zeros(4).long(), weight, none, 0.1, torch.ones(4))) == 0


def test_weights_of_zero_in_all_rows_give_zero_and_no_nan() -> None:
    step = random_step(12, 6)
    users = step.users.clone().requires_grad_()
    loss = in_batch_softmax(users, step.items, step.positive, step.log_weight, step.mask, 0.1, torch.zeros(12).double())
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert users.grad is not None
    assert not users.grad.any()


def test_the_correction_is_the_copies_over_their_expected_number() -> None:
    weight = in_batch_log_weight(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([0.5, 0.25, 1e-9]))
    expected = np.log([3 / (4 * 0.5), 1 / (4 * 0.25), 1 / 4e-9])
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)


def sampled_gradients(exponent: float, sign: float, batches: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means over many batches and their standard errors, and the gradient of the full softmax, of one world.

    Six users with tastes of their own click on eight items of skewed popularity; rows are drawn independently.
    """
    users_number, items_number, temperature = 6, 8, 0.5
    generator = torch.Generator().manual_seed(1)
    users = unit(generator, users_number, 4, torch.float64)
    items = unit(generator, items_number, 4, torch.float64)
    draw = np.random.default_rng(5)
    joint = draw.gamma(1.0, size=(users_number, items_number)) * (1.0 / np.arange(1, items_number + 1) ** 1.5)
    joint /= joint.sum()
    q = torch.from_numpy(joint.sum(axis=0))
    used = q**exponent / (q**exponent).sum()
    none = Mask(np.zeros(rows + 1, np.int64), np.zeros(0, np.int64))
    found = []
    for _ in range(batches):
        pair = draw.choice(joint.size, size=rows, p=joint.ravel())
        distinct, positive, copies = np.unique(pair % items_number, return_inverse=True, return_counts=True)
        copied = torch.from_numpy(copies).double()
        corrected = in_batch_log_weight(copied, used[distinct])
        log_weight = torch.log(copied) + sign * (corrected - torch.log(copied))
        u, v = users.clone().requires_grad_(), items.clone().requires_grad_()
        in_batch_softmax(
            u[pair // items_number],
            v[distinct],
            torch.from_numpy(positive),
            log_weight,
            none,
            temperature,
            torch.ones(rows).double(),
        ).backward()  # type: ignore[no-untyped-call]
        assert u.grad is not None
        assert v.grad is not None
        found.append(torch.cat([u.grad.ravel(), v.grad.ravel()]))
    u, v = users.clone().requires_grad_(), items.clone().requires_grad_()
    full = torch.log_softmax(u @ v.T / temperature, dim=1)
    (-(torch.from_numpy(joint) * full).sum()).backward()  # type: ignore[no-untyped-call]
    assert u.grad is not None
    assert v.grad is not None
    stacked = torch.stack(found)
    return stacked.mean(0), stacked.std(0) / batches**0.5, torch.cat([u.grad.ravel(), v.grad.ravel()])


def test_on_average_the_gradient_is_that_of_the_softmax_over_the_whole_catalogue() -> None:
    mean, error, full = sampled_gradients(exponent=1.0, sign=1.0, batches=300, rows=512)
    assert float(((mean - full).abs() / error).max()) < 5
    assert float((mean - full).norm() / full.norm()) < 0.02


@pytest.mark.parametrize(("exponent", "sign"), [(1.0, -1.0), (0.75, 1.0), (0.0, 1.0)], ids=["sign", "power", "none"])
def test_with_another_correction_it_is_not(exponent: float, sign: float) -> None:
    mean, error, full = sampled_gradients(exponent, sign, batches=100, rows=512)
    assert float(((mean - full).abs() / error).max()) > 15
    assert float((mean - full).norm() / full.norm()) > 0.05
