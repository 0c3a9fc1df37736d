"""The batch job that turns a workspace into samples, written with Ibis so that every engine gives the same rows.

Every order has a tie-break and nothing is drawn, so the result depends neither on the order of rows and files nor on
the engine. History is stored as a count: how many of the user's clicks came before the request.
"""

import datetime
import functools
import logging
import operator
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _

from twotower.features.bloom import is_held_out
from twotower.features.columns import to_arrow
from twotower.features.feature_set import FeatureSet, encode_table, extended, fit, save
from twotower.features.fitted import Fitted
from twotower.features.options import Features, Numeric, Vector
from twotower.samples.columns_file import write_columns, write_table
from twotower.samples.engine import Engine, open_engine
from twotower.samples.events import (
    CONTEXT,
    WEIGHED_BY,
    chosen,
    first_of,
    last_of,
    partitions,
    stored_events,
)
from twotower.samples.hard import HARD, find_rejected
from twotower.samples.options import ColdOptions, EngineOptions, HotOptions
from twotower.samples.sampling import (
    COPIES,
    FACTOR,
    ITEM_ROW,
    PRIME,
    USER_ROW,
    by_decile,
    expected_copies,
    union,
    with_copies,
)
from twotower.schema import columns as c
from twotower.schema.clock import BEYOND_NOW, ClockMs, day_of, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import MANIFEST, folder_listing, whole_folder, write_json
from twotower.schema.tables import check_entities, check_milliseconds, check_outcomes

log = logging.getLogger(__name__)

FORMAT = 3
HISTORY_COUNT = "history"
CLICKS = "clicks"
POSITIVES = "positives"
LABEL = "is_clicked"
IMPRESSIONS = "impressions.arrow"
NO_POSITION = 0
"""Position of an item of which the log does not say where it was shown."""
NO_HISTORY = -1
"""History count of data without time: the trainer draws histories anew each epoch."""

FEATURE = "feature."
"""Before the name of an encoded column of users or items."""

DAY_MS = 86_400_000
_FITTED_NUMBERS = 1_000_000
"""About so many positives are enough for the mean or the quantiles of a number."""
_IN_RANGE = "in_range"
_LAST_TIMES = ("last_request", "last_click")
_LAST_POSITION = 2**31 - 1
_LARGEST_WEIGHT = 1e9
"""Eleven days in milliseconds; a larger one would leave nothing of the others in float32."""


@dataclass(frozen=True)
class SamplesReport:
    """What `twotower samples` prints."""

    path: str
    events: int
    outcomes: dict[str, int]
    positives: int
    users: int
    """With a positive."""
    items: int
    """With a positive."""
    rows_fed: int
    """Training rows of an epoch: positives and weak ones, after down- and over-sampling."""
    with_hard: float
    """Share of the positives whose request has hard negatives."""
    used: dict[str, dict[str, int]]
    """By outcome, what its rows are used as, or why they are not."""
    deciles: dict[str, list[int]]
    """Training rows by tenth of the items, the least clicked first: `before` and `after` sampling."""
    dropped: dict[str, int]
    """Events left out, by reason: `beyond_now`, `null_id`, `unknown_user`, `unknown_item`."""
    watermark_ms: int | None
    """The latest time of any event read that is not beyond the clock; None without time."""
    last_day: str | None
    """The last day of requests read, `YYYY-MM-DD`; None without time. Its clicks may be of the next one."""


