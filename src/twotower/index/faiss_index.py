"""FAISS: scans small catalogues, and of large ones only the lists of vectors that are near the query."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

# Both libraries load an OpenMP runtime. With torch first they share one setting of threads; with FAISS first there are
# two pools that fight for the cores.
import torch  # noqa: F401

import faiss as _faiss  # isort: skip
from numpy.typing import NDArray

from twotower.index.checks import (
    FORMAT,
    INDEX_JSON,
    ROWS,
    check_search,
    checked_build,
    excluded_positions,
    hidden_with,
    map_rows,
    read_description,
)
from twotower.index.protocol import PADDING, Exclusions, Neighbours, VectorIndex
from twotower.index.tuning import Tuned, fewest_probes, good_enough, probes_for, sample_of
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import opened_file, whole_folder, write_json

faiss: Any = _faiss  # its type stubs are those of the C++ classes, not of their Python wrappers

INDEX_FILE: Final = "index.faiss"
FLAT_BELOW: Final = 20_000
"""Catalogues smaller than this are scanned: half a millisecond, and nothing to tune."""
TRAINED_ON: Final = 64
"""Vectors for each list that k-means sees; more cost time and change recall little."""
TUNING_QUERIES: Final = 500
"""Queries that probes are tuned on, evenly spaced among those given."""
TIMED_QUERIES: Final = 100
"""Of these, queries timed one by one."""
FETCHED_AT_ONCE: Final = 1 << 22
"""Neighbours fetched together, over all queries of a call."""
FEW: Final = 1 << 12
"""Rows excluded for one query up to which as many more are fetched and dropped; beyond, the query has its own view."""
SPARSE: Final = 0.01
"""Share of hidden rows up to which they are taken to be spread evenly."""
THINNED: Final = (0.5, 0.9)
"""Shares of hidden rows that a search is tuned for; it is exact where more are hidden."""
THINNED_QUERIES: Final = 100
"""Tuning queries of these."""
CELLS: Final = 64
"""Values of an attribute that filters are tuned for."""
STEP: Final = 1.4
"""By which the number of scanned vectors grows until the recall is reached."""
RANKED_AT_ONCE: Final = 1 << 22
"""Lists ranked together, over all queries of a call."""


@dataclass(frozen=True)
class Thinned:
    """How much must be scanned where a share of the rows is hidden, as measured when the index was built.

    Attributes:
        hidden: share of hidden rows, the largest that this is meant for.
        factor: vectors that are not hidden to be scanned, over the vectors scanned for as many neighbours with nothing
            hidden.
        recall: the lowest measured, over kinds of filters and numbers of neighbours.
        queries: number of tuning queries.
    """

    hidden: float
    factor: float
    recall: float
    queries: int


class FaissIndex:
    """FAISS with inner products: a scan of every vector (Flat), or of the nearest of about 4 sqrt(N) lists (IVF-Flat).

    The lists come from k-means (Sivic and Zisserman 2003; in FAISS: Johnson et al. 2017). How many must be probed for a
    recall depends on the data, so it is measured (`tune`); before that every list is probed and the answer is exact.
    Where vectors tie for the last place, which of them FAISS returns is its own choice, the same each time.

    Where many rows are hidden, the lists nearest to a query may hold few of the others: lists are probed until enough
    vectors that are not hidden have been scanned. How many are enough is measured too.
    """

    def __init__(
        self,
        index: Any,
        rows: NDArray[np.int64],
        hidden: NDArray[np.int64],
        tuning: tuple[Tuned, ...],
        *,
        thinned: tuple[Thinned, ...] = (),
        list_of: NDArray[np.int32] | None = None,
    ) -> None:
        """Use `build` or `load`: an index of FAISS over N positions, rows (N,) rising, hidden positions rising.

        `tuning` is ordered by k, `thinned` by share; `list_of` (N,) is the list of each position, None = read from the
        index.
        """
        self._index = index
        self._rows = rows
        self._hidden = hidden
        self._lists = int(index.nlist) if isinstance(index, faiss.IndexIVF) else 0
        self._selector = _all_but(hidden, len(rows)) if hidden.size else None
        self._list_of = _list_of_each(index, len(rows)) if self._lists and list_of is None else list_of
        self.tuning = tuning
        self.thinned = thinned

    @classmethod
    def build(
        cls, rows: NDArray[np.int64], vectors: NDArray[np.float32], seed: int = 0, flat_below: int = FLAT_BELOW
    ) -> Self:
        """An index of vectors (N, D) float32 under rows (N,) int64, N = 0 included.

        The seed is that of k-means; fewer vectors than `flat_below` are scanned, with no lists.

        Raises:
            DataError: other shapes or types, duplicate or negative rows, values that are not finite.
        """
        rows, vectors = checked_build(rows, vectors)
        count, dimension = vectors.shape
        index: Any = faiss.IndexFlatIP(dimension)
        if count >= max(flat_below, 1):
            lists = min(count, round(4 * count**0.5))
            index = faiss.IndexIVFFlat(index, dimension, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = seed
            index.cp.min_points_per_centroid = 1
            index.cp.max_points_per_centroid = TRAINED_ON
            index.train(vectors)
        index.add(vectors)
        return cls(index, rows, np.empty(0, np.int64), ())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Map a saved index into memory.

        A file that is cut short, or of another index, is refused. Flipped bits inside vectors are found only by the
        hash in a version's manifest, which is checked before.

        Raises:
            DataError: files are missing, or not what `index.json` says.
        """
        fields = {"count": int, "dimension": int, "bytes": int, "tuning": list}
        described = read_description(folder, "faiss", fields)
        path, size = folder / INDEX_FILE, described["bytes"]
        count, dimension = described["count"], described["dimension"]
        try:
            tuning = tuple(Tuned(**entry) for entry in described["tuning"])
            thinned = tuple(Thinned(**entry) for entry in described.get("thinned", []))
        except TypeError as error:
            raise DataError(f"{folder / INDEX_JSON} is incomplete ({error!r}): rebuild the index") from None
        with opened_file(path) as descriptor:
            actual = os.fstat(descriptor).st_size
        if actual != size:
            raise DataError(
                f"{path} has {actual} bytes, {INDEX_JSON} says {size} bytes: rebuild the index from the item vectors"
            )
        try:
            # Not IO_FLAG_MMAP: that one starts up to 32 threads in each search to read ahead.
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(f"{path} is no index of FAISS ({reason}): rebuild it from the item vectors") from None
        if (index.ntotal, index.d, index.metric_type) != (count, dimension, faiss.METRIC_INNER_PRODUCT):
            raise DataError(
                f"{path} holds {index.ntotal} vectors of {index.d}, {INDEX_JSON} says {count} of {dimension}"
            )
        if not _is_whole(index):
            raise DataError(f"{path} is no whole index: rebuild it from the item vectors")
        return cls(index, map_rows(folder, count), np.empty(0, np.int64), tuning, thinned=thinned)

    @property
    def rows(self) -> NDArray[np.int64]:  # noqa: D102
        return self._rows

    def count(self) -> int:  # noqa: D102
        return len(self._rows) - len(self._hidden)

    def without(self, rows: NDArray[np.int64]) -> Self:  # noqa: D102
        return self._view(hidden_with(self._hidden, rows, self._rows), self.tuning, self.thinned)

    def _view(self, hidden: NDArray[np.int64], tuning: tuple[Tuned, ...], thinned: tuple[Thinned, ...] = ()) -> Self:
        """The same vectors with other hidden rows, or searched in another way."""
        return type(self)(self._index, self._rows, hidden, tuning, thinned=thinned, list_of=self._list_of)

    def search(self, queries: NDArray[np.float32], k: int, exclude: Exclusions | None = None) -> Neighbours:  # noqa: D102
        check_search(queries, k, exclude, self._index.d)
        answer = Neighbours.none(len(queries), k)
        if not self.count():
            return answer
        queries = np.ascontiguousarray(queries)
        together = np.arange(len(queries))
        if exclude is not None and (many := np.diff(exclude.indptr) > FEW).any():
            together = np.flatnonzero(~many)
            exclude = self._search_alone(queries, np.flatnonzero(many), exclude, answer)
        excluded = excluded_positions(exclude, len(queries), self._rows, self._hidden)
        counts = np.diff(excluded.indptr)
        # Fetch as many more as are left out afterwards. Queries go together by the power of two of that number, so that
        # one user with a long history does not make the whole batch pay.
        classes = np.ceil(np.log2(np.maximum(counts, 0.5)))
        for size in np.unique(classes[together]):
            members = together[classes[together] == size]
            fetch = int(min(k + counts[members].max(), self.count()))
            step = max(1, FETCHED_AT_ONCE // fetch)
            for start in range(0, len(members), step):
                self._search_alike(queries, members[start : start + step], fetch, excluded, answer)
        return answer

    def _search_alone(
        self, queries: NDArray[np.float32], members: NDArray[np.int64], exclude: Exclusions, answer: Neighbours
    ) -> Exclusions:
        """Answer the queries of `members` (n,), each from its own view; gives the exclusions of the other queries."""
        parts = [exclude.rows[exclude.indptr[b] : exclude.indptr[b + 1]] for b in range(len(queries))]
        for b in members:
            alone = self.without(parts[b]).search(queries[b : b + 1], answer.rows.shape[1])
            answer.rows[b], answer.scores[b] = alone.rows[0], alone.scores[0]
            parts[b] = np.empty(0, np.int64)
        return Exclusions.of(parts)

    def _search_alike(
        self,
        queries: NDArray[np.float32],
        members: NDArray[np.int64],
        fetch: int,
        excluded: Exclusions,
        answer: Neighbours,
    ) -> None:
        """Answer the queries of `members` (n,), fetching equally many; lists that are short are probed again, wider."""
        k = answer.rows.shape[1]
        nprobe = self._probes(fetch)
        scan = self._scan(fetch)
        owner = np.repeat(np.arange(len(queries)), np.diff(excluded.indptr))
        excluded_keys = owner * len(self._rows) + excluded.rows
        while members.size:
            if scan is None or nprobe >= self._lists:
                scores, positions = self._index.search(queries[members], fetch, params=self._parameters(nprobe))
            else:
                scores, positions = self._search_thinned(queries[members], fetch, scan)
            dropped = positions < 0
            if excluded_keys.size:
                keys = members[:, None] * len(self._rows) + positions
                places = np.minimum(np.searchsorted(excluded_keys, keys), len(excluded_keys) - 1)
                dropped |= excluded_keys[places] == keys
            scores[dropped] = -np.inf
            order = np.lexsort((positions, -scores))[:, :k]
            scores = np.take_along_axis(scores, order, axis=1)
            rows = self._rows[np.take_along_axis(positions, order, axis=1)]
            answer.scores[members, : order.shape[1]] = scores
            answer.rows[members, : order.shape[1]] = np.where(np.isneginf(scores), PADDING, rows)
            if nprobe >= self._lists:
                return
            wanted = np.minimum(k, self.count() - np.diff(excluded.indptr)[members])
            members = members[np.isfinite(scores).sum(axis=1) < wanted]
            nprobe = min(4 * nprobe, self._lists) if scan is None else self._lists

    def _scan(self, fetch: int) -> float | None:
        """How many vectors that are not hidden to scan for `fetch` neighbours; None where so few are hidden that the
        number of lists says it.

        It is all of them, which is exact, where more is hidden than any tuned share, or most would be scanned anyway.
        """
        share = len(self._hidden) / len(self._rows)
        if share <= SPARSE or not self._lists:
            return None
        below = [thinned.factor for thinned in self.thinned if thinned.hidden < share]
        above = [thinned.factor for thinned in self.thinned if thinned.hidden >= share]
        return self._scan_by(max(below[-1:] + above[:1]) if above else np.inf, fetch)

    def _scan_by(self, factor: float, fetch: int) -> float:
        scan = factor * probes_for(self.tuning, fetch, self._lists) * len(self._rows) / self._lists
        return scan if scan < self.count() / 2 else float(self.count())

    def _search_thinned(
        self, queries: NDArray[np.float32], fetch: int, scan: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions (B, fetch) out of the nearest lists that hold `scan` vectors which are not hidden."""
        if scan >= self.count():
            scores, positions = self._index.search(queries, fetch, params=self._parameters(self._lists))
            return scores, positions
        parts = []
        step = max(1, RANKED_AT_ONCE // self._lists)
        for start in range(0, len(queries), step):
            part = queries[start : start + step]
            near, lists = self._index.quantizer.search(part, self._lists)
            shown = self._shown_of_each[lists]
            probed = np.cumsum(shown, axis=1) - shown < scan
            most = int(probed.sum(axis=1).max())
            parts.append(self._search_lists(part, fetch, np.where(probed, lists, -1)[:, :most], near[:, :most]))
        return np.concatenate([scores for scores, _ in parts]), np.concatenate([positions for _, positions in parts])

    def _search_lists(
        self, queries: NDArray[np.float32], fetch: int, lists: NDArray[np.int64], near: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions (B, fetch) out of given lists (B, P), -1 for none, with the scores of their centres."""
        scores = np.empty((len(queries), fetch), np.float32)
        positions = np.empty((len(queries), fetch), np.int64)
        lists, near = np.ascontiguousarray(lists), np.ascontiguousarray(near)
        self._index.search_preassigned_c(  # the wrapper around it takes no selector
            len(queries),
            faiss.swig_ptr(queries),
            fetch,
            faiss.swig_ptr(lists),
            faiss.swig_ptr(near),
            faiss.swig_ptr(scores),
            faiss.swig_ptr(positions),
            False,
            self._parameters(lists.shape[1]),
        )
        return scores, positions

    @cached_property
    def _shown_of_each(self) -> NDArray[np.int64]:
        """(lists,) vectors of each list that are not hidden."""
        assert self._list_of is not None
        shown = np.bincount(self._list_of, minlength=self._lists)
        return shown - np.bincount(self._list_of[self._hidden], minlength=self._lists)

    def _probes(self, fetch: int) -> int:
        """Lists to probe for `fetch` neighbours: hidden rows thin the lists out, as if more were requested."""
        return probes_for(self.tuning, fetch * len(self._rows) / self.count(), self._lists)

    def _parameters(self, nprobe: int) -> Any:
        if self._lists:
            return faiss.SearchParametersIVF(nprobe=nprobe, sel=self._selector)
        return faiss.SearchParameters(sel=self._selector)

    def tune(
        self,
        queries: NDArray[np.float32],
        ks: Sequence[int],
        recall: float,
        oracle: VectorIndex,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Self:
        """The same index, probing for each k the fewest lists that reach a recall on sample queries.

        The number is doubled until the recall is reached, then found by bisection. A Flat index is exact and comes back
        as it is.

        Args:
            queries: (Q, D) float32 of users that the model was not trained on; at most `TUNING_QUERIES` are used.
            ks: numbers of neighbours that will be requested.
            recall: share of the exact neighbours to be found, above 0 and at most 1.
            oracle: exact index of the same vectors.
            clock: seconds, for `latency_ms`.

        Raises:
            ConfigError: no k, or a recall that cannot be.
            DataError: no queries, or not of this index; an oracle of other vectors.
        """
        if not self._lists:
            return self
        if not ks or not 0 < recall <= 1:
            raise ConfigError(
                f"tuning for k of {list(ks)} and a recall of {recall}: give one k or more, 0 < recall <= 1"
            )
        check_search(queries, min(ks), None, self._index.d)
        if not len(queries):
            raise DataError("no queries to tune the index on: give vectors of held-out users")
        if oracle.count() != len(self._rows):
            raise DataError(
                f"the exact index holds {oracle.count()} vectors, this one {len(self._rows)}: build both from one set"
            )
        sample = sample_of(queries, TUNING_QUERIES)
        depths = sorted({min(k, len(self._rows)) for k in ks})
        exact = oracle.search(sample, depths[-1]).scores
        tuning = tuple(self._tuned(sample, k, recall, exact[:, k - 1], clock) for k in depths)
        tuned = self._view(self._hidden, tuning)
        few = np.ascontiguousarray(sample[:: max(1, len(sample) // THINNED_QUERIES)])
        thinned = tuple(tuned._thinned(few, (depths[0], depths[-1]), recall, oracle, share) for share in THINNED)
        return self._view(self._hidden, tuning, thinned)

    def _tuned(
        self,
        sample: NDArray[np.float32],
        k: int,
        target: float,
        last: NDArray[np.float32],
        clock: Callable[[], float],
    ) -> Tuned:
        """The fewest probes that find enough scores not below the exact k-th ones, `last` (Q,)."""
        enough = good_enough(last)

        def recall_at(nprobe: int) -> float:
            scores, _ = self._index.search(sample, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
            return float((scores >= enough).mean())

        nprobe, reached = fewest_probes(recall_at, target, self._lists)
        seconds = []
        for query in sample[:TIMED_QUERIES, None]:
            start = clock()
            self._index.search(query, k, params=faiss.SearchParametersIVF(nprobe=nprobe))
            seconds.append(clock() - start)
        return Tuned(k, nprobe, reached, 1000 * float(np.median(seconds)), len(sample))

    def _thinned(
        self, sample: NDArray[np.float32], ks: Sequence[int], target: float, oracle: VectorIndex, share: float
    ) -> Thinned:
        """The least that must be scanned where a share of the rows is hidden, by chance or by an attribute."""
        rng = np.random.default_rng(0)
        factor, reached = 1.0, 1.0
        for recall_at in (self._by_chance(sample, oracle, share, rng), self._by_attribute(sample, share, rng)):
            for k in (k for k in ks if k <= (1 - share) * len(self._rows)):
                recall, exact = recall_at(k, factor)
                while recall < target and not exact:
                    factor *= STEP
                    recall, exact = recall_at(k, factor)
                reached = min(reached, recall)
        return Thinned(share, factor, reached, len(sample))

    def _by_chance(
        self, sample: NDArray[np.float32], oracle: VectorIndex, share: float, rng: np.random.Generator
    ) -> Callable[[int, float], tuple[float, bool]]:
        """Rows hidden by chance: a function of k and a factor that gives the recall, and whether all others were
        scanned.
        """
        out = np.flatnonzero(rng.random(len(self._rows)) < share)
        view = self._view(out, self.tuning)
        best = oracle.without(self._rows[out]).search(sample, self.tuning[-1].k).scores

        def recall_at(k: int, factor: float) -> tuple[float, bool]:
            scan = view._scan_by(factor, k)
            scores, _ = view._search_thinned(sample, k, scan)
            return float((scores >= good_enough(best[:, k - 1])).mean()), scan >= view.count()

        return recall_at

    def _by_attribute(
        self, sample: NDArray[np.float32], share: float, rng: np.random.Generator
    ) -> Callable[[int, float], tuple[float, bool]]:
        """The same for rows hidden by an attribute that goes with the vectors, such as a category.

        The lists are grouped into cells, and each query does without its own cell and a share of the others. So its
        neighbours are far away, where the order of the lists says less.
        """
        centres = self._index.quantizer.reconstruct_n(0, self._lists)
        pivots = centres[rng.choice(self._lists, min(CELLS, self._lists), replace=False)]
        near, lists = self._index.quantizer.search(sample, self._lists)
        cells = np.argmax(centres @ pivots.T, axis=1)[lists]
        hidden = rng.random((len(sample), len(pivots))) < share
        hidden[np.arange(len(sample)), cells[:, 0]] = True
        shown = np.where(np.take_along_axis(hidden, cells, axis=1), 0, self._shown_of_each[lists])
        before = np.cumsum(shown, axis=1) - shown
        best, positions = self._search_lists(sample, self.tuning[-1].k, np.where(shown, lists, -1), near)

        def recall_at(k: int, factor: float) -> tuple[float, bool]:
            scan = factor * probes_for(self.tuning, k, self._lists) * len(self._rows) / self._lists
            scores, _ = self._search_lists(sample, k, np.where((shown > 0) & (before < scan), lists, -1), near)
            enough_left = positions[:, k - 1] >= 0
            recalls = scores[enough_left] >= good_enough(best[enough_left, k - 1])
            return float(recalls.mean()) if recalls.size else 1.0, scan >= len(self._rows)

        return recall_at

    def save(self, folder: Path) -> None:  # noqa: D102
        with whole_folder(folder) as temporary:
            faiss.write_index(self._index, str(temporary / INDEX_FILE))
            np.save(temporary / ROWS, self._rows, allow_pickle=False)
            description = {
                "format": FORMAT,
                "kind": "faiss",
                "count": len(self._rows),
                "dimension": int(self._index.d),
                "lists": self._lists,
                "bytes": (temporary / INDEX_FILE).stat().st_size,
                "tuning": [asdict(tuned) for tuned in self.tuning],
                "thinned": [asdict(thinned) for thinned in self.thinned],
            }
            write_json(temporary / INDEX_JSON, description)

    def close(self) -> None:  # noqa: D102
        pass


def _is_whole(index: Any) -> bool:
    """Whether an index that was read holds the vectors that it says: FAISS itself does not check."""
    if isinstance(index, faiss.IndexIVFFlat):
        lists, quantizer = index.invlists, faiss.downcast_index(index.quantizer)
        if (lists.nlist, lists.code_size, quantizer.d) != (index.nlist, 4 * index.d, index.d):
            return False
        sizes = [lists.list_size(number) for number in range(lists.nlist)]
        if sum(sizes) != index.ntotal or not _is_whole(quantizer) or quantizer.ntotal != index.nlist:
            return False
        ids = [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in enumerate(sizes) if size]
        every = np.sort(np.concatenate(ids)) if ids else np.zeros(0, np.int64)
        return bool((every == np.arange(index.ntotal)).all())
    return isinstance(index, faiss.IndexFlat) and index.codes.size() == 4 * index.d * index.ntotal


def _list_of_each(index: Any, count: int) -> NDArray[np.int32]:
    """(count,) the list of each position."""
    list_of = np.empty(count, np.int32)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            ids = index.invlists.get_ids(number)
            list_of[faiss.rev_swig_ptr(ids, size)] = number
            index.invlists.release_ids(number, ids)
    return list_of


def _all_but(hidden: NDArray[np.int64], count: int) -> Any:
    """A FAISS selector of all positions below `count` except the hidden ones, as one bit each."""
    shown = np.ones(count, np.bool_)
    shown[hidden] = False
    return faiss.IDSelectorBitmap(np.packbits(shown, bitorder="little"))
