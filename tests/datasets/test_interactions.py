import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.interactions import read_interactions, read_test
from twotower.datasets.options import EventTime, ImportOptions
from twotower.datasets.tables import assemble
from twotower.schema.errors import ConfigError, DataError

T = 1_500_000_000_000


def test_a_csv_with_ratings_and_features_beside_it(tmp_path):
    (tmp_path / "plays.csv").write_text(
        f"user_id,item_id,ts_ms,rating,device\na,1,{T},5,tv\na,2,{T},2,tv\nb,7,{T},5,tv\n"
    )
    (tmp_path / "people.csv").write_text("user_id,age\na,30\nb,\n")
    pq.write_table(pa.table({"item_id": [1, 2], "genre": ["x", "y"]}), tmp_path / "things.parquet")
    source = read_interactions(
        tmp_path / "plays.csv",
        ImportOptions(positive="3", users=tmp_path / "people.csv", items=tmp_path / "things.parquet"),
    )
    tables = assemble(source)
    assert tables.events["outcome"].to_pylist() == ["clicked", "impressed"]
    assert tables.events["device"].to_pylist() == ["tv", "tv"]
    assert tables.users.to_pydict() == {"user_id": ["a", "b"], "age": [30, None]}
    assert tables.items.to_pydict() == {"item_id": [1, 2], "genre": ["x", "y"]}
    assert tables.dropped == {"unknown_item": 1}


def test_the_files_beside_are_not_interactions_though_in_their_folder(tmp_path):
    (tmp_path / "1.csv").write_text("user_id,item_id\n1,1\n")
    (tmp_path / "2.csv").write_text("user_id,item_id\n1,2\n")
    (tmp_path / "test.csv").write_text("user_id,item_id\n1,3\n")
    (tmp_path / "users.csv").write_text("user_id\n1\n")
    source = read_interactions(tmp_path, ImportOptions(users=tmp_path / "users.csv", test=tmp_path / "test.csv"))
    assert source.events["item_id"].to_pylist() == [1, 2]


