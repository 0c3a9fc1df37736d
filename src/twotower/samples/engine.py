"""The engine of a batch job: DuckDB embedded in the process, or Spark where a log outgrows one machine.

A job is written once in Ibis and knows of an engine only six verbs: `read_days`, `put`, `keep`, `fetch`, `batches` and
`spread`; they are documented at `DuckDB`. What the two engines do differently stays in their files.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from twotower.samples.duckdb_engine import DuckDB, open_duckdb
from twotower.samples.options import EngineOptions
from twotower.samples.spark_engine import Spark, open_spark
from twotower.schema.errors import ConfigError

Engine = DuckDB | Spark


@contextmanager
def open_engine(options: EngineOptions, scratch: Path) -> Iterator[Engine]:
    """Open the configured engine.

    What does not fit in memory goes to the folder of the options, or else to `scratch`, which the caller removes.

    Raises:
        ConfigError: pyspark or Java is not installed for Spark; the configured scratch is no folder.

    >>> import pyarrow as pa, tempfile
    >>> with tempfile.TemporaryDirectory() as folder, open_engine(EngineOptions(), Path(folder)) as engine:
    ...     numbers = engine.put("numbers", pa.table({"n": [3, 1, 2]}))
    ...     [batch.column("n").to_pylist() for batch in engine.batches(numbers.order_by("n"))]
    [[1, 2, 3]]
    """
    with ExitStack() as stack:
        if options.scratch:
            if not Path(options.scratch).is_dir():
                raise ConfigError(f"engine.scratch = {options.scratch!r} is no folder: make it, or leave it out")
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twotower-", dir=options.scratch)))
        if options.name == "spark":
            yield stack.enter_context(open_spark(options, scratch))
        else:
            yield stack.enter_context(open_duckdb(options, scratch))
