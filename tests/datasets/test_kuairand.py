import datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.kuairand import read_kuairand
from twotower.datasets.options import ImportOptions
from twotower.datasets.tables import assemble
from twotower.schema.errors import DataError

T = 1_651_503_840_581  # 2022-05-02, 15:04 UTC; 23:04 in UTC+8, logged under the next day


@pytest.fixture
def folder(tmp_path):
    log = {
        "user_id": pa.array([2, 1, 1], pa.int16()),
        "video_id": pa.array([10, 10, 11], pa.int16()),
        "time_ms": [T, T - 5, T - 5],
        "date": pa.array([20220503, 20220502, 20220502], pa.int32()),
        "hourmin": pa.array([0, 2300, 2300], pa.int16()),
        "tab": pa.array([1, 0, 0], pa.int8()),
        "is_click": pa.array([1, 0, 1], pa.int8()),
        "is_like": pa.array([0, 0, 0], pa.int8()),
    }
    pq.write_table(pa.table(log), tmp_path / "log_0425_0504.parquet")
    users = {
        "user_id": [1, 2, 3],
        "onehot_feat4": [1.0, None, float("nan")],
        "fans_user_num_range": ["0", "0", "[1,10)"],
    }
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    videos = {"video_id": [11, 10], "tag": ["39,2", None], "upload_dt": ["2022-04-10"] * 2, "music_type": [9.0, None]}
    pq.write_table(pa.table(videos), tmp_path / "videos.parquet")
    history = {
        "user_id": [3, 1],
        "history_len": [3, 1],
        "watch_seq": pa.array([[10, 99, 10], [11]], pa.large_list(pa.int64())),
    }
    pq.write_table(pa.table(history), tmp_path / "user_history_before_0425.parquet")
    return tmp_path


def test_every_impression_is_an_event_with_its_scene(folder):
    events = assemble(read_kuairand(folder, ImportOptions())).events
    assert events.drop_columns(["event_seq", "request_id", "weight"]).to_pydict() == {
        "user_id": [1, 1, 2],
        "item_id": [10, 11, 10],
        "request_ts_ms": [T - 5, T - 4, T],
        "click_ts_ms": [None, T - 4, T],
        "outcome": ["impressed", "clicked", "clicked"],
        "hour": [23, 23, 0],
        "tab": [0, 0, 1],
    }
    assert events["weight"].null_count == events["request_id"].null_count == 3


def test_the_day_is_that_of_the_log(folder):
    days = assemble(read_kuairand(folder, ImportOptions())).days.to_pylist()
    assert days == [datetime.date(2022, 5, 2)] * 2 + [datetime.date(2022, 5, 3)]


def test_prior_history_is_raw_in_its_order_and_empty_where_there_is_none(folder):
    users = assemble(read_kuairand(folder, ImportOptions())).users
    assert users["prior_history"].to_pylist() == [[11], [], [10, 99, 10]]
    assert users.schema.field("prior_history").type == pa.list_(pa.int64())


def test_codes_are_integers_and_missing_ones_null(folder):
    tables = assemble(read_kuairand(folder, ImportOptions()))
    assert tables.users["onehot_feat4"].to_pylist() == [1, None, None]
    assert tables.items.to_pylist()[1] == {"item_id": 11, "tag": "39,2", "upload_dt": "2022-04-10", "music_type": 9}
    assert tables.items.schema.field("music_type").type == pa.int64()


@pytest.mark.parametrize("name", ["log_0425_0504", "users", "videos", "user_history_before_0425"])
def test_a_missing_file_is_named(folder, name):
    (folder / f"{name}.parquet").unlink()
    with pytest.raises(DataError, match=name.rsplit("_0425", 1)[0]):
        read_kuairand(folder, ImportOptions())


@pytest.mark.parametrize(
    ("column", "value", "message"), [("is_click", 2, "is_click holds"), ("date", 2022, "YYYYMMDD")]
)
def test_strange_values_are_refused(folder, column, value, message):
    log = pq.read_table(folder / "log_0425_0504.parquet")
    bad = pa.array([value] * 3, pa.int32())
    pq.write_table(log.set_column(log.schema.get_field_index(column), column, bad), folder / "log_0425_0504.parquet")
    with pytest.raises(DataError, match=message):
        read_kuairand(folder, ImportOptions())
