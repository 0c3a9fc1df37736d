"""Losses as functions of scores, and two ways to compute them without ever holding all scores.

A loss takes the `Scores` of some rows, the cosines of their positives and negatives, and gives the loss of each row.
Autograd differentiates it, so that a loss of your own is only its formula:

>>> def squared_hinge(scores: Scores) -> Tensor:
...     gap = torch.relu(scores.negatives - scores.positive + 0.3)
...     return (scores.weight * gap**2).sum(dim=1, keepdim=True) / scores.total

The losses below give their derivatives themselves, in the memory of the scores (`DerivedLoss`), which is faster.
`shared_loss` compares every row with one set of negatives (three matrix products), `row_loss` each row with its own.

B batch, b rows of a chunk, D vector, C distinct items of a batch, K shared negatives, H negatives of one row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.features.columns import pointers

CHUNK = 256
"""Rows of scores in memory at a time: 256 x 4096 floats are 4 MB, which stay in the cache."""
ROW_FLOATS = 1 << 20
"""Numbers of gathered vectors in memory at a time, where each row has its own negatives."""


@dataclass(frozen=True)
class Mask:
    """Columns that are no negatives of a row, packed by row: the row's own item and the user's other positives."""

    indptr: npt.NDArray[np.int64]
    """(B + 1,)"""
    columns: npt.NDArray[np.int64]
    """(nnz,) columns in 0..K-1, each at most once a row."""


@dataclass(frozen=True)
class SharedNegatives:
    """Negatives that all rows of a batch have in common: its first K items."""

    log_weight: npt.NDArray[np.floating[Any]]
    """(K,) log of how much each counts."""
    mask: Mask
    """Those that are no negatives of a row."""


@dataclass(frozen=True)
class RowNegatives:
    """Negatives of each row alone."""

    columns: npt.NDArray[np.int64]
    """(B, H) positions among the items of the batch."""
    log_weight: npt.NDArray[np.floating[Any]]
    """(B, H) log of how much each counts, minus infinity for a position that is unused."""


@dataclass(frozen=True)
class Scores:
    """What a loss is a function of: the cosines of b rows, each with at least one negative."""

    positive: Tensor
    """(b, 1) cosine of the positive."""
    negatives: Tensor
    """(b, K) cosines of the negatives, and of items that are no negatives of a row: their weight is 0."""
    total: Tensor
    """(b, 1) sum of the weights of the row's negatives: what turns a weighted sum over them into a mean."""
    calibration: Tensor
    """(2,) log of a scale, and a bias. The model learns both, for losses to which a cosine alone says too little."""
    item_log_weight: Tensor
    """(K,) or (b, K) log of how much each item counts where it is a negative."""
    masked: Tensor
    """(nnz,) int64 positions in the flattened (b, K) of what is no negative."""

    @property
    def log_weight(self) -> Tensor:
        """(b, K) log of how much each negative counts; minus infinity for what is none."""
        full = self.item_log_weight.expand(self.negatives.shape).flatten()
        return full.index_fill(0, self.masked, -torch.inf).view(self.negatives.shape)

    @property
    def weight(self) -> Tensor:
        """(b, K) how much each negative counts; 0 for what is none."""
        return self.log_weight.exp()


@dataclass(frozen=True)
class Derived:
    """Losses of rows with their derivatives; those by the negatives have overwritten the negatives' cosines."""

    loss: Tensor
    """(b, 1)"""
    by_positive: Tensor
    """(b, 1) derivative by the cosine of the positive."""
    scale: Tensor
    """(b, 1) factor that turns the overwritten negatives into derivatives by their cosines."""
    by_calibration: Tensor | None = None
    """(b, 2) derivatives by the calibration; None = it is not used."""


@dataclass(frozen=True)
class DerivedLoss:
    """A loss that gives its derivatives itself, in place of the cosines of the negatives.

    It finds minus infinity where an item is no negative.
    """

    derive: Callable[[Scores], Derived]
    averages: bool = True
    """It uses the sum of the weights of a row's negatives (`Scores.total`), which costs a step of its own."""


Loss = Callable[[Scores], Tensor] | DerivedLoss
"""From the scores of b rows to the loss of each, (b, 1)."""


