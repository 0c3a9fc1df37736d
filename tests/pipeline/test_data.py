import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.workspace import open_workspace
from twotower.pipeline.data import import_tables, simulate
from twotower.schema.errors import ConfigError, DataError

COLUMNS = {
    "user_id": [f"u{i % 7}" for i in range(60)],
    "item_id": [i % 11 for i in range(60)],
    "ts_ms": [1_735_689_600_000 + 60_000 * i for i in range(60)],
    "device": [["phone", "web"][i % 2] for i in range(60)],
}


def as_file(columns, tmp_path):
    pq.write_table(pa.table(columns), tmp_path / "clicks.parquet")
    return tmp_path / "clicks.parquet"


@pytest.mark.parametrize(
    "make", [pd.DataFrame, pl.DataFrame, pa.table, dict], ids=["pandas", "polars", "arrow", "dict"]
)
def test_a_table_in_memory_makes_the_workspace_of_its_file(make, tmp_path):
    users = {"user_id": [f"u{i}" for i in range(7)], "age": list(range(20, 27))}
    expected = import_tables(tmp_path / "a", as_file(COLUMNS, tmp_path), holdout="time:0.8")
    report = import_tables(tmp_path / "b", make(COLUMNS), make(users), holdout="time:0.8")
    assert (report.events, report.holdout, report.dropped) == (expected.events, expected.holdout, expected.dropped)
    one, other = open_workspace(tmp_path / "a"), open_workspace(tmp_path / "b")
    assert one.events().equals(other.events())
    assert one.holdout().equals(other.holdout())
    assert other.users()["age"].to_pylist() == users["age"]


def test_rows_that_were_chosen_from_a_frame_bring_no_column_of_their_numbers(tmp_path):
    frame = pd.DataFrame(COLUMNS)
    import_tables(tmp_path / "w", frame[frame.item_id > 3])
    assert open_workspace(tmp_path / "w").events().column_names[-1] == "device"


def test_what_is_no_table_is_refused_by_its_name_and_nothing_is_written(tmp_path):
    for events, said in (
        (3, "events is a int: give a DataFrame"),
        ({"user_id": [1], "item_id": [1, 2]}, "events is no table"),
        ({"user_id": [1]}, "events has no column item_id"),
        ({"user_id": [1], "item_id": [1], "when": pa.array([0], pa.timestamp("ms"))}, "--time-column when"),
    ):
        with pytest.raises(DataError, match=said):
            import_tables(tmp_path / "w", events)
    with pytest.raises(ConfigError, match="positive"):
        import_tables(tmp_path / "w", COLUMNS, positive="many")
    assert not (tmp_path / "w").exists()


def test_times_of_a_frame_need_no_unit(tmp_path):
    frame = pd.DataFrame(COLUMNS)
    frame["when"] = pd.to_datetime(frame.pop("ts_ms"), unit="ms")
    import_tables(tmp_path / "w", frame, time_column="when")
    assert open_workspace(tmp_path / "w").events()["request_ts_ms"][0].as_py() == COLUMNS["ts_ms"][0]


def test_a_world_is_simulated(tmp_path):
    report = simulate(tmp_path / "w", users=120, items=110, days=2, seed=3)
    assert (report.users, report.items) == (120, 110)
