import numpy as np
import pyarrow as pa
import pytest

from twotower.features.bloom import MAX_OVER, FilterShape, Seen, hash_ids
from twotower.schema.errors import ConfigError

DAY_MS = 86_400_000
SHAPE = FilterShape.of(7 * DAY_MS, 7, 3500, 0.01)


def shown(shape: FilterShape, days: int, a_day: int, first: int = 0) -> tuple[Seen, np.ndarray]:
    """Different items on each of some days, and their numbers (days, a_day)."""
    items = first + np.arange(days * a_day).reshape(days, a_day)
    seen = Seen(shape)
    for day, numbers in enumerate(items):
        seen = seen.add([day * DAY_MS + 5] * a_day, hash_ids(pa.array(numbers)))
    return seen, items


def test_the_share_of_other_items_taken_for_shown_stays_below_the_error_rate() -> None:
    seen, items = shown(SHAPE, 7, 500)
    others = np.random.default_rng(0).integers(10**9, 2**62, 200_000)
    share = seen.contains(hash_ids(pa.array(others)), 0).mean()
    assert 0 < share < 0.01
    assert seen.contains(hash_ids(pa.array(items.ravel())), 0).all()


def test_nothing_shown_within_the_window_is_missed() -> None:
    seen, items = shown(SHAPE, 40, 300)
    for day in range(33, 40):
        assert seen.contains(hash_ids(pa.array(items[33:].ravel())), 33 * DAY_MS).all()
        assert seen.contains(hash_ids(pa.array(items[day])), day * DAY_MS + 5).all()


def test_what_is_older_than_a_period_before_the_window_falls_out() -> None:
    seen, items = shown(SHAPE, 40, 300)
    within = [seen.contains(hash_ids(pa.array(numbers)), 35 * DAY_MS).mean() for numbers in items]
    assert within[35:] == [1.0] * 5
    assert max(within[:35]) < 0.05
    assert not seen.contains(hash_ids(pa.array(items.ravel())), 41 * DAY_MS).any()


def test_someone_who_is_shown_more_than_expected_gets_more_filters_and_the_error_grows_in_proportion() -> None:
    seen, items = shown(SHAPE, 7, 1500)
    assert len(seen.filters) == 21
    assert seen.contains(hash_ids(pa.array(items.ravel())), 0).all()
    others = np.random.default_rng(0).integers(10**9, 2**62, 100_000)
    assert seen.contains(hash_ids(pa.array(others)), 0).mean() < 0.03
    assert len(shown(SHAPE, 7, 6000)[0].filters) == MAX_OVER * SHAPE.filters


def test_the_same_item_again_takes_no_room() -> None:
    hashes = hash_ids(pa.array(np.arange(100)))
    seen = Seen(SHAPE)
    for _ in range(20):
        seen = seen.add([5] * 100, hashes)
    assert [one.count for one in seen.filters] == [100]


def test_late_impressions_enter_the_filter_of_their_period() -> None:
    seen, _ = shown(SHAPE, 7, 10)
    late = hash_ids(pa.array([999]))
    seen = seen.add([2 * DAY_MS], late)
    assert seen.contains(late, 2 * DAY_MS).tolist() == [True]
    assert seen.contains(late, 3 * DAY_MS).tolist() == [False]
    assert [one.period for one in seen.filters] == list(range(7))


def test_a_window_may_have_more_periods_than_a_word_has_bits() -> None:
    shape = FilterShape.of(100 * DAY_MS, 100, 2000, 0.01)
    seen, items = shown(shape, 101, 10)
    assert len(seen.filters) == 101
    assert seen.contains(hash_ids(pa.array(items.ravel())), 0).all()
    assert seen.contains(hash_ids(pa.array(np.arange(10**9, 10**9 + 50_000))), 0).mean() < 0.01


def test_filters_survive_being_written_down() -> None:
    seen, _ = shown(SHAPE, 9, 30)
    assert Seen.decode(SHAPE, seen.encode()) == seen
    assert Seen.decode(SHAPE, b"") == Seen(SHAPE)


def test_hashes_are_fixed_and_differ() -> None:
    """A stored filter is read by later releases: these numbers must never change."""
    assert hash_ids(pa.array([0, -1])).tolist() == [16294208416658607535, 16490336266968443936]
    assert hash_ids(pa.array(["i000001"])).tolist() == [int(hash_ids(pa.array(["i000001", "x"]))[0])]
    strings = ["", "\0", "\0\0", "a", "b", "ab", "ba", "é", "名前", *(f"i{n:06d}" for n in range(100_000))]
    hashes = hash_ids(pa.array(strings))
    assert len(set(hashes.tolist())) == len(strings)
    assert hash_ids(pa.array(strings).slice(3, 4)).tolist() == hashes[3:7].tolist()
    assert len(hash_ids(pa.array([], pa.string()))) == len(hash_ids(pa.array([], pa.int64()))) == 0
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(len(hashes), 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.01


def test_a_window_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="a window of 3 ms cannot be cut into 7 periods"):
        FilterShape.of(3, 7, 10, 0.1)
