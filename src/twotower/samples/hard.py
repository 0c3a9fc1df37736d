"""Hard negatives: what the pre-ranker or the ranker rejected in the request of a positive.

A request is a user and its time: times rise strictly within a user.
"""

import logging
from dataclasses import dataclass
from typing import Any

import ibis
from ibis import _

from twotower.samples.known import KnownEvents
from twotower.samples.names import HARD, ITEM_ROW, USER_ROW
from twotower.samples.options import SamplesOptions
from twotower.samples.sampling import hashed
from twotower.schema import columns as c

log = logging.getLogger(__name__)

_HARD_ITEM = "hard_item"
_USED = "used_as"
_HARD_NEGATIVE = "hard_negative"
_REQUEST = [USER_ROW, c.REQUEST_TS_MS]


@dataclass(frozen=True)
class Rejected:
    """Rejected rows of the engine, each with what it is used as."""

    table: Any
    used: dict[str, dict[str, int]]
    """By outcome, the number of rows by what they are used as."""

    @property
    def sources(self) -> list[str]:
        """The outcomes that are hard negatives."""
        return list(self.used)

    def _of(self, source: str) -> Any:
        return self.table.filter((_[c.OUTCOME] == source) & (_[_USED] == _HARD_NEGATIVE))

    def count(self, positives: Any) -> Any:
        """Positives with the number of their hard negatives of each source."""
        for source in self.sources:
            name = f"{HARD}{source}"
            per_request = self._of(source).group_by(_REQUEST).aggregate(**{name: _.count().cast("int32")})
            joined = positives.left_join(per_request, _REQUEST)
            positives = joined.select(*positives.columns, **{name: per_request[name].fill_null(0).cast("int32")})
        return positives

    def of(self, positives: Any, source: str) -> Any:
        """The item rows of the hard negatives of one source, in the order of the positives by time."""
        hard = self._of(source).select(*_REQUEST, **{_HARD_ITEM: _[ITEM_ROW]})
        joined = positives.select(*_REQUEST, c.EVENT_SEQ, ITEM_ROW).inner_join(hard, _REQUEST)
        ordered = joined.order_by([c.REQUEST_TS_MS, c.EVENT_SEQ, USER_ROW, ITEM_ROW, _HARD_ITEM])
        return ordered.select(**{ITEM_ROW: _[_HARD_ITEM]})


def hard_sources(known: KnownEvents, impressed: bool) -> list[str]:
    """The outcomes of the log that are hard negatives; without time no row has a request to be rejected in."""
    if impressed:
        log.warning(
            "what was shown and not clicked is used as a hard negative, as "
            "samples.negatives.impressed_as_negatives_for_experiments says: it was good enough to be shown, and a "
            "model that learns from it retrieves worse"
        )
    wanted = [c.PRE_RANK_REJECTED, c.RANK_REJECTED, *([c.IMPRESSED] if impressed else [])]
    return [outcome for outcome in wanted if known.timed and outcome in known.counts.outcomes]


def find_rejected(known: KnownEvents, positives: Any, options: SamplesOptions) -> Rejected:
    """Decide for every rejected row whether it is a hard negative.

    An item that its user was shown or clicked anywhere in the days is not: it was good enough there. Of each source of
    a request, at most `hard_most` are kept, chosen by a hash.
    """
    sources = hard_sources(known, options.negatives.impressed_as_negatives_for_experiments)
    if not sources:
        return Rejected(None, {})
    joined = _with_reason(known, positives, sources).mutate(order=hashed(options.seed))
    again = ibis.window(group_by=[*_REQUEST, c.OUTCOME, "reason", ITEM_ROW], order_by=[c.EVENT_SEQ, _.order])
    joined = joined.mutate(repeated=ibis.row_number().over(again))
    place = ibis.window(
        group_by=[*_REQUEST, c.OUTCOME, "reason"], order_by=[_.repeated > 0, _.order, ITEM_ROW, c.EVENT_SEQ]
    )
    used_as = ibis.cases(
        (_.reason != "", _.reason),
        (_.repeated > 0, "repeated"),
        (_.place >= options.negatives.hard_most, "beyond_hard_most"),
        else_=_HARD_NEGATIVE,
    )
    decided = joined.mutate(place=ibis.row_number().over(place))
    decided = decided.select(USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.OUTCOME, **{_USED: used_as})
    table = known.engine.keep("rejected", decided)
    counted = known.engine.fetch(table.group_by([c.OUTCOME, _USED]).aggregate(rows=_.count())).to_pylist()
    used: dict[str, dict[str, int]] = {source: {} for source in sources}
    for row in sorted(counted, key=lambda row: row[_USED]):
        used[row[c.OUTCOME]][row[_USED]] = row["rows"]
    return Rejected(table, used)


def _with_reason(known: KnownEvents, positives: Any, sources: list[str]) -> Any:
    """Rejected rows with the `reason` why one is no hard negative, empty where there is none."""
    events = known.table
    rejected = events.filter(events[c.OUTCOME].isin(sources) & (events[c.DATE] >= known.days.first))
    rejected = rejected.select(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.OUTCOME)
    shown = events.filter(events[c.OUTCOME].isin([c.IMPRESSED, c.CLICKED]))
    # Shown items are a source only where they are forced in; then those that were clicked elsewhere are left out.
    pairs = shown.group_by([USER_ROW, ITEM_ROW]).aggregate(
        was_clicked=(_[c.OUTCOME] == c.CLICKED).cast("int32").max(), was_seen=ibis.literal(1)
    )
    requests = positives.select(*_REQUEST).distinct().mutate(has_positive=ibis.literal(1))
    joined = rejected.left_join(pairs, [USER_ROW, ITEM_ROW]).left_join(requests, _REQUEST)
    joined = joined.select(*rejected.columns, "was_clicked", "was_seen", "has_positive")
    good = ibis.ifelse(_[c.OUTCOME] == c.IMPRESSED, _.was_clicked == 1, _.was_seen.notnull()).fill_null(False)
    reason = ibis.cases((good, "shown_or_clicked"), (_.has_positive.isnull(), "no_positive_in_its_request"), else_="")
    return joined.mutate(reason=reason)
