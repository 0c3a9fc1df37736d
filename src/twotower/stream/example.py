"""Rows of a table as `tf.train.Example` messages, written with protobuf, in a descriptor of our own.

A feature is a list of integers, floats or bytes under a name. A value that is null has no feature; an empty list has
one without values. `decode.py` reads them back as columns.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from operator import attrgetter
from typing import Any, Final

import pyarrow as pa
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from twotower.schema import columns as c
from twotower.stream.rows import Row, RowRequest, Types

INT64_LIST: Final = "int64_list"
FLOAT_LIST: Final = "float_list"
BYTES_LIST: Final = "bytes_list"

ROWS_BACK: Final = "rows_back"
"""A feature of a row whose history and user features stand in an earlier row of its file: how many rows earlier."""

_FIELDS: Final = descriptor_pb2.FieldDescriptorProto
_FEATURES_TAG: Final = b"\x0a"
"""Tag of the field `features` of an Example."""
_OWN: Final = (
    c.ITEM_ID,
    c.OUTCOME,
    c.CLICK_TS_MS,
    c.WEIGHT,
    c.POSITION,
    c.SCORE,
    c.CHANNEL,
    c.PROBABILITY,
    c.PROPENSITY,
)
"""Columns that are attributes of a `Row` under the same name."""
_own: Final = attrgetter(*_OWN)


def _messages() -> tuple[Any, Any]:
    """The classes of Example and Features, in a pool of their own: TensorFlow may have its in the same process."""
    file = descriptor_pb2.FileDescriptorProto(
        name="twotower/example.proto", package="twotower.example", syntax="proto3"
    )

    def field(of: Any, name: str, number: int, kind: int, type_name: str = "", repeated: bool = False) -> Any:
        label = _FIELDS.LABEL_REPEATED if repeated else _FIELDS.LABEL_OPTIONAL
        return of.field.add(name=name, number=number, type=kind, label=label, type_name=type_name or None)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, list_name, kind) in enumerate(
        (
            (BYTES_LIST, "BytesList", _FIELDS.TYPE_BYTES),
            (FLOAT_LIST, "FloatList", _FIELDS.TYPE_FLOAT),
            (INT64_LIST, "Int64List", _FIELDS.TYPE_INT64),
        ),
        1,
    ):
        field(file.message_type.add(name=list_name), "value", 1, kind, repeated=True)
        field(feature, name, number, _FIELDS.TYPE_MESSAGE, f".twotower.example.{list_name}").oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, _FIELDS.TYPE_STRING)
    field(entry, "value", 2, _FIELDS.TYPE_MESSAGE, ".twotower.example.Feature")
    field(features, "feature", 1, _FIELDS.TYPE_MESSAGE, ".twotower.example.Features.FeatureEntry", repeated=True)
    example = file.message_type.add(name="Example")
    field(example, "features", 1, _FIELDS.TYPE_MESSAGE, ".twotower.example.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = (f"twotower.example.{name}" for name in ("Example", "Features"))
    return tuple(message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names)


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


def encode_rows(
    batches: Iterable[Sequence[Row]], types: Types, numbers: Iterable[int] | None = None
) -> Iterator[bytes]:
    """Each row as the bytes of an Example; the same batch always gives the same bytes.

    Rows of one request that follow each other in a batch (rows that left at the same event) hold its history and user
    features once, in the first of them that was shown. The others say how many rows back that is, so that a request of
    many items with a long history stays small. The rows have `numbers` in their partition, or from 0 on.
    """
    kinds = {field.name: list_of(field.type) for field in types.schema()} | dict.fromkeys(
        (c.ROW, ROWS_BACK), INT64_LIST
    )
    number = iter(count() if numbers is None else numbers)
    for rows in batches:
        shared: bytes = b""
        request: RowRequest | None = None
        first_shown: int | None = None
        for place, row in enumerate(rows):
            if row.request is not request:
                request, shared, first_shown = row.request, _bytes(_shared(row.request), kinds), None
            own = dict(zip(_OWN, _own(row), strict=True))
            own[c.ROW] = next(number)
            content = shared
            if row.outcome in (c.IMPRESSED, c.CLICKED):
                if first_shown is None:
                    first_shown = place
                    content += _bytes(_of_shown(request), kinds)
                else:
                    own[ROWS_BACK] = place - first_shown
            content = _bytes(own, kinds) + content
            yield _FEATURES_TAG + _varint(len(content)) + content


def _shared(request: RowRequest) -> dict[str, Any]:
    """What every row of a request has."""
    return {
        c.USER_ID: request.user_id,
        c.REQUEST_ID: request.request_id,
        c.REQUEST_TS_MS: request.ts_ms,
        c.VERSION: request.version,
        c.DELTA_SEQ: request.delta_seq,
        **{f"{c.CONTEXT}{name}": value for name, value in request.context.items()},
    }


def _of_shown(request: RowRequest) -> dict[str, Any]:
    """What only the rows of shown items have: models learn from no others."""
    return {
        **{f"{c.FEATURES}{name}": value for name, value in request.features.items()},
        c.HISTORY: request.history,
    }


def _bytes(values: dict[str, Any], kinds: dict[str, str]) -> bytes:
    """Features of those values that are not null, ordered by name."""
    message = Features()
    feature = message.feature
    for name, value in values.items():
        if value is None:
            continue
        kind = kinds[name]
        if isinstance(value, list | tuple):
            many = [text.encode() for text in value] if kind == BYTES_LIST else value
            values_of = getattr(feature[name], kind)
            values_of.SetInParent()  # an empty list is another thing than no feature
            values_of.value.extend(map(int, many) if kind == INT64_LIST else many)
        elif kind == BYTES_LIST:
            feature[name].bytes_list.value.append(value.encode())
        elif kind == INT64_LIST:
            feature[name].int64_list.value.append(int(value))  # protobuf takes no booleans for integers
        else:
            feature[name].float_list.value.append(value)
    content: bytes = message.SerializeToString(deterministic=True)
    return content


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
