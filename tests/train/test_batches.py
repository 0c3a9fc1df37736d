from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twotower.features.columns import Bag, Beginnings, pointers
from twotower.features.options import Categorical, Features, Sequence
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.samples.options import EasyShares, NegativesOptions
from twotower.samples.read import Clicks, Samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.towers.losses import RowNegatives, SharedNegatives
from twotower.train.batches import Batch, BatchMaker
from twotower.train.negatives import (
    CountedFrequency,
    EasyNegatives,
    HardNegatives,
    NegativeSources,
    StreamingFrequency,
    fed_frequency,
)
from twotower.train.options import TrainOptions

BuildWorld = Callable[..., Samples]
Draw = Callable[..., list[Any]]
USERS, ITEMS, EVENTS = 12, 15, 203


def maker(
    samples: Samples,
    batch_size: int,
    id_dropout: float = 0.0,
    seed: int = 1,
    *,
    shares: EasyShares = EasyShares(),  # noqa: B008
    count: int | None = None,
    shared: bool = True,
    frequency: CountedFrequency | StreamingFrequency | None = None,
    hard: HardNegatives | None = None,
    uncorrected: bool = False,
    **options: Any,
) -> BatchMaker:
    easy = EasyNegatives(NegativesOptions(shares, count=count, shared=shared), samples.item_positives)
    q = frequency or CountedFrequency(fed_frequency(samples))
    sources = NegativeSources(easy, q, hard, 0.5, uncorrected)
    return BatchMaker(
        samples, TrainOptions(batch_size=batch_size, id_dropout=id_dropout, seed=seed, **options), sources
    )


def shared_of(batch: Batch) -> SharedNegatives:
    assert isinstance(batch.easy, SharedNegatives)
    return batch.easy


def plain(value: Any) -> Any:
    """Arrays as lists, all the way down."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return plain(vars(value))
    return value.tolist() if isinstance(value, np.ndarray) else value


def lists(bag: Any) -> list[list[int]]:
    assert isinstance(bag, Bag)
    return [bag.rows[start:stop].tolist() for start, stop in zip(bag.indptr, bag.indptr[1:], strict=False)]


def pairs(batches: list[Batch]) -> list[tuple[int, int]]:
    """(user, item) of all rows; ids are not dropped, so a user's token tells the user."""
    return [
        (int(user) - FIRST, int(item))
        for batch in batches
        for user, item in zip(batch.user[c.USER_ID], batch.item_row[batch.positive], strict=True)
    ]


def same(one: Batch, other: Batch) -> bool:
    return bool(plain(one) == plain(other))


@pytest.fixture(params=[True, False], ids=["timed", "untimed"])
def samples(request: pytest.FixtureRequest, build_world: BuildWorld, random_events: Draw) -> Samples:
    return build_world(random_events(USERS, ITEMS, EVENTS, request.param), USERS, ITEMS)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 101, 202, 203, 5000])
