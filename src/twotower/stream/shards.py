"""Shards on disk: joined rows of a range of offsets of one partition of the log, and the manifest that commits them.

    shards/partition-0000/joiner.lock                         held by the joiner of the partition
    shards/partition-0000/<begin>-<end>.positives.tfrecord    clicked rows; offsets in 20 digits
    shards/partition-0000/<begin>-<end>.others.tfrecord       the other rows
    shards/partition-0000/<begin>-<end>.json                  the manifest

A shard exists once its manifest does: that is written last, in one rename, and says how far the log was read and what
the joiner needs to continue. The rows of a partition are numbered through all shards in the order in which they left,
and each carries its number; merging small shards changes neither rows nor numbers. The updater learns from positives
alone and does not read the other rows.
"""

import functools
import itertools
import json
import os
import re
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from twotower.logs import EventLog
from twotower.logs.events import EntityId
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, day_of
from twotower.schema.errors import DataError
from twotower.schema.files import TEMPORARY, read_json, sha256, whole_file, write_json
from twotower.stream.clock import JoinProgress
from twotower.stream.decode import decode, decode_rows
from twotower.stream.example import encode_rows
from twotower.stream.joiner import JoinCounts, Replay
from twotower.stream.rows import Row, Types
from twotower.stream.tfrecord import Records, read_records, write_records

FORMAT: Final = 3
"""2 has all rows in one file, without their numbers; 1 has the history and the features of a request in each of its
rows. All three are read; shards of 1 and 2 are merged into one that has all rows in one file too."""
POSITIVES: Final = "positives"
OTHERS: Final = "others"
ALL: Final = "all"
_ENDINGS: Final = {POSITIVES: ".positives.tfrecord", OTHERS: ".others.tfrecord", ALL: ".tfrecord"}
_MANIFEST: Final = re.compile(r"(\d{20})-(\d{20})\.json")
_PARTITION: Final = re.compile(r"partition-(\d{4,})")
_NAMES: Final = {pa.type_for_alias(name): name for name in ("int64", "int32", "bool", "float32", "string")}
_TYPES: Final = {name: kind for kind, name in _NAMES.items()}
_LIST: Final = "list of "

Count = Annotated[int, Field(ge=0)]
Part = Literal["positives", "others", "all"]
"""What a file of a shard holds: clicked rows, the other rows, or, in earlier formats, all rows."""


def _type(name: str) -> pa.DataType:
    return pa.list_(_TYPES[name.removeprefix(_LIST)]) if name.startswith(_LIST) else _TYPES[name]


def _name(kind: pa.DataType) -> str:
    return f"{_LIST}{_NAMES[kind.value_type]}" if pa.types.is_list(kind) else _NAMES[kind]


Columns = Annotated[
    pa.Schema,
    PlainValidator(lambda columns: pa.schema([(name, _type(kind)) for name, kind in columns])),
    PlainSerializer(lambda schema: [[field.name, _name(field.type)] for field in schema]),
]
"""Columns of rows; in JSON a list of names and types."""


@dataclass(frozen=True)
class Day:
    """The rows of one day in a shard."""

    rows: Count
    last_row: Count
    """The number of the last of them."""


@dataclass(frozen=True)
class DeletedUser:
    """A user who was deleted: their rows with a smaller number are not kept."""

    user_id: EntityId
    row: Count


@dataclass(frozen=True)
class JoinState:
    """What the joiner needs to continue after a shard."""

    replay: Replay
    flushes: tuple[int, ...] = ()
    """Offsets before which every window was closed, as far back as the replay reaches."""


