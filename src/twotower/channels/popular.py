"""The most clicked items: the channel that always has candidates, and the baseline of every evaluation."""

from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.lists import WeighedLists
from twotower.channels.options import PopularOptions
from twotower.channels.retriever import Candidates, Queries
from twotower.features.columns import Bag, pointers
from twotower.features.fitted import Bucket, Category
from twotower.index.protocol import PADDING
from twotower.samples.columns_file import map_columns, write_table
from twotower.samples.read import Samples
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError

FILE = "popular.arrow"
_SEGMENT, _PRIOR = b"segment", b"prior"


class Popular:
    """Items by number of clicks, ties by row: one list for everyone, or one for each segment.

    With a prior of m, a segment gets m clicks in addition to its own, distributed as the clicks of all are (Dirichlet
    smoothing), so that few clicks do not decide. Without a prior, the list of all follows where a segment's own list
    ends, with scores below 0: minus the item's place in that list.

    Args:
        lists: catalogue rows in that order with their (decayed) clicks: the list of all, then, if there are segments,
            one for each value of the feature, by vocabulary index.
        segment: the feature of users or context; None = there are no segments.
        prior: m; the clicks of the lists include it.
    """

    name = "popular"

    def __init__(self, lists: WeighedLists, segment: str | None = None, prior: float = 0.0) -> None:
        self._lists = lists.lists
        self._clicks = lists.values
        self._segment = segment
        self._prior = prior
        if segment is not None:
            whole = self._clicks[: self._lists.indptr[1]]
            # The score of an item for a segment that never clicked it.
            self._elsewhere = prior * whole / whole.sum() if prior else -1 - np.arange(len(whole), dtype=np.float32)

    @classmethod
    def of_counts(cls, item_positives: npt.NDArray[np.int64]) -> Self:
        """Order the catalogue by positives (N,), without items that have none."""
        rows = np.arange(len(item_positives))
        return cls(_ordered(np.zeros_like(rows), rows, item_positives, 1))

    @classmethod
    def fit(cls, samples: Samples, options: PopularOptions = PopularOptions()) -> Self:  # noqa: B008  frozen
        """Order the catalogue by positives as the options say; weak ones count with their weight.

        Raises:
            ConfigError: as of `check_popular`.
        """
        check_popular(samples, options)
        if options.window_days is None and options.segment is None and options.half_life_days is None:
            return cls.of_counts(samples.item_positives)
        positives = samples.positives
        weight = positives.weight.astype(np.float64)
        age_days = (positives.ts_ms.max(initial=0) - positives.ts_ms) / DAY_MS
        if options.window_days is not None:
            weight = weight * (age_days < options.window_days)
        if options.half_life_days is not None:
            weight = weight * 0.5 ** (age_days / options.half_life_days)
        size, count = len(samples.items), 1
        owner, rows = np.zeros(len(positives), np.int64), positives.item_row.astype(np.int64)
        if options.segment is not None:
            tokens, values = _tokens(samples, options.segment)
            owner, rows, weight = np.concatenate([owner, 1 + tokens]), np.tile(rows, 2), np.tile(weight, 2)
            count += values
        distinct, place = np.unique(owner * size + rows, return_inverse=True)
        group, rows, clicks = distinct // size, distinct % size, np.bincount(place, weight)
        if options.prior:
            whole = np.zeros(size)
            whole[rows[group == 0]] = clicks[group == 0]
            clicks = clicks + (group > 0) * options.prior * whole[rows] / whole.sum()
        return cls(_ordered(group, rows, clicks, count), options.segment, options.prior)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, memory-mapped."""
        stored = map_columns(folder / FILE)
        written = stored.schema.metadata or {}
        segment, prior = written.get(_SEGMENT, b"").decode() or None, float(written.get(_PRIOR, b"0"))
        return cls(WeighedLists.of(stored, "item_row", "clicks"), segment, prior)

    def save(self, folder: Path) -> None:
        """Write all that answering needs into a folder."""
        table = pa.table(WeighedLists(self._lists, self._clicks).columns("item_row", "clicks"))
        written = {_SEGMENT: self._segment or "", _PRIOR: str(self._prior)}
        write_table(folder / FILE, table.replace_schema_metadata(written))

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        """See `Retriever.retrieve`."""
        rows = np.full((len(queries), k), PADDING, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        exclude = queries.exclude
        tokens = None if self._segment is None else queries.features[self._segment]
        whole = self._lists.rows[: self._lists.indptr[1]]
        for user in range(len(queries)):
            left_out = exclude.rows[exclude.indptr[user] : exclude.indptr[user + 1]]
            if tokens is None:
                place = self._first(whole, left_out, k)
                item, score = whole[place], self._clicks[place]
            else:
                start, stop = self._lists.indptr[1 + tokens[user] : 3 + tokens[user]]  # type: ignore[index]
                own = start + self._first(self._lists.rows[start:stop], left_out, k)
                room = k if self._prior else k - len(own)
                place = self._first(whole, np.concatenate([left_out, self._lists.rows[own]]), room)
                item = np.concatenate([self._lists.rows[own], whole[place]])
                score = np.concatenate([self._clicks[own], self._elsewhere[place]])
                if self._prior:  # without one, the list of all follows as it is
                    best = np.lexsort((item, -score))[:k]
                    item, score = item[best], score[best]
            rows[user, : len(item)], scores[user, : len(item)] = item, score
        return Candidates(rows, scores)

    @staticmethod
    def _first(ordered: npt.NDArray[np.int32], left_out: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
        """Positions of the first k items that are not left out."""
        head = ordered[: k + len(left_out)]
        return np.flatnonzero(~np.isin(head, left_out))[:k]


def check_popular(samples: Samples, options: PopularOptions) -> None:
    """Check that the samples have what the options count.

    Raises:
        ConfigError: a window or a half-life for data without time; a prior without a segment; no such feature.
    """
    if options.prior and options.segment is None:
        raise ConfigError(f"models.popular.prior = {options.prior:g} is for the lists of segments: set segment too")
    for option in ("window_days", "half_life_days"):
        if getattr(options, option) is not None and not samples.timed:
            raise ConfigError(f"models.popular.{option} counts by time, and the events have none: leave it out")
    if options.segment is not None:
        _segments(samples, options.segment)


def _ordered(
    group: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    clicks: npt.NDArray[np.int64] | npt.NDArray[np.float64],
    groups: int,
) -> WeighedLists:
    """The clicked items of each group by number of clicks, ties by row."""
    kept = clicks > 0
    group, rows, clicks = group[kept], rows[kept], clicks[kept]
    order = np.lexsort((rows, -clicks, group))
    lists = Bag(pointers(np.bincount(group, minlength=groups)), rows[order].astype(np.int32))
    return WeighedLists(lists, clicks[order].astype(np.float32))


def _tokens(samples: Samples, segment: str) -> tuple[npt.NDArray[np.int64], int]:
    """The segment of each positive (P,) as a vocabulary index, and the number of these."""
    feature = _segments(samples, segment)
    size = feature.capacity if isinstance(feature, Bucket) else feature.vocabulary.capacity
    if segment in samples.positives.context:
        tokens = samples.positives.context[segment]
    else:
        tokens = samples.users.features[segment][samples.positives.user_row]  # type: ignore[index]
    assert isinstance(tokens, np.ndarray)
    return tokens.astype(np.int64), size


def _segments(samples: Samples, segment: str) -> Category | Bucket:
    """The feature whose values are segments."""
    fitted = {f.name: f for f in (*samples.features.user_columns, *samples.features.context)}
    feature = fitted.get(segment)
    if not isinstance(feature, Category | Bucket):
        fit = [name for name, f in fitted.items() if isinstance(f, Category | Bucket)]
        raise ConfigError(
            f"models.popular.segment = {segment!r} is no categorical or bucketed feature of users or context; "
            f"there are {', '.join(fit) or 'none'}"
        )
    return feature
