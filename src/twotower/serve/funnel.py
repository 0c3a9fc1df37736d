"""The funnel of a request: retrieve, pre-rank, rank, a page, and the record of what became of every candidate.

n candidates of the request, in the order of the fused list.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Queries
from twotower.features.fitted import Items
from twotower.index.protocol import Exclusions
from twotower.logs import Event
from twotower.logs.events import REQUEST, Request
from twotower.publish.version import PRE_RANK, RANK, Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError, cut
from twotower.serve.channels import Ask, ask_in_turn
from twotower.serve.filters import passing
from twotower.serve.request import Asked, Found, find, find_items, find_user, impressed_window, left_out, queries_of
from twotower.serve.users import ItemId, Recent, UserId

Ints = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float32]

STAGES: Final = (c.PRE_RANK_REJECTED, c.RANK_REJECTED, c.RANKED_NOT_SHOWN, c.IMPRESSED)
"""Where a candidate ends in a request; a click comes later."""
PRE_RANKED_OUT, RANKED_OUT, NOT_SHOWN, SHOWN = range(4)

_LEAST = 1e-7
"""A probability is at least so far from 0 and 1 where its log-odds are taken."""
MOST_RANKS = 10_000
"""How deep an explanation looks for an item in a channel's list."""


@dataclass(frozen=True)
class Sizes:
    """How many items go on after each stage of a request."""

    retrieve: int = 2000
    """Candidates of the fused list."""
    pre_rank: int = 200
    """Of them the pre-ranker's best go on to the ranker."""
    rank: int = 50
    """Of these the ranker's best are good enough to be shown; the others are its tail."""
    explore_share: float = 0.1
    """Of requests, whose last place goes to a candidate drawn evenly from those that have no place."""
    logged: int = 20
    """Items of each other outcome that a request's record has beside those shown."""
    cosine: float = 4.0
    """What the two towers' cosine counts in the order of the rankers; see `rank`."""

    def candidates(self, version: Version) -> int:
        """How many candidates are retrieved: without a pre-ranker no more than go on."""
        return self.retrieve if PRE_RANK in version.rankers else min(self.retrieve, self.pre_rank)


@dataclass(frozen=True)
class Shown:
    """One item of a page."""

    item_id: ItemId
    position: int
    """From 1."""
    score: float | None
    """The ranker's probability of a click at the first position; without rankers that of the fused list."""
    channels: list[str]
    explored: bool


@dataclass(frozen=True)
class Page:
    """The answer to a request for recommendations."""

    request_id: str
    version: str
    delta_seq: int
    items: list[Shown]
    counts: dict[str, int]
    """Candidates retrieved, and how many of them ended in each stage."""
    failed_channels: list[str]


@dataclass(frozen=True)
class Judged:
    """The candidates of a request by one ranker."""

    probability: Reals
    """(n,) of a click at the first position; NaN where the ranker did not see the candidate."""
    key: Reals
    """(n,) what it orders by, NaN likewise."""


@dataclass(frozen=True)
class Ranked:
    """The candidates of a request after both rankers."""

    rows: Ints
    """(n,) catalogue rows, in the order of the fused list."""
    order: Ints
    """(n,) places in `rows`, best first: what the pre-ranker kept in the ranker's order, then the others in its own."""
    kept: int
    """How many the pre-ranker kept."""
    pre_rank: Judged | None
    """None without a pre-ranker."""
    rank: Judged | None
    """None without a ranker."""

    @property
    def scores(self) -> Reals | None:
        """(n,) probabilities of the last ranker that there is."""
        last = self.rank or self.pre_rank
        return None if last is None else last.probability


@dataclass(frozen=True)
class Served:
    """A page and what goes into the log."""

    page: Page
    record: Event | None
    """None for someone without a user id, whose events nobody could join."""


