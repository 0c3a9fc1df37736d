"""Which items a request allows and denies by their attributes.

N items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from twotower.features.fitted import Categories, split
from twotower.features.vocabulary import as_values
from twotower.publish.version import Version
from twotower.schema.errors import DataError, cut, shown
from twotower.serve.bodies import Body

Mask = npt.NDArray[np.bool_]

_MAX_WHOLE = 2.0**53
"""Above it, not every whole number is a float."""


class Filter(Body):
    """What an attribute of an item may be; null is a missing value."""

    allow: list[Any] | None = Field(None, description="The item has one of these; absent = anything.")
    deny: list[Any] = Field(default_factory=list, description="The item has none of these.")


def passing(version: Version, attribute: str, wanted: Filter) -> Mask:
    """(N,) the items that a filter lets pass.

    An item with several values of an attribute (a list, or what a feature splits at its separator) has each of them.

    Raises:
        DataError: no such attribute, or values of another type.
    """
    names = version.attributes.schema.names
    if attribute not in names:
        raise DataError(f"filters: items have no attribute {cut(attribute)}; they have {', '.join(names)}")
    column = version.attributes.column(attribute)
    _check_comparable(column, attribute)
    try:
        lists = _several(version, attribute, column)
        values = as_values(column if lists is None else lists.flatten(), attribute)
    except DataError as error:
        raise DataError(f"filters: {error}") from None

    def has_one_of(asked: Sequence[Any]) -> Mask:
        matches = _is_in(values, asked, attribute, column.type)
        if lists is None:
            return matches
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
        owner = np.repeat(np.arange(len(lists)), lengths)
        some: Mask = np.bincount(owner[matches], minlength=len(lists)) > 0
        none: Mask = (lengths == 0) & (None in asked)
        return some | none

    passed = np.ones(version.attributes.num_rows, np.bool_) if wanted.allow is None else has_one_of(wanted.allow)
    return passed & ~has_one_of(wanted.deny) if wanted.deny else passed


def _check_comparable(column: pa.Array, attribute: str) -> None:
    """Refuse an attribute of numbers with a fraction: a filter compares for equality."""
    values = column
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        values = values.flatten()
    if not pa.types.is_floating(values.type):
        return
    numbers = values.to_numpy(zero_copy_only=False)
    numbers = numbers[np.isfinite(numbers)]
    if (np.abs(numbers) > _MAX_WHOLE).any() or (numbers != np.floor(numbers)).any():
        raise DataError(
            f"filters: {attribute} holds numbers with a fraction, and a filter compares for equality, which is not "
            "reliable for them. Filter by another attribute, or add one to the items that names the range of "
            f"{attribute}, as a word or an integer"
        )


def _several(version: Version, attribute: str, column: pa.Array) -> pa.Array | None:
    """The values of an attribute as lists, where items may have several; otherwise None."""
    for feature in version.features.item:
        if isinstance(feature, Categories) and feature.name == attribute:
            return split(column, feature.separator, attribute)
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return split(column, None, attribute)
    return None


def _is_in(values: pa.Array, asked: Sequence[Any], attribute: str, kind: pa.DataType) -> Mask:
    """Which values (n,) are among those asked for."""
    try:
        wanted = as_values(pa.array(list(asked)), attribute)
    except (DataError, pa.ArrowException, TypeError, OverflowError, UnicodeError):
        wanted = None
    if wanted is None or (wanted.type != values.type and wanted.null_count < len(wanted)):
        raise DataError(f"filters: {attribute} is of type {kind}, not {shown(list(asked)[:3])}")
    matches: Mask = pc.is_in(values, wanted.cast(values.type)).to_numpy(zero_copy_only=False)
    return matches
