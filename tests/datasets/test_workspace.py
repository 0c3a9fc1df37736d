import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets import workspace
from twotower.datasets.holdout import HoldoutRule, split
from twotower.datasets.tables import Source, assemble
from twotower.datasets.workspace import open_workspace, write_workspace
from twotower.schema.errors import ConfigError, DataError

DAY = 86_400_000
T = 17_000 * DAY  # 2016-07-18
COLUMNS = [
    {"table": "events", "column": name, "type": "int64", "missing": 0, "became": became, "note": ""}
    for name, became in (("user_id", "user_id"), ("item_id", "item_id"), ("ts_ms", "request_ts_ms, click_ts_ms"))
]


def tables():
    rows = {
        "user_id": [1, 1, 2, 1, 3],
        "item_id": [1, 2, 1, 1, 2],
        "ts_ms": [T, T + 1, T + DAY, T + 3 * DAY, T + 4 * DAY],
    }
    return assemble(Source("shop", pa.table(rows)))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_workspace_has_one_file_of_events_a_day(tmp_path):
    report = write_workspace(tmp_path / "w", tables())
    assert files(tmp_path / "w") == [
        "events/date=2016-07-18/part-0.parquet",
        "events/date=2016-07-19/part-0.parquet",
        "events/date=2016-07-21/part-0.parquet",
        "events/date=2016-07-22/part-0.parquet",
        "items.parquet",
        "users.parquet",
        "workspace.json",
    ]
    assert vars(report) == {
        "workspace": str(tmp_path / "w"),
        "users": 3,
        "items": 2,
        "events": 5,
        "holdout": 0,
        "holdout_cold": 0,
        "train_positives": 0,
        "dropped": {},
        "examples": {},
        "columns": COLUMNS,
        "not_read": [],
    }
    first = pq.ParquetFile(tmp_path / "w/events/date=2016-07-18/part-0.parquet")
    assert "date" not in first.schema_arrow.names
    assert first.metadata.row_group(0).column(0).compression == "ZSTD"
    assert first.read()["event_seq"].to_pylist() == [0, 1]


def test_a_hold_out_adds_three_tables_and_is_no_event(tmp_path):
    whole = tables()
    report = write_workspace(tmp_path / "w", whole, split(whole, HoldoutRule("time", 0.7)), {"holdout": "time:0.7"})
    assert (report.events, report.holdout, report.holdout_cold, report.train_positives) == (3, 1, 1, 3)
    read = open_workspace(tmp_path / "w")
    assert read.holdout().to_pydict() == {"user_id": [1], "item_id": [1], "ts_ms": [T + 3 * DAY]}
    assert read.holdout_cold()["reason"].to_pylist() == ["new_user"]
    assert read.train_positives().column_names == ["user_id", "item_id", "ts_ms"]
    assert read.dates() == ["2016-07-18", "2016-07-19"]
    assert read.users()["user_id"].to_pylist() == [1, 2, 3]
    assert read.items()["item_id"].to_pylist() == [1, 2]
    manifest = json.loads((tmp_path / "w/workspace.json").read_text())
    assert manifest == {
        "format": 1,
        "source": "shop",
        "arguments": {"holdout": "time:0.7"},
        "counts": {"users": 3, "items": 2, "events": 3, "holdout": 1, "holdout_cold": 1, "train_positives": 3},
        "dropped": {},
        "examples": {},
        "columns": COLUMNS,
        "not_read": [],
    }


def test_events_are_read_back_by_days(tmp_path):
    whole = tables()
    write_workspace(tmp_path / "w", whole)
    read = open_workspace(tmp_path / "w")
    assert read.events().equals(whole.events)
    assert read.events("2016-07-19", "2016-07-21")["event_seq"].to_pylist() == [2, 3]
    assert read.events(last_day="2016-07-18")["event_seq"].to_pylist() == [0, 1]
    with pytest.raises(DataError, match="none in the range"):
        read.events("2017-01-01")


def test_without_a_time_the_only_partition_is_unknown(tmp_path):
    write_workspace(tmp_path / "w", assemble(Source("shop", pa.table({"user_id": [1, 2], "item_id": [1, 2]}))))
    assert open_workspace(tmp_path / "w").dates() == ["unknown"]
    assert open_workspace(tmp_path / "w").events().num_rows == 2


def test_the_same_tables_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_workspace(tmp_path / name, tables(), split(tables(), HoldoutRule("time", 0.7)))
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "w").mkdir()
    write_workspace(tmp_path / "w", tables())
    assert open_workspace(tmp_path / "w").events().num_rows == 5


def test_a_workspace_is_never_replaced(tmp_path):
    write_workspace(tmp_path / "w", tables())
    with pytest.raises(ConfigError, match="is a workspace already: give another path, or remove it first"):
        write_workspace(tmp_path / "w", tables())


def test_a_folder_with_other_things_and_a_file_are_refused_and_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty, it holds thesis\.txt"):
        write_workspace(tmp_path / "w", tables())
    assert files(tmp_path) == ["w/thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        write_workspace(tmp_path / "w/thesis.txt", tables())


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(workspace, "_write_events", full)
    with pytest.raises(OSError, match="no space left"):
        write_workspace(tmp_path / "w", tables())
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_that_came_first_stays(tmp_path, monkeypatch):
    def meanwhile(events, folder):
        (tmp_path / "w").mkdir()
        (tmp_path / "w/users.parquet").write_text("theirs")

    monkeypatch.setattr(workspace, "_write_events", meanwhile)
    with pytest.raises(ConfigError, match="is a workspace already"):
        write_workspace(tmp_path / "w", tables())
    assert files(tmp_path) == ["w/users.parquet"]


def test_what_a_killed_import_leaves_is_no_workspace_and_no_obstacle(tmp_path):
    left = tmp_path / ".tmp-w"
    left.mkdir()
    (left / "users.parquet").write_text("half")
    with pytest.raises(DataError, match=r"is no workspace, it has no users\.parquet, items\.parquet, events"):
        open_workspace(tmp_path / "w")
    write_workspace(tmp_path / "w", tables())
    assert not left.exists()


def test_events_out_of_order_are_a_defect(tmp_path):
    with pytest.raises(AssertionError, match="order of time"):
        workspace._write_events(tables().events.take(pa.array([4, 0])), tmp_path)


def test_a_damaged_table_names_its_file(tmp_path):
    write_workspace(tmp_path / "w", tables())
    (tmp_path / "w/users.parquet").write_bytes(b"PAR1 no longer")
    with pytest.raises(DataError, match=r"users\.parquet is no readable Parquet"):
        open_workspace(tmp_path / "w").users()
    with pytest.raises(DataError, match=r"holdout\.parquet does not exist"):
        open_workspace(tmp_path / "w").holdout()
