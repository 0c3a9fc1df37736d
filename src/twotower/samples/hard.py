"""Hard negatives: what the pre-ranker or the ranker rejected in the request of a positive.

A request is a user and its time: times rise strictly within a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ibis
from ibis import _

from twotower.samples.engine import Engine
from twotower.samples.sampling import ITEM_ROW, USER_ROW, hashed
from twotower.schema import columns as c

HARD = "hard."
"""Before the name of a source: how many hard negatives of it each positive has, and the file with them."""
HARD_ITEM = "hard_item"
USED = "used_as"
HARD_NEGATIVE = "hard_negative"
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
        return self.table.filter((_[c.OUTCOME] == source) & (_[USED] == HARD_NEGATIVE))

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
        hard = self._of(source).select(*_REQUEST, **{HARD_ITEM: _[ITEM_ROW]})
        joined = positives.select(*_REQUEST, c.EVENT_SEQ, ITEM_ROW).inner_join(hard, _REQUEST)
        ordered = joined.order_by([c.REQUEST_TS_MS, c.EVENT_SEQ, USER_ROW, ITEM_ROW, HARD_ITEM])
        return ordered.select(**{ITEM_ROW: _[HARD_ITEM]})


def find_rejected(
    engine: Engine, known: Any, positives: Any, sources: Sequence[str], most: int, first_day: str | None, seed: int
) -> Rejected:
    """Decide for every rejected row whether it is a hard negative.

    An item that its user was shown or clicked anywhere in the days is none: it was good enough there.

    Args:
        engine: what runs the job.
        known: events of known users and items, with their rows.
        positives: the training rows.
        sources: the outcomes that are hard negatives.
        most: hard negatives of a request that are kept of each source, chosen by a hash.
        first_day: day from which on rows count.
        seed: of the hash.
    """
    if not sources:
        return Rejected(None, {})
    rejected = known.filter(known[c.OUTCOME].isin(list(sources)) & (known[c.DATE] >= (first_day or "")))
    rejected = rejected.select(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.OUTCOME)
    shown = known.filter(known[c.OUTCOME].isin([c.IMPRESSED, c.CLICKED]))
    # Shown items are a source only where they are forced in; then those that were clicked elsewhere are left out.
    pairs = shown.group_by([USER_ROW, ITEM_ROW]).aggregate(
        was_clicked=(_[c.OUTCOME] == c.CLICKED).cast("int32").max(), was_seen=ibis.literal(1)
    )
    requests = positives.select(*_REQUEST).distinct().mutate(has_positive=ibis.literal(1))
    joined = rejected.left_join(pairs, [USER_ROW, ITEM_ROW]).left_join(requests, _REQUEST)
    joined = joined.select(*rejected.columns, "was_clicked", "was_seen", "has_positive")
    good = ibis.ifelse(_[c.OUTCOME] == c.IMPRESSED, _.was_clicked == 1, _.was_seen.notnull()).fill_null(False)
    joined = joined.mutate(
        order=hashed(seed),
        reason=ibis.cases(
            (good, "shown_or_clicked"), (_.has_positive.isnull(), "no_positive_in_its_request"), else_=""
        ),
    )
    again = ibis.window(group_by=[*_REQUEST, c.OUTCOME, "reason", ITEM_ROW], order_by=[c.EVENT_SEQ, _.order])
    joined = joined.mutate(repeated=ibis.row_number().over(again))
    place = ibis.window(
        group_by=[*_REQUEST, c.OUTCOME, "reason"], order_by=[_.repeated > 0, _.order, ITEM_ROW, c.EVENT_SEQ]
    )
    decided = joined.mutate(place=ibis.row_number().over(place)).select(
        USER_ROW,
        ITEM_ROW,
        c.REQUEST_TS_MS,
        c.OUTCOME,
        **{
            USED: ibis.cases(
                (_.reason != "", _.reason),
                (_.repeated > 0, "repeated"),
                (_.place >= most, "beyond_hard_most"),
                else_=HARD_NEGATIVE,
            )
        },
    )
    table = engine.keep("rejected", decided)
    counted = engine.fetch(table.group_by([c.OUTCOME, USED]).aggregate(rows=_.count())).to_pylist()
    used: dict[str, dict[str, int]] = {source: {} for source in sources}
    for row in sorted(counted, key=lambda row: row[USED]):
        used[row[c.OUTCOME]][row[USED]] = row["rows"]
    return Rejected(table, used)
