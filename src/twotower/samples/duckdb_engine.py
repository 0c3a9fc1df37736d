"""DuckDB as the engine of batch jobs: embedded, out of core, the default, and the oracle of any other engine."""

import glob
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa

from twotower.samples.events import StoredEvents
from twotower.samples.options import EngineOptions
from twotower.schema import columns as c

BATCH_ROWS = 1 << 17
"""Rows of a batch at most."""

_PYTHON_GB = 0.75
"""Memory of the process beside the engine: the interpreter, its libraries, one batch in flight and mapped files."""


class DuckDB:
    """The six verbs of an engine; a table is an Ibis expression."""

    def __init__(self, backend: Any, threads: int) -> None:
        self._backend = backend
        self._threads = threads

    def read_days(self, partitions: Mapping[str, Sequence[Path]], stored: StoredEvents) -> Any:
        """The events of some days, whose files lie in folders `date=DAY`, with this `date`.

        The columns of `stored` get its names and types; a column that a file lacks is null there.
        """
        # Not the engine's own partition columns: those also take any key=value folder above the workspace for one.
        paths = [glob.escape(str(path.resolve())) for path in itertools.chain(*partitions.values())]
        file, taken = "events_file", {name.casefold() for name in stored.taken}
        while file in taken:
            file += "_"
        events = self._backend.read_parquet(
            paths, table_name="events", hive_partitioning=False, union_by_name=True, filename=file
        )
        day = events[file].re_extract(rf"{c.DATE}=([^/]*)/[^/]*$", 1)
        columns = {field.name: events[stored.names[field.name]] for field in stored.schema}
        plain = {field.name: str(field.type) for field in stored.schema if field.type in (pa.int64(), pa.string())}
        columns |= {name: columns[name].cast(kind) for name, kind in plain.items()}
        return events.select(**columns, **{c.DATE: day})

    def put(self, name: str, table: pa.Table) -> Any:
        """A table out of memory, for joins with larger ones."""
        return self._backend.create_table(name, table, temp=True)

    def keep(self, name: str, query: Any) -> Any:
        """The result of a query, computed now and once, however often it is used."""
        return self._backend.create_table(name, query, temp=True)

    def fetch(self, query: Any) -> pa.Table:
        """The result of a query in memory: for counts, not for rows of a log."""
        return query.to_pyarrow()

    def batches(self, query: Any) -> Iterator[pa.RecordBatch]:
        """The result of a query in its order, a batch at a time; never more than a few of them are in memory."""
        yield from query.to_pyarrow_batches(chunk_size=BATCH_ROWS)

    def spread(self, work: Callable[[int], pa.RecordBatch], parts: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The batches of `work(0)` to `work(parts - 1)` in this order, several computed at a time: for work beyond SQL.

        `work` is a function of a module, or a `functools.partial` of one, and reads its input from files, because it
        may run in another process or on another machine.
        """
        with ThreadPoolExecutor(self._threads) as pool:
            yield from (batch.cast(schema) for batch in pool.map(work, range(parts)))


@contextmanager
def open_duckdb(options: EngineOptions, scratch: Path) -> Iterator[DuckDB]:
    """A DuckDB in memory that spills to `scratch`; it leaves Python its share of the job's memory."""
    backend = ibis.duckdb.connect(
        threads=options.threads,
        memory_limit=f"{max(0.2, options.memory_gb - _PYTHON_GB):.2f}GB",
        temp_directory=str(scratch),
    )
    try:
        backend.raw_sql("SET enable_progress_bar = false; SET preserve_insertion_order = false")
        yield DuckDB(backend, options.threads)
    finally:
        backend.disconnect()
