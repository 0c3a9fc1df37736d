"""The funnel of a request: retrieve, pre-rank, rank, a page, and the record of the outcome of every candidate.

n candidates of the request, in the order of the fused list. A *place* is an index into them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Queries
from twotower.features.fitted import Items
from twotower.logs import Event
from twotower.logs.events import REQUEST, LoggedRequest
from twotower.publish.version import PRE_RANK, RANK, Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.serve.channels import Ask, ask_in_turn
from twotower.serve.options import FunnelOptions
from twotower.serve.request import Request, Retrieved, candidates_of, queries_of
from twotower.serve.users import ItemId, Recent

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

STAGES: Final = (c.PRE_RANK_REJECTED, c.RANK_REJECTED, c.RANKED_NOT_SHOWN, c.IMPRESSED)
"""The stage in which a candidate ends; a click comes later."""
PRE_RANKED_OUT, RANKED_OUT, NOT_SHOWN, SHOWN = range(4)
MIN_PROBABILITY: Final = 1e-7
"""A probability is at least this far from 0 and 1 where its log-odds are taken."""


@dataclass(frozen=True)
class PageItem:
    """One item of a page."""

    item_id: ItemId
    position: int
    """From 1."""
    score: float | None
    """The ranker's probability of a click at the first position; without rankers the score of the fused list."""
    channels: list[str]
    explored: bool


@dataclass(frozen=True)
class Page:
    """The answer to a request for recommendations."""

    request_id: str
    version: str
    delta_seq: int
    items: list[PageItem]
    counts: dict[str, int]
    """Candidates retrieved, and how many of them ended in each stage."""
    failed_channels: list[str]


@dataclass(frozen=True)
class RankerScores:
    """The candidates of a request by one ranker; NaN where the ranker did not see a candidate."""

    probability: Floats
    """(n,) of a click at the first position."""
    key: Floats
    """(n,) what it orders by."""


@dataclass(frozen=True)
class Ranked:
    """The candidates of a request after both rankers."""

    rows: Longs
    """(n,) catalogue rows, in the order of the fused list."""
    order: Longs
    """(n,) places, best first: what the pre-ranker kept in the ranker's order, then the others in the pre-ranker's."""
    kept: int
    """How many the pre-ranker kept."""
    pre_rank: RankerScores | None
    """None without a pre-ranker."""
    rank: RankerScores | None
    """None without a ranker."""


@dataclass(frozen=True)
class Served:
    """A page and what goes into the log."""

    page: Page
    record: Event | None
    """None for someone without a user id, whose events nobody could join."""


def recommend(
    version: Version,
    request: Request,
    recent: Recent,
    window: range,
    options: FunnelOptions,
    *,
    now_ms: int,
    request_id: str,
    ask: Ask = ask_in_turn,
) -> Served:
    """A page of `request.k` items for a user: retrieve, pre-rank, rank, explore a little.

    What is drawn by chance depends on the request's id alone. The other arguments are those of `retrieve`.

    Raises:
        DataError: as `retrieve`.
        Unanswerable: no channel answered.
    """
    queries = queries_of(version, request, recent, window)
    retrieved = candidates_of(version, request.channels, queries, wanted(version, request, options), ask)
    rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest()))
    chosen = _choose(version, request, retrieved, options, rng)
    counts = np.bincount(chosen.ended, minlength=len(STAGES)).tolist()
    page = Page(
        request_id,
        version.id,
        version.delta_seq,
        _items(version, chosen),
        {"retrieved": len(chosen.ended), **dict(zip(STAGES, counts, strict=True))},
        list(retrieved.left_out),
    )
    if request.user_id is None:
        return Served(page, None)
    body = _record(version, request, page, chosen, _sampled(chosen, options.logged, rng)).body()
    return Served(page, Event(f"{REQUEST}/{request_id}", REQUEST, request.user_id, now_ms, request_id, body))


