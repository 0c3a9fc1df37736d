"""Daily partitions beside imported ones: samples and the workspace read both as one log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.datasets.workspace import open_workspace
from twotower.logs import Event, LocalEventLog
from twotower.pipeline.line import build_samples
from twotower.pipeline.streaming import join_log
from twotower.schema.errors import ConfigError
from twotower.stream.days import joined_path
from twotower.stream.rows import as_value, read_types
from twotower.stream.shards import manifests

DAY_MS = 86_400_000


@pytest.fixture
def serve_a_day(own_world: Settings) -> Callable[[list[dict[str, Any]]], Path]:
    """Puts requests with a click each into the workspace's log, on the day after its last; gives the workspace."""

    def served(asked: list[dict[str, Any]]) -> Path:
        workspace = Path(own_world.workspace.path)
        first_ms = _begin_ms(open_workspace(workspace))
        events = []
        for n, given in enumerate(asked):
            user, items, context = given["user"], given["items"], given.get("context", {"hour": 3, "scene": "home"})
            ts_ms = first_ms + 1000 * n
            body = {
                "items": items, "outcomes": ["impressed"] + ["rank_rejected"] * (len(items) - 1), "context": context,
            }  # fmt: skip
            events.append(Event(f"q{n}", "request", user, ts_ms, f"new{n}", body))
            events.append(Event(f"c{n}", "click", user, ts_ms + 500, f"new{n}", {"item_id": items[0]}))
        log = LocalEventLog.open(workspace / "log", partitions=4, sync="never")
        log.append(events)
        log.close()
        return workspace

    return served


