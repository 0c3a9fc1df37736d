import gzip
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.sources import SourceFile, find_files, read_lines, read_table
from twotower.schema.errors import DataError


def test_csv_and_parquet_of_a_folder_are_one_table(tmp_path):
    pq.write_table(pa.table({"b": ["x"], "a": pa.array([1], pa.int8())}), tmp_path / "2.parquet")
    (tmp_path / "1.csv").write_text("a,b\n2,y\n3,\n")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / ".tmp-3.parquet").write_text("not read")
    read = read_table(tmp_path)
    assert read.rows.to_pydict() == {"a": [2, 3, 1], "b": ["y", None, "x"]}
    assert read.not_read == (tmp_path / "notes.md",)


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_columns_are_chosen_and_renamed(tmp_path, name):
    if name == "t.csv":
        (tmp_path / name).write_text("a,b,c\n1,2,3\n")
    else:
        pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / name)
    assert read_table(tmp_path / name, {"c": "z", "a": "a"}).rows.to_pydict() == {"z": [3], "a": [1]}
    with pytest.raises(DataError, match=r"t\.\w+ has no column d; it has a, b, c"):
        read_table(tmp_path / name, {"d": "d"})


def test_files_can_be_left_out(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("x\n1\n")
    assert find_files(tmp_path, without=[tmp_path / "b.csv"]).files == (SourceFile(tmp_path / "a.csv"),)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        read_table(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no file \* that ends in one of \.parquet, \.csv"):
        read_table(tmp_path)
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"a\.xlsx ends in none of \.parquet, \.csv"):
        read_table(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"there is a\.xlsx"):
        read_table(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv is empty"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        read_table(tmp_path / "a.parquet")


def test_files_with_other_columns_or_types_are_refused(tmp_path):
    (tmp_path / "1.csv").write_text("a,b\n1,1\n")
    (tmp_path / "2.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"2\.csv has the columns a, .*1\.csv has a, b"):
        read_table(tmp_path)
    (tmp_path / "2.csv").unlink()
    pq.write_table(pa.table({"a": [True], "b": [1]}), tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"different types in column a, bool in .*2\.parquet and int64 in .*1\.csv"):
        read_table(tmp_path)


def test_lines_of_grouplens_are_latin_1_parted_by_two_colons(tmp_path):
    (tmp_path / "movies.dat").write_bytes('1::Amélie: "Le" film (2001)::Comedy|Romance\n'.encode("latin-1"))
    columns = {"id": pa.int64(), "title": pa.string(), "genres": pa.string()}
    got = read_lines(tmp_path / "movies.dat", columns)
    assert got.rows.to_pylist() == [{"id": 1, "title": 'Amélie: "Le" film (2001)', "genres": "Comedy|Romance"}]
    (tmp_path / "movies.dat").write_text("1::Amelie\n")
    with pytest.raises(DataError, match="is not of the form id::title::genres"):
        read_lines(tmp_path / "movies.dat", columns)


def test_folders_named_column_and_value_are_columns(tmp_path):
    for folder, item in (
        ("outcome=clicked/city=New%20York", 1),
        ("outcome=impressed/city=__HIVE_DEFAULT_PARTITION__", 2),
    ):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"item_id": [item]}), tmp_path / folder / "part-0.parquet")
    assert read_table(tmp_path).rows.to_pydict() == {
        "item_id": [1, 2],
        "outcome": ["clicked", "impressed"],
        "city": ["New York", None],
    }


def test_values_of_folders_have_the_type_of_them_all(tmp_path):
    for shop, user in ((1, "007"), (2, "7")):
        (tmp_path / f"shop={shop}/user_id={user}").mkdir(parents=True)
        (tmp_path / f"shop={shop}/user_id={user}/a.csv").write_text("item_id\n1\n")
    assert read_table(tmp_path).rows.to_pydict() == {"item_id": [1, 1], "shop": [1, 2], "user_id": ["007", "7"]}


def test_a_folder_that_contradicts_its_file_is_refused(tmp_path):
    (tmp_path / "day=3").mkdir()
    pq.write_table(pa.table({"day": [3, 3]}), tmp_path / "day=3/a.parquet")
    assert read_table(tmp_path).rows.to_pydict() == {"day": [3, 3]}
    pq.write_table(pa.table({"day": [3, 4]}), tmp_path / "day=3/a.parquet")
    with pytest.raises(DataError, match=r"the folder says day=3, the column day of the file holds \[3, 4\]"):
        read_table(tmp_path)


