import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.interactions import read_interactions, read_test
from twotower.datasets.tables import assemble
from twotower.schema.errors import ConfigError, DataError

T = 1_500_000_000_000


def test_a_csv_with_ratings_and_features_beside_it(tmp_path):
    (tmp_path / "plays.csv").write_text(
        f"user_id,item_id,ts_ms,rating,device\na,1,{T},5,tv\na,2,{T},2,tv\nb,7,{T},5,tv\n"
    )
    (tmp_path / "people.csv").write_text("user_id,age\na,30\nb,\n")
    pq.write_table(pa.table({"item_id": [1, 2], "genre": ["x", "y"]}), tmp_path / "things.parquet")
    source = read_interactions(tmp_path / "plays.csv", "3", tmp_path / "people.csv", tmp_path / "things.parquet")
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
    source = read_interactions(tmp_path, "all", users=tmp_path / "users.csv", test=tmp_path / "test.csv")
    assert source.events["item_id"].to_pylist() == [1, 2]


def test_outcomes_of_their_own_are_used(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,outcome\n1,1,clicked\n1,2,pre_rank_rejected\n")
    assert assemble(read_interactions(tmp_path / "log.csv", "all")).events["outcome"].to_pylist() == [
        "clicked",
        "pre_rank_rejected",
    ]
    with pytest.raises(ConfigError, match="has a column outcome"):
        read_interactions(tmp_path / "log.csv", "3")


def test_a_page_of_impressions_is_one_request(tmp_path):
    (tmp_path / "log.csv").write_text(
        f"user_id,item_id,outcome,ts_ms,request_id\n1,1,clicked,{T},7\n1,2,impressed,{T},7\n1,3,clicked,{T},8\n"
    )
    events = assemble(read_interactions(tmp_path / "log.csv", "all")).events
    assert events["request_id"].to_pylist() == ["7", "7", "8"]
    assert events["request_ts_ms"].to_pylist() == [T, T, T + 1]


def test_rating_and_weight_together_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,rating,weight\n1,1,1,1\n")
    with pytest.raises(DataError, match="both rating and weight"):
        read_interactions(tmp_path / "log.csv", "all")


def test_a_test_without_ratings_is_all_positive(tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id,note\n1,1,x\n")
    assert read_test(tmp_path / "test.csv", None).rows.to_pydict() == {"user_id": [1], "item_id": [1]}
    rows = read_test(tmp_path / "test.csv", 4.0).rows
    assert rows.to_pydict() == {"user_id": [1], "item_id": [1], "outcome": ["clicked"]}


def test_a_test_with_ratings_keeps_them(tmp_path):
    (tmp_path / "test.csv").write_text("user_id,item_id,rating\n1,1,3\n")
    assert read_test(tmp_path / "test.csv", 4.0).rows.to_pydict() == {"user_id": [1], "item_id": [1], "weight": [3]}
