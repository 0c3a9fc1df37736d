"""A part of the training events set aside to choose by, so that the test set is never looked at."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.holdout import parse_holdout, split
from twotower.datasets.tables import Tables
from twotower.datasets.workspace import HOLDOUT, MANIFEST, ImportReport, Workspace, open_workspace, write_workspace
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, day_of, now_ms, until_now
from twotower.schema.files import read_json

UNTIMED = "random:0.1"
TIMED = "time:0.9"


def hold_out_validation(
    workspace: Path,
    out: Path,
    rule: str | None = None,
    clock_ms: ClockMs = now_ms,
) -> ImportReport:
    """Make a workspace `out` (empty or absent) out of the training events of another, part of them held out.

    The hold-out of the first workspace is read only for its length in days, which no event after now decides.

    Args:
        workspace: the first workspace.
        out: the new one.
        rule: as of `import --holdout`; None = the rule of the workspace's own hold-out, applied once more: the same
            quantile, as many days, or the last positive; else `time:0.9`, or `random:0.1` for events without time.
        clock_ms: milliseconds since 1970.

    Raises:
        ConfigError: a rule that is unknown or needs a time that the events do not have; something stands at `out`.
        DataError: tables are missing, or nothing is left to learn from.
    """
    whole = open_workspace(workspace)
    manifest = read_json(workspace / MANIFEST) if (workspace / MANIFEST).exists() else {}
    now = clock_ms()
    events, _ = until_now(whole.events(), (c.REQUEST_TS_MS, c.CLICK_TS_MS), now, "events")
    rule = rule or _rule_again(whole, manifest, events, now)
    tables = Tables(
        manifest.get("source", workspace.name), whole.users(), whole.items(), events, instants=whole.instants(events)
    )
    held_out = split(tables, parse_holdout(rule))
    return write_workspace(out, replace(tables, dropped={}), held_out, {"holdout": rule, "of": str(workspace)})


def _rule_again(whole: Workspace, manifest: dict[str, Any], events: pa.Table, now_ms: int) -> str:
    """The rule that cuts the training events as the hold-out was cut from all events."""
    if events[c.REQUEST_TS_MS].null_count:
        return UNTIMED
    given = (manifest.get("arguments") or {}).get("holdout") or TIMED
    parsed = parse_holdout(given)
    if parsed.day is None:
        return str(given)
    held = pq.read_table(whole.path / HOLDOUT, columns=[c.TS_MS])[c.TS_MS]
    latest_ms = pc.max(held.filter(pc.less_equal(held, now_ms))).as_py()
    if latest_ms is None:
        return TIMED
    last_day = datetime.date.fromisoformat(day_of(latest_ms))
    return f"since:{parsed.day - (last_day - parsed.day) - datetime.timedelta(days=1)}"
