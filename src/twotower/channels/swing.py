"""Swing: items are near if many pairs of users, who have little else in common, clicked both (Yang et al. 2020).

s(i, j) is the sum, over the unordered pairs of different users u and v who both clicked i and j, of
w_u w_v / (alpha + |I_u and I_v|), where I_u are the items of u that count and w_u = (|I_u| + offset)^-activity ("Large
Scale Product Graph Construction for Recommendation in E-commerce", eq. 1; the paper's w_u is 1 / sqrt(|I_u|), offset 5
and activity .35 are the form that industry uses). A pair of users is a swing: the fewer items it holds together, the
more one of them says. It is then damped by the users of the candidate, s(i, j) / |U_j|^popularity.

SQL does this badly, so there is one kernel over arrays. It computes one *part* of the items, a range of catalogue rows,
at a time: parts bound its memory, and each thread or task of a cluster takes one. The order in which a similarity is
added up does not depend on the parts.

N items, U users, E distinct (user, item) that count.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.channels.item_to_item import NEAREST, Answering, ItemToItem, Nearest
from twotower.channels.options import SwingOptions
from twotower.features.columns import pointers
from twotower.samples.engine import open_engine
from twotower.samples.options import EngineOptions
from twotower.samples.read import Clicks
from twotower.samples.sampling import FACTOR, PRIME
from twotower.schema.errors import ConfigError
from twotower.schema.files import TEMPORARY

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SWING = "swing"

_SLOT_BYTES = 12


class Graph(NamedTuple):
    """Who clicked what, from both sides, within the caps; a tuple, because the compiler takes no dataclass."""

    user_indptr: Longs
    """(U + 1,)"""
    item: Ints
    """(E,) items of each user, ascending."""
    place: Longs
    """(E,) where the same edge stands in `user`."""
    item_indptr: Longs
    """(N + 1,)"""
    user: Ints
    """(E,) users of each item, ascending."""
    weight: Floats
    """(U,) w_u."""
    damping: Floats
    """(N,) |U_j|^-popularity, of all users of the item, before the cap."""
    room: Longs
    """(N,) slots for the similarities of each item: N where that is little more than it needs, else a power of two."""
    most_met: int
    """The most edges that the items of one user have together."""


def fit_swing(
    clicks: Clicks,
    items: int,
    options: SwingOptions = SwingOptions(),  # noqa: B008  frozen
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    scratch: Path | None = None,
) -> ItemToItem:
    """The channel: the nearest of each of N items from all users' clicks.

    The threads or tasks of the engine each take a part of the items; the less memory, the more parts. Every engine
    gives the same bytes. The graph is kept for them below `scratch` (None = the system's folder).

    Raises:
        ConfigError: the compiler that it needs is not installed.
    """
    swing_kernel()
    graph = click_graph(clicks, items, options)
    ranges = parts(graph, int(engine.memory_gb * 2**30 / _SLOT_BYTES), engine.threads)
    folder = TemporaryDirectory(prefix=TEMPORARY, dir=scratch)
    with folder as kept, open_engine(engine, Path(kept)) as opened:
        for name, values in graph._asdict().items():
            np.save(Path(kept) / f"{name}.npy", values)
        work = partial(_part, kept, ranges, options.alpha, options.neighbours)
        nearest = Nearest.of(opened.spread(work, len(ranges), NEAREST))
    answering = Answering(options.latest, options.recency)
    return ItemToItem.of(SWING, nearest, items, answering, normalise=options.normalise)


def click_graph(clicks: Clicks, items: int, options: SwingOptions) -> Graph:
    """The distinct clicks within the caps: the latest items of a user, the users of an item with the smallest hashes.

    The hash is of the user alone, so that two items that many clicked keep the same users, and with them the users that
    they have in common (coordinated samples, Cohen and Kaplan 2007).
    """
    users = len(clicks.indptr) - 1
    key = clicks.owners * items + clicks.item_row
    distinct, last = np.unique(key[::-1], return_index=True)
    user, item = distinct // items, distinct % items
    # The later the click, the smaller its place in the reversed order.
    kept = _first(user, last, options.items, users)
    user, item = user[kept], item[kept]
    user_items = np.maximum(np.bincount(user, minlength=users), 1)
    item_users = np.maximum(np.bincount(item, minlength=items), 1)
    kept = _first(item, _hash(_hash(user)), options.users, items)
    user, item = user[kept], item[kept]
    sizes, clicked = np.bincount(user, minlength=users), np.bincount(item, minlength=items)
    others = np.bincount(item, sizes[user] - 1.0, items)
    room = 2 ** np.ceil(np.log2(np.maximum(1.5 * others, 1))).astype(np.int64)
    by_item = np.lexsort((user, item))
    place = np.empty(len(user), np.int64)
    place[by_item] = np.arange(len(user))
    return Graph(
        pointers(sizes),
        item.astype(np.int32),
        place,
        pointers(clicked),
        user[by_item].astype(np.int32),
        np.power(user_items + options.offset, -options.activity, dtype=np.float64),
        np.power(item_users, -options.popularity, dtype=np.float64),
        np.where(others == 0, 0, np.minimum(room, items)),
        int(np.bincount(user, clicked[item], users).max(initial=0)),
    )


def _first(group: Longs, order: Longs, most: int, groups: int) -> Longs:
    """Positions of the entries that are among the `most` first of their group, ascending."""
    arranged = np.lexsort((order, group))
    starts = pointers(np.bincount(group, minlength=groups))
    rank = np.arange(len(group)) - starts[group[arranged]]
    return np.sort(arranged[rank < most])


def _hash(value: Longs) -> Longs:
    """One round of the multiplicative hash of `samples.sampling`."""
    hashed: Longs = (value + 1) % PRIME * FACTOR % PRIME
    return hashed


def _part(folder: str, ranges: Sequence[tuple[int, int]], alpha: float, neighbours: int, part: int) -> pa.RecordBatch:
    """The nearest items of one range of items of a stored graph; it may run in a process of its own."""
    # Mapped, so that parts share their pages; copy-on-write, because to the compiler a read-only array is another type.
    arrays = {name: np.load(Path(folder) / f"{name}.npy", mmap_mode="c") for name in Graph._fields}
    graph = Graph(**{**arrays, "most_met": int(arrays["most_met"])})
    first, last = ranges[part]
    nearest = swing_kernel()(graph, first, last, alpha, neighbours)
    return pa.record_batch([nearest.item, nearest.neighbour, nearest.similarity], schema=NEAREST)


def parts(graph: Graph, slots: int, threads: int = 1) -> list[tuple[int, int]]:
    """Ranges of items (first, behind the last) that together are all; `slots` similarities are held at a time, shared
    by the parts that `threads` compute.
    """
    room = np.cumsum(graph.room)
    items, total = len(room), int(room.max(initial=0))
    count = max(threads, -(-total // max(1, slots // threads)))
    edges = np.unique([0, *np.searchsorted(room, total / count * np.arange(1, count)), items])
    return [(int(first), int(last)) for first, last in pairwise(edges)]


@cache
def swing_kernel() -> Callable[[Graph, int, int, float, int], Nearest]:
    """The compiled kernel: graph, first item, behind the last item, alpha, neighbours to keep -> the nearest items.

    It holds no lock, and depends on its arguments alone: a task of a cluster may call it, too.

    Raises:
        ConfigError: the compiler is not installed.
    """
    try:
        from numba import njit  # an extra
    except ImportError:
        raise ConfigError("the channel swing needs a compiler: pip install 'twotower[swing]'") from None
    compiled = njit(nogil=True, cache=True)
    add, select = (cast(Callable[..., None], compiled(function)) for function in (_add_up, _select))

    def nearest(graph: Graph, first: int, last: int, alpha: float, neighbours: int) -> Nearest:
        begin = pointers(graph.room[first:last])
        dense = graph.room[first:last] == len(graph.room)
        slots = Slots(begin, dense, np.full(begin[-1], -1, np.int32), np.zeros(begin[-1]))
        add(graph, alpha, first, last, slots)
        rows = np.empty((last - first, neighbours), np.int32)
        similarity = np.empty((last - first, neighbours))
        counts = np.zeros(last - first, np.int64)
        select(slots, graph.damping, rows, similarity, counts)
        filled = np.arange(neighbours) < counts[:, None]
        return Nearest(np.repeat(np.arange(first, last), counts), rows[filled], similarity[filled])

    return nearest


class Slots(NamedTuple):
    """Where the similarities of a part of the items are added up."""

    begin: Longs
    """(items of the part + 1,) where the slots of each item begin."""
    dense: npt.NDArray[np.bool_]
    """(items of the part,) the item has a slot for every other, else a hash table with open addresses."""
    keys: Ints
    """(slots,) the other item of a slot of a hash table, or -1."""
    sums: Floats
    """(slots,) similarities."""


def _add_up(  # noqa: PLR0912, PLR0915  one loop, from clicks to sums
    graph: Graph, alpha: float, first: int, last: int, slots: Slots
) -> None:
    """Add up the similarities of the items from `first` to before `last` to all others; compiled.

    For each user u: what u and every later user v have in common is gathered by walking the users of u's items, twice,
    to count and to fill. Each v then adds its term to a small matrix of u's items, which is added to the sums of the
    part when u is done. So a similarity is added up by v within u, and by u: in the same order whatever the part.
    """
    user_indptr, item, place = graph.user_indptr, graph.item, graph.place
    item_indptr, user, weight = graph.item_indptr, graph.user, graph.weight
    begin, dense, keys, sums = slots
    scratch = np.empty(graph.most_met, np.int32)
    users = len(user_indptr) - 1
    common = np.zeros(users, np.int32)
    end = np.zeros(users, np.int64)
    met = np.empty(users, np.int32)
    width = 0
    for u in range(users):
        width = max(width, user_indptr[u + 1] - user_indptr[u])
    local = np.zeros((width, width))
    for u in range(users):
        start = user_indptr[u]
        count = user_indptr[u + 1] - start
        # The user's items of the part are low..high-1 of them, because both are in ascending order.
        low = 0
        while low < count and item[start + low] < first:
            low += 1
        high = low
        while high < count and item[start + high] < last:
            high += 1
        if low == high or count < 2:
            continue
        others = 0
        for a in range(start, start + count):
            for e in range(place[a] + 1, item_indptr[item[a] + 1]):
                v = user[e]
                if common[v] == 0:
                    met[others] = v
                    others += 1
                common[v] += 1
        total = 0
        for m in range(others):
            end[met[m]] = total
            total += common[met[m]]
        for a in range(count):
            for e in range(place[start + a] + 1, item_indptr[item[start + a] + 1]):
                v = user[e]
                scratch[end[v]] = a
                end[v] += 1
        for m in range(others):
            v = met[m]
            size = common[v]
            common[v] = 0
            if size < 2:
                continue
            term = weight[u] * weight[v] / (alpha + size)
            shared = scratch[end[v] - size : end[v]]
            before = 0
            while before < size and shared[before] < low:
                before += 1
            # Of two items of the part, the row of the lesser one holds the term.
            p = before
            while p < size and shared[p] < high:
                row = local[shared[p]]
                for q in range(before):
                    row[shared[q]] += term
                for q in range(p + 1, size):
                    row[shared[q]] += term
                p += 1
        for a in range(low, high):
            i = item[start + a] - first
            offset = begin[i]
            mask = begin[i + 1] - offset - 1
            for b in range(count):
                term = local[b, a] if low <= b < a else local[a, b]
                if a == b or term == 0.0:
                    continue
                j = item[start + b]
                slot = j
                if not dense[i]:
                    slot = (j * 2654435761) & mask
                    while keys[offset + slot] != j and keys[offset + slot] != -1:
                        slot = (slot + 1) & mask
                    keys[offset + slot] = j
                sums[offset + slot] += term
        for a in range(low, high):
            for b in range(count):
                local[a, b] = 0.0


def _select(slots: Slots, damping: Floats, rows: Ints, similarity: Floats, counts: Longs) -> None:
    """The greatest damped similarities of each item of a part, best first, ties by row; compiled.

    Args:
        slots: filled by `_add_up`.
        damping: (N,) what a similarity to an item is multiplied by.
        rows: out, (items of the part, K), the neighbours.
        similarity: out, (items of the part, K), to these neighbours.
        counts: out, (items of the part,), number of neighbours.
    """
    begin, dense, keys, sums = slots
    most = rows.shape[1]
    for i in range(len(counts)):
        count = 0
        row, score = rows[i], similarity[i]
        for slot in range(begin[i], begin[i + 1]):
            if sums[slot] == 0.0:
                continue
            j = slot - begin[i] if dense[i] else keys[slot]
            value = sums[slot] * damping[j]
            if count == most and (value < score[most - 1] or (value == score[most - 1] and j > row[most - 1])):
                continue
            count = min(count + 1, most)
            hole = count - 1
            while hole > 0 and (score[hole - 1] < value or (score[hole - 1] == value and row[hole - 1] > j)):
                score[hole], row[hole] = score[hole - 1], row[hole - 1]
                hole -= 1
            score[hole], row[hole] = value, j
        counts[i] = count
