"""Losses as pure functions of cosines, and two ways to compute them without ever holding all scores.

A *form* takes the cosine of each row's positive and those of its negatives and gives the loss of the row with its
derivatives, so that a chunk of scores becomes gradients on the spot. `shared_loss` compares every row with one set of
negatives (three matrix products), `row_loss` each row with its own.

B batch, b rows of a chunk, D vector, C distinct items of a batch, K shared negatives, H negatives of one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
class RowLoss:
    """The losses of some rows and their derivatives; those by the negatives stand where their cosines were."""

    loss: Tensor
    """(b, 1)"""
    by_right: Tensor
    """(b, 1) derivative by the cosine of the positive."""
    scale: Tensor
    """(b, 1) what the overwritten negatives are to be multiplied by to be derivatives by their cosines."""
    by_bias: Tensor | None = None
    """(b, 1) derivative by the bias, of a pointwise loss; that by the scale follows from those by the cosines."""


@dataclass(frozen=True)
class Form:
    """A loss of cosines.

    `rows` is called as (right, wrong, log_weight, total, calibration) and gives a `RowLoss`. right: (b, 1) cosine of
    the positive. wrong: (b, K) cosines of the negatives, minus infinity if masked; overwritten. log_weight: (K,) or
    (b, K), log of how much each negative counts. total: (b, 1) sum of the weights that are not masked; a loss that
    does not average gets 1 instead, or 0 where all are masked. calibration: (2,) log of scale, bias. A row without
    negatives (total 0) has the loss 0 and no gradient.
    """

    rows: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], RowLoss]
    averages: bool
    """It is a mean over negatives."""


def sampled_softmax(temperature: float) -> Form:
    """-log( e^s+ / (e^s+ + sum_j w_j e^s_j) ) with s = cos / temperature.

    With w_j = 1 / (expected count of j) the sum is an unbiased estimate of the full softmax's (Bengio, Senecal 2008).
    The positive is there with certainty, so it is not corrected.
    """

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, _: Tensor) -> RowLoss:
        own = right / temperature
        top, mass = _exponentials(wrong, log_weight, temperature)
        top_of_all = torch.maximum(top, own)
        mass = mass * torch.exp(top - top_of_all)
        own_mass = torch.exp(own - top_of_all)
        normaliser = own_mass + mass
        alive = (total > 0).to(right.dtype)
        loss = (normaliser.log() + top_of_all - own) * alive
        by_right = -mass / (normaliser * temperature) * alive
        return RowLoss(loss, by_right, torch.exp(top - top_of_all) / (normaliser * temperature) * alive)

    return Form(form, averages=False)


def corrected_log_q(temperature: float) -> Form:
    """(1 - P) ( log sum_j w_j e^s_j - s+ ), P the positive's share of the softmax, a constant for the gradient.

    Khrylchenko et al. 2025, "Correcting the LogQ Correction": the positive is not drawn, so it leaves the sum, and the
    row counts as much as the model is still wrong about it. With P from the same draws the gradient is that of
    `sampled_softmax`, to rounding: leaving the positive uncorrected there *is* this correction. What differs from the
    textbook (Yi et al. 2019) is that neither corrects the positive. The loss's value is another.
    """

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, _: Tensor) -> RowLoss:
        own = right / temperature
        top, mass = _exponentials(wrong, log_weight, temperature)
        alive = (total > 0).to(right.dtype)
        safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        negatives = safe.log() + top
        unsure = torch.sigmoid(negatives - own) * alive
        return RowLoss(
            unsure * torch.where(total > 0, negatives - own, 0), -unsure / temperature, unsure / (safe * temperature)
        )

    return Form(form, averages=False)


def bsl(temperature: float, positive_temperature: float) -> Form:
    """-cos+ / t+ + (t / t+) log sum_j w_j e^(cos_j / t), the bilateral softmax loss of Wu et al. 2023, of one positive.

    Its positive has a temperature t+ of its own, and is not in the sum: with t+ = t it is the softmax loss whose rows
    never stop counting (its `1 - P` is 1). The paper's equation is divided by t+.
    """

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, _: Tensor) -> RowLoss:
        top, mass = _exponentials(wrong, log_weight, temperature)
        alive = (total > 0).to(right.dtype)
        safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        ratio = temperature / positive_temperature
        loss = torch.where(total > 0, ratio * (safe.log() + top) - right / positive_temperature, 0)
        return RowLoss(loss, -alive / positive_temperature, alive / (safe * positive_temperature))

    return Form(form, averages=False)


def triplet_hinge(margin: float) -> Form:
    """Mean over negatives of max(0, cos- + margin - cos+) (Schroff et al. 2015, on cosines), weighted by w."""

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, _: Tensor) -> RowLoss:
        weight = log_weight.exp()
        alive, scale = _mean(right, total)
        wrong.add_(margin - right).clamp_min_(0)
        loss = (wrong * weight).sum(dim=1, keepdim=True) * scale
        torch.mul((wrong > 0).to(wrong.dtype), weight, out=wrong)
        return RowLoss(loss * alive, -wrong.sum(dim=1, keepdim=True) * scale, scale)

    return Form(form, averages=True)


def triplet_logistic(sigma: float) -> Form:
    """Mean over negatives of log(1 + exp(sigma (cos- - cos+))) (BPR, Rendle et al. 2009, on cosines), weighted by w."""

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, _: Tensor) -> RowLoss:
        alive, scale = _mean(right, total)
        wrong.sub_(right).mul_(sigma)
        loss = _softplus(wrong, log_weight.exp()) * scale
        return RowLoss(loss * alive, -wrong.sum(dim=1, keepdim=True) * (scale * sigma), scale * sigma)

    return Form(form, averages=True)


def pointwise(negatives: float) -> Form:
    """Binary cross-entropy of a cos + b: the positive's, plus `negatives` times the negatives' mean, weighted by w.

    a = exp(calibration[0]) and b = calibration[1] are learned: a cosine alone cannot say "almost certainly".
    """

    def form(right: Tensor, wrong: Tensor, log_weight: Tensor, total: Tensor, calibration: Tensor) -> RowLoss:
        a, b = calibration[0].exp(), calibration[1]
        alive, scale = _mean(right, total)
        scale = scale * negatives
        own = a * right + b
        missed = torch.sigmoid(-own) * alive
        wrong.mul_(a).add_(b)
        loss = torch.nn.functional.softplus(-own) + _softplus(wrong, log_weight.exp()) * scale
        taken = wrong.sum(dim=1, keepdim=True) * scale
        return RowLoss(loss * alive, -missed * a, scale * a, taken - missed)

    return Form(form, averages=True)


def _softplus(wrong: Tensor, weight: Tensor) -> Tensor:
    """Overwrite x with the derivative of weight log(1 + e^x); gives the sum of that over negatives (b, 1).

    As -log sigmoid(-x), which is vectorised where softplus is not, and exact enough below x = 80.
    """
    wrong.clamp_max_(80).neg_().sigmoid_()
    loss = -(wrong.log() * weight).sum(dim=1, keepdim=True)
    torch.mul(wrong.neg_().add_(1), weight, out=wrong)
    return loss


def _exponentials(wrong: Tensor, log_weight: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Overwrite cosines with e^(cos / temperature + log_weight - top); gives top (b, 1) and their sum (b, 1)."""
    torch.add(log_weight, wrong, alpha=1 / temperature, out=wrong)
    top = wrong.amax(dim=1, keepdim=True).clamp_min(-1e30)  # all masked: finite, so that they become 0
    wrong.sub_(top).exp_()
    return top, wrong.sum(dim=1, keepdim=True)