def build_samples(  # noqa: PLR0915  one job, top to bottom
    workspace: Path,
    out: Path,
    features: Features,
    dimension: int,
    *,
    first_day: str | None = None,
    last_day: str | None = None,
    days: int | None = None,
    weight: str | None = None,
    impressed_weight: float = 0.0,
    hot: HotOptions = HotOptions(),  # noqa: B008  frozen
    cold: ColdOptions = ColdOptions(),  # noqa: B008
    held_out_users: float = 0.0,
    hard_most: int = 20,
    impressed_as_negatives: bool = False,
    impressions: bool = False,
    seed: int = 0,
    room: float = 0.1,
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    previous: FeatureSet | None = None,
    evict_after_days: int | None = None,
    clock_ms: ClockMs = now_ms,
    recorded: Mapping[str, Any] | None = None,
) -> SamplesReport:
    """Build the samples of a range of days into the folder `out`, whole or not at all.

    Args:
        workspace: a folder with `users.parquet`, `items.parquet` and `events/`.
        out: the samples folder, replaced if it exists.
        features: the configured features.
        dimension: width of the id embeddings.
        first_day: first day of positives, `YYYY-MM-DD`; None = the first of the log. Histories reach further back.
        last_day: last day of positives and histories.
        days: positives of so many days up to the last, in place of `first_day`; None = no such limit.
        weight: column of events that weighs a positive; None = all weigh 1.
        impressed_weight: weight of what was shown and not clicked as a weak positive; 0 = it is none.
        hot: down-sampling of hot items.
        cold: over-sampling of cold items.
        held_out_users: share of users, by a hash of their ids, who have no positives; their clicks are histories.
        hard_most: hard negatives of a request that are kept of each source.
        impressed_as_negatives: what was shown and not clicked is a source of hard negatives, for experiments.
        impressions: write what was shown, clicked or not, too: what rankers learn from.
        seed: of the rows that are dropped, repeated or kept by chance.
        room: spare rows of the id tables, as a share of the known ids.
        engine: what runs the job, with its memory and threads; every engine gives the same files.
        previous: fitted features to go on with, of which only the ids change; None = all are fitted anew.
        evict_after_days: with `previous`, ids without a positive in so many days before the last are unknown.
        clock_ms: milliseconds since 1970. Events that are later are left out and counted, so that the same events give
            more rows by a later clock.
        recorded: the settings that these arguments are of, for the manifest; JSON values.

    Raises:
        DataError: a table is missing, empty or not of its schema; no positive is left.
        ConfigError: a configured column or day does not exist; impressions are wanted of a log that has none.
    """
    users = check_entities(_read(workspace / "users.parquet"), c.USER_ID, "users.parquet")
    items = check_entities(_read(workspace / "items.parquet"), c.ITEM_ID, "items.parquet")
    if items.num_rows < 2:
        raise DataError("items.parquet has one item: there is nothing to choose from")
    context, now = tuple(features.context), clock_ms()
    days_of_log = partitions(workspace / "events")
    if days is not None:
        first_day = first_of(days_of_log, first_day, last_day, days, day_of(now))
    files = chosen(days_of_log, first_day, last_day)
    with whole_folder(out) as folder:
        with open_engine(engine, folder / "spill") as opened:
            stored = stored_events(files, users, items, context, weight, impressions)
            types = {f"{CONTEXT}{name}": stored.schema.field(f"{CONTEXT}{name}").type for name in context}
            events = opened.read_days(files, stored)
            user_rows = opened.put("user_rows", _numbered(users, c.USER_ID, USER_ROW))
            item_rows = opened.put("item_rows", _numbered(items, c.ITEM_ID, ITEM_ROW))
            counts = _count(opened, events, user_rows, item_rows, weight, impressions, now)
            timed = _check_timed(counts, bool(first_day or last_day), impressed_weight)
            if impressions:
                _check_impressions(counts, timed)
            known = events.filter(~_beyond(now)) if counts.dropped.get(BEYOND_NOW) else events
            known = known.inner_join(user_rows, c.USER_ID).inner_join(item_rows, c.ITEM_ID)
            clicks = opened.keep("clicks", _rows(known, c.CLICKED, context, weight, first_day))
            in_range = clicks.filter(clicks[_IN_RANGE]) if first_day else clicks
            if held_out_users:
                in_range = in_range.semi_join(_trained_rows(opened, users, held_out_users), USER_ROW)
            per_user = _tally(opened, clicks, USER_ROW, users.num_rows)
            per_item = _tally(opened, in_range, ITEM_ROW, items.num_rows)
            clicked = int(per_item.sum())
            if not clicked:
                raise DataError(
                    f"no positive in {counts.events} events (outcomes: {counts.outcomes}; dropped: {counts.dropped}): "
                    f"retrieval learns from rows whose outcome is {c.CLICKED}"
                )
            _check_distinct(opened, clicks)
            fed = in_range
            if impressed_weight:
                shown = _rows(known, c.IMPRESSED, context, impressed_weight, first_day)
                if held_out_users:
                    shown = shown.semi_join(_trained_rows(opened, users, held_out_users), USER_ROW)
                fed = opened.keep("fed", union(in_range, shown.filter(shown[_IN_RANGE])))
            lately = fed
            if previous is not None and evict_after_days is not None and timed:
                lately = fed.filter(fed[c.REQUEST_TS_MS] > (counts.watermark_ms or 0) - evict_after_days * DAY_MS)
            trained = [
                pa.array(np.flatnonzero(_tally(opened, lately, row, size)))
                for row, size in ((USER_ROW, users.num_rows), (ITEM_ROW, items.num_rows))
            ]
            if previous is None:
                fitted = fit(
                    features,
                    users.take(trained[0]),
                    items.take(trained[1]),
                    _values(opened, fed, features, clicked, types),
                    dimension,
                    room,
                )
            else:
                ids = {
                    c.USER_ID: users.column(c.USER_ID).combine_chunks().take(trained[0]),
                    c.ITEM_ID: items.column(c.ITEM_ID).combine_chunks().take(trained[1]),
                }
                fitted = extended(previous, ids, room)
            save(fitted, folder)
            write_table(folder / "items.arrow", _encoded(fitted.item, items, c.ITEM_ID, {POSITIVES: per_item}))
            write_table(folder / "users.arrow", _encoded(fitted.user_columns, users, c.USER_ID, {CLICKS: per_user}))
            positives = _with_history(fed, clicks) if timed else fed.mutate(**{HISTORY_COUNT: NO_HISTORY})
            positives = with_copies(opened, positives, expected_copies(per_item, hot, cold), seed)
            sources = _hard_sources(counts, timed, impressed_as_negatives)
            rejected = find_rejected(opened, known, fed, sources, hard_most, first_day, seed)
            positives = opened.keep("positives", rejected.count(positives))
            per_item_fed = _tally(opened, positives, ITEM_ROW, items.num_rows, COPIES)
            _write_positives(opened, folder / "positives.arrow", positives, fitted.context, types, timed, sources)
            for source in sources:
                rows = opened.batches(rejected.of(positives, source))
                write_columns(folder / f"{HARD}{source}.arrow", pa.schema([(ITEM_ROW, pa.int32())]), rows)
            _write_clicks(opened, folder / "clicks.arrow", clicks, timed)
            if impressions:
                shown = _shown(known, clicks, context, first_day or "")
                _write_impressions(opened, folder / IMPRESSIONS, shown, fitted.context, types)
            weak = opened.fetch(fed.aggregate(rows=_.count())).column("rows")[0].as_py() - clicked
            with_hard = _share_with_hard(opened, positives, sources)
        shutil.rmtree(folder / "spill", ignore_errors=True)
        report = SamplesReport(
            str(out),
            counts.events,
            counts.outcomes,
            clicked,
            len(trained[0]),
            len(trained[1]),
            int(per_item_fed.sum()),
            with_hard,
            _used(counts, timed, clicked, weak, rejected.used, impressions),
            {"before": by_decile(per_item, per_item), "after": by_decile(per_item, per_item_fed)},
            counts.dropped,
            counts.watermark_ms,
            last_of(days_of_log, last_day, day_of(now)) if timed else None,
        )
        described = {key: value for key, value in asdict(report).items() if key != "path"}
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "kind": "samples",
                **described,
                "configuration": dict(recorded or {}),
                "files": folder_listing(folder),
            },
        )
    return report


