"""Which events are kept for judging, and what is left to learn from.

Everything from the held-out period leaves the training events, not only its positives: an impression after the last
click tells of that click. Held-out positives of a user and an item that training knows are the test; the others are
kept apart with their reason. A pair that the user already clicked in training stays in the test: retrieval decides
whether clicked items are left out.
"""

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.tables import HELD_OUT_NOT_POSITIVE, Dropped, Tables, calendar_days, codes, number, replaced
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.options import calendar_day
from twotower.schema.tables import holdout as holdout_schema

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class HoldoutRule:
    """What `--holdout` says.

    - `time`: the events at or after a quantile of time over all events; those of one time stay together.
    - `since`: the events of a day and of all later ones.
    - `leave-one-out`: the last positive of each user, and what the user did after it; of several at one time a hash
      chooses.
    - `pause`: what users did after their first pause of some days between two positives, of users with at least
      `BEFORE_PAUSE` positives before it and `AFTER_PAUSE` after it.
    - `random`: a share of each user's positives, drawn evenly: only for events without time.
    """

    kind: str
    value: float = 0.0
    """A quantile, a number of days, or a share."""
    day: datetime.date | None = None
    """Of `since`."""


BEFORE_PAUSE: Final = 5
AFTER_PAUSE: Final = 10


@dataclass(frozen=True)
class Split:
    """Events to learn from and positives to be judged by."""

    events: pa.Table
    """Training events, numbered anew."""
    holdout: pa.Table
    """`user_id`, `item_id`, `ts_ms`: held-out positives of users and items that have a training positive."""
    holdout_cold: pa.Table
    """The other held-out positives, with `reason`."""
    train_positives: pa.Table
    """`user_id`, `item_id`, `ts_ms` of every training positive."""
    dropped: Mapping[str, int]
    """How many events are in none of the tables above, by reason."""
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """One of these events, by reason."""
    instants: pa.ChunkedArray | None = None
    """Of the training events, as `Tables.instants`."""
    holdout_impressions: pa.Table | None = None
    """Events of the held-out period that were shown, clicked or not, for rankers; None where none was shown in vain."""


def parse_day(text: str, option: str) -> datetime.date:
    """Read a day written YYYY-MM-DD.

    Raises:
        ConfigError: another form, or no such day.
    """
    try:
        return datetime.date.fromisoformat(calendar_day(text))
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no day: write it as YYYY-MM-DD") from None


def parse_holdout(text: str) -> HoldoutRule:
    """Read `--holdout`.

    Raises:
        ConfigError: an unknown kind, a quantile outside 0 to 1, or no day.

    >>> parse_holdout("time:0.9").value, parse_holdout("since:2022-05-03").day
    (0.9, datetime.date(2022, 5, 3))
    """
    kind, _, value = text.partition(":")
    if text == "leave-one-out":
        return HoldoutRule("leave-one-out")
    if kind == "since":
        return HoldoutRule("since", day=parse_day(value, "--holdout since"))
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if kind in ("time", "random"):
        if 0 < number < 1:
            return HoldoutRule(kind, number)
        raise ConfigError(f"--holdout {text}: give a share between 0 and 1, such as time:0.9 or random:0.1")
    if kind == "pause":
        if 0 < number < np.inf:
            return HoldoutRule(kind, number)
        raise ConfigError(f"--holdout {text}: give a number of days above 0, such as pause:3")
    raise ConfigError(
        f"--holdout {text}: give time:Q, since:YYYY-MM-DD, leave-one-out, pause:DAYS or, without time, random:SHARE"
    )


