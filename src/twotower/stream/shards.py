"""Shards on disk: joined rows of a range of offsets of one partition of the log, and the manifest that commits them.

    shards/partition-0000/joiner.lock                 held by the joiner of the partition
    shards/partition-0000/<begin>-<end>.tfrecord      rows, in the order in which they left; offsets in 20 digits
    shards/partition-0000/<begin>-<end>.json          the manifest

A shard is there when its manifest is: that is the last thing written, in one rename, and it carries how far the log was
read and what the joiner needs to go on. The rows of a partition are numbered through all shards; merging small shards
changes neither rows nor numbers.
"""

import functools
import itertools
import os
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from twotower.logs import EventLog
from twotower.schema.clock import DAY_MS, day_of
from twotower.schema.errors import DataError
from twotower.schema.files import TEMPORARY, read_json, sha256, whole_file, write_json
from twotower.stream.clock import Clock, JoinProgress
from twotower.stream.decode import decode_rows
from twotower.stream.example import encode_rows
from twotower.stream.joiner import Counts, Replay
from twotower.stream.rows import Row, Types, UserId
from twotower.stream.tfrecord import Records, read_records, write_records

FORMAT: Final = 2
"""1 has the history and the features of a request in each of its rows; both are read."""
_MANIFEST: Final = re.compile(r"(\d{20})-(\d{20})\.json")
_PARTITION: Final = re.compile(r"partition-(\d{4,})")
_TYPES: Final = {
    "int64": pa.int64(),
    "int32": pa.int32(),
    "bool": pa.bool_(),
    "float32": pa.float32(),
    "string": pa.string(),
}
_NAMES: Final = {kind: name for name, kind in _TYPES.items()}
_LIST: Final = "list of "
_PLAIN: Final = (
    "partition",
    "begin",
    "end",
    "first_row",
    "rows",
    "hour",
    "outcomes",
    "watermark_ms",
    "bytes",
    "sha256",
)
"""Fields of a manifest that JSON has as they are."""


@dataclass(frozen=True)
class Day:
    """The rows of one day in a shard."""

    rows: int
    last_row: int
    """The number of the last of them."""


@dataclass(frozen=True)
class Deleted:
    """A user who was deleted: nothing of theirs with a smaller number is to be kept."""

    user_id: UserId
    row: int


@dataclass(frozen=True)
class State:
    """What the joiner needs to go on behind a shard."""

    replay: Replay
    flushes: tuple[int, ...] = ()
    """Offsets before which every window was closed, as far back as the replay reaches."""


@dataclass(frozen=True)
class Manifest:
    """What is in a shard, and how far the log has been read."""

    partition: int
    begin: int
    """Offset of the log from which it was read."""
    end: int
    """Offset at which reading goes on."""
    first_row: int
    """Number of its first row in the partition."""
    rows: int
    hour: int | None
    """Hour since 1970 of the event time at its beginning; shards of one hour may be merged."""
    days: Mapping[str, Day]
    """By day of UTC of the request."""
    outcomes: Mapping[str, int]
    """Rows by outcome."""
    watermark_ms: int | None
    """Event time that is joined at its end; None before any event."""
    counts: Counts
    state: State
    schema: pa.Schema
    """Columns of its rows."""
    bytes: int
    sha256: str
    deleted: tuple[Deleted, ...] = ()
    """Users who were deleted while it was read."""

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        return shard_name(self.begin, self.end)

    @property
    def end_row(self) -> int:
        """Number of the row behind its last."""
        return self.first_row + self.rows


@dataclass(frozen=True)
class _Contents:
    """What rows are in a shard."""

    days: dict[str, Day] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)


def shard_name(begin: int, end: int) -> str:
    """The name of a shard's files, without their endings.

    >>> shard_name(0, 4711)
    '00000000000000000000-00000000000000004711'
    """
    return f"{begin:020d}-{end:020d}"


def partition_folder(folder: Path, partition: int) -> Path:
    """The shards of a partition."""
    return folder / f"partition-{partition:04d}"