def test_an_epoch_is_spread_evenly_and_has_every_row_once(
    build_world: BuildWorld, random_events: Draw, batch_size: int
) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    batches = list(maker(build_world(events, USERS, ITEMS), batch_size).epoch(0))
    sizes = [len(batch.positive) for batch in batches]
    assert len(batches) == min(-(-EVENTS // batch_size), EVENTS // 2)
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 3)
    assert sorted(pairs(batches)) == sorted((e.user, e.item) for e in events)


def test_an_epoch_in_the_order_of_time_has_every_row_once(build_world: BuildWorld, random_events: Draw) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    batches = list(maker(build_world(events, USERS, ITEMS), 20, order="time").epoch(0))
    in_order = sorted(events, key=lambda event: event.request_ms)
    assert pairs(batches) == [(event.user, event.item) for event in in_order]


def test_without_time_there_is_no_order_of_time(build_world: BuildWorld, random_events: Draw) -> None:
    untimed = build_world(random_events(USERS, ITEMS, EVENTS, False), USERS, ITEMS)
    with pytest.raises(ConfigError, match=r"train\.order = 'time', but the events have no time"):
        maker(untimed, 20, order="time")


def test_a_batch_depends_on_seed_epoch_and_step_alone(samples: Samples) -> None:
    mixture = EasyShares(0.5, 0.25, 0.25)
    for shared in (True, False):
        one = maker(samples, 20, 0.3, shares=mixture, shared=shared)
        first = list(one.epoch(2))
        later = list(maker(samples, 20, 0.3, shares=mixture, shared=shared).epoch(2, first_step=3))
        assert all(same(one, other) for one, other in zip(first[3:], later, strict=True))
        assert not same(first[0], next(maker(samples, 20, 0.3, 2, shares=mixture, shared=shared).epoch(2)))
        assert not same(first[0], next(one.epoch(3)))


def test_items_stand_once_and_shared_negatives_first(samples: Samples) -> None:
    for shares in (EasyShares(), EasyShares(0.4, 0.3, 0.3), EasyShares(0, 1, 0)):
        for batch in maker(samples, 8, shares=shares, count=5).epoch(0):
            assert len(np.unique(batch.item_row)) == len(batch.item_row)
            assert batch.item[c.ITEM_ID].tolist() == (batch.item_row + FIRST).tolist()  # type: ignore[union-attr]
            negatives = len(shared_of(batch).log_weight)
            assert 1 <= negatives <= 6  # 1.5 of two sources are 2 of each
            assert set(range(negatives, len(batch.item_row))) <= set(batch.positive.tolist())


def test_in_batch_negatives_weigh_their_copies_over_their_expected_number(samples: Samples) -> None:
    q = fed_frequency(samples)
    for batch in maker(samples, 50).epoch(0):
        rows = len(batch.positive)
        copies = np.bincount(batch.positive, minlength=len(batch.item_row))
        expected = copies / ((rows - 1) * q[batch.item_row])
        np.testing.assert_allclose(np.exp(shared_of(batch).log_weight), expected, rtol=1e-5)


def test_on_average_every_item_weighs_one_whatever_draws_it(build_world: BuildWorld, random_events: Draw) -> None:
    """The copies of an item over their expected number: 1 in the mean, for a softmax over the whole catalogue."""
    samples = build_world(random_events(USERS, ITEMS, EVENTS, True), USERS, ITEMS)
    for shares, count in ((EasyShares(0, 1, 0), 9), (EasyShares(0, 0, 1), 9), (EasyShares(0.5, 0.2, 0.3), None)):
        total, epochs = np.zeros(ITEMS), 300
        one = maker(samples, 50, shares=shares, count=count)
        for epoch in range(epochs):
            batches = list(one.epoch(epoch))
            for batch in batches:
                negatives = len(shared_of(batch).log_weight)
                total[batch.item_row[:negatives]] += np.exp(shared_of(batch).log_weight) / len(batches)
        np.testing.assert_allclose(total / epochs, 1, atol=0.15)


def test_weights_of_a_mean_are_those_of_its_sources(samples: Samples) -> None:
    """Uniform draws count alike; in-batch ones stand in for uniform ones."""
    for batch in maker(samples, 50, shares=EasyShares(0, 1, 0), count=9, loss="triplet_hinge").epoch(0):
        weights = np.exp(shared_of(batch).log_weight)
        np.testing.assert_allclose(weights * 9, np.round(weights * 9), atol=1e-5)
        assert weights.sum() == pytest.approx(1)
    q = fed_frequency(samples)
    for batch in maker(samples, 50, loss="triplet_hinge").epoch(0):
        rows = len(batch.positive)
        copies = np.bincount(batch.positive, minlength=len(batch.item_row))
        expected = copies / ((rows - 1) * q[batch.item_row] * ITEMS)
        np.testing.assert_allclose(np.exp(shared_of(batch).log_weight), expected, rtol=1e-5)


def test_uncorrected_negatives_count_as_often_as_they_are_drawn(samples: Samples) -> None:
    for batch in maker(samples, 50, uncorrected=True).epoch(0):
        copies = np.bincount(batch.positive, minlength=len(batch.item_row))
        np.testing.assert_allclose(np.exp(shared_of(batch).log_weight), copies, rtol=1e-6)
    for batch in maker(samples, 50, shares=EasyShares(0, 0.5, 0.5), count=8, shared=False, uncorrected=True).epoch(0):
        assert isinstance(batch.easy, RowNegatives)
        assert set(batch.easy.log_weight.ravel().tolist()) <= {0.0, -np.inf}


def test_the_mask_is_every_click_of_the_user_among_the_negatives_of_the_batch_each_once(samples: Samples) -> None:
    clicks = samples.clicks
    for shares in (EasyShares(), EasyShares(0.2, 0.8, 0)):
        for batch in maker(samples, 40, shares=shares, count=None if shares.in_batch == 1 else 10).epoch(0):
            mask, negatives = shared_of(batch).mask, len(shared_of(batch).log_weight)
            for place, (user, _) in enumerate(pairs([batch])):
                clicked = set(clicks.item_row[clicks.indptr[user] : clicks.indptr[user + 1]].tolist())
                expected = [k for k, item in enumerate(batch.item_row[:negatives].tolist()) if item in clicked]
                assert sorted(mask.columns[mask.indptr[place] : mask.indptr[place + 1]].tolist()) == expected


def test_a_weak_positive_masks_its_own_item_though_its_user_never_clicked_it(
    build_world: BuildWorld, random_events: Draw
) -> None:
    """Rows whose item was only shown: as if the user's click of it were not among the clicks."""
    samples = build_world(random_events(USERS, ITEMS, EVENTS, True), USERS, ITEMS)
    shown = replace(samples, clicks=Clicks(np.zeros(USERS + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64)))
    silent = replace(shown, positives=replace(samples.positives, history=np.zeros(EVENTS, np.int32)))
    weak = replace(silent, item_positives=np.zeros(ITEMS, np.int64))
    for batch in maker(weak, 40).epoch(0):
        mask = shared_of(batch).mask
        assert np.diff(mask.indptr).tolist() == [1] * len(batch.positive)
        assert mask.columns.tolist() == batch.positive.tolist()


def test_a_rows_own_negatives_are_masked_where_they_are_the_users_positives(samples: Samples) -> None:
    clicks = samples.clicks
    masked = 0
    for batch in maker(samples, 40, shares=EasyShares(0.4, 0.3, 0.3), count=6, shared=False).epoch(0):
        assert isinstance(batch.easy, RowNegatives)
        assert batch.easy.columns.shape == (len(batch.positive), 6)
        for place, (user, _) in enumerate(pairs([batch])):
            clicked = set(clicks.item_row[clicks.indptr[user] : clicks.indptr[user + 1]].tolist())
            drawn = batch.item_row[batch.easy.columns[place]].tolist()
            dead = np.isneginf(batch.easy.log_weight[place]).tolist()
            assert dead == [item in clicked for item in drawn]
            masked += sum(dead)
    assert masked > 0


def test_hard_negatives_go_with_their_rows(samples: Samples) -> None:
    """Row i has the items i mod 15 and i + 1 mod 15, every third row none."""
    some = np.arange(len(samples.positives))
    counts = np.where(some % 3 == 0, 0, 2)
    bag = Bag(pointers(counts), np.concatenate([[r % ITEMS, (r + 1) % ITEMS] for r in some if r % 3]).astype(np.int32))
    hard = HardNegatives({"x": bag}, {"x": 3})
    told = replace(samples, positives=replace(samples.positives, weight=some.astype(np.float32)))
    for batch in maker(told, 40, hard=hard).epoch(0):
        assert batch.hard is not None
        for row, places, weights in zip(
            batch.weight.astype(int), batch.hard.columns, batch.hard.log_weight, strict=True
        ):
            live = batch.item_row[places[weights == 0]].tolist()
            assert sorted(live) == ([] if row % 3 == 0 else sorted([row % ITEMS, (row + 1) % ITEMS]))
            assert np.isneginf(weights[weights != 0]).all()


def test_rows_are_fed_as_often_as_sampling_says(samples: Samples) -> None:
    copies = (np.arange(len(samples.positives)) % 4).astype(np.int32)
    sampled = replace(samples, positives=replace(samples.positives, copies=copies))
    one = maker(sampled, 20)
    counts = np.zeros(ITEMS)
    for batch in one.epoch(0):
        counts += np.bincount(batch.item_row[batch.positive], minlength=ITEMS)
    assert counts.sum() == one.rows == copies.sum()
    assert counts.tolist() == np.bincount(samples.positives.item_row, copies, ITEMS).tolist()
    np.testing.assert_allclose(counts / counts.sum(), fed_frequency(sampled), atol=1e-12)


def test_a_streaming_q_learns_from_the_rows_as_fed_after_it_was_used(samples: Samples) -> None:
    streaming = StreamingFrequency(ITEMS)
    batches = maker(samples, 30, frequency=streaming).epoch(0)
    first = next(batches)
    copies = np.bincount(first.positive, minlength=len(first.item_row))
    blind = copies / ((len(first.positive) - 1) / ITEMS)  # before the first batch all items are alike
    np.testing.assert_allclose(np.exp(shared_of(first).log_weight), blind, rtol=1e-5)
    for _ in batches:
        pass
    assert int(streaming.state["draws"][0]) == EVENTS


def test_a_history_is_the_latest_clicks_before_the_request_in_their_order(
    build_world: BuildWorld, random_events: Draw
) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    last = 5
    features = Features(
        user={"user_id": Categorical("categorical"), "history": Sequence("sequence", last=last)},
        context={"hour": Categorical("categorical")},
    )
    samples = build_world(events, USERS, ITEMS, features)
    expected = []
    for event in events:
        earlier = [e for e in events if e.user == event.user and e.click_ms < event.request_ms]
        ordered = sorted(earlier, key=lambda e: (e.click_ms, events.index(e)))
        expected.append((event.user, event.item, [e.item + FIRST for e in ordered][-last:]))
    found = []
    for batch in maker(samples, 40).epoch(0):
        found += [(*pair, tokens) for pair, tokens in zip(pairs([batch]), lists(batch.user["history"]), strict=True)]
    assert sorted(found) == sorted(expected)
    assert any(tokens == [] for *_, tokens in found)


def test_without_time_each_half_of_the_clicks_is_the_history_of_the_other(build_world: BuildWorld) -> None:
    clicks = [(user, item) for user in range(6) for item in range(2 * user + 1)]
    one = maker(build_world([_untimed(*pair) for pair in clicks], 6, 11), 10)
    met = dict.fromkeys(((user, item, other) for user, item in clicks for other in range(2 * user + 1)), 0)
    epochs = 400
    for epoch in range(epochs):
        batches = list(one.epoch(epoch))
        fed = pairs(batches)
        assert sorted(fed) == clicks  # every click once
        histories = [
            [token - FIRST for token in tokens] for batch in batches for tokens in lists(batch.user["history"])
        ]
        for (user, item), history in zip(fed, histories, strict=True):
            assert len(history) in (user, user + 1)
            assert item not in history
            for other in history:
                met[user, item, other] += 1
            same_half = [
                target
                for (owner, target), seen in zip(fed, histories, strict=True)
                if owner == user and sorted(seen) == sorted(history)
            ]
            assert sorted([*history, *same_half]) == list(range(2 * user + 1))
    for (user, item, other), times in met.items():
        share = 0 if item == other else (user + 1) / (2 * user + 1)  # two items stand in different halves
        assert abs(times - epochs * share) <= 4.5 * np.sqrt(epochs * share * (1 - share))


@pytest.mark.parametrize("encoder", ["mean", "transformer"])
def test_a_horizon_leaves_out_some_of_the_latest_clicks_and_never_all(
    encoder: Any, build_world: BuildWorld, random_events: Draw
) -> None:
    sequence = Sequence("sequence", last=50, encoder=encoder)
    wanted = Features(user={"user_id": Categorical("categorical"), "history": sequence})
    samples = build_world(random_events(USERS, ITEMS, EVENTS, True), USERS, ITEMS, wanted)

    def lengths(horizon: int, epoch: int) -> list[int]:
        """Of the histories, in the order in which rows are fed, which does not depend on the horizon."""
        found: list[int] = []
        for batch in maker(samples, 20, horizon=horizon).epoch(epoch):
            history: Any = batch.user["history"]
            found += (history.length if isinstance(history, Beginnings) else np.diff(history.indptr)).tolist()
        return found

    skipped = []
    for epoch in range(20):
        for whole, short in zip(lengths(0, epoch), lengths(3, epoch), strict=True):
            assert min(whole, 1) <= short <= whole
            skipped.append(whole - short)
    assert set(skipped) == {0, 1, 2, 3}


IN_ORDER = Features(
    user={
        "user_id": Categorical("categorical"),
        "history": Sequence("sequence", last=4, encoder="transformer"),
    }
)


def test_a_transformer_reads_pieces_of_clicks_that_end_rows_share(build_world: BuildWorld, random_events: Draw) -> None:
    events = random_events(USERS, ITEMS, EVENTS, True)
    one = maker(build_world(events, USERS, ITEMS, IN_ORDER), 20)
    lengths: dict[tuple[int, int], set[int]] = {}
    for epoch in range(30):
        batches = list(one.epoch(epoch))
        assert sorted(pairs(batches)) == sorted((e.user, e.item) for e in events)
        shared = 0
        for batch in batches:
            history = batch.user["history"]
            assert isinstance(history, Beginnings)
            shared += len(history.row) - len(history.lists)
            assert max(map(len, lists(history.lists)), default=0) <= 4
            found = [
                lists(history.lists)[row][:length] for row, length in zip(history.row, history.length, strict=True)
            ]
            for (user, item), tokens in zip(pairs([batch]), found, strict=True):
                right = []
                for event in (e for e in events if (e.user, e.item) == (user, item)):
                    before = [e for e in events if e.user == user and e.click_ms < event.request_ms]
                    clicked = [e.item + FIRST for e in sorted(before, key=lambda e: e.click_ms)]
                    right.append(clicked[len(clicked) - len(tokens) :] == tokens and bool(tokens) == bool(clicked))
                assert any(right)
                lengths.setdefault((user, item), set()).add(len(tokens))
        assert shared > EVENTS / 3  # rows of a piece are in one batch
    assert sum(found >= {1, 2, 3, 4} for found in lengths.values()) > len(lengths) / 2  # each epoch cuts elsewhere


def test_batches_of_pieces_depend_on_seed_epoch_and_step_alone(build_world: BuildWorld, random_events: Draw) -> None:
    samples = build_world(random_events(USERS, ITEMS, EVENTS, True), USERS, ITEMS, IN_ORDER)
    first, later = list(maker(samples, 20).epoch(2)), maker(samples, 20).epoch(2, first_step=3)
    assert all(same(one, other) for one, other in zip(first[3:], later, strict=True))
    assert not same(first[0], next(maker(samples, 20).epoch(3)))


def test_clicks_without_an_order_are_not_for_a_transformer(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, 0), _untimed(0, 1)], 1, 2, IN_ORDER)
    with pytest.raises(ConfigError, match="reads clicks in their order, and the events have no time"):
        maker(samples, 20)


