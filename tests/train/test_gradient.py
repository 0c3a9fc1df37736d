"""The sampled softmax against the softmax over a million items: what the correction is for.

U directions that users look in, N items, P training rows, B batch, D vector.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from twotower.features.columns import Bag
from twotower.features.feature_set import FeatureSet
from twotower.samples.options import EasyShares, NegativesOptions
from twotower.samples.read import Clicks, Entities, Positives, Samples
from twotower.towers.losses import SharedNegatives, row_loss, sampled_softmax, shared_loss
from twotower.train.batches import Batch, BatchMaker
from twotower.train.negatives import CountedFrequency, Draws, EasyNegatives, NegativeSources, fed_frequency
from twotower.train.options import TrainOptions

DIRECTIONS, DIMENSION, TEMPERATURE, BATCH = 8, 12, 0.05, 1024
Floats = NDArray[np.float64]
OPTIONS = TrainOptions(batch_size=BATCH, id_dropout=0.0)


def unit(vectors: Floats) -> Floats:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@dataclass(frozen=True)
class World:
    """Users in 8 directions, each with one click; items are clicked by Zipf's law, the popular ones in one corner."""

    samples: Samples
    clicks: NDArray[np.int64]
    users: Floats
    items: Floats
    mean: Floats
    """(U, D) mean item vector of each direction's softmax over all items."""