@dataclass(frozen=True)
class ShardFile:
    """A file of rows."""

    rows: Count
    bytes: Count
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a shard, and how far the log has been read."""

    partition: Count
    begin: Count
    """Offset of the log from which it was read."""
    end: Count
    """Offset at which reading continues."""
    first_row: Count
    """Number of its first row in the partition."""
    hour: int | None
    """Hour since 1970 of the event time at its beginning; shards of one hour may be merged."""
    watermark_ms: int | None
    """Event time that is joined at its end; None before any event."""
    counts: JoinCounts
    state: JoinState
    deleted: tuple[DeletedUser, ...] = ()
    """Users who were deleted while it was read."""
    rows: Count = 0
    days: Mapping[str, Day] = field(default_factory=dict)
    """By day of UTC of the request."""
    outcomes: Mapping[str, Count] = field(default_factory=dict)
    """Rows by outcome."""
    schema: Columns = field(default_factory=lambda: pa.schema([]))
    """Columns of its rows, without their numbers."""
    files: Mapping[Part, ShardFile] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its files, without their endings."""
        return shard_name(self.begin, self.end)

    @property
    def end_row(self) -> int:
        """Number of the row behind its last."""
        return self.first_row + self.rows

    @property
    def bytes(self) -> int:
        """Size of its rows on disk."""
        return sum(file.bytes for file in self.files.values())


_MANIFESTS: Final = TypeAdapter(Manifest)


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
    return sorted(int(match[1]) for name in os.listdir(folder) if (match := _PARTITION.fullmatch(name)))


def progress_of(folder: Path, event_log: EventLog | None) -> dict[int, JoinProgress]:
    """How far each partition is joined, by its number; without a log nothing is left to be joined."""
    numbers = set(partitions(folder)) | set(range(event_log.partitions if event_log is not None else 0))
    progress = {}
    for number in sorted(numbers):
        known = manifests(folder, number)
        last = known[-1] if known else None
        at_end = event_log is None or not event_log.read(number, last.end if last else 0, 1)
        progress[number] = JoinProgress(last.watermark_ms if last else None, at_end)
    return progress


@dataclass(frozen=True)
class Usable:
    """The shards of a partition that can be used, and why others cannot."""

    manifests: list[Manifest]
    """In order. Where one is left out, the numbers of its rows are between those of its neighbours."""
    problems: list[str]
    """A sentence for each that cannot."""


def manifests(folder: Path, partition: int, first_row: int = 0) -> list[Manifest]:
    """The manifests of a partition's shards, in order; those of shards that end before `first_row` are not even read.

    Raises:
        DataError: one is damaged or of another format, or shards are missing in between.
    """
    own = partition_folder(folder, partition)
    readable = _readable(own, first_row)
    if readable.problems:
        raise DataError(readable.problems[-1])
    for before, after in itertools.pairwise(readable.manifests):
        if (before.end, before.end_row) != (after.begin, after.first_row):
            raise DataError(
                f"{own}: {after.name} begins at offset {after.begin} and row {after.first_row}, but the shard before "
                f"it ends at offset {before.end} and row {before.end_row}: restore the shards in between"
            )
    return readable.manifests


def usable_manifests(folder: Path, partition: int, first_row: int = 0) -> Usable:
    """As `manifests`, but a damaged manifest hides only its own rows: it does not stop readers of rows."""
    own = partition_folder(folder, partition)
    readable = _readable(own, first_row)
    known, problems = list[Manifest](), readable.problems
    for manifest in readable.manifests:
        if known and manifest.first_row < known[-1].end_row:
            problems.append(
                f"{own / manifest.name}.json begins at row {manifest.first_row}, the shard before it ends at "
                f"{known[-1].end_row}"
            )
        else:
            known.append(manifest)
    return Usable(known, problems)


def _readable(own: Path, first_row: int) -> Usable:
    """The manifests in the folder of a partition, from the one that holds a row on, that can be read."""
    spans = _covering(_spans(own))
    known, problems = list[Manifest](), list[str]()
    for begin, end in reversed(spans):
        try:
            known.append(read_manifest(own / f"{shard_name(begin, end)}.json"))
        except DataError as error:
            problems.append(str(error))
            continue
        if first_row and known[-1].first_row <= first_row:
            break
    if problems and _covering(_spans(own)) != spans:
        return _readable(own, first_row)  # they were merged meanwhile
    return Usable(known[::-1], problems[::-1])


