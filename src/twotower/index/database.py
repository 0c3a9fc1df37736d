"""The index of a vector database: what Milvus and PostgreSQL share.

The database holds a copy of the vectors and says which are near a query; scores, exclusions and order are computed
here, from the version's own mapped vectors. So all replicas give the same bytes, and no list of hidden rows travels to
the database.

N vectors, D their length, B queries, k neighbours each.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from twotower.index.checks import (
    FORMAT,
    INDEX_JSON,
    check_search,
    checked_build,
    excluded_positions,
    hidden_with,
    positions_of,
    read_description,
)
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions, Neighbours
from twotower.index.tuning import Tuned, fewest_probes, good_enough, probes_for, sample_of
from twotower.schema.errors import DataError, VersionError
from twotower.schema.files import whole_folder, write_json

Longs = NDArray[np.int64]
Floats = NDArray[np.float32]

FLAT_BELOW: Final = 20_000
"""Collections smaller than this are scanned by the database: there is nothing to tune."""
NARROW: Final = 50_000
"""Where this many rows or fewer are left of more than twice as many, they are searched exactly, here."""
MARGIN: Final = 1.25
"""Neighbours requested over those expected to be needed, where some are hidden."""
TUNING_QUERIES: Final = 200
TIMED_QUERIES: Final = 20
EXACT: Final = "exact"
"""Folder of the version's own copy of rows and vectors."""
_NONE: Final = np.empty(0, np.int64)


class VectorDatabase(Protocol):
    """A connection to a vector database. A collection holds the vectors of one channel of one version.

    Every method may be called from several threads at once.

    Raises:
        UnavailableError: the database does not answer in time, or refuses.
    """

    most: int
    """Neighbours of one query, at most."""
    most_lists: int
    """Lists of one index, at most."""

    def describe(self) -> str:
        """Name and versions of the server; refuses one that is too old."""
        ...

    def create(self, name: str, rows: Longs, vectors: Floats, lists: int) -> None:
        """Make a collection of vectors (N, D) under rows (N,), and its index of some lists; 0 = it is scanned.

        When it returns, every search finds every vector. If it fails, the collection is dropped again.
        """
        ...

    def has(self, name: str) -> bool:
        """Whether there is a collection of that name; as cheap as a call can be."""
        ...

    def count(self, name: str) -> int:
        """Vectors of a collection, -1 if there is none of that name."""
        ...

    def nearest(self, name: str, queries: Floats, n: int, probes: int) -> Longs:
        """Rows (B, n) of the n vectors with the largest inner products, in any order, padded with -1.

        Args:
            name: of the collection.
            queries: (B, D).
            n: at most `most`.
            probes: lists that are looked at.
        """
        ...

    def read(self, name: str) -> tuple[Longs, Floats]:
        """The whole content of a collection: rows (N,), rising, and vectors (N, D)."""
        ...

    def names(self, prefix: str) -> list[str]:
        """Names of the collections that begin so."""
        ...

    def drop(self, name: str) -> None:
        """Remove a collection, if there is one of that name."""
        ...


@dataclass(frozen=True)
class Collection:
    """A collection as it was written."""

    kind: str
    """`milvus` or `pgvector`."""
    url: str
    """Address of the database, without secrets."""
    name: str
    count: int
    """Vectors; without any there is no collection."""
    sha256: str
    """Of rows and vectors."""
    lists: int
    """Lists of its index; 0 = it is scanned."""


COLLECTION: Final = {field.name: int if field.type is int else str for field in fields(Collection)}
"""What is written of a collection, with the types."""

Connect = Callable[[str, str], VectorDatabase]
"""Gives the database of a kind at an address."""


