import numpy as np
import pytest
from numpy.typing import NDArray

from twotower.features.columns import Bag
from twotower.samples.options import EasyShares, NegativesOptions
from twotower.schema.errors import ConfigError
from twotower.train.negatives import CountedFrequency, EasyNegatives, HardNegatives, StreamingFrequency

CLICKS = np.array([1000, 300, 90, 30, 9, 3, 1, 0])
SIZE = len(CLICKS)


def chi_square(found: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Pearson's statistic over its degrees of freedom, in standard deviations from what chance gives."""
    freedom = len(expected) - 1
    statistic = float(((found - expected) ** 2 / expected).sum())
    return (statistic - freedom) / np.sqrt(2 * freedom)


def easy(shares: EasyShares, count: int | None = None, shared: bool = True, alpha: float = 0.75) -> EasyNegatives:
    return EasyNegatives(NegativesOptions(shares, alpha, count, shared), CLICKS)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75, 1.0])
def test_click_negatives_are_drawn_by_clicks_to_the_power_alpha(alpha: float) -> None:
    drawn = easy(EasyShares(0, 0, 1), 200_000, alpha=alpha).draw_shared(2, np.random.default_rng(0))
    weights = np.maximum(CLICKS, 1) ** alpha
    expected = 200_000 * weights / weights.sum()
    assert abs(chi_square(np.bincount(drawn, minlength=SIZE), expected)) < 4
    other = np.maximum(CLICKS, 1) ** (alpha + 0.05)
    assert chi_square(np.bincount(drawn, minlength=SIZE), 200_000 * other / other.sum()) > 10  # it would be seen


def test_uniform_negatives_are_drawn_evenly() -> None:
    drawn = easy(EasyShares(0, 1, 0), 80_000).draw_shared(2, np.random.default_rng(0))
    assert abs(chi_square(np.bincount(drawn, minlength=SIZE), np.full(SIZE, 10_000.0))) < 4


def test_rows_draw_each_negative_from_a_source_by_its_share() -> None:
    """Items 0 and 1 alone are in the batch, in turns, so that the other rows hold each half of the time, nearly."""
    negatives = easy(EasyShares(0.5, 0.2, 0.3), 10, shared=False)
    batch = 2000
    items = np.arange(batch) % 2
    drawn = negatives.draw_rows(items, np.random.default_rng(0))
    assert drawn.shape == (batch, 10)
    weights = np.maximum(CLICKS, 1) ** 0.75
    expected = batch * 10 * (0.5 * np.eye(SIZE)[:2].sum(0) / 2 + 0.2 / SIZE + 0.3 * weights / weights.sum())
    assert abs(chi_square(np.bincount(drawn.ravel(), minlength=SIZE), expected)) < 4


def test_a_row_never_draws_itself_from_the_batch() -> None:
    items = np.arange(SIZE)
    for seed in range(20):
        drawn = easy(EasyShares(1, 0, 0), 50, shared=False).draw_rows(items, np.random.default_rng(seed))
        assert not (drawn == items[:, None]).any()


def test_all_rows_of_the_batch_are_used_and_the_other_sources_in_proportion() -> None:
    draws = easy(EasyShares(0.5, 0.3, 0.2)).draws(101)
    assert (draws.in_batch, draws.uniform, draws.clicks) == (100, 60, 40)
    assert easy(EasyShares(1, 0, 0)).donors(101) == 101
    assert easy(EasyShares(0, 1, 0)).donors(101) == 0
    assert easy(EasyShares(0, 0.5, 0.5)).draws(101).total == 1024


def test_a_count_is_divided_by_the_shares() -> None:
    negatives = easy(EasyShares(0.5, 0.25, 0.25), 40)
    assert negatives.donors(101) == 20
    draws = negatives.draws(101)
    assert (draws.uniform, draws.clicks) == (10, 10)
    assert draws.in_batch == pytest.approx(20 * 100 / 101)
    assert len(negatives.draw_shared(101, np.random.default_rng(0))) == 20


def test_more_negatives_than_the_batch_has_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"count = 300 with easy.in_batch = 0.5 asks for 150 negatives in a batch of 100"
    ):
        easy(EasyShares(0.5, 0.5, 0), 300).donors(100)


def test_the_expected_count_is_that_under_the_whole_mixture() -> None:
    negatives = easy(EasyShares(0.5, 0.25, 0.25), 400)
    draws = negatives.draws(1000)
    frequency = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.05, 0, 0])
    with np.errstate(divide="ignore"):
        found = negatives.log_expected(np.arange(SIZE), np.log(frequency), draws)
    weights = np.maximum(CLICKS, 1) ** 0.75
    expected = draws.in_batch * frequency + 100 / SIZE + 100 * weights / weights.sum()
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)


