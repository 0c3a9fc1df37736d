"""Options of the workspace, and of an import into one."""

import dataclasses
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field
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


@dataclass(frozen=True, config=STRICT)
class TableFiles:
    """The files of one table, and what becomes of their columns."""

    files: list[Text]
    """Files or folders, relative to the current folder; all have the same columns."""
    columns: dict[str, str]
    """Name in the files = name in the workspace; an empty name leaves the column out."""
    encoding: Text | None = None
    """Of text, such as `gb18030`; absent = UTF-8, or UTF-16 with a byte order mark."""
    delimiter: Annotated[str, Field(min_length=1)] | None = None
    """Between the values of text; absent = by the name of the file and its heading."""
    heading: bool = True
    """The first line of text has the names of the columns; false = they are `column_1`, `column_2`, ..."""
    merge: bool = False
    """Rows of one id become one row; of several values the smallest stands, and the report counts such ids."""
    numbers: list[Text] = dataclasses.field(default_factory=list)
    """Columns of the workspace that are text of numbers, with a currency or separators of thousands."""
    days: list[Text] = dataclasses.field(default_factory=list)
    """Columns of the workspace with dates, which become days since 1970: a number for a feature."""


@dataclass(frozen=True, config=STRICT)
class ImportSection:
    """Files of your own and how `twotower import -c FILE` makes a workspace of them.

    `twotower init` writes this section. `events` needs `user_id` and `item_id` among its new names; `ts_ms` is the
    time, in whatever form, and `outcome` whether the item was clicked.
    """

    events: TableFiles
    """Clicks, purchases, ratings or impressions."""
    users: TableFiles | None = None
    """`user_id` and features; absent = the users of the events."""
    items: TableFiles | None = None
    """`item_id` and features; absent = the items of the events."""
    time_unit: Unit = "ms"
    """Of times that are numbers, since 1970."""
    time_format: Text | None = None
    """Of times that are text, such as `%Y/%m/%d %H:%M`; absent = ISO 8601."""
    timezone: Text = "UTC"
    """Of dates and times that do not say a zone, such as `Asia/Shanghai`."""
    clicked: list[str] = dataclasses.field(default_factory=list)
    """Values of `outcome` that are a click, such as `["1"]`; all others are impressions. Empty = `outcome` has the
    words of this system."""
    positive: Text = "all"
    """`all`, or the lowest rating of a positive."""
    holdout: Text | None = None
    """What is held out: `time:Q`, `since:DATE`, `leave-one-out`, `pause:DAYS`, or without time `random:SHARE`."""
    ids: Literal["auto", "string", "int"] = "auto"
    """Type of ids; `auto` = integers where all of them are written as such."""