@dataclass(frozen=True)
class PositiveRows:
    """Positives of a partition, by shard, and what cannot be read."""

    tables: list[pa.Table]
    rows: int
    """Rows of the shards that could be read, other ones included."""
    problems: list[str]
    """A sentence for each shard that cannot be read."""


def read_positives(folder: Path, partition: int, first_row: int, end_row: int) -> PositiveRows:
    """The clicked rows of a partition from a number up to another, by shard; damaged shards are left out and named."""
    usable = usable_manifests(folder, partition, first_row)
    tables, rows, problems = list[pa.Table](), 0, list(usable.problems)
    for shard in usable.manifests:
        first, end = max(first_row, shard.first_row), min(end_row, shard.end_row)
        if first >= end:
            continue
        try:
            tables.append(read_shard(folder, shard, first, end, positives_only=True))
            rows += end - first
        except DataError as error:
            if not any(path.exists() for path in (*_paths(folder, shard), _manifest_path(folder, shard))):
                return read_positives(folder, partition, first_row, end_row)  # they were merged meanwhile
            problems.append(f"{end - first} rows: {error}")
    return PositiveRows(tables, rows, problems)


@functools.lru_cache(maxsize=1 << 14)
def read_manifest(path: Path) -> Manifest:
    """One manifest. It is cached: a manifest never changes, and those who follow shards ask for it again and again.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") not in range(1, FORMAT + 1):
        raise DataError(f"{path} is no shard's manifest of a format up to {FORMAT}: another version wrote it")
    if "files" not in content:
        content["files"] = {ALL: {name: content.get(name) for name in ("rows", "bytes", "sha256")}}
    try:
        manifest = _MANIFESTS.validate_json(json.dumps(content), strict=True)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        details = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
        raise DataError(
            f"{path} is no whole manifest ({details or repr(error)}): it was damaged or written by something else"
        ) from None
    if sum(file.rows for file in manifest.files.values()) != manifest.rows:
        raise DataError(f"{path} has {manifest.rows} rows, its files have others: it was damaged")
    if _MANIFEST.fullmatch(path.name) and path.stem != manifest.name:
        raise DataError(f"{path} is the manifest of {manifest.name}: it was renamed")
    return manifest


def read_shard(
    folder: Path,
    manifest: Manifest,
    first_row: int = 0,
    end_row: int = sys.maxsize,
    *,
    columns: Iterable[str] | None = None,
    positives_only: bool = False,
) -> pa.Table:
    """The rows of a shard from a number up to another, in order, with their numbers (`row`); all checksums are checked.

    With `columns`, only these and the numbers. With `positives_only`, only clicked rows; the others are read only where
    they are in the same file.

    Raises:
        DataError: a file is missing, damaged, or has other rows than the manifest says.
    """
    schema = manifest.schema if columns is None else pa.schema([manifest.schema.field(name) for name in columns])
    whole = first_row <= manifest.first_row and manifest.end_row <= end_row
    parts = []
    for name, file in manifest.files.items():
        if positives_only and name == OTHERS:
            continue
        path = _path(folder, manifest, name)
        records = read_records(path) if whole else _records(path, file.sha256)
        if len(records) != file.rows:
            raise DataError(f"{path} has {len(records)} rows, the manifest says {file.rows}: it was cut")
        try:
            if whole and name != ALL:
                parts.append(decode_rows(records, 0, file.rows, schema.append(pa.field(c.ROW, pa.int64()))))
                continue
            numbers = np.arange(manifest.first_row, manifest.end_row) if name == ALL else _numbers(path, file.sha256)
            first, end = np.searchsorted(numbers, [first_row, end_row]).tolist()
            rows = decode_rows(records, first, end, schema)
            parts.append(rows.append_column(c.ROW, pa.array(numbers[first:end], pa.int64())))
        except (DataError, pa.ArrowException, ValueError, LookupError, OverflowError) as error:
            raise DataError(f"{path}: {error}") from None
    rows = pa.concat_tables(parts)
    if len(parts) > 1:
        rows = rows.take(pa.array(np.argsort(rows[c.ROW].to_numpy())))
    if positives_only and ALL in manifest.files:
        rows = rows.filter(pc.equal(rows[c.OUTCOME], c.CLICKED))
    return rows


@functools.lru_cache(maxsize=2)
def _records(path: Path, sha256: str) -> Records:  # noqa: ARG001 - another content is another shard
    """The records of a file. The latest are cached, because a shard of a whole hour is read part by part."""
    return read_records(path)


@functools.lru_cache(maxsize=2)
def _numbers(path: Path, sha256: str) -> npt.NDArray[np.int64]:
    """The numbers of the rows of a file, ascending."""
    column = decode(_records(path, sha256), pa.schema([(c.ROW, pa.int64())]))[c.ROW]
    numbers: npt.NDArray[np.int64] = column.to_numpy()
    if column.null_count or (np.diff(numbers) <= 0).any():
        raise DataError("the numbers of its rows do not rise: it was written by something else")
    return numbers


def read_rows(folder: Path, partition: int, first_row: int = 0, most_rows: int | None = None) -> pa.Table:
    """Rows of a partition from a number on, in order: at most `most_rows`, or all.

    Raises:
        DataError: a shard that holds some of them is missing or damaged, or shards have columns of other types.
    """
    end_row = sys.maxsize if most_rows is None else first_row + most_rows
    known = manifests(folder, partition, first_row)
    wanted = [shard for shard in known if shard.end_row > first_row and shard.rows and shard.first_row < end_row]
    try:
        parts = [read_shard(folder, shard, first_row, end_row) for shard in wanted]
    except DataError:
        if all(path.exists() for shard in wanted for path in _paths(folder, shard)):
            raise
        return read_rows(folder, partition, first_row, most_rows)  # they were merged meanwhile
    if not parts:
        return known[-1].schema.empty_table() if known else pa.table({})
    try:
        return pa.concat_tables(parts, promote_options="default").drop_columns([c.ROW])
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder}: a column has another type in some shards: {error}") from None


def write_shard(folder: Path, batches: Sequence[Sequence[Row]], types: Types, manifest: Manifest) -> Manifest:
    """Write a shard, its manifest last; gives the whole manifest.

    Args:
        folder: the folder of all shards.
        batches: rows that left at the same event, in their order.
        types: the types of ids and values.
        manifest: without what is known only when the rows are written.
    """
    files: dict[Part, ShardFile] = {}
    rows = list(itertools.chain.from_iterable(batches))
    parts: tuple[Part, ...] = (POSITIVES, OTHERS)
    for name in parts:
        clicked = name == POSITIVES
        numbers = [n for n, row in enumerate(rows, manifest.first_row) if (row.outcome == c.CLICKED) == clicked]
        mine = ([row for row in batch if (row.outcome == c.CLICKED) == clicked] for batch in batches)
        path = _path(folder, manifest, name)
        with whole_file(path) as temporary:
            write_records(temporary, encode_rows(mine, types, numbers))
        files[name] = ShardFile(len(numbers), path.stat().st_size, sha256(path))
    last_rows = {row.request.ts_ms // DAY_MS: number for number, row in enumerate(rows, manifest.first_row)}
    counts = Counter(row.request.ts_ms // DAY_MS for row in rows)
    whole = replace(
        manifest,
        rows=len(rows),
        days={day_of(day * DAY_MS): Day(counts[day], last_rows[day]) for day in sorted(counts)},
        outcomes=summed([Counter(row.outcome for row in rows)]),
        schema=types.schema(),
        files=files,
    )
    write_manifest(folder, whole)
    return whole


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest: the commit of its shard."""
    content = {"format": FORMAT, "kind": "shard", **_MANIFESTS.dump_python(manifest, mode="json")}
    write_json(_manifest_path(folder, manifest), content)