def _untimed(user: int, item: int) -> Any:
    return SimpleNamespace(user=user, item=item, request_ms=None, click_ms=None, weight=1.0)


def test_q_is_the_share_of_rows_as_fed(samples: Samples) -> None:
    one, q = maker(samples, 50), fed_frequency(samples)
    counts = np.zeros(ITEMS)
    for batch in one.epoch(0):
        counts += np.bincount(batch.item_row[batch.positive], minlength=ITEMS)
    assert q.sum() == pytest.approx(1)
    np.testing.assert_allclose(counts / counts.sum(), q, atol=1e-12)


def test_no_id_is_dropped_at_0_and_nearly_all_near_1(samples: Samples) -> None:
    for share, low, high in ((0.0, 0.0, 0.0), (0.4, 0.25, 0.55), (0.999, 0.97, 1.0)):
        batches = list(maker(samples, 50, share).epoch(0))
        for name in (c.USER_ID, c.ITEM_ID, "hour"):
            columns = [batch.item[name] if name == c.ITEM_ID else batch.user[name] for batch in batches]
            tokens = np.concatenate([np.asarray(column) for column in columns])
            dropped = tokens == (0 if name == "hour" else UNKNOWN)
            assert low <= dropped.mean() <= high, (share, name)


@pytest.mark.parametrize("weight", [1e29, np.inf, np.nan, -1.0])
def test_a_weight_whose_squares_are_no_numbers_is_refused(samples: Samples, weight: float) -> None:
    weights = np.ones(len(samples.positives), np.float32)
    weights[3] = weight
    wild = replace(samples, positives=replace(samples.positives, weight=weights))
    with pytest.raises(DataError, match=r"1 of .* positives have a weight such as"):
        maker(wild, 16)


