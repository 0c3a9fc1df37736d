"""Why an item is, or is not, on a user's page."""

from dataclasses import dataclass, field, replace

import numpy as np

from twotower.channels.retriever import Candidates, Queries
from twotower.index.protocol import Exclusions
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import cut
from twotower.serve.channels import ask_in_turn
from twotower.serve.filters import passing
from twotower.serve.funnel import Longs, Ranked, RankerScores, good_enough, rank, wanted
from twotower.serve.options import FunnelOptions
from twotower.serve.request import Request, candidates_of, find_items, impressed_rows, queries_of
from twotower.serve.users import ItemId, Recent, UserId

MAX_RANK = 10_000
"""How deep an explanation looks for an item in a channel's list."""


@dataclass(frozen=True)
class Standing:
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
    """The stage in which it ends, or `impressed`, `not_retrieved`, `filtered` or `unknown_item`."""
    why: str
    user_id: UserId | None
    known_user: bool
    """The version has the user."""
    clicks: int
    """Number of the user's clicks that the channels see."""
    filtered: list[str] = field(default_factory=list)
    """What leaves it out: `unavailable`, `clicked`, `impressed`, or the attribute of a filter."""
    channels: dict[str, Standing] = field(default_factory=dict)
    """In the list of each channel, up to the 10,000th rank."""
    fused: Standing = field(default_factory=Standing)
    """Among the candidates that are retrieved."""
    pre_rank: Standing | None = None
    """Among the candidates by the pre-ranker; None without one."""
    rank: Standing | None = None
    """Among those that the pre-ranker keeps, by the ranker; None without one."""
    failed_channels: list[str] = field(default_factory=list)


def explain(
    version: Version, request: Request, recent: Recent, window: range, options: FunnelOptions, *, item_id: ItemId
) -> Explanation:
    """Why an item is, or is not, on a page of `request.k` items: its rank in each channel and stage, and what leaves
    it out.

    There is no exploration and no time limit of channels. An item that is left out is followed as if it were not,
    except that no channel has an unavailable one. The arguments are those of `funnel.recommend`.

    Raises:
        DataError: as `retrieve`.
        Unanswerable: no channel answered.
    """
    queries = queries_of(version, request, recent, window)
    answer = Explanation(
        version.id,
        version.delta_seq,
        item_id,
        "unknown_item",
        f"version {version.id} has no item {cut(str(item_id))}",
        request.user_id,
        request.user_id is not None and version.user_row(request.user_id) >= 0,
        len(queries.clicks.rows),
    )
    row = int(find_items(version, [item_id])[0])
    if row < 0:
        return answer
    filtered = _filters_of(version, request, queries, recent, window, row=row)
    others = queries.exclude.rows
    queries = replace(queries, exclude=Exclusions.of([others[others != row]]))
    retrieved = candidates_of(version, request.channels, queries, wanted(version, request, options))
    chosen = {name: version.channels[name] for name in request.channels or version.channels}
    deep = ask_in_turn(chosen, queries, min(MAX_RANK, len(version.items)))
    ranked = rank(version, queries, retrieved.rows, max(options.pre_rank, request.k), options.cosine)
    places = np.flatnonzero(retrieved.rows == row)
    answer = replace(
        answer,
        filtered=filtered,
        channels={name: _standing(lists, row) for name, lists in deep.lists.items()},
        fused=_standing(retrieved.fused.candidates, row),
        pre_rank=_standing_by(ranked.pre_rank, places),
        rank=_standing_by(ranked.rank, places),
        failed_channels=list(deep.left_out),
    )
    outcome, why = _verdict(answer, ranked, places, request.k, good_enough(version, request, options, ranked))
    return replace(answer, outcome=outcome, why=why)


def _filters_of(
    version: Version, request: Request, queries: Queries, recent: Recent, window: range, *, row: int
) -> list[str]:
    """Everything that leaves an item out of a request."""
    reasons = [
        ("unavailable", version.gone[row]),
        ("clicked", request.exclude != "none" and row in queries.clicks.rows),
        ("impressed", request.exclude == "impressed" and row in impressed_rows(version, recent, window)),
        *((name, not passing(version, name, allowed)[row]) for name, allowed in request.filters.items()),
    ]
    return [name for name, applies in reasons if applies]


def _standing(lists: Candidates, row: int) -> Standing:
    places = np.flatnonzero(lists.rows[0] == row)
    return Standing(int(places[0]) + 1, float(lists.scores[0][places[0]])) if len(places) else Standing()


def _standing_by(scores: RankerScores | None, places: Longs) -> Standing | None:
    """Where a candidate stands by a ranker; None without the ranker."""
    if scores is None:
        return None
    if not len(places) or np.isnan(scores.key[places[0]]):
        return Standing()
    return Standing(int((scores.key > scores.key[places[0]]).sum()) + 1, float(scores.probability[places[0]]))


def _verdict(answer: Explanation, ranked: Ranked, places: Longs, page: int, good: int) -> tuple[str, str]:
    """Where an item ends, and why: `places` (0 or 1) is where it stands among the candidates, `page` the length of the
    page, and `good` how many of the ranker's order are good enough to be shown.
    """
    if answer.filtered:
        return "filtered", f"left out by {', '.join(answer.filtered)}"
    if not len(places):
        ranks = {name: standing.rank for name, standing in answer.channels.items() if standing.rank is not None}
        best = min(ranks, key=lambda name: ranks[name], default=None)
        highest = "no channel has it" if best is None else f"its best place is {ranks[best]} of {best}"
        return "not_retrieved", f"not among the {len(ranked.rows)} candidates: {highest}"
    place = int(np.flatnonzero(ranked.order == places[0])[0]) + 1
    if place <= page:
        return c.IMPRESSED, f"on the page, at position {place}"
    if place > ranked.kept:
        why = f"the pre-ranker has it at place {place} of {len(ranked.rows)}, and {ranked.kept} go on"
        return c.PRE_RANK_REJECTED, why
    by = "the last stage" if ranked.rank is None else "the ranker"
    where = f"{by} has it at place {place} of {ranked.kept}"
    if place > good:
        return c.RANK_REJECTED, f"{where}, and {good} are good enough"
    return c.RANKED_NOT_SHOWN, f"{where}, and the page has room for {page}"
