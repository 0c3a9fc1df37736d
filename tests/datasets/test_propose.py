"""`init` and `import -c` on small files of the forms that people have."""

import gzip
import json
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config.load import load, load_import
from twotower.config.start import as_toml, kind_of
from twotower.datasets.files import Overrides, import_files, overridden
from twotower.datasets.propose import Hints, propose
from twotower.datasets.workspace import open_workspace
from twotower.schema.errors import ConfigError

T = 1_735_689_600
"""2025-01-01, in seconds."""


def written(folder: Path, name: str, lines: list[str], encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes("\n".join([*lines, ""]).encode(encoding))
    return path


def shop(folder: Path) -> list[Path]:
    users = ["user_no,age,city", *(f"{u:03d},{20 + u},{'AB'[u % 2]}" for u in range(30))]
    items = [
        "product_id,name,price,tags,added",
        *(f'P{i},"Thing {i}, big","$1,{i:03d}.50",{"a|b" if i % 2 else "c"},2024-01-{i + 1:02d}' for i in range(20)),
    ]
    clicks = [
        "user_no,product_id,clicked_at,device",
        *(f"{k % 30:03d},P{k * 7 % 20},2025-01-{k // 30 + 1:02d} 08:{k % 30:02d}:00,ios" for k in range(300)),
    ]
    tables = {"users.csv": users, "products.csv": items, "clicks.csv": clicks}
    return [written(folder, name, lines) for name, lines in tables.items()]


def imported(paths: list[Path], tmp_path: Path, hints: Hints | None = None):
    """The workspace of files, by way of the written configuration; and that configuration."""
    proposal = propose(paths, hints or Hints())
    path = tmp_path / "twotower.toml"
    path.write_text(as_toml(proposal, str(tmp_path / "w")), encoding="utf-8")
    settings = load(path)
    import_files(load_import(path), tmp_path / "w")
    return open_workspace(tmp_path / "w"), settings


def test_the_files_of_a_shop(tmp_path):
    workspace, settings = imported(shop(tmp_path), tmp_path)
    assert workspace.users()["user_id"].to_pylist()[:2] == ["000", "001"]
    first = workspace.items().to_pylist()[0]
    assert first == {"item_id": "P0", "name": "Thing 0, big", "price": 1000.5, "tags": "c", "added": 19723}
    assert workspace.events()["request_ts_ms"][0].as_py() == (T + 8 * 3600) * 1000
    assert set(settings.features.user) == {"user_id", "history", "age", "city"}
    assert {name: kind.kind for name, kind in settings.features.item.items()} == {
        "item_id": "categorical",
        "price": "numeric",
        "tags": "multi_categorical",
        "added": "numeric",
    }


def test_a_folder_of_different_tables_is_the_same_as_its_files(tmp_path):
    (tmp_path / "shop").mkdir()
    paths = shop(tmp_path / "shop")
    assert propose([tmp_path / "shop"], Hints()).features == propose(paths, Hints()).features


def test_one_joined_table_is_split(tmp_path):
    lines = [f"{k % 9},{k * 5 % 11},{T + k},{20 + k % 9},{'xyz'[k * 5 % 11 % 3]},{'pq'[k % 2]}" for k in range(200)]
    path = written(tmp_path, "all.csv", ["userId,itemId,showTime,age,category,scene", *lines])
    workspace, settings = imported([path], tmp_path)
    assert workspace.users().to_pydict() == {"user_id": list(range(9)), "age": list(range(20, 29))}
    assert workspace.items()["category"].to_pylist() == ["xyz"[i % 3] for i in range(11)]
    assert workspace.events()["request_ts_ms"][0].as_py() == T * 1000
    assert set(settings.features.context) == {"scene"}
    columns = json.loads((tmp_path / "w/workspace.json").read_text())["columns"]
    assert {row["column"]: row["became"] for row in columns if row["table"] == "events"} == {
        "userId": "user_id",
        "itemId": "item_id",
        "showTime": "request_ts_ms, click_ts_ms",
        "age": "in users",
        "category": "in items",
        "scene": "scene (context)",
    }


@pytest.mark.parametrize(("yes", "no"), [("1", "0"), ("true", "false"), ("是", "否")])
def test_impressions_with_a_click_that_is_yes_or_no(tmp_path, yes, no):
    lines = [f"{k % 9};{k * 5 % 11};{T + k}000;{yes if k % 4 == 0 else no}" for k in range(200)]
    path = written(tmp_path, "imp.csv", ["uid;iid;ts;click", *lines])
    proposal = propose([path], Hints())
    assert (proposal.section.clicked, proposal.section.time_unit) == ([yes], "ms")
    assert (proposal.facts.positives, kind_of(proposal)) == (50, "impressions")
    workspace, _ = imported([path], tmp_path)
    assert workspace.events().num_rows + workspace.holdout().num_rows < 200
    assert set(workspace.events()["outcome"].to_pylist()) == {"clicked", "impressed"}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("ratings.dat", [f"{k % 9}::{k * 5 % 11}::{k % 5 + 1}::{T + k}" for k in range(100)]),
        ("u.data", [f"{k % 9}\t{k * 5 % 11}\t{k % 5 + 1}\t{T + k}" for k in range(100)]),
    ],
)
def test_columns_without_a_heading(tmp_path, name, lines):
    proposal = propose([written(tmp_path, name, lines)], Hints(time_column="column_4"))
    assert not proposal.section.events.heading
    assert proposal.section.events.columns["column_1"] == "user_id"
    assert any("no heading" in note for note in proposal.notes)
    workspace, _ = imported([tmp_path / name], tmp_path, Hints(time_column="column_4"))
    assert workspace.events()["request_ts_ms"][0].as_py() == T * 1000