def split(tables: Tables, rule: HoldoutRule) -> Split:
    """Hold events out by a rule.

    Raises:
        ConfigError: the events have no time.
        DataError: nothing is held out, or no positive is left to learn from.
    """
    held = _HELD[rule.kind](tables, rule)
    positive, held_out = _positive(tables), tables.events.filter(pa.array(held))
    dropped = Dropped()
    dropped.drop(tables.events, pa.array(held & ~positive), HELD_OUT_NOT_POSITIVE)
    divided = _divide(tables, held, _as_holdout(tables.events.filter(pa.array(held & positive))), dropped)
    if not pc.any(pc.equal(held_out[c.OUTCOME], c.IMPRESSED)).as_py():
        return divided
    impressions = held_out.filter(pc.is_in(held_out[c.OUTCOME], value_set=pa.array([c.IMPRESSED, c.CLICKED])))
    return replace(divided, holdout_impressions=impressions.drop_columns([c.EVENT_SEQ]))


def split_given(tables: Tables) -> Split:
    """Hold out the positives of `tables.test`, which is given.

    Events that the test names are no training events: those of the same user and item, and, where both have times,
    of the same time.

    Raises:
        DataError: no positive is left to learn from.
    """
    assert tables.test is not None
    keys = {c.USER_ID: c.USER_ID, c.ITEM_ID: c.ITEM_ID}
    if not (tables.test[c.TS_MS].null_count or tables.events[c.REQUEST_TS_MS].null_count):
        keys[c.REQUEST_TS_MS] = c.TS_MS
    events = replaced(tables.events, c.REQUEST_TS_MS, _instants(tables)).select([*keys, c.EVENT_SEQ])
    named = events.join(tables.test, list(keys), list(keys.values()), "left semi")
    held = np.zeros(tables.events.num_rows, np.bool_)
    held[named[c.EVENT_SEQ].to_numpy()] = True
    dropped = Dropped()
    dropped.drop(tables.events, pa.array(held), "in_test")
    return _divide(tables, held, tables.test, dropped)


def _instants(tables: Tables) -> pa.ChunkedArray:
    """(N,) when events happened by the source's clock, where equal times are still equal."""
    return tables.events[c.REQUEST_TS_MS] if tables.instants is None else tables.instants


def _positive(tables: Tables) -> Mask:
    positive: Mask = pc.equal(tables.events[c.OUTCOME], c.CLICKED).to_numpy()
    return positive


def _times(tables: Tables, option: str) -> npt.NDArray[np.int64]:
    """(N,) times in milliseconds, by the source's clock."""
    if tables.events[c.REQUEST_TS_MS].null_count:
        raise ConfigError(f"{option}: {tables.source} has no time; give the held-out pairs as a file with --test")
    ts_ms: npt.NDArray[np.int64] = _instants(tables).to_numpy()
    return ts_ms


def _at_or_after_quantile(tables: Tables, rule: HoldoutRule) -> Mask:
    ts_ms = _times(tables, f"--holdout time:{rule.value}")
    # the time of an event, the least with at least this share of the events at or before it
    threshold = np.quantile(ts_ms, rule.value, method="inverted_cdf")
    return ts_ms >= threshold


def _since(tables: Tables, rule: HoldoutRule) -> Mask:
    _times(tables, f"--holdout since:{rule.day}")
    days = calendar_days(_instants(tables), tables.days)
    held: Mask = days >= np.datetime64(rule.day, "D")
    if not held.any() or held.all():
        raise DataError(f"--holdout since:{rule.day}: the events are of {days.min()} to {days.max()}")
    return held


def _from_last_positive(tables: Tables, _: HoldoutRule) -> Mask:
    _times(tables, "--holdout leave-one-out")
    user, positive = codes(tables.events[c.USER_ID]), _positive(tables)
    place = np.arange(len(user))
    last = np.full(user.max() + 1, len(user))
    # events are in the order of time, those of one time in that of a hash: the last assignment stays
    last[user[positive]] = place[positive]
    return place >= last[user]


