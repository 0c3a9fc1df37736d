"""Where the events of a workspace are opened for reading: their days, their files, their columns.

A workspace may be written by somebody's own job. So this is where a column of another type, or two columns that an
engine would take for one, are refused; and columns get names of ours, so that no name of theirs is one of ours.
"""

import datetime
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import parquet_files
from twotower.schema.tables import require_columns

CONTEXT = "context."
"""Before the name of a context column, raw or encoded."""
WEIGHED_BY = "weighed_by"
"""The column that weighs a positive."""

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


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


def first_of(
    partitions: dict[str, list[Path]], first_day: str | None, last_day: str | None, days: int, today: str
) -> str:
    """The first of so many days up to the last one that the log has."""
    if first_day:
        raise ConfigError(
            f"samples.first_day = {first_day} and samples.days = {days} both choose a beginning: give one"
        )
    if c.UNKNOWN_DATE in partitions:
        raise ConfigError("samples.days chooses by time, but the events have none: leave it out")
    last = datetime.date.fromisoformat(last_of(partitions, last_day, today))
    return str(last - datetime.timedelta(days=min(days, last.toordinal()) - 1))


def last_of(partitions: dict[str, list[Path]], last_day: str | None, today: str) -> str:
    """The last day of the log up to the chosen one, and never one that is still to come."""
    last = min(last_day or today, today)
    return max((day for day in partitions if day <= last), default=max(partitions))


def chosen(partitions: dict[str, list[Path]], first_day: str | None, last_day: str | None) -> dict[str, list[Path]]:
    """The partitions up to the last day: earlier ones than the first day are needed for histories."""
    if not first_day and not last_day:
        return partitions
    if c.UNKNOWN_DATE in partitions:
        raise ConfigError("samples.first_day and last_day choose by time, but the events have none: leave them out")
    if first_day and last_day and first_day > last_day:
        raise ConfigError(f"samples.first_day = {first_day} is after samples.last_day = {last_day}")
    days = list(partitions)
    if not any((first_day or day) <= day <= (last_day or day) for day in days):
        raise ConfigError(
            f"no events from samples.first_day = {first_day or days[0]} to samples.last_day = {last_day or days[-1]}: "
            f"there are days from {days[0]} to {days[-1]}"
        )
    return {day: files for day, files in partitions.items() if day <= (last_day or day)}


@dataclass(frozen=True)
class StoredEvents:
    """The columns of events that a job reads, under names of ours, whatever names a workspace has for its own."""

    schema: pa.Schema
    """Our names and types. A context column is behind `context.`, the weight is `weighed_by`."""
    names: Mapping[str, str]
    """By our name, that in the files."""
    taken: frozenset[str]
    """All names in the files."""


def stored_events(  # noqa: PLR0912  one check after the other
    files_of_days: Mapping[str, Sequence[Path]],
    users: pa.Table,
    items: pa.Table,
    context: Sequence[str],
    weight: str | None,
    positions: bool,
) -> StoredEvents:
    """The columns to read and the type of each over all files; a context column may be absent from some, not from all.

    Args:
        files_of_days: the Parquet files of each day.
        users: the users, by id.
        items: the items, by id.
        context: columns of contexts.
        weight: the column that weighs a positive; None = there is none.
        positions: positions are read, so that they must be numbers.

    Raises:
        DataError: a file is unreadable, a column is missing, not of the type of joined events, or there twice.
        ConfigError: a context column is in no file.
    """
    integers = [c.EVENT_SEQ, c.REQUEST_TS_MS, c.CLICK_TS_MS]
    own = [*integers, c.USER_ID, c.ITEM_ID, c.OUTCOME]
    needed = [*own, *([weight] if weight else [])]
    names = {name: name for name in (*own, c.POSITION)} | {f"{CONTEXT}{name}": name for name in context}
    if weight:
        names[WEIGHED_BY] = weight
    seen: set[str] = set()
    read: dict[pa.Schema, None] = {}
    for path in itertools.chain(*files_of_days.values()):
        try:
            stored = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is no readable Parquet file: {error}") from None
        require_columns(stored, needed, "/".join(path.parts[-3:]))
        seen.update(stored.names)
        _refuse_alike(stored.names, {name for name in names.values() if name in stored.names}, path)
        read[
            pa.schema([(our, _plain(stored.field(name).type)) for our, name in names.items() if name in stored.names])
        ] = None
    if absent := [name for name in context if name not in seen]:
        raise ConfigError(
            f"features.context.{absent[0]}: no such column in events/; there are {', '.join(sorted(seen))}"
        )
    _refuse_alike(sorted(seen), seen & set(names.values()), Path("events"))
    try:
        types = pa.unify_schemas(list(read), promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"events: a column has another type in some files: {error}") from None
    for name in integers:
        if not (pa.types.is_integer(types.field(name).type) or pa.types.is_null(types.field(name).type)):
            due = "int64" if name == c.EVENT_SEQ else "int64 milliseconds"
            raise DataError(f"events: column {name} is of type {types.field(name).type}, where {due} are due")
    if not pa.types.is_string(types.field(c.OUTCOME).type):
        raise DataError(f"events: column {c.OUTCOME} is of type {types.field(c.OUTCOME).type}, where strings are due")
    if weight and not _is_number(types.field(WEIGHED_BY).type):
        raise DataError(
            f"events: column {weight} is of type {types.field(WEIGHED_BY).type}, where numbers are due as weights"
        )
    if positions and c.POSITION in types.names:
        kind = types.field(c.POSITION).type
        if not (_is_number(kind) or pa.types.is_null(kind)):
            raise DataError(
                f"events: column {c.POSITION} is of type {kind}, where rankers need int32: the place on the page, from "
                "1. Cast it, give it another name, or leave models.rankers out"
            )
    inner = {name: pa.int64() for name in integers}
    for table, name in ((users, c.USER_ID), (items, c.ITEM_ID)):
        inner[name] = table.schema.field(name).type
        kind = types.field(name).type
        if not (pa.types.is_string(kind) if pa.types.is_string(inner[name]) else pa.types.is_integer(kind)):
            raise DataError(
                f"events: {name} is of type {kind}, in {name.removesuffix('_id')}s.parquet it is {inner[name]}: "
                "write both alike"
            )
    schema = pa.schema([(our, inner.get(our, types.field(our).type)) for our in names if our in types.names])
    return StoredEvents(schema, {our: names[our] for our in schema.names}, frozenset(seen))


def _refuse_alike(stored: Sequence[str], read: Collection[str], where: Path) -> None:
    """Refuse a column that is read and has the name of another but for upper and lower case.

    Raises:
        DataError: there is one. Engines do not tell such names apart.
    """
    for name in sorted(read):
        alike = [other for other in stored if other.casefold() == name.casefold()]
        if len(alike) > 1:
            raise DataError(
                f"{'/'.join(where.parts[-3:])} has the columns {' and '.join(alike)}, which engines take for one: "
                "rename or remove one of them"
            )


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of what a file holds, however it is written."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.string() if pa.types.is_large_string(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal))
