from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, HOUR_MS
from twotower.schema.errors import ConfigError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate
from twotower.worlds.visit import MINUTE_MS, VisitClicks, some, visit
from twotower.worlds.world import FIRST_DAY_MS, NOTHING, Requests, World, make_world

DAY = 3


@cache
def world() -> World:
    return make_world(WorldOptions(users=300, items=200, days=2, seed=1), horizon=DAY + 1)


def best(requests: Requests) -> np.ndarray:
    return world().top(requests.user, requests.ts_ms, 6)


def test_the_windows_in_which_requests_are_asked_change_nothing_of_what_is_clicked() -> None:
    asked: list[int] = []

    def answer(requests: Requests) -> np.ndarray:
        asked.append(len(requests))
        return best(requests)

    hourly, singly = visit(world(), DAY, answer, window_ms=HOUR_MS), visit(world(), DAY, best, window_ms=1)
    assert (hourly.requests.number == world().requests(DAY).number).all()
    assert sum(asked) == len(hourly.requests)
    assert len(asked) <= 24
    assert (hourly.pages == best(hourly.requests)).all()
    assert (hourly.delays == world().clicks(hourly.requests, hourly.pages)).all()
    assert (hourly.delays == singly.delays).all()
    assert hourly.impressions == hourly.pages.size


@pytest.mark.parametrize("window_ms", [1, MINUTE_MS, HOUR_MS])
def test_a_recommender_hears_of_every_click_once_and_never_early(window_ms: int) -> None:
    now_ms = 0
    heard: list[VisitClicks] = []

    def answer(requests: Requests) -> np.ndarray:
        nonlocal now_ms
        begin_ms = int(requests.ts_ms[0]) // window_ms * window_ms
        assert begin_ms > now_ms
        assert int(requests.ts_ms[-1]) < begin_ms + window_ms
        if heard:
            assert max(int(clicks.ts_ms[-1]) for clicks in heard) < begin_ms
        now_ms = int(requests.ts_ms[-1])
        return best(requests)

    visited = visit(world(), DAY, answer, heard.append, window_ms=window_ms)
    clicks = visited.clicks
    assert len(clicks) > 100
    assert (np.diff(clicks.ts_ms) >= 0).all()
    for name in ("request", "user", "item", "position", "ts_ms"):
        told = np.concatenate([getattr(one, name) for one in heard])
        assert (told == getattr(clicks, name)).all()
    # with windows of a millisecond everything before a request is known at it
    last_told = heard[0].ts_ms[-1]
    following = visited.requests.ts_ms[visited.requests.ts_ms > last_told][0]
    if window_ms == 1:
        assert not ((clicks.ts_ms > last_told) & (clicks.ts_ms < following)).any()


def test_some_requests_are_whole_sessions_of_users_drawn_evenly() -> None:
    requests = world().requests(DAY)
    few = some(requests, 40, seed=1)
    assert len(few) == 40
    assert (np.diff(few.ts_ms) >= 0).all()
    of_all = np.bincount(requests.user, minlength=400)
    of_few = np.bincount(few.user, minlength=400)
    asked = of_few > 0
    assert (of_few[asked] < of_all[asked]).sum() <= 1
    assert len(some(requests, 10**6, seed=1)) == len(requests)
    assert set(some(requests, 20, seed=1).number) <= set(few.number)
    assert set(some(requests, 20, seed=2).number) != set(some(requests, 20, seed=1).number)
    with pytest.raises(ConfigError, match="requests=0: a visit takes at least 1"):
        some(requests, 0, seed=1)


def test_events_of_a_visit_are_joined_events_as_a_simulation_has_them() -> None:
    def with_holes(requests: Requests) -> np.ndarray:
        pages = best(requests)
        pages[requests.number % 2 == 0, 4] = NOTHING
        return pages

    visited = visit(world(), DAY, with_holes, requests=50)
    events = visited.events(world(), first_seq=7)
    simulated = simulate(WorldOptions(users=300, items=200, days=2, seed=1)).events.drop_columns([c.SCORE, c.CHANNEL])
    assert events.schema == simulated.schema
    events.validate(full=True)
    even = int((visited.requests.number % 2 == 0).sum())
    assert events.num_rows == visited.impressions == 50 * 6 - even
    assert events[c.EVENT_SEQ].to_pylist() == list(range(7, 7 + events.num_rows))
    clicked = events.filter(pc.equal(events[c.OUTCOME], c.CLICKED))
    assert clicked.num_rows == len(visited.clicks) > 20
    assert clicked[c.CLICK_TS_MS].null_count == 0
    assert events[c.CLICK_TS_MS].null_count == events.num_rows - clicked.num_rows
    assert sorted(clicked[c.CLICK_TS_MS].to_pylist()) == visited.clicks.ts_ms.tolist()
    assert set(events[c.OUTCOME].to_pylist()) == {c.CLICKED, c.IMPRESSED}
    assert pc.sum(pc.equal(events[c.POSITION], 5)).as_py() == 50 - even
    assert (events[c.REQUEST_TS_MS].to_numpy() >= FIRST_DAY_MS + DAY * DAY_MS).all()


def test_a_day_without_requests_is_an_empty_visit() -> None:
    quiet = make_world(WorldOptions(users=1, items=100, days=1, seed=2))
    visited = visit(quiet, 0, lambda requests: np.zeros((len(requests), 3), np.int64), lambda clicks: None)
    assert (len(visited.requests), visited.impressions, len(visited.clicks)) == (0, 0, 0)
    assert visited.events(quiet).num_rows == 0
    assert isinstance(visited.events(quiet), pa.Table)