def tidy(folder: Path, partition: int) -> None:
    """Remove what a killed joiner left: half files, shards without a manifest, and those that were merged."""
    own = partition_folder(folder, partition)
    spans = _spans(own)
    kept = {shard_name(*span) for span in _covering(spans)}
    for begin, end in spans:
        if (name := shard_name(begin, end)) not in kept:
            (own / f"{name}.json").unlink()
    for path in own.iterdir():
        name = path.name.split(".")[0]
        if path.name.startswith(TEMPORARY) or (path.suffix == ".tfrecord" and name not in kept):
            path.unlink()


def merge(folder: Path, small: Sequence[Manifest]) -> Manifest:
    """Make one shard of several that follow each other. The rename of its manifest replaces them, and they are removed.

    Raises:
        DataError: one of them is not as its manifest says.
    """
    first, last = small[0], small[-1]
    days: dict[str, Day] = {}
    for part in small:
        for day, rows in part.days.items():
            days[day] = Day(rows.rows + (days[day].rows if day in days else 0), rows.last_row)
    manifest = replace(
        last,
        begin=first.begin,
        first_row=first.first_row,
        rows=sum(part.rows for part in small),
        hour=first.hour,
        days=dict(sorted(days.items())),
        outcomes=summed(part.outcomes for part in small),
        counts=total(part.counts for part in small),
        deleted=tuple(user for part in small for user in part.deleted),
    )
    files: dict[Part, ShardFile] = {}
    for name in first.files:
        path = _path(folder, manifest, name)
        with whole_file(path) as temporary, temporary.open("wb") as out:
            for part in small:
                piece = _path(folder, part, name)
                if sha256(piece) != part.files[name].sha256:
                    raise DataError(f"{piece} does not have the SHA-256 of its manifest: it was damaged")
                out.write(piece.read_bytes())
        files[name] = ShardFile(sum(part.files[name].rows for part in small), path.stat().st_size, sha256(path))
    manifest = replace(manifest, files=files)
    write_manifest(folder, manifest)
    for part in small:
        if part.name != manifest.name:
            for path in (_manifest_path(folder, part), *_paths(folder, part)):
                path.unlink(missing_ok=True)
    return manifest


