"""Encoders of a sequence: the items that a user clicked, in their order, to one vector.

Each reads rows of the item table and gives a vector as wide as they are. The mean, which knows no order, has no
parameters and is made where the rows are gathered (`twotower.models.embedding.mean_of_bags`).

S sequences of at most L items, padded at their ends; B rows, each the beginning of one of them; W width; H heads.
"""

import torch
from torch import Tensor, nn

NEVER = -1e30
"""Added to the score of what must not be looked at; finite, so that a row that sees nothing is no NaN."""


class AttentionPooling(nn.Module):
    """A weighted mean for each of H heads, put together by a projection.

    The weight of an item is a softmax over the sequence of a learned score of the item plus one of its age, so that
    both what was clicked and how long ago decide. (A weight that depended on the candidate would be early fusion.)

    Args:
        width: W.
        last: the longest sequence.
        heads: H.
    """

    def __init__(self, width: int, last: int, heads: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, heads, bias=False)
        self.age = nn.Parameter(torch.zeros(last, heads))
        self.together = nn.Linear(heads * width, width, bias=False)
        # It begins as the mean: weights alike, and heads that add up to the rows themselves.
        nn.init.zeros_(self.score.weight)
        with torch.no_grad():
            self.together.weight.copy_(torch.eye(width).repeat(1, heads) / heads)

    def forward(self, items: Tensor, length: Tensor, row: Tensor | None = None) -> Tensor:
        """Vectors (B, W); zero for an empty sequence.

        Args:
            items: (S, L, W), oldest first.
            length: (B,) int64, how many items of its sequence a row has.
            row: (B,) int64 the sequence of each row; None = its own.
        """
        items = items if row is None else items[row]
        age = length[:, None] - 1 - torch.arange(items.shape[1])
        scores = self.score(items) + self.age[age.clamp(0, len(self.age) - 1)]
        scores = scores + (age < 0)[..., None] * NEVER
        weights = torch.softmax(scores, dim=1)
        pooled = weights.transpose(1, 2) @ items
        vector: Tensor = self.together(pooled.flatten(1)) * (length > 0)[:, None]
        return vector


class CausalTransformer(nn.Module):
    """A small transformer that looks back alone, so that one pass gives the vector of every beginning of a sequence.

    Blocks of self-attention and a feed-forward network with the norm before each (Kang and McAuley 2018, SASRec, with
    the norms of Xiong et al. 2020). Where an item stands enters only as its distance, a learned bias of each head
    (Raffel et al. 2020): the vector of a history then does not depend on where its window was cut.

    Args:
        width: W.
        last: the longest sequence.
        heads: H, a divisor of W.
        blocks: how many.
        dropout: share of what a block adds that is left out in training.

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
        """Vectors (B, W) of beginnings of sequences; zero for an empty one.

        Args:
            items: (S, L, W), oldest first.
            length: (B,) int64, how many items of its sequence a row has.
            row: (B,) int64 the sequence of each row; None = its own.
        """
        states = items
        for block in self.blocks:
            states = block(states)
        row = torch.arange(length.shape[0]) if row is None else row
        ends = states[row, (length - 1).clamp_min(0)]
        vector: Tensor = self.norm(ends) * (length > 0)[:, None]
        return vector


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
