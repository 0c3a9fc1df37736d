"""The rows for training: clicks, positives with their histories, impressions."""

import logging
from dataclasses import dataclass
from typing import Any

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ibis import _

from twotower.features.bloom import is_held_out
from twotower.samples.known import KnownEvents
from twotower.samples.names import HISTORY_COUNT, ITEM_ROW, LABEL, NO_HISTORY, NO_POSITION, USER_ROW, WEIGHED_BY
from twotower.samples.options import SamplesOptions
from twotower.schema import columns as c
from twotower.schema.errors import DataError

log = logging.getLogger(__name__)

_IN_RANGE = "in_range"


@dataclass(frozen=True)
class LearnedRows:
    """Tables of the engine that samples are made of."""

    clicks: Any
    """All clicks up to the last day: histories."""
    positives: Any
    """The clicks that are learned from."""
    fed: Any
    """Those, and shown items that are weak positives."""
    item_positives: npt.NDArray[np.int64]
    """(items,) positives of each item."""
    held_out: dict[str, int]
    """How many `users` are held out of training, and how many `clicks` of theirs would be positives."""


def learned_rows(known: KnownEvents, options: SamplesOptions) -> LearnedRows:
    """The clicks of known users and items, and those of trained users from the first day on.

    Raises:
        DataError: no positive is left, or a click is there twice.
    """
    clicks = known.engine.keep("clicks", _of_outcome(known, c.CLICKED, WEIGHED_BY if options.weight else 1))
    trained, held_out = None, {"users": 0, "clicks": 0}

    def in_range(rows: Any) -> Any:
        return rows.filter(rows[_IN_RANGE]) if known.days.first else rows

    def learned(rows: Any) -> Any:
        return in_range(rows) if trained is None else in_range(rows).semi_join(trained, USER_ROW)

    if options.held_out_users:
        out = is_held_out(known.users.column(c.USER_ID).combine_chunks(), options.held_out_users)
        rows = pa.array(np.flatnonzero(~out).astype(np.int32))
        trained = known.engine.put("trained_users", pa.table({USER_ROW: rows}))
        held_out = {"users": int(out.sum()), "clicks": int(known.tally(in_range(clicks), USER_ROW)[out].sum())}
        log.info(
            "%(users)d users with %(clicks)d clicks are held out of training, so that the gate of the updates can "
            "judge on them (samples.held_out_users)",
            held_out,
        )

    positives = learned(clicks)
    per_item = known.tally(positives, ITEM_ROW)
    if not per_item.any():
        counts = known.counts
        raise DataError(
            f"no positive in {counts.events} events (outcomes: {counts.outcomes}; dropped: {counts.dropped}): "
            f"retrieval learns from rows whose outcome is {c.CLICKED}"
        )
    _check_distinct(known, clicks)
    if not options.impressed_weight:
        return LearnedRows(clicks, positives, positives, per_item, held_out)
    weak = learned(_of_outcome(known, c.IMPRESSED, options.impressed_weight))
    fed = known.engine.keep("fed", ibis.union(positives, weak.select(*positives.columns)))
    return LearnedRows(clicks, positives, fed, per_item, held_out)


def _of_outcome(known: KnownEvents, outcome: str, weight: str | float) -> Any:
    """The events of one outcome as rows of training; the weight is a column or a number."""
    chosen = known.table.filter(known.table[c.OUTCOME] == outcome)
    number = chosen[weight] if isinstance(weight, str) else ibis.literal(weight)
    return chosen.select(
        *(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.CLICK_TS_MS),
        **{_IN_RANGE: chosen[c.DATE] >= known.days.first, c.WEIGHT: number.cast("float32")},
        **{name: chosen[name] for name in known.context},
    )


def _check_distinct(known: KnownEvents, clicks: Any) -> None:
    """Refuse a click that is there twice: the usual mistake is a file that was copied or written again."""
    repeated = clicks.group_by([USER_ROW, ITEM_ROW, c.EVENT_SEQ]).aggregate(rows=_.count()).filter(_.rows > 1)
    [found] = known.engine.fetch(repeated.aggregate(clicks=_.count(), least=_[c.EVENT_SEQ].min())).to_pylist()
    if found["clicks"]:
        raise DataError(
            f"events: {found['clicks']} clicks are there more than once, by user, item and {c.EVENT_SEQ}, such as "
            f"{c.EVENT_SEQ} = {found['least']}: is a file there twice?"
        )


def with_history(known: KnownEvents, rows: Any, clicks: Any) -> Any:
    """Rows with the number of the user's clicks strictly before the request.

    Requests and clicks stand in one stream of time; a RANGE window that ends a millisecond earlier counts the clicks.
    """
    if not known.timed:
        return rows.mutate(**{HISTORY_COUNT: NO_HISTORY})
    requests = rows.mutate(at=_[c.REQUEST_TS_MS], is_click=ibis.literal(0, "int8"))
    earlier = clicks.mutate(at=_[c.CLICK_TS_MS], is_click=ibis.literal(1, "int8"))
    window = ibis.range_window(preceding=(None, 1), group_by=USER_ROW, order_by="at")
    counted = ibis.union(requests, earlier).mutate(**{HISTORY_COUNT: _.is_click.sum().over(window).fill_null(0)})
    return counted.filter(_.is_click == 0)


def impressions_of(known: KnownEvents, clicks: Any) -> Any:
    """What was shown from the first day on, clicked or not, with the number of the user's clicks before."""
    table = known.table
    chosen = table.filter(table[c.OUTCOME].isin([c.IMPRESSED, c.CLICKED]) & (table[c.DATE] >= known.days.first))
    position = chosen[c.POSITION].cast("int32") if c.POSITION in chosen.columns else ibis.null("int32")
    shown = chosen.select(
        *(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.CLICK_TS_MS),
        **{
            LABEL: (chosen[c.OUTCOME] == c.CLICKED).cast("int8"),
            c.POSITION: position.fill_null(NO_POSITION).cast("int32"),
        },
        **{name: chosen[name] for name in known.context},
    )
    unlabelled = {LABEL: ibis.literal(1, "int8"), c.POSITION: ibis.literal(NO_POSITION, "int32")}
    return with_history(known, shown, clicks.mutate(**unlabelled).select(*shown.columns))
