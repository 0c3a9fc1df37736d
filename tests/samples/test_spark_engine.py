import random
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import load
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.features.options import Categorical, Feature, Features, MultiCategorical, Numeric, Vector
from twotower.pipeline import line as stages
from twotower.samples.build import build_samples
from twotower.samples.duckdb_engine import BATCH_ROWS
from twotower.samples.engine import Engine, open_engine
from twotower.samples.options import ColdOptions, EngineOptions, HotOptions, NegativesOptions, SamplesOptions
from twotower.samples.read import open_samples
from twotower.samples.spark_engine import find_java, open_spark
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

World = Callable[..., Path]
START_MS, DAY_MS = 1_704_067_200_000, 86_400_000
FUTURE_MS = 20 * 365 * DAY_MS
EXAMPLES = Path(__file__).parents[2] / "examples"
DUCKDB = EngineOptions()
FUNNEL = (c.CLICKED, c.IMPRESSED, c.RANKED_NOT_SHOWN, c.RANK_REJECTED, c.PRE_RANK_REJECTED)


def assert_same(one: Path, other: Path) -> None:
    """Two folders of samples have the same bytes."""
    assert open_samples(one).manifest == open_samples(other).manifest
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def build_with_both(
    workspace: Path, spark: EngineOptions, features: Features, clock_ms: ClockMs = now_ms, **options: Any
) -> None:
    for engine in (DUCKDB, spark):
        section = SamplesOptions(**{"held_out_users": 0.0, **options})
        build_samples(workspace, workspace / engine.name, features, 8, section, engine=engine, clock_ms=clock_ms)
    assert_same(workspace / DUCKDB.name, workspace / spark.name)


def funnel(count: int = 1500) -> list[dict[str, Any]]:
    """Events of a funnel over three days, with ties, repeats, unknown ids and every kind of context."""
    rng = random.Random(1)
    rows = []
    for seq in range(count):
        at = START_MS + rng.randrange(3) * DAY_MS + rng.randrange(40)
        outcome = rng.choice(FUNNEL)
        rows.append(
            {
                c.EVENT_SEQ: 2**40 + seq,
                c.USER_ID: rng.choice(["u1", "u2", "u3", "über", "u'5", "nobody", None]),
                c.ITEM_ID: rng.choice([10, 20, 30, 40, 50, 60, 99]),
                c.REQUEST_TS_MS: at,
                c.CLICK_TS_MS: at + rng.choice([*range(29), FUTURE_MS]) if outcome == c.CLICKED else None,
                c.OUTCOME: outcome,
                "stars": rng.choice([0, 3, 5]),
                "hour.of day": rng.choice([1, 2, None]),
                "price": rng.choice([rng.random(), float("nan"), None]),
                "tags": rng.choice(["a|b", "c", "", None]),
                "likes": rng.choice([["x", "y"], [], None]),
                "face": [rng.random(), 2.0],
                "code": rng.choice([2**32 - 1, 7]),
                "scene": rng.choice(["home", "Home", None]),
                "nothing": None,
                "item_row": rng.randrange(2),
                "_metadata": rng.choice(["a", "b`c"]),
                "Events_File": "x",
            }
        )
    return rows


CONTEXT: dict[str, Feature] = {
    "hour.of day": Categorical("categorical"),
    "price": Numeric("numeric", "log"),
    "tags": MultiCategorical("multi_categorical", "|"),
    "likes": MultiCategorical("multi_categorical"),
    "face": Vector("vector", 2),
    "code": Categorical("categorical"),
    "scene": Categorical("categorical"),
    "nothing": MultiCategorical("multi_categorical"),
    "item_row": Categorical("categorical"),
    "_metadata": Categorical("categorical"),
}
TYPES = {
    "stars": pa.int16(),
    "hour.of day": pa.uint8(),
    "face": pa.list_(pa.float32(), 2),
    "code": pa.uint32(),
    "scene": pa.dictionary(pa.int32(), pa.large_string()),
}
USERS = {c.USER_ID: ["u1", "u2", "u3", "über", "u'5"]}
ITEMS = {c.ITEM_ID: [10, 20, 30, 40, 50, 60]}


