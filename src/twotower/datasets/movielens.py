"""MovieLens-1M: ratings as positives and impressions, with people's and films' features."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.options import ImportOptions
from twotower.datasets.sources import read_lines, read_table
from twotower.datasets.tables import Source, parse_positive, replaced
from twotower.schema import columns as c
from twotower.schema.errors import DataError

NAME: Final = "movielens-1m"
USER_SEQ: Final = "user_seq"
TITLE: Final = "title"
YEAR: Final = "year"

_RATINGS: Final = {"user_id": c.USER_ID, "movie_id": c.ITEM_ID, "rating": c.WEIGHT, "timestamp": c.TS_MS}
_USERS: Final = {
    c.USER_ID: pa.int64(),
    "gender": pa.string(),
    "age": pa.int64(),
    "occupation": pa.int64(),
    "zip": pa.string(),
}
_FILMS: Final = {"movie_id": c.ITEM_ID, TITLE: TITLE, "genres": "genres", YEAR: YEAR}


def read_movielens(src: Path, options: ImportOptions) -> Source:
    """Read a folder with `ratings`, `users` and `movies`: as Parquet, or GroupLens's own `.dat` files.

    Seconds become milliseconds. Ratings of a user in the same second are ordered by `user_seq` where the Parquet file
    has it, else by a hash.

    Raises:
        ConfigError: `positive` is neither `all` nor a rating.
        DataError: files or columns are missing, or are not of their form.
    """
    minimum = parse_positive(options.positive)
    if (src / "ratings.parquet").exists():
        stored = read_table(src / "ratings.parquet").rows.column_names
        finer = {USER_SEQ: USER_SEQ} if USER_SEQ in stored else {}
        ratings = read_table(src / "ratings.parquet", _RATINGS | finer)
        users = read_table(src / "users.parquet", {name: name for name in _USERS})
        films = read_table(src / "movies.parquet", _FILMS)
    elif (src / "ratings.dat").exists():
        ratings = read_lines(src / "ratings.dat", {name: pa.int64() for name in _RATINGS.values()})
        users = read_lines(src / "users.dat", _USERS)
        films = read_lines(src / "movies.dat", {c.ITEM_ID: pa.int64(), TITLE: pa.string(), "genres": pa.string()})
        title = films.rows[TITLE]
        year = pc.struct_field(pc.extract_regex(title, r"\((?P<year>\d{4})\)\s*$"), "year")
        films = replace(films, rows=films.rows.append_column(YEAR, year.cast(pa.int64())))
    else:
        raise DataError(f"{src} has neither ratings.parquet nor ratings.dat: unpack MovieLens-1M and give its folder")
    rows, seconds = ratings.rows, ratings.rows[c.TS_MS]
    if not pa.types.is_integer(seconds.type):
        raise DataError(f"{src}: the timestamps are of type {seconds.type}, not whole seconds")
    return Source(
        name=NAME,
        events=replaced(rows, c.TS_MS, pc.multiply(seconds.cast(pa.int64()), 1000)),
        users=users.rows,
        items=films.rows,
        minimum=minimum,
        order=(USER_SEQ,) if USER_SEQ in rows.column_names else (),
        columns={"events": ratings.columns, "users": users.columns, "items": films.columns},
    )
