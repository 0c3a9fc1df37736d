"""KuaiRand-Pure: every impression of a short-video feed with its click, in the scene (`tab`) where it was shown."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.options import ImportOptions
from twotower.datasets.sources import find_files, read_table, read_tables
from twotower.datasets.tables import Source, check_codes, plain
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
    "is_click": c.OUTCOME,
}
_HISTORY: Final = {c.USER_ID: c.USER_ID, "watch_seq": PRIOR_HISTORY}
_VIDEO_CODES: Final = ("visible_status", "music_type")
"""Codes that the source stores as floats, because some are missing; so it does with some `onehot_feat*`."""


def read_kuairand(src: Path, _: ImportOptions) -> Source:
    """Read a folder with `log_*.parquet`, `users`, `videos` and `user_history_before_*.parquet`.

    Every impression is an event, clicked if `is_click`. The log's own `date` is the day of the app (UTC+8, and up to an
    hour off `time_ms` around midnight); hold-outs by date read it.

    Raises:
        DataError: files or columns are missing, or are not of their form.
    """
    read = read_tables(find_files(src, pattern="log_*"), _LOG)
    log = plain(read.rows, NAME)
    check_codes(log, [c.OUTCOME, DAY, HOUR], f"{src}, the log")
    click = log[c.OUTCOME]
    if not set(pc.unique(click).to_pylist()) <= {0, 1}:
        raise DataError(f"{src}: is_click holds {pc.unique(click).to_pylist()[:5]}, expected 0 and 1")
    replaced = {
        c.OUTCOME: pc.if_else(pc.equal(click, 1), c.CLICKED, c.IMPRESSED),
        DAY: _days(log[DAY], src),
        HOUR: pc.divide(log[HOUR], 100),
    }
    for name, column in replaced.items():
        log = log.set_column(log.schema.get_field_index(name), name, column)
    videos = read_table(src / "videos.parquet")
    items = videos.rows
    if "video_id" in items.column_names:
        items = items.rename_columns({"video_id": c.ITEM_ID})
    people = read_table(src / "users.parquet")
    return Source(
        name=NAME,
        events=log,
        users=_users(people.rows, src),
        items=_whole(plain(items, "videos"), _VIDEO_CODES),
        day=DAY,
        columns={
            "events": read.columns,
            "users": people.columns,
            "items": [replace(one, to=c.ITEM_ID) if one.to == "video_id" else one for one in videos.columns],
        },
    )


def _users(people: pa.Table, src: Path) -> pa.Table:
    """People's features and `prior_history`: the videos of before the log, in their order, none where unknown."""
    users = plain(people, "users")
    users = _whole(users, tuple(name for name in users.column_names if name.startswith("onehot_feat")))
    history = plain(read_tables(find_files(src, pattern="user_history_before_*"), _HISTORY).rows, "histories")
    if c.USER_ID not in users.column_names:
        return users  # refused with the other checks
    if not pa.types.is_list(history.schema.field(PRIOR_HISTORY).type):
        kind = history.schema.field(PRIOR_HISTORY).type
        raise DataError(f"{src}: watch_seq is of type {kind}, expected lists of videos")
    ids = [
        as_ids(table[c.USER_ID], f"{src}, user_id of {name}")
        for table, name in ((users, "users"), (history, "histories"))
    ]
    if ids[0].type != ids[1].type:
        raise DataError(
            f"{src}: user_id is {ids[0].type} in users and {ids[1].type} in histories: write it in one type"
        )
    row = pc.index_in(ids[0], value_set=ids[1].combine_chunks())
    videos = history[PRIOR_HISTORY].combine_chunks().take(row.combine_chunks())
    lengths = pc.fill_null(pc.list_value_length(videos), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return users.append_column(PRIOR_HISTORY, pa.ListArray.from_arrays(pa.array(offsets), videos.flatten()))


def _days(date: pa.ChunkedArray, src: Path) -> pa.ChunkedArray:
    """Integers like 20220503 as days."""
    try:
        return pc.strptime(date.cast(pa.string()), format="%Y%m%d", unit="s").cast(pa.date32())
    except pa.ArrowException as error:
        raise DataError(f"{src}: the column date of the log holds something else than YYYYMMDD: {error}") from None


def _whole(table: pa.Table, names: tuple[str, ...]) -> pa.Table:
    """The table with some columns of floats as integers."""
    for name in set(names).intersection(table.column_names):
        place = table.schema.get_field_index(name)
        try:
            table = table.set_column(place, name, table[name].cast(pa.int64()))
        except pa.ArrowException as error:
            raise DataError(f"{NAME}, column {name} holds codes that are no integers: {error}") from None
    return table
