from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode

from twotower.towers.losses import (
    Loss,
    Mask,
    RowNegatives,
    Scores,
    SharedNegatives,
    bsl,
    corrected_log_q,
    pointwise,
    row_loss,
    sampled_softmax,
    shared_loss,
    triplet_hinge,
    triplet_logistic,
)

CALIBRATION = torch.tensor([np.log(7.0), -0.3])
Plain = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A loss beside its formula for one row: cosine of the positive, those of the negatives, weights, calibration."""

    loss: Loss
    plain: Plain


def _log_sum(wrong: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (weight * torch.exp(wrong / temperature)).sum().log()


def _plain_softmax(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return torch.log(torch.exp(right / 0.3) + (weight * torch.exp(wrong / 0.3)).sum()) - right / 0.3


def _plain_corrected(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    negatives = (weight * torch.exp(wrong / 0.3)).sum()
    share = (torch.exp(right / 0.3) / (torch.exp(right / 0.3) + negatives)).detach()
    return (1 - share) * (_log_sum(wrong, weight, 0.3) - right / 0.3)


def _plain_bsl(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return -right / 0.5 + 0.3 / 0.5 * _log_sum(wrong, weight, 0.3)


def _plain_hinge(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return (weight * torch.relu(wrong + 0.2 - right)).sum() / weight.sum()


def _plain_logistic(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return (weight * torch.log(1 + torch.exp(5 * (wrong - right)))).sum() / weight.sum()


def _plain_pointwise(right: Tensor, wrong: Tensor, weight: Tensor, calibration: Tensor) -> Tensor:
    scale, bias = calibration[0].exp(), calibration[1]
    negatives = (weight * softplus(scale * wrong + bias)).sum() / weight.sum()
    return softplus(-(scale * right + bias)) + 2.5 * negatives


CASES = {
    "sampled_softmax": Case(sampled_softmax(0.3), _plain_softmax),
    "corrected_log_q": Case(corrected_log_q(0.3), _plain_corrected),
    "bsl": Case(bsl(0.3, 0.5), _plain_bsl),
    "triplet_hinge": Case(triplet_hinge(0.2), _plain_hinge),
    "triplet_logistic": Case(triplet_logistic(5.0), _plain_logistic),
    "pointwise": Case(pointwise(2.5), _plain_pointwise),
}


def _squared_hinge(scores: Scores) -> Tensor:
    """A loss as a user writes it: its formula, for autograd."""
    gap = torch.relu(scores.negatives - scores.positive + 0.3)
    return (scores.weight * gap**2).sum(dim=1, keepdim=True) / scores.total


def _plain_squared_hinge(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return (weight * torch.relu(wrong - right + 0.3) ** 2).sum() / weight.sum()


def _focal(scores: Scores) -> Tensor:
    """Learns a scale and a bias."""
    scale, bias = scores.calibration[0].exp(), scores.calibration[1]
    positive, negatives = scale * scores.positive + bias, scale * scores.negatives + bias
    wrong = torch.sigmoid(negatives) ** 2 * softplus(negatives)
    return softplus(-positive) + (scores.weight * wrong).sum(dim=1, keepdim=True) / scores.total


def _contrast(scores: Scores) -> Tensor:
    """A sum in the log space of the weights."""
    return torch.logsumexp(scores.negatives / 0.3 + scores.log_weight, dim=1, keepdim=True) - scores.positive / 0.3


def _plain_contrast(right: Tensor, wrong: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    return _log_sum(wrong, weight, 0.3) - right / 0.3


def _plain_focal(right: Tensor, wrong: Tensor, weight: Tensor, calibration: Tensor) -> Tensor:
    scale, bias = calibration[0].exp(), calibration[1]
    negatives = torch.sigmoid(scale * wrong + bias) ** 2 * softplus(scale * wrong + bias)
    return softplus(-(scale * right + bias)) + (weight * negatives).sum() / weight.sum()


CASES["own: squared hinge"] = Case(_squared_hinge, _plain_squared_hinge)
CASES["own: focal"] = Case(_focal, _plain_focal)
CASES["own: contrast"] = Case(_contrast, _plain_contrast)
each_form = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@dataclass(frozen=True)
class Step:
    users: Tensor
    items: Tensor
    positive: Tensor
    log_weight: Tensor
    mask: Mask
    share: Tensor

    def negatives_of(self, row: int) -> list[int]:
        masked = self.mask.columns[self.mask.indptr[row] : self.mask.indptr[row + 1]].tolist()
        return [column for column in range(len(self.log_weight)) if column not in masked]


def unit(generator: torch.Generator, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    vectors = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return (vectors / vectors.norm(dim=1, keepdim=True)).to(dtype)


def random_step(rows: int, items: int, negatives: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Step:
    """Some positives are among the negatives, others not; rows are masked at random, some of them wholly."""
    generator = torch.Generator().manual_seed(seed)
    draw = np.random.default_rng(seed)
    positive = draw.integers(items, size=rows)
    lists = [
        np.union1d(
            np.flatnonzero(draw.random(negatives) < draw.choice([0.0, 0.3, 1.0])), [p] if p < negatives else []
        ).astype(np.int64)
        for p in positive
    ]
    mask = Mask(np.cumsum([0, *map(len, lists)]), np.concatenate(lists))
    return Step(
        unit(generator, rows, dtype),
        unit(generator, items, dtype),
        torch.from_numpy(positive),
        torch.randn(negatives, generator=generator, dtype=torch.float64).to(dtype),
        mask,
        torch.from_numpy(draw.choice([0.0, 0.5, 2.0], size=rows)).to(dtype),
    )


def plain_loss(plain: Plain, step: Step, users: Tensor, items: Tensor, calibration: Tensor) -> Tensor:
    """The formula row by row, by autograd; a row without negatives has no loss."""
    total = torch.zeros((), dtype=users.dtype)
    for row in range(len(users)):
        negatives = step.negatives_of(row)
        if negatives:
            right = users[row] @ items[step.positive[row]]
            weight = step.log_weight[negatives].exp()
            total = total + step.share[row] * plain(right, items[negatives] @ users[row], weight, calibration)
    return total


def gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor], step: Step) -> list[Tensor]:
    """The loss, and its derivatives by users, items and calibration (0 where it does not depend on that)."""
    leaves = [step.users.clone(), step.items.clone(), CALIBRATION.clone().to(step.users.dtype)]
    for leaf in leaves:
        leaf.requires_grad_()
    value = loss(*leaves)
    (3 * value).backward()  # type: ignore[no-untyped-call]
    return [value.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def shared(form: Loss, step: Step) -> list[Tensor]:
    def loss(users: Tensor, items: Tensor, calibration: Tensor) -> Tensor:
        return shared_loss(
            form,
            users,
            items,
            step.positive,
            SharedNegatives(step.log_weight.numpy(), step.mask),
            share=step.share,
            calibration=calibration,
        )

    return gradients(loss, step)


@each_form
@pytest.mark.parametrize("chunk", [1, 7, 16, 37, 256])
def test_shared_negatives_have_the_value_and_gradients_of_the_formula(
    case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = random_step(37, 24, 17)
    monkeypatch.setattr("twotower.towers.losses.CHUNK", chunk)
    expected = gradients(lambda u, v, a: plain_loss(case.plain, step, u, v, a), step)
    for one, other in zip(shared(case.loss, step), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@each_form
def test_a_rows_own_negatives_have_the_value_and_gradients_of_the_formula(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = random_step(37, 24, 17)
    wide = 19
    places, weights = torch.zeros((37, wide), dtype=torch.int64), torch.full((37, wide), -torch.inf).double()
    for row in range(37):
        negatives = step.negatives_of(row)
        places[row, : len(negatives)] = torch.tensor(negatives)
        weights[row, : len(negatives)] = step.log_weight[negatives]
    own = RowNegatives(places.numpy(), weights.numpy())
    expected = gradients(lambda u, v, a: plain_loss(case.plain, step, u, v, a), step)
    for numbers in (1, 1000, 1 << 20):  # one row at a time, several, all
        monkeypatch.setattr("twotower.towers.losses.ROW_FLOATS", numbers)
        found = gradients(
            lambda u, v, a: row_loss(case.loss, u, v, step.positive, own, share=step.share, calibration=a), step
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@each_form
def test_float32_is_as_good_as_float32_can_be(case: Case) -> None:
    found, exact = (shared(case.loss, random_step(300, 180, 150, 2, dtype)) for dtype in (torch.float32, torch.double))
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-4)


@each_form
def test_rows_without_negatives_have_no_loss_and_no_gradient(case: Case) -> None:
    step = random_step(9, 5, 5)
    everything = Step(**{**vars(step), "mask": Mask(np.arange(10) * 5, np.tile(np.arange(5), 9))})
    assert all(float(one.abs().max()) == 0 for one in shared(case.loss, everything))


@each_form
def test_extreme_cosines_stay_finite(case: Case) -> None:
    """Opposite and equal vectors, at a low temperature."""
    forms = {"sampled_softmax": sampled_softmax(0.01), "corrected_log_q": corrected_log_q(0.01), "bsl": bsl(0.01, 0.01)}
    (name,) = [name for name, one in CASES.items() if one is case]
    users = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    items = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    none = Mask(np.array([0, 1, 2]), np.array([0, 1]))
    users.requires_grad_()
    loss = shared_loss(
        forms.get(name, case.loss), users, items, torch.tensor([0, 1]),
        SharedNegatives(np.array([-20.0, 20.0], np.float32), none),
        share=torch.ones(2), calibration=CALIBRATION.float(),
    )  # fmt: skip
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert users.grad is not None
    assert bool(torch.isfinite(users.grad).all())


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


@each_form
def test_the_whole_matrix_is_never_held(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.towers.losses.CHUNK", 32)
    step = random_step(400, 300, 300)
    with Largest() as largest:
        shared(case.loss, step)
    assert largest.numbers == 32 * 300
    with Largest() as largest:
        step.users @ step.items.T
    assert largest.numbers == 400 * 300  # the measure sees it where it is held


def by_hand(form: Loss, right: float, wrong: list[float], weight: list[float]) -> float:
    """The loss of one row, from cosines in the plane."""
    angles = np.arccos([right, *wrong])
    items = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    negatives = SharedNegatives(np.log([1.0, *weight]), Mask(np.array([0, 1]), np.array([0])))
    users = torch.tensor([[1.0, 0.0]]).double()
    share = torch.ones(1).double()
    calibration = CALIBRATION.double()
    return float(shared_loss(form, users, items, torch.tensor([0]), negatives, share=share, calibration=calibration))


def test_one_row_by_hand() -> None:
    right, wrong, weight = 0.5, [0.25, -0.5], [3.0, 1.0]
    e = np.exp
    mass = 3 * e(0.5) + e(-1.0)
    assert by_hand(sampled_softmax(0.5), right, wrong, weight) == pytest.approx(np.log((e(1.0) + mass) / e(1.0)))
    unsure = mass / (e(1.0) + mass)
    assert by_hand(corrected_log_q(0.5), right, wrong, weight) == pytest.approx(unsure * (np.log(mass) - 1))
    assert by_hand(bsl(0.5, 0.25), right, wrong, weight) == pytest.approx(2 * np.log(mass) - 2)
    assert by_hand(triplet_hinge(0.5), right, wrong, weight) == pytest.approx(3 * 0.25 / 4)
    logistic = (3 * np.log(1 + e(-1.0)) + np.log(1 + e(-4.0))) / 4
    assert by_hand(triplet_logistic(4.0), right, wrong, weight) == pytest.approx(logistic)
    negatives = (3 * np.log(1 + e(1.75 - 0.3)) + np.log(1 + e(-3.5 - 0.3))) / 4
    assert by_hand(pointwise(2.0), right, wrong, weight) == pytest.approx(np.log(1 + e(-3.2)) + 2 * negatives, rel=1e-6)


def test_the_refined_log_q_correction_has_the_gradient_of_the_softmax_that_leaves_the_positive_uncorrected() -> None:
    step = random_step(37, 24, 17)
    one, other = shared(sampled_softmax(0.1), step), shared(corrected_log_q(0.1), step)
    assert abs(float(one[0] - other[0])) > 0.1
    torch.testing.assert_close(one[1], other[1], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one[2], other[2], rtol=1e-9, atol=1e-10)


def test_a_loss_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss gave \(\) for 37 rows: it gives each row one, \(b, 1\)"):
        shared(lambda scores: _squared_hinge(scores).mean(), random_step(37, 24, 17))
