"""A workspace on disk: `users.parquet`, `items.parquet`, one folder of events a day, and the hold-out.

It is there as a whole or not at all: an import writes beside its place under a temporary name and renames last.
"""

import datetime
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.holdout import Split
from twotower.datasets.tables import Tables
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files, whole_folder, write_json

FORMAT: Final = 1
MANIFEST: Final = "workspace.json"
USERS: Final = "users.parquet"
ITEMS: Final = "items.parquet"
EVENTS: Final = "events"
HOLDOUT: Final = "holdout.parquet"
HOLDOUT_COLD: Final = "holdout_cold.parquet"
HOLDOUT_IMPRESSIONS: Final = "holdout_impressions.parquet"
TRAIN_POSITIVES: Final = "train_positives.parquet"
MOVED_TIMES: Final = "moved_times.parquet"
"""`event_seq`, `ts_ms` of events whose time was moved because the user had another one then: the time in the source."""


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote, in rows. Without a hold-out its three tables are absent and count 0."""

    workspace: str
    users: int
    items: int
    events: int
    """Training events."""
    holdout: int
    holdout_cold: int
    train_positives: int
    dropped: dict[str, int]
    """Source rows that are in none of the tables, by reason."""
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)
    """One of these rows, by reason."""
    columns: list[dict[str, Any]] = field(default_factory=list)
    """Every column of the source: `table`, `column`, `type`, `missing` values, what it `became`, `note`."""
    not_read: list[str] = field(default_factory=list)
    """Files of the source that were not read."""


@dataclass(frozen=True)
class Workspace:
    """The tables of a workspace that exists; see `open_workspace`."""

    path: Path

    def users(self) -> pa.Table:
        """`user_id` and features, by id."""
        return _read(self.path / USERS)

    def items(self) -> pa.Table:
        """`item_id` and features, by id."""
        return _read(self.path / ITEMS)

    def dates(self) -> list[str]:
        """The partitions of `events/`: days of UTC in their order, or `unknown`.

        Raises:
            DataError: there is none.
        """
        dates = sorted(folder.name.removeprefix(f"{c.DATE}=") for folder in (self.path / EVENTS).glob(f"{c.DATE}=*"))
        if not dates:
            raise DataError(f"{self.path / EVENTS} has no folder {c.DATE}=YYYY-MM-DD")
        return dates

    def events(self, first_day: str | None = None, last_day: str | None = None) -> pa.Table:
        """Joined events in the order of `event_seq`, of all days or of those from `first_day` to `last_day`.

        Raises:
            DataError: no day is in the range, or files are missing or damaged.
        """
        days = [date for date in self.dates() if (first_day or "") <= date <= (last_day or "~")]
        if not days:
            raise DataError(f"{self.path} has events of {self.dates()[0]} to {self.dates()[-1]}, none in the range")
        files = [file for day in days for file in parquet_files(self.path / EVENTS / f"{c.DATE}={day}")]
        try:
            return pa.concat_tables([_read(file) for file in files], promote_options="permissive").sort_by(c.EVENT_SEQ)
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.path / EVENTS}: a column has another type in some files: {error}") from None

    def instants(self, events: pa.Table) -> pa.ChunkedArray:
        """When events (N) of this workspace happened by the clock of their source: ties of a user are equal there."""
        ts_ms = events[c.REQUEST_TS_MS]
        if not (self.path / MOVED_TIMES).exists():
            return ts_ms
        moved = _read(self.path / MOVED_TIMES)
        place = pc.index_in(events[c.EVENT_SEQ], value_set=moved[c.EVENT_SEQ].combine_chunks())
        return pc.coalesce(moved[c.TS_MS].take(place), ts_ms)

    def holdout(self) -> pa.Table:
        """Held-out positives of users and items that have a training positive."""
        return _read(self.path / HOLDOUT)

    def holdout_cold(self) -> pa.Table:
        """The other held-out positives, with their reason."""
        return _read(self.path / HOLDOUT_COLD)

    def train_positives(self) -> pa.Table:
        """Every training positive."""
        return _read(self.path / TRAIN_POSITIVES)


def open_workspace(path: Path) -> Workspace:
    """A workspace to read from.

    Raises:
        DataError: one of its tables is missing.
    """
    missing = [name for name in (USERS, ITEMS, EVENTS) if not (path / name).exists()]
    if missing:
        raise DataError(f"{path} is no workspace, it has no {', '.join(missing)}: make one with `import` or `simulate`")
    return Workspace(path)


def check_vacant(path: Path) -> None:
    """Refuse a place where a workspace would hide or replace something.

    Raises:
        ConfigError: the path is a file, a workspace, or a folder with anything in it.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ConfigError(f"{path} is a file: give a folder that is empty or does not exist")
    content = sorted(entry.name for entry in path.iterdir())
    if {MANIFEST, USERS, ITEMS, EVENTS}.intersection(content):
        raise ConfigError(f"{path} is a workspace already: give another path, or remove it first")
    if content:
        raise ConfigError(f"{path} is not empty, it holds {content[0]}: give a folder that is empty or does not exist")