def partitions(folder: Path) -> list[int]:
    """The partitions that have been joined."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for name in os.listdir(folder) if (found := _PARTITION.fullmatch(name)))


def progress_of(folder: Path, event_log: EventLog | None) -> dict[int, JoinProgress]:
    """How far each partition is joined, by its number.

    Args:
        folder: of all shards.
        event_log: which they are of; None = there is none any more, so that nothing is left to be joined.
    """
    numbers = set(partitions(folder)) | set(range(event_log.partitions if event_log is not None else 0))
    found = {}
    for number in sorted(numbers):
        known = manifests(folder, number)
        last = known[-1] if known else None
        at_end = event_log is None or not event_log.read(number, last.end if last else 0, 1)
        found[number] = JoinProgress(last.watermark_ms if last else None, at_end)
    return found


def manifests(folder: Path, partition: int, first_row: int = 0) -> list[Manifest]:
    """The manifests of a partition's shards, in order, from the one that holds a row on.

    Args:
        folder: of all shards.
        partition: of the log.
        first_row: shards that end before it are left out, and not even read.

    Raises:
        DataError: one is damaged or of another format, or shards are missing in between.
    """
    own = partition_folder(folder, partition)
    spans = _covering(_spans(own))
    found: list[Manifest] = []
    try:
        for begin, end in reversed(spans):
            found.append(read_manifest(own / f"{shard_name(begin, end)}.json"))
            if first_row and found[-1].first_row <= first_row:
                break
    except DataError:
        if _covering(_spans(own)) == spans:
            raise
        return manifests(folder, partition, first_row)  # they were merged meanwhile
    found.reverse()
    for before, after in itertools.pairwise(found):
        if (before.end, before.end_row) != (after.begin, after.first_row):
            raise DataError(
                f"{own}: {after.name} begins at offset {after.begin} and row {after.first_row}, but the shard before "
                f"it ends at offset {before.end} and row {before.end_row}: restore the shards in between"
            )
    return found


@dataclass(frozen=True)
class Usable:
    """The shards of a partition that can be used, and why others cannot."""

    manifests: list[Manifest]
    """In order. Where one is left out, the numbers of its rows are between those of its neighbours."""
    problems: list[str]
    """A sentence for each that cannot."""


def usable_manifests(folder: Path, partition: int, first_row: int = 0) -> Usable:
    """As `manifests`, but a damaged manifest hides its own rows alone: who only reads rows is not stopped by it."""
    try:
        return Usable(manifests(folder, partition, first_row), [])
    except DataError:
        own = partition_folder(folder, partition)
    found, problems = list[Manifest](), list[str]()
    for begin, end in _covering(_spans(own)):
        path = own / f"{shard_name(begin, end)}.json"
        try:
            manifest = read_manifest(path)
        except DataError as error:
            if path.exists():  # else it was merged meanwhile
                problems.append(str(error))
            continue
        if found and manifest.first_row < found[-1].end_row:
            problems.append(
                f"{path} begins at row {manifest.first_row}, the shard before it ends at {found[-1].end_row}"
            )
        elif manifest.end_row > first_row:
            found.append(manifest)
    return Usable(found, problems)


@dataclass(frozen=True)
class Parts:
    """Rows of a partition, by shard, and what cannot be read."""

    tables: list[pa.Table]
    rows: int
    """In the tables."""
    problems: list[str]
    """A sentence for each shard that cannot be read."""


def read_parts(folder: Path, partition: int, first_row: int, end_row: int) -> Parts:
    """The rows of a partition from a number up to another, shard by shard; what is damaged is left out and said."""
    usable = usable_manifests(folder, partition, first_row)
    parts, problems = list[pa.Table](), list(usable.problems)
    for found in usable.manifests:
        first, end = max(first_row, found.first_row), min(end_row, found.end_row)
        if first >= end:
            continue
        try:
            parts.append(read_shard(folder, found, first - found.first_row, end - found.first_row))
        except DataError as error:
            if not _path(folder, found).exists() and not _manifest_path(folder, found).exists():
                return read_parts(folder, partition, first_row, end_row)  # they were merged meanwhile
            problems.append(f"{end - first} rows: {error}")
    return Parts(parts, sum(part.num_rows for part in parts), problems)


@functools.lru_cache(maxsize=1 << 14)
def read_manifest(path: Path) -> Manifest:
    """One manifest; it is kept, for one of a name never changes, and who follows shards asks again and again.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") not in (1, FORMAT):
        raise DataError(f"{path} is no shard's manifest of format 1 or {FORMAT}: another version wrote it")
    named = _MANIFEST.fullmatch(path.name)
    try:
        numbers = [content[name] for name in ("partition", "begin", "end", "first_row", "rows", "bytes")]
        if any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError(f"numbers {numbers}")
        if named and numbers[1:3] != [int(named[1]), int(named[2])]:
            raise TypeError(f"offsets {numbers[1]} to {numbers[2]}")
        if content["watermark_ms"] is not None and type(content["watermark_ms"]) is not int:
            raise TypeError(f"watermark {content['watermark_ms']!r}")
        counts, state = content["counts"], content["state"]
        return Manifest(
            **{name: content[name] for name in _PLAIN},
            days={day: Day(**found) for day, found in content["days"].items()},
            counts=Counts(**{**counts, "dropped": Counter(counts["dropped"])}),
            state=State(Replay(state["replay"]["offset"], Clock(**state["replay"]["clock"])), tuple(state["flushes"])),
            schema=pa.schema([(name, _type(kind)) for name, kind in content["schema"]]),
            deleted=tuple(Deleted(**found) for found in content["deleted"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} is no whole manifest ({error!r}): it was damaged or written by something else"
        ) from None


def read_shard(
    folder: Path, manifest: Manifest, first: int = 0, end: int | None = None, columns: Iterable[str] | None = None
) -> pa.Table:
    """The rows of a shard, or those from a number on up to another within it; every checksum of it is checked.

    Args:
        folder: of all shards.
        manifest: of the shard.
        first: number of the first row within it.
        end: number behind the last; None = all.
        columns: that are wanted; None = all.

    Raises:
        DataError: the file is missing, damaged, or has other rows than the manifest says.
    """
    path = partition_folder(folder, manifest.partition) / f"{manifest.name}.tfrecord"
    end = manifest.rows if end is None else end
    records = read_records(path) if (first, end) == (0, manifest.rows) else _records(path, manifest.sha256)
    if len(records) != manifest.rows:
        raise DataError(f"{path} has {len(records)} rows, the manifest says {manifest.rows}: it was cut")
    try:
        wanted = manifest.schema if columns is None else pa.schema([manifest.schema.field(name) for name in columns])
        return decode_rows(records, first, end, wanted)
    except (DataError, pa.ArrowException, ValueError, LookupError, OverflowError) as error:
        raise DataError(f"{path}: {error}") from None


@functools.lru_cache(maxsize=1)
def _records(path: Path, sha256: str) -> Records:  # noqa: ARG001 - another content is another shard
    """The records of a shard that is read part by part, such as one of a whole hour; the latest is kept."""
    return read_records(path)


def read_rows(folder: Path, partition: int, first_row: int = 0, most_rows: int | None = None) -> pa.Table:
    """Rows of a partition from a number on, in order; fewer than were asked for at the end.

    Args:
        folder: of all shards.
        partition: of the log.
        first_row: number of the first row.
        most_rows: that are wanted; None = all.

    Raises:
        DataError: a shard that holds some of them is missing or damaged, or shards have columns of other types.
    """
    end_row = sys.maxsize if most_rows is None else first_row + most_rows
    known = manifests(folder, partition, first_row)
    wanted = [found for found in known if found.end_row > first_row and found.rows and found.first_row < end_row]
    try:
        parts = [
            read_shard(folder, found, max(0, first_row - found.first_row), min(found.rows, end_row - found.first_row))
            for found in wanted
        ]
    except DataError:
        if all(_path(folder, found).exists() for found in wanted):
            raise
        return read_rows(folder, partition, first_row, most_rows)  # they were merged meanwhile
    if not parts:
        return known[-1].schema.empty_table() if known else pa.table({})
    try:
        return pa.concat_tables(parts, promote_options="default")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder}: a column has another type in some shards: {error}") from None