def test_weights_go_with_their_rows(build_world: BuildWorld, random_events: Draw) -> None:
    events = random_events(USERS, ITEMS, 60, True)
    weighted = [type(e)(e.user, e.item, e.request_ms, e.click_ms, 1.0 + e.item) for e in events]
    for batch in maker(build_world(weighted, USERS, ITEMS), 16, 0.5).epoch(0):
        assert batch.weight.tolist() == (1.0 + batch.item_row[batch.positive]).tolist()


def test_a_positive_counts_half_after_a_half_life(build_world: BuildWorld) -> None:
    day = 86_400_000
    samples = build_world(
        [SimpleNamespace(user=u, item=u, request_ms=u * day, click_ms=u * day + 1, weight=1 + u) for u in range(4)],
        4,
        4,
    )
    (batch,) = maker(samples, 4, half_life_days=2).epoch(0)
    found = dict(zip((user for user, _ in pairs([batch])), batch.weight.tolist(), strict=True))
    assert found == pytest.approx({u: (1 + u) * 0.5 ** ((3 - u) / 2) for u in range(4)})


def test_positives_without_a_time_do_not_age(build_world: BuildWorld) -> None:
    with pytest.raises(ConfigError, match="the events have no time: leave it out"):
        maker(build_world([_untimed(0, 0), _untimed(0, 1)], 1, 2), 2, half_life_days=1)


def test_a_single_row_is_refused(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, 0)], 1, 2)
    with pytest.raises(DataError, match="batch_size = 4096 with 1 training rows: at least 2 of each are needed"):
        maker(samples, 4096)


def test_batches_of_one_are_refused(samples: Samples) -> None:
    with pytest.raises(DataError, match="batch_size = 1 with"):
        maker(samples, 1)


def test_one_user_who_clicked_everything_masks_every_column(build_world: BuildWorld) -> None:
    samples = build_world([_untimed(0, item) for item in range(8)], 1, 8)
    (batch,) = maker(samples, 100).epoch(0)
    assert np.diff(shared_of(batch).mask.indptr).tolist() == [8] * 8
