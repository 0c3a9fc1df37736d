"""Asking the channels of a request: one after the other, or side by side within a budget of time.

A call that is under way cannot be ended from outside. So a late one runs on alone, and until it has returned its
channel is left out of other requests: work that nobody waits for does not pile up.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final

from twotower.channels.retriever import Candidates, Queries, Retriever

log = logging.getLogger(__name__)

ERROR: Final = "error"
"""The channel failed."""
LATE: Final = "late"
"""It did not answer within the budget."""
BUSY: Final = "busy"
"""It was not asked: an earlier call is late, or it rests after being late again and again."""

_LONGEST_REST: Final = 64
"""In budgets."""
_IDLE_S: Final = 30.0
"""A thread without work for so long ends."""


@dataclass(frozen=True)
class Brought:
    """What the channels of one request answered."""

    lists: dict[str, Candidates] = field(default_factory=dict)
    """By channel, in the order asked."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a channel is not among them: `error`, `late` or `busy`."""


Ask = Callable[[Mapping[str, Retriever], Queries, int, str], Brought]
"""Asks channels by name for k candidates of the users; the last is the version that they are of."""


def ask_in_turn(channels: Mapping[str, Retriever], queries: Queries, k: int, of: str = "") -> Brought:  # noqa: ARG001
    """Ask one channel after the other, however long each takes; one that fails is left out."""
    brought = Brought()
    for name, channel in channels.items():
        try:
            brought.lists[name] = channel.retrieve(queries, k)
        except Exception:  # one channel's defect must not take the others down with it
            log.exception("channel %s failed", name)
            brought.left_out[name] = ERROR
    return brought


class SideBySide:
    """Asks the channels of a request at once, each in a thread of its own, and waits for them within a budget.

    A channel that was late is busy until its call has returned. The second time in a row it rests for one more budget,
    then for two, four and so on; an answer in time ends that. A single channel is asked in the caller's thread and
    waited for: there is nothing to answer with instead.

    A delta makes new channels, four times a second. They go on with the threads of those before them, and wait for what
    is late of them; only those of another version have threads of their own.

    Args:
        budget_s: how long a request waits for its channels.
        note: called with channel and reason whenever one is left out.
        clock_s: seconds that rise.
    """

    def __init__(
        self,
        budget_s: float,
        note: Callable[[str, str], None] = lambda *_: None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_s = budget_s
        self._note = note
        self._clock_s = clock_s
        self._lanes: dict[str, _Lane] = {}
        self._lanes_lock = threading.Lock()

    def ask(self, channels: Mapping[str, Retriever], queries: Queries, k: int, of: str = "") -> Brought:
        """Candidates of the channels that answered in time, and why the others are missing; it is an `Ask`."""
        brought = ask_in_turn(channels, queries, k) if len(channels) == 1 else self._within(channels, queries, k, of)
        for name, reason in brought.left_out.items():
            self._note(name, reason)
        return brought

    def _within(self, channels: Mapping[str, Retriever], queries: Queries, k: int, of: str) -> Brought:
        gathered = _Gathered(len(channels))
        calls = {name: _Call(channel, queries, k, gathered) for name, channel in channels.items()}
        lanes = {name: self._lane(name, of) for name in channels}
        asked = {name: lanes[name].begin(call) for name, call in calls.items()}
        gathered.wait(self._budget_s)
        brought = Brought()
        for name, call in calls.items():
            if not asked[name]:
                brought.left_out[name] = BUSY
            elif lanes[name].give_up(call):
                log.warning("channel %s gave no answer within %g ms", name, 1000 * self._budget_s)
                brought.left_out[name] = LATE
            elif call.answer is None:
                brought.left_out[name] = ERROR
            else:
                brought.lists[name] = call.answer
        return brought

    def _lane(self, name: str, of: str) -> "_Lane":
        """The threads of a channel; another version's channel of that name has its own."""
        lane = self._lanes.get(name)
        if lane is None or lane.of != of:
            with self._lanes_lock:
                lane = self._lanes.get(name)
                if lane is None or lane.of != of:
                    lane = self._lanes[name] = _Lane(name, of, self._budget_s, self._clock_s)
        return lane


class _Gathered:
    """Lets a request wait until all its calls have ended; it is woken once."""

    def __init__(self, calls: int) -> None:
        self._left = calls
        self._counting = threading.Lock()
        self._all = threading.Lock()
        self._all.acquire()

    def one_more(self) -> None:
        with self._counting:
            self._left -= 1
            if not self._left:
                self._all.release()

    def wait(self, seconds: float) -> None:
        self._all.acquire(timeout=seconds)


@dataclass
class _Call:
    """One channel asked for one request."""

    channel: Retriever
    queries: Queries
    k: int
    gathered: _Gathered
    answer: Candidates | None = None
    ended: bool = False
    given_up: bool = False


class _Lane:
    """The calls of a version's channel and the threads that they run in: as many as there are calls at once."""

    def __init__(self, name: str, of: str, budget_s: float, clock_s: Callable[[], float]) -> None:
        self.of = of
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
        self._rests_until_s = clock_s()

    def begin(self, call: _Call) -> bool:
        """Start a call, unless the channel is busy with a late one or rests."""
        with self._lock:
            free = not self._late and self._clock_s() >= self._rests_until_s
            if free:
                self._running += 1
                if self._running > self._threads:
                    self._threads += 1
                    threading.Thread(target=self._work, name=f"channel {self._name}", daemon=True).start()
        if free:
            self._waiting.put(call)
        else:
            call.gathered.one_more()
        return free

    def give_up(self, call: _Call) -> bool:
        """Wait no longer for a call; False where it has ended."""
        with self._lock:
            if call.ended:
                return False
            call.given_up = True
            self._late_in_a_row += not self._late  # several requests that wait for the same hitch are one time
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
            try:
                call.answer = call.channel.retrieve(call.queries, call.k)
            except Exception:  # one channel's defect must not take the others down with it
                log.exception("channel %s failed", self._name)
            finally:
                self._end(call)
                del call  # with its channel, which a delta may have replaced

    def _end(self, call: _Call) -> None:
        with self._lock:
            call.ended = True
            self._running -= 1
            if call.given_up:
                self._late -= 1
                rest = min(2 ** (self._late_in_a_row - 2), _LONGEST_REST) if self._late_in_a_row > 1 else 0
                self._rests_until_s = self._clock_s() + rest * self._budget_s
            elif not self._late:
                self._late_in_a_row = 0
        call.gathered.one_more()
