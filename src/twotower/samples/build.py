"""The batch job that turns a workspace into samples, written with Ibis so that every engine gives the same rows.

Every order has a tie-break and nothing is drawn, so the result depends neither on the order of rows and files nor on
the engine. History is stored as a count: how many of the user's clicks came before the request.
"""

import functools
import operator
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from ibis import _
from pydantic import TypeAdapter

from twotower.features.feature_set import FeatureSet, save
from twotower.features.options import Features
from twotower.samples import names as n
from twotower.samples.columns_file import write_columns, write_table
from twotower.samples.engine import open_engine
from twotower.samples.events import choose_days
from twotower.samples.fitting import FittedFeatures, PreviousFeatures, encoded_entities, fit_features
from twotower.samples.hard import Rejected, find_rejected
from twotower.samples.known import KnownEvents, read_known
from twotower.samples.options import EngineOptions, SamplesOptions
from twotower.samples.rows import LearnedRows, impressions_of, learned_rows, with_history
from twotower.samples.sampling import by_decile, expected_copies, with_copies
from twotower.samples.write import write_clicks, write_impressions, write_positives
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, day_of, now_ms
from twotower.schema.files import MANIFEST, folder_listing, whole_folder, write_json

MADE_WITH: Final = "configuration"
"""Key of what the samples were made with, in their manifest."""
_OF_SAMPLES: Final = {"hard_most", "impressed_as_negatives_for_experiments"}
"""Of `samples.negatives`, what the samples are made with; the others are of training."""


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
    held_out: dict[str, int]
    """How many `users` are held out of training, and how many `clicks` of theirs would be positives: the gate of the
    updates judges on them (`samples.held_out_users`)."""
    dropped: dict[str, int]
    """Events left out, by reason: `beyond_now`, `null_id`, `unknown_user`, `unknown_item`."""
    watermark_ms: int | None
    """The latest time of any event read that is not beyond the clock; None without time."""
    last_day: str | None
    """The last day of requests read, `YYYY-MM-DD`; None without time. Its clicks may be of the next one."""


def build_samples(
    workspace: Path,
    out: Path,
    features: Features,
    dimension: int,
    options: SamplesOptions = SamplesOptions(),  # noqa: B008  frozen
    *,
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    impressions: bool = False,
    previous: PreviousFeatures | None = None,
    clock_ms: ClockMs = now_ms,
) -> SamplesReport:
    """Build the samples of a range of days into the folder `out`, whole or not at all.

    Args:
        workspace: a folder with `users.parquet`, `items.parquet` and `events/`.
        out: the samples folder, replaced if it exists.
        features: the configured features.
        dimension: width of the id embeddings.
        options: which events become training rows.
        engine: what runs the job; every engine gives the same files.
        impressions: also write impressions, which rankers learn from.
        previous: fitted features to go on with; None = all are fitted anew.
        clock_ms: milliseconds since 1970; later events are left out and counted.

    Raises:
        DataError: a table is missing, empty or not of its schema; no positive is left.
        ConfigError: a configured column or day does not exist; impressions are wanted of a log that has none.
    """
    now = clock_ms()
    days = choose_days(workspace / "events", options, day_of(now))
    with whole_folder(out) as folder:
        with open_engine(engine, folder / "spill") as opened:
            known = read_known(opened, workspace, days, features, options, impressions=impressions, now=now)
            rows = learned_rows(known, options)
            fitted = fit_features(known, rows, features, previous, dimension=dimension, room=options.vocabulary_room)
            _write_entities(known, folder, rows, fitted.features)
            fed, rejected = _write_positives(known, folder, rows, fitted.features, options)
            write_clicks(known, folder / n.CLICKS_FILE, rows.clicks)
            if impressions:
                shown = impressions_of(known, rows.clicks)
                write_impressions(known, folder / n.IMPRESSIONS_FILE, shown, fitted.features.context)
            report = _report(out, known, rows, fitted, fed, rejected, impressions=impressions)
        shutil.rmtree(folder / "spill", ignore_errors=True)
        described = {key: value for key, value in asdict(report).items() if key != "path"}
        made = {MADE_WITH: made_with(features, options, dimension), "files": folder_listing(folder)}
        write_json(folder / MANIFEST, {"format": n.FORMAT, "kind": "samples", **described, **made})
    return report


