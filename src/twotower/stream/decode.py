"""Decodes `tf.train.Example` messages to Arrow columns, all messages of a chunk at once.

A protobuf message is a run of fields, and where one begins is known only when the one before it was read. NumPy reads
the first field of every message at once, then every second one, and so on: loops are over the fields of a message,
never over messages. N messages; M fields of all of them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.features.columns import pointers, ranges
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.stream.example import BYTES_LIST, FLOAT_LIST, INT64_LIST, ROWS_BACK, list_of
from twotower.stream.tfrecord import Records

Places = npt.NDArray[np.int64]

_CHUNK: Final = 4096
"""Messages at a time: more leave the processor's cache."""
_SPARE: Final = 16
"""Zero bytes behind the data, so that reading a number never leaves it."""
_LONGEST: Final = 10
"""Bytes of the longest varint."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types."""
_LISTS: Final = {1: BYTES_LIST, 2: FLOAT_LIST, 3: INT64_LIST}


class _Malformed(Exception):
    """The bytes of a message, given by its number, are no field."""


@dataclass(frozen=True)
class _Fields:
    """Fields of messages, in the order of the messages' number and then of their place."""

    owner: Places
    """(M,) the message that a field is of."""
    number: Places
    """(M,) of the field."""
    wire: Places
    """(M,) wire type."""
    start: Places
    """(M,) where its content begins."""
    end: Places
    """(M,) where that ends."""

    def take(self, mask: npt.NDArray[np.bool_]) -> "_Fields":
        """Those that are marked."""
        if mask.all():
            return self
        return _Fields(self.owner[mask], self.number[mask], self.wire[mask], self.start[mask], self.end[mask])

    def of(self, number: int) -> "_Fields":
        """Those with a number and a length."""
        return self.take((self.number == number) & (self.wire == _LENGTH))


def _check(wrong: npt.NDArray[np.bool_], owner: Places) -> None:
    """Refuse the first message (M,) that is wrong."""
    if wrong.any():
        raise _Malformed(int(owner[wrong][0]))


def decode(records: Records, schema: pa.Schema) -> pa.Table:
    """The columns of a schema from N records, an Example each; (N,) rows, null where a record has no such feature.

    The schema has int64, int32, bool, float32 and string columns, and lists of int64, float32 and string. Other
    features are left out.

    Raises:
        DataError: a record is no Example, a feature is of another kind than its column, a scalar has several values,
            or text is not UTF-8.
    """
    chunks = [
        _decode(records, begin, min(begin + _CHUNK, len(records)), schema) for begin in range(0, len(records), _CHUNK)
    ]
    return pa.Table.from_batches(chunks, schema)


def decode_rows(records: Records, first: int, end: int, schema: pa.Schema) -> pa.Table:
    """The rows of a shard from a number up to another, each with the history and features that it shares.

    Raises:
        DataError: as `decode`, or a row names an earlier one that is not there.
    """
    own = pa.schema([(ROWS_BACK, pa.int64())])
    back = decode(records.part(first, end), own)[ROWS_BACK].fill_null(0).to_numpy()
    source = np.arange(first, end) - back
    begin = int(source.min(initial=first))
    if begin < 0 or (back < 0).any():
        raise DataError(f"a row takes its history from {int(back.max())} rows back, which are not there")
    table = decode(records.part(begin, end), schema)
    rows = table.slice(first - begin)
    if not back.any():
        return rows
    for place, name in enumerate(schema.names):
        if name == c.HISTORY or name.startswith(c.FEATURES):
            rows = rows.set_column(place, schema.field(name), table[name].take(pa.array(source - begin)))
    return rows