def test_hidden_files_are_left_out_and_every_other_one_is_read_or_named(tmp_path):
    text = b"a\n1\n"
    contents = {
        "a.csv": text,
        "b.CSV": text,
        "c.csv.gz": gzip.compress(text),
        "d.tsv.ZST": pa.compress(text, "zstd", asbytes=True),
        "e.Txt": text,
        "_SUCCESS": b"",
        ".hidden.csv": b"x\n",
        "_temporary/0/f.csv": b"x\n",
        ".ipynb_checkpoints/g.csv": b"x\n",
        "_day=3/h.csv": text,
        "notes.md": b"",
        "part-0": text,
        "i.parquet.gz": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = find_files(tmp_path)
    read = [file.path.relative_to(tmp_path).as_posix() for file in found.files]
    assert sorted(read) == ["_day=3/h.csv", "a.csv", "b.CSV", "c.csv.gz", "d.tsv.ZST", "e.Txt"]
    assert [path.name for path in found.not_read] == ["i.parquet.gz", "notes.md", "part-0"]
    (tmp_path / "_day=3/h.csv").unlink()
    assert read_table(tmp_path).rows["a"].to_pylist() == [1] * 5


def test_linked_folders_are_read_once_and_never_without_end(tmp_path):
    (tmp_path / "t/day=1").mkdir(parents=True)
    (tmp_path / "t/day=1/a.csv").write_text("a\n1\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/b.csv").write_text("a\n2\n")
    (tmp_path / "t/day=2").symlink_to(tmp_path / "other")
    (tmp_path / "t/day=1/up").symlink_to(tmp_path / "t")
    assert read_table(tmp_path / "t").rows.to_pydict() == {"a": [1, 2], "day": [1, 2]}


def test_something_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv is neither a file nor a folder"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("a\n1\n")
    assert find_files(tmp_path).not_read == (tmp_path / "a.csv",)


def test_text_takes_the_type_that_parquet_beside_it_says(tmp_path):
    (tmp_path / "1.csv").write_text("user_id\n7\n")
    pq.write_table(pa.table({"user_id": ["8"]}), tmp_path / "2.parquet")
    assert read_table(tmp_path).rows.to_pydict() == {"user_id": ["7", "8"]}


def test_ids_of_all_text_files_are_of_one_kind(tmp_path):
    (tmp_path / "1.csv").write_text("user_id\n7\n")
    (tmp_path / "2.csv").write_text("user_id\n07\n")
    assert read_table(tmp_path).rows.to_pydict() == {"user_id": ["7", "07"]}


def test_every_column_is_told_with_its_type_and_what_is_missing(tmp_path):
    (tmp_path / "t.csv").write_text(",user_id,age,note\n0,1,3,\n1,2,NA,x\n2,3,4,\n3,4,5,\n")
    columns = read_table(tmp_path / "t.csv").columns
    assert [(one.name, one.type, one.missing, one.to, one.note) for one in columns] == [
        ("", "", None, None, "left out: an index without a name"),
        ("user_id", "int64", 0, "user_id", ""),
        ("age", "string", 0, "age", "text, because it holds 'NA'"),
        ("note", "string", 3, "note", ""),
    ]
    chosen = read_table(tmp_path / "t.csv", {"user_id": "who"}).columns
    assert [(one.name, one.to) for one in chosen if one.name] == [("user_id", "who"), ("age", None), ("note", None)]


def test_dictionaries_and_other_kinds_of_text_are_text_and_bytes_only_if_they_are_utf_8(tmp_path):
    table = pa.table(
        {
            "a": pa.array(["x", None]).dictionary_encode(),
            "b": pa.array(["x", None], pa.large_string()),
            "c": pa.array(["x", None], pa.string_view()),
            "d": pa.array([b"x", None]),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_table(tmp_path / "t.parquet").rows
    assert rows.schema.types == [pa.string()] * 4
    assert rows.to_pylist()[0] == dict.fromkeys("abcd", "x")
    pq.write_table(pa.table({"title": [b"\xb5\xe7"]}), tmp_path / "t.parquet")
    with pytest.raises(
        DataError, match=r"t\.parquet, column title is of type binary and holds bytes that are not UTF-8"
    ):
        read_table(tmp_path / "t.parquet")


def test_a_parquet_file_with_one_name_twice_or_a_lost_end_is_refused(tmp_path):
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="has the column a 2 times: give each its own name"):
        read_table(tmp_path / "t.parquet")
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(data[:-9])
    with pytest.raises(DataError, match="cannot be read, it is cut, damaged or no Parquet"):
        read_table(tmp_path / "t.parquet")