@dataclass(frozen=True)
class _Chosen:
    """The candidates of a request, and which of them are shown."""

    retrieved: Retrieved
    ranked: Ranked
    page: Longs
    """Places of the items of the page."""
    ended: Longs
    """(n,) the stage in which each candidate ends, as an index of `STAGES`."""
    propensities: dict[int, float]
    """By place, the probability with which exploration drew an item of the page."""


def _choose(
    version: Version, request: Request, retrieved: Retrieved, options: FunnelOptions, rng: np.random.Generator
) -> _Chosen:
    """Rank the candidates, and fill the page; its last place may go to a candidate that is drawn."""
    queries = retrieved.queries
    ranked = rank(version, queries, retrieved.rows, max(options.pre_rank, request.k), options.cosine)
    page, others = ranked.order[: request.k], ranked.order[request.k :]
    propensities: dict[int, float] = {}
    if request.k > 1 and len(others) and rng.random() < options.explore_share:
        explored = int(rng.choice(others))
        propensities[explored] = options.explore_share / len(others)
        page = np.append(page[:-1], explored)
        ranked = _with_score(version, queries, ranked, explored)
    ended = np.full(len(ranked.rows), PRE_RANKED_OUT)
    ended[ranked.order[: ranked.kept]] = RANKED_OUT
    ended[ranked.order[: good_enough(version, request, options, ranked)]] = NOT_SHOWN
    ended[page] = SHOWN
    return _Chosen(retrieved, ranked, page, ended, propensities)


def _record(
    version: Version, request: Request, page: Page, chosen: _Chosen, sampled: dict[int, float]
) -> LoggedRequest:
    """The record of a request: what was shown, and the sampled other candidates with their probability."""
    logged = np.array(list(sampled), np.int64)
    shown = len(chosen.page)
    return LoggedRequest(
        **_columns(version, chosen, logged),
        outcomes=[STAGES[stage] for stage in chosen.ended[logged].tolist()],
        positions=[*range(1, shown + 1), *([None] * (len(logged) - shown))],
        probabilities=[round(probability, 6) for probability in sampled.values()],
        propensities=[chosen.propensities.get(place) for place in sampled],
        context=dict(request.context),
        features=dict(request.features),
        history=_history(version, chosen.retrieved.queries),
        version=version.id,
        delta_seq=version.delta_seq,
        counts=page.counts,
        failed_channels=page.failed_channels,
    )


def wanted(version: Version, request: Request, options: FunnelOptions) -> int:
    """How many candidates are retrieved: without a pre-ranker only as many as go on to the ranker."""
    retrieved = options.retrieve if PRE_RANK in version.rankers else min(options.retrieve, options.pre_rank)
    return max(retrieved, request.k)


def good_enough(version: Version, request: Request, options: FunnelOptions, ranked: Ranked) -> int:
    """How many candidates are good enough to be shown: the ranker's best, or all that go on where there is none."""
    return max(options.rank, request.k) if RANK in version.rankers else ranked.kept


def page_of(record: Event) -> Page:
    """The page in a request's record: the answer to a request that was sent again.

    Raises:
        DataError: the record was not written by a server.
    """
    logged: Any = record.content
    try:
        columns = zip(logged.items, logged.positions, logged.scores, logged.channels, logged.propensities, strict=True)
        items = [
            PageItem(item, position, score, list(channels), propensity is not None)
            for item, position, score, channels, propensity in columns
            if position is not None
        ]
        counts, failed = dict(logged.counts), list(logged.failed_channels)
        return Page(str(record.request_id), logged.version, logged.delta_seq, items, counts, failed)
    except (AttributeError, ValueError, TypeError) as error:
        raise DataError(f"the log's record of request {record.request_id} is no page: {error!r}") from None


