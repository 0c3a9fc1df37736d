import numpy as np
import pytest

from twotower.channels.retriever import Candidates
from twotower.features.columns import Bag
from twotower.fusion.choose import choose
from twotower.fusion.fuse import Fusion

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
    assert chosen.fusion.weights == {"good": 1, "noise": 0, "again": 0}
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


def days(*known: dict[str, float]) -> tuple[dict[str, Candidates], Bag, np.ndarray]:
    """The worlds of several days, one behind the other, with the day of each user."""
    worlds = [world(seed, **quality) for seed, quality in enumerate(known)]
    lists = {
        name: Candidates(
            *(np.concatenate([getattr(one[name], part) for one, _ in worlds]) for part in ("rows", "scores"))
        )
        for name in worlds[0][0]
    }
    truth = Bag(np.arange(0, 2 * USERS * len(worlds) + 1, 2), np.concatenate([items.rows for _, items in worlds]))
    return lists, truth, np.repeat(np.arange(len(worlds)), USERS)


def test_what_one_day_alone_would_choose_is_left_out_where_other_days_show_nothing_in_it() -> None:
    lists, truth, day = days(*[{"good": 0.6, "once": once} for once in (0.5, 0.0, 0.0)])
    first = {name: Candidates(one.rows[:USERS], one.scores[:USERS]) for name, one in lists.items()}
    alone = choose(first, Bag(truth.indptr[: USERS + 1], truth.rows[: 2 * USERS]), [50], 0)
    assert alone.fusion.weights["once"] > 0
    assert len(alone.by_part) == 1
    chosen = choose(lists, truth, [50], 0, day)
    assert chosen.fusion.weights == {"good": 1, "once": 0}
    assert chosen.users == 3 * USERS


def test_what_holds_on_every_day_is_chosen_and_judged_on_days_that_it_has_not_seen() -> None:
    lists, truth, day = days(*[{"good": 0.6, "other": other} for other in (0.5, 0.4, 0.5)])
    chosen = choose(lists, truth, [50], 0, day)
    assert min(chosen.fusion.weights.values()) > 0
    assert min(chosen.by_part) > 0.02
    assert np.mean(chosen.by_part) == pytest.approx(chosen.gain.value, abs=1e-4)
    other = np.flatnonzero(day == 1)  # the figures of the second day are those of what the others choose
    rest = np.flatnonzero(day != 1)
    picked = {name: Candidates(one.rows[rest], one.scores[rest]) for name, one in lists.items()}
    items = truth.rows.reshape(-1, 2)
    fusion = choose(picked, Bag(np.arange(0, 4 * USERS + 1, 2), items[rest].ravel()), [50], 0, day[rest]).fusion
    seen = {name: Candidates(one.rows[other], one.scores[other]) for name, one in lists.items()}
    judged = Bag(np.arange(0, 2 * USERS + 1, 2), items[other].ravel())
    gain = recall(seen, judged, fusion, 50) - recall({"good": seen["good"]}, judged, Fusion(), 50)
    assert chosen.by_part[1] == pytest.approx(gain, abs=1e-4)
