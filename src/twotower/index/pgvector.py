"""PostgreSQL with the extension pgvector as a vector database; the only file that imports its clients.

B queries, D vector, N vectors.
"""

import atexit
import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import psycopg
from pgvector import Vector
from pgvector.psycopg import register_vector
from psycopg import sql

from twotower.index.database import Floats, Longs
from twotower.schema.errors import ConfigError, UnavailableError
from twotower.schema.secrets import credentials

T = TypeVar("T")

OLDEST: Final = (0, 8, 4)
"""The oldest usable pgvector: indexes of earlier ones may be damaged by inserts."""
SEARCH_S: Final = 2.0
"""A search that takes longer fails."""
CONNECT_S: Final = 2.0
WORK_S: Final = 60.0
"""Longest wait until the rows of a table are counted, or a table is dropped."""
CONNECTIONS: Final = 16
"""Connections of a process for searches, at most; they are kept. (The pools of psycopg tell a failed connection as a
time-out.)"""
FOUND_AT_ONCE: Final = 1 << 17
"""Neighbours fetched together, over all queries of a call."""
WIDEST: Final = 2000
"""Numbers of a vector, at most: of an index, and of a row that is not stored apart."""
_TOO_SLOW: Final = (psycopg.errors.QueryCanceled, psycopg.errors._WaitTimeout)
"""Errors of a search, not of its connection."""
BUILD_MEMORY_MB: Final = 1024
"""Memory that PostgreSQL may use to build an index."""