def test_atomic_files(tmp_path):
    rows = [f"{k % 9}\t{k * 5 % 11}\t{k % 5 + 1}\t{T + k}" for k in range(100)]
    inter = written(tmp_path, "ml.inter", ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows])
    item = written(
        tmp_path, "ml.item", ["item_id:token\tgenre:token_seq", *(f"{i}\t{'a b' if i % 2 else 'c'}" for i in range(11))]
    )
    workspace, settings = imported([inter, item], tmp_path)
    assert settings.features.item["genre"].separator == " "
    assert workspace.items()["genre"].to_pylist()[:2] == ["c", "a b"]
    assert load_import(tmp_path / "twotower.toml").positive == "4"


def test_lines_of_json_arrow_parquet_folders_and_packed_text_are_one(tmp_path):
    table = pa.table(
        {
            "user_id": [f"u{k % 9}" for k in range(90)],
            "item_id": [k * 5 % 11 for k in range(90)],
            "timestamp": [T + k for k in range(90)],
        }
    )
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    pq.write_to_dataset(table.append_column("day", pa.array(["x", "y"] * 45)), tmp_path / "parts", ["day"])
    text = "\n".join(["user_id,item_id,timestamp", *(",".join(map(str, row.values())) for row in table.to_pylist())])
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(text.encode("utf-16")))
    seen = []
    for place, name in enumerate(("a.jsonl", "a.arrow", "parts", "a.csv.gz")):
        (tmp_path / str(place)).mkdir()
        workspace, _ = imported([tmp_path / name], tmp_path / str(place))
        seen.append(workspace.events().select(["user_id", "item_id", "request_ts_ms"]))
    assert all(other.equals(seen[0]) for other in seen)


def test_gb18030_and_local_times(tmp_path):
    lines = [f"{k % 9:03d},P{k * 5 % 11},2025/01/01 08:{k % 60:02d},好东西" for k in range(100)]
    path = written(tmp_path, "clicks.csv", ["用户编号,商品编号,点击时间,标题", *lines], "gb18030")
    proposal = propose([path], Hints(timezone="Asia/Shanghai"))
    assert proposal.section.events.encoding == "gb18030"
    workspace, _ = imported([path], tmp_path, Hints(timezone="Asia/Shanghai"))
    assert workspace.events()["request_ts_ms"][0].as_py() == T * 1000
    assert workspace.users()["user_id"][0].as_py() == "000"


