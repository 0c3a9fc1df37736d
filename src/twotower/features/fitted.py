"""The kinds of features, fitted to training data, each with one way from raw values to model inputs.

Training encodes whole tables, the server one request; both call `encode` here, so a value gives the same bytes. A
value that was not seen in training becomes the unknown row or the missing flag; only another type is refused.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.columns import Bag, Numbers, Rows, pointers
from twotower.features.vocabulary import FIRST, MISSING, Vocabulary, as_values
from twotower.schema.errors import DataError, shown
from twotower.schema.tables import is_list, is_number, is_text, undictionaried

INTERESTS = "interests"
"""The encoder that gives a vector for each interest: the channel `mind` reads the click history with it."""
LIMIT = 1000.0
"""Largest standard score, in deviations; none of a million training values can have a greater one."""


@dataclass(frozen=True)
class Category:
    """One value out of a vocabulary -> (N,) rows of its table."""

    name: str
    vocabulary: Vocabulary
    dimension: int

    def encode(self, column: pa.Array) -> Rows:
        """Rows (N,) of the table for raw values (N,)."""
        return self.vocabulary.rows(as_values(column, self.name))

    def absent(self, count: int) -> Rows:
        """The encoding of `count` missing values."""
        return np.full(count, MISSING, np.int32)


@dataclass(frozen=True)
class Categories:
    """Several values out of a vocabulary -> a bag of rows, without repeats and in ascending order.

    Without a value it is the missing row; all unknown values together are the unknown row once.
    """

    name: str
    vocabulary: Vocabulary
    dimension: int
    separator: str | None

    def encode(self, column: pa.Array) -> Bag:
        """A bag of rows for each of N raw values."""
        lists = split(column, self.separator, self.name)
        owner = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        rows = self.vocabulary.rows(as_values(lists.flatten(), self.name)).astype(np.int64)
        kept = rows != MISSING
        pairs = np.unique(owner[kept] * self.vocabulary.capacity + rows[kept])
        owner, rows = pairs // self.vocabulary.capacity, pairs % self.vocabulary.capacity
        empty = np.flatnonzero(np.bincount(owner, minlength=len(lists)) == 0)
        owner, rows = np.concatenate([owner, empty]), np.concatenate([rows, np.full(len(empty), MISSING)])
        order = np.argsort(owner, kind="stable")
        return Bag(pointers(np.bincount(owner, minlength=len(lists))), rows[order].astype(np.int32))

    def absent(self, count: int) -> Bag:
        """The encoding of `count` missing values."""
        return Bag(np.arange(count + 1, dtype=np.int64), np.full(count, MISSING, np.int32))


@dataclass(frozen=True)
class Number:
    """A number -> (N, 2): its standard score, and 1 where it is missing (the score is then 0).

    Scores end at `LIMIT` deviations: without a limit, one wrong number in a request would outweigh every other feature,
    or overflow float32.
    """

    name: str
    log: bool
    mean: float
    deviation: float

    def encode(self, column: pa.Array) -> Numbers:
        """Numbers (N, 2) for raw values (N,); NaN and infinities count as missing."""
        raw = as_numbers(column, self.name)
        missing = ~np.isfinite(raw)
        value = np.where(missing, self.mean, damp(raw) if self.log else raw)
        with np.errstate(over="ignore"):
            score = np.clip((value - self.mean) / self.deviation, -LIMIT, LIMIT)
        return np.stack([score, missing], axis=1).astype(np.float32)

    def absent(self, count: int) -> Numbers:
        """The encoding of `count` missing values."""
        return np.tile(np.array([0, 1], np.float32), (count, 1))


@dataclass(frozen=True)
class Bucket:
    """A number -> (N,) rows of a table: 0 missing, then one row for each quantile of the training data.

    Row 1, which elsewhere means unknown, stays unused: every number falls into some bucket.
    """

    name: str
    table: str
    boundaries: tuple[float, ...]
    dimension: int

    @property
    def capacity(self) -> int:
        """Rows of the embedding table."""
        return FIRST + len(self.boundaries) + 1

    def encode(self, column: pa.Array) -> Rows:
        """Rows (N,) of the table for raw values (N,)."""
        raw = as_numbers(column, self.name)
        rows = FIRST + np.searchsorted(np.array(self.boundaries), raw, side="right")
        return np.where(np.isfinite(raw), rows, MISSING).astype(np.int32)

    def absent(self, count: int) -> Rows:
        """The encoding of `count` missing values."""
        return np.full(count, MISSING, np.int32)


@dataclass(frozen=True)
class Items:
    """A sequence of items, oldest first -> a bag of rows of the table of item ids: the last ones, in their order."""

    name: str
    vocabulary: Vocabulary
    dimension: int
    last: int
    encoder: str
    from_clicks: bool
    """The sequence is the user's click history, not a column."""
    heads: int = 2
    """Heads of an attention or a transformer that reads it; or the number of interests."""
    blocks: int = 2
    """Blocks of a transformer; or rounds of the routing to interests."""

    def encode(self, column: pa.Array) -> Bag:
        """A bag of rows for each of N lists of item ids."""
        lists = split(column, None, self.name)
        owner = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        rows = self.vocabulary.rows(as_values(lists.flatten(), self.name))
        return self.cut(owner[rows != MISSING], rows[rows != MISSING], len(lists))

    def cut(self, owner: npt.NDArray[np.int64], rows: Rows, count: int) -> Bag:
        """Keep the last items of each owner; `owner` (nnz,) ascends."""
        counts = np.bincount(owner, minlength=count)
        kept = np.cumsum(counts)[owner] - np.arange(len(owner)) <= self.last
        return Bag(pointers(np.minimum(counts, self.last)), rows[kept])

    def absent(self, count: int) -> Bag:
        """The encoding of `count` empty sequences."""
        return Bag(np.zeros(count + 1, np.int64), np.zeros(0, np.int32))


