import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from twotower.datasets.globo import read_globo
from twotower.datasets.options import ImportOptions
from twotower.datasets.tables import assemble
from twotower.schema.errors import DataError

T = 1_506_826_800_026  # 2017-10-01, 03:00 UTC


def clicks():
    small = {name: pa.array([4, 4, 2], pa.int8()) for name in ("click_environment", "click_country", "click_region")}
    return pa.table(
        {
            "user_id": pa.array([59, 59, 79], pa.int32()),
            "session_id": [1506826329267796, 1506826329267796, 1506826486139816],
            "session_start": [T - 9] * 3,
            "click_article_id": pa.array([234853, 96663, 234853], pa.int32()),
            "click_timestamp": [T, T + 7_200_000, T + 1],
            "click_deviceGroup": pa.array([3, 3, 1], pa.int8()),
            "click_os": pa.array([2, 2, 17], pa.int8()),
            "click_referrer_type": pa.array([1, 1, 7], pa.int8()),
            **small,
        }
    )


def test_clicks_become_events_with_their_context(tmp_path):
    pq.write_table(clicks(), tmp_path / "clicks_1001.parquet")
    tables = assemble(read_globo(tmp_path, ImportOptions()))
    assert tables.events.to_pylist()[2] == {
        "event_seq": 2,
        "request_id": "1506826329267796",
        "user_id": 59,
        "item_id": 96663,
        "request_ts_ms": T + 7_200_000,
        "click_ts_ms": T + 7_200_000,
        "outcome": "clicked",
        "weight": None,
        "device_group": 3,
        "os": 2,
        "environment": 4,
        "country": 4,
        "region": 4,
        "referrer_type": 1,
        "hour": 5,
    }
    assert tables.items.column_names == ["item_id"]


def test_a_user_has_the_device_and_the_place_of_their_first_click(tmp_path):
    later = clicks().set_column(5, "click_deviceGroup", pa.array([1, 3, 1], pa.int8()))
    later = later.set_column(4, "click_timestamp", pa.array([T + 5, T, T + 1]))  # the second row is 59's first click
    pq.write_table(later, tmp_path / "clicks_1001.parquet")
    assert assemble(read_globo(tmp_path, ImportOptions())).users.to_pylist() == [
        {"user_id": 59, "first_device_group": 3, "first_os": 2, "first_country": 4, "first_region": 4},
        {"user_id": 79, "first_device_group": 1, "first_os": 17, "first_country": 2, "first_region": 2},
    ]


def test_files_in_any_order_and_either_format_give_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    pq.write_table(clicks(), tmp_path / "one/clicks_1001.parquet")
    pa_csv.write_csv(clicks().slice(1), tmp_path / "many/clicks_hour_000.csv")
    pa_csv.write_csv(clicks().slice(0, 1), tmp_path / "many/clicks_hour_001.csv")
    one, many = (assemble(read_globo(tmp_path / name, ImportOptions())) for name in ("one", "many"))
    assert one.events.equals(many.events)
    assert one.users.equals(many.users)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no file clicks_\*"):
        read_globo(tmp_path, ImportOptions())
