"""Opens the events of a workspace: their days, their files, their columns.

Another job may have written the workspace. So columns of another type are refused, and two columns whose names an
engine does not tell apart. All columns get new names, with which no name in the files can collide.
"""

import datetime
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.samples.names import CONTEXT, WEIGHED_BY
from twotower.samples.options import SamplesOptions
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files
from twotower.schema.tables import is_text, require_columns, value_type

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_INTEGERS = (c.EVENT_SEQ, c.REQUEST_TS_MS, c.CLICK_TS_MS)
NO_TIME = "samples.first_day and last_day choose by time, but the events have none: leave them out"


def partitions(folder: Path) -> dict[str, list[Path]]:
    """The files of each day of `events/`, days in their order, or of the one partition without time."""
    partitions: dict[str, list[Path]] = {}
    for own in sorted(folder.glob(f"{c.DATE}=*")):
        if files := parquet_files(own):
            partitions[own.name.removeprefix(f"{c.DATE}=")] = files
    if not partitions:
        raise DataError(f"{folder} has no date=*/*.parquet: import or simulate a workspace first")
    for day in partitions.keys() - {c.UNKNOWN_DATE}:
        if not _DAY.fullmatch(day):
            raise DataError(f"{folder} has a partition date={day}: a day is written YYYY-MM-DD, or {c.UNKNOWN_DATE}")
    if c.UNKNOWN_DATE in partitions and len(partitions) > 1:
        raise DataError(f"{folder} has days and date={c.UNKNOWN_DATE}: give all events a time, or none")
    return partitions


@dataclass(frozen=True)
class Days:
    """The days of a log that samples are made of."""

    files: Mapping[str, Sequence[Path]]
    """The files of each day up to the last; those before the first are read for histories."""
    first: str
    """Day of the first positives; empty = all days have them."""
    last: str
    """The last day that is read, and never one that is still to come; `unknown` without time."""


def choose_days(folder: Path, options: SamplesOptions, today: str) -> Days:
    """The days of `events/` that the options ask for.

    Raises:
        DataError: there are no events, or their folders are not days.
        ConfigError: the options choose by time where there is none, contradict each other, or choose no day.
    """
    stored = partitions(folder)
    first, last = options.first_day, options.last_day
    if c.UNKNOWN_DATE in stored and options.days is not None:
        raise ConfigError("samples.days chooses by time, but the events have none: leave it out")
    if c.UNKNOWN_DATE in stored and (first or last):
        raise ConfigError(NO_TIME)
    latest = max((day for day in stored if day <= min(last or today, today)), default=max(stored))
    if options.days is not None:
        end = datetime.date.fromisoformat(latest)
        first = str(end - datetime.timedelta(days=min(options.days, end.toordinal()) - 1))
    if first and last and first > last:
        raise ConfigError(f"samples.first_day = {first} is after samples.last_day = {last}")
    days = list(stored)
    if not any((first or day) <= day <= (last or day) for day in days):
        raise ConfigError(
            f"no events from samples.first_day = {first or days[0]} to samples.last_day = {last or days[-1]}: "
            f"there are days from {days[0]} to {days[-1]}"
        )
    return Days({day: files for day, files in stored.items() if day <= (last or day)}, first or "", latest)


@dataclass(frozen=True)
class StoredEvents:
    """The columns of events that a job reads, with their names in the job and in the files."""

    schema: pa.Schema
    """Names and types of the job. A context column is named `context.NAME`, the weight `weighed_by`."""
    names: Mapping[str, str]
    """The name in the files, by the name of the job."""
    taken: frozenset[str]
    """All names in the files."""