class DatabaseIndex:
    """Searches a collection that never changes; implements `VectorIndex`.

    Hidden and excluded rows are dropped from an answer that was requested deeper. Where it is short then, where few
    rows are left, or where a database cannot go that deep, those that are left are searched exactly, here.
    """

    def __init__(
        self,
        collection: Collection,
        connect: Connect,
        exact: ExactIndex,
        tuning: tuple[Tuned, ...] = (),
        hidden: Longs = _NONE,
    ) -> None:
        """Use `build` or `load`: the version's own copy of the vectors, hidden positions rising."""
        self.collection = collection
        self.tuning = tuning
        self._connect = connect
        self._exact = exact
        self._hidden = hidden

    @classmethod
    def build(cls, kind: str, url: str, name: str, connect: Connect, rows: Longs, vectors: Floats) -> Self:
        """Load vectors (N, D) of rows (N,) into a new collection; none is made for N = 0.

        Raises:
            DataError: other shapes or types, duplicate or negative rows, values that are not finite.
            UnavailableError: the database does not answer, or refuses.
            VersionError: there is a collection of that name.
        """
        rows, vectors = checked_build(rows, vectors)
        lists = 0
        if len(rows):
            database = connect(kind, url)
            if database.has(name):
                raise VersionError(f"{name} exists in {url}, and a collection is never replaced")
            lists = min(lists_of(len(rows)), database.most_lists)
            database.create(name, rows, vectors, lists)
        collection = Collection(kind, url, name, len(rows), digest_of(rows, vectors), lists)
        return cls(collection, connect, ExactIndex.build(rows, vectors))

    def tune(self, queries: Floats, ks: Sequence[int], recall: float) -> Self:
        """The same index, probing for each k the fewest lists that reach a recall on sample queries (Q, D).

        Raises:
            DataError: no queries.
        """
        count = len(self._exact)
        if not self.collection.lists:
            return self
        if not len(queries):
            raise DataError("no queries to tune the index on: give vectors of held-out users")
        sample = sample_of(queries, TUNING_QUERIES)
        depths = sorted({min(k, count, self._database.most) for k in ks})
        best = self._exact.search(sample, depths[-1]).scores
        tuning = tuple(self._tuned(sample, k, recall, good_enough(best[:, k - 1])) for k in depths)
        return type(self)(self.collection, self._connect, self._exact, tuning, self._hidden)

    def _tuned(self, sample: Floats, k: int, target: float, enough: NDArray[np.floating[Any]]) -> Tuned:
        database, name = self._database, self.collection.name

        def recall_at(probes: int) -> float:
            hits = 0
            for query, rows, low in zip(sample, database.nearest(name, sample, k, probes), enough, strict=True):
                positions = positions_of(rows[rows >= 0], self._exact.rows)
                hits += int((self._exact.scored(query, positions).scores >= low).sum())
            return hits / (k * len(sample))

        probes, reached = fewest_probes(recall_at, target, self.collection.lists)
        seconds = []
        for query in sample[:TIMED_QUERIES, None]:
            start = time.perf_counter()
            database.nearest(name, query, k, probes)
            seconds.append(time.perf_counter() - start)
        return Tuned(k, probes, reached, 1000 * float(np.median(seconds)), len(sample))

    @property
    def _database(self) -> VectorDatabase:
        return self._connect(self.collection.kind, self.collection.url)

    @property
    def rows(self) -> Longs:  # noqa: D102
        return self._exact.rows

    def count(self) -> int:  # noqa: D102
        return len(self._exact) - len(self._hidden)

    def without(self, rows: Longs) -> Self:  # noqa: D102
        hidden = hidden_with(self._hidden, rows, self._exact.rows)
        return type(self)(self.collection, self._connect, self._exact, self.tuning, hidden)

    def search(self, queries: Floats, k: int, exclude: Exclusions | None = None) -> Neighbours:  # noqa: D102
        check_search(queries, k, exclude, self._exact.dimension)
        found = Neighbours.none(len(queries), k)
        excluded = excluded_positions(exclude, len(queries), self._exact.rows, self._hidden)
        depths = np.array([self._depth(k, self.count() - out) for out in np.diff(excluded.indptr).tolist()], np.int64)
        for depth in np.unique(depths).tolist():
            self._search_to(depth, np.flatnonzero(depths == depth), queries, excluded, found)
        return found

    def _depth(self, k: int, left: int) -> int:
        """Neighbours to request so that k of those left are probably among them; 0 = search those left exactly."""
        count = len(self._exact)
        if left == 0 or (left <= NARROW and 2 * left < count):
            return 0
        evenly = math.ceil(MARGIN * k * count / left)
        return min(count, k + count - left, evenly)

    def _search_to(self, depth: int, which: Longs, queries: Floats, excluded: Exclusions, found: Neighbours) -> None:
        """Answer some queries (n,) by a search of some depth; those whose answer is short, exactly.

        A deeper search would not do: what is near to such a query is hidden, and of what is far from it the database
        finds little, because it looks into the nearest lists.
        """
        short = which
        if 0 < depth <= (database := self._database).most:
            nearest = database.nearest(self.collection.name, queries[which], depth, self._probes(depth))
            answered = [
                self._answer(b, rows, queries, excluded, found) for b, rows in zip(which.tolist(), nearest, strict=True)
            ]
            short = which[~np.array(answered)]
        for b in short.tolist():
            left = np.ones(len(self._exact), np.bool_)
            left[self._hidden] = False
            left[_of(excluded, b)] = False
            exact = self._exact.best_of(queries[b], left, found.rows.shape[1])
            found.rows[b], found.scores[b] = exact.rows[0], exact.scores[0]

    def _answer(
        self,
        b: int,
        rows: Longs,
        queries: Floats,
        excluded: Exclusions,
        found: Neighbours,
    ) -> bool:
        """Fill in the answer of a query from the rows that the database found; False where they are too few."""
        out = _of(excluded, b)
        positions = np.unique(positions_of(rows, self._exact.rows))  # a database may give a row twice
        positions = positions[positions >= 0]
        for left_out in (self._hidden, out):
            if len(left_out):
                positions = positions[positions_of(positions, left_out) < 0]
        n = min(found.rows.shape[1], self.count() - len(out))
        if len(positions) < n:
            return False
        scored = self._exact.scored(queries[b], positions)
        found.rows[b, :n], found.scores[b, :n] = scored.rows[0, :n], scored.scores[0, :n]
        return True

    def _probes(self, depth: int) -> int:
        return probes_for(self.tuning, depth, self.collection.lists)

    def save(self, folder: Path) -> None:  # noqa: D102
        with whole_folder(folder) as temporary:
            self._exact.save(temporary / EXACT)
            tuning = [asdict(tuned) for tuned in self.tuning]
            write_json(temporary / INDEX_JSON, {"format": FORMAT, **asdict(self.collection), "tuning": tuning})

    @classmethod
    def load(cls, folder: Path, kind: str, connect: Connect) -> Self:
        """A saved index; the database is not asked before the first search.

        Raises:
            DataError: files are missing or not what `index.json` says.
        """
        said = read_description(folder, kind, {**COLLECTION, "tuning": list})
        exact = ExactIndex.load(folder / EXACT)
        if len(exact) != said["count"]:
            raise DataError(f"{folder / EXACT} holds {len(exact)} vectors where {INDEX_JSON} says {said['count']}")
        collection = Collection(**{name: said[name] for name in COLLECTION})
        try:
            tuning = tuple(Tuned(**tuned) for tuned in said["tuning"])
        except TypeError as error:
            raise DataError(f"{folder / INDEX_JSON}: {error}, where a tuned index is expected: publish again") from None
        return cls(collection, connect, exact, tuning)

    def close(self) -> None:  # noqa: D102
        pass  # connections are shared by all indexes of a process


