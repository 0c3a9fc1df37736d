"""The events of known users and items, checked and counted: what every table of the samples is made of."""

import datetime
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
from ibis import _

from twotower.features.options import Features
from twotower.samples.engine import Engine
from twotower.samples.events import NO_TIME, Days, stored_events
from twotower.samples.names import CONTEXT, ITEM_ROW, USER_ROW, WEIGHED_BY
from twotower.samples.options import SamplesOptions
from twotower.schema import columns as c
from twotower.schema.clock import BEYOND_NOW
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import (
    MAX_TRAINING_WEIGHT,
    check_entities,
    check_milliseconds,
    check_outcomes,
    read_parquet,
)

log = logging.getLogger(__name__)

_LAST_POSITION = 2**31 - 1


@dataclass(frozen=True)
class EventCounts:
    """What the chosen days of a log hold."""

    events: int
    outcomes: dict[str, int]
    dropped: dict[str, int]
    """Events left out, by reason."""
    dropped_of: dict[str, dict[str, int]]
    """The same by outcome."""
    watermark_ms: int | None
    """The latest time of any event that is not beyond the clock; None without time."""


@dataclass(frozen=True)
class KnownEvents:
    """The events of known users and items in an engine, with the dense rows of both."""

    engine: Engine
    table: Any
    users: pa.Table
    items: pa.Table
    counts: EventCounts
    days: Days
    context: Mapping[str, pa.DataType]
    """The type in the files of each context column, by its name here."""

    @property
    def timed(self) -> bool:
        """The events have a time."""
        return self.counts.watermark_ms is not None

    def tally(self, rows: Any, row: str, copies: str | None = None) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """How many rows each user or item has, by dense row; a row counts as often as the column `copies` says."""
        size = self.users.num_rows if row == USER_ROW else self.items.num_rows
        counted = self.engine.fetch(rows.group_by(row).aggregate(rows=_[copies].sum() if copies else _.count()))
        tally = np.zeros(size, np.int64)
        tally[counted.column(row).to_numpy()] = counted.column("rows").to_numpy()
        return tally


def read_known(
    engine: Engine,
    workspace: Path,
    days: Days,
    features: Features,
    options: SamplesOptions,
    *,
    impressions: bool,
    now: int,
) -> KnownEvents:
    """Read users, items and the events of some days of a workspace; with `impressions`, positions too, for rankers.

    Events later than `now` (milliseconds since 1970) are left out and counted.

    Raises:
        DataError: a table is missing, empty or not of its schema.
        ConfigError: a configured column does not exist; options that take a time or impressions where there are none.
    """
    missing = ": import or simulate a workspace first"
    users = check_entities(read_parquet(workspace / "users.parquet", missing), c.USER_ID, "users.parquet")
    items = check_entities(read_parquet(workspace / "items.parquet", missing), c.ITEM_ID, "items.parquet")
    if items.num_rows < 2:
        raise DataError("items.parquet has one item: there is nothing to choose from")
    stored = stored_events(
        days.files, users, items, context=tuple(features.context), weight=options.weight, positions=impressions
    )
    events = engine.read_days(days.files, stored)
    user_rows = engine.put("user_rows", _numbered(users, c.USER_ID, USER_ROW))
    item_rows = engine.put("item_rows", _numbered(items, c.ITEM_ID, ITEM_ROW))
    joined = events.left_join(user_rows, c.USER_ID).left_join(item_rows, c.ITEM_ID)
    counts = _count(engine, joined, _wrong(events.columns, options.weight, impressions), now)
    _check_times(counts, options, impressions, by_day=bool(days.first or options.last_day))
    kept = events.filter(~_beyond(now)) if counts.dropped.get(BEYOND_NOW) else events
    kept = kept.inner_join(user_rows, c.USER_ID).inner_join(item_rows, c.ITEM_ID)
    context = {f"{CONTEXT}{name}": stored.schema.field(f"{CONTEXT}{name}").type for name in features.context}
    return KnownEvents(engine, kept, users, items, counts, days, context)


def _numbered(entities: pa.Table, id_column: str, row: str) -> pa.Table:
    """Ids in ascending order with their dense row."""
    rows = pa.array(np.arange(entities.num_rows, dtype=np.int32))
    return pa.table({id_column: entities.column(id_column), row: rows})


def _beyond(now: int) -> Any:
    """An event has a time that is later than now."""
    return (_[c.REQUEST_TS_MS] > now).fill_null(False) | (_[c.CLICK_TS_MS] > now).fill_null(False)


def _wrong(columns: tuple[str, ...], weight: str | None, positions: bool) -> dict[str, Any]:
    """Conditions that no event may fulfil, by what an error says of them."""
    request, click, clicked = _[c.REQUEST_TS_MS], _[c.CLICK_TS_MS], _[c.OUTCOME] == c.CLICKED
    wrong = {
        f"clicked rows have no {c.EVENT_SEQ}": clicked & _[c.EVENT_SEQ].isnull(),
        f"clicked rows have no {c.CLICK_TS_MS}": clicked & request.notnull() & click.isnull(),
        f"rows have a {c.CLICK_TS_MS} before their {c.REQUEST_TS_MS}": click < request,
        f"rows have a {c.CLICK_TS_MS} and no {c.REQUEST_TS_MS}": click.notnull() & request.isnull(),
    }
    if c.POSITION in columns:
        rejected = _[c.OUTCOME].isin([c.PRE_RANK_REJECTED, c.RANK_REJECTED])
        said = f"rejected rows have a {c.POSITION}, so they were shown: a shown item is no negative of retrieval"
        wrong[said] = rejected & _[c.POSITION].notnull()
        if positions:
            place = _[c.POSITION].cast("float64")
            usable = (place >= 0) & (place <= _LAST_POSITION) & (place % 1 == 0)
            said = f"rows have a {c.POSITION} that is no whole number from 1 to {_LAST_POSITION}"
            wrong[said] = _[c.POSITION].notnull() & ~usable.fill_null(False)
    if weight:
        number = _[WEIGHED_BY].cast("float64")
        usable = (number >= 0) & (number <= MAX_TRAINING_WEIGHT)
        said = f"clicked rows have no {weight} that is a finite number from 0 to {MAX_TRAINING_WEIGHT:g}"
        wrong[said] = clicked & ~usable.fill_null(False)
    return wrong


