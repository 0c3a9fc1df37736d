"""Losses as pure functions of vectors and scores.

B batch, D vector, C candidate columns (the distinct items of the batch).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK = 256
"""Rows of scores in memory at a time: 256 x 4096 floats are 4 MB, which stay in the cache."""


@dataclass(frozen=True)
class Mask:
    """Columns that are no negatives of a row, packed by row: the user's other positives."""

    indptr: npt.NDArray[np.int64]
    """(B + 1,)"""
    columns: npt.NDArray[np.int64]
    """(nnz,) columns in 0..C-1; a row's own positive among them is ignored."""


def in_batch_log_weight(copies: Tensor, frequency: Tensor) -> Tensor:
    """What is added to the score of each column (C,): log of its copies over their expected number.

    A column that stands for n copies of an item counts n times, and an item that is expected q (B - 1) times among the
    other rows of a batch is corrected by the log of that, in log space, never clipped (Bengio and Senecal 2008; Yi et
    al. 2019, eq. 3).

    What is exact: take a row with positive p. Rows that are drawn independently hold an item j != p expectedly
    q_j (B - 1) times among the B - 1 others, and all its copies are among those. So the weighted sum over the columns
    other than p has the mean sum over j != p of e^s_j, and with the uncorrected e^s_p the denominator is an unbiased
    estimate of the full softmax's (over all items that are not masked). Its logarithm is not: loss and gradient are off
    by O(1 / B), which vanishes with the batch. An epoch draws its P rows without replacement, which changes the
    expected numbers by a factor of P / (P - 1).

    Args:
        copies: (C,) how often each item occurs in the batch; their sum is B.
        frequency: (C,) q of each item, its share of the rows as fed.
    """
    others = copies.sum() - 1
    return torch.log(copies) - torch.log(others * frequency)


def in_batch_softmax(
    users: Tensor,
    items: Tensor,
    positive: Tensor,
    log_weight: Tensor,
    mask: Mask,
    temperature: float,
    weight: Tensor,
    chunk: int = CHUNK,
) -> Tensor:
    """Sampled softmax of each row's positive against the other items of the batch, as a weighted mean.

    For row i with positive p:  -log( e^(s_ip) / (e^(s_ip) + sum_{j != p, j not masked} e^(s_ij + log_weight_j)) )
    with s = cos / temperature. The row's own item elsewhere in the batch is its column p, hence never a negative.

    The B x C scores are made `chunk` rows at a time and turned into gradients on the spot, so that they are never all
    held: time is that of three matrix products, memory that of a chunk.

    Args:
        users: (B, D) unit vectors.
        items: (C, D) unit vectors of the distinct items of the batch.
        positive: (B,) int64 column of each row's item.
        log_weight: (C,) see `in_batch_log_weight`; takes no gradient.
        mask: the user's other positives among the columns.
        temperature: divides the cosine.
        weight: (B,) weight of each row, 0 or more; if all are 0, so are loss and gradients.
        chunk: rows at a time.

    Returns:
        The loss, a scalar.
    """
    loss: Tensor = _InBatchSoftmax.apply(  # type: ignore[no-untyped-call]
        users, items, positive, log_weight, mask, temperature, weight, chunk
    )
    return loss


class _InBatchSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        positive: Tensor,
        log_weight: Tensor,
        mask: Mask,
        temperature: float,
        weight: Tensor,
        chunk: int,
    ) -> Tensor:
        rows, columns = len(users), len(items)
        share = weight / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        user_gradient, item_gradient = torch.empty_like(users), torch.zeros_like(items)
        scores = torch.empty((min(chunk, rows), columns), dtype=users.dtype)
        total = torch.zeros((), dtype=torch.float64)
        line = np.repeat(np.arange(rows), np.diff(mask.indptr))
        masked = torch.from_numpy((line % chunk) * columns + mask.columns)
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            part, own = users[start:stop], positive[start:stop, None]
            logits = torch.mm(part, items.T, out=scores[: stop - start])
            logits.div_(temperature)
            right = logits.gather(1, own)
            logits.add_(log_weight)
            logits.view(-1).index_fill_(0, masked[mask.indptr[start] : mask.indptr[stop]], -torch.inf)
            logits.scatter_(1, own, right)
            top = logits.amax(dim=1, keepdim=True)
            logits.sub_(top).exp_()
            normaliser = logits.sum(dim=1, keepdim=True)
            total += (share[start:stop, None] * (normaliser.log() + top - right)).sum(dtype=torch.float64)
            logits.mul_(share[start:stop, None] / (normaliser * temperature))
            logits.scatter_add_(1, own, -share[start:stop, None] / temperature)
            torch.mm(logits, items, out=user_gradient[start:stop])
            item_gradient.addmm_(logits.T, part)
        ctx.save_for_backward(user_gradient, item_gradient)
        return total.to(users.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        user_gradient, item_gradient = ctx.saved_tensors
        return user_gradient * grad, item_gradient * grad, None, None, None, None, None, None
