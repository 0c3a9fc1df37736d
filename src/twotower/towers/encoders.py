"""Encoders of the sequence of items that a user clicked: to one vector, or to one for each interest.

Each reads rows of the item table and gives vectors as wide as they are. The mean has no parameters and is computed
where the rows are gathered (`twotower.towers.embedding.mean_of_bags`).

S sequences of at most L items, padded at their ends; B rows, each the beginning of one of them; W width; H heads; K
interests. All `forward` take `items` (S, L, W), oldest first; `length` (B,) int64, how many items of its sequence a row
has; and `row` (B,) int64, the sequence of each row, where None = its own. They give zeros for an empty sequence. `last`
is the length of the longest sequence.
"""

import torch
from torch import Tensor, nn

NEVER = -1e30
"""Added to the score of an item that is masked; finite, so that a row in which all are masked is no NaN."""


class AttentionPooling(nn.Module):
    """A weighted mean for each of H heads, combined by a projection.

    The weight of an item is a softmax over the sequence of a learned score of the item plus one of its age. (A weight
    that depended on the candidate would be early fusion.)
    """

    def __init__(self, width: int, last: int, heads: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, heads, bias=False)
        self.age = nn.Parameter(torch.zeros(last, heads))
        self.together = nn.Linear(heads * width, width, bias=False)
        # It begins as the mean: equal weights, and heads that add up to the rows themselves.
        nn.init.zeros_(self.score.weight)
        with torch.no_grad():
            self.together.weight.copy_(torch.eye(width).repeat(1, heads) / heads)

    def forward(self, items: Tensor, length: Tensor, row: Tensor | None = None) -> Tensor:
        """Vectors (B, W)."""
        items = items if row is None else items[row]
        age = length[:, None] - 1 - torch.arange(items.shape[1])
        scores = self.score(items) + self.age[age.clamp(0, len(self.age) - 1)]
        scores = scores + (age < 0)[..., None] * NEVER
        weights = torch.softmax(scores, dim=1)
        pooled = weights.transpose(1, 2) @ items
        vector: Tensor = self.together(pooled.flatten(1)) * (length > 0)[:, None]
        return vector


class CausalTransformer(nn.Module):
    """A small transformer with causal attention: one pass gives the vector of every beginning of a sequence.

    Each block has self-attention and a feed-forward network with the norm before each (Kang and McAuley 2018, SASRec,
    with the norms of Xiong et al. 2020). Positions enter only as distances, by a learned bias of each head (Raffel et
    al. 2020), so that the vector of a history does not depend on where its window was cut. `dropout` is the share of
    what a block adds that is left out in training.

    Raises:
        ValueError: W is no multiple of H.
    """

    def __init__(self, width: int, last: int, heads: int, blocks: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads = {heads} does not divide the width {width}")
        self.blocks = nn.ModuleList(_Block(width, last, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, items: Tensor, length: Tensor, row: Tensor | None = None) -> Tensor:
        """Vectors (B, W) of beginnings of sequences."""
        states = items
        for block in self.blocks:
            states = block(states)
        row = torch.arange(length.shape[0]) if row is None else row
        ends = states[row, (length - 1).clamp_min(0)]
        vector: Tensor = self.norm(ends) * (length > 0)[:, None]
        return vector


class Interests(nn.Module):
    """K vectors of a sequence, one for each interest, by dynamic routing (MIND, Li et al. 2019, algorithm 1).

    An item e_i counts for interest j with a share w_ij, a softmax over the interests of logits b_ij. An interest is the
    sum z_j of w_ij S e_i, squashed to |z|^2 / (1 + |z|^2) z / |z|; then b_ij grows by its product with S e_i, and the
    next round begins. The paper draws the first logits anew each time. Here they are drawn once for each distance from
    the end of the sequence, so that the same history has the same interests. Gradients pass through the last round
    alone. Of a sequence of n items max(1, min(K, log2 n)) interests are different, the others repeat the first.
    """

    first: Tensor

    def __init__(self, width: int, last: int, interests: int, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.matrix = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.matrix.weight)
        self.register_buffer("first", torch.randn(last, interests))

    def forward(self, items: Tensor, length: Tensor, row: Tensor | None = None) -> Tensor:
        """Vectors (B, K, W); zero for an empty sequence. Arguments: see the module."""
        items = items if row is None else items[row]
        mapped = self.matrix(items)
        age = length[:, None] - 1 - torch.arange(items.shape[1])
        used = (age >= 0)[..., None].to(items.dtype)
        order = torch.arange(self.first.shape[1])
        distinct = torch.log2(length.clamp_min(2).to(items.dtype) + 0.5).floor().long()
        idle = (order >= distinct[:, None])[:, None, :] * NEVER
        logits = self.first[age.clamp(0, len(self.first) - 1)] + idle
        fixed = mapped.detach()
        for _ in range(self.rounds - 1):
            interests = _squash((torch.softmax(logits, dim=2) * used).transpose(1, 2) @ fixed)
            logits = logits + fixed @ interests.transpose(1, 2)
        interests = _squash((torch.softmax(logits, dim=2) * used).transpose(1, 2) @ mapped)
        repeated: Tensor = torch.where((order < distinct[:, None])[..., None], interests, interests[:, :1])
        return repeated


def _squash(vectors: Tensor) -> Tensor:
    """|z|^2 / (1 + |z|^2) z / |z|, of zeros zero."""
    square = vectors.square().sum(dim=-1, keepdim=True)
    return unit(vectors) * square / (1 + square)


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) of length 1; zeros stay zero.

    The smallest length is a bound, not a summand: the exporter to ONNX drops a summand that is so small.
    """
    square = vectors.square().sum(dim=-1, keepdim=True)
    normed: Tensor = vectors * torch.rsqrt(square.clamp_min(1e-12))
    return normed


def label_aware(interests: Tensor, items: Tensor, sharpness: float) -> Tensor:
    """The unit vector (B, D) of each user for one item: its interests, weighted by a softmax of sharpness * cosine.

    `interests` (B, K, D) and `items` (B, D), the positives, are unit vectors. It is used only in training, where the
    item is known (MIND, Li et al. 2019, eq. 8, which takes the softmax of a power of the product; a cosine may be
    negative). As the sharpness grows, only the nearest interest is trained.
    """
    weights = torch.softmax(sharpness * (interests @ items[:, :, None]), dim=1)
    return unit((weights * interests).sum(dim=1))


class _Block(nn.Module):
    def __init__(self, width: int, last: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.read = nn.Linear(width, 3 * width, bias=False)
        self.write = nn.Linear(width, width, bias=False)
        self.distance = nn.Parameter(torch.zeros(last, heads))
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """States (S, L, W) to states."""
        sequences, length, width = states.shape
        query, key, value = (
            part.reshape(sequences, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.read(self.norms[0](states)).chunk(3, dim=2)
        )
        back = torch.arange(length)[:, None] - torch.arange(length)
        bias = self.distance[back.clamp(0, len(self.distance) - 1)].permute(2, 0, 1) + (back < 0) * NEVER
        weights = torch.softmax(query @ key.transpose(2, 3) * (width // self.heads) ** -0.5 + bias, dim=3)
        seen = (weights @ value).transpose(1, 2).reshape(sequences, length, width)
        states = states + self.dropout(self.write(seen))
        added: Tensor = states + self.dropout(self.feed(self.norms[1](states)))
        return added
