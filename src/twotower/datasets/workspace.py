"""A workspace on disk: `users.parquet`, `items.parquet`, one folder of events a day, and the hold-out.

It is there as a whole or not at all: an import writes beside its place under a temporary name and renames last.
"""

import datetime
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.datasets.holdout import Split
from twotower.datasets.tables import DAY_MS, Tables
from twotower.schema import columns as c
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
    report = ImportReport(
        workspace=str(path),
        users=tables.users.num_rows,
        items=tables.items.num_rows,
        events=events.num_rows,
        holdout=0 if split is None else split.holdout.num_rows,
        holdout_cold=0 if split is None else split.holdout_cold.num_rows,
        train_positives=0 if split is None else split.train_positives.num_rows,
        dropped=dict(sorted(dropped.items())),
    )
    with whole_folder(path) as folder:
        _write(tables.users, folder / USERS)
        _write(tables.items, folder / ITEMS)
        _write_events(events, folder / EVENTS)
        if split is not None:
            _write(split.holdout, folder / HOLDOUT)
            _write(split.holdout_cold, folder / HOLDOUT_COLD)
            _write(split.train_positives, folder / TRAIN_POSITIVES)
            if split.holdout_impressions is not None:
                _write(split.holdout_impressions, folder / HOLDOUT_IMPRESSIONS)
        counts = {name: value for name, value in vars(report).items() if name not in ("workspace", "dropped")}
        manifest = {"format": FORMAT, "source": tables.source, "arguments": dict(arguments or {}), "counts": counts}
        write_json(folder / MANIFEST, {**manifest, "dropped": report.dropped})
        check_vacant(path)  # it was written for a while: someone else may have come first
    return report


def _write_events(events: pa.Table, folder: Path) -> None:
    """One file a day of UTC; the date is the folder's name alone."""
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
