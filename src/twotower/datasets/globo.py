"""Globo (G1 news): clicks with session, device, region and referrer; articles live for hours.

A hold-out has no contexts, so what a user's first click tells of them is kept as features.
"""

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.options import ImportOptions
from twotower.datasets.sources import find_files, read_tables
from twotower.datasets.tables import Source, check_codes
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, HOUR_MS
from twotower.schema.errors import DataError

NAME: Final = "globo"
HOUR: Final = "hour"

_CLICKS: Final = {
    "user_id": c.USER_ID,
    "click_article_id": c.ITEM_ID,
    "click_timestamp": c.TS_MS,
    "session_id": c.REQUEST_ID,
    "click_deviceGroup": "device_group",
    "click_os": "os",
    "click_environment": "environment",
    "click_country": "country",
    "click_region": "region",
    "click_referrer_type": "referrer_type",
}

FIRST: Final = "first_"
"""Before the name of what a user's first click tells of them."""
_OF_USERS: Final = ("device_group", "os", "country", "region")


def read_globo(src: Path, _: ImportOptions) -> Source:
    """Read a folder with `clicks_*.parquet`, or the original `clicks_hour_*.csv`; or one such file.

    Every row is a click; `request_id` is the session, `hour` that of UTC. Articles have ids only; people have the
    device, system, country and region of their first click.

    Raises:
        DataError: files or columns are missing, or are not of their form.
    """
    read = read_tables(find_files(src, pattern="clicks_*"), _CLICKS)
    clicks = read.rows
    check_codes(clicks, [c.USER_ID, c.ITEM_ID, c.REQUEST_ID, *_OF_USERS], str(src), text=True)
    ts_ms = clicks[c.TS_MS]
    if not pa.types.is_integer(ts_ms.type):
        raise DataError(f"{src}: click_timestamp is of type {ts_ms.type}, not whole milliseconds")
    days = pc.multiply(pc.divide(ts_ms, DAY_MS), DAY_MS)
    events = clicks.append_column(HOUR, pc.divide(pc.subtract(ts_ms, days), HOUR_MS))
    return Source(name=NAME, events=events, users=_users(clicks), columns={"events": read.columns})


def _users(clicks: pa.Table) -> pa.Table:
    """The device, system, country and region of each user's first click; of those at one time, the lowest codes."""
    clicks = clicks.select([c.USER_ID, c.TS_MS, *_OF_USERS]).filter(pc.is_valid(clicks[c.USER_ID]))
    clicks = clicks.sort_by([(name, "ascending") for name in (c.USER_ID, c.TS_MS, *_OF_USERS)])
    _, first = np.unique(clicks[c.USER_ID].to_numpy(), return_index=True)
    users = clicks.take(pa.array(first)).drop_columns([c.TS_MS])
    return users.rename_columns([c.USER_ID, *(FIRST + name for name in _OF_USERS)])