def write_shard(
    folder: Path,
    batches: Sequence[Sequence[Row]],
    types: Types,
    *,
    partition: int,
    begin: int,
    end: int,
    first_row: int,
    hour: int | None,
    watermark_ms: int | None,
    counts: Counts,
    state: State,
    deleted: Sequence[Deleted] = (),
) -> Manifest:
    """Write a shard; it is there when this returns, and not before its manifest is.

    Args:
        folder: of all shards.
        batches: rows that left at the same event, in their order.
        types: of ids and values.
        partition: of the log.
        begin: offset from which the log was read.
        end: offset at which reading goes on.
        first_row: number of the first row in the partition.
        hour: of the event time at the beginning.
        watermark_ms: event time that is joined.
        counts: of the events read.
        state: what the joiner needs to go on.
        deleted: users who were deleted.
    """
    path = partition_folder(folder, partition) / f"{shard_name(begin, end)}.tfrecord"
    with whole_file(path) as temporary:
        write_records(temporary, encode_rows(batches, types))
    rows = list(itertools.chain.from_iterable(batches))
    contents = _contents(rows, first_row)
    manifest = Manifest(
        partition=partition,
        begin=begin,
        end=end,
        first_row=first_row,
        rows=len(rows),
        hour=hour,
        days=contents.days,
        outcomes=contents.outcomes,
        watermark_ms=watermark_ms,
        counts=counts,
        state=state,
        schema=types.schema(),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        deleted=tuple(deleted),
    )
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest: the commit of its shard."""
    content = {
        "format": FORMAT,
        "kind": "shard",
        **{name: getattr(manifest, name) for name in _PLAIN},
        "days": {day: asdict(found) for day, found in manifest.days.items()},
        "counts": {**vars(manifest.counts), "dropped": dict(sorted(manifest.counts.dropped.items()))},
        "state": asdict(manifest.state),
        "deleted": [asdict(found) for found in manifest.deleted],
        "schema": [[field.name, _name(field.type)] for field in manifest.schema],
    }
    write_json(partition_folder(folder, manifest.partition) / f"{manifest.name}.json", content)


def tidy(folder: Path, partition: int) -> None:
    """Remove what a killed joiner left: half files, shards without a manifest, and those that were merged."""
    own = partition_folder(folder, partition)
    spans = _spans(own)
    kept = {shard_name(*span) for span in _covering(spans)}
    for begin, end in spans:
        if (name := shard_name(begin, end)) not in kept:
            (own / f"{name}.json").unlink()
    for path in own.iterdir():
        if path.name.startswith(TEMPORARY) or (path.suffix == ".tfrecord" and path.stem not in kept):
            path.unlink()


def merge(folder: Path, small: Sequence[Manifest]) -> Manifest:
    """Make one shard out of several that follow each other; its rename replaces them, and then they are removed.

    Raises:
        DataError: one of them is not as its manifest says.
    """
    first, last = small[0], small[-1]
    own = partition_folder(folder, first.partition)
    merged = own / f"{shard_name(first.begin, last.end)}.tfrecord"
    with whole_file(merged) as temporary, temporary.open("wb") as out:
        for part in small:
            if sha256(_path(folder, part)) != part.sha256:
                raise DataError(f"{_path(folder, part)} does not have the SHA-256 of its manifest: it was damaged")
            out.write(_path(folder, part).read_bytes())
    days: dict[str, Day] = {}
    for part in small:
        for day, found in part.days.items():
            days[day] = Day(found.rows + (days[day].rows if day in days else 0), found.last_row)
    manifest = Manifest(
        partition=first.partition,
        begin=first.begin,
        end=last.end,
        first_row=first.first_row,
        rows=sum(part.rows for part in small),
        hour=first.hour,
        days=dict(sorted(days.items())),
        outcomes=_summed(part.outcomes for part in small),
        watermark_ms=last.watermark_ms,
        counts=total(part.counts for part in small),
        state=last.state,
        schema=last.schema,
        bytes=merged.stat().st_size,
        sha256=sha256(merged),
        deleted=tuple(found for part in small for found in part.deleted),
    )
    write_manifest(folder, manifest)
    for part in small:
        if part.name != manifest.name:
            (own / f"{part.name}.json").unlink(missing_ok=True)
            _path(folder, part).unlink(missing_ok=True)
    return manifest


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of counts."""
    summed = Counts()
    for one in counts:
        for name in ("events", "late", "duplicates", "unjoined", "before_request", "clock_jumps"):
            setattr(summed, name, getattr(summed, name) + getattr(one, name))
        summed.dropped.update(one.dropped)
    return summed


