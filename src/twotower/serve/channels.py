"""Asking the channels of a request: one after the other, or side by side within a budget of time.

A running call cannot be ended from outside. So a late call runs on alone, and until it has returned its channel is left
out of other requests: work that nobody waits for does not pile up.
"""

import logging
import threading
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final

from twotower.channels.retriever import Candidates, Queries, Retriever
from twotower.schema.errors import UnavailableError

log = logging.getLogger(__name__)

ERROR: Final = "error"
"""The channel failed."""
LATE: Final = "late"
"""The channel did not answer within the budget."""
BUSY: Final = "busy"
"""The channel was not asked: an earlier call is late, or it pauses after being late several times."""

_LONGEST_PAUSE: Final = 64
"""In budgets."""
_IDLE_S: Final = 30.0
"""A thread ends after this time without work."""


AWAY: Final = "unavailable"
"""It was not asked: its vector database is known not to answer."""


@dataclass(frozen=True)
class Answers:
    """What the channels of one request answered."""

    lists: dict[str, Candidates] = field(default_factory=dict)
    """By channel, in the order asked."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a channel is not among them: `error`, `late` or `busy`."""


Ask = Callable[[Mapping[str, Retriever], Queries, int, str], Answers]
"""Asks channels by name for k candidates of the users. The last argument is the version the channels belong to."""


def ask_in_turn(channels: Mapping[str, Retriever], queries: Queries, k: int, version: str = "") -> Answers:  # noqa: ARG001
    """Ask one channel after the other, however long each takes; one that fails is left out."""
    answers = Answers()
    for name, channel in channels.items():
        try:
            answers.lists[name] = channel.retrieve(queries, k)
        except Exception as error:  # the other channels answer in any case
            _tell(name, error)
            answers.left_out[name] = ERROR
    return answers


def _tell(channel: str, error: Exception) -> None:
    """Log a failed channel; not that a database does not answer, which a watch tells once, not for every request."""
    if not isinstance(error, UnavailableError):
        log.error("channel %s failed", channel, exc_info=error)


class SideBySide:
    """Asks the channels of a request at once, each in a thread of its own, and waits for them within a budget.

    A channel that was late is busy until its call has returned. The second time in a row it pauses for one more budget,
    then for two, four and so on; an answer in time ends that. A single channel is asked in the caller's thread, without
    a limit: there is nothing to answer with instead.

    A delta makes new channels, up to five times a second. They use the threads of those that they replace, and wait for
    late calls of them; only the channels of another version have threads of their own.

    Args:
        budget_s: how long a request waits for its channels.
        note: called with channel and reason whenever one is left out.
        clock_s: a monotonic clock, in seconds.
        away: the channels that cannot be searched now. They are left out at once, so that no request waits for them.
    """

    def __init__(
        self,
        budget_s: float,
        note: Callable[[str, str], None] = lambda *_: None,
        clock_s: Callable[[], float] = time.monotonic,
        away: Callable[[], Container[str]] = lambda: (),
    ) -> None:
        self._away = away
        self._budget_s = budget_s
        self._note = note
        self._clock_s = clock_s
        self._lanes: dict[str, _Lane] = {}
        self._lanes_lock = threading.Lock()

    def ask(self, channels: Mapping[str, Retriever], queries: Queries, k: int, version: str = "") -> Answers:
        """Candidates of the channels that answered in time, and why the others are missing; it is an `Ask`."""
        away = self._away()
        there = {name: channel for name, channel in channels.items() if name not in away}
        alone = len(there) == 1
        answers = ask_in_turn(there, queries, k) if alone else self._within(there, queries, k, version)
        answers.left_out.update({name: AWAY for name in channels if name not in there})
        for name, reason in answers.left_out.items():
            self._note(name, reason)
        return answers

    def _within(self, channels: Mapping[str, Retriever], queries: Queries, k: int, version: str) -> Answers:
        lanes = {name: self._lane(name, version) for name in channels}
        calls = {name: _Call(channel, queries, k) for name, channel in channels.items()}
        begun = {name: call for name, call in calls.items() if lanes[name].begin(call)}
        wait([call.answer for call in begun.values()], self._budget_s)
        answers = Answers()
        for name, call in calls.items():
            if name not in begun:
                answers.left_out[name] = BUSY
            elif lanes[name].give_up(call):
                log.warning("channel %s gave no answer within %g ms", name, 1000 * self._budget_s)
                answers.left_out[name] = LATE
            elif (answer := call.answer.result()) is None:
                answers.left_out[name] = ERROR
            else:
                answers.lists[name] = answer
        return answers

    def _lane(self, name: str, version: str) -> "_Lane":
        """The threads of a channel of a version."""
        lane = self._lanes.get(name)
        if lane is None or lane.version != version:
            with self._lanes_lock:
                lane = self._lanes.get(name)
                if lane is None or lane.version != version:
                    lane = self._lanes[name] = _Lane(name, version, self._budget_s, self._clock_s)
        return lane


@dataclass
class _Call:
    """One channel asked for one request."""

    channel: Retriever
    queries: Queries
    k: int
    answer: "Future[Candidates | None]" = field(default_factory=Future)
    """None where the channel failed."""
    given_up: bool = False


class _Lane:
    """The calls of a version's channel and the threads that they run in: as many as there are calls at once."""

    def __init__(self, name: str, version: str, budget_s: float, clock_s: Callable[[], float]) -> None:
        self.version = version
        self._name = name
        self._budget_s = budget_s
        self._clock_s = clock_s
        self._waiting: SimpleQueue[_Call] = SimpleQueue()
        self._lock = threading.Lock()  # over everything below
        self._threads = 0
        self._running = 0
        self._late = 0
        """Calls that were given up and have not returned."""
        self._late_in_a_row = 0
        self._pauses_until_s = clock_s()

    def begin(self, call: _Call) -> bool:
        """Start a call, unless the channel is busy with a late one or pauses."""
        with self._lock:
            if self._late or self._clock_s() < self._pauses_until_s:
                return False
            self._running += 1
            if self._running > self._threads:
                self._threads += 1
                threading.Thread(target=self._work, name=f"channel {self._name}", daemon=True).start()
        self._waiting.put(call)
        return True

    def give_up(self, call: _Call) -> bool:
        """Wait no longer for a call; False where it has ended."""
        with self._lock:
            if call.answer.done():
                return False
            call.given_up = True
            self._late_in_a_row += not self._late  # several requests that wait at the same time count once
            self._late += 1
            return True

    def _work(self) -> None:
        while True:
            try:
                call = self._waiting.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if self._running < self._threads:
                        self._threads -= 1
                        return
                continue
            answer = None
            try:
                answer = call.channel.retrieve(call.queries, call.k)
            except Exception as error:  # the other channels answer in any case
                _tell(self._name, error)
            self._end(call, answer)
            del call, answer  # with the channel, which a delta may have replaced

    def _end(self, call: _Call, answer: Candidates | None) -> None:
        with self._lock:
            self._running -= 1
            if call.given_up:
                self._late -= 1
                pause = min(2 ** (self._late_in_a_row - 2), _LONGEST_PAUSE) if self._late_in_a_row > 1 else 0
                self._pauses_until_s = self._clock_s() + pause * self._budget_s
            elif not self._late:
                self._late_in_a_row = 0
            call.answer.set_result(answer)