@dataclass(frozen=True)
class PrecomputedVector:
    """A precomputed vector -> (N, size + 1): its numbers, and 1 where it is missing (they are then 0).

    A vector with a number that is null, NaN or beyond float32 is missing as a whole.
    """

    name: str
    size: int

    def encode(self, column: pa.Array) -> Numbers:
        """Numbers (N, size + 1) for lists of `size` numbers."""
        lists = split(column, None, self.name)
        lengths: npt.NDArray[np.int64] = np.diff(lists.offsets.to_numpy(zero_copy_only=True)).astype(np.int64)
        wrong = lengths[(lengths != self.size) & (lengths != 0)]
        if len(wrong):
            raise DataError(f"{self.name} holds a vector of {wrong[0]} numbers where {self.size} are expected")
        encoded = np.zeros((len(lists), self.size + 1), np.float32)
        there = lengths == self.size
        with np.errstate(over="ignore"):
            numbers = as_numbers(lists.flatten(), self.name).astype(np.float32).reshape(-1, self.size)
        whole = np.logical_and.reduce(np.isfinite(numbers), axis=1)
        encoded[there, :-1] = np.where(whole[:, None], numbers, 0)
        encoded[:, -1] = 1
        encoded[np.flatnonzero(there)[whole], -1] = 0
        return encoded

    def absent(self, count: int) -> Numbers:
        """The encoding of `count` missing vectors."""
        encoded = np.zeros((count, self.size + 1), np.float32)
        encoded[:, -1] = 1
        return encoded


Fitted = Category | Categories | Number | Bucket | Items | PrecomputedVector


def split(column: pa.Array, separator: str | None, where: str) -> pa.Array:
    """A column as lists: a string column cut at its separator, or a list column as it is; null becomes an empty list.

    Raises:
        DataError: a string column without a separator, or no list column.

    >>> split(pa.array(["a| b", "", None]), "|", "tags").to_pylist()
    [['a', 'b'], [None], []]
    """
    column = undictionaried(column)
    kind = column.type
    if pa.types.is_null(kind):
        return pa.array([[]] * len(column), pa.list_(pa.int64()))
    if separator is not None:
        if not is_text(kind):
            raise DataError(f"{where} has a separator but is of type {kind}: leave the separator out for lists")
        lists = pc.split_pattern(column.cast(pa.string()), separator)
        values = pc.utf8_trim_whitespace(lists.flatten())
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        return pa.ListArray.from_arrays(_offsets(lists), values)
    if not is_list(kind):
        hint = ": give a separator" if pa.types.is_string(kind) else ""
        raise DataError(f"{where} is of type {kind}, where a list is expected{hint}")
    if pa.types.is_fixed_size_list(kind):
        column = column.cast(pa.list_(kind.value_type))
    return pa.ListArray.from_arrays(_offsets(column), column.flatten()) if column.null_count else column


def _offsets(lists: pa.Array) -> npt.NDArray[np.int32]:
    """Where each list begins in the flattened values (N + 1,); null lists have none."""
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return pointers(lengths).astype(np.int32)


def as_numbers(column: pa.Array, where: str) -> npt.NDArray[np.float64]:
    """Numbers (N,) float64, NaN where a value is null.

    Raises:
        DataError: the column holds no numbers.
    """
    column = undictionaried(column)
    kind = column.type
    if not (is_number(kind) or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where} is of type {kind}, where numbers are expected")
    numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


def damp(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sign(x) log(1 + |x|): a logarithm that takes every number.

    >>> damp(np.array([-np.e + 1, 0.0])).round(6).tolist()
    [-1.0, 0.0]
    """
    return np.sign(values) * np.log1p(np.abs(values))


def raw_column(fitted: Fitted, value: Any) -> pa.Array:
    """A value of a request as the Arrow column (1,) that `encode` takes.

    Raises:
        DataError: a list of mixed types, or a value that no column can hold.
    """
    try:
        if isinstance(fitted, Categories) and fitted.separator is not None and isinstance(value, list):
            value = fitted.separator.join(part for part in value if part is not None)
        return pa.array([value])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, OverflowError, UnicodeError):
        raise DataError(f"{fitted.name}: {shown([value])} is no value of one type that a column can hold") from None
