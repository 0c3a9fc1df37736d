"""A delta: what was learned since a version or the delta before, as an overlay of it; whole or absent.

    deltas/<version>/<seq>/           seq in 8 digits, from 1, without gaps
      manifest.json                   base version, seq, hash of what it follows, watermark, offsets, files and hashes
      tables.safetensors              for each touched ID table `<table>.rows` (n,) int64 and `<table>.values` (n, D)
      new_ids.arrow                   table, raw id (`number` or `text`), row: ids that have a row of their own from now
      items.arrow                     item_id, vector: of the items that a touched row enters
      optimizer.safetensors           for the updater alone: accumulators of the touched rows, and its further arrays
      state.json                      for the updater alone
    deltas/<version>/folded/<seq>/    the same files: one delta in place of the deltas 1 to seq

The rename that gives the folder its name is the commit. What is served is the version and its deltas in their order.
Applying a folded delta gives exactly the same state as applying every delta that it replaces. It shortens the opening
of a version after a day of deltas, and what it replaces can be removed.
"""

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file, save_file

from twotower.features.columns import from_arrow, to_arrow
from twotower.features.vocabulary import FIRST, IDS_SCHEMA, UNKNOWN, id_rows
from twotower.index.exact import ExactIndex
from twotower.publish.catalogue import newest
from twotower.publish.manifest import DIGEST, checked_manifest, write_manifest
from twotower.publish.version import read_manifest
from twotower.samples.columns_file import map_columns, write_table
from twotower.schema import columns as c
from twotower.schema.errors import DataError, VersionError
from twotower.schema.files import (
    TEMPORARY,
    Kind,
    check_fields,
    check_listing,
    folder_listing,
    read_json,
    whole_folder,
    write_json,
)

log = logging.getLogger(__name__)

FORMAT = 1
FOLDED = "folded"
HOURS = 48
"""Number of latest hours whose recall is reported."""
GATED = 20
"""Number of latest deltas rejected by the gate that are reported."""
TABLES = "tables.safetensors"
NEW_IDS = "new_ids.arrow"
ITEMS = "items.arrow"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

