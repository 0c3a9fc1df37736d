"""The state of a server's background threads, so that a probe sees one that fails or has ended."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from twotower.schema.errors import TwotowerError, cut

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""`/readyz` reports a thread after this many failures in a row."""
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


@dataclass
class _Worker:
    thread: threading.Thread | None = None
    failures: int = 0
    """In a row."""
    problem: str = ""
    """Of the latest failure."""


class Health:
    """The background threads of a server, by what they do."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._lock = threading.Lock()

    def repeat(self, name: str, work: Callable[[], object], every_s: float, stop: threading.Event) -> threading.Thread:
        """Start a thread that does some work every `every_s` seconds until `stop` is set.

        After an exception it tries again, with pauses that grow up to `every_s`, at least to five seconds. The first of
        several failures in a row is logged, and so is the recovery.
        """

        def run() -> None:
            while not stop.is_set():
                stop.wait(self.attempt(name, work, every_s, stop))

        thread = threading.Thread(target=run, name=name, daemon=True)
        self.watch(name, thread)
        thread.start()
        return thread

    def attempt(self, name: str, work: Callable[[], object], every_s: float, stop: threading.Event) -> float:
        """Do some work once, and note whether it went well; gives the seconds until the next attempt."""
        try:
            work()
        except Exception as error:  # the thread goes on in any case
            if stop.is_set():  # what it works with is being closed
                return 0.0
            return self._failed(name, error, every_s)
        with self._lock:
            worker = self._workers.setdefault(name, _Worker())
            recovered, worker.failures = worker.failures > 0, 0
        if recovered:
            log.warning("%s works again", name)
        return every_s

    def watch(self, name: str, thread: threading.Thread) -> None:
        """Report a thread once it has ended."""
        with self._lock:
            self._workers.setdefault(name, _Worker()).thread = thread

    def fails(self, name: str) -> bool:
        """The latest attempt has failed."""
        with self._lock:
            return name in self._workers and self._workers[name].failures > 0

    def problems(self) -> dict[str, str]:
        """A sentence for each thread that has ended, or failed several times in a row; by name."""
        problems = {}
        with self._lock:
            for name, worker in self._workers.items():
                if worker.thread is not None and worker.thread.ident is not None and not worker.thread.is_alive():
                    problems[name] = f"{name} has ended: restart the server"
                elif worker.failures >= MAX_FAILURES:
                    problems[name] = f"{name} has failed {worker.failures} times in a row: {worker.problem}"
        return problems

    def _failed(self, name: str, error: Exception, every_s: float) -> float:
        with self._lock:
            worker = self._workers.setdefault(name, _Worker())
            worker.failures, worker.problem = worker.failures + 1, cut(str(error) or repr(error), 500)
            failures = worker.failures
        if failures == 1:
            unexpected = not isinstance(error, TwotowerError)
            log.error("%s has failed, and tries again: %s", name, error, exc_info=unexpected)
        return float(min(_FIRST_PAUSE_S * 2 ** min(failures - 1, 20), max(every_s, _LONGEST_PAUSE_S)))