@dataclass(frozen=True)
class _Counts:
    events: int
    outcomes: dict[str, int]
    dropped: dict[str, int]
    dropped_of: dict[str, dict[str, int]]
    """By outcome."""
    watermark_ms: int | None


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: import or simulate a workspace first") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None


def _trained_rows(engine: Engine, users: pa.Table, untrained: float) -> Any:
    """The rows of the users whom something is trained on."""
    out = is_held_out(users.column(c.USER_ID).combine_chunks(), untrained)
    return engine.put("trained_users", pa.table({USER_ROW: pa.array(np.flatnonzero(~out).astype(np.int32))}))


def _numbered(entities: pa.Table, id_column: str, row: str) -> pa.Table:
    """Ids in ascending order with their dense row."""
    return pa.table(
        {id_column: entities.column(id_column), row: pa.array(np.arange(entities.num_rows, dtype=np.int32))}
    )


def _beyond(now: int) -> Any:
    """An event has a time that is later than now."""
    return (_[c.REQUEST_TS_MS] > now).fill_null(False) | (_[c.CLICK_TS_MS] > now).fill_null(False)


def _count(
    engine: Engine, events: Any, user_rows: Any, item_rows: Any, weight: str | None, positions: bool, now: int
) -> _Counts:
    """Check times, outcomes, weights and positions of all events, and count what will be left out.

    Raises:
        DataError: something is not as it must be, with how many rows are so.
    """
    joined = events.left_join(user_rows, c.USER_ID).left_join(item_rows, c.ITEM_ID)
    request, click, clicked = _[c.REQUEST_TS_MS], _[c.CLICK_TS_MS], _[c.OUTCOME] == c.CLICKED
    bad = {
        f"clicked rows have no {c.EVENT_SEQ}": clicked & _[c.EVENT_SEQ].isnull(),
        f"clicked rows have no {c.CLICK_TS_MS}": clicked & request.notnull() & click.isnull(),
        f"rows have a {c.CLICK_TS_MS} before their {c.REQUEST_TS_MS}": click < request,
        f"rows have a {c.CLICK_TS_MS} and no {c.REQUEST_TS_MS}": click.notnull() & request.isnull(),
    }
    if c.POSITION in events.columns:
        rejected = _[c.OUTCOME].isin([c.PRE_RANK_REJECTED, c.RANK_REJECTED])
        bad[f"rejected rows have a {c.POSITION}, so they were shown: a shown item is no negative of retrieval"] = (
            rejected & _[c.POSITION].notnull()
        )
        if positions:
            place = _[c.POSITION].cast("float64")
            usable = (place >= 0) & (place <= _LAST_POSITION) & (place % 1 == 0)
            bad[f"rows have a {c.POSITION} that is no whole number from 1 to {_LAST_POSITION}"] = _[
                c.POSITION
            ].notnull() & ~usable.fill_null(False)
    if weight:
        number = _[WEIGHED_BY].cast("float64")
        usable = (number >= 0) & (number <= _LARGEST_WEIGHT)
        bad[f"clicked rows have no {weight} that is a finite number from 0 to {_LARGEST_WEIGHT:g}"] = (
            clicked & ~usable.fill_null(False)
        )
    grouped = engine.fetch(
        joined.mutate(
            left_out=ibis.cases(
                (_beyond(now), BEYOND_NOW),
                (_[c.USER_ID].isnull() | _[c.ITEM_ID].isnull(), "null_id"),
                (_[USER_ROW].isnull(), "unknown_user"),
                (_[ITEM_ROW].isnull(), "unknown_item"),
                else_="",
            ),
            no_time=request.isnull(),
        )
        .group_by([c.OUTCOME, "left_out", "no_time"])
        .aggregate(
            rows=_.count(),
            first_request=request.min(),
            last_request=request.max(),
            first_click=click.min(),
            last_click=click.max(),
            **{name: (condition & ~_beyond(now)).cast("int64").sum() for name, condition in bad.items()},
        )
    )
    rows = grouped.to_pylist()
    if not rows:
        raise DataError("events/ has no rows in the chosen days")
    check_outcomes(grouped.column(c.OUTCOME), "events, column outcome")
    extents = {
        name: [r[f"{end}_{kind}"] for r in rows for end in ("first", "last") if r[f"{end}_{kind}"] is not None]
        for name, kind in ((c.REQUEST_TS_MS, "request"), (c.CLICK_TS_MS, "click"))
    }
    for name, times in extents.items():
        check_milliseconds(pa.array(times, pa.int64()), f"events, column {name}")
    total = sum(r["rows"] for r in rows)
    if beyond := sum(r["rows"] for r in rows if r["left_out"] == BEYOND_NOW):
        if beyond == total:
            raise DataError(
                f"events: all {total} rows are later than now, {_moment(now)}: mend their times, or the clock"
            )
        log.warning("events: %d of %d rows are later than now, %s, and left out", beyond, total, _moment(now))
    without = sum(r["rows"] for r in rows if r["no_time"])
    if without not in (0, total):
        raise DataError(f"events: {without} of {total} rows have no {c.REQUEST_TS_MS}: give all a time, or none")
    for name in bad:
        if count := sum(int(r[name] or 0) for r in rows):
            raise DataError(f"events: {count} {name}: mend them or leave them out")
    outcomes, dropped = Counter[str](), Counter[str]()
    dropped_of: dict[str, dict[str, int]] = {}
    for r in rows:
        outcomes[r[c.OUTCOME]] += r["rows"]
        dropped[r["left_out"]] += r["rows"]
        if r["left_out"]:
            reasons = dropped_of.setdefault(r[c.OUTCOME], {})
            reasons[r["left_out"]] = reasons.get(r["left_out"], 0) + r["rows"]
    return _Counts(
        total,
        {name: outcomes[name] for name in c.OUTCOMES if name in outcomes},
        {reason: dropped[reason] for reason in sorted(dropped) if reason},
        dropped_of,
        max(
            (r[last] for r in rows if r["left_out"] != BEYOND_NOW for last in _LAST_TIMES if r[last] is not None),
            default=None,
        ),
    )


