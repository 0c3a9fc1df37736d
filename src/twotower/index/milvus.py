"""Milvus as a vector database; the only file that imports its client.

B queries, D vector, N vectors.
"""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import grpc
import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from twotower.index.database import Floats, Longs
from twotower.schema.errors import UnavailableError
from twotower.schema.secrets import credentials

SEARCH_S: Final = 2.0
"""A search that takes longer fails."""
CHANGE_S: Final = 30.0
"""Longest wait for a collection to be made, listed or dropped."""
LOAD_S: Final = 600.0
"""Longest wait for an index to be built, and for a collection to be loaded."""
AT_ONCE: Final = 10_000
"""Vectors of one insert."""
FOUND_AT_ONCE: Final = 1 << 17
"""Neighbours of one search, over all its queries."""
ID, VECTOR = "id", "vector"


class MilvusDatabase:
    """Collections of `id` and `vector` in Milvus, with an index of lists (`IVF_FLAT`).

    A collection does not change after it was made, so searches ask for no consistency (`Eventually`): `Strong` would
    make each wait for the next tick of the server's clock, which is a fifth of a second. Implements `VectorDatabase`.

    Args:
        url: `http://HOST:19530`, or `https://` for TLS. User and password come from `TWOTOWER_INDEX_USER` and
            `TWOTOWER_INDEX_PASSWORD`.
    """

    most = 16_384
    most_lists = 65_536

    def __init__(self, url: str) -> None:
        self._where = f"Milvus at {url}"
        self._url = url
        self._client: MilvusClient | None = None
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs what it raises

    def describe(self) -> str:
        """See `VectorDatabase.describe`."""
        with self._refusals():
            return f"Milvus {str(self._connected().get_server_version(timeout=SEARCH_S)).removeprefix('v')}"

    def create(self, name: str, rows: Longs, vectors: Floats, lists: int) -> None:
        """See `VectorDatabase.create`."""
        with self._refusals():
            client = self._connected()
            schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field(ID, DataType.INT64, is_primary=True)
            schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=vectors.shape[1])
            client.create_collection(name, schema=schema, consistency_level="Strong", timeout=CHANGE_S)
            try:
                self._fill(client, name, rows, vectors, lists)
            except BaseException:
                client.drop_collection(name, timeout=CHANGE_S)
                raise

    def _fill(self, client: MilvusClient, name: str, rows: Longs, vectors: Floats, lists: int) -> None:
        for start in range(0, len(rows), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            pairs = zip(rows[part].tolist(), vectors[part], strict=True)
            client.insert(name, [{ID: row, VECTOR: vector} for row, vector in pairs], timeout=LOAD_S)
        if lists:  # an index is built of what was flushed; a small collection is scanned wherever it is
            client.flush(name, timeout=LOAD_S)
        index = client.prepare_index_params()
        kind, parameters = ("IVF_FLAT", {"nlist": lists}) if lists else ("FLAT", {})
        index.add_index(VECTOR, index_type=kind, metric_type="IP", params=parameters)
        client.create_index(name, index, timeout=LOAD_S)
        client.load_collection(name, timeout=LOAD_S)
        until = time.monotonic() + LOAD_S
        while (count := self.count(name)) != len(rows):
            if count > len(rows) or time.monotonic() > until:
                raise UnavailableError(f"{self._where} shows {count} of the {len(rows)} vectors of {name}")
            time.sleep(0.1)

    def has(self, name: str) -> bool:
        """See `VectorDatabase.has`."""
        with self._refusals():
            return bool(self._connected().has_collection(name, timeout=SEARCH_S))

    def count(self, name: str) -> int:
        """See `VectorDatabase.count`."""
        if not self.has(name):
            return -1
        with self._refusals():
            counted = self._connected().query(
                name, filter="", output_fields=["count(*)"], consistency_level="Strong", timeout=SEARCH_S
            )
        return int(counted[0]["count(*)"])

    def nearest(self, name: str, queries: Floats, n: int, probes: int) -> Longs:
        """See `VectorDatabase.nearest`."""
        found = np.full((len(queries), n), -1, np.int64)
        step = max(1, FOUND_AT_ONCE // n)
        parameters = {"metric_type": "IP", "params": {"nprobe": probes} if probes else {}}
        with self._refusals():
            client = self._connected()
            for start in range(0, len(queries), step):
                answers = client.search(
                    name,
                    list(queries[start : start + step]),
                    limit=n,
                    anns_field=VECTOR,
                    search_params=parameters,
                    consistency_level="Eventually",
                    timeout=SEARCH_S,
                )
                for b, answer in enumerate(answers, start):
                    found[b, : len(answer)] = answer.ids
        return found

    def read(self, name: str) -> tuple[Longs, Floats]:
        """See `VectorDatabase.read`."""
        rows: list[int] = []
        vectors: list[list[float]] = []
        with self._refusals():
            content = self._connected().query_iterator(
                name, batch_size=AT_ONCE, output_fields=[ID, VECTOR], timeout=LOAD_S
            )
            while batch := content.next():
                rows.extend(entry[ID] for entry in batch)
                vectors.extend(entry[VECTOR] for entry in batch)
            content.close()
        ids = np.array(rows, np.int64)
        order = np.argsort(ids)
        return ids[order], np.array(vectors, np.float32)[order]

    def names(self, prefix: str) -> list[str]:
        """See `VectorDatabase.names`."""
        with self._refusals():
            names = self._connected().list_collections(timeout=CHANGE_S)
            return sorted(name for name in names if name.startswith(prefix))

    def drop(self, name: str) -> None:
        """See `VectorDatabase.drop`."""
        with self._refusals():
            self._connected().drop_collection(name, timeout=CHANGE_S)

    def _connected(self) -> MilvusClient:
        """The client; its channel connects again by itself."""
        if self._client is None:
            given = credentials("INDEX").given("user", "password")
            self._client = MilvusClient(self._url, **given, timeout=SEARCH_S)
        return self._client

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Give what the server or the connection refuses as our own error."""
        try:
            yield
        except MilvusException as error:
            raise UnavailableError(f"{self._where}: {error.message}") from error
        except grpc.RpcError as error:  # the client passes on that an answer took too long, or that a user has no right
            told = error.details() if hasattr(error, "details") else repr(error)
            raise UnavailableError(f"{self._where}: {told}") from error


@functools.cache
def connect(url: str) -> MilvusDatabase:
    """The database at an address; one for a process."""
    return MilvusDatabase(url)
