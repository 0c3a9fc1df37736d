import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import orjson
import pyarrow as pa
import pytest

from twotower.features.bloom import FilterShape, hash_ids
from twotower.features.store import FeatureStoreError, LmdbFeatureStore
from twotower.logs import Event, LocalEventLog, partition_of
from twotower.logs.events import item_event, user_deleted
from twotower.logs.payload import record_of
from twotower.schema.errors import DataError
from twotower.serve.users import MAX_CLICKS, MAX_SHOWN, Recent, RecentUsers, items_of

T = 1_700_000_000_000


def click(number: int, user_id: int | str = 1) -> Event:
    return Event(f"e{number}", "click", user_id, T + number, body={"item_id": number})


@pytest.fixture
def log(tmp_path: Path) -> Iterator[LocalEventLog]:
    with closing(LocalEventLog.open(tmp_path / "log", partitions=3, sync="never")) as opened:
        yield opened


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Callable[[LocalEventLog], RecentUsers]]:
    """Opens the store again, as a restarted server does."""
    stores: list[LmdbFeatureStore] = []

    def opened(log: LocalEventLog, shape: FilterShape | None = None) -> RecentUsers:
        for store in stores:
            store.close()
        stores.append(LmdbFeatureStore(tmp_path / "store"))
        return RecentUsers(log, stores[-1], shape)

    yield opened
    for store in stores:
        store.close()


def clicks_of(users: RecentUsers, user_id: int | str = 1) -> list[int | str]:
    return [item for _, item in users.get(user_id).clicks]


