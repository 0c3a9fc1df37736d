"""Work in processes that may be killed at any moment: forks of this one.

A fork starts in milliseconds, where a new interpreter takes seconds to import PyTorch. It can hang, though, when its
parent has used several threads. So the parent imports everything and runs everything in forks, also what nobody kills.
Import this module before NumPy and PyTorch: it gives each process one thread.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

Work = Callable[[], object]

IMPORTED_LATE = (
    "ibis.backends.duckdb",
    "onnxscript.function_libs.torch_lib.ops",
    "torch._dynamo",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
)
STEPS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})
"""What Python tells an audit hook before it happens: that a process writes, flushes, renames, removes or makes."""
COMMITS = frozenset({"os.rename"})


@dataclass(frozen=True)
class Ran:
    """How long a process took that nobody disturbed."""

    seconds: float
    steps: int
    """Files and folders below its workspace that it wrote, flushed, renamed, removed or made."""
    commits: int
    """Renames among them."""


def import_late_modules() -> None:
    """Import what training and publishing import when they first run, so that no fork has to."""
    for name in IMPORTED_LATE:
        importlib.import_module(name)


def start(work: Work) -> int:
    """A fork that does some work and ends; its process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # a fork must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(pid: int, seconds: float | None = None) -> bool:
    """Wait for a fork to end by itself, for this many seconds at most, then kill it; gives whether it ended by itself.

    Raises:
        AssertionError: it failed.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, 0 if until is None else os.WNOHANG)
        if done:
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            assert killed or status == 0, "a process failed: see its error above"
            return not killed
        if until is not None and time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            until = None
        time.sleep(0.001)


def run(work: Work) -> None:
    """Do some work in a fork that nobody disturbs."""
    assert wait(start(work)), "somebody else killed a process"


def measured(work: Work, below: Path) -> Ran:
    """The same; how long it took, and how many steps it took below a folder."""
    reading, writing = os.pipe()

    def watched() -> None:
        steps = {STEPS: 0, COMMITS: 0}
        for kinds in steps:
            _watch(below, kinds, partial(steps.__setitem__, kinds))
        began = time.monotonic()
        work()
        os.write(writing, json.dumps([time.monotonic() - began, *steps.values()]).encode())

    run(watched)
    ran = Ran(*json.loads(os.read(reading, 1000)))
    os.close(reading)
    os.close(writing)
    return ran


def disturbed(work: Work, below: Path, draw: random.Random, usual: Ran, reach: float) -> bool:
    """Do some work in a fork and kill it at random: by the clock, before a step or before a commit; gives whether it
    ended before.

    Args:
        work: to do.
        below: the folder whose steps count.
        draw: of the moment.
        usual: how long the work takes undisturbed.
        reach: share of that within which it is killed.
    """
    if not (way := draw.randrange(3)):
        return wait(start(work), draw.uniform(0, reach * usual.seconds))
    kinds, most = (STEPS, usual.steps) if way == 1 else (COMMITS, usual.commits)
    last = draw.randint(1, max(1, round(reach * most)))

    def watched() -> None:
        _watch(below, kinds, lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == last else None)
        work()

    return wait(start(watched))


def _watch(below: Path, kinds: frozenset[str], at_step: Callable[[int], None]) -> None:
    """Call back right before this process takes a step below a folder, with the number of the step from 1."""
    prefix, steps = str(below), 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if name not in kinds or not str(arguments[0]).startswith(prefix):
            return
        if name == "open" and arguments[1] is not None and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return  # it only reads; files are flushed through `os.open`, which has no mode
        steps += 1
        at_step(steps)

    sys.addaudithook(hook)