def _count(engine: Engine, joined: Any, wrong: Mapping[str, Any], now: int) -> EventCounts:
    """Check times, outcomes, weights and positions of all events, and count what will be left out.

    Raises:
        DataError: something is not as it must be, with how many rows are so.
    """
    request, click = _[c.REQUEST_TS_MS], _[c.CLICK_TS_MS]
    left_out = ibis.cases(
        (_beyond(now), BEYOND_NOW),
        (_[c.USER_ID].isnull() | _[c.ITEM_ID].isnull(), "null_id"),
        (_[USER_ROW].isnull(), "unknown_user"),
        (_[ITEM_ROW].isnull(), "unknown_item"),
        else_="",
    )
    groups = joined.mutate(left_out=left_out, no_time=request.isnull()).group_by([c.OUTCOME, "left_out", "no_time"])
    counted = groups.aggregate(
        rows=_.count(),
        first_request=request.min(),
        last_request=request.max(),
        first_click=click.min(),
        last_click=click.max(),
        **{said: (condition & ~_beyond(now)).cast("int64").sum() for said, condition in wrong.items()},
    )
    rows = engine.fetch(counted).to_pylist()
    _check_groups(rows, now)
    for said in wrong:
        if count := sum(int(row[said] or 0) for row in rows):
            raise DataError(f"events: {count} {said}: mend them or leave them out")
    return _event_counts(rows)


def _event_counts(rows: list[dict[str, Any]]) -> EventCounts:
    outcomes, dropped = Counter[str](), Counter[str]()
    dropped_of: dict[str, Counter[str]] = {}
    for row in rows:
        outcomes[row[c.OUTCOME]] += row["rows"]
        if reason := row["left_out"]:
            dropped[reason] += row["rows"]
            dropped_of.setdefault(row[c.OUTCOME], Counter())[reason] += row["rows"]
    kept = [row for row in rows if row["left_out"] != BEYOND_NOW]
    times = [row[name] for row in kept for name in ("last_request", "last_click") if row[name] is not None]
    return EventCounts(
        outcomes.total(),
        {name: outcomes[name] for name in c.OUTCOMES if name in outcomes},
        {reason: dropped[reason] for reason in sorted(dropped)},
        {outcome: dict(reasons) for outcome, reasons in dropped_of.items()},
        max(times, default=None),
    )


def _check_groups(rows: list[dict[str, Any]], now: int) -> None:
    """Refuse no events, unknown outcomes, impossible times, and events of which only some have a time."""
    if not rows:
        raise DataError("events/ has no rows in the chosen days")
    check_outcomes(pa.array([row[c.OUTCOME] for row in rows], pa.string()), "events, column outcome")
    for name, kind in ((c.REQUEST_TS_MS, "request"), (c.CLICK_TS_MS, "click")):
        ends = [row[f"{end}_{kind}"] for row in rows for end in ("first", "last")]
        check_milliseconds(pa.array(ends, pa.int64()).drop_null(), f"events, column {name}")
    total = sum(row["rows"] for row in rows)
    if beyond := sum(row["rows"] for row in rows if row["left_out"] == BEYOND_NOW):
        moment = f"{datetime.datetime.fromtimestamp(now / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
        if beyond == total:
            raise DataError(f"events: all {total} rows are later than now, {moment}: mend their times, or the clock")
        log.warning("events: %d of %d rows are later than now, %s, and left out", beyond, total, moment)
    without = sum(row["rows"] for row in rows if row["no_time"])
    if without not in (0, total):
        raise DataError(f"events: {without} of {total} rows have no {c.REQUEST_TS_MS}: give all a time, or none")


def _check_times(counts: EventCounts, options: SamplesOptions, impressions: bool, *, by_day: bool) -> None:
    """Refuse days, weak positives and rankers for events without time, and rankers for a log without impressions."""
    timed = counts.watermark_ms is not None
    if not timed and by_day:
        raise ConfigError(NO_TIME)
    if not timed and options.impressed_weight:
        raise ConfigError(
            f"samples.impressed_weight = {options.impressed_weight:g}, but the events have no time: without one, a "
            "row's history is drawn from the clicks, and a shown item is none"
        )
    if impressions and (c.IMPRESSED not in counts.outcomes or not timed):
        seen = f"outcomes: {counts.outcomes}" if timed else "the events have no time"
        raise ConfigError(
            f"models.rankers learn from what was shown and not clicked, rows of outcome {c.IMPRESSED} with a time, and "
            f"this log has none ({seen}): leave models.rankers out"
        )
