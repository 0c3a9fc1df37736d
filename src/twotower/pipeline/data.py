"""Workspaces from Python: out of tables in memory, files, or a simulated world."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.datasets.importers import import_dataset
from twotower.datasets.interactions import NAME
from twotower.datasets.options import EventTime, ImportOptions, Unit
from twotower.datasets.workspace import ImportReport
from twotower.schema.errors import DataError, TwotowerError
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

Table = Any
"""A table in memory (pandas, Polars, Arrow, DuckDB: whatever has `__arrow_c_stream__`), a dict of columns, or the path
of a file or folder (Parquet, CSV, TSV)."""


def simulate(
    workspace: str | Path,
    *,
    users: int = WorldOptions.users,
    items: int = WorldOptions.items,
    days: int = WorldOptions.days,
    seed: int = WorldOptions.seed,
    like: str = WorldOptions.like,
) -> ImportReport:
    """Make a workspace, a folder that is empty or absent, out of a simulated world whose last day is held out.

    The options are those of `WorldOptions`.

    Raises:
        ConfigError: a number that no world can have; something stands at `workspace`.
    """
    return simulate_workspace(Path(workspace), WorldOptions(users, items, days, seed, like))


def import_tables(
    workspace: str | Path,
    events: Table,
    users: Table | None = None,
    items: Table | None = None,
    *,
    holdout: str | None = None,
    test: Table | None = None,
    positive: str | float = "all",
    until: str | None = None,
    time_column: str | None = None,
    time_unit: Unit = "ms",
    without_time: bool = False,
) -> ImportReport:
    """Make a workspace out of your own tables, with the checks of `twotower import interactions`.

    Args:
        workspace: the folder to make; it is empty or absent.
        events: `user_id`, `item_id` and where known `ts_ms` (or `time_column`), `weight` or `rating`, `outcome`,
            `request_id`, and columns that become context features.
        users: `user_id` and features; absent = the users of the events.
        items: `item_id` and features; absent = the items of the events.
        holdout: `time:Q`, `since:YYYY-MM-DD`, `leave-one-out`, `pause:DAYS` or `random:SHARE`; absent = none.
        test: held-out interactions, in place of `holdout`.
        positive: `all`, or the least rating of a positive.
        until: the last day to import, `YYYY-MM-DD`.
        time_column: the column of times, if it is not `ts_ms`.
        time_unit: the unit of a time column of numbers: `s`, `ms`, `us` or `ns` since 1970.
        without_time: events have no time, whatever a column looks like.

    Returns:
        Counts of imported users, items and events, what was dropped by reason, and every column.

    Raises:
        ConfigError: an option of a wrong form; something stands at `workspace`.
        DataError: a table is not what it should be.

    >>> from tempfile import TemporaryDirectory
    >>> clicks = {"user_id": [1, 1, 2], "item_id": [10, 11, 10], "ts_ms": [1735689600000, 1735689660000, 1735689600000]}
    >>> with TemporaryDirectory() as folder:
    ...     report = import_tables(f"{folder}/workspace", clicks)
    >>> report.users, report.items, report.events
    (2, 2, 3)
    """
    with tempfile.TemporaryDirectory(prefix="twotower-tables-") as folder:
        tables = {"events": events, "users": users, "items": items, "test": test}
        paths = {name: _as_path(table, Path(folder) / f"{name}.parquet") for name, table in tables.items()}
        try:
            options = ImportOptions(
                holdout=holdout,
                test=paths["test"],
                positive=str(positive),
                until=until,
                users=paths["users"],
                items=paths["items"],
                event_time=EventTime(time_column, time_unit, without_time),
            )
            return import_dataset(NAME, paths["events"] or Path(), Path(workspace), options)
        except TwotowerError as error:  # a table in memory has no path: its name says which one it is
            raise type(error)(str(error).replace(f"{folder}/", "").replace(".parquet", "")) from None


def as_arrow(table: Table, name: str) -> pa.Table:
    """A table in memory (see `Table`) as Arrow; `name` names it in errors.

    Raises:
        DataError: it is no table.
    """
    try:
        if isinstance(table, Mapping):
            return pa.table(dict(table))
        if hasattr(table, "__arrow_c_stream__"):
            return pa.RecordBatchReader.from_stream(table).read_all()
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name} is no table: {error}") from None
    raise DataError(
        f"{name} is a {type(table).__name__}: give a DataFrame (pandas, Polars), an Arrow table, a dict of columns, or "
        "the path of a file"
    )


def _as_path(table: Table | None, spare: Path) -> Path | None:
    """The path of a table; one in memory is written to `spare`."""
    if table is None:
        return None
    if isinstance(table, str | Path):
        return Path(table)
    pq.write_table(as_arrow(table, spare.stem), spare)
    return spare
