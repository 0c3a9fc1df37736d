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