def make_world(size: int, rows: int, hard: dict[str, Bag] | None = None) -> World:
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, size + 1)
    drawn = np.searchsorted(np.cumsum(weights / weights.sum()), generator.random(rows - size)).clip(0, size - 1)
    item_row = generator.permutation(np.concatenate([np.arange(size), drawn]))
    clicks = np.bincount(item_row, minlength=size)
    # Down-sampling of hot items: kept as often as the square root of 4 / clicks.
    copies = generator.random(rows) < np.sqrt(4 / np.maximum(clicks, 1))[item_row]
    corner = np.zeros(DIMENSION)
    corner[1] = 1
    taste = generator.standard_normal((size, DIMENSION)) / np.sqrt(DIMENSION)
    popular = (
        0.4 * (np.log(size) - 1 - np.log(np.arange(1, size + 1)))[:, None] * corner
    )  # so that a wrong weight turns the mean
    items = 0.15 * (taste + popular)
    items[:, 0] = 1
    items = unit(items)
    users = generator.standard_normal((DIRECTIONS, DIMENSION))
    users[:, 0] = 0
    users[:, 1] = 0.7
    users = unit(users)
    scores = np.exp(users @ items.T / TEMPERATURE)
    user_row = np.arange(rows, dtype=np.int32)
    item_row32 = item_row.astype(np.int32)
    samples = Samples(
        Path(),
        {},
        FeatureSet((), (), ()),
        Positives(
            user_row,
            item_row32,
            np.zeros(rows, np.int32),
            np.ones(rows, np.float32),
            np.zeros(rows, np.int64),
            {},
            copies.astype(np.int32),
            hard or {},
        ),
        Entities(pa.array(np.arange(rows)), {"direction": (user_row % DIRECTIONS).astype(np.int32)}),
        Entities(pa.array(np.arange(size)), {}),
        Clicks(np.arange(rows + 1), item_row32, np.zeros(rows, np.int64)),
        clicks,
    )
    return World(samples, clicks, users, items, scores @ items / scores.sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(50_000, 200_000)


@pytest.fixture(scope="module")
def large_world() -> World:
    return make_world(1_000_000, 2_000_000)


def user_gradients(world: World, batch: Batch, part: Any) -> Floats:
    """Derivatives of the mean loss by each user's vector (B, D)."""
    direction = batch.user["direction"]
    users = torch.from_numpy(world.users[direction]).requires_grad_()
    items, positive = torch.from_numpy(world.items[batch.item_row]), torch.from_numpy(batch.positive)
    share = torch.full((len(positive),), 1 / len(positive), dtype=torch.float64)
    part, none = replace(part, log_weight=part.log_weight.astype(np.float64)), torch.zeros(2).double()
    way = shared_loss if isinstance(part, SharedNegatives) else row_loss
    loss = way(sampled_softmax(TEMPERATURE), users, items, positive, part, share=share, calibration=none)
    loss.backward()  # type: ignore[no-untyped-call]
    assert users.grad is not None
    return users.grad.numpy()


def bias(world: World, easy: EasyNegatives, frequency: Floats, rounds: int) -> tuple[float, float]:
    """How far the mean gradient is from that of the full softmax on the same rows, and how far chance takes it.

    Both as lengths over all directions, relative to the full gradient without its positives: the pull of the negatives.
    """
    found = []
    maker = BatchMaker(world.samples, OPTIONS, NegativeSources(easy, CountedFrequency(frequency)))
    for batch in itertools.islice(maker.epoch(0), rounds):
        direction = np.asarray(batch.user["direction"])
        own = world.items[batch.item_row[batch.positive]]
        full = (world.mean[direction] - own) / TEMPERATURE / len(own)
        difference = np.zeros((DIRECTIONS, DIMENSION))
        np.add.at(difference, direction, user_gradients(world, batch, batch.easy) - full)
        found.append(difference)
    assert len(found) == rounds
    stacked = np.stack(found)
    error = np.linalg.norm(stacked.std(axis=0) / np.sqrt(rounds))
    pull = np.linalg.norm(world.mean - world.items.mean(axis=0)) / TEMPERATURE / DIRECTIONS
    return float(np.linalg.norm(stacked.mean(axis=0)) / pull), float(error / pull)


def negatives(world: World, shares: EasyShares, shared: bool = True) -> EasyNegatives:
    return EasyNegatives(NegativesOptions(shares, count=None if shared else 256, shared=shared), world.clicks)


MIXTURES = {
    "uniform": EasyShares(0, 1, 0),
    "clicks": EasyShares(0, 0, 1),
    "in_batch": EasyShares(1, 0, 0),
    "mixture": EasyShares(0.5, 0.25, 0.25),
}


@pytest.mark.parametrize("shares", MIXTURES.values(), ids=list(MIXTURES))
def test_on_average_the_gradient_is_that_of_the_softmax_over_all_items(world: World, shares: EasyShares) -> None:
    found, error = bias(world, negatives(world, shares), fed_frequency(world.samples), 40)
    assert found < 2.5 * error  # a mean of chance alone has the length `error`; the directions share their negatives


def test_on_average_the_gradient_is_that_of_the_softmax_over_a_million_items(large_world: World) -> None:
    found, error = bias(
        large_world, negatives(large_world, MIXTURES["mixture"]), fed_frequency(large_world.samples), 40
    )
    assert found < 2.5 * error


def wrong_sign(easy: EasyNegatives) -> None:
    right = easy.log_expected
    easy.log_expected = lambda *given: -right(*given)  # type: ignore[method-assign]


def clipped(easy: EasyNegatives) -> None:
    right = easy.log_expected

    def clip(rows: Any, log_frequency: Any, draws: Any) -> Any:
        total = np.log(draws.total)
        return np.maximum(right(rows, log_frequency, draws) - total, np.log(1e-6)) + total

    easy.log_expected = clip  # type: ignore[method-assign]


def only(component: str) -> Callable[[EasyNegatives], None]:
    """The right number of negatives, and q of one source alone."""

    def mistake(easy: EasyNegatives) -> None:
        right = easy.log_expected

        def one(rows: Any, log_frequency: Any, draws: Draws) -> Any:
            alone = Draws(**{**dict.fromkeys(vars(draws), 0.0), component: draws.total})
            return right(rows, log_frequency, alone)

        easy.log_expected = one  # type: ignore[method-assign]

    return mistake


@pytest.mark.parametrize(
    ("shares", "mistake"),
    [
        ("in_batch", wrong_sign),
        ("clicks", wrong_sign),
        ("mixture", wrong_sign),
        ("mixture", only("uniform")),
        ("mixture", only("clicks")),
        ("mixture", only("in_batch")),
    ],
)
def test_a_wrong_correction_is_seen(world: World, shares: str, mistake: Callable[[EasyNegatives], None]) -> None:
    easy = negatives(world, MIXTURES[shares])
    mistake(easy)
    found, error = bias(world, easy, fed_frequency(world.samples), 20)
    assert found > 3 * error


@pytest.mark.parametrize("shares", ["in_batch", "clicks"])
def test_a_q_that_is_clipped_is_seen_among_a_million_items(large_world: World, shares: str) -> None:
    easy = negatives(large_world, MIXTURES[shares])
    clipped(easy)
    found, error = bias(large_world, easy, fed_frequency(large_world.samples), 20)
    assert found > 3 * error


@pytest.mark.parametrize("shares", ["in_batch", "mixture"])
def test_a_wrong_q_of_in_batch_negatives_is_seen(world: World, shares: str) -> None:
    """To the power 0.75, and of the clicks before down-sampling."""
    fed = fed_frequency(world.samples)
    for wrong in (fed**0.75 / (fed**0.75).sum(), world.clicks / world.clicks.sum()):
        found, error = bias(world, negatives(world, MIXTURES[shares]), wrong, 20)
        assert found > 3 * error


def test_rows_with_negatives_of_their_own_have_the_same_average(world: World) -> None:
    found, error = bias(world, negatives(world, MIXTURES["mixture"], shared=False), fed_frequency(world.samples), 20)
    assert found < 2.5 * error
