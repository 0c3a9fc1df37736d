from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twotower.config import settings as spec
from twotower.features.columns import Bag
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.train.batches import Batch, BatchMaker

BuildWorld = Callable[..., Samples]
Draw = Callable[..., list[Any]]
USERS, ITEMS, EVENTS = 12, 15, 203


def lists(bag: Any) -> list[list[int]]:
    assert isinstance(bag, Bag)
    return [bag.rows[start:stop].tolist() for start, stop in zip(bag.indptr, bag.indptr[1:], strict=False)]


def pairs(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    """(user, item) of all rows; ids are not dropped, so a user's token tells the user."""
    return [
        (int(user) - FIRST, int(item))
        for batch in batches
        for user, item in zip(batch.user[c.USER_ID], batch.item_row[batch.positive], strict=True)
    ]


def same(one: Batch, other: Batch) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return value.tolist() if isinstance(value, np.ndarray) else [part.tolist() for part in vars(value).values()]

    return {k: plain(v) for k, v in vars(one).items()} == {k: plain(v) for k, v in vars(other).items()}


@pytest.fixture(params=[True, False], ids=["timed", "untimed"])
def samples(request: pytest.FixtureRequest, build_world: BuildWorld, random_events: Draw) -> Samples:
    return build_world(random_events(USERS, ITEMS, EVENTS, request.param), USERS, ITEMS)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 101, 202, 203, 5000])
def test_an_epoch_is_spread_evenly_and_has_every_row_once(
    build_world: BuildWorld, random_events: Draw, batch_size: int
) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    maker = BatchMaker(build_world(events, USERS, ITEMS), batch_size, 0.0, seed=1)
    batches = list(maker.epoch(0))
    sizes = [len(batch.positive) for batch in batches]
    assert len(batches) == maker.steps
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 3)
    assert sorted(pairs(batches)) == sorted((e.user, e.item) for e in events)


def test_a_batch_depends_on_seed_epoch_and_step_alone(samples: Samples) -> None:
    maker = BatchMaker(samples, 20, 0.3, seed=1)
    first = list(maker.epoch(2))
    later = list(BatchMaker(samples, 20, 0.3, seed=1).epoch(2, first_step=3))
    assert all(same(one, other) for one, other in zip(first[3:], later, strict=True))
    assert not same(first[0], next(BatchMaker(samples, 20, 0.3, seed=2).epoch(2)))
    assert not same(first[0], next(maker.epoch(3)))


def test_items_stand_once_with_their_copies(samples: Samples) -> None:
    for batch in BatchMaker(samples, 50, 0.0, seed=1).epoch(0):
        assert len(np.unique(batch.item_row)) == len(batch.item_row)
        assert batch.copies.tolist() == [int((batch.positive == column).sum()) for column in range(len(batch.item_row))]
        assert batch.copies.sum() == len(batch.positive)
        assert batch.item[c.ITEM_ID].tolist() == (batch.item_row + FIRST).tolist()  # type: ignore[union-attr]


def test_the_mask_is_every_click_of_the_user_among_the_items_of_the_batch(samples: Samples) -> None:
    clicks = samples.clicks
    for batch in BatchMaker(samples, 40, 0.0, seed=1).epoch(0):
        for place, (user, _) in enumerate(pairs([batch])):
            clicked = set(clicks.item_row[clicks.indptr[user] : clicks.indptr[user + 1]].tolist())
            expected = {column for column, item in enumerate(batch.item_row.tolist()) if item in clicked}
            start, stop = batch.mask.indptr[place : place + 2]
            assert set(batch.mask.columns[start:stop].tolist()) == expected


def test_a_history_is_the_latest_clicks_before_the_request_in_their_order(
    build_world: BuildWorld, random_events: Draw
) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    last = 5
    features = spec.Features(
        user={"user_id": spec.Categorical("categorical"), "history": spec.Sequence("sequence", last=last)},
        context={"hour": spec.Categorical("categorical")},
    )
    samples = build_world(events, USERS, ITEMS, features)
    expected = []
    for event in events:
        earlier = [e for e in events if e.user == event.user and e.click_ms < event.request_ms]
        ordered = sorted(earlier, key=lambda e: (e.click_ms, events.index(e)))
        expected.append((event.user, event.item, [e.item + FIRST for e in ordered][-last:]))
    found = []
    for batch in BatchMaker(samples, 40, 0.0, seed=1).epoch(0):
        found += [(*pair, tokens) for pair, tokens in zip(pairs([batch]), lists(batch.user["history"]), strict=True)]
    assert sorted(found) == sorted(expected)
    assert any(tokens == [] for *_, tokens in found)


