"""The decoder against protobuf's own reading of the same bytes, one record after the other."""

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.stream.decode import decode, decode_rows
from twotower.stream.example import Example, encode_rows, list_of
from twotower.stream.rows import Row, RowRequest, Types
from twotower.stream.tfrecord import Records, frame, split_records

SCHEMA = pa.schema(
    [
        ("a", pa.int64()),
        ("ab", pa.list_(pa.int64())),
        ("b", pa.float32()),
        ("bb", pa.list_(pa.float32())),
        ("c", pa.string()),
        ("cé", pa.list_(pa.string())),
        ("d", pa.bool_()),
    ]
)


def records_of(contents: list[bytes]) -> Records:
    return split_records(b"".join(frame(content) for content in contents), "test")


def plainly(contents: list[bytes], schema: pa.Schema) -> list[dict[str, Any]]:
    """What the records say, by protobuf."""
    found = []
    for content in contents:
        features = Example.FromString(content).features.feature
        row: dict[str, Any] = {}
        for field in schema:
            if field.name not in features or not features[field.name].WhichOneof("kind"):
                row[field.name] = None
                continue
            values = list(getattr(features[field.name], list_of(field.type)).value)
            values = [value.decode() if isinstance(value, bytes) else value for value in values]
            if pa.types.is_list(field.type):
                row[field.name] = values
            else:
                row[field.name] = values[0] if values else None
                if pa.types.is_boolean(field.type) and values:
                    row[field.name] = bool(values[0])
        found.append(row)
    return found


def test_rows_come_back(many_rows: list[Row], types: Types) -> None:
    table = decode_rows(records_of(list(encode_rows([many_rows], types))), 0, len(many_rows), types.schema())
    assert table.schema == types.schema()
    for row, got in zip(many_rows, table.to_pylist(), strict=True):
        asked, shown = row.request, row.outcome != "rank_rejected"
        assert (got["user_id"], got["item_id"], got["outcome"]) == (asked.user_id, row.item_id, row.outcome)
        assert (got["request_id"], got["request_ts_ms"], got["click_ts_ms"]) == (
            asked.request_id, asked.ts_ms, row.click_ts_ms,
        )  # fmt: skip
        assert (got["position"], got["channel"]) == (row.position, row.channel)
        for name in ("score", "weight", "probability", "propensity"):
            assert got[name] == (None if getattr(row, name) is None else pytest.approx(getattr(row, name)))
        assert (got["version"], got["delta_seq"]) == (asked.version, asked.delta_seq)
        for name in types.context:
            assert got[f"{c.CONTEXT}{name}"] == asked.context.get(name)
        for name in types.features:
            wanted = asked.features.get(name) if shown else None
            assert got[f"{c.FEATURES}{name}"] == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)
        assert got["history"] == (asked.history if shown else None)


def test_any_part_of_the_rows_comes_back_with_its_history(many_rows: list[Row], types: Types) -> None:
    records = records_of(list(encode_rows([many_rows], types)))
    whole = decode_rows(records, 0, len(many_rows), types.schema())
    for first in range(len(many_rows) + 1):
        for end in range(first, min(first + 4, len(many_rows)) + 1):
            assert decode_rows(records, first, end, types.schema()) == whole.slice(first, end - first)


def test_the_history_of_a_request_is_written_once(types: Types) -> None:
    asked = RowRequest(1, "r1", 1_700_000_000_000, history=[f"item {n}" for n in range(1000)])
    rows = [Row(asked, f"item {n}", "rank_rejected" if n % 3 else "clicked") for n in range(2000)]
    assert sum(map(len, encode_rows([rows], types))) < 310_000
    found = decode_rows(records_of(list(encode_rows([rows], types))), 1500, 1506, types.schema())["history"]
    assert [one and len(one) for one in found.to_pylist()] == [1000, None, None, 1000, None, None]


def test_a_history_that_is_not_there_is_an_error(many_rows: list[Row], types: Types) -> None:
    contents = list(encode_rows([many_rows], types))
    with pytest.raises(DataError, match="rows back, which are not there"):
        decode_rows(records_of(contents[1:]), 0, len(contents) - 1, types.schema())