def sampled_softmax(temperature: float) -> Loss:
    """-log( e^s+ / (e^s+ + sum_j w_j e^s_j) ) with s = cos / temperature.

    With w_j = 1 / (expected count of j) the sum is an unbiased estimate of the full softmax's (Bengio, Senecal 2008).
    The positive is there with certainty, so it is not corrected.
    """

    def derive(scores: Scores) -> Derived:
        own = scores.positive / temperature
        top, mass = _exponentials(scores, temperature)
        top_of_all = torch.maximum(top, own)
        mass = mass * torch.exp(top - top_of_all)
        normaliser = torch.exp(own - top_of_all) + mass
        loss = normaliser.log() + top_of_all - own
        by_positive = -mass / (normaliser * temperature)
        return Derived(loss, by_positive, torch.exp(top - top_of_all) / (normaliser * temperature))

    return DerivedLoss(derive, averages=False)


def corrected_log_q(temperature: float) -> Loss:
    """(1 - P) ( log sum_j w_j e^s_j - s+ ), P the positive's share of the softmax, a constant for the gradient.

    Khrylchenko et al. 2025, "Correcting the LogQ Correction": the positive is not drawn, so it leaves the sum, and a
    row counts as much as the model is still wrong about it. With P from the same draws the gradient is that of
    `sampled_softmax`, to rounding; only the loss's value differs. Both differ from the textbook (Yi et al. 2019) in
    that they do not correct the positive.
    """

    def derive(scores: Scores) -> Derived:
        own = scores.positive / temperature
        top, mass = _exponentials(scores, temperature)
        safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        behind = safe.log() + top - own
        unsure = torch.sigmoid(behind)
        return Derived(unsure * behind, -unsure / temperature, unsure / (safe * temperature))

    return DerivedLoss(derive, averages=False)


def bsl(temperature: float, positive_temperature: float) -> Loss:
    """-cos+ / t+ + (t / t+) log sum_j w_j e^(cos_j / t), the bilateral softmax loss of Wu et al. 2023, of one positive.

    The positive has its own temperature t+ and is not in the sum. With t+ = t it is the softmax loss whose rows never
    stop counting (its `1 - P` is 1). The paper's equation is divided by t+.
    """

    def derive(scores: Scores) -> Derived:
        top, mass = _exponentials(scores, temperature)
        safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        ratio = temperature / positive_temperature
        loss = ratio * (safe.log() + top) - scores.positive / positive_temperature
        by_positive = torch.full_like(loss, -1 / positive_temperature)
        return Derived(loss, by_positive, 1 / (safe * positive_temperature))

    return DerivedLoss(derive, averages=False)


def triplet_hinge(margin: float) -> Loss:
    """Mean over negatives of max(0, cos- + margin - cos+) (Schroff et al. 2015, on cosines), weighted by w."""

    def derive(scores: Scores) -> Derived:
        wrong, weight, scale = scores.negatives, scores.item_log_weight.exp(), 1 / scores.total
        wrong.add_(margin - scores.positive).clamp_min_(0)
        loss = (wrong * weight).sum(dim=1, keepdim=True) * scale
        torch.mul((wrong > 0).to(wrong.dtype), weight, out=wrong)
        return Derived(loss, -wrong.sum(dim=1, keepdim=True) * scale, scale)

    return DerivedLoss(derive)


def triplet_logistic(sigma: float) -> Loss:
    """Mean over negatives of log(1 + exp(sigma (cos- - cos+))) (BPR, Rendle et al. 2009, on cosines), weighted by w."""

    def derive(scores: Scores) -> Derived:
        wrong, scale = scores.negatives, 1 / scores.total
        loss = _softplus(wrong.sub_(scores.positive).mul_(sigma), scores.item_log_weight.exp()) * scale
        return Derived(loss, -wrong.sum(dim=1, keepdim=True) * (scale * sigma), scale * sigma)

    return DerivedLoss(derive)


def pointwise(negatives: float) -> Loss:
    """Binary cross-entropy of a cos + b: the positive's, plus `negatives` times the negatives' mean, weighted by w.

    a = exp(calibration[0]) and b = calibration[1] are learned: a cosine alone cannot express "almost certainly".
    """

    def derive(scores: Scores) -> Derived:
        a, b = scores.calibration[0].exp(), scores.calibration[1]
        wrong, scale = scores.negatives, negatives / scores.total
        own = a * scores.positive + b
        missed = torch.sigmoid(-own)
        cosines = wrong.clamp_min(-1)  # finite where masked: their derivative is 0
        loss = (
            torch.nn.functional.softplus(-own) + _softplus(wrong.mul_(a).add_(b), scores.item_log_weight.exp()) * scale
        )
        by_bias = wrong.sum(dim=1, keepdim=True) * scale - missed
        by_scale = a * (cosines.mul_(wrong).sum(dim=1, keepdim=True) * scale - missed * scores.positive)
        return Derived(loss, -missed * a, scale * a, torch.cat([by_scale, by_bias], dim=1))

    return DerivedLoss(derive)


