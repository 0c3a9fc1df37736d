import logging
import threading

import pytest

from twotower.features.store import LmdbFeatureStore
from twotower.logs import LocalEventLog
from twotower.logs.events import item_event
from twotower.schema.errors import DataError
from twotower.serve.health import Health
from twotower.serve.run import READER, read_log
from twotower.serve.users import RecentUsers

NAME = "the follower"


def test_a_thread_survives_what_its_work_raises_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    health, stop, done = Health(), threading.Event(), threading.Event()
    attempts = iter(range(100))

    def work() -> None:
        if next(attempts) < 4:
            raise ZeroDivisionError("nobody foresaw it")
        done.set()

    with caplog.at_level(logging.WARNING):
        thread = health.repeat(NAME, work, 0.001, stop)
        assert done.wait(20)
        stop.set()
        thread.join()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the follower has failed, and tries again: nobody foresaw it", "the follower works again"]
    assert caplog.records[0].exc_info


def test_pauses_grow_and_three_failures_in_a_row_are_a_problem() -> None:
    health, stop = Health(), threading.Event()

    def broken() -> None:
        raise DataError("damaged")

    pauses = [health.attempt(NAME, broken, 0.2, stop) for _ in range(2)]
    assert health.problems() == {}
    pauses += [health.attempt(NAME, broken, 0.2, stop) for _ in range(10)]
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert pauses[-1] == 5.0
    assert health.problems() == {NAME: "the follower has failed 12 times in a row: damaged"}
    assert health.attempt(NAME, lambda: None, 0.2, stop) == 0.2
    assert health.problems() == {}


def test_a_thread_that_has_ended_is_a_problem() -> None:
    health = Health()
    thread = threading.Thread(target=lambda: None)
    health.watch("the admin port", thread)
    assert health.problems() == {}
    thread.start()
    thread.join()
    assert health.problems() == {"the admin port": "the admin port has ended: restart the server"}


def test_a_log_that_was_emptied_is_not_read_on_from_the_middle_of_what_comes_next(tmp_path) -> None:
    def event(name: str):
        return item_event(name, 1_700_000_000_000, 1, {}, None)

    first = LocalEventLog.open(tmp_path / "first", sync="never")
    first.append([event("a"), event("b")])
    store = LmdbFeatureStore(tmp_path / "store")
    users, health, stop = RecentUsers(first, store), Health(), threading.Event()
    users.catch_up()
    emptied = LocalEventLog.open(tmp_path / "second", sync="never")
    users._log = emptied
    health.attempt(READER, lambda: read_log(users, health), 0.2, stop)
    assert health.fails(READER)
    emptied.append([event(name) for name in ("c", "d", "e", "f")])  # as far as the old one, and further
    for _ in range(3):
        health.attempt(READER, lambda: read_log(users, health), 0.2, stop)
    assert "restart the server" in health.problems()[READER]
    users._log = first
    first.append([event("g")])
    health.attempt(READER, lambda: read_log(users, health), 0.2, stop)
    assert health.problems() == {}
    for one in (first, emptied, store):
        one.close()