def test_outcomes_of_their_own_are_used(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,outcome\n1,1,clicked\n1,2,pre_rank_rejected\n")
    assert assemble(read_interactions(tmp_path / "log.csv", ImportOptions())).events["outcome"].to_pylist() == [
        "clicked",
        "pre_rank_rejected",
    ]
    with pytest.raises(ConfigError, match="has a column outcome"):
        read_interactions(tmp_path / "log.csv", ImportOptions(positive="3"))


def test_a_page_of_impressions_is_one_request(tmp_path):
    (tmp_path / "log.csv").write_text(
        f"user_id,item_id,outcome,ts_ms,request_id\n1,1,clicked,{T},7\n1,2,impressed,{T},7\n1,3,clicked,{T},8\n"
    )
    events = assemble(read_interactions(tmp_path / "log.csv", ImportOptions())).events
    assert events["request_id"].to_pylist() == ["7", "7", "8"]
    assert events["request_ts_ms"].to_pylist() == [T, T, T + 1]


def test_rating_and_weight_together_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,rating,weight\n1,1,1,1\n")
    with pytest.raises(DataError, match="both rating and weight"):
        read_interactions(tmp_path / "log.csv", ImportOptions())


def test_a_test_without_ratings_is_all_positive(tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id,note\n1,1,x\n")
    assert read_test(tmp_path / "test.csv", ImportOptions()).rows.to_pydict() == {"user_id": [1], "item_id": [1]}
    rows = read_test(tmp_path / "test.csv", ImportOptions(positive="4")).rows
    assert rows.to_pydict() == {"user_id": [1], "item_id": [1], "outcome": ["clicked"]}


def test_a_test_with_ratings_keeps_them(tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id,rating\n1,1,3\n")
    assert read_test(tmp_path / "test.csv", ImportOptions(positive="4")).rows.to_pydict() == {
        "user_id": [1],
        "item_id": [1],
        "weight": [3],
    }


def timed(tmp_path, heading, *values):
    """A file of clicks with one more column."""
    rows = "".join(f"{n},{n % 3},{value}\n" for n, value in enumerate(values))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,{heading}\n{rows}")
    return tmp_path / "log.csv"


SECONDS = T // 1000


@pytest.mark.parametrize(
    ("heading", "values"),
    [
        ("event_time", [SECONDS, SECONDS]),
        ("timestamp", ["30/11/2026 10:00", "1/12/2026 10:00"]),
        ("Date", ["20170714", "20170715"]),
        ("createdAt", [f"{SECONDS}.5", f"{SECONDS}.7"]),
        ("play-time", [T, T]),
        ("seen", ["2017-07-14", "2017-07-15"]),
        ("seen", ["2017-07-14T10:00:00Z", "2017-07-15T10:00:00Z"]),
    ],
)
def test_a_column_that_looks_like_a_time_is_asked_about(tmp_path, heading, values):
    path = timed(tmp_path, heading, *values)
    with pytest.raises(DataError, match=rf"no column ts_ms, but {heading} \(.*looks like a time: give --time-column"):
        read_interactions(path, ImportOptions())
    source = read_interactions(path, ImportOptions(event_time=EventTime(absent=True)))
    assert heading in source.events.column_names


@pytest.mark.parametrize(("heading", "values"), [("watch_time", [35, 40]), ("day", [0, 6]), ("hour", [3, 4])])
def test_durations_and_hours_are_no_times(tmp_path, heading, values):
    assert "ts_ms" not in read_interactions(timed(tmp_path, heading, *values), ImportOptions()).events.column_names


@pytest.mark.parametrize(
    ("unit", "values", "expected"),
    [
        ("s", [SECONDS, SECONDS + 1], [T, T + 1000]),
        ("s", [f"{SECONDS}.25", f"{SECONDS}.5"], [T + 250, T + 500]),
        ("ms", [T, T + 1], [T, T + 1]),
        ("us", [T * 1000 + 999, T * 1000 + 1000], [T, T + 1]),
        ("ns", [T * 1_000_000, T * 1_000_000 + 1_000_000], [T, T + 1]),
        ("ms", ["2017-07-14T02:40:00", "2017-07-14T02:40:00.5"], [T, T + 500]),
        ("ms", ["2017-07-14T04:40:00+02:00", ""], [T, None]),
        ("ms", ["2017-07-14", "2017-07-15"], [T - 9_600_000, T - 9_600_000 + 86_400_000]),
    ],
)
def test_a_named_column_of_times_becomes_milliseconds(tmp_path, unit, values, expected):
    path = timed(tmp_path, "event_time", *values)
    source = read_interactions(path, ImportOptions(event_time=EventTime("event_time", unit)))
    assert source.events["ts_ms"].to_pylist() == expected
    assert [one.to for one in source.columns["events"]] == ["user_id", "item_id", "ts_ms"]
    assert (
        read_test(path, ImportOptions(event_time=EventTime("event_time", unit))).rows["ts_ms"].to_pylist() == expected
    )


@pytest.mark.parametrize(
    ("event_time", "heading", "values", "message"),
    [
        (EventTime("when"), "event_time", [T], "has no such column; it has user_id, item_id, event_time"),
        (EventTime("event_time"), "event_time", [SECONDS], "which is no time in --time-unit ms: give --time-unit s"),
        (EventTime("event_time", "s"), "event_time", [T], "which is no time in --time-unit s: give --time-unit ms"),
        (EventTime("event_time", "s"), "event_time", [2**62], "a time that is none in --time-unit s"),
        (
            EventTime("x"),
            "x",
            ["noon"],
            r"column x is of type string, such as 'noon': a time is a number, or text like",
        ),
        (EventTime(absent=True), "ts_ms", [T], "--without-time: .* has a column ts_ms"),
        (EventTime("x", absent=True), "x", [T], "exclude each other"),
        (EventTime("x"), "x,ts_ms", [f"{T},{T}"], "has a column ts_ms as well"),
    ],
)
def test_a_time_that_is_none_is_refused(tmp_path, event_time, heading, values, message):
    with pytest.raises((ConfigError, DataError), match=message):
        read_interactions(timed(tmp_path, heading, *values), ImportOptions(event_time=event_time))


def test_a_test_may_have_no_time_but_not_an_unnamed_one(tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id\n1,1\n")
    assert read_test(
        tmp_path / "test.csv", ImportOptions(event_time=EventTime("event_time", "s"))
    ).rows.column_names == [
        "user_id",
        "item_id",
    ]
    (tmp_path / "test.csv").write_text(f"user_id,item_id,event_time\n1,1,{T}\n")
    with pytest.raises(DataError, match="event_time"):
        read_test(tmp_path / "test.csv", ImportOptions())
