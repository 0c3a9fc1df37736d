"""What every event log does. An adapter joins by one more parameter of the fixture `reopen`."""

import threading
import uuid
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import pytest

from twotower.logs import Event, EventLog, EventLogError, LocalEventLog, Record, partition_of, payload
from twotower.logs.events import ALLOWED_SKEW_MS, ERASED, NOBODY, UNUSABLE
from twotower.logs.kafka import KafkaEventLog
from twotower.logs.payload import mark_of
from twotower.logs.redis import RedisEventLog
from twotower.schema.errors import DataError

Reopen = Callable[[], EventLog]

NOW_MS = 1_700_000_000_000
LOGGED_MS = NOW_MS + 86_400_000


def clock_ms() -> int:
    return LOGGED_MS


def event(event_id: str, user_id: int | str = 1, **body: object) -> Event:
    return Event(event_id=event_id, type="click", user_id=user_id, ts_ms=NOW_MS, request_id="r", body=body)


def everything(log: EventLog, limit: int = 100) -> list[list[Record]]:
    """All records of each partition, read in steps of `limit`."""
    found: list[list[Record]] = []
    for partition in range(log.partitions):
        records = log.read(partition, 0, limit)
        while more := log.read(partition, records[-1].next_offset, limit) if records else []:
            records += more
        found.append(records)
    return found


def ids(records: list[Record]) -> list[str]:
    return [record.event.event_id for record in records]


