"""The joiner over a log on disk: shards, daily partitions, and what is left when it is interrupted."""

import dataclasses
import hashlib
import random
import uuid
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.logs import Event, LocalEventLog, open_log, partition_of
from twotower.logs.events import user_deleted
from twotower.logs.options import EventLogOptions
from twotower.schema.clock import day_of
from twotower.schema.errors import DataError
from twotower.stream import join as join_module
from twotower.stream.join import JoinReport, Taken, join
from twotower.stream.options import StreamOptions
from twotower.stream.rows import Types
from twotower.stream.shards import manifests, partitions, read_rows
from twotower.update.full import due_days

T0, HOUR_MS = 1_700_006_400_000, 3_600_000
OPTIONS = StreamOptions(window_s=600, allowed_lateness_s=30, remember_s=3600, shard_events=50, merged_mb=1024)


@pytest.fixture
def run(tmp_path: Path, types: Types) -> Callable[..., JoinReport]:
    """Joins a log into `out` of the test's folder."""

    def ran(log_folder: Path, out: str = "out", **options: object) -> JoinReport:
        names = {field.name for field in dataclasses.fields(OPTIONS)}
        own = dataclasses.replace(OPTIONS, **{name: options.pop(name) for name in names & options.keys()})
        given: dict[str, object] = {"flush": True, **options}
        folder = tmp_path / out
        with closing(LocalEventLog.reader(log_folder)) as event_log:
            return join(event_log, folder / "shards", folder / "events", types, own, **given)  # type: ignore[arg-type]

    return ran


