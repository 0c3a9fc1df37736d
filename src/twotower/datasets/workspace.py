"""A workspace on disk: `users.parquet`, `items.parquet`, one folder of events a day, and the hold-out.

It is there as a whole or not at all: an import writes beside its place under a temporary name and renames last.
"""

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
from twotower.schema.clock import DAY_MS, day_of
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files, whole_folder, write_json
from twotower.schema.tables import read_parquet

FORMAT: Final = 1
MANIFEST: Final = "workspace.json"
USERS: Final = "users.parquet"
ITEMS: Final = "items.parquet"
EVENTS: Final = "events"
HOLDOUT: Final = "holdout.parquet"
HOLDOUT_COLD: Final = "holdout_cold.parquet"
HOLDOUT_IMPRESSIONS: Final = "holdout_impressions.parquet"
TRAIN_POSITIVES: Final = "train_positives.parquet"
_HELD_OUT_TABLES: Final = ("holdout", "holdout_cold", "train_positives")
"""Tables of a `Split` that have a file of their name, and a number in the report."""
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
        return read_parquet(self.path / USERS)

    def items(self) -> pa.Table:
        """`item_id` and features, by id."""
        return read_parquet(self.path / ITEMS)

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
            return pa.concat_tables([read_parquet(file) for file in files], promote_options="permissive").sort_by(
                c.EVENT_SEQ
            )
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.path / EVENTS}: a column has another type in some files: {error}") from None

    def instants(self, events: pa.Table) -> pa.ChunkedArray:
        """When events (N) of this workspace happened by the clock of their source: ties of a user are equal there."""
        ts_ms = events[c.REQUEST_TS_MS]
        if not (self.path / MOVED_TIMES).exists():
            return ts_ms
        moved = read_parquet(self.path / MOVED_TIMES)
        place = pc.index_in(events[c.EVENT_SEQ], value_set=moved[c.EVENT_SEQ].combine_chunks())
        return pc.coalesce(moved[c.TS_MS].take(place), ts_ms)

    def holdout(self) -> pa.Table:
        """Held-out positives of users and items that have a training positive."""
        return read_parquet(self.path / HOLDOUT)

    def holdout_cold(self) -> pa.Table:
        """The other held-out positives, with their reason."""
        return read_parquet(self.path / HOLDOUT_COLD)

    def train_positives(self) -> pa.Table:
        """Every training positive."""
        return read_parquet(self.path / TRAIN_POSITIVES)


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

    With a `split`, its training events are written in place of those of `tables`. The manifest keeps the `arguments`
    with which the tables were made, JSON values.

    Raises:
        ConfigError: something stands at `path`.
    """
    path = path.resolve()
    check_vacant(path)
    training = tables if split is None else split
    held_out = {} if split is None else {name: getattr(split, name) for name in _HELD_OUT_TABLES}
    dropped = Counter(tables.dropped) + Counter({} if split is None else split.dropped)
    report = ImportReport(
        workspace=str(path),
        users=tables.users.num_rows,
        items=tables.items.num_rows,
        events=training.events.num_rows,
        **{name: held_out[name].num_rows if held_out else 0 for name in _HELD_OUT_TABLES},
        dropped=dict(sorted(dropped.items())),
        examples={reason: dict(row) for reason, row in sorted({**training.examples, **tables.examples}.items())},
        columns=[asdict(column) for column in tables.columns],
        not_read=list(tables.not_read),
    )
    with whole_folder(path) as folder:
        _write(tables.users, folder / USERS)
        _write(tables.items, folder / ITEMS)
        _write_events(training.events, folder / EVENTS)
        _write_moved_times(training.events, training.instants, folder / MOVED_TIMES)
        for name, table in held_out.items():
            _write(table, folder / f"{name}.parquet")
        if split is not None and split.holdout_impressions is not None:
            _write(split.holdout_impressions, folder / HOLDOUT_IMPRESSIONS)
        counts = {name: value for name, value in vars(report).items() if isinstance(value, int)}
        manifest = {"format": FORMAT, "source": tables.source, "arguments": dict(arguments or {}), "counts": counts}
        found = {name: getattr(report, name) for name in ("dropped", "examples", "columns", "not_read")}
        write_json(folder / MANIFEST, manifest | found)
        check_vacant(path)  # writing took a while: another process may have been first
    return report


def _write_events(events: pa.Table, folder: Path) -> None:
    """One file a day of UTC; only the folder's name has the date."""
    if events[c.REQUEST_TS_MS].null_count == events.num_rows:
        _write(events, folder / f"{c.DATE}={c.UNKNOWN_DATE}" / "part-0.parquet")
        return
    ts_ms = events[c.REQUEST_TS_MS].to_numpy()
    changes = np.diff(ts_ms // DAY_MS)
    assert (changes >= 0).all(), "events are not in the order of time"
    for begin, end in itertools.pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(ts_ms)]):
        _write(events.slice(begin, end - begin), folder / f"{c.DATE}={day_of(int(ts_ms[begin]))}" / "part-0.parquet")


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
    for column in report.columns:
        became = column["became"] + (f" ({column['note']})" if column["note"] else "")
        missing = "" if column["missing"] is None else str(column["missing"])
        rows.append((column["table"], column["column"] or "(no name)", column["type"], missing, became))
    widths = [*(max(map(len, column)) for column in zip(*rows, strict=True)), 0]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if len(rows) > 1 else []
    lines += [f"not read: {name}" for name in report.not_read]
    for reason, count in report.dropped.items():
        example = json.dumps(report.examples.get(reason, {}), ensure_ascii=False)
        lines.append(f"dropped: {reason} {count}, such as {example}")
    return "\n".join(lines)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")