@pytest.fixture(params=["local", "redis", "kafka"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Reopen]:
    """Closes the log if it is open, and opens the same one again: 4 partitions, empty at first."""
    opened: list[EventLog] = []
    name = f"test-{uuid.uuid4().hex}"

    def again() -> EventLog:
        for log in opened:
            log.close()
        if request.param == "local":
            opened.append(LocalEventLog.open(tmp_path / "log", partitions=4, clock_ms=clock_ms))
        elif request.param == "redis":
            opened.append(RedisEventLog(request.getfixturevalue("redis_url"), name, partitions=4, clock_ms=clock_ms))
        else:
            opened.append(
                KafkaEventLog(request.getfixturevalue("kafka_servers")(name), name, partitions=4, clock_ms=clock_ms)
            )
        return opened[-1]

    yield again
    for log in opened:
        log.close()


def test_an_empty_log_reads_as_nothing(reopen: Reopen) -> None:
    log = reopen()
    assert log.partitions == 4
    assert [log.read(partition, 0, 10) for partition in range(4)] == [[], [], [], []]
    assert log.append([]) == []


def test_an_event_comes_back_as_it_went_in(reopen: Reopen) -> None:
    log = reopen()
    sent = Event(
        "e1", "request", "ü-1", NOW_MS, "r-1", {"items": [1, 2], "context": {"device": "phone"}, "x": None, "y": 0.1}
    )
    [ack] = log.append([sent])
    [record] = log.read(ack.partition, 0, 10)
    assert record.event == sent
    assert record.offset == ack.offset
    assert not ack.duplicate


def test_a_users_events_are_in_one_partition_in_order(reopen: Reopen) -> None:
    log = reopen()
    for step in range(30):
        log.append([event(f"{user}-{step}", user) for user in range(12)])
    for partition, records in enumerate(everything(log)):
        for user in range(12):
            mine = [record.event.event_id for record in records if record.event.user_id == user]
            assert mine == ([f"{user}-{step}" for step in range(30)] if partition_of(user, 4) == partition else [])


def test_acknowledgements_are_in_the_order_of_the_events(reopen: Reopen) -> None:
    log = reopen()
    sent = [event(f"e{user}", user) for user in range(20)]
    acks = log.append(sent)
    assert [ack.partition for ack in acks] == [partition_of(user, 4) for user in range(20)]
    for one, ack in zip(sent, acks, strict=True):
        assert log.read(ack.partition, ack.offset, 1)[0].event == one


def test_a_number_and_its_digits_are_two_users(reopen: Reopen) -> None:
    log = reopen()
    acks = log.append([event("e", 1), event("e", "1")])
    assert [ack.duplicate for ack in acks] == [False, False]
    users = [record.event.user_id for records in everything(log) for record in records]
    assert sorted(map(repr, users)) == ["'1'", "1"]


def test_a_read_gives_at_most_its_limit_and_the_next_goes_on(reopen: Reopen) -> None:
    log = reopen()
    [partition] = {ack.partition for ack in log.append([event(f"e{n}") for n in range(7)])}
    first = log.read(partition, 0, 3)
    second = log.read(partition, first[-1].next_offset, 3)
    third = log.read(partition, second[-1].next_offset, 3)
    assert [ids(first), ids(second), ids(third)] == [["e0", "e1", "e2"], ["e3", "e4", "e5"], ["e6"]]
    assert log.read(partition, third[-1].next_offset, 3) == []


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
def test_the_limit_does_not_change_what_is_read(reopen: Reopen, limit: int) -> None:
    log = reopen()
    log.append([event(f"e{n}", n % 5, text="x" * n) for n in range(150)])
    assert everything(log, limit) == everything(log)
    assert sum(map(len, everything(log, limit))) == 150


def test_offsets_rise_and_meet(reopen: Reopen) -> None:
    log = reopen()
    log.append([event(f"e{n}", n) for n in range(200)])
    for partition, records in enumerate(everything(log)):
        offsets = [record.offset for record in records]
        assert offsets == sorted(set(offsets))
        for record, following in pairwise(records):
            assert log.read(partition, record.next_offset, 1) == [following]


def test_a_read_from_the_end_gives_only_what_comes(reopen: Reopen) -> None:
    log = reopen()
    log.append([event(f"old{n}", n) for n in range(50)])
    ends = log.ends()
    log.append([event(f"new{n}", n) for n in range(50)])
    found = [name for partition in range(4) for name in ids(log.read(partition, ends[partition], 100))]
    assert sorted(found) == sorted(f"new{n}" for n in range(50))


def test_what_was_acknowledged_is_there_after_a_reopen_at_the_same_offsets(reopen: Reopen) -> None:
    log = reopen()
    log.append([event(f"e{n}", n) for n in range(100)])
    before, ends = everything(log), log.ends()
    log = reopen()
    assert everything(log) == before
    assert log.ends() == ends


def test_an_id_is_written_once(reopen: Reopen) -> None:
    log = reopen()
    [first] = log.append([event("e")])
    [again] = log.append([event("e", note="a retry is told by its id alone")])
    assert again.duplicate
    assert (again.partition, again.offset) == (first.partition, first.offset)
    assert ids(log.read(first.partition, 0, 10)) == ["e"]


def test_an_id_is_written_once_within_a_batch(reopen: Reopen) -> None:
    log = reopen()
    acks = log.append([event("a"), event("b"), event("a"), event("a")])
    assert [ack.duplicate for ack in acks] == [False, False, True, True]
    assert acks[2].offset == acks[3].offset == acks[0].offset
    assert ids(log.read(acks[0].partition, 0, 10)) == ["a", "b"]


def test_an_id_is_written_once_across_reopens(reopen: Reopen) -> None:
    sent = [event(f"e{n}", n % 7, text="x" * 50) for n in range(200)]
    first = reopen().append(sent)
    again = reopen().append(sent)
    assert all(ack.duplicate for ack in again)
    assert [(ack.partition, ack.offset) for ack in again] == [(ack.partition, ack.offset) for ack in first]
    assert sum(map(len, everything(reopen()))) == 200


def test_two_users_may_use_the_same_id(reopen: Reopen) -> None:
    log = reopen()
    assert [ack.duplicate for ack in log.append([event("e", user) for user in range(20)])] == [False] * 20


def test_threads_lose_nothing_and_double_nothing(reopen: Reopen) -> None:
    log = reopen()
    duplicates: list[bool] = []

    def send(thread: int) -> None:
        for step in range(25):  # every id is sent by two threads
            acks = log.append([event(f"{thread // 2}-{step}-{user}", user) for user in range(4)])
            duplicates.extend(ack.duplicate for ack in acks)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [name for records in everything(log) for name in ids(records)]
    assert sorted(found) == sorted(
        f"{pair}-{step}-{user}" for pair in range(3) for step in range(25) for user in range(4)
    )
    assert duplicates.count(False) == duplicates.count(True) == 300


def test_a_readers_thread_sees_a_prefix_while_others_write(reopen: Reopen) -> None:
    log = reopen()
    [partition] = {ack.partition for ack in log.append([event("0")])}
    writer = threading.Thread(target=lambda: [log.append([event(str(n))]) for n in range(1, 150)])
    writer.start()
    seen: list[str] = []
    offset = 0
    while writer.is_alive() or log.read(partition, offset, 1):
        for record in log.read(partition, offset, 10):
            seen.append(record.event.event_id)
            offset = record.next_offset
    writer.join()
    assert seen == [str(n) for n in range(150)]


@pytest.mark.parametrize("text", ["", "é漢字🙂", '\x00\n\t"\\', "x" * 16_384])
def test_any_text_survives(reopen: Reopen, text: str) -> None:
    log = reopen()
    acks = log.append([event("before"), event(f"e{text[:5]}", text=text), event("after")])
    records = reopen().read(acks[0].partition, 0, 10)
    assert ids(records) == ["before", f"e{text[:5]}", "after"]
    assert records[1].event.body == {"text": text}


def test_what_json_cannot_hold_is_refused_with_its_whole_batch(reopen: Reopen) -> None:
    log = reopen()
    for value in (object(), {1: 2}, "\ud800", 2**70):
        with pytest.raises(DataError, match="event 'bad'"):
            log.append([event("good"), event("bad", value=value)])
    assert everything(log) == [[], [], [], []]


# By the body that a check refuses: what its reason is.
REFUSED: dict[str, dict[str, object]] = {
    "beyond_clock": {"ts_ms": LOGGED_MS + ALLOWED_SKEW_MS + 1},
    "too_large": {"items": [1] * 10_001},
    "bad_number": {"weight": 1e29},
    "malformed": {"outcomes": ["clicked"], "items": [1, 2], "type": "request"},
}


def document(**fields: object) -> dict[str, object]:
    return {"event_id": "bad", "type": "click", "user_id": 1, "ts_ms": NOW_MS, **fields}


@pytest.mark.parametrize("fields", REFUSED.values(), ids=REFUSED.keys())
def test_what_no_reader_could_use_is_refused_with_its_whole_batch(reopen: Reopen, fields: dict[str, object]) -> None:
    log = reopen()
    with pytest.raises(DataError, match="event 'bad'"):
        log.append([event("good"), Event.from_json(document(**fields))])
    assert everything(log) == [[], [], [], []]


@pytest.mark.parametrize("reason", REFUSED)
def test_what_others_wrote_and_no_reader_could_use_stands_there_as_unusable(
    reopen: Reopen, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """An earlier release, or a producer of somebody's own, writes without the check."""
    log = reopen()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(payload, "check_event", lambda *_: None)
        log.append([event("before")])
        [ack] = log.append([Event.from_json(document(**REFUSED[reason]))])
        log.append([event("after")])
    records = log.read(ack.partition, 0, 10)
    assert [record.event.type for record in records] == ["click", UNUSABLE, "click"]
    assert records[1].event.user_id == NOBODY
    assert records[1].event.body["reason"] == reason
    assert log.append([Event.from_json(document())])[0].duplicate


def test_an_event_is_stamped_with_the_clock_of_the_log(reopen: Reopen) -> None:
    log = reopen()
    [ack] = log.append([event("e")])
    assert log.read(ack.partition, 0, 1)[0].logged_ms == LOGGED_MS
    assert log.read(ack.partition, 0, 1)[0].event.body == {}


def test_a_client_cannot_write_the_clock_of_the_log() -> None:
    with pytest.raises(DataError, match="names logged_ms, which only the log writes"):
        Event.from_json(document(logged_ms=1))


def test_what_is_no_place_in_the_log_is_refused(reopen: Reopen) -> None:
    log = reopen()
    for partition, offset, limit in [(4, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 0)]:
        with pytest.raises(ValueError):
            log.read(partition, offset, limit)
    with pytest.raises(DataError, match="not of this log"):
        log.read(0, log.ends()[0] + 1_000_000, 1)


def test_a_closed_log_refuses(reopen: Reopen) -> None:
    log = reopen()
    log.close()
    log.close()
    with pytest.raises(EventLogError, match="closed"):
        log.append([event("e")])
    with pytest.raises(EventLogError, match="closed"):
        log.read(0, 0, 1)


erasing = pytest.mark.parametrize("reopen", ["local", "redis"], indirect=True)


@pytest.mark.parametrize("reopen", ["kafka"], indirect=True)
def test_a_log_that_cannot_erase_says_so_and_keeps_everything(reopen: Reopen) -> None:
    log = reopen()
    [ack] = log.append([event("e1")])
    assert log.erase(ack.partition, {1: ack.offset + 1}) is None
    assert ids(log.read(ack.partition, ack.offset, 10)) == ["e1"]


@erasing
def test_of_an_erased_user_only_types_and_times_stay(reopen: Reopen) -> None:
    log = reopen()
    log.append([event(f"secret-{n}", n % 3, text=f"secret {'x' * n}") for n in range(120)])
    [after] = log.append([event("after", 1)])
    before = everything(log)
    assert log.erase(after.partition, {1: after.offset}) == 40
    for again in (lambda: log, reopen):
        found = everything(again())
        assert [[record.offset for record in part] for part in found] == [
            [record.offset for record in part] for part in before
        ]
        for one, was in zip(chain(*found), chain(*before), strict=True):
            if was.event.user_id == 1 and was.offset < after.offset:
                assert (one.event.type, one.event.user_id, one.event.ts_ms) == (ERASED, NOBODY, NOW_MS)
                assert one.event.original_type == "click"
                assert mark_of(one.event) == mark_of(was.event)
                assert "secret" not in repr(one)
            else:
                assert one == was
    assert reopen().erase(after.partition, {1: after.offset}) == 0


@erasing
def test_a_retry_of_an_erased_event_is_a_duplicate_and_new_ones_go_on(reopen: Reopen) -> None:
    log = reopen()
    [first, last] = log.append([event("e1"), event("e2")])
    end = log.ends()[last.partition]
    assert log.erase(last.partition, {1: end}) == 2
    log = reopen()
    assert log.ends()[last.partition] >= end
    again, new = log.append([event("e1"), event("e3")])
    assert (again.duplicate, again.offset) == (True, first.offset)
    assert not new.duplicate
    assert [record.event.type for record in log.read(last.partition, first.offset, 10)] == [ERASED, ERASED, "click"]
    assert ids(log.read(last.partition, new.offset, 10)) == ["e3"]


@erasing
@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_the_limit_does_not_change_what_is_read_of_an_erased_log(reopen: Reopen, limit: int) -> None:
    log = reopen()
    log.append([event(f"e{n}", n % 5) for n in range(60)])
    for partition, end in enumerate(log.ends()):
        log.erase(partition, {1: end, 3: end})
    assert everything(log, limit) == everything(log)
    assert sum(map(len, everything(log, limit))) == 60


@erasing
def test_a_number_is_erased_and_its_digits_are_another_user(reopen: Reopen) -> None:
    log = reopen()
    [number, digits] = log.append([event("e", 1), event("e", "1")])
    assert log.erase(number.partition, {1: 2**40}) == 1
    assert log.read(digits.partition, digits.offset, 1)[0].event == event("e", "1")
    with pytest.raises(ValueError, match="partition=4, but the log has 4"):
        log.erase(4, {1: 1})
