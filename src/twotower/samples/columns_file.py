"""Arrow files of one record batch, written as a stream and read by mapping them into memory.

In a single batch every column is one contiguous array, so that a slice of it costs nothing. Because it is written as a
stream, the memory of a job does not grow with the log.
"""

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from twotower.schema.errors import DataError
from twotower.schema.files import TEMPORARY, map_batches


def write_columns(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches without nulls as one batch; gives the number of rows.

    A column holds numbers, fixed-size lists of numbers, or large lists of numbers. The columns are spooled to temporary
    files beside `path` and mapped into the one batch, so that no more than a batch is ever held.

    Raises:
        DataError: a column holds a null.
    """
    with ExitStack() as stack:
        spools = [_Spool(field, path.parent, stack) for field in schema]
        rows = 0
        for batch in batches:
            rows += batch.num_rows
            for spool in spools:
                spool.append(batch.column(spool.field.name), path)
        arrays = [spool.mapped(rows) for spool in spools]
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    return rows


class _Spool:
    """One column that is being spooled: its numbers, and where each list ends."""

    def __init__(self, field: pa.Field, folder: Path, stack: ExitStack) -> None:
        def temporary() -> IO[bytes]:
            return stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY))

        self.field = field
        self._nested = pa.types.is_large_list(field.type) or pa.types.is_fixed_size_list(field.type)
        self._values = temporary()
        self._count = 0
        self._offsets = temporary() if pa.types.is_large_list(field.type) else None
        if self._offsets:
            self._offsets.write(np.zeros(1, np.int64).data)

    def append(self, column: pa.Array, path: Path) -> None:
        column = column.cast(self.field.type)
        if column.null_count:
            raise DataError(f"{path.name}: column {self.field.name} holds {column.null_count} nulls")
        if self._offsets:
            offsets = column.offsets.to_numpy(zero_copy_only=True)
            self._offsets.write((offsets[1:] - offsets[0] + self._count).data)
        values = column.flatten() if self._nested else column
        self._values.write(values.to_numpy(zero_copy_only=True).data)
        self._count += len(values)

    def mapped(self, rows: int) -> pa.Array:
        kind = self.field.type
        values = _map(self._values, kind.value_type if self._nested else kind, self._count)
        if self._offsets:
            return pa.LargeListArray.from_arrays(_map(self._offsets, pa.int64(), rows + 1), values)
        return pa.FixedSizeListArray.from_arrays(values, kind.list_size) if self._nested else values


def _map(file: IO[bytes], kind: pa.DataType, count: int) -> pa.Array:
    file.flush()
    buffer = pa.memory_map(file.name).read_buffer() if count else pa.py_buffer(b"")
    return pa.Array.from_buffers(kind, count, [None, buffer])


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table that is already in memory as one batch."""
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, table.num_rows))


def map_columns(path: Path) -> pa.RecordBatch:
    """Map the one batch of a file into memory; its columns are read from disk as they are touched.

    What could lead a reader out of the file is checked first: offsets of lists and texts, sizes, UTF-8.

    Raises:
        DataError: the file is missing or is not of this format.
    """
    batches, schema = map_batches(path)
    if not batches:
        return pa.RecordBatch.from_pylist([], schema=schema)
    if len(batches) != 1:
        raise DataError(f"{path} has {len(batches)} record batches, where one is expected: rewrite it")
    return batches[0]
