"""The rules of the joiner, one by one, and its memory against a log of random events."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import orjson
import pyarrow as pa
import pytest

from twotower.logs import Event, Record
from twotower.logs.events import item_event, user_deleted, user_event
from twotower.logs.payload import erased_payload, payload_of, record_of
from twotower.stream import joiner as joiner_module
from twotower.stream.clock import Clock
from twotower.stream.joiner import Joiner
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Row, Types

T0 = 1_700_000_000_000
OPTIONS = StreamOptions(window_s=600, allowed_lateness_s=30, remember_s=3600)
SHORT = StreamOptions(window_s=300, allowed_lateness_s=60, remember_s=600)
LOGGED_MS = T0 + 10**9
"""The clock of the log: later than all events, as where old events are replayed."""
TYPES = Types(pa.int64(), pa.int64(), {"age": pa.float32()}, {"scene": pa.string(), "hour": pa.int64()})
_numbers = count()


def request(at_s: float, request_id: str = "r", user_id: int | str = 1, **body: object) -> Event:
    given = {"items": [1, 2, 3], "outcomes": ["impressed", "impressed", "rank_rejected"], **body}
    return Event(f"q{next(_numbers)}", "request", user_id, T0 + round(at_s * 1000), request_id, given)


def click(at_s: float, item: object = 1, request_id: str | None = "r", user_id: int | str = 1, **body: object) -> Event:
    return Event(f"c{next(_numbers)}", "click", user_id, T0 + round(at_s * 1000), request_id, {"item_id": item, **body})


def shown(at_s: float, *items: int, request_id: str | None = "r") -> Event:
    return Event(f"i{next(_numbers)}", "impression", 1, T0 + round(at_s * 1000), request_id, {"items": list(items)})


def tick(at_s: float) -> Event:
    """An event that only says what time it is."""
    return request(at_s, f"tick{next(_numbers)}", 2, items=[], outcomes=[])


def joiner_of(records: list[Record], options: StreamOptions = OPTIONS) -> Joiner:
    return Joiner(TYPES, options, lambda offset: next(r.event for r in records if r.offset == offset))


def log_of(*events: Event) -> list[Record]:
    return [Record(10 * place, 10 * place + 10, event, LOGGED_MS) for place, event in enumerate(events)]


def feed(*events: Event) -> tuple[Joiner, list[list[tuple[int | str, str]]]]:
    """What leaves at each event: items and outcomes."""
    records = log_of(*events)
    joiner = joiner_of(records)
    return joiner, [[(row.item_id, row.outcome) for row in joiner.feed(record)] for record in records]


def test_a_click_leaves_at_once_and_the_rest_when_its_window_closes():
    joiner, left = feed(request(0), click(5), tick(600 + 29.999), tick(600 + 30))
    assert left == [[], [(1, "clicked")], [], [(2, "impressed"), (3, "rank_rejected")]]
    assert joiner.take_counts().late == 0


def test_a_click_has_what_was_logged_at_its_request():
    asked = request(
        0, context={"scene": "home", "hour": 7, "other": 1}, features={"age": 30}, history=[8, 9], version="v1",
        delta_seq=4, positions=[1, 2, None], scores=[0.5, 0.25, None], channels=[["a", "b"], [], ["a"]],
        probabilities=[1, 1, 0.1], propensities=[0.2, None, None],
    )  # fmt: skip
    records = log_of(asked, click(5, weight=2.5))
    joiner = joiner_of(records)
    joiner.feed(records[0])
    [row] = joiner.feed(records[1])
    assert (row.request.ts_ms, row.click_ts_ms, row.weight) == (T0, T0 + 5000, 2.5)
    assert (row.position, row.score, row.channel, row.probability, row.propensity) == (1, 0.5, "a|b", 1.0, 0.2)
    assert (row.request.context, row.request.features) == ({"scene": "home", "hour": 7}, {"age": 30.0})
    assert (row.request.history, row.request.version, row.request.delta_seq) == ([8, 9], "v1", 4)
    rejected = joiner.flush()[-1]
    assert (rejected.item_id, rejected.position, rejected.probability, rejected.click_ts_ms) == (3, None, 0.1, None)


def test_a_click_that_comes_before_its_request_waits_for_it():
    joiner, left = feed(click(5), tick(20), request(0))
    assert left == [[], [], [(1, "clicked")]]
    assert joiner.take_counts().unjoined == 0


def test_a_click_whose_request_does_not_come_leaves_alone():
    records = log_of(click(5, 7), tick(35), request(0))
    joiner = joiner_of(records)
    assert joiner.feed(records[0]) == []
    [row] = joiner.feed(records[1])
    assert (row.item_id, row.outcome, row.request.ts_ms, row.click_ts_ms) == (7, "clicked", T0 + 5000, T0 + 5000)
    assert joiner.take_counts().unjoined == 1
    assert joiner.feed(records[2]) == []
    assert [row.item_id for row in joiner.flush()] == [1, 2, 3]


def test_a_click_without_a_request_is_a_positive_of_its_own():
    records = log_of(click(5, request_id=None, context={"scene": "home"}))
    joiner = joiner_of(records)
    [row] = joiner.feed(records[0])
    assert (row.request.request_id, row.request.ts_ms, row.click_ts_ms) == (None, T0 + 5000, T0 + 5000)
    assert row.request.context == {"scene": "home"}
    assert joiner.take_counts().unjoined == 1


def test_a_late_click_is_a_positive_with_its_request_and_is_counted():
    joiner, left = feed(request(0), tick(700), click(650, 2))
    assert left[1] == [(1, "impressed"), (2, "impressed"), (3, "rank_rejected")]
    assert left[2] == [(2, "clicked")]
    assert joiner.take_counts().late == 1


def test_a_late_click_reads_its_request_again():
    records = log_of(request(0, history=[4], scores=[0.5, 0.25, None]), tick(700), click(650, 2))
    joiner = joiner_of(records)
    *_, [row] = [joiner.feed(record) for record in records]
    assert (row.request.ts_ms, row.request.history, row.score) == (T0, [4], 0.25)


def test_a_request_is_forgotten_after_its_late_time():
    joiner, left = feed(request(0), tick(600 + 30 + 3600), click(650, 2))
    assert left[2] == [(2, "clicked")]
    assert joiner.take_counts().unjoined == 1


def test_a_second_click_of_an_item_is_a_duplicate():
    joiner, left = feed(request(0), click(5), click(6), click(7, 2))
    assert left == [[], [(1, "clicked")], [], [(2, "clicked")]]
    assert joiner.take_counts().duplicates == 1


def test_a_second_request_of_one_id_is_a_duplicate():
    joiner, left = feed(request(0), request(1), tick(700))
    assert len(left[2]) == 3
    assert joiner.take_counts().duplicates == 1


def test_the_same_request_id_of_two_users_is_two_requests():
    _, left = feed(request(0), request(0, user_id=2), click(5, user_id=2), tick(700))
    assert left[2] == [(1, "clicked")]
    assert len(left[3]) == 5


def test_impressions_raise_what_a_request_recorded():
    records = log_of(request(0, outcomes=["ranked_not_shown"] * 3), shown(1, 2, 9), click(2, 9), tick(700))
    joiner = joiner_of(records)
    left = [joiner.feed(record) for record in records]
    assert [(row.item_id, row.outcome) for row in left[3]] == [
        (1, "ranked_not_shown"), (2, "impressed"), (3, "ranked_not_shown"),
    ]  # fmt: skip


def test_impressions_without_their_request_are_a_request_of_their_own():
    joiner, left = feed(shown(0, 4, 5), click(3, 5), tick(33), tick(700))
    assert left == [[], [], [(5, "clicked")], [(4, "impressed")]]
    assert joiner.take_counts().unjoined == 1


def test_an_impression_after_the_window_is_late():
    joiner, left = feed(request(0, outcomes=["ranked_not_shown"] * 3), tick(700), shown(1, 2), shown(1, 2))
    assert left[2:] == [[(2, "impressed")], []]
    assert joiner.take_counts().late == 1


def test_impressions_that_name_no_request_are_dropped_and_counted():
    joiner, left = feed(shown(0, 4, 5, request_id=None))
    assert left == [[]]
    assert joiner.take_counts().dropped == {"impression_without_request_id": 2}


def test_a_request_may_say_itself_what_was_clicked():
    _, left = feed(request(0, outcomes=["clicked", "impressed", "rank_rejected"]), click(3))
    assert left == [[(1, "clicked")], []]


def test_a_click_stamped_before_its_request_takes_its_time():
    records = log_of(request(10), click(8))
    joiner = joiner_of(records)
    joiner.feed(records[0])
    [row] = joiner.feed(records[1])
    assert row.click_ts_ms == row.request.ts_ms == T0 + 10_000
    assert joiner.take_counts().before_request == 1


def test_a_request_that_comes_after_its_window_leaves_at_once_and_is_late():
    joiner, left = feed(tick(700), request(0))
    assert len(left[1]) == 3
    assert joiner.take_counts().late == 1


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Event("e", "view", 1, T0), {"other_type": 1}),
        (request(0, user_id="1"), {"wrong_user_id": 1}),
        (click(0, "x"), {"wrong_item_id": 1}),
        (click(0, 2**63), {"unusable_bad_number": 1}),
        (Event("e", "click", 1, T0, "r"), {"no_item": 1}),
        (request(0, outcomes=["impressed"]), {"unusable_malformed": 1}),
        (request(0, outcomes=["impressed", "bought", "impressed"]), {"unusable_malformed": 1}),
        (request(0, positions=[1]), {"bad_request": 1}),
        (request(0, items="abc", outcomes=["impressed"] * 3), {"unusable_malformed": 1}),
        (request(0, outcomes=None), {"bad_request": 1}),
        (request(0, scores=["high", 1, 1]), {"bad_value": 1}),
        (request(0, context={"scene": 3}), {"bad_value": 1}),
        (request(0, context=[1]), {"bad_value": 1}),
        (request(0, items=[1, 1, 2]), {"item_twice": 1}),
        (request(0, items=[1, "b", 2]), {"wrong_item_id": 1}),
        (click(0, request_id=None, weight=-1), {"unusable_bad_number": 1}),
    ],
)
def test_what_cannot_be_used_is_dropped_and_counted(event: Event, reason: dict[str, int]):
    payload = orjson.dumps({**orjson.loads(event.to_json()), "logged_ms": LOGGED_MS})
    joiner = joiner_of([])
    joiner.feed(record_of(0, 10, payload))
    joiner.flush()
    assert joiner.take_counts().dropped == reason


def test_of_an_item_that_is_twice_in_a_request_the_furthest_counts():
    joiner, _ = feed(request(0, items=[1, 1, 2], outcomes=["rank_rejected", "impressed", "impressed"]))
    assert [(row.item_id, row.outcome) for row in joiner.flush()] == [(1, "impressed"), (2, "impressed")]


def test_a_client_with_a_wrong_clock_closes_nobodys_window():
    joiner, left = feed(request(0), click(40 * 86400, 9, "other", 3), click(5), tick(20))
    assert left == [[], [], [(1, "clicked")], []]
    assert joiner.watermark_ms == T0 + 20_000 - OPTIONS.allowed_lateness_ms


def test_a_flush_closes_everything_and_clicks_after_it_are_late():
    records = log_of(request(0), click(5), request(7, "s"), click(8, 2, "s"), click(9))
    joiner = joiner_of(records)
    for record in records[:3]:
        joiner.feed(record)
    assert joiner.has_open
    assert [(row.request.request_id, row.item_id) for row in joiner.flush()] == [
        ("r", 2), ("r", 3), ("s", 1), ("s", 2), ("s", 3),
    ]  # fmt: skip
    assert not joiner.has_open
    assert joiner.watermark_ms == T0 + 7000
    assert [row.outcome for row in joiner.feed(records[3])] == ["clicked"]
    assert joiner.take_counts().late == 1
    assert joiner.flush() == []


def test_a_deleted_user_leaves_nothing_behind():
    joiner, left = feed(
        request(0), request(1, user_id=2), click(2, 9, "not yet"), user_deleted("d", T0 + 3000, 1), click(4), tick(700)
    )
    assert left[:4] == [[], [], [], []]
    assert left[4] == []
    assert left[5] == [(1, "clicked"), (1, "impressed"), (2, "impressed"), (3, "rank_rejected")]
    counts = joiner.take_counts()
    assert (counts.unjoined, counts.dropped) == (1, {})


def test_users_and_items_that_are_put_are_no_business_of_the_joiner():
    joiner, left = feed(item_event("i", T0, 7, {"price": 3}, True), user_event("u", T0 + 1, 1, {"age": 3}))
    assert (left, joiner.take_counts().dropped, joiner.has_open) == ([[], []], {}, False)


def test_users_and_items_that_are_put_do_not_move_event_time():
    later = T0 + 300 * 86_400_000
    joiner, left = feed(
        request(0), item_event("i", later, 7, {"price": 3}, True), user_event("u", later, 1, {}), click(5), tick(20)
    )
    assert left == [[], [], [], [(1, "clicked")], []]
    assert (joiner.take_counts().late, joiner.watermark_ms) == (0, T0 + 20_000 - OPTIONS.allowed_lateness_ms)


def test_before_any_event_there_is_no_watermark():
    joiner = joiner_of([])
    assert (joiner.clock, joiner.watermark_ms, joiner.flush()) == (Clock(), None, [])


def random_log(seed: int, size: int) -> list[Record]:
    """Events of few users and request ids, out of order, with everything that can go wrong."""
    draw = random.Random(seed)
    events: list[Event] = []
    for _ in range(size):
        at_s = len(events) * 12 + draw.choice([0, 0, 0, -20, -100, -700, -2000, -5000, 3, 9_000])
        name, user = (
            draw.choice([f"r{draw.randrange(len(events) // 8 + 1)}", f"r{len(events) // 8}"]),
            draw.randrange(2),
        )
        kind = draw.random()
        if kind < 0.02:
            events.append(user_deleted(f"d{len(events)}", T0 + max(0, at_s) * 1000, user))
        elif kind < 0.3:
            outcomes = draw.choices(["impressed", "rank_rejected", "ranked_not_shown", "clicked"], [6, 2, 2, 1], k=3)
            events.append(request(max(0, at_s), name, user, outcomes=outcomes))
        elif kind < 0.8:
            events.append(click(max(0, at_s), draw.randrange(5), draw.choice([name, name, name, None]), user))
        else:
            events.append(shown(max(0, at_s), draw.randrange(5), request_id=name))
    return log_of(*events)


@pytest.mark.parametrize("seed", range(15))
def test_a_joiner_that_is_made_again_from_the_log_goes_on_as_if_nothing_had_been(seed: int):
    records = random_log(seed, 250)
    draw = random.Random(seed)
    flushed = set(draw.sample(range(len(records)), 3))

    def run(killed: set[int]) -> tuple[list[Row], list[object]]:
        joiner, rows, flushes, counts = joiner_of(records, SHORT), [], [], []
        for place, record in enumerate(records):
            if place in flushed and joiner.has_open:
                rows += joiner.flush()
                flushes.append(record.offset)
            if place in killed:
                counts.append(joiner.take_counts())
                replay = joiner.replay(record.offset)

                def again(begin: int = replay.offset, end: int = record.offset) -> Iterator[Record]:
                    return (record for record in records if begin <= record.offset < end)

                joiner = joiner_of(records, SHORT)
                joiner.resume(replay, [offset for offset in flushes if offset > replay.offset], again(), record.offset)
            rows += joiner.feed(record)
        rows += joiner.flush()
        counts.append(joiner.take_counts())
        fields = ("late", "duplicates", "unjoined", "before_request", "events")
        return rows, [sum(getattr(one, name) for one in counts) for name in fields]

    undisturbed = run(set())
    assert run(set(draw.sample(range(len(records)), 20))) == undisturbed
    assert run(set(range(len(records)))) == undisturbed


@pytest.mark.parametrize("seed", range(15))
def test_what_is_erased_before_a_joiner_is_made_again_changes_nothing_for_others(seed: int):
    records = random_log(seed, 250)
    draw = random.Random(seed)

    def run(later: list[Record], place: int, flushed: int) -> list[tuple[int, list[Row]]]:
        """Rows by the offset at which they leave; at `place` the joiner is made again, and reads `later` from then."""
        joiner, left, flushes = joiner_of(records, SHORT), list[tuple[int, list[Row]]](), list[int]()
        for number in range(len(records)):
            record = (records if number < place else later)[number]
            if number == flushed and joiner.has_open:
                left.append((record.offset, joiner.flush()))
                flushes.append(record.offset)
            if number == place:
                replay = joiner.replay(record.offset)
                again = (one for one in later if replay.offset <= one.offset < record.offset)
                joiner = joiner_of(later, SHORT)
                joiner.resume(replay, flushes, again, record.offset)
            left.append((record.offset, joiner.feed(record)))
        return [*left, (records[-1].next_offset, joiner.flush())]

    for deletion in (record for record in records if record.event.type == "user"):
        gone, places = deletion.event.user_id, (draw.randrange(250), draw.randrange(250))
        later = [
            record_of(record.offset, record.next_offset, erased_payload(payload_of(record.event, record.logged_ms)))
            if record.event.user_id == gone and record.offset < deletion.offset
            else record
            for record in records
        ]
        undisturbed, found = (
            [
                row
                for at, rows in run(one, *places)
                for row in rows
                if row.request.user_id != gone or at > deletion.offset
            ]
            for one in (records, later)
        )
        assert found == undisturbed


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_and_nothing_leaves_twice(seed: int):
    records = [record for record in random_log(seed, 250) if record.event.type != "user"]
    joiner = joiner_of(records, replace(SHORT, remember_s=10**6))  # nothing is forgotten
    rows = [row for record in records for row in joiner.feed(record)] + joiner.flush()
    clicked = {
        (e.user_id, e.request_id, e.body["item_id"])
        for e in (record.event for record in records)
        if e.type == "click" and e.request_id
    }
    first: dict[tuple[object, object], Event] = {}
    for event in (record.event for record in records):
        if event.type == "request":
            first.setdefault((event.user_id, event.request_id), event)
    for (user, name), event in first.items():
        pairs = zip(event.body["items"], event.body["outcomes"], strict=True)
        clicked |= {(user, name, item) for item, outcome in pairs if outcome == "clicked"}
    named = [
        (row.request.user_id, row.request.request_id, row.item_id, row.outcome)
        for row in rows
        if row.request.request_id
    ]
    assert sorted(key[:3] for key in named if key[3] == "clicked") == sorted(clicked)
    assert len(named) == len(set(named))
    unnamed = sum(record.event.type == "click" and record.event.request_id is None for record in records)
    assert sum(row.request.request_id is None for row in rows) == unnamed
    got = {key[:3] for key in named}
    assert {(user, name, item) for (user, name), event in first.items() for item in event.body["items"]} <= got


def at(logged_s: float, event: Event, place: int) -> Record:
    """A record that the log stored at a time of its clock."""
    return Record(10 * place, 10 * place + 10, event, T0 + round(logged_s * 1000))


def test_event_time_never_stands_beyond_the_clock_of_the_log():
    records = [at(0, request(0), 0), at(1, tick(299), 1), at(2, tick(150), 2)]
    joiner = joiner_of(records)
    for record in records:
        joiner.feed(record)
        assert joiner.clock.latest_ms == record.logged_ms


def test_an_event_that_no_reader_can_use_moves_nothing_and_is_counted_by_its_reason():
    far = b'{"event_id": "far", "type": "click", "user_id": 1, "ts_ms": 1893456000000, "logged_ms": %d}' % T0
    records = [at(0, request(0), 0), record_of(10, 20, far), record_of(20, 30, b"no JSON"), at(1, click(1), 3)]
    joiner = joiner_of(records)
    left = [[(row.item_id, row.outcome) for row in joiner.feed(record)] for record in records]
    assert left == [[], [], [], [(1, "clicked")]]
    assert joiner.clock.latest_ms == T0 + 1000
    assert joiner.take_counts().dropped == {"unusable_beyond_clock": 1, "unusable_malformed": 1}


def test_when_the_clock_of_the_log_comes_back_event_time_does_and_later_requests_are_not_late():
    years_s = 10 * 365 * 86_400
    events = [(0, request(0, "before")), (years_s, request(years_s, "ahead")), (5, request(5, "after")), (6, tick(6))]
    records = [at(logged_s, event, place) for place, (logged_s, event) in enumerate(events)]
    joiner = joiner_of(records)
    left = [[(row.request.request_id, row.item_id) for row in joiner.feed(record)] for record in records]
    assert left[1] == [("before", 1), ("before", 2), ("before", 3)]  # closed early: the clock said so
    assert left[2] == [("ahead", 1), ("ahead", 2), ("ahead", 3)]
    assert joiner.clock.latest_ms == T0 + 6000
    counts = joiner.take_counts()
    assert (counts.clock_jumps, counts.late) == (1, 0)
    assert joiner.replay(40).offset == 20  # nothing of the wrong time is remembered
    assert [row.request.request_id for row in joiner.flush()] == ["after"] * 3


@pytest.mark.parametrize("seed", range(10))
def test_requests_for_which_there_is_no_room_leave_the_same_rows(seed: int, monkeypatch: pytest.MonkeyPatch):
    records = [record for record in random_log(seed, 250) if record.event.type != "user"]

    def run() -> list[list[Row]]:
        joiner = joiner_of(records, SHORT)
        return [*(joiner.feed(record) for record in records), joiner.flush()]

    held = run()
    monkeypatch.setattr(joiner_module, "MAX_HELD", 5)
    assert run() == held


def test_a_click_on_a_request_that_is_erased_by_now_leaves_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(joiner_module, "MAX_HELD", 0)
    records = log_of(request(0), click(5), tick(700))
    stub = record_of(0, 10, erased_payload(payload_of(records[0].event, LOGGED_MS)))
    joiner = joiner_of([stub, *records[1:]])
    rows = [row for record in records for row in joiner.feed(record)]
    assert [(row.request.user_id, row.item_id, row.outcome) for row in rows] == [(1, 1, "clicked")]
