"""Spark as the engine of batch jobs: on the cores of this machine, or on a cluster that shares its folders.

Spark computes a table anew wherever it is used. So what is kept is written to Parquet below a scratch folder, and so
are large results: a global sort writes its files in its order, and the driver reads them one after another.
"""

import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.samples.duckdb_engine import BATCH_ROWS
from twotower.samples.events import StoredEvents
from twotower.samples.options import EngineOptions
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError

JAVA_VERSIONS = (17, 21)
"""Those that Spark 4.0 runs on."""
JAVA_FOLDERS = Path("/usr/lib/jvm")
"""Where Debian and others install them."""

_BESIDE_HEAP_GB = 1.2
"""Memory of a local job outside Java's heap: the Python process, and Java's code and buffers."""
_LEAST_HEAP_GB = 0.6
"""Spark refuses to start with less than half a gigabyte."""
_PARTITIONS_A_THREAD = 8
"""Parts of a shuffle on this machine; Spark joins small ones again."""


class Spark:
    """The six verbs of an engine, see `DuckDB`."""

    def __init__(self, session: Any, scratch: Path) -> None:
        self._session = session
        self._backend = ibis.pyspark.connect(session)
        self._scratch = scratch

    def read_days(self, partitions: Mapping[str, Sequence[Path]], stored: StoredEvents) -> Any:
        """See `DuckDB.read_days`. Files are read in groups of like types, because Spark reads a column as one type."""
        groups: dict[pa.Schema, list[str]] = {}
        for files in partitions.values():
            for path in files:
                own = pq.read_schema(path)
                names = [name for name in dict.fromkeys(stored.names.values()) if name in own.names]
                there = [field for field in map(own.field, names) if not pa.types.is_null(field.type)]
                alike = pa.schema([(field.name, field.type) for field in there])
                groups.setdefault(alike, []).append(_escaped(str(path.resolve())))
        frames = [self._read_alike(paths, there, stored) for there, paths in groups.items()]
        events = frames[0]
        for frame in frames[1:]:
            events = events.unionAll(frame)
        return self._view("events", events)

    def _read_alike(self, paths: Sequence[str], there: pa.Schema, stored: StoredEvents) -> Any:
        """Files that have the columns `there`, as the columns of `stored` and `date`."""
        from pyspark.sql import functions as f
        from pyspark.sql.types import StructField, StructType

        types = StructType([StructField(field.name, _spark_type(field.type)) for field in there])
        # Without looking for partitions: those would also be any key=value folder above the workspace.
        reader = self._session.read.option("recursiveFileLookup", "true").schema(types)
        columns = [
            (f.col(_quoted(stored.names[field.name])) if stored.names[field.name] in there.names else f.lit(None))
            .cast(_spark_type(field.type))
            .alias(field.name)
            for field in stored.schema
        ]
        frame = reader.parquet(*paths)
        file = frame.metadataColumn("_metadata").getField("file_path")
        return frame.select(*columns, f.regexp_extract(file, rf"{c.DATE}=([^/]*)/[^/]*$", 1).alias(c.DATE))

    def put(self, name: str, table: pa.Table) -> Any:
        """See `DuckDB.put`."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = self._scratch / f"{name}.parquet"
        pq.write_table(table, path)
        return self._view(name, self._session.read.parquet(_escaped(str(path))))

    def keep(self, name: str, query: Any) -> Any:
        """See `DuckDB.keep`."""
        path = self._scratch / name
        self._run(query).write.parquet(str(path))
        return self._view(name, self._session.read.parquet(_escaped(str(path))))

    def fetch(self, query: Any) -> pa.Table:
        """See `DuckDB.fetch`."""
        return self._run(query).toArrow()

    def batches(self, query: Any) -> Iterator[pa.RecordBatch]:
        """See `DuckDB.batches`."""
        yield from self._in_order(self._run(query))

    def spread(self, work: Callable[[int], pa.RecordBatch], parts: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """See `DuckDB.spread`. Each part is a task."""
        from pyspark.sql.pandas.types import from_arrow_schema

        def worked(numbers: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in numbers:
                yield from (work(part).cast(schema) for part in batch.column(0).to_pylist())

        numbers = self._session.range(0, parts, 1, max(1, parts))
        yield from self._in_order(numbers.mapInArrow(worked, from_arrow_schema(schema)))

    def _in_order(self, frame: Any) -> Iterator[pa.RecordBatch]:
        """A data frame as batches: its partitions are written side by side, and read one after another."""
        path = self._scratch / f"ordered-{uuid.uuid4().hex}"
        try:
            frame.write.parquet(str(path))
            for part in sorted(path.glob("part-*.parquet")):
                yield from pq.ParquetFile(part).iter_batches(BATCH_ROWS)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _run(self, query: Any) -> Any:
        """A query as a data frame; what is not a table of this engine must be `put` into it first."""
        return self._backend.raw_sql(self._backend.compile(query))

    def _view(self, name: str, frame: Any) -> Any:
        frame.createOrReplaceTempView(name)
        return self._backend.table(name)


@contextmanager
def open_spark(engine: EngineOptions, scratch: Path) -> Iterator[Spark]:
    """A session with its own name space; a Spark that already runs in this process is used and left running.

    All machines of a cluster must see the folder `scratch`, which holds intermediate results.

    Raises:
        ConfigError: pyspark or Java is missing, or Spark does not start.
    """
    SparkSession = _pyspark()
    scratch, options = scratch.resolve(), engine.options
    master = engine.url or f"local[{engine.threads}]"
    local = master.startswith("local")
    with ExitStack() as stack:
        running = SparkSession.getActiveSession()
        if running is None:
            local_dir = scratch / "spark"
            local_dir.mkdir(parents=True, exist_ok=True)
            heap_mb = round(1024 * max(_LEAST_HEAP_GB, engine.memory_gb - _BESIDE_HEAP_GB))
            static = {
                "spark.app.name": "twotower",
                "spark.driver.memory": f"{heap_mb}m",
                "spark.driver.extraJavaOptions": f'"-Djava.io.tmpdir={local_dir}"',
                "spark.local.dir": str(local_dir),
                "spark.log.level": "ERROR",
                "spark.sql.catalogImplementation": "in-memory",
                "spark.sql.warehouse.dir": str(scratch / "warehouse"),
                "spark.ui.enabled": "false",
                "spark.ui.showConsoleProgress": "false",
                **(_ON_THIS_MACHINE if local else {}),
                **options,
            }
            running = _start(SparkSession, master, static)
            stack.callback(_stop, running)
        session = running.newSession()
        partitions = {"spark.sql.shuffle.partitions": str(_PARTITIONS_A_THREAD * engine.threads)} if local else {}
        for key, value in {**_RULES, **partitions, **options}.items():
            if session.conf.isModifiable(key):
                session.conf.set(key, value)
        yield Spark(session, scratch)


_ON_THIS_MACHINE = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
"""No other machine takes part, so none can reach it."""
_RULES = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.caseSensitive": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "65536",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
}
"""What the jobs rely on: an overflow is an error, columns are told apart by case, times are written as Parquet's."""