def _begin_ms(workspace: Any) -> int:
    """The beginning of the day after the last one of the log and its hold-out."""
    return (max(workspace.holdout()["ts_ms"].to_pylist()) // DAY_MS + 1) * DAY_MS


def test_samples_read_what_was_served_together_with_what_was_imported(own_world: Settings, serve_a_day) -> None:
    workspace = Path(own_world.workspace.path)
    users = open_workspace(workspace).users()["user_id"].to_pylist()
    items = open_workspace(workspace).items()["item_id"].to_pylist()
    before = build_samples(own_world)
    imported = {path: path.read_bytes() for path in (workspace / "events").rglob("*.parquet")}
    served = [{"user": users[n % 50], "items": items[n % 40 : n % 40 + 10]} for n in range(100)]
    serve_a_day(served)
    report = join_log(own_world, follow=False, flush=True, share="1/1")
    assert (report.rows, report.outcomes) == (1000, {"clicked": 100, "rank_rejected": 900})
    assert {path: path.read_bytes() for path in imported} == imported
    after = build_samples(own_world)
    assert after.events == before.events + 1000
    assert after.positives == before.positives + 100
    assert after.dropped == before.dropped
    assert (after.watermark_ms or 0) > (before.watermark_ms or 0)
    events = open_workspace(workspace).events()
    assert events.num_rows == after.events
    assert events["event_seq"].to_pylist()[-1000:] == sorted(set(events["event_seq"].to_pylist()))[-1000:]
    assert set(events["request_id"].to_pylist()[-1000:]) == {f"new{n}" for n in range(100)}


def test_users_and_items_that_the_tables_do_not_have_are_counted_by_samples(own_world: Settings, serve_a_day) -> None:
    workspace = Path(own_world.workspace.path)
    items = open_workspace(workspace).items()["item_id"].to_pylist()
    user = open_workspace(workspace).users()["user_id"][0].as_py()
    before = build_samples(own_world).dropped
    serve_a_day([{"user": 10**9, "items": items[:3]}, {"user": user, "items": ["a new item", *items[:2]]}])
    report = join_log(own_world, follow=False, flush=True, share="1/1")
    assert report.rows == 6
    dropped = build_samples(own_world).dropped
    assert dropped.get("unknown_user", 0) - before.get("unknown_user", 0) == 3
    assert dropped.get("unknown_item", 0) - before.get("unknown_item", 0) == 1


def test_a_joined_file_has_the_columns_and_types_of_an_imported_one(own_world: Settings, serve_a_day) -> None:
    workspace = Path(own_world.workspace.path)
    items = open_workspace(workspace).items()["item_id"].to_pylist()
    imported = pq.read_schema(next((workspace / "events").rglob("part-0.parquet")))
    serve_a_day([{"user": 1, "items": items[:3], "context": {"hour": 3.0, "scene": 5}}])
    report = join_log(own_world, follow=False, flush=True, share="1/1")
    assert report.dropped == {"bad_value": 1}
    [path] = (workspace / "events").rglob("joined-*.parquet")
    joined = pq.read_schema(path)
    assert {field.name: joined.field(field.name).type for field in imported} == {f.name: f.type for f in imported}
    assert set(joined.names) - set(imported.names) == {"probability", "propensity"}
    rows = pq.ParquetFile(path).read().to_pylist()
    assert [(row["hour"], row["scene"], row["outcome"]) for row in rows] == [
        (3, None, "clicked"), (3, None, "rank_rejected"), (3, None, "rank_rejected"),
    ]  # fmt: skip


def test_a_day_that_was_removed_or_damaged_is_written_again(own_world: Settings, serve_a_day) -> None:
    workspace = Path(own_world.workspace.path)
    items = open_workspace(workspace).items()["item_id"].to_pylist()
    serve_a_day([{"user": 1, "items": items[:3]}])
    [day] = join_log(own_world, follow=False, flush=True, share="1/1").days
    [path] = (workspace / "events").rglob("joined-*.parquet")
    data = path.read_bytes()
    for content in (None, b"damaged"):
        path.unlink()
        if content:
            path.write_bytes(content)
        assert join_log(own_world, follow=False, flush=False, share="1/1").days == [day]
        assert path.read_bytes() == data
    [partition] = [number for number in range(4) if manifests(workspace / "shards", number)]
    assert path == joined_path(workspace / "events", day, partition)


def test_events_without_time_get_shards_and_no_days(odd_world: Settings, own_world: Settings, serve_a_day) -> None:
    workspace = Path(own_world.workspace.path)
    items = open_workspace(workspace).items()["item_id"].to_pylist()
    serve_a_day([{"user": 1, "items": items[:3]}])
    (workspace / "events" / "date=unknown").mkdir()
    report = join_log(own_world, follow=False, flush=True, share="1/1")
    assert (report.rows, report.days) == (3, [])


@pytest.mark.parametrize("share", ["0/1", "2/1", "1", "a/b", "1/0"])
def test_a_share_that_is_none_is_refused(own_world: Settings, serve_a_day, share: str) -> None:
    serve_a_day([])
    with pytest.raises(ConfigError, match="write K/N"):
        join_log(own_world, follow=False, flush=False, share=share)


def test_types_are_those_of_the_workspace(world: Settings, odd_world: Settings) -> None:
    types = read_types(Path(world.workspace.path), world.features.user, world.features.context)
    assert (types.user_id, types.item_id) == (pa.int64(), pa.string())
    assert types.context == {"hour": pa.int64(), "scene": pa.string()}
    assert types.features == {name: pa.string() for name in ("gender", "city", "device")} | {"age": pa.float32()}
    odd = read_types(Path(odd_world.workspace.path), odd_world.features.user, odd_world.features.context)
    assert (odd.user_id, odd.item_id) == (pa.string(), pa.int64())


def test_a_user_feature_that_no_table_has_is_refused(world: Settings) -> None:
    with pytest.raises(ConfigError, match=r"features\.user\.mood: users\.parquet has no such column"):
        read_types(Path(world.workspace.path), {"mood": world.features.user["city"]}, {})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("1", pa.int64()), (1.5, pa.int64()), (2**63, pa.int64()), (2**31, pa.int32()), (1, pa.string()),
        (1, pa.bool_()), ("x", pa.float32()), (1e300, pa.float32()), ("a", pa.list_(pa.string())),
        ([1], pa.list_(pa.string())),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(value: Any, kind: pa.DataType) -> None:
    with pytest.raises(ValueError):
        as_value(value, kind)


def test_null_and_what_is_no_number_are_missing() -> None:
    assert as_value(None, pa.int64()) is as_value(float("nan"), pa.float32()) is None
    assert as_value([1, None], pa.list_(pa.int64())) == [1]
