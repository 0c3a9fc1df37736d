import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from twotower.channels.retriever import Candidates, Queries
from twotower.config import Settings
from twotower.features.columns import Bag
from twotower.index.protocol import Exclusions
from twotower.serve.channels import BUSY, ERROR, LATE, SideBySide, ask_in_turn

NOBODY = Queries({}, Bag(np.array([0, 0]), np.zeros(0, np.int32)), Exclusions.of([[]]))
LONG_S = 20.0
"""A budget that no test exhausts."""
SHORT_S = 0.05


class Channel:
    """Answers with one item; waits for its gate, and fails when told to."""

    def __init__(self, name: str, row: int = 0) -> None:
        self.name = name
        self.row = row
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.begun = 0
        self.returned = 0
        self.threads: set[int] = set()

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        self.begun += 1
        self.threads.add(threading.get_ident())
        self.gate.wait(30)
        self.returned += 1
        if self.fails:
            raise ZeroDivisionError
        return Candidates(np.full((1, k), self.row), np.ones((1, k), np.float32))


class Asking:
    """Channels that are asked together, and what was noted."""

    def __init__(self, budget_s: float = LONG_S, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.fast, self.slow = Channel("fast", 1), Channel("slow", 2)
        self.noted: list[tuple[str, str]] = []
        self.side_by_side = SideBySide(budget_s, lambda name, reason: self.noted.append((name, reason)), clock_s)

    def ask(self, *channels: Channel) -> dict[str, str]:
        """Reasons by channel, `ok` for those that answered."""
        asked = {channel.name: channel for channel in channels or (self.fast, self.slow)}
        brought = self.side_by_side.ask(asked, NOBODY, 3)
        for name, lists in brought.lists.items():
            assert lists.rows.tolist() == [[asked[name].row] * 3]
        assert not brought.lists.keys() & brought.left_out.keys()
        return {name: brought.left_out.get(name, "ok") for name in asked}

    def when_returned(self, calls: int) -> None:
        """Wait until the slow channel has returned so often, and its thread has said so."""
        until = time.monotonic() + 10
        while self.slow.returned < calls or self.side_by_side._lanes["slow"]._late:
            assert time.monotonic() < until
            time.sleep(0.001)


@pytest.fixture
def short() -> Iterator[Asking]:
    """With a budget that a channel which waits exhausts."""
    asking = Asking(SHORT_S)
    yield asking
    asking.slow.gate.set()


def test_every_channel_is_asked_and_they_stand_in_the_order_asked() -> None:
    asking = Asking()
    brought = asking.side_by_side.ask({"slow": asking.slow, "fast": asking.fast}, NOBODY, 2)
    assert list(brought.lists) == ["slow", "fast"]
    assert (brought.left_out, asking.noted) == ({}, [])
    assert list(ask_in_turn({"slow": asking.slow, "fast": asking.fast}, NOBODY, 2).lists) == ["slow", "fast"]


def test_channels_run_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)

    class Meeting(Channel):
        def retrieve(self, queries: Queries, k: int) -> Candidates:
            together.wait()  # nobody passes before all are here
            return super().retrieve(queries, k)

    asking = Asking()
    assert set(asking.ask(Meeting("a"), Meeting("b"), Meeting("c")).values()) == {"ok"}


def test_one_channel_is_asked_in_the_callers_thread_without_a_budget(short: Asking) -> None:
    short.slow.gate.clear()
    threading.Timer(4 * SHORT_S, short.slow.gate.set).start()
    assert short.ask(short.slow) == {"slow": "ok"}
    assert short.slow.threads == {threading.get_ident()}


def test_a_failing_channel_is_left_out_and_asked_again() -> None:
    asking = Asking()
    asking.slow.fails = True
    assert [asking.ask() for _ in range(2)] == [{"fast": "ok", "slow": ERROR}] * 2
    assert asking.ask(asking.slow) == {"slow": ERROR}
    asking.slow.fails = False
    assert asking.ask() == {"fast": "ok", "slow": "ok"}
    assert asking.noted == [("slow", ERROR)] * 3


def test_a_late_channel_is_left_out_busy_until_it_returns_and_then_back(short: Asking) -> None:
    short.slow.gate.clear()
    started = time.monotonic()
    assert short.ask() == {"fast": "ok", "slow": LATE}
    assert SHORT_S <= time.monotonic() - started < 10
    assert [short.ask() for _ in range(50)] == [{"fast": "ok", "slow": BUSY}] * 50
    assert (short.slow.begun, short.fast.begun) == (1, 51)
    short.slow.gate.set()
    short.when_returned(1)
    assert short.ask() == {"fast": "ok", "slow": "ok"}
    assert short.noted == [("slow", LATE)] + [("slow", BUSY)] * 50


def test_a_late_answer_is_never_taken_for_that_of_another_request(short: Asking) -> None:
    short.slow.gate.clear()
    short.ask()
    short.slow.row = 7
    short.slow.gate.set()
    short.when_returned(1)
    assert short.ask() == {"fast": "ok", "slow": "ok"}  # `ask` compares the row


def test_a_late_call_that_fails_in_the_end_frees_its_channel(short: Asking) -> None:
    short.slow.gate.clear()
    short.slow.fails = True
    assert short.ask()["slow"] == LATE
    short.slow.fails, short.slow.row = True, 2
    short.slow.gate.set()
    short.when_returned(1)
    short.slow.fails = False
    assert short.ask()["slow"] == "ok"


def test_all_channels_late_leaves_nothing(short: Asking) -> None:
    short.slow.gate.clear()
    other = Channel("other")
    other.gate = short.slow.gate
    assert short.ask(short.slow, other) == {"slow": LATE, "other": LATE}
    assert short.ask(short.slow, other) == {"slow": BUSY, "other": BUSY}