def _mean(right: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """1 where there is a negative (b, 1), and what turns a weighted sum into a mean (b, 1)."""
    alive = (total > 0).to(right.dtype)
    return alive, alive / total.clamp_min(torch.finfo(total.dtype).tiny)


def shared_loss(
    form: Form,
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    log_weight: Tensor,
    mask: Mask,
    share: Tensor,
    calibration: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """Each row against the first K items of the batch, summed with `share`.

    The B x K scores are made `chunk` rows at a time and never all held: time is that of three matrix products, memory
    that of a chunk.

    Args:
        form: the loss of a row.
        users: (B, D) unit vectors.
        items: (C, D) unit vectors of the distinct items of the batch, the K negatives first.
        positive: (B,) int64 place of each row's item among them.
        log_weight: (K,) log of how much each negative counts; takes no gradient.
        mask: negatives that are none of a row's: its own item and its user's other positives.
        share: (B,) what each row's loss is multiplied by.
        calibration: (2,) log of scale and bias; used by `pointwise`.
        chunk: rows at a time.

    Returns:
        The loss, a scalar.
    """
    loss: Tensor = _SharedLoss.apply(  # type: ignore[no-untyped-call]
        users, items, calibration, form, positive, log_weight, mask, share, chunk
    )
    return loss


class _SharedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        calibration: Tensor,
        form: Form,
        positive: Tensor,
        log_weight: Tensor,
        mask: Mask,
        share: Tensor,
        chunk: int,
    ) -> Tensor:
        rows, columns = len(users), len(log_weight)
        negatives = items[:columns]
        by_user, by_item = torch.empty_like(users), torch.zeros_like(items)
        by_right, by_calibration = torch.empty((rows, 1), dtype=users.dtype), torch.zeros_like(calibration)
        own = items[positive]
        right = (users * own).sum(dim=1, keepdim=True)
        scores = torch.empty((min(chunk, rows), columns), dtype=users.dtype)
        loss = torch.zeros((), dtype=torch.float64)
        # Where the masked scores stand in the B x K matrix.
        masked = torch.from_numpy(np.repeat(np.arange(rows) * columns, np.diff(mask.indptr)) + mask.columns)
        total = _total(log_weight, mask, form.averages)
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            part, part_share = users[start:stop], share[start:stop, None]
            wrong = torch.mm(part, negatives.T, out=scores[: stop - start])
            wrong.view(-1).index_fill_(0, masked[mask.indptr[start] : mask.indptr[stop]] - start * columns, -torch.inf)
            found = form.rows(right[start:stop], wrong, log_weight, total[start:stop], calibration)
            loss += (part_share * found.loss).sum(dtype=torch.float64)
            by_right[start:stop] = part_share * found.by_right
            if found.by_bias is not None:
                by_calibration[1] += (part_share * found.by_bias).sum()
            wrong.mul_(part_share * found.scale)
            torch.mm(wrong, negatives, out=by_user[start:stop])
            by_item[:columns].addmm_(wrong.T, part)
        by_user.addcmul_(by_right, own)
        by_item.index_add_(0, positive, by_right * users)
        if found.by_bias is not None:
            by_calibration[0] = (users * by_user).sum()  # a enters as a cos, and so does each user's vector
        ctx.save_for_backward(by_user, by_item, by_calibration)
        return loss.to(users.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        by_user, by_item, by_calibration = ctx.saved_tensors
        return by_user * grad, by_item * grad, by_calibration * grad, None, None, None, None, None, None


def _total(log_weight: Tensor, mask: Mask, averages: bool) -> Tensor:
    """The weight (B, 1) of each row's negatives that are not masked, or 1; exactly 0 where all are masked."""
    masked = np.diff(mask.indptr)
    total = (masked < len(log_weight)).astype(np.float64)
    if averages:
        weight = log_weight.double().exp().numpy()
        line = np.repeat(np.arange(len(masked)), masked)
        total *= np.maximum(weight.sum() - np.bincount(line, weight[mask.columns], len(masked)), 0)
    return torch.from_numpy(total).to(log_weight.dtype)[:, None]


def row_loss(
    form: Form,
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    negatives: Tensor,
    log_weight: Tensor,
    share: Tensor,
    calibration: Tensor,
) -> Tensor:
    """Each row against negatives of its own, summed with `share`.

    Args:
        form: the loss of a row.
        users: (B, D) unit vectors.
        items: (C, D) unit vectors of the distinct items of the batch.
        positive: (B,) int64 place of each row's item among them.
        negatives: (B, H) int64 places of its negatives.
        log_weight: (B, H) log of how much each counts, minus infinity for one that is none; takes no gradient.
        share: (B,) what each row's loss is multiplied by.
        calibration: (2,) log of scale and bias; used by `pointwise`.

    Returns:
        The loss, a scalar.
    """
    loss: Tensor = _RowLoss.apply(  # type: ignore[no-untyped-call]
        users, items, calibration, form, positive, negatives, log_weight, share
    )
    return loss


class _RowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        calibration: Tensor,
        form: Form,
        positive: Tensor,
        negatives: Tensor,
        log_weight: Tensor,
        share: Tensor,
    ) -> Tensor:
        rows, wide = negatives.shape
        by_user, by_item, by_calibration = (torch.zeros_like(x) for x in (users, items, calibration))
        loss = torch.zeros((), dtype=torch.float64)
        dead = torch.isneginf(log_weight)
        total = log_weight.exp().sum(dim=1, keepdim=True)
        live = log_weight.masked_fill(dead, 0)
        chunk = max(1, ROW_FLOATS // max(1, wide * users.shape[1]))
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            part, part_share, places = users[start:stop], share[start:stop, None], negatives[start:stop]
            own, others = items[positive[start:stop]], items[places.reshape(-1)].view(stop - start, wide, -1)
            wrong = torch.bmm(others, part[:, :, None]).squeeze(2).masked_fill_(dead[start:stop], -torch.inf)
            right = (part * own).sum(dim=1, keepdim=True)
            found = form.rows(right, wrong, live[start:stop], total[start:stop], calibration)
            loss += (part_share * found.loss).sum(dtype=torch.float64)
            by_right = part_share * found.by_right
            if found.by_bias is not None:
                by_calibration[1] += (part_share * found.by_bias).sum()
            wrong.mul_(part_share * found.scale)
            torch.bmm(wrong[:, None, :], others, out=by_user[start:stop, None, :])
            by_user[start:stop].addcmul_(by_right, own)
            by_item.index_add_(0, positive[start:stop], by_right * part)
            by_item.index_add_(0, places.reshape(-1), (wrong[:, :, None] * part[:, None, :]).view(-1, users.shape[1]))
        if found.by_bias is not None:
            by_calibration[0] = (users * by_user).sum()
        ctx.save_for_backward(by_user, by_item, by_calibration)
        return loss.to(users.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        by_user, by_item, by_calibration = ctx.saved_tensors
        return by_user * grad, by_item * grad, by_calibration * grad, None, None, None, None, None