def check_there(collection: Collection, connect: Connect) -> None:
    """Refuse a collection that is missing, or has another number of vectors.

    Raises:
        VersionError: it does.
        UnavailableError: the database does not answer.
    """
    count = connect(collection.kind, collection.url).count(collection.name) if collection.count else 0
    if count != collection.count:
        seen = "is missing" if count < 0 else f"holds {count} vectors, where {collection.count} were written"
        raise VersionError(f"{collection.name} in {collection.url} {seen}: publish again")


def check_content(collection: Collection, connect: Connect) -> None:
    """Refuse a collection whose rows and vectors are not those that were written; it reads all of them.

    Raises:
        VersionError: they are not.
        UnavailableError: the database does not answer.
    """
    check_there(collection, connect)
    if not collection.count:
        return
    digest = digest_of(*connect(collection.kind, collection.url).read(collection.name))
    if digest != collection.sha256:
        raise VersionError(
            f"{collection.name} in {collection.url} has the checksum {digest[:12]}, where {collection.sha256[:12]} was "
            "written: its vectors were changed. Publish again"
        )


def lists_of(count: int) -> int:
    """Lists of vectors that an index of so many has, of which a search looks at the nearest; 0 = it has none.

    >>> lists_of(1_000_000)
    4000
    """
    return 0 if count < FLAT_BELOW else int(4 * math.sqrt(count))


def digest_of(rows: Longs, vectors: Floats) -> str:
    """SHA-256 of rows (N,) and vectors (N, D), in hexadecimal."""
    digest = hashlib.sha256(rows.astype("<i8").tobytes())
    digest.update(vectors.astype("<f4").tobytes())
    return digest.hexdigest()


def _of(excluded: Exclusions, b: int) -> Longs:
    return excluded.rows[excluded.indptr[b] : excluded.indptr[b + 1]]