class _Connection(psycopg.Connection):
    """A connection on which a server that says nothing is waited for in vain only so long.

    The server ends a slow search itself (`statement_timeout`); one that is stopped, or behind a network that is cut,
    cannot.
    """

    silence_s: float | None = 2 * SEARCH_S
    """Longest wait for the next answer; None = without end, for loading and indexing a table."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """See `psycopg.Connection.wait`."""
        return super().wait(gen, interval, self.silence_s if timeout is None else timeout)


class PgvectorDatabase:
    """Tables `(id bigint, vector vector(D))` in PostgreSQL, with an index of lists (`ivfflat`).

    `ivfflat`, not `hnsw`: retrieval needs hundreds or thousands of neighbours, where `hnsw` stops at 1000 per scan and
    its recall falls. Implements `VectorDatabase`.

    Args:
        url: `postgresql://HOST:PORT/DATABASE`, with parameters of libpq such as `sslmode=verify-full`. User and
            password come from `TWOTOWER_INDEX_USER` and `TWOTOWER_INDEX_PASSWORD`, or from what libpq itself reads.
    """

    most = 20_000
    most_lists = 2000  # k-means takes memory in proportion to their square

    def __init__(self, url: str) -> None:
        self._where = f"PostgreSQL at {url}"
        self._url = url
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._idle: queue.LifoQueue[psycopg.Connection] = queue.LifoQueue(CONNECTIONS)

    def describe(self) -> str:
        """See `VectorDatabase.describe`; the extension need not be made yet, but the server must have it."""
        server = self._rows("SHOW server_version")[0][0].split()[0]
        offered = self._rows(
            "SELECT coalesce(installed_version, default_version) FROM pg_available_extensions WHERE name = 'vector'"
        )
        if not offered:
            raise UnavailableError(f"{self._where} (version {server}) has no pgvector: install it on the server")
        self._check_version(offered[0][0])
        return f"PostgreSQL {server} with pgvector {offered[0][0]}"

    def create(self, name: str, rows: Longs, vectors: Floats, lists: int) -> None:
        """See `VectorDatabase.create`."""
        table, dimension = sql.Identifier(name), vectors.shape[1]
        if dimension > WIDEST:
            raise ConfigError(
                f"pgvector indexes vectors of at most {WIDEST} numbers, these have {dimension}: lower "
                'models.dimension (or models.als.factors), or set index.kind = "milvus" or "faiss"'
            )
        with self._refusals(), self._working() as connection:  # one transaction
            self._prepare(connection)
            connection.execute(
                sql.SQL("CREATE TABLE {} (id bigint NOT NULL, vector vector({}) STORAGE plain NOT NULL)").format(
                    table, sql.Literal(dimension)
                )
            )
            copy = sql.SQL("COPY {} (id, vector) FROM STDIN WITH (FORMAT binary)").format(table)
            with connection.cursor().copy(copy) as into:
                into.set_types(["int8", "vector"])
                for row, vector in zip(rows.tolist(), vectors, strict=True):
                    into.write_row((row, vector))
            if lists:
                memory = sql.Literal(f"{BUILD_MEMORY_MB}MB")
                connection.execute(sql.SQL("SET LOCAL maintenance_work_mem = {}").format(memory))
                connection.execute(
                    sql.SQL("CREATE INDEX ON {} USING ivfflat (vector vector_ip_ops) WITH (lists = {})").format(
                        table, sql.Literal(lists)
                    )
                )
            connection.commit()
            connection.autocommit = True
            connection.execute(sql.SQL("VACUUM ANALYZE {}").format(table))

    def has(self, name: str) -> bool:
        """See `VectorDatabase.has`."""
        return bool(self._rows("SELECT to_regclass(%s) IS NOT NULL", name)[0][0])

    def count(self, name: str) -> int:
        """See `VectorDatabase.count`."""
        if not self.has(name):
            return -1
        counted = sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name))
        with self._refusals(), self._working(WORK_S) as connection:
            (count,) = connection.execute(counted).fetchone() or (-1,)
        return int(count)

    def nearest(self, name: str, queries: Floats, n: int, probes: int) -> Longs:
        """See `VectorDatabase.nearest`."""
        found = np.full((len(queries), n), -1, np.int64)
        step = max(1, FOUND_AT_ONCE // n)
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            self._search(partial(self._nearest, name, queries[part], probes, found[part]))
        return found

    def _nearest(self, name: str, queries: Floats, probes: int, found: Longs, connection: psycopg.Connection) -> None:
        query = _query(name)
        with connection.pipeline():
            connection.execute(f"SET ivfflat.probes = {max(1, probes)}")
            cursors = [connection.execute(query, (Vector(vector), found.shape[1]), binary=True) for vector in queries]
            for b, cursor in enumerate(cursors):
                rows = np.fromiter((row for (row,) in cursor), np.int64)
                found[b, : len(rows)] = rows

    def read(self, name: str) -> tuple[Longs, Floats]:
        """See `VectorDatabase.read`."""
        query = sql.SQL("SELECT id, vector FROM {} ORDER BY id").format(sql.Identifier(name))
        rows: list[int] = []
        vectors: list[Floats] = []
        with self._refusals(), self._working(10 * WORK_S) as connection:  # sorting comes first
            register_vector(connection)
            with connection.cursor(name="content", binary=True) as cursor:
                cursor.itersize = 10_000
                for row, vector in cursor.execute(query):
                    rows.append(row)
                    vectors.append(vector.to_numpy())
        return np.array(rows, np.int64), np.array(vectors, np.float32)

    def names(self, prefix: str) -> list[str]:
        """See `VectorDatabase.names`."""
        query = """
            SELECT tablename FROM pg_tables WHERE starts_with(tablename, %s) AND schemaname = current_schema ORDER BY 1
        """
        return [name for (name,) in self._rows(query, prefix)]

    def drop(self, name: str) -> None:
        """See `VectorDatabase.drop`."""
        with self._refusals(), self._working(WORK_S) as connection:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))

    def close_idle(self) -> None:
        """Close the connections that nothing uses."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def _rows(self, query: Any, *arguments: object) -> list[Any]:
        def fetch(connection: psycopg.Connection) -> list[Any]:
            rows: list[Any] = connection.execute(query, arguments).fetchall()
            return rows

        return self._search(fetch)

    def _search(self, read: Callable[[psycopg.Connection], T]) -> T:
        """Read from an idle connection or a new one.

        One that was idle may be from before a restart of the server. A read does no harm twice, so it is tried again.
        """
        with self._refusals(), self._turn():
            while True:
                try:
                    connection, fresh = self._idle.get_nowait(), False
                except queue.Empty:
                    connection, fresh = self._opened(autocommit=True), True
                try:
                    if fresh:
                        self._set_up(connection)
                    answer = read(connection)
                except psycopg.OperationalError as error:
                    connection.close()
                    if fresh or isinstance(error, _TOO_SLOW):  # again it would take as long
                        raise
                    self.close_idle()  # they are as old
                    continue
                except BaseException:
                    connection.close()
                    raise
                try:
                    self._idle.put_nowait(connection)
                except queue.Full:
                    connection.close()
                return answer

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for one of the connections."""
        if not self._free.acquire(timeout=SEARCH_S):
            raise UnavailableError(f"{self._where}: all {CONNECTIONS} connections are busy")
        try:
            yield
        finally:
            self._free.release()

    @contextmanager
    def _working(self, within_s: float | None = None) -> Iterator[_Connection]:
        """A connection for one transaction that may take long, whatever the server's own limit is."""
        with self._opened() as connection:
            connection.execute("SET statement_timeout = 0")
            connection.silence_s = within_s
            yield connection

    def _opened(self, autocommit: bool = False) -> _Connection:
        return _Connection.connect(
            self._url,
            autocommit=autocommit,
            connect_timeout=round(CONNECT_S),
            tcp_user_timeout=round(1000 * SEARCH_S),
            **credentials("INDEX").given("user", "password"),  # type: ignore[arg-type]
        )

    def _set_up(self, connection: psycopg.Connection) -> None:
        """Prepare a connection for searches."""
        if connection.execute("SELECT to_regtype('vector') IS NOT NULL").fetchone() == (True,):
            register_vector(connection)
        connection.execute(f"SET statement_timeout = {round(1000 * SEARCH_S)}")
        connection.execute("SET enable_seqscan = off")  # where there is an index, it is used

    def _prepare(self, connection: Any) -> None:
        """Make sure of the extension, and that it is new enough.

        Raises:
            UnavailableError: it is missing, and may not be made, or too old.
        """
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        (version,) = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        self._check_version(version)
        register_vector(connection)
        self.close_idle()  # they may be from before the extension was made

    def _check_version(self, version: str) -> None:
        if tuple(int(part) for part in version.split(".")) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise UnavailableError(
                f"{self._where} has pgvector {version}, whose indexes inserts can damage: {oldest} or newer is needed"
            )

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Give what the server or the connection refuses as our own error."""
        try:
            yield
        except psycopg.Error as error:
            raise UnavailableError(f"{self._where}: {str(error).strip() or type(error).__name__}") from error


@functools.cache
def _query(name: str) -> sql.Composed:
    return sql.SQL("SELECT id FROM {} ORDER BY vector <#> %s LIMIT %s").format(sql.Identifier(name))


@functools.cache
def connect(url: str) -> PgvectorDatabase:
    """The database at an address; one for a process."""
    database = PgvectorDatabase(url)
    atexit.register(database.close_idle)
    return database