def _moment(ts_ms: int) -> str:
    return f"{datetime.datetime.fromtimestamp(ts_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _check_timed(counts: _Counts, days: bool, impressed_weight: float) -> bool:
    """Whether the events have a time; refuses what cannot be without one.

    Raises:
        ConfigError: days are chosen, or weak positives wanted, of events without time.
    """
    timed = counts.watermark_ms is not None
    if not timed and days:
        raise ConfigError("samples.first_day and last_day choose by time, but the events have none: leave them out")
    if not timed and impressed_weight:
        raise ConfigError(
            f"samples.impressed_weight = {impressed_weight:g}, but the events have no time: without one, a row's "
            "history is drawn from the clicks, and a shown item is none"
        )
    return timed


def _rows(known: Any, outcome: str, context: tuple[str, ...], weight: str | float | None, first_day: str | None) -> Any:
    """The events of one outcome as rows of training; `weight` is a column, a number, or None = 1."""
    chosen = known.filter(known[c.OUTCOME] == outcome)
    number = chosen[WEIGHED_BY] if isinstance(weight, str) else ibis.literal(1 if weight is None else weight)
    return chosen.select(
        *(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.CLICK_TS_MS),
        **{_IN_RANGE: chosen[c.DATE] >= (first_day or "")},
        **{c.WEIGHT: number.cast("float32")},
        **{f"{CONTEXT}{name}": chosen[f"{CONTEXT}{name}"] for name in context},
    )


