from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from twotower.schema.errors import ConfigError, DataError
from twotower.schema.formats import FORMATS, check_writable, format_of, read_rows, write_rows

ROWS = pa.table(
    {"user_id": ["007", 'a "b", c', "ü\nx"], "rank": pa.array([1, 2, 3], pa.int32()), "score": [0.5, -1, 2]}
)


@pytest.mark.parametrize("end", [*FORMATS, ".CSV", ".JsonL"])
def test_a_file_is_written_and_read_in_the_format_that_its_name_says(end: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{end}"
    with write_rows(path, ROWS.schema) as write:
        write(ROWS.slice(0, 1))
        write(ROWS.slice(1))
    head = path.read_bytes()[:4]
    assert (head == b"PAR1") == (end == ".parquet")
    assert (head == b'{"us') == (end.lower() == ".jsonl")
    types = dict(zip(ROWS.column_names, ROWS.schema.types, strict=True))
    found = read_rows(path, types, "--users")
    assert found.cast(ROWS.schema).equals(ROWS)


def test_csv_is_what_other_programs_read(tmp_path: Path) -> None:
    with write_rows(tmp_path / "rows.csv", ROWS.schema) as write:
        write(ROWS.slice(0, 2))
    read = pa_csv.read_csv(tmp_path / "rows.csv")
    assert read["score"].to_pylist() == [0.5, -1]
    assert read["user_id"][1].as_py() == 'a "b", c'


@pytest.mark.parametrize("end", ["", ".xlsx", ".csv.gz", ".parquet "])
def test_another_end_is_refused_with_those_that_are_known(end: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.parquet or \.csv or \.jsonl, which is its format"):
        format_of(tmp_path / f"rows{end}", "--out")


@pytest.mark.parametrize(
    ("kind", "ids"), [(pa.string(), ["007", "7", "07", "null", "NA"]), (pa.int64(), [7, 7, -(2**63), 2**63 - 1])]
)
def test_ids_of_csv_are_of_the_kind_that_is_asked_for(kind: pa.DataType, ids: list[object], tmp_path: Path) -> None:
    (tmp_path / "u.csv").write_text("\ufeffuser_id\r\n" + "".join(f"{one}\r\n" for one in ids))
    assert read_rows(tmp_path / "u.csv", {"user_id": kind}, "--users")["user_id"].to_pylist() == ids


BROKEN: list[tuple[str, bytes, str]] = [
    ("u.csv", b"user_id\nseven\n", "column user_id holds text that is no int64"),
    ("u.csv", b"user_id,hour\n7\n", "line 2 has 1 fields, and the first one names 2 columns"),
    ("u.csv", b"user_id,user_id\n7,8\n", "has the column user_id 2 times"),
    ("u.csv", b"user_id\n\xff\n", "cannot be read: 'utf-8' codec"),
    ("u.csv", b'user_id\n"7\n', "cannot be read: unexpected end of data"),
    ("u.csv", b"user_id,tags\n7,a\n", "column tags holds list<item: string>, which CSV cannot hold"),
    ("u.jsonl", b'{"user_id": 7}\n[1]\n', "line 2 is no object"),
    ("u.jsonl", b'{"user_id": 7', "line 1 is no JSON"),
    ("u.jsonl", b'{"user_id": 7}\n{"user_id": "7"}\n', "column user_id holds values of more than one type"),
    ("u.jsonl", b'{"user_id": 99999999999999999999}\n', "column user_id holds values of more than one type"),
    ("u.jsonl", b"[" * 100_000, "line 1 is no JSON"),
    ("u.parquet", b"PAR1", "cannot be read"),
    ("u.parquet", b"", "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_refused_with_what_is_wrong(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name, {"user_id": pa.int64(), "tags": pa.list_(pa.string())}, "--users")
    assert message in str(error.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--users .*u.csv cannot be read: No such file"):
        read_rows(tmp_path / "u.csv", {}, "--users")


def test_a_file_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "x.csv", "--out")
    assert not list((tmp_path / "new").iterdir())
    for path, message in (
        (tmp_path / "folder.csv", "a folder stands there"),
        (tmp_path / "file" / "x.csv", "cannot be written: "),
        (Path("/proc/x.csv"), "cannot be written"),
        (tmp_path / ("x" * 300 + ".csv"), "cannot be written: File name too long"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_writable(path, "--out")


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with write_rows(tmp_path / "x.csv", ROWS.schema) as write:
            write(ROWS)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert not list(tmp_path.iterdir())
    with write_rows(tmp_path / "x.parquet", ROWS.schema):
        pass
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 0