def _after_pause(tables: Tables, rule: HoldoutRule) -> Mask:
    ts_ms = _times(tables, f"--holdout pause:{rule.value:g}")
    user = codes(tables.events[c.USER_ID])
    positive = np.flatnonzero(_positive(tables))
    order = positive[np.argsort(user[positive], kind="stable")]  # by user, then time
    counts = np.bincount(user[order], minlength=int(user.max()) + 1)
    start = np.cumsum(counts) - counts
    paused = np.diff(ts_ms[order]) >= rule.value * DAY_MS
    ends = 1 + np.flatnonzero(paused & (np.diff(user[order]) == 0))  # the first positive after each pause
    who, first = np.unique(user[order[ends]], return_index=True)
    before = ends[first] - start[who]
    chosen = (before >= BEFORE_PAUSE) & (counts[who] - before >= AFTER_PAUSE)
    since = np.full(len(counts), np.iinfo(np.int64).max)
    since[who[chosen]] = ts_ms[order[ends[first[chosen]]]]
    return ts_ms >= since[user]


def _drawn(tables: Tables, rule: HoldoutRule) -> Mask:
    """A share of each user's positives, rounded down, always the same of the same events."""
    if tables.events[c.REQUEST_TS_MS].null_count < tables.events.num_rows:
        raise ConfigError(
            f"--holdout random:{rule.value}: {tables.source} has a time, and a random hold-out would be judged by what "
            "came before its training; use time:Q, since:YYYY-MM-DD, leave-one-out or pause:DAYS"
        )
    user = codes(tables.events[c.USER_ID])
    positive = np.flatnonzero(_positive(tables))
    order = positive[np.lexsort((np.random.default_rng(0).random(len(positive)), user[positive]))]
    counts = np.bincount(user, np.isin(np.arange(len(user)), positive)).astype(np.int64)
    place = np.arange(len(order)) - (np.cumsum(counts) - counts)[user[order]]
    held: Mask = np.zeros(len(user), np.bool_)
    held[order[place < np.floor(counts[user[order]] * rule.value)]] = True
    return held


_HELD: Final[Mapping[str, Callable[[Tables, HoldoutRule], Mask]]] = {
    "time": _at_or_after_quantile,
    "since": _since,
    "leave-one-out": _from_last_positive,
    "pause": _after_pause,
    "random": _drawn,
}


def _as_holdout(events: pa.Table) -> pa.Table:
    schema = holdout_schema(events.schema.field(c.USER_ID).type, events.schema.field(c.ITEM_ID).type)
    return pa.table([events[c.USER_ID], events[c.ITEM_ID], events[c.REQUEST_TS_MS]], schema=schema)


def _divide(tables: Tables, held: Mask, held_out: pa.Table, dropped: Dropped) -> Split:
    """Part the held-out positives by whether training has a positive of their user and of their item."""
    kept = pa.array(~held)
    events = tables.events.filter(kept)
    positives = _as_holdout(events.filter(pc.equal(events[c.OUTCOME], c.CLICKED)))
    if not positives.num_rows:
        raise DataError(f"the hold-out leaves no positive to learn from, and {held_out.num_rows} held out")
    if not held_out.num_rows:
        raise DataError(f"the hold-out holds no positive; {positives.num_rows} are left to learn from")
    held_out = held_out.sort_by([(name, "ascending") for name in (c.USER_ID, c.TS_MS, c.ITEM_ID)])
    known_user, known_item = (
        pc.is_in(held_out[name], value_set=pc.unique(positives[name])) for name in (c.USER_ID, c.ITEM_ID)
    )
    warm = pc.and_(known_user, known_item)
    reason = pc.if_else(known_user, c.NEW_ITEM, c.NEW_USER)
    return Split(
        events=number(events),
        holdout=held_out.filter(warm),
        holdout_cold=held_out.append_column(c.REASON, reason).filter(pc.invert(warm)),
        train_positives=positives,
        dropped=dict(dropped.counts),
        examples=dropped.examples,
        instants=None if tables.instants is None else tables.instants.filter(kept),
    )
