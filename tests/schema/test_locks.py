import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from twotower.schema.errors import DataError
from twotower.schema.locks import locked, take_lock

HOLDER = """
import sys, time
from pathlib import Path
from twotower.schema.errors import DataError
from twotower.schema.locks import take_lock
lock = take_lock(Path(sys.argv[1]), DataError)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_holder_is_refused_with_the_process_of_the_first_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # being refused changes nothing
            with (
                pytest.raises(DataError, match=rf"^another process \({holder.pid}\) works here$"),
                locked(path, lambda words: DataError(f"{words} works here")),
            ):
                pass
        holder.kill()
        holder.wait()
        with locked(path, DataError):
            assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_is_held_once_in_a_process_too_and_any_thread_releases_it(tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "lock", DataError)
    with pytest.raises(DataError):
        take_lock(tmp_path / "lock", DataError)
    releasing = threading.Thread(target=lock.release)
    releasing.start()
    releasing.join()
    take_lock(tmp_path / "lock", DataError).release()


def test_who_waits_gets_the_lock_when_it_is_released(tmp_path: Path) -> None:
    lock, entered = take_lock(tmp_path / "lock", DataError), threading.Event()

    def wait() -> None:
        with locked(tmp_path / "lock", DataError, wait=True):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.2)
    lock.release()
    assert entered.wait(10)
    waiting.join()