def by_day(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    days: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        day = (row[c.REQUEST_TS_MS] - START_MS) // DAY_MS
        days.setdefault(f"date=2024-01-0{day + 1}/a.parquet", []).append(row)
    return days


def test_a_funnel_with_every_kind_of_context_gives_the_same_bytes(world: World, spark: EngineOptions) -> None:
    """Its files differ in their columns and types, and its path has characters that mean something in patterns."""
    files = by_day(funnel())
    first = files["date=2024-01-01/a.parquet"]
    files["date=2024-01-01/a.parquet"] = first[1::2]
    files["date=2024-01-01/b.parquet"] = [
        {name: value for name, value in row.items() if name not in ("likes", "price")} | {c.EVENT_SEQ: place}
        for place, row in enumerate(first[::2])
    ]
    workspace = world(USERS, ITEMS, files, "date=1999-01-01/user_id=5/w [v2] *?{a,b} %20", TYPES)
    other = workspace / "events" / "date=2024-01-01" / "b.parquet"
    table = pq.ParquetFile(other).read()
    for name, kind in ((c.EVENT_SEQ, pa.int32()), ("stars", pa.float64()), ("code", pa.int64())):
        table = table.set_column(table.schema.get_field_index(name), name, table.column(name).cast(kind))
    pq.write_table(table, other)
    build_with_both(
        workspace,
        spark,
        Features(context=CONTEXT),
        first_day="2024-01-02",
        last_day="2024-01-03",
        weight="stars",
        impressed_weight=0.1,
        hot=HotOptions("sqrt", 0.9),
        cold=ColdOptions("power", 1.1),
        negatives=NegativesOptions(hard_most=3),
        seed=7,
        clock_ms=lambda: START_MS + 10 * DAY_MS,
    )
    assert open_samples(workspace / "duckdb").manifest["dropped"]["beyond_now"] > 0


def test_events_without_time_give_the_same_bytes(world: World, spark: EngineOptions) -> None:
    rows = [{**row, c.REQUEST_TS_MS: None, c.CLICK_TS_MS: None} for row in funnel(400)]
    workspace = world(USERS, ITEMS, {"date=unknown/a.parquet": rows}, types=TYPES)
    build_with_both(workspace, spark, Features(context=CONTEXT), hot=HotOptions("word2vec", 0.5))


def test_the_configured_engine_gives_the_same_bytes_of_a_simulated_world(tmp_path: Path, spark: EngineOptions) -> None:
    simulate_workspace(tmp_path / "world", WorldOptions(users=150, items=200, days=2, seed=3))
    for engine in (DUCKDB, spark):
        settings = load(EXAMPLES / "demo.toml", [f"workspace.path={tmp_path / 'world'}"])
        stages.build_samples(replace(settings, engine=engine))
        (tmp_path / "world" / "samples").rename(tmp_path / engine.name)
    assert open_samples(tmp_path / "spark").manifest["with_hard"] > 0.5
    assert_same(tmp_path / "duckdb", tmp_path / "spark")


def test_one_user_of_most_clicks_and_one_item_of_all_users_give_the_same_bytes(
    world: World, spark: EngineOptions
) -> None:
    rng = np.random.default_rng(0)
    many, users = 60_000, 3_000
    item = np.concatenate([rng.integers(0, 50, many), np.zeros(users, np.int64)])
    user = np.concatenate([np.zeros(many, np.int64), np.arange(users)])
    order = rng.permutation(many + users)
    rows = [
        {
            c.EVENT_SEQ: seq,
            c.USER_ID: int(user[place]),
            c.ITEM_ID: int(item[place]),
            c.REQUEST_TS_MS: START_MS + seq // 3,
            c.CLICK_TS_MS: START_MS + seq // 3 + 40,
            c.OUTCOME: c.CLICKED,
        }
        for seq, place in enumerate(order)
    ]
    workspace = world(
        {c.USER_ID: list(range(users))}, {c.ITEM_ID: list(range(50))}, {"date=2024-01-01/a.parquet": rows}
    )
    build_with_both(workspace, spark, Features(), hot=HotOptions("power"))


def test_some_users_of_movielens_give_the_same_bytes(
    tmp_path: Path, some_movielens: Path, spark: EngineOptions
) -> None:
    """`benchmarks/soak/spark.py` does the same for all of them."""
    import_dataset("movielens-1m", some_movielens, tmp_path / "ml", ImportOptions(holdout="time:0.9", positive="4"))
    settings = load(EXAMPLES / "movielens.toml", [f"workspace.path={tmp_path / 'ml'}"])
    for engine in (DUCKDB, spark):
        stages.build_samples(replace(settings, engine=engine))
        (tmp_path / "ml" / "samples").rename(tmp_path / engine.name)
    assert_same(tmp_path / "duckdb", tmp_path / "spark")


GOOD = {c.EVENT_SEQ: 1, c.USER_ID: "u1", c.ITEM_ID: 10, c.REQUEST_TS_MS: START_MS, c.CLICK_TS_MS: START_MS + 1}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, GOOD], "1 clicks are there more than once, by user, item and event_seq, such as event_seq = 1"),
        ([{**GOOD, c.CLICK_TS_MS: START_MS - 1}], "1 rows have a click_ts_ms before their request_ts_ms"),
        ([{**GOOD, "weight": float("nan")}], "1 clicked rows have no weight that is a finite number"),
    ],
)
def test_events_that_are_wrong_are_refused_alike(
    world: World, spark: EngineOptions, rows: list[dict[str, Any]], message: str
) -> None:
    clicked = [{**row, c.OUTCOME: c.CLICKED} for row in rows]
    workspace = world(USERS, ITEMS, {"date=2024-01-01/a.parquet": clicked})
    for engine in (DUCKDB, spark):
        section = SamplesOptions(weight="weight" if "weight" in rows[0] else None)
        with pytest.raises(DataError, match=message):
            build_samples(workspace, workspace / "samples", Features(), 8, section, engine=engine)


