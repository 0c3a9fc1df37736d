from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.evaluate.metrics import difference, score_lists, summarise
from twotower.features.columns import Bag, pointers


def bag(lists: list[list[int]]) -> Bag:
    return Bag(
        pointers(np.array([len(items) for items in lists])),
        np.array([item for items in lists for item in items], np.int32),
    )


def padded(lists: list[list[int]], width: int) -> Any:
    return np.array([items + [-1] * (width - len(items)) for items in lists])


# Five items with 4, 3, 2, 1, 0 positives; three users, the last without a list.
RANKED = [[0, 2, 4], [3], []]
HELD_OUT = [[2, 4], [0, 1, 2, 3], [1]]
POSITIVES = np.array([4, 3, 2, 1, 0])


def test_a_table_by_hand() -> None:
    scored = score_lists(padded(RANKED, 3), bag(HELD_OUT), POSITIVES, [1, 3])
    third = 1 / np.log2(3)
    expected = {
        "recall@1": [0, 1 / 4, 0],
        "recall@3": [1, 1 / 4, 0],
        "hit@1": [0, 1, 0],
        "hit@3": [1, 1, 0],
        "ndcg@1": [0, 1, 0],
        "ndcg@3": [(third + 0.5) / (1 + third), 1 / (1 + third + 0.5), 0],
        "pop_pct@1": [1, 1 / 4, 0],
        "pop_pct@3": [(1 + 2 / 4 + 0) / 3, 1 / 4, 0],
    }
    assert set(scored.values) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(scored.values[name], values, err_msg=name)
    assert scored.whole == {"coverage@1": 2 / 4, "coverage@3": 3 / 4}
    figures = summarise(scored, 200, seed=0)
    assert figures["recall@3"].value == pytest.approx(1.25 / 3)
    # Every listed place counts once: user 0 has three of four.
    assert figures["pop_pct@3"].value == pytest.approx((1 + 2 / 4 + 0 + 1 / 4) / 4)
    assert figures["coverage@3"].ci95 is None


def referee(ranked: list[list[int]], held_out: list[list[int]], positives: list[int], k: int) -> dict[str, float]:
    """The definitions once more, a user and an item at a time."""
    totals = {"recall": 0.0, "ndcg": 0.0, "hit": 0.0}
    percentiles, seen = [], set()
    known = [n for n in positives if n > 0]
    for items, truth in zip(ranked, held_out, strict=True):
        top = items[:k]
        hits = [place for place, item in enumerate(top) if item in truth]
        totals["recall"] += len(hits) / len(truth)
        totals["hit"] += bool(hits)
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(truth))))
        totals["ndcg"] += sum(1 / np.log2(place + 2) for place in hits) / ideal
        percentiles += [sum(n <= positives[item] for n in known) / max(1, len(known)) for item in top]
        seen |= {item for item in top if positives[item] > 0}
    means = {f"{name}@{k}": total / len(ranked) for name, total in totals.items()}
    pop = float(np.mean(percentiles)) if percentiles else 0.0
    return means | {f"coverage@{k}": len(seen) / max(1, len(known)), f"pop_pct@{k}": pop}


@settings(deadline=None)
@given(st.data())
def test_the_definitions_one_user_at_a_time_give_the_same(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 12))
    users = data.draw(st.integers(1, 6))
    item = st.integers(0, items - 1)
    ranked = data.draw(st.lists(st.lists(item, unique=True), min_size=users, max_size=users))
    held_out = data.draw(st.lists(st.sets(item, min_size=1).map(sorted), min_size=users, max_size=users))
    positives = data.draw(st.lists(st.integers(0, 3), min_size=items, max_size=items))
    ks = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))
    scored = score_lists(padded(ranked, 12), bag(held_out), np.array(positives), ks)
    figures = summarise(scored, 3, seed=0)
    for k in ks:
        for name, value in referee(ranked, held_out, positives, k).items():
            assert figures[name].value == pytest.approx(value, abs=1e-12), name


def test_coverage_is_a_share_where_lists_hold_items_without_a_training_positive() -> None:
    """Histories reach further than positives, and with them the lists of channels that count clicks."""
    scored = score_lists(padded([[0, 1, 2], [2, 3, 1]], 3), bag([[0], [3]]), np.array([2, 0, 1, 0]), [3])
    assert scored.whole["coverage@3"] == 1.0


def scored_at_random(recall: Any) -> Any:
    from_recall = score_lists(padded([[0]] * len(recall), 1), bag([[0]] * len(recall)), np.array([1]), [1])
    from_recall.values["recall@1"] = recall
    return from_recall


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        low, high = summarise(scored_at_random(generator.beta(2, 5, size=150)), 300, trial)["recall@1"].ci95 or (1, 0)
        covered += low <= 2 / 7 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    recall = np.random.default_rng(1).random(2000)
    low, high = summarise(scored_at_random(recall), 2000, 0)["recall@1"].ci95 or (1, 0)
    assert high - low == pytest.approx(2 * 1.96 * recall.std() / np.sqrt(2000), rel=0.08)


def test_the_same_seed_gives_the_same_interval() -> None:
    scored = scored_at_random(np.random.default_rng(1).random(50))
    assert summarise(scored, 100, 3) == summarise(scored, 100, 3)
    assert summarise(scored, 100, 3) != summarise(scored, 100, 4)


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    generator = np.random.default_rng(2)
    theirs = generator.random(400)
    ours = theirs + 0.01 + 0.01 * generator.normal(size=400)
    figure = difference(ours, theirs, 1000, 0)
    assert figure.value == pytest.approx((ours - theirs).mean())
    assert figure.ci95 is not None
    assert 0 < figure.ci95[0] < 0.01 < figure.ci95[1] < 0.02
    own, other = (summarise(scored_at_random(values), 1000, 0)["recall@1"].ci95 for values in (ours, theirs))
    assert own is not None
    assert other is not None
    assert own[0] < other[1]  # the single intervals overlap


def test_no_difference_is_none() -> None:
    figure = difference(np.array([0.2, 0.4]), np.array([0.2, 0.4]), 10, 0)
    assert (figure.value, figure.ci95) == (0, (0, 0))