def _decode(records: Records, begin: int, end: int, schema: pa.Schema) -> pa.RecordBatch:
    base = int(records.starts[begin])
    raw = records.data[base : int(records.ends[end - 1])]
    data = np.frombuffer(raw + bytes(_SPARE), np.uint8)
    starts, ends = records.starts[begin:end] - base, records.ends[begin:end] - base
    try:
        features = _split(data, np.arange(end - begin), starts, ends).of(1)
        entries = _split(data, features.owner, features.start, features.end).of(1)
        inner = _split(data, np.arange(len(entries.owner)), entries.start, entries.end)
    except _Malformed as error:
        raise DataError(f"record {begin + error.args[0]} is no tf.train.Example") from None
    keys, values = _last(inner.of(1), len(entries.owner)), _last(inner.of(2), len(entries.owner))
    names = _texts(data, keys, pa.binary()).dictionary_encode()
    code, codes = {name: place for place, name in enumerate(names.dictionary.to_pylist())}, names.indices.to_numpy()
    columns = []
    for field in schema:
        chosen = np.flatnonzero((codes == code.get(field.name.encode(), -1)) & (values.start >= 0))
        # Of two features of one name the last counts, as in protobuf.
        owner = entries.owner[chosen]
        chosen = chosen[np.append(owner[1:] != owner[:-1], True)[: len(owner)]]
        columns.append(
            _column(data, field, end - begin, entries.owner[chosen], values.start[chosen], values.end[chosen], begin)
        )
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(
    data: npt.NDArray[np.uint8], field: pa.Field, size: int, owner: Places, start: Places, end: Places, begin: int
) -> pa.Array:
    """One column of `size` rows out of the Features (M,) that its rows `owner` have."""
    is_list = pa.types.is_list(field.type)
    kind = field.type.value_type if is_list else field.type
    wanted = list_of(field.type)
    try:
        lists = _split(data, np.arange(len(owner)), start, end)
        # The last of a Feature's three lists counts.
        lists = _last(lists.take(np.isin(lists.number, list(_LISTS)) & (lists.wire == _LENGTH)), len(owner))
        other = lists.number != next(number for number, name in _LISTS.items() if name == wanted)
        if (has := lists.number > 0).any() and (wrong := has & other).any():
            seen = _LISTS.get(int(lists.number[wrong][0]), "another kind")
            where = f"record {begin + int(owner[wrong][0])}: {field.name}"
            raise DataError(f"{where} is a {seen}, where a {wanted} is expected")
        owner, lists = owner[has], lists.take(has)
        values, counts = _values(data, lists, kind)
    except _Malformed as error:
        raise DataError(f"record {begin + int(owner[error.args[0]])}: {field.name} is no tf.train.Feature") from None
    if is_list:
        lengths = np.zeros(size, np.int64)
        lengths[owner] = counts
        missing = np.ones(size, np.bool_)
        missing[owner] = False
        offsets = pointers(lengths).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, values, type=field.type, mask=pa.array(missing))
    if (counts > 1).any():
        several = int(np.flatnonzero(counts > 1)[0])
        where = f"record {begin + int(owner[several])}: {field.name}"
        raise DataError(f"{where} has {int(counts[several])} values, where one is expected")
    places = np.full(size, -1, np.int64)
    places[owner[counts == 1]] = np.arange(len(values))
    return values.take(pa.array(places, mask=places < 0))


def _values(data: npt.NDArray[np.uint8], lists: _Fields, kind: pa.DataType) -> tuple[pa.Array, Places]:
    """All values of the lists (M,), one after the other, and how many each has (M,)."""
    size = len(lists.owner)
    items = _split(data, np.arange(size), lists.start, lists.end)
    items = items.take(items.number == 1)
    if pa.types.is_string(kind):
        _check(items.wire != _LENGTH, items.owner)
        text = _texts(data, items, kind)
        try:
            text.validate(full=True)
        except pa.ArrowInvalid:
            raise DataError("a text is not UTF-8") from None
        return text, np.bincount(items.owner, minlength=size)
    if pa.types.is_floating(kind):
        _check((items.wire != _FIXED32) & (items.wire != _LENGTH), items.owner)
        width = items.end - items.start
        _check(width % 4 != 0, items.owner)
        numbers = data[ranges(items.start, width)].view("<f4")
        counts = np.bincount(items.owner, weights=width // 4, minlength=size).astype(np.int64)
        return pa.array(numbers, pa.float32()), counts
    _check((items.wire != _VARINT) & (items.wire != _LENGTH), items.owner)
    numbers, counts = _varints(data, items)
    owners = np.bincount(items.owner, weights=counts, minlength=size).astype(np.int64)
    if pa.types.is_boolean(kind):
        return pa.array(numbers != 0), owners
    return pa.array(numbers.view(np.int64)).cast(kind), owners


def _texts(data: npt.NDArray[np.uint8], fields: _Fields, kind: pa.DataType) -> pa.Array:
    """The contents of fields (M,), as strings or bytes."""
    lengths = fields.end - fields.start
    offsets, content = pointers(lengths).astype(np.int32), data[ranges(fields.start, lengths)]
    return pa.Array.from_buffers(kind, len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(content)])