def test_users_are_kept_apart_by_id_and_by_type(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    long = "x" * 500
    log.append([click(place, user_id) for place, user_id in enumerate([1, "1", long, long + "y"])])
    assert users.catch_up() == 4
    assert [clicks_of(users, user_id) for user_id in (1, "1", long, long + "y", 2)] == [[0], [1], [2], [3], []]
    assert users.get(1) == Recent(clicks=((T, 0),))


def test_a_restart_goes_on_where_it_was_and_applies_nothing_twice(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    log.append([click(0), click(1)])
    assert users.catch_up() == 2
    log.append([click(2)])
    again = reopen(log)
    assert again.catch_up() == 1
    assert again.catch_up() == 0
    assert clicks_of(again) == [0, 1, 2]


def test_deleted_users_are_erased_from_the_log_once(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    log.append([click(number, user_id) for number, user_id in enumerate([1, 1, 2, 1])])
    log.append([user_deleted("d", T + 10, 1)])
    log.append([click(5, 1)])
    assert users.erase_deleted() == 0
    users.catch_up()
    users = reopen(log)  # it was killed before it erased anything
    assert users.erase_deleted() == 3
    assert users.erase_deleted() == 0
    of_one = [record.event for record in log.read(partition_of(1, 3), 0, 10)]
    assert [event.type for event in of_one if event.user_id != 2] == ["erased"] * 3 + ["user", "click"]
    users = reopen(log)
    assert users.catch_up() == 0
    assert [clicks_of(users, user_id) for user_id in (1, 2)] == [[5], [2]]


def test_a_store_goes_on_when_the_last_event_that_it_applied_was_erased(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    log.append([click(0)])
    assert users.catch_up() == 1
    assert log.erase(partition_of(1, 3), {1: 2**40}) == 1
    log.append([click(1)])
    assert reopen(log).catch_up() == 1


def test_who_is_deleted_again_while_the_log_is_erased_stays_to_be_erased(
    log: LocalEventLog, reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = reopen(log)
    log.append([click(0), user_deleted("d1", T + 10, 1)])
    users.catch_up()

    def meanwhile(partition: int, deleted: dict[int | str, int]) -> int:
        log.append([click(1), user_deleted("d2", T + 20, 1)])
        users.catch_up()
        return LocalEventLog.erase(log, partition, deleted)

    with monkeypatch.context() as patch:
        patch.setattr(log, "erase", meanwhile)
        assert users.erase_deleted() == 1
    assert users.erase_deleted() == 2  # the click, and the deletion before
    assert users.erase_deleted() == 0


def test_damage_in_one_partition_keeps_nobody_of_another_from_being_erased(
    log: LocalEventLog, reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = reopen(log)
    first, second = (next(user_id for user_id in range(99) if partition_of(user_id, 3) == number) for number in (0, 1))
    log.append([click(0, first), click(1, second), user_deleted("d1", T, first), user_deleted("d2", T, second)])
    users.catch_up()

    def damaged(partition: int, deleted: dict[int | str, int]) -> int:
        if partition == partition_of(first, 3):
            raise DataError("damaged at byte 7")
        return LocalEventLog.erase(log, partition, deleted)

    with monkeypatch.context() as patch:
        patch.setattr(log, "erase", damaged)
        with pytest.raises(DataError, match="damaged at byte 7"):
            users.erase_deleted()
    assert log.erase(partition_of(second, 3), {second: 2**40}) == 1  # the deletion's own event alone is left
    assert users.erase_deleted() == 1


def test_a_lost_store_is_made_again_from_the_log(log: LocalEventLog, reopen, tmp_path: Path) -> None:
    log.append([click(place, place % 5) for place in range(3000)])
    users = reopen(log)
    users.catch_up()
    before = [users.get(user_id) for user_id in range(5)]
    users._store.close()
    shutil.rmtree(tmp_path / "store")
    again = reopen(log)
    assert again.catch_up() == 3000
    assert [again.get(user_id) for user_id in range(5)] == before


@pytest.mark.parametrize("events", [[], [click(7)], [click(place) for place in range(10, 40)]])
def test_a_store_of_another_log_is_made_again(log: LocalEventLog, reopen, tmp_path: Path, events: list[Event]) -> None:
    """The log was removed, and the new one is empty, shorter or longer."""
    users = reopen(log)
    log.append([click(0), click(1), click(2, "left")])
    users.catch_up()
    with closing(LocalEventLog.open(tmp_path / "other", partitions=3, sync="never")) as other:
        other.append(events)
        again = reopen(other)
        assert again.catch_up() == len(events)
        assert clicks_of(again) == [event.body["item_id"] for event in events]
        assert clicks_of(again, "left") == []


def test_a_store_of_a_log_with_other_partitions_is_made_again(log: LocalEventLog, reopen, tmp_path: Path) -> None:
    users = reopen(log)
    log.append([click(0, user_id) for user_id in range(9)])
    users.catch_up()
    with closing(LocalEventLog.open(tmp_path / "other", partitions=2, sync="never")) as other:
        again = reopen(other)
        assert again.catch_up() == 0
        assert [clicks_of(again, user_id) for user_id in range(9)] == [[]] * 9


def test_only_the_latest_events_of_a_user_are_kept(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    log.append([click(place) for place in range(MAX_CLICKS + 5)])
    shown = list(range(MAX_SHOWN + 5))
    log.append([Event("shown", "impression", 1, T, body={"items": shown})])
    users.catch_up()
    assert clicks_of(users) == list(range(5, MAX_CLICKS + 5))
    assert [item for _, item in users.get(1).shown] == shown[5:]


SHAPE = FilterShape.of(7 * 86_400_000, 7, 700, 0.01)


def impressions(days: int, a_day: int, name: Callable[[int], int | str] = int) -> list[Event]:
    """Of user 1, different items each time."""
    return [
        Event(f"s{day}/{part}", "impression", 1, T + day * 86_400_000, body={"items": [*map(name, range(at, at + 10))]})
        for day in range(days)
        for part, at in enumerate(range(day * a_day, (day + 1) * a_day, 10))
    ]


@pytest.mark.parametrize("name", [int, "item {}".format])
def test_impressions_beyond_the_latest_are_known_as_long_as_the_window(
    log: LocalEventLog, reopen, monkeypatch: pytest.MonkeyPatch, name: Callable[[int], int | str]
) -> None:
    monkeypatch.setattr("twotower.serve.users.MAX_SHOWN", 50)
    log.append(impressions(20, 100, name))
    users = reopen(log, SHAPE)
    users.catch_up()
    recent = users.get(1)
    assert [item for _, item in recent.shown] == [name(number) for number in range(1950, 2000)]
    hashes = hash_ids(pa.array([name(number) for number in range(2000)]))
    known = recent.seen.contains(hashes, T + 13 * 86_400_000)
    assert known[1300:1950].all()
    assert known[:1200].mean() < 0.05
    again = reopen(log, SHAPE)
    assert (again.catch_up(), again.get(1)) == (0, recent)


def test_what_fits_among_the_latest_needs_no_filter(log: LocalEventLog, reopen) -> None:
    users = reopen(log, SHAPE)
    log.append([*impressions(20, 100), click(7, 2)])
    users.catch_up()
    assert (len(users.get(1).shown), users.get(1).seen, users.get(2).seen) == (MAX_SHOWN, None, None)


def test_filters_and_the_place_in_the_log_are_written_together(
    log: LocalEventLog, reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after any number of writes, the server goes on to the same state."""
    monkeypatch.setattr("twotower.serve.users.MAX_SHOWN", 50)
    monkeypatch.setattr("twotower.serve.users._BATCH", 7)
    log.append(impressions(5, 100))
    whole = reopen(log, SHAPE)
    whole.catch_up()
    expected = whole.get(1)
    whole._store.clear()

    class Killed(Exception):
        pass

    for survived in range(3):
        users = reopen(log, SHAPE)
        write, writes = users._store.write, []

        def until_killed(changes, write=write, writes=writes, survived=survived) -> None:
            if len(writes) == survived:
                raise Killed
            writes.append(changes)
            write(changes)

        monkeypatch.setattr(users._store, "write", until_killed)
        with pytest.raises(Killed):
            users.catch_up()
    final = reopen(log, SHAPE)
    assert final.catch_up() == 50 - 7 * (0 + 1 + 2)
    assert final.get(1) == expected


def test_a_store_of_another_shape_is_made_again(log: LocalEventLog, reopen) -> None:
    log.append(impressions(1, 100))
    for shape, applied in [
        (None, 10),
        (None, 0),
        (SHAPE, 10),
        (SHAPE, 0),
        (FilterShape.of(10**6, 2, 9, 0.1), 10),
        (None, 10),
    ]:
        assert reopen(log, shape).catch_up() == applied


def test_only_the_asked_partitions_are_read(log: LocalEventLog, reopen) -> None:
    users = reopen(log)
    acks = log.append([click(place, place) for place in range(20)])
    first = [place for place, ack in enumerate(acks) if ack.partition == acks[0].partition]
    assert users.catch_up([acks[0].partition] * 2) == len(first) < 20
    assert users.catch_up() == 20 - len(first)


@pytest.mark.parametrize(
    ("kind", "body", "clicked", "shown"),
    [
        ("click", {"item_id": "a"}, ["a"], []),
        ("click", {"items": [1, 2]}, [1, 2], []),
        ("impression", {"items": [1]}, [], [1]),
        ("request", {"items": [1, 2, 3], "outcomes": ["clicked", "impressed", "ranked_not_shown"]}, [1], [1, 2]),
        ("request", {"items": [1]}, [], []),
        ("purchase", {"item_id": 1}, [], []),
        ("click", {}, [], []),
        ("click", {"item_id": None}, [], []),
        ("click", {"items": [True, 1.5, None, 2]}, [], []),  # unusable, as a whole
        ("click", {"items": "abc"}, [], []),
    ],
)
def test_what_an_event_says_was_clicked_and_shown(kind: str, body: dict, clicked: list, shown: list) -> None:
    payload = orjson.dumps({"event_id": "e", "type": kind, "user_id": 1, "ts_ms": T, **body})
    assert items_of(record_of(0, 1, payload).event.content) == (clicked, shown)


class Losable(LmdbFeatureStore):
    """A store that is emptied, or restored to what it was, under the one who uses it."""

    lost_answer = False

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        super().write(changes)
        if self.lost_answer:
            raise FeatureStoreError("no answer")

    def restore(self, content: dict[bytes, bytes]) -> None:
        self.clear()
        super().write(content)


@pytest.fixture
def losable(tmp_path: Path) -> Iterator[Losable]:
    store = Losable(tmp_path / "losable")
    yield store
    store.close()


def test_a_store_that_was_emptied_is_built_again_by_the_reader_of_the_log(log: LocalEventLog, losable: Losable) -> None:
    users = RecentUsers(log, losable, SHAPE)
    log.append([click(10), item_event("b", T, 11, {"x": 1}, None), click(20, 2)])
    users.catch_up()
    before, entities = losable.scan(b""), users.entities
    losable.clear()
    [ack] = log.append([click(12)])
    assert users.catch_up([ack.partition]) == 0  # who writes an event does not wait
    assert users.behind
    assert users.entities is entities
    assert users.catch_up() == 4
    assert not users.behind
    assert clicks_of(users) == [10, 12]
    assert users.entities.items[11].features == {"x": 1}
    assert losable.scan(b"").keys() == before.keys()


def test_a_store_that_was_restored_to_an_earlier_state_counts_nothing_twice(
    log: LocalEventLog, losable: Losable
) -> None:
    users = RecentUsers(log, losable)
    log.append([click(10)])
    users.catch_up()
    earlier = losable.scan(b"")
    log.append([click(11), item_event("c", T, 5, {}, None)])
    users.catch_up()
    now = losable.scan(b"")
    losable.restore(earlier)
    assert users.catch_up() == 2
    assert losable.scan(b"") == now
    assert not users.behind


def test_a_change_whose_answer_was_lost_is_not_applied_twice(log: LocalEventLog, losable: Losable) -> None:
    users = RecentUsers(log, losable)
    log.append([click(10), item_event("b", T, 5, {"x": 1}, None)])
    losable.lost_answer = True
    with pytest.raises(FeatureStoreError):
        users.catch_up()
    losable.lost_answer = False
    users.catch_up()
    assert not users.behind
    assert clicks_of(users) == [10]
    assert users.entities.items[5].features == {"x": 1}


def test_a_store_and_a_log_that_are_both_lost_are_not_read_from_the_beginning(
    log: LocalEventLog, losable: Losable, tmp_path: Path
) -> None:
    users = RecentUsers(log, losable)
    log.append([click(10)])
    users.catch_up()
    losable.clear()
    users._log = LocalEventLog.open(tmp_path / "empty", sync="never")
    with pytest.raises(DataError, match="emptied, replaced or damaged"):
        users.catch_up()
    users._log.close()
    users._log = log
    assert users.catch_up() == 1
