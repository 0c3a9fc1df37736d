"""Your own interactions: a Parquet or CSV file, or a folder of them."""

from pathlib import Path
from typing import Final

import pyarrow as pa

from twotower.datasets.sources import find_files, read_table, read_tables
from twotower.datasets.tables import Source, parse_positive
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError

NAME: Final = "interactions"
RATING: Final = "rating"


def read_interactions(
    src: Path, positive: str, users: Path | None = None, items: Path | None = None, test: Path | None = None
) -> Source:
    """Read `user_id`, `item_id`, where known `ts_ms`, `weight` or `rating`, `outcome`, `request_id`, and context.

    Rows of a user with the same request and time are one request: a page of impressions.

    Args:
        src: a file, or a folder of files with the same columns.
        positive: `all`, or the least weight or rating of a positive.
        users: `user_id` and features; absent = the users of the interactions.
        items: `item_id` and features; absent = the items of the interactions.
        test: a file that is not of the interactions, though it may lie in their folder.

    Raises:
        ConfigError: `positive` is a number, but the rows say their outcome themselves.
        DataError: a file is missing or damaged.
    """
    minimum = parse_positive(positive)
    beside = [path for path in (users, items, test) if path is not None]
    events = with_weight(read_tables(find_files(src, without=beside)), str(src))
    if minimum is not None and c.OUTCOME in events.column_names:
        raise ConfigError(f"--positive {positive}: {src} has a column {c.OUTCOME}, which says what is a positive")
    return Source(
        name=NAME,
        events=events,
        users=None if users is None else read_table(users),
        items=None if items is None else read_table(items),
        minimum=minimum,
        requests_have_rows=c.REQUEST_ID in events.column_names,
    )


def read_test(path: Path, minimum: float | None) -> pa.Table:
    """Read held-out interactions: `user_id`, `item_id`, where known `ts_ms`, `weight` or `rating`, `outcome`.

    Without a weight and an outcome every row counts as a positive, whatever the least rating of training is.

    Args:
        path: a Parquet or CSV file.
        minimum: the least weight of a positive; absent = all.

    Raises:
        DataError: the file is missing or damaged.
    """
    test = with_weight(read_table(path), str(path))
    kept = [name for name in (c.USER_ID, c.ITEM_ID, c.TS_MS, c.WEIGHT, c.OUTCOME) if name in test.column_names]
    test = test.select(kept)
    if minimum is not None and c.WEIGHT not in kept and c.OUTCOME not in kept:
        test = test.append_column(c.OUTCOME, pa.array([c.CLICKED] * test.num_rows, pa.string()))
    return test


def with_weight(table: pa.Table, where: str) -> pa.Table:
    """The table with its `rating` under the name `weight`.

    Raises:
        DataError: it has both.
    """
    if RATING not in table.column_names:
        return table
    if c.WEIGHT in table.column_names:
        raise DataError(f"{where} has both {RATING} and {c.WEIGHT}, which are one thing here: keep one")
    return table.rename_columns({RATING: c.WEIGHT})