def _wild(draw: random.Random) -> bytes:
    """An Example as other writers may write it: any order, unknown features, numbers unpacked, parts given twice."""
    example = Example()
    values: dict[str, list[Any]] = {
        "int64_list": [draw.choice([0, 1, -1, 127, 128, 2**63 - 1, -(2**63)]) for _ in range(3)],
        "float_list": [draw.choice([0.0, -1.5, 1e30, float("inf")]) for _ in range(3)],
        "bytes_list": [draw.choice(["", "x", "漢字", "y" * 300]).encode() for _ in range(3)],
    }
    names = [field.name for field in SCHEMA] + ["unknown", "", "x" * 200]
    draw.shuffle(names)
    for name in names[: draw.randrange(len(names) + 1)]:
        kind = list_of(SCHEMA.field(name).type) if name in SCHEMA.names else draw.choice(list(values))
        single = name in SCHEMA.names and not pa.types.is_list(SCHEMA.field(name).type)
        size = draw.choice([0, 1] if single else [0, 1, 2, 3])
        part = getattr(example.features.feature[name], kind)
        part.SetInParent()
        part.value.extend(values[kind][:size])
    content: bytes = example.SerializeToString()
    again = Example()
    if draw.random() < 0.3:  # of one name given twice the last counts, and two `features` are one
        again.features.feature["a"].int64_list.value.append(77)
        content += again.SerializeToString()
    if draw.random() < 0.3:  # unpacked numbers, unknown fields of every wire type
        content += bytes.fromhex("0a0c 0a0a 0a0161 1205 1a03 08 96 01")
        content += bytes.fromhex("0a10 0a0e 0a0162 1209 1207 0d 0000c03f") if draw.random() < 0 else b""
        content += bytes.fromhex("10 05  19 0102030405060708  22 02 6162  2d 01020304")
    return content


@pytest.mark.parametrize("seed", range(30))
def test_any_example_is_read_as_protobuf_reads_it(seed: int) -> None:
    draw = random.Random(seed)
    contents = [_wild(draw) for _ in range(200)]
    assert decode(records_of(contents), SCHEMA).to_pylist() == plainly(contents, SCHEMA)


def test_unpacked_floats_are_read() -> None:
    content = bytes.fromhex("0a11 0a0f 0a026262 1209 1207") + bytes.fromhex("0d 0000c03f") + bytes.fromhex("0a00")
    contents = [content]
    assert plainly(contents, SCHEMA)[0]["bb"] == [1.5]
    assert decode(records_of(contents), SCHEMA)["bb"].to_pylist() == [[1.5]]


def test_many_records_are_read_in_chunks(types: Types, many_rows: list[Row]) -> None:
    contents = list(encode_rows([many_rows], types)) * 200
    table = decode_rows(records_of(contents), 0, len(contents), types.schema())
    assert table.num_rows == len(contents) > 2 * 8192
    assert table.slice(90 * 150, 90).to_pylist() == table.slice(0, 90).to_pylist()


def test_no_records_are_a_table_of_no_rows(types: Types) -> None:
    assert decode(records_of([]), types.schema()).num_rows == 0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2**32 - 1))
def test_bytes_that_are_no_example_never_do_worse_than_an_error(place: int, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(_wild(draw) or b"\x0a\x00")
    content[place % len(content)] = draw.randrange(256)
    good = _wild(draw)
    try:
        decode(records_of([good, bytes(content), good]), SCHEMA)
    except DataError:
        return


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x05ab", "record 1 is no tf.train.Example"),
        (b"\xff" * 12, "record 1 is no tf.train.Example"),
        (b"\x0b", "record 1 is no tf.train.Example"),
        (bytes.fromhex("0a0b 0a09 0a0161 1204 1a02 0a05"), "record 1: a is no tf.train.Feature"),
    ],
)
def test_what_is_no_example_is_named(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(records_of([b"", content, b""]), SCHEMA)


def test_a_feature_of_another_kind_is_refused() -> None:
    example = Example()
    example.features.feature["a"].float_list.value.append(1.0)
    with pytest.raises(DataError, match="record 0: a is a float_list, where a int64_list is expected"):
        decode(records_of([example.SerializeToString()]), SCHEMA)


def test_two_values_where_one_is_due_are_refused() -> None:
    example = Example()
    example.features.feature["a"].int64_list.value.extend([1, 2])
    with pytest.raises(DataError, match="record 0: a has 2 values, where one is expected"):
        decode(records_of([example.SerializeToString()]), SCHEMA)


def test_text_that_is_not_utf_8_is_refused() -> None:
    example = Example()
    example.features.feature["c"].bytes_list.value.append(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        decode(records_of([example.SerializeToString()]), SCHEMA)


def test_floats_keep_their_bits() -> None:
    example = Example()
    numbers = np.array([0.1, -0.0, 3.4e38, 1e-45], np.float32)
    example.features.feature["bb"].float_list.value.extend(numbers.tolist())
    got = decode(records_of([example.SerializeToString()]), SCHEMA)["bb"].combine_chunks().flatten().to_numpy()
    assert got.tobytes() == numbers.tobytes()