def made_with(features: Features, options: SamplesOptions, dimension: int) -> dict[str, Any]:
    """What samples are made with, as sections of a configuration, for manifests."""
    negatives: Any = {"negatives": set(type(options.negatives).__dataclass_fields__) - _OF_SAMPLES}

    def section(value: Features | SamplesOptions, **left_out: Any) -> Any:
        return TypeAdapter(type(value)).dump_python(value, mode="json", exclude_none=True, **left_out)

    return {
        "features": section(features),
        "samples": section(options, exclude=negatives),
        "models": {"dimension": dimension},
    }


def _write_entities(known: KnownEvents, folder: Path, rows: LearnedRows, features: FeatureSet) -> None:
    clicks = {n.CLICKS: known.tally(rows.clicks, n.USER_ROW)}
    write_table(folder / n.USERS_FILE, encoded_entities(features.user_columns, known.users, c.USER_ID, clicks))
    positives = {n.POSITIVES: rows.item_positives}
    write_table(folder / n.ITEMS_FILE, encoded_entities(features.item, known.items, c.ITEM_ID, positives))
    save(features, folder)


def _write_positives(
    known: KnownEvents, folder: Path, rows: LearnedRows, features: FeatureSet, options: SamplesOptions
) -> tuple[Any, Rejected]:
    """Write the training rows and their hard negatives; gives the tables of both."""
    copies = expected_copies(rows.item_positives, options.hot, options.cold)
    positives = with_copies(known.engine, with_history(known, rows.fed, rows.clicks), copies, options.seed)
    rejected = find_rejected(known, rows.fed, options)
    positives = known.engine.keep("positives", rejected.count(positives))
    write_positives(known, folder / n.POSITIVES_FILE, positives, features.context, rejected.sources)
    for source in rejected.sources:
        items = known.engine.batches(rejected.of(positives, source))
        write_columns(folder / f"{n.HARD}{source}.arrow", pa.schema({n.ITEM_ROW: pa.int32()}), items)
    return positives, rejected


def _report(
    out: Path,
    known: KnownEvents,
    rows: LearnedRows,
    fitted: FittedFeatures,
    fed: Any,
    rejected: Rejected,
    *,
    impressions: bool,
) -> SamplesReport:
    counts = (fed[f"{n.HARD}{source}"] > 0 for source in rejected.sources)
    some: Any = functools.reduce(operator.or_, counts, fed[n.ITEM_ROW] < 0)
    [total] = known.engine.fetch(fed.aggregate(rows=_.count(), hard=some.cast("int64").sum())).to_pylist()
    clicked = int(rows.item_positives.sum())
    per_item = known.tally(fed, n.ITEM_ROW, n.COPIES)
    return SamplesReport(
        path=str(out),
        events=known.counts.events,
        outcomes=known.counts.outcomes,
        positives=clicked,
        users=fitted.users,
        items=fitted.items,
        rows_fed=int(per_item.sum()),
        with_hard=round(int(total["hard"]) / int(total["rows"]), 4),
        used=_used(known, rows, int(total["rows"]) - clicked, rejected.used, impressions=impressions),
        deciles={
            "before": by_decile(rows.item_positives, rows.item_positives),
            "after": by_decile(rows.item_positives, per_item),
        },
        held_out=rows.held_out,
        dropped=known.counts.dropped,
        watermark_ms=known.counts.watermark_ms,
        last_day=known.days.last if known.timed else None,
    )


def _used(
    known: KnownEvents, learned: LearnedRows, weak: int, rejected: Mapping[str, Mapping[str, int]], *, impressions: bool
) -> dict[str, dict[str, int]]:
    """What became of the rows of each outcome; the numbers of an outcome sum to its rows."""
    used: dict[str, dict[str, int]] = {}
    for outcome, rows in known.counts.outcomes.items():
        parts = dict(known.counts.dropped_of.get(outcome, {}))
        if outcome == c.CLICKED:
            parts["positive"] = int(learned.item_positives.sum())
            if learned.held_out["clicks"]:
                parts["held_out"] = learned.held_out["clicks"]
        if outcome == c.IMPRESSED and weak:
            parts["weak_positive"] = weak
        elif outcome in rejected:
            parts |= rejected[outcome]
        if rest := rows - sum(parts.values()):
            rejects = outcome in (c.PRE_RANK_REJECTED, c.RANK_REJECTED)
            spared = "no_time" if rejects and not known.timed else "before_the_first_day"
            elsewhere = "of_rankers" if impressions and outcome == c.IMPRESSED else "not_used"
            parts[spared if rejects or outcome == c.CLICKED or weak else elsewhere] = rest
        used[outcome] = parts
    return used