def _check_impressions(counts: _Counts, timed: bool) -> None:
    """Refuse rankers where the log does not say what was shown and not clicked.

    Raises:
        ConfigError: it has no such rows, or no time.
    """
    if c.IMPRESSED not in counts.outcomes or not timed:
        seen = f"outcomes: {counts.outcomes}" if timed else "the events have no time"
        raise ConfigError(
            f"models.rankers learn from what was shown and not clicked, rows of outcome {c.IMPRESSED} with a time, and "
            f"this log has none ({seen}): leave models.rankers out"
        )


def _shown(known: Any, clicks: Any, context: tuple[str, ...], first_day: str) -> Any:
    """What was shown from a day on, clicked or not, with the number of the user's clicks before."""
    chosen = known.filter(known[c.OUTCOME].isin([c.IMPRESSED, c.CLICKED]) & (known[c.DATE] >= first_day))
    known_place = chosen[c.POSITION].cast("int32") if c.POSITION in chosen.columns else ibis.null("int32")
    shown = chosen.select(
        *(c.EVENT_SEQ, USER_ROW, ITEM_ROW, c.REQUEST_TS_MS, c.CLICK_TS_MS),
        **{
            LABEL: (chosen[c.OUTCOME] == c.CLICKED).cast("int8"),
            c.POSITION: known_place.fill_null(NO_POSITION).cast("int32"),
        },
        **{f"{CONTEXT}{name}": chosen[f"{CONTEXT}{name}"] for name in context},
    )
    unlabelled = {LABEL: ibis.literal(1, "int8"), c.POSITION: ibis.literal(NO_POSITION, "int32")}
    return _with_history(shown, clicks.mutate(**unlabelled).select(*shown.columns))


def _share_with_hard(engine: Engine, positives: Any, sources: Sequence[str]) -> float:
    """Share of the positives that have a hard negative."""
    if not sources:
        return 0.0
    some: Any = functools.reduce(operator.or_, (positives[f"{HARD}{source}"] > 0 for source in sources))
    found = engine.fetch(positives.aggregate(rows=_.count(), some=some.cast("int64").sum())).to_pylist()[0]
    return float(round(int(found["some"]) / int(found["rows"]), 4))


def _hard_sources(counts: _Counts, timed: bool, impressed: bool) -> list[str]:
    """The outcomes of the log that are hard negatives; without time no row has a request to be rejected in."""
    if impressed:
        log.warning(
            "what was shown and not clicked is used as a hard negative, as "
            "samples.negatives.impressed_as_negatives_for_experiments says: it was good enough to be shown, and a "
            "model that learns from it retrieves worse"
        )
    wanted = [c.PRE_RANK_REJECTED, c.RANK_REJECTED, *([c.IMPRESSED] if impressed else [])]
    return [outcome for outcome in wanted if timed and outcome in counts.outcomes]