def _softplus(wrong: Tensor, weight: Tensor) -> Tensor:
    """Overwrite x with the derivative of weight log(1 + e^x); gives the sum of that over negatives (b, 1).

    As -log sigmoid(-x), which is vectorised where softplus is not, and exact enough below x = 80.
    """
    wrong.clamp_max_(80).neg_().sigmoid_()
    loss = -(wrong.log() * weight).sum(dim=1, keepdim=True)
    torch.mul(wrong.neg_().add_(1), weight, out=wrong)
    return loss


def _exponentials(scores: Scores, temperature: float) -> tuple[Tensor, Tensor]:
    """Overwrite cosines with e^(cos / temperature + log_weight - top); gives top (b, 1) and their sum (b, 1)."""
    wrong = scores.negatives
    torch.add(scores.item_log_weight, wrong, alpha=1 / temperature, out=wrong)
    top = wrong.amax(dim=1, keepdim=True)
    wrong.sub_(top).exp_()
    return top, wrong.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class _Gradients:
    """The summed loss of some rows, float64, and its derivatives."""

    loss: Tensor
    by_positive: Tensor
    """(b, 1)"""
    by_negatives: Tensor
    """(b, K)"""
    by_calibration: Tensor
    """(2,)"""


def _differentiate(loss: Loss, scores: Scores, share: Tensor) -> _Gradients:
    """The losses of some rows, summed with `share` (b, 1), and the derivatives of that sum by the scores."""
    if isinstance(loss, DerivedLoss):
        scores.negatives.view(-1).index_fill_(0, scores.masked, -torch.inf)
        derived = loss.derive(scores)
        by_negatives, by_calibration = (
            scores.negatives.mul_(share * derived.scale),
            torch.zeros_like(scores.calibration),
        )
        if derived.by_calibration is not None:
            by_calibration = (share * derived.by_calibration).sum(dim=0)
        value = (share * derived.loss).sum(dtype=torch.float64)
        return _Gradients(value, share * derived.by_positive, by_negatives, by_calibration)
    leaves = [part.detach().requires_grad_() for part in (scores.positive, scores.negatives, scores.calibration)]
    with torch.enable_grad():
        losses = loss(replace(scores, positive=leaves[0], negatives=leaves[1], calibration=leaves[2]))
    if losses.shape != share.shape:
        raise ValueError(f"the loss gave {tuple(losses.shape)} for {len(share)} rows: it gives each row one, (b, 1)")
    gradients = torch.autograd.grad(losses, leaves, share, materialize_grads=True)
    return _Gradients((share * losses.detach()).sum(dtype=torch.float64), *gradients)


