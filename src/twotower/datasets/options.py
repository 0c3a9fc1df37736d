"""Options of the workspace, and of an import into one."""

import dataclasses
from pathlib import Path
from typing import Final, Literal

from pydantic.dataclasses import dataclass

from twotower.schema.options import STRICT, Text


@dataclass(frozen=True, config=STRICT)
class WorkspaceOptions:
    """Where the tables are and everything that the commands add."""

    path: Text = "workspace"
    """Folder with `users.parquet`, `items.parquet` and `events/`; relative to the current folder."""


Unit = Literal["s", "ms", "us", "ns"]


@dataclasses.dataclass(frozen=True)
class EventTime:
    """Which column of your own interactions says when an event happened."""

    column: str | None = None
    """Absent = `ts_ms`."""
    unit: Unit = "ms"
    """Of numbers, since 1970; dates and timestamps need none, and are of UTC where they do not say a zone."""
    absent: bool = False
    """There is no time on purpose: other columns that look like one are context."""


IN_MILLISECONDS: Final = EventTime()
"""The column `ts_ms`."""


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What is imported of a data set, and what is held out."""

    holdout: str | None = None
    """`time:Q`, `since:YYYY-MM-DD`, `leave-one-out`, `pause:DAYS` or `random:SHARE`; absent = nothing is held out."""
    test: Path | None = None
    """Held-out interactions as a file; excludes `holdout`."""
    positive: str = "all"
    """`all`, or the lowest rating of a positive."""
    until: str | None = None
    """The last day to import, YYYY-MM-DD; absent = all."""
    users: Path | None = None
    """`interactions`: a file of `user_id` and features; absent = the users of the interactions."""
    items: Path | None = None
    """`interactions`: a file of `item_id` and features; absent = the items of the interactions."""
    event_time: EventTime = IN_MILLISECONDS
    """`interactions` and `test`: the column of times."""