def recommend(
    version: Version,
    asked: Asked,
    recent: Recent,
    now_ms: int,
    impressed_window_ms: int,
    sizes: Sizes,
    request_id: str,
    ask: Ask = ask_in_turn,
) -> Served:
    """A page for a user: retrieve, pre-rank, rank, explore a little.

    What is drawn by chance depends on the request's id alone.

    Args:
        version: the snapshot that the request holds.
        asked: the request; `k` is the length of the page.
        recent: what the user did since the version was made.
        now_ms: milliseconds since 1970.
        impressed_window_ms: how long an impression is left out.
        sizes: of the stages.
        request_id: names the request.
        ask: how the channels are asked.

    Raises:
        DataError: as `retrieve`.
        Unanswerable: no channel answered.
    """
    queries = queries_of(version, asked, recent, impressed_window(now_ms, impressed_window_ms))
    found = find(version, asked.channels, queries, max(sizes.candidates(version), asked.k), ask)
    ranked = rank(version, queries, found.rows, max(sizes.pre_rank, asked.k), sizes.cosine)
    rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest()))
    page = ranked.order[: asked.k]
    explored, propensity = None, 0.0
    others = ranked.order[asked.k :]
    if asked.k > 1 and len(others) and rng.random() < sizes.explore_share:
        explored, propensity = int(rng.choice(others)), sizes.explore_share / len(others)
        page = np.append(page[:-1], explored)
        ranked = _with_score(version, queries, ranked, explored)

    ended = np.full(len(ranked.rows), PRE_RANKED_OUT)
    tail = max(sizes.rank, asked.k) if RANK in version.rankers else ranked.kept
    ended[ranked.order[: ranked.kept]] = RANKED_OUT
    ended[ranked.order[:tail]] = NOT_SHOWN
    ended[page] = SHOWN
    counts = np.bincount(ended, minlength=len(STAGES)).tolist()
    scores = _rounded(found, ranked, page)
    ids = version.items.at(ranked.rows[page])
    answer = Page(
        request_id,
        version.id,
        version.delta_seq,
        [
            Shown(ids[i], i + 1, scores[i], found.fused.channels_of(0, at), at == explored)
            for i, at in enumerate(page.tolist())
        ],
        {"retrieved": len(ended), **dict(zip(STAGES, counts, strict=True))},
        list(found.left_out),
    )
    if asked.user_id is None:
        return Served(answer, None)
    logged = [page]
    probability = np.ones(len(ended))
    for stage in (NOT_SHOWN, RANKED_OUT, PRE_RANKED_OUT):
        others = np.flatnonzero(ended == stage)
        if len(others):
            logged.append(rng.permutation(others)[: sizes.logged])
            probability[others] = len(logged[-1]) / len(others)
    drawn = {} if explored is None else {explored: propensity}
    said = _said(version, asked, found, ranked, ended, np.concatenate(logged), len(page), probability, drawn)
    said = replace(said, delta_seq=version.delta_seq, counts=answer.counts, failed_channels=answer.failed_channels)
    return Served(answer, Event(f"{REQUEST}/{request_id}", REQUEST, asked.user_id, now_ms, request_id, said.body()))


def page_of(record: Event) -> Page:
    """The page that a request's record tells of: what a request that was sent again gets.

    Raises:
        DataError: the record is none of this server's.
    """
    said: Any = record.content
    try:
        columns = zip(said.items, said.positions, said.scores, said.channels, said.propensities, strict=True)
        items = [
            Shown(item, position, score, list(channels), propensity is not None)
            for item, position, score, channels, propensity in columns
            if position is not None
        ]
        return Page(
            str(record.request_id),
            said.version,
            said.delta_seq,
            items,
            dict(said.counts),
            list(said.failed_channels),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"the log's record of request {record.request_id} is no page: {error!r}") from None


def rank(version: Version, queries: Queries, rows: Ints, kept: int, cosine: float) -> Ranked:
    """Candidates of one user (n,) through the pre-ranker, and its `kept` best through the ranker; ties by place.

    A ranker has learned from what was shown, which is alike, and is a stranger to the rest; the two towers have learned
    to tell an item from all others. So candidates are ordered by the ranker's log-odds plus `cosine` times the towers'
    cosine, while their score stays the ranker's own, calibrated probability.

    Args:
        version: the snapshot.
        queries: one user.
        rows: catalogue rows of the candidates.
        kept: how many go on to the ranker.
        cosine: at least 0; 0 = the rankers alone.
    """
    judges = [name for name in (PRE_RANK, RANK) if name in version.rankers]
    near = np.zeros(len(rows), np.float32)
    if judges and cosine:
        near = np.float32(cosine) * version.two_tower.cosines(queries, rows)
    everyone = np.arange(len(rows))
    pre_rank = _judged(version, PRE_RANK, queries, rows, near, everyone) if PRE_RANK in judges else None
    order = everyone if pre_rank is None else np.argsort(-pre_rank.key, kind="stable")
    kept = min(kept, len(rows))
    if RANK not in judges:
        return Ranked(rows, order, kept, pre_rank, None)
    judged = _judged(version, RANK, queries, rows, near, order[:kept])
    order = np.concatenate([order[:kept][np.argsort(-judged.key[order[:kept]], kind="stable")], order[kept:]])
    return Ranked(rows, order, kept, pre_rank, judged)


