import gzip

import pyarrow as pa
import pytest

from twotower.datasets.text_file import read_text, read_type, word_among_numbers
from twotower.schema.errors import DataError


def read(tmp_path, data, name="t.csv"):
    (tmp_path / name).write_bytes(data)
    return {column: values.to_pylist() for column, values in read_text(tmp_path / name).items()}


def column(*values):
    return pa.chunked_array([pa.array(values, pa.string())])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_utf_8_and_utf_16_are_read(tmp_path, encoding):
    assert read(tmp_path, "a,b\n电影,é\n".encode(encoding)) == {"a": ["电影"], "b": ["é"]}


def test_only_the_empty_field_is_missing_quoted_or_not(tmp_path):
    assert read(tmp_path, b'a,b\nnull,\nNaN,""\nN/A,NA\n') == {"a": ["null", "NaN", "N/A"], "b": [None, None, "NA"]}


@pytest.mark.parametrize(
    ("name", "heading"),
    [("t.csv", b"a,b"), ("t.TSV", b"a\tb"), ("t.txt", b"a\tb"), ("t.csv", b"a;b"), ("t.txt", b"a|b")],
)
def test_the_delimiter_is_that_of_the_heading(tmp_path, name, heading):
    assert read(tmp_path, heading + b"\n" + heading.replace(b"a", b"1").replace(b"b", b"2"), name) == {
        "a": ["1"],
        "b": ["2"],
    }


def test_line_breaks_in_quotes_are_read_wherever_a_block_ends(tmp_path):
    rows = [(str(n), f'line\n"{n}"' + "x" * 400) for n in range(50_000)]  # 20 MB: more than one block
    text = "a,b\n" + "".join('{},"{}"\n'.format(a, b.replace('"', '""')) for a, b in rows)
    got = read(tmp_path, text.encode())
    assert list(zip(got["a"], got["b"], strict=True)) == rows


def test_a_value_that_is_larger_than_a_block_is_read(tmp_path):
    assert read(tmp_path, b'a\n"' + b"x\n" * 10_000_000 + b'"\n') == {"a": ["x\n" * 10_000_000]}


def test_any_line_end_and_a_last_line_without_one(tmp_path):
    for end in (b"\n", b"\r\n", b"\r"):
        assert read(tmp_path, b"a,b" + end + b"1,2" + end + end + b"3,4") == {"a": ["1", "3"], "b": ["2", "4"]}
    assert read(tmp_path, b"a,b") == {"a": [], "b": []}


def test_a_packed_file_is_read(tmp_path):
    assert read(tmp_path, gzip.compress(b"a\n1\n"), "t.csv.gz") == {"a": ["1"]}
    assert read(tmp_path, pa.compress(b"a\n1\n", "zstd", asbytes=True), "t.csv.zst") == {"a": ["1"]}


REFUSED = [
    ("t.csv", b"", "is empty"),
    ("t.csv", b"\n \n", "is empty"),
    ("t.csv", b"a,b,a\n1,2,3\n", "has the column a 2 times"),
    ("t.csv", b"a,b\n1,2\n\n3,4,5\n", r"line 4: 3 values where the heading names 2 columns: '3,4,5'"),
    ("t.csv", b'a,b\n1,"x\ny"\n3\n', "line 4: 1 values where the heading names 2 columns"),
    ("t.csv", b'a,b\n1,2\n3,"x\n4,y\n', "line 3: a quote is opened and never closed"),
    ("t.csv", b"a,b\n1,2\n3,\0\n", "line 3: a zero byte"),
    ("t.csv", "a,b\n1,2\n".encode("utf-16-le"), "a zero byte"),
    ("t.csv", "a,b\n1,2\n".encode("utf-16")[:-1], "begins as UTF-16 but is not whole"),
    ("t.csv", "a,b\n1,x\n2,电影\n".encode("gb18030"), r"line 3: the byte 0xB5 is not UTF-8; it may be gb18030"),
    ("t.csv", "名,b\n1,x\n".encode("gb18030"), "line 1: the byte"),
    ("t.csv", b"a,b\n1,\xff\xfe,3\n", "line 2: the byte 0xFF is not UTF-8"),
    ("t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 9, mtime=0)[:-9], "cannot be read, it is cut or damaged"),
    ("t.csv.gz", b"a,b\n1,2\n", "cannot be read, it is cut or damaged"),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_what_is_no_text_table_is_refused_with_its_line(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, data, name)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["7", "-12", None], "any", pa.int64()),
        (["7", "007"], "any", pa.string()),
        (["7", "+7"], "id", pa.string()),
        (["7", "-0"], "id", pa.string()),
        (["7", " 8"], "id", pa.string()),
        (["7", "9223372036854775808"], "id", pa.string()),
        (["1.0", "2.0"], "id", pa.string()),
        (["true", "false"], "id", pa.string()),
        (["7", " 8"], "any", pa.int64()),
        (["0x1F", "1"], "any", pa.string()),
        (["1.5", "-.5", "2e3"], "any", pa.float64()),
        (["1.5", "nan"], "any", pa.string()),
        (["1.5", "NaN", "inf"], "number", pa.float64()),
        (["+1", "02"], "number", pa.int64()),
        (["12345678901234567890", "1"], "any", pa.string()),
        (["true", "False", None], "any", pa.bool_()),
        (["2025-01-31"], "any", pa.date32()),
        (["2025-01-31T10:00:00.5"], "any", pa.timestamp("us")),
        (["2025-01-31T10:00:00+02:00"], "any", pa.timestamp("us", "UTC")),
        (["12:30"], "any", pa.string()),
        (["1"], "text", pa.string()),
        ([None], "any", pa.null()),
    ],
)
def test_text_has_the_type_that_all_its_values_have(values, kind, expected):
    assert read_type(column(*values), kind).type == expected


def test_a_word_among_numbers_is_named():
    assert word_among_numbers(column("1", "2.5", "NA", None)) == "NA"
    assert word_among_numbers(column("1", "x", "y")) is None