def test_without_time_half_of_the_clicks_are_the_history_of_the_other_half(build_world: BuildWorld) -> None:
    import_events = [(user, item) for user in range(6) for item in range(2 * user + 1)]
    samples = build_world([_untimed(*pair) for pair in import_events], 6, 11)
    targets: dict[tuple[int, int], int] = dict.fromkeys(import_events, 0)
    maker = BatchMaker(samples, 10, 0.0, seed=1)
    epochs = 400
    for epoch in range(epochs):
        histories: dict[int, set[tuple[int, ...]]] = {}
        aims: dict[int, list[int]] = {user: [] for user in range(6)}
        for batch in maker.epoch(epoch):
            for (user, item), tokens in zip(pairs([batch]), lists(batch.user["history"]), strict=True):
                histories.setdefault(user, set()).add(tuple(token - FIRST for token in tokens))
                aims[user].append(item)
                targets[user, item] += 1
        for user in range(6):
            (history,) = histories[user]  # one and the same for all rows of a user
            assert sorted([*history, *aims[user]]) == list(range(2 * user + 1))
            assert len(history) == user
    for (user, _), times in targets.items():
        share = (user + 1) / (2 * user + 1)
        assert abs(times - epochs * share) <= 4.5 * np.sqrt(epochs * share * (1 - share))


def _untimed(user: int, item: int) -> Any:
    return SimpleNamespace(user=user, item=item, request_ms=None, click_ms=None, weight=1.0)


def test_q_is_the_share_of_rows_as_fed(samples: Samples) -> None:
    maker = BatchMaker(samples, 50, 0.0, seed=1)
    epochs = 1 if samples.timed else 600
    counts = np.zeros(ITEMS)
    for epoch in range(epochs):
        for batch in maker.epoch(epoch):
            counts[batch.item_row] += batch.copies
    assert maker.frequency.sum() == pytest.approx(1)
    tolerance = 1e-12 if samples.timed else 0.003
    np.testing.assert_allclose(counts / counts.sum(), maker.frequency, atol=tolerance)


def test_q_without_time_is_higher_for_items_of_users_of_one_click(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, 0), _untimed(1, 1), _untimed(1, 2)], 2, 3)
    maker = BatchMaker(samples, 2, 0.0, seed=0)
    assert maker.rows == 2
    assert maker.frequency.tolist() == [0.5, 0.25, 0.25]


def test_no_id_is_dropped_at_0_and_nearly_all_near_1(samples: Samples) -> None:
    for share, low, high in ((0.0, 0.0, 0.0), (0.4, 0.25, 0.55), (0.999, 0.97, 1.0)):
        batches = list(BatchMaker(samples, 50, share, seed=1).epoch(0))
        for name in (c.USER_ID, c.ITEM_ID, "hour"):
            columns = [batch.item[name] if name == c.ITEM_ID else batch.user[name] for batch in batches]
            tokens = np.concatenate([np.asarray(column) for column in columns])
            dropped = tokens == (0 if name == "hour" else UNKNOWN)
            assert low <= dropped.mean() <= high, (share, name)


def test_weights_go_with_their_rows(build_world: BuildWorld, random_events: Draw) -> None:
    events = random_events(USERS, ITEMS, 60, True)
    weighted = [type(e)(e.user, e.item, e.request_ms, e.click_ms, 1.0 + e.item) for e in events]
    for batch in BatchMaker(build_world(weighted, USERS, ITEMS), 16, 0.5, seed=1).epoch(0):
        assert batch.weight.tolist() == (1.0 + batch.item_row[batch.positive]).tolist()


def test_a_single_row_is_refused(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, 0), _untimed(0, 1)], 1, 2)
    with pytest.raises(DataError, match="batch_size = 4096 with 1 training rows: in-batch negatives need at least 2"):
        BatchMaker(samples, 4096, 0.0, seed=0)


def test_batches_of_one_are_refused(samples: Samples) -> None:
    with pytest.raises(DataError, match="batch_size = 1 with"):
        BatchMaker(samples, 1, 0.0, seed=0)


def test_one_user_who_clicked_everything_masks_every_column(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, item) for item in range(8)], 1, 8)
    (batch,) = BatchMaker(samples, 100, 0.0, seed=0).epoch(0)
    assert [
        len(set(batch.mask.columns[a:b])) for a, b in zip(batch.mask.indptr, batch.mask.indptr[1:], strict=False)
    ] == [4] * 4