def test_a_channel_that_is_late_again_and_again_rests_longer_each_time() -> None:
    now = [0.0]
    asking = Asking(SHORT_S, lambda: now[0])

    def late() -> None:
        asking.slow.gate.clear()
        assert asking.ask()["slow"] == LATE
        asking.slow.gate.set()
        asking.when_returned(asking.slow.begun)

    for rest in [0, 1, 2, 4, 8, 16, 32, 64, 64]:
        late()
        if rest:
            now[0] += (rest - 0.1) * SHORT_S
            assert asking.ask()["slow"] == BUSY
            now[0] += 0.2 * SHORT_S
    assert asking.ask()["slow"] == "ok"
    late()
    assert asking.ask()["slow"] == "ok"


def test_late_calls_do_not_pile_up_under_many_requests(short: Asking) -> None:
    short.slow.gate.clear()
    before = threading.active_count()
    requests = [threading.Thread(target=lambda: [short.ask() for _ in range(20)]) for _ in range(8)]
    for request in requests:
        request.start()
    for request in requests:
        request.join(20)
    assert short.slow.begun <= 8  # those that came before the first was late
    assert threading.active_count() - before <= 16
    short.slow.gate.set()


def test_the_channel_of_another_version_does_not_wait_for_that_of_the_old(short: Asking) -> None:
    short.slow.gate.clear()
    assert short.ask()["slow"] == LATE
    asked = {"fast": short.fast, "slow": Channel("slow", 5)}
    assert short.side_by_side.ask(asked, NOBODY, 3, "another").left_out == {}


def test_channels_that_a_delta_made_take_the_threads_of_those_before(short: Asking) -> None:
    before = threading.active_count()
    made = []
    for _ in range(50):
        fast, slow = Channel("fast"), Channel("slow")
        assert short.side_by_side.ask({"fast": fast, "slow": slow}, NOBODY, 3, "version").left_out == {}
        made += [weakref.ref(fast), weakref.ref(slow)]
    assert threading.active_count() - before <= 4
    del fast, slow
    until = time.monotonic() + 10
    while any(one() is not None for one in made):  # nothing holds on to them, nor to their vectors
        assert time.monotonic() < until
        gc.collect()


def test_channels_that_a_delta_made_wait_for_what_is_late_of_those_before(short: Asking) -> None:
    short.slow.gate.clear()
    assert short.ask()["slow"] == LATE
    assert short.ask(short.fast, Channel("slow", 5)) == {"fast": "ok", "slow": BUSY}


def test_threads_without_work_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.serve.channels._IDLE_S", 0.02)
    asking = Asking()
    for _ in range(3):
        assert asking.ask() == {"fast": "ok", "slow": "ok"}
        until = time.monotonic() + 10
        while asking.side_by_side._lanes["slow"]._threads:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def slow_server(start, world: Settings, monkeypatch: pytest.MonkeyPatch):
    """A server two of whose channels wait for a gate."""
    server = start(world, channel_timeout_ms=1000 * SHORT_S)
    server.gate = threading.Event()
    for name in ("two_tower", "item_cf"):
        channel = server.version.channels[name]

        def waiting(queries: Queries, k: int, answer=channel.retrieve) -> Candidates:
            server.gate.wait(30)
            return answer(queries, k)

        monkeypatch.setattr(channel, "retrieve", waiting)
    yield server
    server.gate.set()


def test_a_server_answers_without_a_slow_channel_says_so_and_counts_it(slow_server) -> None:
    body = {"user_id": slow_server.version.users.ids[0].as_py(), "k": 5, "channels": ["item_cf", "popular"]}
    answers = [slow_server.retrieve(**body) for _ in range(3)]
    assert [answer["failed_channels"] for answer in answers] == [["item_cf"]] * 3
    assert all(len(answer["items"]) == 5 for answer in answers)
    assert slow_server.metric('twotower_failed_channels_total{channel="item_cf",reason="late"}') == 1
    assert slow_server.metric('twotower_failed_channels_total{channel="item_cf",reason="busy"}') == 2
    slow_server.gate.set()
    until = time.monotonic() + 10
    while slow_server.retrieve(**body)["failed_channels"]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_server_whose_channels_are_all_slow_says_so(slow_server) -> None:
    body = {"user_id": slow_server.version.users.ids[0].as_py(), "channels": ["two_tower", "item_cf"]}
    for reason in (LATE, BUSY):
        response = slow_server.http.post("/v1/retrieve", json=body)
        expected = {"error": f"every channel failed: two_tower ({reason}), item_cf ({reason})"}
        assert (response.status_code, response.json()) == (503, expected)


def test_a_channel_whose_database_is_away_is_left_out_at_once_and_asked_again_when_it_is_back() -> None:
    asking, away = Asking(), {"slow": "PostgreSQL does not answer"}
    noted = asking.noted
    side_by_side = SideBySide(LONG_S, lambda name, reason: noted.append((name, reason)), away=lambda: away)
    channels = {"fast": asking.fast, "slow": asking.slow}
    asking.slow.gate.clear()
    answers = side_by_side.ask(channels, NOBODY, 3)
    assert (list(answers.lists), answers.left_out, asking.slow.begun) == (["fast"], {"slow": "unavailable"}, 0)
    alone = side_by_side.ask({"slow": asking.slow}, NOBODY, 3)
    assert (alone.lists, alone.left_out) == ({}, {"slow": "unavailable"})
    assert noted == [("slow", "unavailable")] * 2
    asking.slow.gate.set()
    away.clear()
    assert list(side_by_side.ask(channels, NOBODY, 3).lists) == ["fast", "slow"]