class _WithDerivatives(torch.autograd.Function):
    """A loss (a scalar) whose derivatives are known already."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Any:
        _, _, _, loss, *derivatives = given
        ctx.save_for_backward(*derivatives)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *(derivative * grad for derivative in ctx.saved_tensors), None, None, None, None


def shared_loss(
    loss: Loss,
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    negatives: SharedNegatives,
    *,
    share: Tensor,
    calibration: Tensor,
) -> Tensor:
    """Each row against the first K items of the batch, summed with `share`; a row without negatives counts nothing.

    The B x K scores are made `CHUNK` rows at a time and never all held: the time is that of three matrix products, the
    memory that of a chunk.

    Args:
        loss: gives the loss of each row.
        users: (B, D) unit vectors.
        items: (C, D) unit vectors of the distinct items of the batch, the K negatives first.
        positive: (B,) int64 position of each row's item among them.
        negatives: their weights, which take no gradient, and what is no negative of a row.
        share: (B,) factor of each row's loss.
        calibration: (2,) see `Scores`.
    """
    with torch.no_grad():
        averages = not isinstance(loss, DerivedLoss) or loss.averages
        rows, log_weight, kept = len(users), torch.from_numpy(negatives.log_weight), _kept(negatives, averages)
        columns, totals = len(log_weight), torch.from_numpy(kept.total).to(users.dtype)[:, None]
        masked, row_share = torch.from_numpy(kept.masked), share[:, None] * torch.from_numpy(kept.compared)[:, None]
        others, own = items[:columns], items[positive]
        right = (users * own).sum(dim=1, keepdim=True)
        by_user, by_item, by_calibration = (torch.zeros_like(x) for x in (users, items, calibration))
        by_positive, value = torch.empty_like(right), torch.zeros((), dtype=torch.float64)
        scores = torch.empty((min(CHUNK, rows), columns), dtype=users.dtype)
        for start in range(0, rows, CHUNK):
            stop = min(start + CHUNK, rows)
            part, none = users[start:stop], masked[kept.indptr[start] : kept.indptr[stop]] - start * columns
            cosines = torch.mm(part, others.T, out=scores[: stop - start])
            given = Scores(right[start:stop], cosines, totals[start:stop], calibration, log_weight, none)
            gradients = _differentiate(loss, given, row_share[start:stop])
            value += gradients.loss
            by_calibration += gradients.by_calibration
            by_positive[start:stop] = gradients.by_positive
            torch.mm(gradients.by_negatives, others, out=by_user[start:stop])
            by_item[:columns].addmm_(gradients.by_negatives.T, part)
        by_user.addcmul_(by_positive, own)
        by_item.index_add_(0, positive, by_positive * users)
    result: Tensor = _WithDerivatives.apply(  # type: ignore[no-untyped-call]
        users, items, calibration, value.to(users.dtype), by_user, by_item, by_calibration
    )
    return result


@dataclass(frozen=True)
class _Kept:
    """What is left of shared negatives in each of B rows. A row without any keeps all of them, and must count 0."""

    compared: npt.NDArray[np.bool_]
    """(B,) the row has negatives."""
    total: npt.NDArray[np.float64]
    """(B,) sum of their weights; 1 where the loss does not use it."""
    indptr: npt.NDArray[np.int64]
    """(B + 1,) the masked ones of each row."""
    masked: npt.NDArray[np.int64]
    """(nnz,) positions of the masked ones in the flattened (B, K)."""


def _kept(negatives: SharedNegatives, averages: bool) -> _Kept:
    mask, columns = negatives.mask, len(negatives.log_weight)
    counts = np.diff(mask.indptr)
    masked = np.repeat(np.arange(len(counts)) * columns, counts) + mask.columns
    some, total = counts < columns, np.ones(len(counts))
    if averages:
        weight = np.exp(negatives.log_weight.astype(np.float64))
        row = np.repeat(np.arange(len(counts)), counts)
        total = weight.sum() - np.bincount(row, weight[mask.columns], len(counts))
        some &= total > 0
        total = np.where(some, total, 1)
    if some.all():
        return _Kept(some, total, mask.indptr, masked)
    return _Kept(some, total, pointers(np.where(some, counts, 0)), masked[np.repeat(some, counts)])


def row_loss(
    loss: Loss,
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    negatives: RowNegatives,
    *,
    share: Tensor,
    calibration: Tensor,
) -> Tensor:
    """Each row against its own negatives, summed with `share`; arguments and result are those of `shared_loss`."""
    with torch.no_grad():
        columns, log_weight = torch.from_numpy(negatives.columns), torch.from_numpy(negatives.log_weight)
        (rows, wide), dimension = columns.shape, users.shape[1]
        totals, unused = log_weight.exp().sum(dim=1, keepdim=True), torch.isneginf(log_weight)
        log_weight, alone = log_weight.masked_fill(unused, 0), totals == 0
        totals, unused, row_share = totals.masked_fill(alone, 1), unused & ~alone, share[:, None] * ~alone
        by_user, by_item, by_calibration = (torch.zeros_like(x) for x in (users, items, calibration))
        value, chunk = torch.zeros((), dtype=torch.float64), max(1, ROW_FLOATS // max(1, wide * dimension))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            part, places = users[start:stop], columns[start:stop].reshape(-1)
            own, others = items[positive[start:stop]], items[places].view(stop - start, wide, -1)
            cosines = torch.bmm(others, part[:, :, None]).squeeze(2)
            right, none = (part * own).sum(dim=1, keepdim=True), unused[start:stop].flatten().nonzero()[:, 0]
            given = Scores(right, cosines, totals[start:stop], calibration, log_weight[start:stop], none)
            gradients = _differentiate(loss, given, row_share[start:stop])
            value += gradients.loss
            by_calibration += gradients.by_calibration
            torch.bmm(gradients.by_negatives[:, None, :], others, out=by_user[start:stop, None, :])
            by_user[start:stop].addcmul_(gradients.by_positive, own)
            by_item.index_add_(0, positive[start:stop], gradients.by_positive * part)
            by_item.index_add_(0, places, (gradients.by_negatives[:, :, None] * part[:, None, :]).view(-1, dimension))
    result: Tensor = _WithDerivatives.apply(  # type: ignore[no-untyped-call]
        users, items, calibration, value.to(users.dtype), by_user, by_item, by_calibration
    )
    return result
