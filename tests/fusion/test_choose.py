import numpy as np
import pytest

from twotower.features.columns import Bag
from twotower.fusion.choose import choose
from twotower.fusion.fuse import Fusion
from twotower.models.retriever import Candidates

USERS, ITEMS, DEPTH = 400, 400, 100


def world(seed: int, **quality: float) -> tuple[dict[str, Candidates], Bag]:
    """Two held-out items a user; a channel lists random items, and puts each held-out one at a rank that is drawn from
    the first 20 with the chance that is its quality."""
    generator = np.random.default_rng(seed)
    truth = np.stack([generator.choice(ITEMS, 2, replace=False) for _ in range(USERS)])
    lists = {}
    for name, chance in quality.items():
        rows = np.stack([generator.permutation(np.setdiff1d(np.arange(ITEMS), held))[:DEPTH] for held in truth])
        for held in range(2):
            known = generator.random(USERS) < chance
            rows[known, generator.integers(held * 10, held * 10 + 10, USERS)[known]] = truth[known, held]
        lists[name] = Candidates(rows, np.zeros(rows.shape, np.float32))
    indptr = np.arange(0, 2 * USERS + 1, 2)
    return lists, Bag(indptr, truth.ravel().astype(np.int32))


def recall(lists: dict[str, Candidates], truth: Bag, fusion: Fusion, k: int) -> float:
    fused = fusion.fuse(lists, k).candidates.rows
    held = truth.rows.reshape(-1, 2)
    return float((held[:, :, None] == fused[:, None, :]).any(axis=2).mean())


def test_two_channels_that_know_different_things_are_fused_and_noise_is_left_out() -> None:
    lists, truth = world(0, good=0.6, other=0.5, noise=0.0)
    chosen = choose(lists, truth, [50], 0)
    weights = chosen.fusion.weights
    assert weights["noise"] == 0
    assert min(weights["good"], weights["other"]) > 0
    assert chosen.gain.ci95 is not None
    assert chosen.gain.ci95[0] > 0
    fresh = world(1, good=0.6, other=0.5, noise=0.0)
    alone = recall({"good": fresh[0]["good"]}, fresh[1], Fusion(), 50)
    assert recall(*fresh, chosen.fusion, 50) > alone + 0.05
    assert recall(*fresh, chosen.fusion, 50) > recall(*fresh, Fusion(), 50)


def test_a_channel_that_repeats_another_is_no_gain() -> None:
    lists, truth = world(0, good=0.6, noise=0.0)
    chosen = choose({**lists, "again": lists["good"]}, truth, [50], 0)
    assert chosen.fusion.weights["noise"] == 0
    assert chosen.gain.value == pytest.approx(0)
    assert chosen.fused == chosen.channels["good"]


def test_the_figures_are_those_of_the_lists() -> None:
    lists, truth = world(2, good=0.7, other=0.3)
    chosen = choose(lists, truth, [20, 50], 0)
    for name in lists:
        for k in (20, 50):
            assert chosen.channels[name][f"recall@{k}"] == pytest.approx(
                recall({name: lists[name]}, truth, Fusion(), k), abs=1e-5
            )
    equal = recall(lists, truth, Fusion(), 50)
    assert chosen.equal["recall@50"] == pytest.approx(equal, abs=1e-5)
    assert (chosen.users, chosen.fusion.depth) == (USERS, DEPTH)


def test_the_same_lists_give_the_same_choice() -> None:
    lists, truth = world(3, good=0.5, other=0.4)
    assert choose(lists, truth, [50], 7) == choose(lists, truth, [50], 7)
