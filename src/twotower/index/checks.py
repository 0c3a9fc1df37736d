"""The checks and look-ups of rows that every index makes in the same way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twotower.index.protocol import Exclusions
from twotower.schema.errors import DataError
from twotower.schema.files import Kind, check_fields, opened_file, read_json

FORMAT = 1
"""Number of the layout of a saved index."""
INDEX_JSON = "index.json"
ROWS = "rows.npy"


def checked_build(
    rows: NDArray[np.int64], vectors: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A copy of rows (N,) and vectors (N, D) in the order of rows, so that the order given changes no answer.

    Raises:
        DataError: other shapes or types, duplicate rows, values that are not finite.
    """
    check_rows(rows)
    _check_matrix(vectors, "vectors")
    if len(rows) != len(vectors):
        raise DataError(f"{len(rows)} rows for {len(vectors)} vectors: give one row for each vector")
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.size:
        raise DataError(
            f"{len(np.unique(repeated))} rows occur more than once, such as {repeated[0]}: keep one vector of each"
        )
    if ordered.size and ordered[0] < 0:
        raise DataError(f"row {ordered[0]} is negative, and -1 stands for no neighbour: number rows from 0")
    return ordered, vectors[order]


def check_rows(rows: NDArray[np.int64]) -> None:
    """Raise a DataError for an array of another shape or type."""
    if rows.ndim != 1 or rows.dtype != np.int64:
        raise DataError(f"rows are {rows.dtype}{rows.shape}: give an int64 array of one dimension")


def check_search(queries: NDArray[np.float32], k: int, exclude: Exclusions | None, dimension: int) -> None:
    """Raise the errors of `VectorIndex.search`."""
    _check_matrix(queries, "queries")
    if queries.shape[1] != dimension:
        raise DataError(
            f"queries have {queries.shape[1]} numbers, the vectors of the index {dimension}: use one model for both"
        )
    if k < 1:
        raise DataError(f"k={k}: ask for at least 1 neighbour")
    if exclude is not None and len(exclude.indptr) != len(queries) + 1:
        raise DataError(
            f"exclusions of {len(exclude.indptr) - 1} queries for {len(queries)} queries: give one list each"
        )


def _check_matrix(matrix: NDArray[np.float32], what: str) -> None:
    if matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.shape[1]:
        raise DataError(f"{what} are {matrix.dtype}{matrix.shape}: give a float32 array (number, length)")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{len(matrix) - finite.sum()} of {len(matrix)} {what} hold NaN or infinity, the first is number "
            f"{np.argmin(finite)}: the model that made them has diverged"
        )


def positions_of(wanted: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of wanted rows (n,) among the rising `rows` (N,); -1 for those that are not there.

    >>> positions_of(np.array([7, 3, 9]), np.array([3, 5, 9]))
    array([-1,  0,  2])
    """
    if len(rows) and rows[-1] == len(rows) - 1:  # the rows are 0, 1, 2, ...: each is its own position
        return np.where((wanted >= 0) & (wanted < len(rows)), wanted, -1)
    positions = np.searchsorted(rows, wanted).astype(np.int64, copy=False)
    inside = positions < len(rows)
    inside[inside] = rows[positions[inside]] == wanted[inside]
    return np.where(inside, positions, -1)


def hidden_with(hidden: NDArray[np.int64], more: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Hidden positions (n,) int64, rising, together with those of more rows; refuses what is no array of rows."""
    check_rows(more)
    positions = positions_of(more, rows)
    out = np.zeros(len(rows), np.bool_)
    out[hidden] = True
    out[positions[positions >= 0]] = True
    return np.flatnonzero(out)


def excluded_positions(
    exclude: Exclusions | None, queries: int, rows: NDArray[np.int64], hidden: NDArray[np.int64]
) -> Exclusions:
    """The exclusions of each query as rising positions, each once, without those that are hidden anyway."""
    if exclude is None:
        return Exclusions(np.zeros(queries + 1, np.int64), np.empty(0, np.int64))
    owner = np.repeat(np.arange(queries), np.diff(exclude.indptr))
    positions = positions_of(exclude.rows, rows)
    kept = (positions >= 0) & (positions_of(positions, hidden) < 0)
    keys = np.unique(owner[kept] * len(rows) + positions[kept])
    indptr = np.searchsorted(keys, np.arange(queries + 1) * len(rows)).astype(np.int64, copy=False)
    return Exclusions(indptr, keys % max(len(rows), 1))


def read_description(folder: Path, kind: str, fields: Mapping[str, Kind]) -> dict[str, Any]:
    """The `index.json` of a saved index, with its fields checked.

    Raises:
        DataError: missing, damaged, of another format or another kind of index.
    """
    path = folder / INDEX_JSON
    description = read_json(path)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}: rebuild the index from the item vectors")
    if description.get("kind") != kind:
        raise DataError(f"{path} describes an index of kind {description.get('kind')!r}, not {kind!r}")
    return check_fields(description, fields, str(path))


def map_array(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    """A saved array, mapped into memory and read-only.

    Raises:
        DataError: missing, damaged, or not the array that `index.json` describes.
    """
    try:
        with opened_file(path):  # and no pipe or device, which `load` would wait for
            array: NDArray[Any] = np.load(path, mmap_mode="r" if 0 not in shape else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        raise DataError(f"{path} cannot be read ({error}): rebuild the index from the item vectors") from None
    if array.shape != shape or array.dtype != dtype:
        raise DataError(
            f"{path} holds {array.dtype}{array.shape} where {INDEX_JSON} says {np.dtype(dtype)}{shape}: rebuild it"
        )
    return array


def map_rows(folder: Path, count: int) -> NDArray[np.int64]:
    """The rows (N,) of a saved index, mapped into memory.

    Raises:
        DataError: as of `map_array`, or they are not rising.
    """
    rows: NDArray[np.int64] = map_array(folder / ROWS, (count,), np.int64)
    if count and (rows[0] < 0 or (rows[1:] <= rows[:-1]).any()):
        raise DataError(f"{folder / ROWS} is not rising from 0: rebuild the index from the item vectors")
    return rows
