import csv
import io
import json
from pathlib import Path

import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.datasets.importers import import_dataset
from twotower.datasets.options import EventTime, ImportOptions
from twotower.datasets.workspace import as_text, open_workspace
from twotower.schema.errors import ConfigError, DataError, TwotowerError

T = 1_500_000_000_000


@pytest.fixture
def plays(tmp_path):
    path = tmp_path / "plays.csv"
    rows = [(u, i, T + 1000 * (4 * i + u)) for u in range(3) for i in range(4)]
    path.write_text("user_id,item_id,ts_ms\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    return path


def test_an_import_with_a_rule(plays, tmp_path):
    report = import_dataset("interactions", plays, tmp_path / "w", ImportOptions(holdout="leave-one-out"))
    assert (report.events, report.holdout, report.holdout_cold) == (9, 0, 3)
    manifest = json.loads((tmp_path / "w/workspace.json").read_text())
    assert manifest["source"] == "interactions"
    assert manifest["arguments"] == {
        "src": str(plays),
        "test": None,
        "users": None,
        "items": None,
        "holdout": "leave-one-out",
        "positive": "all",
        "until": None,
        "event_time": None,
    }


def test_an_import_with_a_test_file(plays, tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id\n0,0\n7,0\n")
    report = import_dataset("interactions", plays, tmp_path / "w", ImportOptions(test=tmp_path / "test.csv"))
    assert (report.users, report.events, report.holdout, report.holdout_cold) == (4, 11, 1, 1)
    assert report.dropped == {"in_test": 1}


def test_an_import_without_a_hold_out_has_no_tables_of_it(plays, tmp_path):
    import_dataset("interactions", plays, tmp_path / "w", ImportOptions())
    assert not list((tmp_path / "w").glob("*hold*"))
    assert not (tmp_path / "w/train_positives.parquet").exists()


def test_until_is_a_day(plays, tmp_path):
    with pytest.raises(ConfigError, match="--until: 'May'"):
        import_dataset("interactions", plays, tmp_path / "w", ImportOptions(until="May"))
    with pytest.raises(DataError, match="all 12 events of interactions are later"):
        import_dataset("interactions", plays, tmp_path / "w", ImportOptions(until="2017-07-13"))
    assert import_dataset("interactions", plays, tmp_path / "w", ImportOptions(until="2017-07-14")).events == 12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("netflix", {}, "no data set 'netflix'; there are movielens-1m, kuairand, globo, .*, interactions"),
        ("interactions", {"holdout": "time:0.5", "test": Path("t.csv")}, "exclude each other"),
        ("interactions", {"holdout": "time:2"}, "share between 0 and 1"),
        ("globo", {"users": Path("u.csv")}, "--users and --items go with `interactions`"),
        ("globo", {"positive": "3"}, "globo has clicks, no ratings; use `all`"),
        ("kuairand", {"positive": "4"}, "kuairand has clicks, no ratings; use `all`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(plays, tmp_path, name, options, message):
    with pytest.raises(ConfigError, match=message):
        import_dataset(name, plays, tmp_path / "w", ImportOptions(**options))
    assert not (tmp_path / "w").exists()


def test_an_occupied_place_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mine").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        import_dataset("interactions", tmp_path / "nowhere", tmp_path / "w", ImportOptions())


@pytest.mark.parametrize(
    ("name", "folder", "options", "users"),
    [
        ("movielens-1m", "ml-1m", {"holdout": "time:0.9", "positive": "4"}, 1_148),
        ("movielens-1m", "ml-1m", {"holdout": "leave-one-out"}, 6_038),
        ("kuairand", "kuairand", {"holdout": "since:2022-05-03"}, 7_234),
        ("globo", "globo", {"holdout": "since:2017-10-10", "until": "2017-10-10"}, 58_236),
        ("interactions", "gowalla/train.parquet", {"test": "gowalla/test.parquet"}, 29_858),
    ],
)
def test_the_hold_outs_of_real_data_have_the_users_of_the_published_baselines(
    real_data, tmp_path, name, folder, options, users
):
    if "test" in options:
        options = options | {"test": real_data(options["test"])}
    report = import_dataset(name, real_data(folder), tmp_path / "w", ImportOptions(**options))
    workspace = open_workspace(tmp_path / "w")
    holdout, train = workspace.holdout(), workspace.train_positives()
    assert pc.count_distinct(holdout["user_id"]).as_py() == users
    for column in ("user_id", "item_id"):
        assert pc.all(pc.is_in(holdout[column], value_set=pc.unique(train[column]))).as_py()
    assert report.events >= report.train_positives == train.num_rows


def test_an_import_tells_what_became_of_every_column_and_row(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log/a.csv").write_text(f"user_id,item_id,ts_ms,rating,scene\n1,1,{T},5,x\n1,2,,4,x\n1,2,{T + 1},4,x\n")
    (tmp_path / "log/notes.md").write_text("")
    (tmp_path / "items.csv").write_text("item_id,title\n1,One\n2,\n")
    report = import_dataset(
        "interactions", tmp_path / "log", tmp_path / "w", ImportOptions(items=tmp_path / "items.csv")
    )
    assert report.dropped == {"null_time": 1}
    assert report.examples == {"null_time": {"user_id": 1, "item_id": 2, "ts_ms": None, "scene": "x", "weight": 4}}
    assert report.not_read == [str(tmp_path / "log/notes.md")]
    told = [(one["table"], one["column"], one["type"], one["missing"], one["became"]) for one in report.columns]
    assert told == [
        ("events", "user_id", "int64", 0, "user_id"),
        ("events", "item_id", "int64", 0, "item_id"),
        ("events", "ts_ms", "int64", 1, "request_ts_ms, click_ts_ms"),
        ("events", "rating", "int64", 0, "weight"),
        ("events", "scene", "string", 0, "scene (context)"),
        ("items", "item_id", "int64", 0, "item_id"),
        ("items", "title", "string", 1, "title"),
    ]
    manifest = json.loads((tmp_path / "w/workspace.json").read_text())
    assert (manifest["columns"], manifest["examples"]) == (report.columns, report.examples)
    lines = as_text(report).splitlines()
    assert lines[0].split() == ["table", "column", "type", "missing", "became"]
    assert lines[4].split() == ["events", "rating", "int64", "0", "weight"]
    assert lines[-2:] == [
        f"not read: {tmp_path / 'log/notes.md'}",
        'dropped: null_time 1, such as {"user_id": 1, "item_id": 2, "ts_ms": null, "scene": "x", "weight": 4}',
    ]


def test_names_of_times_go_with_own_interactions(tmp_path):
    with pytest.raises(ConfigError, match="--time-column, --time-unit and --without-time go with `interactions`"):
        import_dataset("globo", tmp_path, tmp_path / "w", ImportOptions(event_time=EventTime("x")))


FIELDS = st.sampled_from(
    [
        "",
        "1",
        "2",
        "007",
        "NA",
        "é",
        '"',
        "a,b",
        "a\nb",
        "1.5",
        str(T),
        str(T // 1000),
        "9" * 20,
        "clicked",
        "true",
        "\x1f",
    ]
)
NAMES = st.sampled_from(
    ["ts_ms", "rating", "outcome", "position", "day", "request_id", "event_time", "Weight", "", "x"]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_a_file_holds_every_row_is_somewhere_or_the_import_is_refused(data, tmp_path_factory):
    names = ["user_id", "item_id", *data.draw(st.lists(NAMES, max_size=3))]
    ids = st.integers(0, 3).map(str) if data.draw(st.booleans()) else FIELDS
    values = {"user_id": ids, "item_id": ids, "ts_ms": st.integers(T, T + 9).map(str)} | (
        {"ts_ms": FIELDS} if data.draw(st.booleans()) else {}
    )
    rows = data.draw(st.lists(st.tuples(*(values.get(name, FIELDS) for name in names)), max_size=8))
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    written = text.getvalue().encode()
    damage = data.draw(st.none() | st.tuples(st.integers(0, len(written)), st.binary(max_size=3)))
    if damage is not None:
        written = written[: damage[0]] + damage[1] + written[damage[0] + 2 :]
    folder = tmp_path_factory.mktemp("odd")
    (folder / "log.csv").write_bytes(written)
    try:
        report = import_dataset("interactions", folder, folder / "w", ImportOptions())
    except TwotowerError:
        assert not (folder / "w").exists()
        return
    assert set(report.examples) == set(report.dropped)
    if damage is None:
        assert report.events + sum(report.dropped.values()) == len(rows)