def _used(
    counts: _Counts, timed: bool, clicked: int, weak: int, rejected: dict[str, dict[str, int]], impressions: bool
) -> dict[str, dict[str, int]]:
    """What became of the rows of each outcome; the numbers of an outcome sum to its rows."""
    used: dict[str, dict[str, int]] = {}
    for outcome, rows in counts.outcomes.items():
        parts = dict(counts.dropped_of.get(outcome, {}))
        if outcome == c.CLICKED:
            parts["positive"] = clicked
        if outcome == c.IMPRESSED and weak:
            parts["weak_positive"] = weak
        elif outcome in rejected:
            parts |= rejected[outcome]
        rest = rows - sum(parts.values())
        if rest:
            rejects = outcome in (c.PRE_RANK_REJECTED, c.RANK_REJECTED)
            spared = "no_time" if rejects and not timed else "before_the_first_day"
            elsewhere = "of_rankers" if impressions and outcome == c.IMPRESSED else "not_used"
            parts[spared if rejects or outcome == c.CLICKED or weak else elsewhere] = rest
        used[outcome] = parts
    return used


def _check_distinct(engine: Engine, clicks: Any) -> None:
    """Refuse a click that is there twice: the usual slip is a file that was copied or written again."""
    repeated = clicks.group_by([USER_ROW, ITEM_ROW, c.EVENT_SEQ]).aggregate(rows=_.count()).filter(_.rows > 1)
    found = engine.fetch(repeated.aggregate(clicks=_.count(), least=_[c.EVENT_SEQ].min())).to_pylist()[0]
    if found["clicks"]:
        raise DataError(
            f"events: {found['clicks']} clicks are there more than once, by user, item and {c.EVENT_SEQ}, such as "
            f"{c.EVENT_SEQ} = {found['least']}: is a file there twice?"
        )


def _with_history(positives: Any, clicks: Any) -> Any:
    """Positives with the number of the user's clicks strictly before the request.

    Requests and clicks stand in one stream of time; a RANGE window that ends a millisecond earlier counts the clicks.
    """
    requests = positives.mutate(at=_[c.REQUEST_TS_MS], is_click=ibis.literal(0, "int8"))
    earlier = clicks.mutate(at=_[c.CLICK_TS_MS], is_click=ibis.literal(1, "int8"))
    window = ibis.range_window(preceding=(None, 1), group_by=USER_ROW, order_by="at")
    counted = ibis.union(requests, earlier).mutate(**{HISTORY_COUNT: _.is_click.sum().over(window).fill_null(0)})
    return counted.filter(_.is_click == 0)


