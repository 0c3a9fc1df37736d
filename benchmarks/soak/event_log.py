"""Kill the writer of a local event log again and again, and check after each kill that the log kept its promise.

    python benchmarks/soak/event_log.py --kills 500 --seed 0

A process appends from several threads and notes each acknowledgement in a file; it is killed (SIGKILL) at a
random moment, sometimes while it still opens the log, and often half a frame or zeros are put behind what it wrote.
After each kill the log opens again and holds

- every acknowledged event of all runs exactly once, at the acknowledged offset,
- of what each user of each run was sent, a prefix in order: nothing is missing in between,
- the same to a reader that followed it in steps while they wrote.

Meanwhile a thread of the process erases a user of each earlier run: their events may be erased or not after a kill, and
nothing else may. In the end they are erased once more, and no file of the log names these users.

Each process first sends the beginning of the run before it again, as clients do that got no answer. The write-ahead log
is short, so that kills meet the copying of it into the database too. Another log begins after every 50 kills: all of it
is read after each kill. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from functools import partial
from pathlib import Path

import forks

from twotower.logs import Event, LocalEventLog, Record, local, partition_of
from twotower.logs.events import ERASED
from twotower.logs.payload import mark_of

PARTITIONS = 2
CHECKPOINT_PAGES = 20
THREADS = 3
USERS = 2
RETRIED = 40
LONGEST_S = 0.15
KILLS_A_LOG = 50
MOST_STEPS = 2000


def open_log(folder: Path) -> LocalEventLog:
    local.CHECKPOINT_PAGES = CHECKPOINT_PAGES
    return LocalEventLog.open(folder, partitions=PARTITIONS, sync="always")


def sent(run: int, thread: int, step: int) -> Event:
    """The event of a step: users take turns, so the steps of a user are `USERS` apart."""
    user = f"{run}-{thread}-{step % USERS}"
    body = {"step": step, "text": "x" * (step * 37 % 300)}
    return Event(f"{run}-{thread}-{step}", "click", user, 1_700_000_000_000 + step, body=body)


def erase(log: LocalEventLog, runs: int) -> int:
    """Erase the first user of each earlier run; gives the number of events."""
    users = [f"{run}-0-0" for run in range(runs)]
    ends = log.ends()
    return sum(
        log.erase(partition, {user: ends[partition] for user in users if partition_of(user, PARTITIONS) == partition})
        for partition in range(PARTITIONS)
    )


def write_on(folder: Path, run: int, acknowledged: Path) -> None:
    """Append until killed; a line in a file for each acknowledgement: run, thread, step, partition, offset."""
    answers = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = open_log(folder)

    def append(of_run: int, thread: int, steps: range) -> None:
        acks = log.append([sent(of_run, thread, step) for step in steps])
        lines = (
            f"{of_run} {thread} {step} {ack.partition} {ack.offset}\n" for step, ack in zip(steps, acks, strict=True)
        )
        os.write(answers, "".join(lines).encode())

    def work(thread: int) -> None:
        if run:
            append(run - 1, thread, range(RETRIED))
        step = 0
        while True:
            size = 1 + (step * 7 + thread) % 5
            append(run, thread, range(step, step + size))
            step += size

    def forget() -> None:
        while True:
            erase(log, run)
            time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    threads.append(threading.Thread(target=forget))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def read_on(log: LocalEventLog, found: list[list[Record]]) -> None:
    """Read each partition from where `found` ends."""
    for partition, records in enumerate(found):
        while more := log.read(partition, records[-1].next_offset if records else 0, 500):
            records.extend(more)


def names_of(runs: int) -> dict[str, str]:
    """The event ids of users that are erased, by what stays of their events."""
    events = (sent(run, 0, step) for run in range(runs) for step in range(0, MOST_STEPS, USERS))
    return {mark_of(event): event.event_id for event in events}


def places_of(found: list[list[Record]]) -> list[list[tuple[int, int, str]]]:
    """Where each event stands, erased or not."""
    return [[(record.offset, record.next_offset, mark_of(record.event)) for record in records] for records in found]


def check(found: list[list[Record]], acknowledged: list[list[int]], erased: dict[str, str]) -> None:
    """Hold what was read against what was acknowledged.

    Raises:
        AssertionError: an event is missing, doubled, out of order or changed.
    """
    places: dict[str, tuple[int, int]] = {}
    steps: dict[str, list[int]] = defaultdict(list)
    for partition, records in enumerate(found):
        for record in records:
            event = record.event
            event_id = erased[event.event_id] if event.type == ERASED else event.event_id
            assert event_id not in places, f"{event_id} is in the log twice"
            places[event_id] = (partition, record.offset)
            run, thread, step = map(int, event_id.split("-"))
            assert event.type == ERASED or event == sent(run, thread, step), f"{event_id} is not what was sent"
            steps[str(sent(run, thread, step).user_id)].append(step)
    for user, taken in steps.items():
        first = int(user.rsplit("-", 1)[1])
        assert taken == [first + USERS * n for n in range(len(taken))], f"user {user}: {taken} is no prefix"
    for run, thread, step, partition, offset in acknowledged:
        assert places.get(f"{run}-{thread}-{step}") == (partition, offset), f"{run}-{thread}-{step} was acknowledged"


def tear(folder: Path, generator: random.Random) -> int:
    """Leave at the end of the write-ahead log what a power cut leaves: part of a frame, or zeros; gives its bytes."""
    wal = folder / "events.sqlite-wal"
    if not wal.exists():
        return 0
    frame = wal.read_bytes()[-4120:]
    tail = generator.choice([b"", frame[: generator.randrange(1, 4120)], bytes(generator.randrange(1, 9000))])
    with wal.open("ab") as file:
        file.write(tail)
    return len(tail)


def soak(folder: Path, kills: int, generator: random.Random) -> dict[str, int]:
    """Kill `kills` processes that write one log; counts of what happened."""
    log_folder = folder / "log"
    open_log(log_folder).close()
    followed: list[list[Record]] = [[] for _ in range(PARTITIONS)]
    acknowledged: list[list[int]] = []
    torn = 0
    with closing(LocalEventLog.reader(log_folder)) as reader:
        for run in range(kills):
            acks = folder / f"acks-{run}"
            acks.touch()
            process = forks.start(partial(write_on, log_folder, run, acks))
            time.sleep(generator.uniform(0, LONGEST_S))
            read_on(reader, followed)
            assert not forks.wait(process, generator.uniform(0, LONGEST_S)), "a writer ended by itself"
            lines = acks.read_text().splitlines(keepends=True)
            acknowledged += [[int(word) for word in line.split()] for line in lines if line.endswith("\n")]
            torn += tear(log_folder, generator) > 0
            with closing(open_log(log_folder)) as log:
                found: list[list[Record]] = [[] for _ in range(PARTITIONS)]
                read_on(log, found)
            check(found, acknowledged, names_of(run + 1))
            read_on(reader, followed)
            assert places_of(followed) == places_of(found), "a reader that followed the log saw something else"
    erased = sum(record.event.type == ERASED for records in found for record in records)
    with closing(open_log(log_folder)) as log:
        erased += erase(log, kills)
        named = b"".join(path.read_bytes() for path in log_folder.iterdir())
    assert not any(f'"{run}-0-0"'.encode() in named for run in range(kills)), "a user that was erased is named"
    return {
        "erased": erased,
        "acknowledged": len(acknowledged),
        "events": sum(map(len, found)),
        "torn": torn,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, counts = random.Random(arguments.seed), Counter[str]()
    for first in range(0, arguments.kills, KILLS_A_LOG):
        with tempfile.TemporaryDirectory() as folder:
            counts += Counter(soak(Path(folder), min(KILLS_A_LOG, arguments.kills - first), generator))
    print(json.dumps({"kills": arguments.kills, "seed": arguments.seed, **counts}))


if __name__ == "__main__":
    main()
