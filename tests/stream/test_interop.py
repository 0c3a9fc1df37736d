"""TensorFlow reads what we write, and we read what it writes. It lives in an environment of its own (`make peers`)."""

import json
import os
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from twotower.stream.decode import decode
from twotower.stream.example import encode_rows
from twotower.stream.rows import Row, Types
from twotower.stream.tfrecord import read_records, write_records

PEERS = Path(os.environ.get("TWOTOWER_PEERS") or Path(__file__).parents[2] / ".peers")

READ = """
import json, sys
import tensorflow as tf

def feature(kind, listed, default):
    dtype = getattr(tf, kind)
    return tf.io.RaggedFeature(dtype) if listed else tf.io.FixedLenFeature((), dtype, default)

def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    value = getattr(value, "tolist", lambda: value)()
    return [plain(one) for one in value] if isinstance(value, list) else value

spec = {name: feature(*kind) for name, kind in json.loads(sys.argv[2]).items()}
for content in tf.data.TFRecordDataset(sys.argv[1]).as_numpy_iterator():
    row = tf.io.parse_single_example(content, spec)
    print(json.dumps({name: plain(value.numpy()) for name, value in row.items()}))
"""
WRITE = """
import sys
import tensorflow as tf
with tf.io.TFRecordWriter(sys.argv[1]) as writer:
    for n in range(500):
        feature = {
            "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[n * (-1) ** n * 10**12])),
            "text": tf.train.Feature(bytes_list=tf.train.BytesList(value=["é".encode() * (n % 5)])),
            "numbers": tf.train.Feature(float_list=tf.train.FloatList(value=[n / 3] * (n % 4))),
        }
        writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
"""
NONE = {"int64": -1, "float32": -1.0, "string": "none"}


def tensorflow(program: str, *arguments: str) -> list[str]:
    """What a program prints there, by line."""
    python = PEERS / "tfrs" / "bin" / "python"
    if not python.exists():
        pytest.skip("TensorFlow is absent: make peers")
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": ""}
    done = subprocess.run([python, "-c", program, *arguments], capture_output=True, text=True, env=quiet, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tensorflow_reads_the_same_values(many_rows: list[Row], types: Types, tmp_path: Path) -> None:
    path = tmp_path / "shard.tfrecord"
    write_records(path, encode_rows([many_rows], types))
    ours = decode(read_records(path), types.schema()).to_pylist()
    kinds = {}
    for field in types.schema():
        listed = pa.types.is_list(field.type)
        kind = field.type.value_type if listed else field.type
        name = "string" if pa.types.is_string(kind) else "float32" if pa.types.is_floating(kind) else "int64"
        kinds[field.name] = (name, listed, NONE[name])
    theirs = [json.loads(line) for line in tensorflow(READ, str(path), json.dumps(kinds))]
    assert len(theirs) == len(ours)
    for own, other in zip(ours, theirs, strict=True):
        for name, (kind, listed, _) in kinds.items():
            missing = [] if listed else NONE[kind]
            assert other[name] == (missing if own[name] is None else own[name]), name


def test_what_tensorflow_writes_is_read(tmp_path: Path) -> None:
    tensorflow(WRITE, str(tmp_path / "file"))
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("numbers", pa.list_(pa.float32()))])
    rows = decode(read_records(tmp_path / "file"), schema).to_pylist()
    assert [row["id"] for row in rows] == [n * (-1) ** n * 10**12 for n in range(500)]
    assert [row["text"] for row in rows] == ["é" * (n % 5) for n in range(500)]
    assert [row["numbers"] for row in rows] == [[pytest.approx(n / 3)] * (n % 4) for n in range(500)]
