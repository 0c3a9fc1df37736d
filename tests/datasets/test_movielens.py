import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.movielens import read_movielens
from twotower.datasets.options import ImportOptions
from twotower.datasets.tables import assemble
from twotower.schema.errors import ConfigError, DataError

S = 978_300_055


def as_parquet(folder):
    pq.write_table(
        pa.table(
            {
                "user_id": [1, 1, 2],
                "movie_id": [20, 10, 10],
                "rating": pa.array([5, 3, 4], pa.int8()),
                "timestamp": pa.array([S, S, S + 60], pa.int32()),
                "user_seq": pa.array([0, 1, 0], pa.int16()),
                "ts_exact": [True] * 3,
            }
        ),
        folder / "ratings.parquet",
    )
    people = {"user_id": [2, 1], "gender": ["M", "F"], "age": [25, 1], "occupation": [4, 10], "zip": ["02138", "48067"]}
    pq.write_table(pa.table(people), folder / "users.parquet")
    films = {
        "movie_id": [10, 20, 30],
        "title": ["GoldenEye (1995)", "Money Train (1995)", "Am\u00e9lie (2001)"],
        "genres": ["Action|Adventure", "Action", "Comedy"],
        "year": pa.array([1995, 1995, 2001], pa.int16()),
    }
    pq.write_table(pa.table(films), folder / "movies.parquet")


def as_lines(folder):
    (folder / "ratings.dat").write_text(f"1::20::5::{S}\n1::10::3::{S}\n2::10::4::{S + 60}\n")
    (folder / "users.dat").write_text("2::M::25::4::02138\n1::F::1::10::48067\n")
    films = "10::GoldenEye (1995)::Action|Adventure\n20::Money Train (1995)::Action\n30::Am\u00e9lie (2001)::Comedy\n"
    (folder / "movies.dat").write_bytes(films.encode("latin-1"))


def test_ratings_become_events_in_the_order_of_user_seq(tmp_path):
    as_parquet(tmp_path)
    events = assemble(read_movielens(tmp_path, ImportOptions(positive="4"))).events
    assert events.drop_columns(["event_seq", "request_id"]).to_pydict() == {
        "user_id": [1, 1, 2],
        "item_id": [20, 10, 10],
        "request_ts_ms": [S * 1000, S * 1000 + 1, (S + 60) * 1000],
        "click_ts_ms": [S * 1000, None, (S + 60) * 1000],
        "outcome": ["clicked", "impressed", "clicked"],
        "weight": [5.0, 3.0, 4.0],
    }


def test_all_counts_every_rating(tmp_path):
    as_parquet(tmp_path)
    assert assemble(read_movielens(tmp_path, ImportOptions())).events["outcome"].to_pylist() == ["clicked"] * 3


def test_grouplens_own_files_give_the_same_but_for_the_order_within_a_second(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "d").mkdir()
    as_parquet(tmp_path / "p")
    as_lines(tmp_path / "d")
    parquet, lines = (assemble(read_movielens(tmp_path / name, ImportOptions(positive="4"))) for name in "pd")
    assert lines.users.equals(parquet.users)
    assert lines.items.equals(parquet.items)
    assert sorted(lines.events["item_id"].to_pylist()) == sorted(parquet.events["item_id"].to_pylist()) == [10, 10, 20]
    assert lines.events.schema == parquet.events.schema


def test_features_and_films_that_nobody_rated_stay(tmp_path):
    as_lines(tmp_path)
    tables = assemble(read_movielens(tmp_path, ImportOptions()))
    assert tables.users.to_pylist()[1] == {"user_id": 2, "gender": "M", "age": 25, "occupation": 4, "zip": "02138"}
    assert tables.items.to_pylist()[2] == {
        "item_id": 30,
        "title": "Am\u00e9lie (2001)",
        "genres": "Comedy",
        "year": 2001,
    }
    assert tables.items.schema.types == [pa.int64(), pa.string(), pa.string(), pa.int64()]


def test_missing_files_and_words_for_ratings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"has neither ratings\.parquet nor ratings\.dat"):
        read_movielens(tmp_path, ImportOptions())
    (tmp_path / "ratings.dat").write_text("1::1::5::978300000\n")
    with pytest.raises(DataError, match=r"users\.dat does not exist"):
        read_movielens(tmp_path, ImportOptions())
    with pytest.raises(ConfigError, match="--positive good"):
        read_movielens(tmp_path, ImportOptions(positive="good"))
