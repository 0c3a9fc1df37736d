"""Rows of a table as `tf.train.Example` messages, written with protobuf, in a descriptor of our own.

A feature is a list of integers, floats or bytes under a name. A value that is null has no feature; an empty list has
one without values. `decode.py` reads them back as columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from twotower.logs.events import DELTA_SEQ, HISTORY, VERSION
from twotower.schema import columns as c
from twotower.stream.rows import CONTEXT, FEATURES, Asked, Row, Types

INT64_LIST: Final = "int64_list"
FLOAT_LIST: Final = "float_list"
BYTES_LIST: Final = "bytes_list"

ROWS_BACK: Final = "rows_back"
"""A feature of a row whose history and user features stand in an earlier row of its file: how many rows earlier."""

_FIELDS: Final = descriptor_pb2.FieldDescriptorProto
_SHARED_TAG: Final = b"\x0a"
"""Of the field `features` of an Example."""


def _messages() -> tuple[Any, Any]:
    """The classes of Example and Features, in a pool of their own: TensorFlow may have its in the same process."""
    file = descriptor_pb2.FileDescriptorProto(
        name="twotower/example.proto", package="twotower.example", syntax="proto3"
    )

    def message(name: str, parent: Any = file.message_type) -> Any:
        return parent.add(name=name)

    def field(of: Any, name: str, number: int, kind: int, type_name: str = "", repeated: bool = False) -> Any:
        label = _FIELDS.LABEL_REPEATED if repeated else _FIELDS.LABEL_OPTIONAL
        return of.field.add(name=name, number=number, type=kind, label=label, type_name=type_name or None)

    for name, kind in (
        ("BytesList", _FIELDS.TYPE_BYTES),
        ("FloatList", _FIELDS.TYPE_FLOAT),
        ("Int64List", _FIELDS.TYPE_INT64),
    ):
        field(message(name), "value", 1, kind, repeated=True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, kind) in enumerate(
        ((BYTES_LIST, "BytesList"), (FLOAT_LIST, "FloatList"), (INT64_LIST, "Int64List")), 1
    ):
        field(feature, name, number, _FIELDS.TYPE_MESSAGE, f".twotower.example.{kind}").oneof_index = 0
    features = message("Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, _FIELDS.TYPE_STRING)
    field(entry, "value", 2, _FIELDS.TYPE_MESSAGE, ".twotower.example.Feature")
    field(features, "feature", 1, _FIELDS.TYPE_MESSAGE, ".twotower.example.Features.FeatureEntry", repeated=True)
    field(message("Example"), "features", 1, _FIELDS.TYPE_MESSAGE, ".twotower.example.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"twotower.example.{name}"))
        for name in ("Example", "Features")
    ]
    return found[0], found[1]


Example, Features = _messages()


def list_of(kind: pa.DataType) -> str:
    """The list of a feature that holds values of a type, or lists of it.

    >>> list_of(pa.list_(pa.string())), list_of(pa.bool_())
    ('bytes_list', 'int64_list')
    """
    if pa.types.is_list(kind):
        return list_of(kind.value_type)
    if pa.types.is_string(kind):
        return BYTES_LIST
    return FLOAT_LIST if pa.types.is_floating(kind) else INT64_LIST


def encode_rows(batches: Iterable[Sequence[Row]], types: Types) -> Iterator[bytes]:
    """Each row as the bytes of an Example, the same for the same batch.

    Rows of one request that follow each other in a batch have its history and its user features once, in the first of
    them that was shown: the others say how many rows back that is. So a request of many items and a long history stays
    small.

    Args:
        batches: rows that left at the same event.
        types: of ids and values.
    """
    kinds = {field.name: list_of(field.type) for field in types.schema()} | {ROWS_BACK: INT64_LIST}
    for rows in batches:
        shared: bytes = b""
        asked: Asked | None = None
        first_shown: int | None = None
        for place, row in enumerate(rows):
            if row.asked is not asked:
                asked, shared, first_shown = row.asked, _bytes(_shared(row.asked), kinds), None
            content = _bytes(_own(row), kinds) + shared
            if row.outcome in (c.IMPRESSED, c.CLICKED):
                if first_shown is None:
                    first_shown = place
                    content += _bytes(_of_shown(row.asked), kinds)
                else:
                    content += _bytes({ROWS_BACK: place - first_shown}, kinds)
            yield _SHARED_TAG + _varint(len(content)) + content


def _own(row: Row) -> dict[str, Any]:
    return {
        c.ITEM_ID: row.item_id,
        c.OUTCOME: row.outcome,
        c.CLICK_TS_MS: row.click_ts_ms,
        c.WEIGHT: row.weight,
        c.POSITION: row.position,
        c.SCORE: row.score,
        c.CHANNEL: row.channel,
        c.PROBABILITY: row.probability,
        c.PROPENSITY: row.propensity,
    }


def _shared(asked: Asked) -> dict[str, Any]:
    """What every row of a request has."""
    return {
        c.USER_ID: asked.user_id,
        c.REQUEST_ID: asked.request_id,
        c.REQUEST_TS_MS: asked.ts_ms,
        VERSION: asked.version,
        DELTA_SEQ: asked.delta_seq,
        **{f"{CONTEXT}{name}": value for name, value in asked.context.items()},
    }


def _of_shown(asked: Asked) -> dict[str, Any]:
    """What the rows of shown items have: models learn from these alone."""
    return {**{f"{FEATURES}{name}": value for name, value in asked.features.items()}, HISTORY: asked.history}


def _bytes(values: dict[str, Any], kinds: dict[str, str]) -> bytes:
    """Features of those values that are not null, ordered by name."""
    message = Features()
    feature = message.feature
    for name, value in values.items():
        if value is None:
            continue
        kind = kinds[name]
        if isinstance(value, list | tuple):
            _fill(getattr(feature[name], kind), kind, value)
        elif kind == BYTES_LIST:
            feature[name].bytes_list.value.append(value.encode())
        elif kind == INT64_LIST:
            feature[name].int64_list.value.append(int(value))  # protobuf takes no booleans for integers
        else:
            feature[name].float_list.value.append(value)
    found: bytes = message.SerializeToString(deterministic=True)
    return found


def _fill(values_of: Any, kind: str, many: Sequence[Any]) -> None:
    """Put several values into a feature's list, or none, which is another thing than no feature."""
    if not many:
        values_of.SetInParent()
    elif kind == BYTES_LIST:
        values_of.value.extend([text.encode() for text in many])
    elif kind == INT64_LIST:
        values_of.value.extend(map(int, many))
    else:
        values_of.value.extend(many)


def _varint(number: int) -> bytes:
    r"""A number in protobuf's base 128.

    >>> _varint(300)
    b'\xac\x02'
    """
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