def rows_of(folder: Path) -> list[pa.Table]:
    return [read_rows(folder / "shards", partition) for partition in partitions(folder / "shards")]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_request_leaves_once_and_every_click_too(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(400)
    report = run(make_log(events))
    rows = pa.concat_tables(rows_of(tmp_path / "out"))
    assert report.rows == rows.num_rows
    assert report.events == len(events)
    clicks = {(e.user_id, e.request_id, e.body["item_id"]) for e in events if e.type == "click"}
    assert report.duplicates == sum(e.type == "click" for e in events) - len(clicks)
    clicked = [row for row in rows.to_pylist() if row["outcome"] == "clicked"]
    assert sorted((row["user_id"], row["request_id"], row["item_id"]) for row in clicked) == sorted(clicks)
    assert [row for row in clicked if not row["history"] or row["version"] != "v1"] == []
    assert report.late > 0
    assert rows.num_rows == 400 * 5 + report.late


def test_a_daily_partition_has_each_item_of_a_request_once(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(400)
    report = run(make_log(events))
    files = sorted((tmp_path / "out" / "events").rglob("*.parquet"))
    assert [str(path.relative_to(tmp_path / "out" / "events")) for path in files] == [
        f"date={day}/joined-{partition:04d}.parquet" for day in report.days for partition in (0, 1)
    ]
    assert report.days == ["2023-11-14", "2023-11-15"]
    table = pa.concat_tables([pq.ParquetFile(path).read() for path in files])
    keys = [(row["user_id"], row["request_id"], row["item_id"]) for row in table.to_pylist()]
    assert len(keys) == len(set(keys)) == 400 * 5
    clicks = {(e.user_id, e.request_id, e.body["item_id"]) for e in events if e.type == "click"}
    assert {key for key, row in zip(keys, table.to_pylist(), strict=True) if row["outcome"] == "clicked"} == clicks
    sequence = table["event_seq"].to_pylist()
    assert len(set(sequence)) == len(sequence)
    for path in files:
        own = pq.ParquetFile(path).read()
        assert own["request_ts_ms"].to_pylist() == sorted(own["request_ts_ms"].to_pylist())
        assert own["event_seq"].to_pylist() == sorted(own["event_seq"].to_pylist())
        assert {f"date={day_of(ts_ms)}" for ts_ms in own["request_ts_ms"].to_pylist()} == {path.parent.name}


def test_what_is_joined_in_pieces_is_what_is_joined_at_once(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(300)
    run(make_log(events), "whole")
    draw = random.Random(0)
    done = 0
    while done < len(events):
        done += draw.choice([1, 5, 40])
        run(make_log(events[:done]), "pieces", shard_events=draw.choice([3, 50]), flush=False)
    run(make_log(events), "pieces")
    assert rows_of(tmp_path / "pieces") == rows_of(tmp_path / "whole")
    assert hashes(tmp_path / "pieces" / "events") == hashes(tmp_path / "whole" / "events")


def test_a_second_run_has_nothing_to_do(run, make_log, make_events, tmp_path: Path) -> None:
    log = make_log(make_events(100))
    first = run(log)
    before = hashes(tmp_path / "out")
    again = run(log)
    assert (again.shards, again.rows, again.events, again.days) == (0, 0, 0, [])
    assert again.watermark_ms == first.watermark_ms
    assert hashes(tmp_path / "out") == before


def test_without_a_flush_open_windows_wait_for_more(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(50)
    waiting = run(make_log(events), flush=False)
    assert waiting.outcomes.get("rank_rejected", 0) < 2 * 50
    later = run(make_log([*events, *make_events(5, seed=3)[:0]]), flush=True)
    assert waiting.outcomes["rank_rejected"] + later.outcomes["rank_rejected"] == 2 * 50


def test_a_click_after_a_flush_takes_the_place_of_its_impression(run, make_log, make_events, tmp_path: Path) -> None:
    events = [event for event in make_events(40) if event.type == "request"]
    run(make_log(events))
    asked = events[-1]
    late = Event(
        "late", "click", asked.user_id, asked.ts_ms + 5000, asked.request_id, {"item_id": asked.body["items"][0]}
    )
    report = run(make_log([*events, late]))
    assert (report.late, report.rows, report.days) == (1, 1, [day_of(asked.ts_ms)])
    rows = pa.concat_tables([pq.ParquetFile(path).read() for path in (tmp_path / "out" / "events").rglob("*.parquet")])
    assert rows.num_rows == 40 * 5
    [row] = [row for row in rows.to_pylist() if row["outcome"] == "clicked"]
    assert (row["request_id"], row["position"], row["click_ts_ms"]) == (asked.request_id, 1, asked.ts_ms + 5000)
    shards = [row["outcome"] for row in pa.concat_tables(rows_of(tmp_path / "out")).to_pylist()
              if (row["request_id"], row["item_id"]) == (row["request_id"], asked.body["items"][0])
              and row["request_id"] == asked.request_id]  # fmt: skip
    assert shards == ["impressed", "clicked"]


def test_small_shards_are_merged_by_the_hour_and_rows_keep_their_numbers(run, make_log, make_events, tmp_path) -> None:
    log = make_log(make_events(400))
    with pytest.MonkeyPatch.context() as unmerged:
        unmerged.setattr(join_module.PartitionJoin, "merge_hours", lambda _: None)
        run(log, "small")
    run(log, "merged")
    small, merged = (manifests(tmp_path / out / "shards", 0) for out in ("small", "merged"))
    assert len(small) > len(merged)
    hours = [shard.hour for shard in merged[:-2]]
    assert len(set(hours)) == len(hours)
    assert rows_of(tmp_path / "small") == rows_of(tmp_path / "merged")
    assert (small[-1].end_row, small[-1].end) == (merged[-1].end_row, merged[-1].end)
    left = {path.name.split(".")[0] for path in (tmp_path / "merged" / "shards" / "partition-0000").glob("*.tfrecord")}
    assert left == {shard.name for shard in merged}
    rows = rows_of(tmp_path / "small")[0]
    for first in range(0, rows.num_rows, 37):
        assert read_rows(tmp_path / "merged" / "shards", 0, first, 37) == rows.slice(first, 37)


def test_merged_shards_have_the_same_bytes_wherever_the_small_ones_ended(run, make_log, make_events, tmp_path) -> None:
    log = make_log(make_events(400))
    for out, size in (("a", 7), ("b", 60)):
        run(log, out, shard_events=size)
    a, b = (
        {path.name: path.read_bytes() for path in (tmp_path / out / "shards" / "partition-0001").glob("*.tfrecord")}
        for out in ("a", "b")
    )
    common = set(a) & set(b)
    assert len(common) >= len(b) - 3
    assert all(a[name] == b[name] for name in common)


def test_a_deleted_user_is_gone_from_the_days_and_may_come_back(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(200)
    run(make_log(events))
    before = read_days(tmp_path / "out" / "events")
    last_ms = max(event.ts_ms for event in events)
    deletion = user_deleted("gone", last_ms + 1, 3)
    assert run(make_log([*events, deletion])).days == ["2023-11-14", "2023-11-15"]
    after = read_days(tmp_path / "out" / "events")
    assert [row for row in after if row["user_id"] == 3] == []
    assert _plain(after) == _plain(row for row in before if row["user_id"] != 3)
    back = Event("back", "click", 3, last_ms + 5000, None, {"item_id": "item 1"})
    assert run(make_log([*events, deletion, back])).days == ["2023-11-15"]
    assert [row["item_id"] for row in read_days(tmp_path / "out" / "events") if row["user_id"] == 3] == ["item 1"]
    assert run(make_log([*events, deletion, back])).days == []
    run(make_log([*events, deletion, back]), "at once")
    assert _plain(read_days(tmp_path / "at once" / "events")) == _plain(read_days(tmp_path / "out" / "events"))


def read_days(events: Path) -> list[dict[str, object]]:
    return pa.concat_tables([pq.ParquetFile(path).read() for path in sorted(events.rglob("*.parquet"))]).to_pylist()


def _plain(rows: Iterable[dict[str, object]]) -> list[dict[str, object]]:
    """Rows without their numbers."""
    return [{name: value for name, value in row.items() if name != "event_seq"} for row in rows]


class Killed(Exception):
    """Stands for a kill at a moment of the commit."""


@pytest.mark.parametrize("moment", ["write_records", "write_manifest", "merge", "write_day"])
@pytest.mark.parametrize("seed", range(3))
def test_a_joiner_that_ends_within_a_commit_loses_and_doubles_nothing(
    run, make_log, make_events, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, seed: int
) -> None:
    from twotower.stream import shards as shards_module

    log = make_log(make_events(300, seed))
    run(log, "undisturbed")
    where = join_module if moment in ("merge", "write_day") else shards_module
    original, draw = getattr(where, moment), random.Random(seed)

    def dying(*arguments: object, **named: object) -> object:
        if draw.random() < 0.3:
            if draw.random() < 0.5:
                original(*arguments, **named)
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(where, moment, dying)
    killed = 0
    for _ in range(200):
        try:
            run(log, "disturbed")
            break
        except Killed:
            killed += 1
    assert killed
    assert hashes(tmp_path / "disturbed" / "events") == hashes(tmp_path / "undisturbed" / "events")
    assert rows_of(tmp_path / "disturbed") == rows_of(tmp_path / "undisturbed")
    names = ("late", "duplicates", "unjoined", "events")
    counted = []
    for out in ("disturbed", "undisturbed"):
        counts = [shard.counts for partition in (0, 1) for shard in manifests(tmp_path / out / "shards", partition)]
        counted.append([sum(getattr(one, name) for one in counts) for name in names])
    assert counted[0] == counted[1]


def test_joiners_share_partitions_and_none_takes_anothers(run, make_log, make_events, tmp_path: Path, types) -> None:
    log = make_log(make_events(200))
    run(log, "one")
    first, second = run(log, "two", share=(1, 2)), run(log, "two", share=(2, 2))
    assert first.rows > 0 < second.rows
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    reader = LocalEventLog.reader(log)
    held = join_module.PartitionJoin(reader, tmp_path / "two" / "shards", 1, types, OPTIONS)
    run(log, "two", share=(1, 2))
    with pytest.raises(Taken, match="another joiner has"):
        run(log, "two")
    held.close()
    reader.close()
    run(log, "two")


def test_another_log_is_refused(run, make_log, make_events) -> None:
    run(make_log(make_events(100)))
    with pytest.raises(DataError, match=r"not of this log|is it another log"):
        run(make_log(make_events(10), "other"))


def test_a_damaged_shard_is_named(run, make_log, make_events, tmp_path: Path) -> None:
    run(make_log(make_events(100)))
    path = next((tmp_path / "out" / "shards").rglob("*.others.tfrecord"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=f"{path.name}.*is damaged"):
        rows_of(tmp_path / "out")


def test_a_shard_of_fewer_rows_than_its_manifest_says_is_named(run, make_log, make_events, tmp_path: Path) -> None:
    run(make_log(make_events(100)))
    shard = manifests(tmp_path / "out" / "shards", 0)[0]
    path = tmp_path / "out" / "shards" / "partition-0000" / f"{shard.name}.positives.tfrecord"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"has 0 rows, the manifest says {shard.files['positives'].rows}"):
        rows_of(tmp_path / "out")


def test_a_shard_that_is_missing_in_between_is_seen(run, make_log, make_events, tmp_path: Path) -> None:
    run(make_log(make_events(300)))
    shard = manifests(tmp_path / "out" / "shards", 0)[1]
    (tmp_path / "out" / "shards" / "partition-0000" / f"{shard.name}.json").unlink()
    with pytest.raises(DataError, match="restore the shards in between"):
        manifests(tmp_path / "out" / "shards", 0)


def test_only_the_manifests_that_hold_wanted_rows_are_read(run, make_log, make_events, tmp_path: Path) -> None:
    run(make_log(make_events(300)))
    every = manifests(tmp_path / "out" / "shards", 0)
    (tmp_path / "out" / "shards" / "partition-0000" / f"{every[0].name}.json").write_text("damaged")
    assert manifests(tmp_path / "out" / "shards", 0, every[2].first_row) == every[2:]
    assert read_rows(tmp_path / "out" / "shards", 0, every[2].first_row + 1, 3).num_rows == 3
    assert read_rows(tmp_path / "out" / "shards", 0, every[-1].end_row).num_rows == 0


def test_manifests_come_back_as_they_were_written(run, make_log, make_events, tmp_path: Path) -> None:
    run(make_log(make_events(100)))
    for shard in manifests(tmp_path / "out" / "shards", 0):
        assert shard.rows == sum(shard.outcomes.values()) == sum(day.rows for day in shard.days.values())
        assert dataclasses.replace(shard) == shard
        assert shard.schema.names[:3] == ["request_id", "user_id", "item_id"]


def test_following_goes_on_until_it_is_stopped(run, make_log, make_events, tmp_path: Path) -> None:
    events = make_events(200)
    run(make_log(events), "once")
    seen = iter([len(events) // 2] * 10 + [len(events)] * 10)

    def stopped() -> bool:
        more = next(seen, None)
        if more is not None:
            make_log(events[:more], "live")
        return more is None

    make_log([], "live")
    run(tmp_path / "live", "followed", follow=True, follow_s=0.01, stopped=stopped, shard_events=10_000)
    assert rows_of(tmp_path / "followed") == rows_of(tmp_path / "once")
    assert hashes(tmp_path / "followed" / "events") == hashes(tmp_path / "once" / "events")


@pytest.mark.parametrize("kind", ["local", "redis", "kafka"])
def test_every_kind_of_log_gives_the_same_rows(
    kind: str, make_events, tmp_path: Path, types: Types, request: pytest.FixtureRequest
) -> None:
    name = f"test-{uuid.uuid4().hex}"
    url = None
    if kind == "redis":
        url = request.getfixturevalue("redis_url")
    elif kind == "kafka":
        url = request.getfixturevalue("kafka_servers")(name)
    events = make_events(200)
    logs = {
        own: open_log(EventLogOptions(kind=own, url=url, name=name), tmp_path / own)  # type: ignore[arg-type]
        for own in dict.fromkeys(["local", kind])
    }
    for log in logs.values():
        for begin in range(0, len(events), 50):
            log.append(events[begin : begin + 50])
    for own, log in logs.items():
        folder = tmp_path / "out" / own
        for flush in (False, True):  # in two parts: the second begins with what the first remembered
            options = dataclasses.replace(OPTIONS, shard_events=37)
            join(log, folder / "shards", folder / "events", types, options, flush=flush)
        log.close()
    assert rows_of(tmp_path / "out" / kind) == rows_of(tmp_path / "out" / "local")
    assert hashes(tmp_path / "out" / kind / "events") == hashes(tmp_path / "out" / "local" / "events")


def day_events(day: int, users: Iterable[int], hour: int = 12, name: str = "") -> list[Event]:
    """A shown page of each user at an hour of a day."""
    ts_ms = T0 + (24 * day + hour) * HOUR_MS
    body = {"items": ["item 1", "item 2"], "outcomes": ["clicked", "impressed"]}
    return [Event(f"{name}{day}-{user}", "request", user, ts_ms, f"{name}r{day}-{user}", body) for user in users]


def test_an_idle_partition_holds_nobody_and_its_day_is_whole(run, make_log, tmp_path: Path) -> None:
    by_partition = {partition: [u for u in range(40) if partition_of(u, 2) == partition] for partition in (0, 1)}
    folder = make_log([*day_events(0, range(40)), *day_events(1, by_partition[0][:1])])
    report = run(folder)
    assert report.watermark_ms == T0 + 36 * HOUR_MS
    out = tmp_path / "out"
    with closing(LocalEventLog.reader(folder)) as event_log:
        due = due_days(out / "events", out / "shards", "2023-01-01", event_log=event_log, idle_ms=600_000)
        assert due == [day_of(T0)]
        strict = due_days(out / "events", out / "shards", "2023-01-01", event_log=event_log, idle_ms=30 * HOUR_MS)
        assert strict == []
    with closing(LocalEventLog.open(folder, partitions=2)) as event_log:
        event_log.append(day_events(0, by_partition[1][:1], hour=13, name="late"))  # has something to be joined again
        assert due_days(out / "events", out / "shards", "2023-01-01", event_log=event_log, idle_ms=600_000) == []


def test_a_request_of_many_items_and_a_long_history_stays_small_and_shards_end_by_rows(
    run, make_log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join_module, "_SHARD_ROWS", 5_000)
    body = {"items": [f"i{n}" for n in range(4_000)], "outcomes": ["clicked"] * 4_000, "history": ["h"] * 1_000}
    report = run(make_log([Event(f"e{n}", "request", 1, T0 + n, f"r{n}", body) for n in range(4)]), shard_events=1000)
    assert report.outcomes == {"clicked": 16_000}
    shards = manifests(tmp_path / "out" / "shards", 0) or manifests(tmp_path / "out" / "shards", 1)
    assert max(shard.rows for shard in shards) == 8_000
    assert sum(shard.bytes for shard in shards) < 220 * 16_000