def _summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found = Counter[str]()
    for part in parts:
        found.update(part)
    return dict(sorted(found.items()))


def _path(folder: Path, manifest: Manifest) -> Path:
    return partition_folder(folder, manifest.partition) / f"{manifest.name}.tfrecord"


def _manifest_path(folder: Path, manifest: Manifest) -> Path:
    return partition_folder(folder, manifest.partition) / f"{manifest.name}.json"


def _spans(own: Path) -> list[tuple[int, int]]:
    """Begin and end of every shard that has a manifest."""
    if not own.is_dir():
        return []
    return sorted((int(found[1]), int(found[2])) for name in os.listdir(own) if (found := _MANIFEST.fullmatch(name)))


def _covering(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that are in no other: a shard into which others were merged stands for them.

    An empty span is of a flush; it is in another only if that begins before it and ends behind it.

    >>> _covering([(0, 5), (0, 9), (5, 9), (9, 9), (9, 12)])
    [(0, 9), (9, 9), (9, 12)]
    """
    kept: list[tuple[int, int]] = []
    for begin, end in sorted((span for span in spans if span[0] < span[1]), key=lambda span: (span[0], -span[1])):
        if not kept or end > kept[-1][1]:
            kept.append((begin, end))
    begins = [begin for begin, _ in kept]
    for begin, end in spans:
        if begin == end:
            before = bisect_left(begins, begin) - 1
            if before < 0 or kept[before][1] <= begin:
                kept.append((begin, end))
    return sorted(kept)


def _contents(rows: Sequence[Row], first_row: int) -> _Contents:
    last_rows = {row.asked.ts_ms // DAY_MS: number for number, row in enumerate(rows, first_row)}
    counts = Counter(row.asked.ts_ms // DAY_MS for row in rows)
    days = {day_of(day * DAY_MS): Day(counts[day], last_rows[day]) for day in sorted(counts)}
    return _Contents(days, dict(sorted(Counter(row.outcome for row in rows).items())))


def _name(kind: pa.DataType) -> str:
    return f"{_LIST}{_NAMES[kind.value_type]}" if pa.types.is_list(kind) else _NAMES[kind]


def _type(name: str) -> pa.DataType:
    return pa.list_(_TYPES[name.removeprefix(_LIST)]) if name.startswith(_LIST) else _TYPES[name]