def test_what_is_not_sure_is_asked_or_noted(tmp_path):
    lines = [f"{k % 9},{k * 5 % 11},{T + k},{T + k + 5},0{k % 9 + 1}/02/2025" for k in range(100)]
    path = written(tmp_path, "c.csv", ["user_id,item_id,view_time,pay_time,birthday", *lines])
    proposal = propose([path], Hints())
    assert proposal.section.events.columns["view_time"] == "ts_ms"
    assert any("view_time, pay_time are times" in note for note in proposal.notes)
    asked = []

    def ask(question: str, answers: list[str]) -> str:
        asked.append(question)
        return answers[-1]

    assert propose([path], Hints(), ask).section.events.columns["pay_time"] == "ts_ms"
    assert asked == ["Which column is the time of the event?"]


def test_columns_get_names_of_their_own(tmp_path):
    lines = [f"{k % 9},{k * 5 % 11},{T + k},web,x,2" for k in range(100)]
    path = written(tmp_path, "c.csv", ["user_id,item_id,time,channel,date,Event_Seq", *lines])
    columns = propose([path], Hints()).section.events.columns
    assert [columns[name] for name in ("channel", "date", "Event_Seq")] == [
        "source_channel",
        "source_date",
        "source_Event_Seq",
    ]


def test_options_stand_above_the_section(tmp_path):
    lines = [f"{k % 9},{k * 5 % 11},{T + k},{T + k + 5}" for k in range(100)]
    section = propose([written(tmp_path, "c.csv", ["user_id,item_id,a_time,b_time", *lines])], Hints()).section
    changed = overridden(section, Overrides(time_column="b_time", unit="s", holdout="leave-one-out"))
    assert changed.events.columns == {"user_id": "user_id", "item_id": "item_id", "a_time": "source_a_time"} | {
        "b_time": "ts_ms"
    }
    assert changed.holdout == "leave-one-out"
    import_files(changed, tmp_path / "w")
    assert open_workspace(tmp_path / "w").events()["request_ts_ms"][0].as_py() == (T + 5) * 1000


def test_files_without_users_say_which_option_helps(tmp_path):
    path = written(tmp_path, "c.csv", ["who,what", "a,b", "c,d"])
    with pytest.raises(ConfigError, match=r"--user-column and --item-column. There are c.csv: who, what"):
        propose([path], Hints())
    assert propose([path], Hints("who", "what")).section.events.columns == {"who": "user_id", "what": "item_id"}


def test_a_file_that_is_not_used_is_named(tmp_path):
    paths = [*shop(tmp_path), written(tmp_path, "notes.csv", ["x,y", "1,2", "3,4"])]
    assert any(note.startswith("notes.csv is not used") for note in propose(paths, Hints()).notes)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"import": {"event": {}}}, "import.event is no key; did you mean events?"),
        ({"import": {}}, "import.events is missing"),
        (
            {"import": {"events": {"files": ["a"], "columns": {}, "day": 1}}},
            "import.events.day is no key; did you mean days?",
        ),
    ],
)
def test_a_wrong_section_is_refused_by_every_command(section, said):
    with pytest.raises(ConfigError, match=said):
        load(section)
    with pytest.raises(ConfigError, match=said):
        load_import(section)


def test_news_are_seen_by_items_that_live_for_days(tmp_path):
    lines = [f"{k % 997},{k // 100 * 7 + k % 7},{T + k * 60}" for k in range(12_000)]
    proposal = propose([written(tmp_path, "c.csv", ["user_id,item_id,timestamp", *lines])], Hints())
    assert kind_of(proposal) == "news"
    assert "user_id" not in load(tomllib.loads(as_toml(proposal, "w"))).features.user