def rank(version: Version, queries: Queries, rows: Longs, kept: int, cosine: float) -> Ranked:
    """Candidates of one user (n,) through the pre-ranker, and its `kept` best through the ranker; ties by place.

    A ranker has learned from the items that were shown, which are alike, and knows little of others; the two towers
    have learned to tell an item from all others. So candidates are ordered by the ranker's log-odds plus `cosine` times
    the towers' cosine (0 = by the rankers alone), while their score stays the ranker's calibrated probability.
    """
    near = np.zeros(len(rows), np.float32)
    if version.rankers and cosine:
        near = np.float32(cosine) * version.two_tower.cosines(queries, rows)
    order, kept = np.arange(len(rows)), min(kept, len(rows))
    pre_ranked = _scores(version, PRE_RANK, queries, rows, near, order)
    if pre_ranked is not None:
        order = np.argsort(-pre_ranked.key, kind="stable")
    ranked = _scores(version, RANK, queries, rows, near, order[:kept])
    if ranked is not None:
        best = order[:kept][np.argsort(-ranked.key[order[:kept]], kind="stable")]
        order = np.concatenate([best, order[kept:]])
    return Ranked(rows, order, kept, pre_ranked, ranked)


def _scores(
    version: Version, name: str, queries: Queries, rows: Longs, near: Floats, places: Longs
) -> RankerScores | None:
    """The candidates at some places by a ranker; None where the version does not have it."""
    if name not in version.rankers:
        return None
    probability, key = (np.full(len(rows), np.nan, np.float32) for _ in range(2))
    probability[places] = version.rankers[name].score(queries.features, queries.clicks, rows[places])
    inner = np.clip(probability[places].astype(np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    key[places] = np.log(inner) - np.log1p(-inner) + near[places]
    return RankerScores(probability, key)


def _with_score(version: Version, queries: Queries, ranked: Ranked, place: int) -> Ranked:
    """The same with the ranker's score of one more candidate; the order stays."""
    if ranked.rank is None or np.isfinite(ranked.rank.probability[place]):
        return ranked
    probability = ranked.rank.probability.copy()
    probability[[place]] = version.rankers[RANK].score(queries.features, queries.clicks, ranked.rows[[place]])
    return replace(ranked, rank=replace(ranked.rank, probability=probability))


def _columns(version: Version, chosen: _Chosen, places: Longs) -> dict[str, list[Any]]:
    """Id, score and channels of some candidates; the score is None where the last ranker did not see one."""
    fused, scored = chosen.retrieved.fused, chosen.ranked.rank or chosen.ranked.pre_rank
    scores = fused.candidates.scores[0] if scored is None else scored.probability
    return {
        "items": version.items.at(chosen.ranked.rows[places]),
        "scores": [round(score, 6) if np.isfinite(score) else None for score in scores[places].tolist()],
        "channels": [fused.channels_of(0, place) for place in places.tolist()],
    }


def _items(version: Version, chosen: _Chosen) -> list[PageItem]:
    shown = zip(*_columns(version, chosen, chosen.page).values(), chosen.page.tolist(), strict=True)
    return [
        PageItem(item_id, position, score, channels, place in chosen.propensities)
        for position, (item_id, score, channels, place) in enumerate(shown, 1)
    ]


def _sampled(chosen: _Chosen, count: int, rng: np.random.Generator) -> dict[int, float]:
    """Places of the page, then of at most `count` candidates of each other stage, with the chance of being drawn."""
    sampled = dict.fromkeys(chosen.page.tolist(), 1.0)
    for stage in (NOT_SHOWN, RANKED_OUT, PRE_RANKED_OUT):
        others = np.flatnonzero(chosen.ended == stage)
        drawn = rng.permutation(others)[:count]
        sampled |= dict.fromkeys(drawn.tolist(), len(drawn) / max(1, len(others)))
    return sampled


def _history(version: Version, queries: Queries) -> Sequence[ItemId]:
    """The latest clicks, as many as a feature of the user reads."""
    reads = [feature.last for feature in version.features.user if isinstance(feature, Items) and feature.from_clicks]
    clicks = queries.clicks.rows
    return version.items.at(clicks[max(0, len(clicks) - max(reads, default=0)) :].astype(np.int64))