def _pyspark() -> Any:
    try:
        from pyspark.sql import SparkSession  # an extra
    except ImportError:
        raise ConfigError("engine.name = 'spark' needs pyspark: pip install 'twotower[spark]'") from None
    return SparkSession


def find_java(home: str | None, folders: Path = JAVA_FOLDERS) -> Path:
    """The folder of a Java that Spark runs on: `home` if it is set, or else the one on the path, or one of `folders`.

    Raises:
        ConfigError: there is none, with what was found instead.
    """
    if home:
        candidates = [Path(home)]
    else:
        on_path = shutil.which("java")
        candidates = [Path(on_path).resolve().parents[1]] if on_path else []
        candidates += sorted(folder for folder in folders.glob("*") if (folder / "bin" / "java").exists())
    seen = {}
    for folder in candidates:
        version = _java_version(folder)
        if version in JAVA_VERSIONS:
            return folder
        seen[str(folder)] = f"Java {version}" if version else "no Java"
    found = ", ".join(f"{folder} is {what}" for folder, what in seen.items()) or "no Java was found"
    raise ConfigError(
        f"engine.name = 'spark' needs Java {' or '.join(map(str, JAVA_VERSIONS))}, and {found}: "
        "apt-get install openjdk-17-jre-headless, or set JAVA_HOME"
    )


def _java_version(folder: Path) -> int | None:
    try:
        told = subprocess.run([folder / "bin" / "java", "-version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    version = re.search(r'version "(?:1\.)?(\d+)', told.stderr)
    return int(version[1]) if version else None


def _start(session: Any, master: str, options: Mapping[str, str]) -> Any:
    if master.startswith("sc://"):
        raise ConfigError(
            f"engine.url = {master!r} is a Spark Connect server: name a master, such as spark://HOST:7077"
        )
    os.environ["JAVA_HOME"] = str(find_java(os.environ.get("JAVA_HOME")))
    if master.startswith("local"):
        # Else the first python3 on the path runs what is spread, be it another version without our packages.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = session.builder.master(master)
    for key, value in options.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except Exception as error:  # of Java, of the gateway, of pyspark: Spark names no common one
        raise ConfigError(f"Spark did not start with engine.url = {master!r}: {str(error).splitlines()[0]}") from error


def _stop(session: Any) -> None:
    """End the session and its Java, whose memory what comes next needs; pyspark itself keeps Java until the end."""
    from pyspark import SparkContext

    gateway = session.sparkContext._gateway
    session.stop()
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait()
    SparkContext._gateway = SparkContext._jvm = None


def _spark_type(kind: pa.DataType) -> Any:
    """The type that holds every value of an Arrow type; Spark has no unsigned integers."""
    from pyspark.sql import types
    from pyspark.sql.pandas.types import from_arrow_type

    wider = {
        pa.uint8(): types.ShortType(),
        pa.uint16(): types.IntegerType(),
        pa.uint32(): types.LongType(),
        pa.uint64(): types.DecimalType(20, 0),
        pa.null(): types.IntegerType(),
        pa.float16(): types.FloatType(),
    }
    return wider[kind] if kind in wider else from_arrow_type(kind, prefer_timestamp_ntz=True)


def _escaped(path: str) -> str:
    """A path that Spark does not take for a pattern."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"