def write_workspace(
    path: Path, tables: Tables, split: Split | None = None, arguments: Mapping[str, Any] | None = None
) -> ImportReport:
    """Write the tables, and the hold-out if there is one, into a folder that is empty or absent.

    Args:
        path: the workspace.
        tables: of the whole data set; with `split`, its training events are written in place of theirs.
        split: what is held out.
        arguments: how the tables were made, JSON values, kept in the manifest.

    Raises:
        ConfigError: something stands at `path`.
    """
    path = path.resolve()
    check_vacant(path)
    events = tables.events if split is None else split.events
    dropped = Counter(tables.dropped) + Counter({} if split is None else split.dropped)
    examples = {**({} if split is None else split.examples), **tables.examples}
    report = ImportReport(
        workspace=str(path),
        users=tables.users.num_rows,
        items=tables.items.num_rows,
        events=events.num_rows,
        holdout=0 if split is None else split.holdout.num_rows,
        holdout_cold=0 if split is None else split.holdout_cold.num_rows,
        train_positives=0 if split is None else split.train_positives.num_rows,
        dropped=dict(sorted(dropped.items())),
        examples={reason: dict(row) for reason, row in sorted(examples.items())},
        columns=[asdict(column) for column in tables.columns],
        not_read=list(tables.not_read),
    )
    with whole_folder(path) as folder:
        _write(tables.users, folder / USERS)
        _write(tables.items, folder / ITEMS)
        _write_events(events, folder / EVENTS)
        _write_moved_times(events, tables.instants if split is None else split.instants, folder / MOVED_TIMES)
        if split is not None:
            _write(split.holdout, folder / HOLDOUT)
            _write(split.holdout_cold, folder / HOLDOUT_COLD)
            _write(split.train_positives, folder / TRAIN_POSITIVES)
            if split.holdout_impressions is not None:
                _write(split.holdout_impressions, folder / HOLDOUT_IMPRESSIONS)
        counts = {name: value for name, value in vars(report).items() if isinstance(value, int)}
        manifest = {"format": FORMAT, "source": tables.source, "arguments": dict(arguments or {}), "counts": counts}
        found = {name: getattr(report, name) for name in ("dropped", "examples", "columns", "not_read")}
        write_json(folder / MANIFEST, manifest | found)
        check_vacant(path)  # it was written for a while: someone else may have come first
    return report


def _write_events(events: pa.Table, folder: Path) -> None:
    """One file a day of UTC; only the folder's name has the date."""
    if events[c.REQUEST_TS_MS].null_count == events.num_rows:
        _write(events, folder / f"{c.DATE}={c.UNKNOWN_DATE}" / "part-0.parquet")
        return
    day = events[c.REQUEST_TS_MS].to_numpy() // DAY_MS
    if (np.diff(day) < 0).any():
        raise ValueError("events are not in the order of time")
    edges = [0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(day)]
    for begin, end in itertools.pairwise(edges):
        date = datetime.date(1970, 1, 1) + datetime.timedelta(days=int(day[begin]))
        _write(events.slice(begin, end - begin), folder / f"{c.DATE}={date}" / "part-0.parquet")


def _write_moved_times(events: pa.Table, instants: pa.ChunkedArray | None, path: Path) -> None:
    """The times in the source where they differ; no file where none does."""
    if instants is None:
        return
    times = pa.table({c.EVENT_SEQ: events[c.EVENT_SEQ], c.TS_MS: instants})
    moved = times.filter(pc.not_equal(instants, events[c.REQUEST_TS_MS]))
    if moved.num_rows:
        _write(moved, path)


def as_text(report: ImportReport) -> str:
    """What an import found, as lines for a terminal: every column and what became of it, and what was dropped."""
    rows = [("table", "column", "type", "missing", "became")]
    for one in report.columns:
        became = one["became"] + (f" ({one['note']})" if one["note"] else "")
        missing = "" if one["missing"] is None else str(one["missing"])
        rows.append((one["table"], one["column"] or "(no name)", one["type"], missing, became))
    widths = [max(len(row[place]) for row in rows) for place in range(4)]
    lines = []
    if len(rows) > 1:
        lines = [
            "  ".join([*(f"{value:{width}}" for value, width in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
    for name in report.not_read:
        lines.append(f"not read: {name}")
    for reason, count in report.dropped.items():
        example = json.dumps(report.examples.get(reason, {}), ensure_ascii=False)
        lines.append(f"dropped: {reason} {count}, such as {example}")
    return "\n".join(lines)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def _read(path: Path) -> pa.Table:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is no readable Parquet ({error}): it was damaged or written by something else"
        ) from None