def _tally(
    engine: Engine, events: Any, row: str, size: int, copies: str | None = None
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """How many events each dense row has, (size,); an event counts as often as its copies say, if a column does."""
    counted = engine.fetch(events.group_by(row).aggregate(rows=_[copies].sum() if copies else _.count()))
    tally = np.zeros(size, np.int64)
    tally[counted.column(row).to_numpy()] = counted.column("rows").to_numpy()
    return tally


def _values(
    engine: Engine, positives: Any, features: Features, rows: int, types: Mapping[str, pa.DataType]
) -> dict[str, pa.ChunkedArray]:
    """What each context feature is fitted to, never all rows: distinct values, and of numbers about a million.

    The million is chosen by a hash of `event_seq`, so that every engine and every order of rows chooses the same.
    """
    step = -(-rows // _FITTED_NUMBERS)
    hashed = _[c.EVENT_SEQ] % PRIME * FACTOR % PRIME
    chosen = positives.filter(hashed % step == 0) if step > 1 else positives
    values = {}
    for name, kind in features.context.items():
        column = f"{CONTEXT}{name}"
        if isinstance(kind, Numeric):
            query = chosen.select(column)
        elif isinstance(kind, Vector):
            query = positives.select(column).limit(0)
        else:
            query = positives.select(column).distinct()
        values[name] = _as(types[column], engine.fetch(query).column(column))
    return values


def _as(kind: pa.DataType, column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A column in the type of the files: engines have fewer types than files."""
    return pa.nulls(len(column)) if pa.types.is_null(kind) else column.cast(kind)


def _encoded(features: tuple[Fitted, ...], table: pa.Table, id_column: str, counts: dict[str, Any]) -> pa.Table:
    """Ids, counts and encoded features, a row an entity."""
    encoded = {f"{FEATURE}{name}": to_arrow(column) for name, column in encode_table(features, table).items()}
    return pa.table({id_column: table.column(id_column), **{k: pa.array(v) for k, v in counts.items()}, **encoded})


def _write_positives(
    engine: Engine,
    path: Path,
    positives: Any,
    context: tuple[Fitted, ...],
    types: Mapping[str, pa.DataType],
    timed: bool,
    sources: Sequence[str],
) -> None:
    """One row a positive, in the order of time, context encoded."""
    order = [c.REQUEST_TS_MS, c.EVENT_SEQ, USER_ROW, ITEM_ROW] if timed else [USER_ROW, ITEM_ROW, c.EVENT_SEQ]
    fields = [
        (USER_ROW, pa.int32()),
        (ITEM_ROW, pa.int32()),
        (HISTORY_COUNT, pa.int32()),
        (COPIES, pa.int32()),
        (c.WEIGHT, pa.float32()),
        (c.TS_MS, pa.int64()),
        *((f"{HARD}{source}", pa.int32()) for source in sources),
    ]
    chosen = positives.order_by(order).mutate(
        **{
            HISTORY_COUNT: _[HISTORY_COUNT].cast("int32"),
            c.TS_MS: _[c.REQUEST_TS_MS] if timed else ibis.literal(0, "int64"),
        }
    )
    _write_encoded(engine, path, chosen, fields, context, types)


def _write_impressions(
    engine: Engine, path: Path, shown: Any, context: tuple[Fitted, ...], types: Mapping[str, pa.DataType]
) -> None:
    """One row for each item that was shown, in the order of time, a request's by position, context encoded."""
    fields = [
        (USER_ROW, pa.int32()),
        (ITEM_ROW, pa.int32()),
        (HISTORY_COUNT, pa.int32()),
        (LABEL, pa.int8()),
        (c.POSITION, pa.int32()),
        (c.TS_MS, pa.int64()),
    ]
    order = [c.REQUEST_TS_MS, USER_ROW, c.POSITION, c.EVENT_SEQ, ITEM_ROW, LABEL]
    chosen = shown.order_by(order).mutate(
        **{HISTORY_COUNT: _[HISTORY_COUNT].cast("int32"), c.TS_MS: _[c.REQUEST_TS_MS]}
    )
    _write_encoded(engine, path, chosen, fields, context, types)


def _write_encoded(
    engine: Engine,
    path: Path,
    rows: Any,
    fields: list[tuple[str, pa.DataType]],
    context: tuple[Fitted, ...],
    types: Mapping[str, pa.DataType],
) -> None:
    """Rows in their order: some columns as they are, those of the context encoded."""
    chosen = rows.select(*(name for name, _type in fields), *(f"{CONTEXT}{feature.name}" for feature in context))

    def encoded() -> Iterator[pa.RecordBatch]:
        for batch in engine.batches(chosen):
            columns = {name: batch.column(name) for name, _type in fields}
            for feature in context:
                name = f"{CONTEXT}{feature.name}"
                columns[name] = to_arrow(feature.encode(_as(types[name], batch.column(name))))
            yield pa.record_batch(columns)

    encodings = [(f"{CONTEXT}{feature.name}", _stored(to_arrow(feature.absent(1)).type)) for feature in context]
    write_columns(path, pa.schema(fields + encodings), encoded())


def _stored(kind: pa.DataType) -> pa.DataType:
    """The type of an encoded column in a file of any length."""
    return pa.large_list(kind.value_type) if pa.types.is_list(kind) else kind


def _write_clicks(engine: Engine, path: Path, clicks: Any, timed: bool) -> None:
    """Every user's clicked items in the order of time, users in the order of their rows."""
    at = _[c.CLICK_TS_MS] if timed else ibis.literal(0, "int64")
    order = [USER_ROW, c.CLICK_TS_MS, c.EVENT_SEQ, ITEM_ROW] if timed else [USER_ROW, ITEM_ROW, c.EVENT_SEQ]
    chosen = clicks.order_by(order).mutate(**{c.TS_MS: at}).select(ITEM_ROW, c.TS_MS)
    write_columns(path, pa.schema([(ITEM_ROW, pa.int32()), (c.TS_MS, pa.int64())]), engine.batches(chosen))
