"""Globo (G1 news): clicks with session, device, region and referrer; articles live for hours."""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.sources import find_files, read_tables
from twotower.datasets.tables import DAY_MS, Source
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError

NAME: Final = "globo"
HOUR: Final = "hour"
HOUR_MS: Final = 3_600_000

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


def read_globo(src: Path, positive: str) -> Source:
    """Read a folder with `clicks_*.parquet`, or the original `clicks_hour_*.csv`; or one such file.

    Every row is a click; `request_id` is the session, `hour` that of UTC. Articles and people have ids only.

    Args:
        src: the folder or file.
        positive: `all`: every click. There are no ratings.

    Raises:
        ConfigError: another `positive`.
        DataError: files or columns are missing, or are not of their form.
    """
    if positive != "all":
        raise ConfigError(f"--positive {positive}: {NAME} has clicks, no ratings; use `all`")
    clicks = read_tables(find_files(src, pattern="clicks_*"), _CLICKS)
    ts_ms = clicks[c.TS_MS]
    if not pa.types.is_integer(ts_ms.type):
        raise DataError(f"{src}: click_timestamp is of type {ts_ms.type}, not whole milliseconds")
    days = pc.multiply(pc.divide(ts_ms, DAY_MS), DAY_MS)
    return Source(name=NAME, events=clicks.append_column(HOUR, pc.divide(pc.subtract(ts_ms, days), HOUR_MS)))