def _varints(data: npt.NDArray[np.uint8], items: _Fields) -> tuple[npt.NDArray[np.uint64], Places]:
    """The varints that fill the contents (M,), one after the other, and how many are in each (M,)."""
    widths = items.end - items.start
    content = data[ranges(items.start, widths)]
    is_last = content < 0x80
    edges = pointers(widths)
    filled = np.flatnonzero(widths)
    _check(~is_last[edges[1:][filled] - 1], items.owner[filled])
    counted = pointers(is_last.astype(np.int64))
    counts = counted[edges[1:]] - counted[edges[:-1]]
    if not len(content):
        return np.zeros(0, np.uint64), counts
    begins = np.flatnonzero(np.r_[True, is_last[:-1]])
    place = np.arange(len(content)) - np.repeat(begins, np.diff(begins, append=len(content)))
    _check(place >= _LONGEST, np.repeat(items.owner, widths))
    parts = (content & np.uint8(0x7F)).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, begins), counts


def _split(data: npt.NDArray[np.uint8], owner: Places, start: Places, end: Places) -> _Fields:
    """The fields of the messages (M,) between `start` and `end`, each under its message's owner."""
    steps = list(_steps(data, np.asarray(owner, np.int64), start, end))
    if not steps:
        none = np.zeros(0, np.int64)
        return _Fields(none, none, none, none, none)
    if len(steps) == 1:
        return _Fields(*steps[0][1:])
    order = np.argsort(np.concatenate([step[0] for step in steps]), kind="stable")
    columns = [np.concatenate([step[place] for step in steps])[order] for place in range(1, 6)]
    return _Fields(*columns)


def _steps(
    data: npt.NDArray[np.uint8], owner: Places, start: Places, end: Places
) -> Iterator[tuple[Places, Places, Places, Places, Places, Places]]:
    """The first field of every message, then every second one, and so on: message, owner, number, wire, start, end."""
    message = np.flatnonzero(start < end)
    position, limit = start[message], end[message]
    while len(message):
        tag, position = _read_varints(data, position, owner[message])
        wire, number = tag & 7, tag >> 3
        length = np.zeros(len(message), np.int64)
        content = position
        if (sized := wire == _LENGTH).all():
            length, content = _read_varints(data, position, owner[message])
        else:
            if sized.any():
                length[sized], content = _read_some(data, position, sized, owner[message])
            if (varint := wire == _VARINT).any():
                _, after = _read_some(data, position, varint, owner[message])
                length[varint] = (after - position)[varint]
            length[wire == _FIXED64] = 8
            length[wire == _FIXED32] = 4
        known = sized | (wire == _VARINT) | (wire == _FIXED64) | (wire == _FIXED32)
        after = content + length
        _check(~known | (number < 1) | (length < 0) | (after > limit), owner[message])
        yield message, owner[message], number, wire, content, after
        going = after < limit
        message, position, limit = message[going], after[going], limit[going]


def _read_varints(data: npt.NDArray[np.uint8], position: Places, owner: Places) -> tuple[Places, Places]:
    """The varint at each position (M,), and where it ends (M,). Nearly all have one byte or two."""
    _check(position >= len(data), owner)
    byte = data[position].astype(np.int64)
    value, after = byte & 0x7F, position + 1
    going = np.flatnonzero(byte >= 0x80)
    for place in range(1, _LONGEST):
        if not len(going):
            return value, after
        if after[going].max() >= len(data):
            break
        byte = data[after[going]].astype(np.int64)
        value[going] |= (byte & 0x7F) << (7 * place)
        after[going] += 1
        going = going[byte >= 0x80]
    if len(going):
        raise _Malformed(int(owner[going[0]]))
    return value, after


def _read_some(
    data: npt.NDArray[np.uint8], position: Places, mask: npt.NDArray[np.bool_], owner: Places
) -> tuple[Places, Places]:
    """As `_read_varints` of those positions that `mask` marks; the others stay where they are."""
    value, ends = _read_varints(data, position[mask], owner[mask])
    after = position.copy()
    after[mask] = ends
    return value, after


def _last(fields: _Fields, size: int) -> _Fields:
    """The last field of each of `size` messages; start -1 where a message has none."""
    last = _Fields(np.arange(size), *(np.full(size, absent, np.int64) for absent in (0, 0, -1, -1)))
    for name in ("number", "wire", "start", "end"):
        getattr(last, name)[fields.owner] = getattr(fields, name)
    return last
