"""KuaiRand-Pure: every impression of a short-video feed with its click, in the scene (`tab`) where it was shown."""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.options import ImportOptions
from twotower.datasets.sources import find_files, read_table, read_tables, renamed
from twotower.datasets.tables import Source, check_codes, plain, replaced
from twotower.features.fitted import split
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.schema.tables import as_ids

NAME: Final = "kuairand"
TAB: Final = "tab"
HOUR: Final = "hour"
DAY: Final = "day"
PRIOR_HISTORY: Final = "prior_history"

_LOG: Final = {
    "user_id": c.USER_ID,
    "video_id": c.ITEM_ID,
    "time_ms": c.TS_MS,
    "date": DAY,
    "hourmin": HOUR,
    TAB: TAB,
    "is_click": "is_click",
}
_KINDS: Final = (("is_like", "like"), ("is_hate", "dislike"))
_DONE: Final = {name: name for name, _ in _KINDS}
_PUBLISHED_USERS: Final = "user_features_*"
_PUBLISHED_VIDEOS: Final = "video_features_basic_*"
_HISTORY: Final = {c.USER_ID: c.USER_ID, "watch_seq": PRIOR_HISTORY}
_VIDEO_CODES: Final = ("visible_status", "music_type")
"""Codes that the source stores as floats, because some are missing; so it does with some `onehot_feat*`."""


def read_kuairand(src: Path, _: ImportOptions) -> Source:
    """Read a folder with `log_*.parquet`, `users`, `videos` and `user_history_before_*.parquet`, or the published CSV.

    The published files are `log_*.csv`, `user_features_*.csv` and `video_features_basic_*.csv`. They have no histories,
    and their log also tells what a user did (`event_type`). Every impression is an event, clicked if `is_click`. The
    log's own `date` is the day of the app (UTC+8, and up to an hour off `time_ms` around midnight); hold-outs by date
    read it.

    Raises:
        DataError: files or columns are missing, or are not of their form.
    """
    published = next(src.rglob(_PUBLISHED_USERS), None) is not None
    read = read_tables(find_files(src, pattern="log_*"), _LOG | (_DONE if published else {}))
    read = renamed(read, "is_click", c.OUTCOME)
    log = plain(read.rows, NAME)
    check_codes(log, [c.OUTCOME, DAY, HOUR], f"{src}, the log")
    click = log[c.OUTCOME]
    if not set(pc.unique(click).to_pylist()) <= {0, 1}:
        raise DataError(f"{src}: is_click holds {pc.unique(click).to_pylist()[:5]}, expected 0 and 1")
    log = replaced(log, c.OUTCOME, pc.if_else(pc.equal(click, 1), c.CLICKED, c.IMPRESSED))
    if published:
        log = _with_types(log)
    log = replaced(log, DAY, _days(log[DAY], src))
    log = replaced(log, HOUR, pc.divide(log[HOUR], 100))
    videos, people = (
        read_tables(find_files(src, pattern=pattern)) if published else read_table(src / name)
        for pattern, name in ((_PUBLISHED_VIDEOS, "videos.parquet"), (_PUBLISHED_USERS, "users.parquet"))
    )
    videos = renamed(videos, "video_id", c.ITEM_ID)
    return Source(
        name=NAME,
        events=log,
        users=_with_codes(plain(people.rows, "users")) if published else _users(people.rows, src),
        items=_whole(plain(videos.rows, "videos"), _VIDEO_CODES),
        day=DAY,
        columns={"events": read.columns, "users": people.columns, "items": videos.columns},
    )


def _users(people: pa.Table, src: Path) -> pa.Table:
    """People's features and `prior_history`: the videos before the log, in their order, none where unknown."""
    users = _with_codes(plain(people, "users"))
    history = plain(read_tables(find_files(src, pattern="user_history_before_*"), _HISTORY).rows, "histories")
    if c.USER_ID not in users.column_names:
        return users  # refused with the other checks
    kind = history.schema.field(PRIOR_HISTORY).type
    if not pa.types.is_list(kind):
        raise DataError(f"{src}: watch_seq is of type {kind}, expected lists of videos")
    own, others = (
        as_ids(table[c.USER_ID], f"{src}, user_id of {name}")
        for table, name in ((users, "users"), (history, "histories"))
    )
    if own.type != others.type:
        raise DataError(f"{src}: user_id is {own.type} in users and {others.type} in histories: write it in one type")
    row = pc.index_in(own, value_set=others.combine_chunks())
    videos = history[PRIOR_HISTORY].combine_chunks().take(row.combine_chunks())
    return users.append_column(PRIOR_HISTORY, split(videos, None, PRIOR_HISTORY))


def _with_codes(users: pa.Table) -> pa.Table:
    """People's features with whole numbers as codes."""
    return _whole(users, tuple(name for name in users.column_names if name.startswith("onehot_feat")))


def _with_types(log: pa.Table) -> pa.Table:
    """The log with what a user did: the strongest of a dislike, a like, a click and a view."""
    kinds = pa.repeat(pa.scalar("view"), log.num_rows)
    for done, kind in ((pc.equal(log[c.OUTCOME], c.CLICKED), "click"), *((log[name], kind) for name, kind in _KINDS)):
        kinds = pc.if_else(pc.fill_null(pc.cast(done, pa.bool_()), False), kind, kinds)
    return log.drop_columns([name for name, _ in _KINDS]).append_column(c.EVENT_TYPE, kinds)


def _days(date: pa.ChunkedArray, src: Path) -> pa.ChunkedArray:
    """Integers like 20220503 as days."""
    try:
        return pc.strptime(date.cast(pa.string()), format="%Y%m%d", unit="s").cast(pa.date32())
    except pa.ArrowException as error:
        raise DataError(f"{src}: the column date of the log holds something else than YYYYMMDD: {error}") from None


def _whole(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """The table with some columns of floats as integers."""
    for name in set(names).intersection(table.column_names):
        try:
            table = replaced(table, name, table[name].cast(pa.int64()))
        except pa.ArrowException as error:
            raise DataError(f"{NAME}, column {name} holds codes that are no integers: {error}") from None
    return table