def _judged(version: Version, name: str, queries: Queries, rows: Ints, near: Reals, places: Ints) -> Judged:
    """What a ranker says of the candidates at some places."""
    probability, key = (np.full(len(rows), np.nan, np.float32) for _ in range(2))
    probability[places] = found = version.rankers[name].score(queries.features, queries.clicks, rows[places])
    inner = np.clip(found.astype(np.float64), _LEAST, 1 - _LEAST)
    key[places] = np.log(inner) - np.log1p(-inner) + near[places]
    return Judged(probability, key)


def _with_score(version: Version, queries: Queries, ranked: Ranked, place: int) -> Ranked:
    """The same with the ranker's score of one more candidate; the order stays."""
    if ranked.rank is None or np.isfinite(ranked.rank.probability[place]):
        return ranked
    probability = ranked.rank.probability.copy()
    probability[[place]] = version.rankers[RANK].score(queries.features, queries.clicks, ranked.rows[[place]])
    return replace(ranked, rank=Judged(probability, ranked.rank.key))


def _said(
    version: Version,
    asked: Asked,
    found: Found,
    ranked: Ranked,
    ended: Ints,
    logged: Ints,
    shown: int,
    probability: npt.NDArray[np.float64],
    drawn: Mapping[int, float],
) -> Request:
    """What a request's record says: the page, then the sampled others, with all that the request knew."""
    clicks, last = found.queries.clicks.rows, _longest_history(version)
    history = clicks[max(0, len(clicks) - last) :]
    return Request(
        items=version.items.at(ranked.rows[logged]),
        outcomes=[STAGES[stage] for stage in ended[logged].tolist()],
        positions=[*range(1, shown + 1), *([None] * (len(logged) - shown))],
        scores=_rounded(found, ranked, logged),
        channels=[found.fused.channels_of(0, at) for at in logged.tolist()],
        probabilities=[round(one, 6) for one in probability[logged].tolist()],
        propensities=[drawn.get(at) for at in logged.tolist()],
        context=dict(asked.context),
        features=dict(asked.features),
        history=version.items.at(history.astype(np.int64)),
        version=version.id,
    )


def _rounded(found: Found, ranked: Ranked, places: Ints) -> list[float | None]:
    """The scores of candidates by the last stage that there is; None where it did not see one."""
    scores = found.fused.candidates.scores[0] if ranked.scores is None else ranked.scores
    return [round(score, 6) if np.isfinite(score) else None for score in scores[places].tolist()]


def _longest_history(version: Version) -> int:
    """The most clicks that a feature of the user reads."""
    return max((one.last for one in version.features.user if isinstance(one, Items) and one.from_clicks), default=0)


@dataclass(frozen=True)
class Place:
    """Where an item stands in a list."""

    rank: int | None = None
    """From 1; None where it is not in the list."""
    score: float | None = None


@dataclass(frozen=True)
class Explanation:
    """Why an item is, or is not, on a user's page."""

    version: str
    delta_seq: int
    item_id: ItemId
    outcome: str
    """`impressed` or the stage in which it ends; `not_retrieved`, `filtered` or `unknown_item`."""
    why: str
    user_id: UserId | None
    known_user: bool
    """The version has the user."""
    clicks: int
    """How many of the user's clicks the channels see."""
    filtered: list[str] = field(default_factory=list)
    """What leaves it out: `unavailable`, `clicked`, `impressed`, or the attribute of a filter."""
    channels: dict[str, Place] = field(default_factory=dict)
    """In the list of each channel, up to the 10,000th place."""
    fused: Place = field(default_factory=Place)
    """Among the candidates that are retrieved."""
    pre_rank: Place | None = None
    """Among them by the pre-ranker; None without one."""
    rank: Place | None = None
    """Among what the pre-ranker keeps by the ranker; None without one."""
    failed_channels: list[str] = field(default_factory=list)


