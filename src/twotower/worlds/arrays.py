"""Dataclasses whose fields are columns of one length: a part of their rows, or several one after another."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Columns = TypeVar("Columns")


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, of which there is at least one."""
    kind: Any = type(parts[0])
    values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(kind)}
    whole: Columns = kind(
        **{
            name: pa.concat_tables(some).combine_chunks() if isinstance(some[0], pa.Table) else np.concatenate(some)
            for name, some in values.items()
        }
    )
    return whole


def taken(columns: Columns, rows: npt.NDArray[Any] | slice) -> Columns:
    """Some rows of columns that are all arrays."""
    kind: Any = type(columns)
    some: Columns = kind(**{field.name: getattr(columns, field.name)[rows] for field in fields(kind)})
    return some