def total(counts: Iterable[JoinCounts]) -> JoinCounts:
    """The sum of counts."""
    summed = JoinCounts()
    for part in counts:
        for name, value in vars(part).items():
            if name == "dropped":
                summed.dropped.update(value)
            else:
                setattr(summed, name, getattr(summed, name) + value)
    return summed


def summed(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts by name, ordered by name."""
    return dict(sorted(sum(map(Counter, parts), Counter[str]()).items()))


def _path(folder: Path, manifest: Manifest, name: str) -> Path:
    return partition_folder(folder, manifest.partition) / f"{manifest.name}{_ENDINGS[name]}"


def _paths(folder: Path, manifest: Manifest) -> list[Path]:
    return [_path(folder, manifest, name) for name in manifest.files]


def _manifest_path(folder: Path, manifest: Manifest) -> Path:
    return partition_folder(folder, manifest.partition) / f"{manifest.name}.json"


def _spans(own: Path) -> list[tuple[int, int]]:
    """Begin and end of every shard that has a manifest."""
    if not own.is_dir():
        return []
    return sorted((int(match[1]), int(match[2])) for name in os.listdir(own) if (match := _MANIFEST.fullmatch(name)))


def _covering(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans that are in no other one: a shard into which others were merged replaces them.

    An empty span belongs to a flush; it is in another one only if that begins before it and ends after it.

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
