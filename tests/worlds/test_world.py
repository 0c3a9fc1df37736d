from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from twotower.schema.clock import DAY_MS, HOUR_MS
from twotower.schema.errors import ConfigError
from twotower.worlds import natures
from twotower.worlds import world as w
from twotower.worlds.inhabitants import NAMES, TASTE_NORM
from twotower.worlds.natures import NATURES
from twotower.worlds.options import WorldOptions
from twotower.worlds.world import FIRST_DAY_MS, NOTHING, Requests, World, make_world, uniform

CERTAIN = 1e-4
"""A test of chance fails once in ten thousand seeds; the seed is fixed."""


@cache
def world() -> World:
    return make_world(WorldOptions(users=400, items=300, days=5, seed=1), horizon=8)


def many_requests(count: int, seed: int = 0) -> Requests:
    """Requests of random users at random times of the third day."""
    rng = np.random.default_rng(seed)
    ts_ms = FIRST_DAY_MS + 2 * DAY_MS + rng.integers(0, DAY_MS, count)
    return Requests(np.arange(count), rng.integers(0, 400, count), ts_ms, rng.integers(0, 3, count))


def random_pages(count: int, places: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(world().alive(2), (count, places))


def test_the_utility_is_the_sum_that_the_documentation_gives() -> None:
    truth, user, item = world().truth, 5, 7
    ts_ms = FIRST_DAY_MS + 3 * DAY_MS + 20 * HOUR_MS
    angle = 0.15 * (3 + 20 / 24) / 7
    mood = int(truth.mood_at(np.array(user), ts_ms))
    wish = np.cos(angle) * truth.people.taste[user] + np.sin(angle) * truth.people.turn[user] + 2.0 * truth.centre[mood]
    category = truth.catalogue.category[item]
    age_days = 3 + 20 / 24 - truth.catalogue.birth_day[item]
    by_hand = (
        wish @ truth.catalogue.vector[item]
        + truth.catalogue.quality[item]
        + truth.daily_mood[3, category]
        + truth.trend[3 * 6 + 5, category]
        + 0.8 * 0.5 ** (age_days / 2)
        + 0.5
    )
    given = truth.utility(np.array(user), np.array(item), np.array(ts_ms), np.array(w.SCENES.index("search")))
    assert given == pytest.approx(by_hand)
    assert [NAMES[row] for row in truth.catalogue.category[:300]] == world().items(4)["category"].to_pylist()


def test_a_world_made_for_more_days_is_the_same_on_the_days_that_both_have() -> None:
    fewer, more = make_world(WorldOptions(users=400, items=300, days=5, seed=1)), world()
    for day in range(5):
        assert fewer.users(day).equals(more.users(day))
        assert fewer.items(day).equals(more.items(day))
        assert (fewer.alive(day) == more.alive(day)).all()
        ours, theirs = fewer.requests(day), more.requests(day)
        assert (ours.ts_ms == theirs.ts_ms).all()
        assert (ours.user == theirs.user).all()
        best = fewer.top(ours.user, ours.ts_ms, 8)
        assert (best == more.top(ours.user, ours.ts_ms, 8)).all()
        assert (fewer.clicks(ours, best) == more.clicks(theirs, best)).all()


def test_every_later_day_brings_users_and_items_after_those_of_the_log() -> None:
    rate = NATURES["default"].new_items_a_day
    a_day = round(300 * rate / (1 + 5 * rate))
    assert [world().items(day).num_rows for day in (0, 4, 5, 6, 7)] == [
        300,
        300,
        300 + a_day,
        300 + 2 * a_day,
        300 + 3 * a_day,
    ]
    assert [len(world().alive(day)) - len(world().alive(day - 1)) for day in (5, 6, 7)] == [a_day] * 3
    assert world().items(6)["item_id"].to_pylist() == [f"i{row:06d}" for row in range(300 + 2 * a_day)]
    assert world().items(6)["age_days"].to_pylist()[-a_day:] == [0] * a_day
    assert world().users(7).num_rows > world().users(4).num_rows == 400
    assert set(world().requests(7).user) - set(range(400)), "those who come later ask too"
    assert max(world().requests(4).user) < 400


def test_a_request_is_clicked_alike_in_any_order_and_company() -> None:
    requests, pages = many_requests(500), random_pages(500)
    together = world().clicks(requests, pages)
    assert (together > 0).sum() > 100
    order = np.random.default_rng(0).permutation(500)
    assert (world().clicks(requests.take(order), pages[order]) == together[order]).all()
    for place in (3, 77):
        alone = world().clicks(requests.take(np.array([place])), pages[[place]])
        assert (alone == together[[place]]).all()


def test_another_seed_clicks_otherwise() -> None:
    other = replace(world(), options=replace(world().options, seed=2))
    requests, pages = many_requests(500), random_pages(500)
    assert ((world().clicks(requests, pages) > 0) != (other.clicks(requests, pages) > 0)).sum() > 100


def test_the_click_rate_is_the_formula() -> None:
    requests, pages = many_requests(40_000), random_pages(40_000)
    chance, hit = world().chances(requests, pages).ravel(), world().clicks(requests, pages).ravel() > 0
    group = np.argsort(np.argsort(chance)) * 40 // len(chance)  # forty groups from unlikely to likely
    expected, variance = np.bincount(group, chance), np.bincount(group, chance * (1 - chance))
    square = ((np.bincount(group, hit) - expected) ** 2 / variance).sum()
    assert stats.chi2.sf(square, 40) > CERTAIN
    assert expected[-1] > 20 * expected[0]


def test_the_chance_of_a_click_is_by_hand() -> None:
    nature = replace(NATURES["default"], click_bias=-1.0)
    chance = w.click_chance(np.array([1.0, 1.0, -100.0]), np.array([1, 8, 1]), nature)
    assert chance == pytest.approx([0.01 + 0.99 * 0.5, (0.01 + 0.99 * 0.5) * 8**-0.3, 0.01])


def test_the_position_bias_is_recovered_from_clicks() -> None:
    # what stands where is drawn evenly, so places differ by their position alone
    requests, pages = many_requests(60_000, seed=3), random_pages(60_000, seed=3)
    rate = (world().clicks(requests, pages) > 0).mean(axis=0)
    slope, _, _, _, error = stats.linregress(np.log(np.arange(1, 9)), np.log(rate))
    assert slope == pytest.approx(-0.3, abs=4 * error)
    assert error < 0.02


def test_nothing_is_clicked_where_nothing_is() -> None:
    requests, pages = many_requests(200), random_pages(200)
    full = world().clicks(requests, pages)
    pages[:, 2] = NOTHING
    holes = world().clicks(requests, pages)
    assert not holes[:, 2].any()
    assert not world().chances(requests, pages)[:, 2].any()
    assert (np.delete(holes, 2, axis=1) == np.delete(full, 2, axis=1)).all(), "a hole moves nothing up"


def test_a_click_takes_two_seconds_and_more_for_each_position() -> None:
    requests, pages = many_requests(40_000), random_pages(40_000)
    delay = world().clicks(requests, pages)
    for place in (0, 7):
        waited = delay[delay[:, place] > 0, place] - 2_000 - 1_500 * (place + 1)
        assert waited.min() >= 0
        assert stats.kstest(waited, "expon", args=(0, 10_000)).pvalue > CERTAIN


def test_uniform_numbers_are_uniform_and_do_not_depend_on_each_other() -> None:
    number, item = np.arange(3_000)[:, None], np.arange(30)
    drawn = uniform(7, 1, number, item)
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > CERTAIN
    for other in (
        uniform(7, 2, number, item),
        uniform(8, 1, number, item),
        uniform(7, 1, number + 1, item),
        uniform(7, 1, number, item + 1),
    ):
        cells = np.histogram2d(drawn.ravel(), other.ravel(), bins=8, range=((0, 1), (0, 1)))[0]
        assert stats.chisquare(cells.ravel()).pvalue > CERTAIN
    assert (drawn[5] == uniform(7, 1, np.array([5]), item)).all()


def test_a_users_mood_lasts_three_hours_and_is_drawn_by_what_the_user_likes() -> None:
    truth = world().truth
    user = np.arange(400)[:, None]
    at = FIRST_DAY_MS + np.random.default_rng(0).integers(0, 7 * DAY_MS - 3 * HOUR_MS, (400, 200))
    now = truth.mood_at(user, at)
    share = np.diff(truth.mood_edges[:400], axis=1, prepend=0.0)
    same_by_chance = (share**2).sum(axis=1).mean()
    for minutes in (20, 60, 120, 180):
        same = (truth.mood_at(user, at + minutes * 60_000) == now).mean()
        assert same == pytest.approx(1 - minutes / 180 * (1 - same_by_chance), abs=0.01)
    seen = np.bincount(now.ravel(), minlength=len(NAMES)) / now.size
    assert seen == pytest.approx(share.mean(axis=0), abs=0.01)
    liked = truth.people.taste[:400] @ truth.centre.T
    assert share == pytest.approx(np.exp(0.5 * liked) / np.exp(0.5 * liked).sum(axis=1, keepdims=True))


def test_what_a_user_clicked_within_the_last_hour_tells_of_what_they_want_now() -> None:
    truth, user = world().truth, np.arange(400)
    ts_ms = np.full(400, FIRST_DAY_MS + DAY_MS + 13 * HOUR_MS)
    mood = truth.mood_at(user, ts_ms)
    item = np.arange(300)[None, :]
    in_mood = truth.catalogue.category[item] == mood[:, None]

    def surplus(hours: float) -> float:
        """What items of the mood's category have more at another time than on average, over those of others."""
        then = truth.utility(user[:, None], item, ts_ms[:, None] + int(hours * HOUR_MS), np.zeros((1, 1), np.int64))
        usual = truth.taste_at(user, ts_ms) @ truth.catalogue.vector[:300].T + truth.catalogue.quality[:300]
        return float((then - usual)[in_mood].mean() - (then - usual)[~in_mood].mean())

    assert surplus(0) > surplus(1) > surplus(2) > surplus(6) + 0.3
    assert surplus(0) > 1.2


def test_trends_come_and_go_within_four_hours_and_are_as_strong_at_any_time() -> None:
    truth = make_world(WorldOptions(users=1, items=100, days=400, seed=0)).truth
    category = np.arange(len(NAMES))[None, :]
    begin = FIRST_DAY_MS + 4 * HOUR_MS * np.arange(6 * 399)[:, None]
    at = {hours: truth.trend_at(category, begin + int(hours * HOUR_MS)) for hours in (0, 1, 2, 4)}
    for values in at.values():
        assert values.std() == pytest.approx(0.4, rel=0.03)
    for hours, correlation in ((1, np.cos(np.pi / 8)), (2, np.cos(np.pi / 4)), (4, 0.0)):
        assert np.corrcoef(at[0].ravel(), at[hours].ravel())[0, 1] == pytest.approx(correlation, abs=0.03)


def test_a_taste_keeps_its_length_and_turns_slowly() -> None:
    truth, user = world().truth, np.arange(400)
    begin, week = truth.taste_at(user, FIRST_DAY_MS), truth.taste_at(user, FIRST_DAY_MS + 7 * DAY_MS)
    for taste in (begin, week):
        assert np.linalg.norm(taste, axis=1) == pytest.approx(np.full(400, TASTE_NORM))
    assert (begin * week).sum(axis=1) / TASTE_NORM**2 == pytest.approx(np.full(400, np.cos(0.15)))
    assert np.abs((truth.people.turn * truth.people.taste).sum(axis=1)).max() < 1e-9


def test_freshness_is_halved_every_half_life() -> None:
    truth, item = world().truth, world().alive(2)
    now, later = (truth.freshness_at(item, FIRST_DAY_MS + day * DAY_MS) for day in (2, 4))
    assert later == pytest.approx(now / 2)
    new = truth.catalogue.birth_day[item] == 2
    assert new.any()
    assert now[new] == pytest.approx(np.full(new.sum(), 0.8))


def test_requests_are_of_the_day_in_order_and_rise_within_a_user() -> None:
    for day in (0, 6):
        requests = world().requests(day)
        assert len(requests) > 300
        assert ((requests.ts_ms - FIRST_DAY_MS) // DAY_MS == day).all()
        assert (np.diff(requests.ts_ms) >= 0).all()
        assert len(np.unique(np.stack([requests.user, requests.ts_ms]), axis=1).T) == len(requests)
        assert (world().truth.people.start_day[requests.user] <= day).all()
        assert (requests.hour == requests.ts_ms // HOUR_MS % 24).all()
    numbers = np.concatenate([world().requests(day).number for day in range(8)])
    assert len(np.unique(numbers)) == len(numbers)


def test_sessions_begin_by_the_hourly_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    single = replace(NATURES["default"], comes_back=0.0, requests_a_session=1.0, sessions_a_day=2.0)
    monkeypatch.setitem(natures.NATURES, "single", single)  # type: ignore[arg-type]
    requests = make_world(WorldOptions(users=20_000, items=100, days=1, seed=0, like="single")).requests(0)
    curve = np.array(single.volume_by_hour) / sum(single.volume_by_hour)
    seen = np.bincount(requests.hour, minlength=24)
    assert stats.chisquare(seen, curve * len(requests)).pvalue > CERTAIN
    assert len(requests) == pytest.approx(2.0 * 20_000, rel=0.03)


def test_a_session_is_followed_by_another_one_as_often_as_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    back = replace(NATURES["default"], comes_back=0.4, back_hours=0.5, requests_a_session=1.0, sessions_a_day=0.001)
    monkeypatch.setitem(natures.NATURES, "back", back)  # type: ignore[arg-type]
    # two sessions of a user by chance are rare
    requests = make_world(WorldOptions(users=400_000, items=100, days=1, seed=0, like="back")).requests(0)
    a_user = len(requests) / len(np.unique(requests.user))
    assert a_user == pytest.approx(1 / 0.6, rel=0.1)


def test_the_best_items_are_those_of_a_loop_over_all() -> None:
    requests = world().requests(2)
    user, ts_ms = requests.user[:30], requests.ts_ms[:30]
    clicked = (
        np.random.default_rng(0).random((len(world().truth.people.taste), len(world().truth.catalogue.quality))) < 0.3
    )
    found = world().top(user, ts_ms, 10, clicked)
    for row in range(30):
        scored = [
            (-float(world().truth.utility(user[row], np.array(item), ts_ms[row], np.array(0))), item)
            for item in world().alive(2).tolist()
            if not clicked[user[row], item]
        ]
        assert found[row].tolist() == [item for _, item in sorted(scored)[:10]]


def test_a_list_of_the_best_ends_where_there_are_no_more_items() -> None:
    clicked = np.ones((len(world().truth.people.taste), len(world().truth.catalogue.quality)), np.bool_)
    clicked[3, [8, 11]] = False
    ts_ms = np.array([FIRST_DAY_MS + 6 * DAY_MS])
    assert sorted(world().top(np.array([3]), ts_ms, 4, clicked)[0].tolist()) == [-1, -1, 8, 11]
    assert (world().top(np.array([3]), ts_ms, 400)[0] == NOTHING).sum() == 400 - len(world().alive(6))


def test_ids_and_rows_are_each_others_inverse() -> None:
    rows = np.array([0, 7, 299])
    assert (world().item_rows(world().item_ids(rows)) == rows).all()
    assert (world().user_rows(world().user_ids(rows)) == rows).all()
    assert world().item_rows(pa.array(["i000003", "other"])).tolist() == [3, NOTHING]


@pytest.mark.parametrize("like", list(NATURES))
def test_every_nature_makes_a_world(like: str) -> None:
    made = make_world(WorldOptions(users=200, items=150, days=3, seed=0, like=like))
    requests = made.requests(2)
    value = made.chances(requests, made.top(requests.user, requests.ts_ms, 8)).mean()
    assert 0.1 < value < 0.9
    assert sum(NATURES[like].volume_by_hour) > 0
    assert len(NATURES[like].volume_by_hour) == 24
    assert len(NATURES[like].scene_effect) == len(w.SCENES)


def test_what_a_world_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="day=8: this world was made for days 0 to 7, raise its horizon"):
        world().requests(8)
    with pytest.raises(ConfigError, match="day=-1"):
        world().alive(-1)
    with pytest.raises(ConfigError, match="horizon=2: this world takes a horizon of at least 5"):
        make_world(WorldOptions(users=10, items=100, days=5, seed=0), horizon=2)
    with pytest.raises(ConfigError, match="like='mars': a world is like one of default, kuairand, globo"):
        make_world(WorldOptions(users=10, items=100, days=5, seed=0, like="mars"))
