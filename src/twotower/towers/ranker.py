"""The early-fusion ranker: user, item and context enter one network, which gives the log-odds of a click.

Where the two towers meet only in a cosine, here every number of the user may meet every one of the item. That cannot be
searched by nearest neighbours: it scores a few thousand candidates, never a catalogue. The pre-ranker and the ranker
are two configurations of it.

S users or sequences of at most L items, n candidates, W width of an item's embedding, H hidden units. S is n, or 1
where one user is scored for many candidates.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from twotower.features.columns import Column
from twotower.features.feature_set import FeatureSet
from twotower.features.fitted import Category, Fitted, Items
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.towers.embedding import EmbeddingTable
from twotower.towers.options import PreRankOptions
from twotower.towers.towers import (
    LENGTH,
    cross_layers,
    hidden_layers,
    input_width,
    is_encoded,
    part_of,
    through,
    width_behind,
)
from twotower.towers.two_tower import Floats, tower_inputs

TARGET = "target"
"""A sequence of items is read as the candidate attends to it."""
FIRST_POSITION = 1
MEETING = 16
"""Width in which user and candidate are multiplied, where items have no id embedding."""

Ints = npt.NDArray[np.int32]


def ranker_features(features: FeatureSet, options: PreRankOptions) -> FeatureSet:
    """The features as a ranker reads them.

    Raises:
        ConfigError: the candidate is to attend to the history, and one of them is no feature.
    """
    candidate = any(isinstance(f, Category) and f.name == c.ITEM_ID for f in features.item)
    if options.history == TARGET and not (candidate and any(isinstance(f, Items) for f in features.user)):
        raise ConfigError(
            'history = "target" lets the candidate attend to what the user clicked: add item_id to features.item '
            'and history = { kind = "sequence" } to features.user, or take history = "mean"'
        )
    read = tuple(replace(f, encoder=options.history) if isinstance(f, Items) else f for f in features.user)
    return replace(features, user=read)


class Ranker(nn.Module):
    """The network, and the tables beside it, which are no parameters of the module (see `TwoTower`).

    These enter the network: all features side by side, each sequence as one vector, and the products of the candidate
    with the user, with each sequence and with the user's id embedding. The candidate is its id embedding plus a
    projection of all its features, so that a new item is compared by its features. The user is a projection of theirs.

    Position is a bias: a number for each position of a page is added to the log-odds in training. It is left out when
    candidates are scored, because they have no position yet (the wide part of Zhao et al. 2019, "Recommending what
    video to watch next"; PAL, Guo et al. 2019, multiplies probabilities instead). The first position has no bias, so a
    score without one is that of the first position.

    Raises:
        ConfigError: see `ranker_features`.
    """

    calibration: Tensor
    """(2,) what the log-odds are multiplied by, and what is added then: Platt scaling, fitted after training."""

    def __init__(self, features: FeatureSet, options: PreRankOptions, seed: int = 0) -> None:
        super().__init__()
        self.features = features = ranker_features(features, options)
        self.user_features: tuple[Fitted, ...] = (*features.user, *features.context)
        ids = [f for f in features.item if isinstance(f, Category) and f.name == c.ITEM_ID]
        self.has_id = bool(ids)
        meeting = ids[0].dimension if ids else MEETING
        self.met = [
            f.name for f in features.user if (isinstance(f, Items) or f.name == c.USER_ID) and input_width(f) == meeting
        ]
        """The features of the user that the candidate is multiplied with."""
        wide = [sum(input_width(f) for f in side) for side in (self.user_features, features.item)]
        width = sum(wide) + (len(self.met) + 1) * meeting
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.attention = nn.ModuleDict(
                {part_of(f.name): TargetAttention(f.dimension, f.last, options.attention) for f in features.user
                 if isinstance(f, Items) and is_encoded(f)}
            )  # fmt: skip
            self.person = nn.Linear(wide[0], meeting, bias=False)
            self.candidate = nn.Linear(wide[1], meeting, bias=False)
            self.hidden = hidden_layers(width, options, options.dropout)
            self.crosses = cross_layers(width, options)
            self.output = nn.Linear(width_behind(width, options), 1)
        self.position = nn.Parameter(torch.zeros(options.positions + 1))
        """Bias of each position; 0 = unknown, and that of the first is never used."""
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))
        generator = np.random.default_rng([seed, 1])
        self.tables = {
            name: EmbeddingTable.new(table.rows, table.dimension, generator) for name, table in features.tables.items()
        }

    def begin_at(self, rate: float) -> None:
        """Let the log-odds begin at those of a click rate, so that training need not find it first."""
        with torch.no_grad():
            self.output.bias.fill_(float(np.log(rate) - np.log1p(-rate)))

    def forward(self, user: Mapping[str, Tensor], item: Mapping[str, Tensor]) -> Tensor:
        """Log-odds (n,) of a click at the first position, before calibration, from inputs by feature name.

        Those of the user are (S, width); a sequence that is attended to is (S, L, W), with its length (S,) beside it.
        Those of the candidates are (n, width).
        """
        rows = next(iter(item.values())).shape[0]
        item_side = torch.cat([item[f.name] for f in self.features.item], dim=-1)
        candidate = self.candidate(item_side)
        if self.has_id:
            candidate = candidate + item[c.ITEM_ID]
        seen: dict[str, Tensor] = {}
        for feature in self.user_features:
            name = feature.name
            if (part := part_of(name)) in self.attention:
                seen[name] = self.attention[part](user[name], user[name + LENGTH], candidate)
            else:
                seen[name] = user[name].expand(rows, -1)
        user_side = torch.cat(list(seen.values()), dim=-1)
        products = [vector * candidate for vector in (self.person(user_side), *(seen[name] for name in self.met))]
        together = torch.cat([user_side, item_side, *products], dim=-1)
        logits: Tensor = self.output(through(together, self.hidden, self.crosses))[:, 0]
        return logits

    def bias(self, position: Tensor) -> Tensor:
        """What positions (n,) add to the log-odds; 0 for the first."""
        of_place = nn.functional.embedding(position.clamp(max=len(self.position) - 1), self.position[:, None])[:, 0]
        biases: Tensor = of_place * (position != FIRST_POSITION)
        return biases

    def probability(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities (n,) from log-odds."""
        return torch.sigmoid(self.calibration[0] * logits + self.calibration[1])

    @torch.inference_mode()
    def score(self, user: Mapping[str, Column], item: Mapping[str, Column], position: Ints | None = None) -> Floats:
        """Log-odds (n,) before calibration, from encoded columns of S users, context included, and of n candidates.

        `position` (n,) is where these were shown; None = all at the first position.
        """
        tables = {name: table.weights for name, table in self.tables.items()}
        sides = [
            {name: torch.tensor(value) for name, value in tower_inputs(features, columns, tables).items()}
            for features, columns in ((self.user_features, user), (self.features.item, item))
        ]
        training = self.training
        self.eval()
        logits = self(*sides)
        if position is not None:
            logits = logits + self.bias(torch.tensor(position, dtype=torch.int64))
        self.train(training)
        scores: Floats = logits.numpy()
        return scores

    def curve(self) -> list[float]:
        """How much each position adds to the log-odds, from the first on."""
        positions = torch.arange(FIRST_POSITION, len(self.position))
        return [round(float(value), 4) for value in self.bias(positions).detach()]


class TargetAttention(nn.Module):
    """The items of a sequence as they concern the candidate: their mean, each times a learned weight of the two.

    The weight is a small network (H hidden units) of the item, the candidate, their product, and the item's age in
    positions from the end of the sequence. It is no softmax: it says how much a click matters here, not which of them
    matters most (DIN, Zhou et al. 2018, section 4.3).
    """

    def __init__(self, width: int, last: int, hidden: int) -> None:
        super().__init__()
        self.age = nn.Parameter(torch.zeros(last, hidden))
        self.item = nn.Linear(width, hidden)
        self.candidate = nn.Linear(width, hidden, bias=False)
        self.product = nn.Linear(width, hidden, bias=False)
        self.weight = nn.Linear(hidden, 1)
        nn.init.ones_(self.weight.bias)  # it begins near the mean

    def forward(self, items: Tensor, length: Tensor, candidate: Tensor) -> Tensor:
        """Vectors (n, W) from items (S, L, W), oldest first, their number (S,) and candidates (n, W).

        The vector of an empty sequence is zero.
        """
        met = self.product(items * candidate[:, None])
        age = length[:, None] - 1 - torch.arange(items.shape[1])
        # embedding, not an index: the gradient of an index is summed by threads in whatever order
        alone = self.item(items) + nn.functional.embedding(age.clamp(0, len(self.age) - 1), self.age)
        hidden = torch.relu(alone + self.candidate(candidate)[:, None] + met)
        weights = self.weight(hidden)[..., 0] * (age >= 0)
        vector: Tensor = (weights[:, :, None] * items).sum(dim=1) / length.clamp_min(1)[:, None]
        return vector