FIELDS: Mapping[str, Kind] = {
    "version": str,
    "seq": int,
    "follows": str,
    "watermark_ms": (int, type(None)),
    "offsets": dict,
    "report": dict,
    "files": dict,
}
"""What is read of a manifest, with its types."""

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Some rows of a table (N, D), newer than those below."""

    rows: Longs
    """(n,) ascending, distinct."""
    values: Floats
    """(n, D)"""

    @classmethod
    def none(cls, dimension: int) -> "Rows":
        """No row."""
        return cls(np.zeros(0, np.int64), np.zeros((0, dimension), np.float32))

    @cached_property
    def index(self) -> ExactIndex:
        """An index of the values, where these are vectors of items and the rows those of the catalogue."""
        return ExactIndex.build(self.rows, np.ascontiguousarray(self.values))

    def with_newer(self, other: "Rows") -> "Rows":
        """Both, where the other's values hold for the rows that both have.

        >>> old = Rows(np.array([1, 3]), np.array([[1.0], [3.0]], np.float32))
        >>> both = old.with_newer(Rows(np.array([2, 3]), np.array([[2.0], [9.0]], np.float32)))
        >>> both.rows.tolist(), both.values.ravel().tolist()
        ([1, 2, 3], [1.0, 2.0, 9.0])
        """
        if not len(other.rows):
            return self
        rows, first = newest(other.rows, self.rows)
        return Rows(rows, np.concatenate([other.values, self.values])[first])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Delta:
    """The changes of one step of the incremental chain; of all steps up to it, if it is folded."""

    version: str
    """The base."""
    seq: int
    watermark_ms: int | None
    """Event time up to which it has learned."""
    tables: Mapping[str, Rows]
    """Touched rows by table."""
    new_ids: Mapping[str, pa.Table]
    """By table, columns `id` and `row` (int32) of the ids that have a row of their own from now on."""
    item_ids: pa.Array
    """(m,) items whose vectors changed."""
    item_vectors: Floats
    """(m, D)"""
    offsets: Mapping[str, Any]
    """How far the shards and the log have been read."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """Counts, and figures of the gate."""
    optimizer: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    folded: bool = False
    """It replaces the deltas 1 to `seq`."""
    digest: str = ""
    """What the next delta follows: the digest of this manifest, or of the last one that a folded delta replaces."""


class Reports:
    """The reports of the deltas of a chain, taken together."""

    def __init__(self) -> None:
        self.latest: Mapping[str, Any] = {}
        """The report of the latest delta."""
        self.gated: deque[tuple[int, list[str]]] = deque(maxlen=GATED)
        """The latest deltas that the gate rejected, with its reasons."""
        self.recall: dict[int, tuple[int, int]] = {}
        """By hour since 1970, how many of the next positives were found, and how many there were."""

    def note(self, delta: Delta) -> None:
        """Add the report of the next delta, or of a folded one, which replaces all."""
        self.latest = {name: value for name, value in delta.report.items() if name != FOLDED}
        recall = delta.report.get("recall", {})
        if delta.folded:
            recall = delta.report[FOLDED]["recall"]
            self.gated.clear()
            self.gated.extend((seq, reasons) for seq, reasons in delta.report[FOLDED]["gated"])
            self.recall = {}
        elif delta.report.get("refused"):
            self.gated.append((delta.seq, list(delta.report["refused"])))
        for hour, (hits, count) in recall.items():
            before = self.recall.get(int(hour), (0, 0))
            self.recall[int(hour)] = (before[0] + hits, before[1] + count)
        for hour in sorted(self.recall)[:-HOURS]:
            del self.recall[hour]

    def folded(self) -> dict[str, Any]:
        """The report of a folded delta."""
        recall = {str(hour): list(counts) for hour, counts in sorted(self.recall.items())}
        return {**self.latest, FOLDED: {"gated": [list(refusal) for refusal in self.gated], "recall": recall}}


def chain_folder(deltas: Path, version_id: str) -> Path:
    """The deltas of a version; `deltas` is the folder of the chains of all versions, here and below."""
    return deltas / version_id


def delta_folder(deltas: Path, version_id: str, seq: int) -> Path:
    """One delta."""
    return chain_folder(deltas, version_id) / f"{seq:08d}"


def folded_folder(deltas: Path, version_id: str, seq: int) -> Path:
    """A delta that replaces the deltas 1 to `seq`."""
    return chain_folder(deltas, version_id) / FOLDED / f"{seq:08d}"


def write_delta(deltas: Path, delta: Delta, follows: str) -> str:
    """Commit a delta that follows a digest: of the delta before or, for the first, of the version.

    Returns:
        Its own digest.

    Raises:
        VersionError: the delta is there already.
    """
    path = delta_folder(deltas, delta.version, delta.seq)
    if path.exists():
        raise VersionError(f"{path} exists, and a delta is never replaced: another updater wrote it")
    return _write(path, delta, {"follows": follows})


def write_folded(deltas: Path, delta: Delta, base: str) -> None:
    """Write a folded delta over the version of digest `base`; an existing one is damaged, and is replaced."""
    stands_for = {"first": 1, "digest": delta.digest}
    _write(folded_folder(deltas, delta.version, delta.seq), delta, {"follows": base, "stands_for": stands_for})


def _write(path: Path, delta: Delta, links: Mapping[str, Any]) -> str:
    with whole_folder(path) as folder:
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, rows in delta.tables.items():
            tensors |= {f"{name}.rows": rows.rows, f"{name}.values": np.ascontiguousarray(rows.values)}
        save_file(tensors, folder / TABLES)
        write_table(folder / NEW_IDS, _ids_table(delta.new_ids))
        write_table(folder / ITEMS, pa.table({c.ITEM_ID: delta.item_ids, c.VECTOR: to_arrow(delta.item_vectors)}))
        save_file(dict(delta.optimizer), folder / OPTIMIZER)
        write_json(folder / STATE, delta.state)
        manifest = {
            "format": FORMAT,
            "kind": "delta",
            "version": delta.version,
            "seq": delta.seq,
            **links,
            "watermark_ms": delta.watermark_ms,
            "offsets": delta.offsets,
            "report": delta.report,
            "rows": {name: len(rows.rows) for name, rows in delta.tables.items()},
            "files": folder_listing(folder),
        }
        return write_manifest(folder, manifest)


def read_delta(deltas: Path, version_id: str, seq: int, follows: str) -> Delta:
    """A delta; its files are checked against their hashes, and that it follows what is served.

    Raises:
        VersionError: missing, damaged, of another base, or it follows another digest.
    """
    return _read(delta_folder(deltas, version_id, seq), version_id, seq, follows)


def read_folded(deltas: Path, version_id: str, base: str, after: int = 0) -> Delta | None:
    """The latest folded delta beyond `after` that is not damaged, None where there is none; damaged ones are logged."""
    for seq in reversed(folded_seqs(deltas, version_id)):
        if seq <= after:
            break
        try:
            return _read(folded_folder(deltas, version_id, seq), version_id, seq, base)
        except VersionError as error:
            log.error("a folded delta of %s is skipped: %s", version_id, error)
    return None


def read_next(deltas: Path, version_id: str, base: str, seq: int, follows: str) -> Delta | None:
    """The delta after `seq` of a chain; None at the end.

    At the beginning that is the latest folded delta. Later on it is the next delta, or a folded one that replaces it if
    it is gone or damaged.

    Args:
        deltas: the folder of the chains of all versions.
        version_id: the version.
        base: its digest.
        seq: the latest delta that is known; 0 = none is.
        follows: the digest of that delta, or of the version.

    Raises:
        VersionError: the next delta is damaged, of another base or gone, and no folded one replaces it.
    """
    if seq == 0 and (folded := read_folded(deltas, version_id, base)) is not None:
        return folded
    known = last_seq(deltas, version_id) if seq == 0 else max(folded_seqs(deltas, version_id), default=0)
    path = delta_folder(deltas, version_id, seq + 1)
    try:
        if path.is_dir():
            return read_delta(deltas, version_id, seq + 1, follows)
        if known <= seq:
            return None
        problem = VersionError(f"{path} is gone, and no whole folded delta replaces it")
    except VersionError as error:  # damaged, or removed while it was read
        problem = error
    if seq == 0 or (folded := read_folded(deltas, version_id, base, seq)) is None:
        raise VersionError(
            f"{problem}. Restore it from a copy; or remove {chain_folder(deltas, version_id)} and restart the servers: "
            "the updater then learns these deltas anew from the shards"
        ) from problem
    return folded


def read_chain(deltas: Path, version_path: Path) -> Iterator[Delta]:
    """The deltas of a version in their order, from the latest folded one on; raises what `read_next` raises."""
    base = follows = base_digest(version_path)
    seq = 0
    while (delta := read_next(deltas, version_path.name, base, seq, follows)) is not None:
        yield delta
        seq, follows = delta.seq, delta.digest


def verify_chain(deltas: Path, version_path: Path) -> list[str]:
    """Problems of the deltas of a version: a sentence on the first that cannot be read, none where all can."""
    try:
        list(read_chain(deltas, version_path))
    except VersionError as error:
        return [str(error)]
    return []


def _read(path: Path, version_id: str, seq: int, follows: str) -> Delta:
    manifest = checked_manifest(path, "delta", FORMAT, FIELDS)
    if (manifest["version"], manifest["seq"]) != (version_id, seq):
        raise VersionError(f"{path} is delta {manifest['seq']} of version {manifest['version']}, not of {version_id}")
    if manifest["follows"] != follows:
        raise VersionError(
            f"{path} follows {manifest['follows'][:12]}, but what is served is {follows[:12]}: it was learned on "
            "another base"
        )
    try:
        if (stands_for := manifest.get("stands_for")) is not None:
            check_fields(stands_for, {"digest": str}, f"{path}: stands_for")
            check_fields(manifest["report"].get(FOLDED), {"gated": list, "recall": dict}, f"{path}: report")
        if problems := check_listing(path, manifest["files"]):
            raise VersionError(f"{path} is damaged: {'; '.join(problems)}")
        tensors, items = load_file(path / TABLES), map_columns(path / ITEMS)
        tables = [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]
        vectors = from_arrow(items.column(c.VECTOR))
        assert isinstance(vectors, np.ndarray)
        return _checked(
            Delta(
                version_id,
                seq,
                manifest["watermark_ms"],
                {name: Rows(tensors[f"{name}.rows"], tensors[f"{name}.values"]) for name in tables},
                _new_ids(map_columns(path / NEW_IDS)),
                items.column(c.ITEM_ID),
                vectors.astype(np.float32),
                manifest["offsets"],
                manifest["report"],
                load_file(path / OPTIMIZER),
                read_json(path / STATE, manifest["files"][STATE]["bytes"]),
                stands_for is not None,
                manifest[DIGEST] if stands_for is None else stands_for["digest"],
            )
        )
    except (VersionError, MemoryError):
        raise
    except Exception as error:  # Arrow, NumPy and safetensors raise many kinds for files that are not theirs
        raise VersionError(f"{path} cannot be read: {error or repr(error)}") from error


def _checked(delta: Delta) -> Delta:
    """The delta, if its arrays have the right types and shapes; raises a DataError otherwise."""
    for name, rows in delta.tables.items():
        at, values = rows.rows, rows.values
        if at.dtype != np.int64 or at.ndim != 1 or values.dtype != np.float32 or values.shape[:1] != at.shape:
            raise DataError(f"{name}: rows are {at.dtype}{at.shape}, their values {values.dtype}{values.shape}")
        if values.ndim != 2 or (len(at) and at[0] < FIRST) or (np.diff(at) <= 0).any():
            raise DataError(f"{name}: the rows are not ascending, or below {FIRST}, the first row of an id")
        if not np.isfinite(values).all():
            raise DataError(f"{name}: {int((~np.isfinite(values)).any(axis=1).sum())} rows are not finite")
    for name, ids in delta.new_ids.items():
        if ids.column("id").null_count or ids.column("row").null_count:
            raise DataError(f"new ids of {name}: some are missing")
        if ids.num_rows and pc.min(ids.column("row")).as_py() < UNKNOWN:
            raise DataError(f"new ids of {name}: a row is {pc.min(ids.column('row')).as_py()}")
    if delta.item_ids.null_count or len(delta.item_ids) != len(delta.item_vectors):
        raise DataError(f"{len(delta.item_ids)} items for {len(delta.item_vectors)} vectors")
    if not np.isfinite(delta.item_vectors).all():
        raise DataError("vectors of items are not finite")
    return delta


def prune(deltas: Path, version_id: str) -> None:
    """Remove the deltas of a chain that folded ones replace.

    The latest two folded deltas stay, with the deltas after the first of the two: a server that is at most that far
    behind continues delta by delta, and if one folded delta is damaged there is another.
    """
    chain, kept = chain_folder(deltas, version_id), [0, 0, *folded_seqs(deltas, version_id)][-2]
    for folder, last in ((chain, kept), (chain / FOLDED, kept - 1)):
        for name in sorted(_names(folder)):
            number = name.removeprefix(TEMPORARY)
            if number.isdigit() and int(number) <= last:
                removed = folder / f"{TEMPORARY}{number}"  # so that a reader finds it whole or gone
                if name == number:
                    os.replace(folder / name, removed)
                shutil.rmtree(removed)


def last_seq(deltas: Path, version_id: str) -> int:
    """The number of the latest delta of a version, 0 before there is one."""
    return max([0, *_numbers(chain_folder(deltas, version_id)), *folded_seqs(deltas, version_id)])


def folded_seqs(deltas: Path, version_id: str) -> list[int]:
    """The numbers of the folded deltas of a version, ascending."""
    return sorted(_numbers(chain_folder(deltas, version_id) / FOLDED))


def _numbers(folder: Path) -> list[int]:
    return [int(name) for name in _names(folder) if name.isdigit()]


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def base_digest(version_path: Path) -> str:
    """The digest of a version, which its first delta follows: a hash of its manifest, and so of all its files."""
    return str(read_manifest(version_path)[DIGEST])


def _ids_table(new_ids: Mapping[str, pa.Table]) -> pa.Table:
    pieces = [
        id_rows(name, *(ids.column(key).combine_chunks() for key in ("id", "row")))
        for name, ids in sorted(new_ids.items())
    ]
    return pa.concat_tables([IDS_SCHEMA.empty_table(), *pieces]).combine_chunks()


def _new_ids(stored: pa.RecordBatch) -> dict[str, pa.Table]:
    tables = {}
    names = stored.column("table").to_numpy(zero_copy_only=False)
    for name in sorted(set(names.tolist())):
        mine = pa.table(stored).filter(pa.array(names == name))
        number = not mine.column("number").null_count
        tables[name] = pa.table({"id": mine.column("number" if number else "text"), "row": mine.column("row")})
    return tables