def test_a_q_of_one_in_ten_billion_is_not_clipped() -> None:
    clicks = np.ones(3, np.int64)
    found = EasyNegatives(NegativesOptions(), clicks).log_expected(
        np.array([0]), np.array([np.log(1e-10)]), easy(EasyShares(1, 0, 0)).draws(2)
    )
    assert found[0] == pytest.approx(np.log(1e-10))


def test_a_mean_is_over_the_sources_beside_the_batch() -> None:
    weights = np.maximum(CLICKS, 1) ** 0.75
    target = np.exp(easy(EasyShares(0.5, 0.25, 0.25)).log_target(np.arange(SIZE)))
    np.testing.assert_allclose(target, 0.5 / SIZE + 0.5 * weights / weights.sum())
    np.testing.assert_allclose(np.exp(easy(EasyShares(1, 0, 0)).log_target(np.arange(SIZE))), 1 / SIZE)


def test_a_streaming_q_counts_draws_and_not_batches() -> None:
    """Items with 20, 2, 0.5 and 0.02 expected copies in a batch of 100."""
    q = np.array([0.2, 0.02, 0.005, 0.0002])
    q = np.append(q, 1 - q.sum())
    generator, streaming = np.random.default_rng(0), StreamingFrequency(len(q))
    found = []
    for step in range(60_000):
        copies = generator.multinomial(100, q)
        items = np.flatnonzero(copies)
        streaming.observe(items, copies[items])
        if step > 20_000 and step % 50 == 0:
            found.append(np.exp(streaming.log_q(np.arange(len(q)))))
    mean = 100 * np.mean(found, axis=0)
    assert mean[0] == pytest.approx(20, rel=0.02)
    assert mean[1] == pytest.approx(2, rel=0.05)
    assert mean[2] == pytest.approx(0.5, rel=0.1)
    assert mean[3] == pytest.approx(0.02, rel=0.25)


def test_a_streaming_q_follows_a_change() -> None:
    streaming, items = StreamingFrequency(2), np.array([0, 1])
    for copies in ([90, 10], [10, 90]):
        for _ in range(500):
            streaming.observe(items, np.array(copies))
        np.testing.assert_allclose(100 * np.exp(streaming.log_q(items)), copies, rtol=0.01)


def test_a_streaming_q_knows_nothing_of_an_item_that_never_came() -> None:
    streaming = StreamingFrequency(4)
    assert np.exp(streaming.log_q(np.array([2])))[0] == pytest.approx(1 / 4)
    streaming.observe(np.array([0]), np.array([96]))
    assert np.exp(streaming.log_q(np.array([2])))[0] == pytest.approx(1 / 100)


def test_a_streaming_q_goes_on_from_what_was_kept() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.multinomial(50, [0.5, 0.3, 0.2]) for _ in range(40)]
    whole, first, second = (StreamingFrequency(3) for _ in range(3))
    for copies in batches:
        whole.observe(np.arange(3), copies)
    for copies in batches[:25]:
        first.observe(np.arange(3), copies)
    second.state = {name: value.copy() for name, value in first.state.items()}
    for copies in batches[25:]:
        second.observe(np.arange(3), copies)
    assert whole.log_q(np.arange(3)).tolist() == second.log_q(np.arange(3)).tolist()


def test_a_counted_q_is_the_share_of_the_rows() -> None:
    counted = CountedFrequency(np.array([0.75, 0.25, 0.0]))
    np.testing.assert_allclose(np.exp(counted.log_q(np.arange(3))), [0.75, 0.25, 0])


def bag(*lists: list[int]) -> Bag:
    return Bag(np.cumsum([0, *map(len, lists)]), np.array([item for one in lists for item in one], np.int32))


def test_hard_negatives_are_drawn_from_each_list_without_repeats() -> None:
    lists = {"a": bag([1, 2, 3], [4], []), "b": bag([], [5, 6], [7])}
    hard = HardNegatives(lists, {"a": 2, "b": 2, "c": 3, "d": 0})
    seen: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}
    for seed in range(60):
        for row, drawn in enumerate(hard.draw(np.array([0, 1, 2]), np.random.default_rng(seed)).tolist()):
            seen[row].add((*sorted(drawn[:2]), *sorted(drawn[2:])))
    assert seen == {0: {(1, 2, -1, -1), (2, 3, -1, -1), (1, 3, -1, -1)}, 1: {(-1, 4, 5, 6)}, 2: {(-1, -1, -1, 7)}}


def test_each_entry_of_a_list_is_drawn_alike() -> None:
    hard = HardNegatives({"a": bag(list(range(7)))}, {"a": 3})
    drawn = hard.draw(np.zeros(7000, np.int64), np.random.default_rng(0))
    assert abs(chi_square(np.bincount(drawn.ravel()), np.full(7, 3000.0))) < 4