@pytest.fixture(params=["duckdb", "spark"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    options = DUCKDB if request.param == "duckdb" else request.getfixturevalue("spark")
    with open_engine(options, tmp_path / "scratch") as opened:
        yield opened


def test_a_large_result_comes_in_its_order_and_in_batches(engine: Engine) -> None:
    count = 3 * BATCH_ROWS
    numbers = engine.put("numbers", pa.table({"n": np.random.default_rng(0).permutation(count)}))
    batches = list(engine.batches(numbers.order_by(ibis.desc("n"))))
    assert max(batch.num_rows for batch in batches) <= BATCH_ROWS
    found = np.concatenate([batch.column("n").to_numpy() for batch in batches])
    np.testing.assert_array_equal(found, np.arange(count)[::-1])


def test_what_is_kept_is_computed_once(engine: Engine) -> None:
    numbers = engine.put("numbers", pa.table({"n": [1, 2, 3]}))
    drawn = engine.keep("drawn", numbers.mutate(chance=ibis.random()))
    assert engine.fetch(drawn.order_by("n")) == engine.fetch(drawn.order_by("n"))


def test_an_empty_result_has_its_columns(engine: Engine) -> None:
    numbers = engine.put("numbers", pa.table({"n": [1, 2, 3]}))
    assert engine.fetch(numbers.filter(numbers["n"] > 5)).to_pydict() == {"n": []}
    assert sum(batch.num_rows for batch in engine.batches(numbers.filter(numbers["n"] > 5))) == 0


def count_up(last: int, part: int) -> pa.RecordBatch:
    """Part 1 has no rows."""
    return pa.record_batch({"part": [part] * (part != 1), "n": [last - part] * (part != 1)})


def test_parts_that_are_spread_come_in_their_order(engine: Engine) -> None:
    schema = pa.schema([("part", pa.int64()), ("n", pa.int32())])
    found = pa.Table.from_batches(engine.spread(partial(count_up, 10), 12, schema), schema)
    assert found.to_pydict() == {"part": [0, *range(2, 12)], "n": [10, *range(8, -2, -1)]}
    assert list(engine.spread(partial(count_up, 10), 0, schema)) == []


def test_spark_listens_on_this_machine_alone(spark: EngineOptions) -> None:
    from pyspark import SparkContext

    sockets = {
        path.readlink().name
        for path in Path(f"/proc/{SparkContext._gateway.proc.pid}/fd").iterdir()
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode)
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_rest, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                listening.append(local.partition(":")[0])
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert listening
    assert set(listening) <= loopback


def test_spark_ends_with_its_job_and_starts_again_for_the_next_and_prints_nothing(
    tmp_path: Path, spark: EngineOptions
) -> None:
    """In a process of its own, because here one runs."""
    code = """
import sys
from pathlib import Path
import pyarrow as pa
from pyspark import SparkContext
from twotower.samples.options import EngineOptions
from twotower.samples.spark_engine import open_spark
for _ in range(2):
    with open_spark(EngineOptions("spark", 1.0, 1), Path(sys.argv[1])) as engine:
        java = SparkContext._gateway.proc
        assert engine.fetch(engine.put("n", pa.table({"n": [1]}))).to_pydict() == {"n": [1]}
    assert java.returncode is not None
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def java(folder: Path, version: str) -> Path:
    """A program that says it is a Java of some version."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025-04-15' >&2\n")
    program.chmod(0o755)
    return folder


def test_java_is_found_on_the_path_or_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java(tmp_path / "jvm" / "a", "1.8.0_402")
    java(tmp_path / "jvm" / "b", "21.0.2")
    old = java(tmp_path / "old", "11.0.1")
    monkeypatch.setenv("PATH", f"{old / 'bin'}:/bin")
    assert find_java(None, tmp_path / "jvm") == tmp_path / "jvm" / "b"
    monkeypatch.setenv("PATH", f"{java(tmp_path / 'new', '17.0.15') / 'bin'}:/bin")
    assert find_java(None, tmp_path / "jvm") == tmp_path / "new"
    with pytest.raises(ConfigError, match=r"needs Java 17 or 21, and .*/old is Java 11: apt-get install openjdk"):
        find_java(str(old), tmp_path / "jvm")


def test_no_java_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="and no Java was found: apt-get install openjdk-17-jre-headless, or set JAV"):
        find_java(None, tmp_path)
    with pytest.raises(ConfigError, match="/nowhere is no Java"):
        find_java("/nowhere", tmp_path)


def test_pyspark_that_is_missing_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with (
        pytest.raises(ConfigError, match=r"needs pyspark: pip install 'twotower\[spark\]'"),
        open_spark(EngineOptions("spark", 1.0, 1), tmp_path),
    ):
        pass


def test_a_scratch_that_is_no_folder_is_refused_and_a_configured_one_is_left_empty(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="is no folder: make it, or leave it out"),
        open_engine(replace(DUCKDB, scratch=str(tmp_path / "no")), tmp_path),
    ):
        pass
    (tmp_path / "scratch").mkdir()
    with open_engine(replace(DUCKDB, scratch=str(tmp_path / "scratch")), tmp_path):
        assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert list((tmp_path / "scratch").iterdir()) == []