def stored_events(
    files_of_days: Mapping[str, Sequence[Path]],
    users: pa.Table,
    items: pa.Table,
    *,
    context: Sequence[str],
    weight: str | None,
    positions: bool,
) -> StoredEvents:
    """The columns to read and the type of each over all files; a context column may be absent from some, not from all.

    Ids have the type of `users` and `items`. With `positions`, these are read and must be numbers.

    Raises:
        DataError: a file is unreadable, a column is missing, not of the type of joined events, or present twice.
        ConfigError: a context column is in no file.
    """
    own = [*_INTEGERS, c.USER_ID, c.ITEM_ID, c.OUTCOME]
    names = {name: name for name in (*own, c.POSITION)} | {f"{CONTEXT}{name}": name for name in context}
    if weight:
        own, names[WEIGHED_BY] = [*own, weight], weight
    seen: set[str] = set()
    schemas: dict[pa.Schema, None] = {}
    for path in itertools.chain(*files_of_days.values()):
        stored = _schema(path, own)
        seen.update(stored.names)
        there = {our: name for our, name in names.items() if name in stored.names}
        _refuse_alike(stored.names, set(there.values()), path)
        schemas[pa.schema([(our, _plain(stored.field(name).type)) for our, name in there.items()])] = None
    if absent := [name for name in context if name not in seen]:
        raise ConfigError(
            f"features.context.{absent[0]}: no such column in events/; there are {', '.join(sorted(seen))}"
        )
    _refuse_alike(sorted(seen), seen & set(names.values()), Path("events"))
    try:
        types = pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"events: a column has another type in some files: {error}") from None
    _check_types(types, weight, positions)
    ids = {c.USER_ID: users.schema.field(c.USER_ID).type, c.ITEM_ID: items.schema.field(c.ITEM_ID).type}
    for name, inner in ids.items():
        kind = types.field(name).type
        if not (pa.types.is_string(kind) if pa.types.is_string(inner) else pa.types.is_integer(kind)):
            raise DataError(
                f"events: {name} is of type {kind}, in {name.removesuffix('_id')}s.parquet it is {inner}: "
                "write both alike"
            )
    ours = {**dict.fromkeys(_INTEGERS, pa.int64()), **ids}
    schema = pa.schema([(our, ours.get(our, types.field(our).type)) for our in names if our in types.names])
    return StoredEvents(schema, {our: names[our] for our in schema.names}, frozenset(seen))


def _schema(path: Path, needed: Sequence[str]) -> pa.Schema:
    try:
        stored = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from None
    require_columns(stored, needed, "/".join(path.parts[-3:]))
    return stored


def _check_types(types: pa.Schema, weight: str | None, positions: bool) -> None:
    """Refuse a column of joined events that is of another type."""
    kinds = {name: types.field(name).type for name in types.names}
    for name in _INTEGERS:
        if not (pa.types.is_integer(kinds[name]) or pa.types.is_null(kinds[name])):
            expected = "int64" if name == c.EVENT_SEQ else "int64 milliseconds"
            raise DataError(f"events: column {name} is of type {kinds[name]}, where {expected} is expected")
    if not pa.types.is_string(kinds[c.OUTCOME]):
        raise DataError(f"events: column {c.OUTCOME} is of type {kinds[c.OUTCOME]}, where strings are expected")
    if weight and not _is_number(kinds[WEIGHED_BY]):
        raise DataError(
            f"events: column {weight} is of type {kinds[WEIGHED_BY]}, where numbers are expected as weights"
        )
    place = kinds.get(c.POSITION, pa.null())
    if positions and not (_is_number(place) or pa.types.is_null(place)):
        raise DataError(
            f"events: column {c.POSITION} is of type {place}, where rankers need int32: the place on the page, from "
            "1. Cast it, give it another name, or leave models.rankers out"
        )


def _refuse_alike(stored: Sequence[str], read: Collection[str], where: Path) -> None:
    """Refuse a column that is read, if another name differs only in case: engines do not tell such names apart."""
    for name in sorted(read):
        alike = [other for other in stored if other.casefold() == name.casefold()]
        if len(alike) > 1:
            raise DataError(
                f"{'/'.join(where.parts[-3:])} has the columns {' and '.join(alike)}, which engines take for one: "
                "rename or remove one of them"
            )


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of what a file holds, however it is written."""
    return pa.string() if is_text(value_type(kind)) else value_type(kind)


def _is_number(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))