def explain(
    version: Version,
    asked: Asked,
    item_id: ItemId,
    recent: Recent,
    now_ms: int,
    impressed_window_ms: int,
    sizes: Sizes,
) -> Explanation:
    """Why, or why not, an item for a user: its place in each channel and stage, and what leaves it out.

    Exploration is left aside, and channels have as much time as they take. An item that is left out is followed as if
    it were not, except that no channel has an unavailable one.

    Args:
        version: the snapshot that the request holds.
        asked: the request; `k` is the length of the page.
        item_id: the item.
        recent: what the user did since the version was made.
        now_ms: milliseconds since 1970.
        impressed_window_ms: how long an impression is left out.
        sizes: of the stages.

    Raises:
        DataError: as `retrieve`.
        Unanswerable: no channel answered.
    """
    window = impressed_window(now_ms, impressed_window_ms)
    queries = queries_of(version, asked, recent, window)
    told = Explanation(
        version.id, version.delta_seq, item_id, "unknown_item", f"version {version.id} has no item {cut(str(item_id))}",
        asked.user_id, find_user(version, asked.user_id) >= 0, len(queries.clicks.rows),
    )  # fmt: skip
    row = int(find_items(version, [item_id])[0])
    if row < 0:
        return told
    told = replace(told, filtered=_filters_of(version, asked, queries, recent, row, window))
    others = queries.exclude.rows
    queries = replace(queries, exclude=Exclusions.of([others[others != row]]))
    names = tuple(asked.channels) or tuple(version.channels)
    found = find(version, names, queries, max(sizes.candidates(version), asked.k))
    deep = ask_in_turn({name: version.channels[name] for name in names}, queries, min(MOST_RANKS, len(version.items)))
    ranked = rank(version, queries, found.rows, max(sizes.pre_rank, asked.k), sizes.cosine)
    at = np.flatnonzero(found.rows == row)
    told = replace(
        told,
        channels={name: _place(lists.rows[0], lists.scores[0], row) for name, lists in deep.lists.items()},
        fused=_place(found.rows, found.fused.candidates.scores[0], row),
        pre_rank=None if ranked.pre_rank is None else _place_by(ranked.pre_rank, at),
        rank=None if ranked.rank is None else _place_by(ranked.rank, at),
        failed_channels=list(deep.left_out),
    )
    return replace(told, **asdict(_verdict(told, ranked, at, asked.k, sizes)))


def _filters_of(version: Version, asked: Asked, queries: Queries, recent: Recent, row: int, window: range) -> list[str]:
    """Everything that leaves an item out of a request."""
    names = []
    if version.gone[row]:
        names.append("unavailable")
    if asked.exclude != "none" and row in queries.clicks.rows:
        names.append("clicked")
    shown = left_out(version, replace(asked, filters={}), np.zeros(0, np.int32), recent, window)
    if row in shown:
        names.append("impressed")
    return names + [name for name, wanted in asked.filters.items() if not passing(version, name, wanted)[row]]


def _place(rows: Ints, scores: Reals, row: int) -> Place:
    at = np.flatnonzero(rows == row)
    return Place(int(at[0]) + 1, float(scores[at[0]])) if len(at) else Place()


def _place_by(judged: Judged, at: Ints) -> Place:
    """The place of a candidate by a ranker."""
    if not len(at) or np.isnan(judged.key[at[0]]):
        return Place()
    return Place(int((judged.key > judged.key[at[0]]).sum()) + 1, float(judged.probability[at[0]]))


@dataclass(frozen=True)
class _Verdict:
    outcome: str
    why: str


def _verdict(told: Explanation, ranked: Ranked, at: Ints, page: int, sizes: Sizes) -> _Verdict:
    """Where an item ends, and why there."""
    if told.filtered:
        return _Verdict("filtered", f"left out by {', '.join(told.filtered)}")
    if not len(at):
        placed = {name: place.rank for name, place in told.channels.items() if place.rank is not None}
        best = min(placed, key=lambda name: placed[name], default=None)
        most = "no channel has it" if best is None else f"its best place is {placed[best]} of {best}"
        return _Verdict("not_retrieved", f"not among the {len(ranked.rows)} candidates: {most}")
    place = int(np.flatnonzero(ranked.order == at[0])[0]) + 1
    if place <= page:
        return _Verdict(c.IMPRESSED, f"on the page, at position {place}")
    if place > ranked.kept:
        return _Verdict(
            c.PRE_RANK_REJECTED,
            f"the pre-ranker has it at place {place} of {len(ranked.rows)}, and {ranked.kept} go on",
        )
    good = max(sizes.rank, page) if ranked.rank is not None else ranked.kept
    by = "the ranker" if ranked.rank is not None else "the last stage"
    where = f"{by} has it at place {place} of {ranked.kept}"
    if place > good:
        return _Verdict(c.RANK_REJECTED, f"{where}, and {good} are good enough")
    return _Verdict(c.RANKED_NOT_SHOWN, f"{where}, and the page has room for {page}")
