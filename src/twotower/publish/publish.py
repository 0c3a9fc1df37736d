"""Publish a checkpoint as a version; promote, verify and roll back.

A version is built under a temporary name and renamed when it is complete and has answered its golden queries. `CURRENT`
names the served version and is replaced by one rename, so that a reader sees the old or the new name, never a part.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.channels.als import ALS
from twotower.channels.fit import Counted
from twotower.channels.options import ModelsOptions
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries
from twotower.channels.vector_channel import latest
from twotower.features.columns import Column, take, to_arrow
from twotower.features.feature_set import FEATURES_FILE, VOCABULARY_FILE, FeatureSet, save
from twotower.fusion.fuse import Fusion
from twotower.index.build import build_index
from twotower.index.options import IndexOptions
from twotower.index.protocol import VectorIndex
from twotower.publish.collections import check_collections, collections_in, collections_of
from twotower.publish.golden import replay, write_golden
from twotower.publish.manifest import write_manifest
from twotower.publish.onnx import OnnxTower, export_tower
from twotower.publish.ranker import OnnxRanker, user_of, write_ranker
from twotower.publish.tables import map_tables, save_tables
from twotower.publish.version import (
    CATALOGUE,
    FORMAT,
    NEW_ITEMS,
    RANKERS,
    TWO_TOWER,
    item_tokens,
    open_version,
    read_manifest,
    unavailable,
)
from twotower.samples.columns_file import write_table
from twotower.samples.names import ITEMS_FILE
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import DataError, TwotowerError, VersionError
from twotower.schema.files import MANIFEST, TEMPORARY, check_listing, folder_listing, whole_file, whole_folder
from twotower.schema.locks import locked
from twotower.schema.tables import check_entities
from twotower.towers.two_tower import Floats, TwoTower
from twotower.train.checkpoint import Checkpoint, load_model, load_ranker

log = logging.getLogger(__name__)

CURRENT = "CURRENT"
LOCK = ".lock"
PROMOTING = ".promoting"
RANKED = 20
"""Users that compare an exported ranker with the trained one."""
SAMPLED = 500
"""Users that the index is tuned on; as many users and items compare the exported towers with the trained ones."""
ROUNDING = 1e-5
"""Largest difference between the vectors of a trained tower and of the exported one."""

Tune = Callable[[str, npt.NDArray[np.int64], Floats, Floats], VectorIndex]
"""Builds the index of a channel: of vectors (N, D) of some rows (N,), tuned on queries (Q, D)."""


@dataclass(frozen=True)
class Listed:
    """A version as `versions list` shows it."""

    id: str
    parent: str | None
    created_ms: int
    watermark_ms: int | None


@dataclass(frozen=True)
class VersionParts:
    """What a version is made of."""

    samples: Samples
    """What everything was trained on: users, histories, the catalogue's features."""
    items_file: Path
    """`items.parquet`, for the attributes that a page shows."""
    checkpoints: Mapping[str, Checkpoint]
    """The trained channels by name, `two_tower` among them."""
    counted: Mapping[str, Counted]
    """The channels that are counted, not trained, by name."""
    rankers: Mapping[str, Checkpoint]
    fusion: Fusion


def publish(
    versions: Path,
    parts: VersionParts,
    models: ModelsOptions,
    index: IndexOptions,
    *,
    ks: Sequence[int],
    seed: int,
    recorded: Mapping[str, Any],
    clock_ms: ClockMs = now_ms,
) -> str:
    """Build a version from checkpoints and the samples they were trained on, and give its id; it is not promoted.

    Args:
        versions: the folder of all versions.
        parts: what the version is made of.
        models: which channels it has, and which items are new.
        index: of item vectors.
        ks: list lengths that the index is tuned for.
        seed: of the index.
        recorded: the `configuration` and the `metrics` of the evaluation, for the manifest.
        clock_ms: milliseconds since 1970.

    Raises:
        DataError: checkpoint, samples and items do not belong together, or a vector is not finite.
        VersionError: another process is publishing, or the exported towers are not the trained ones.
    """
    catalogue = _matching_catalogue(parts)
    created_ms, samples = clock_ms(), parts.samples
    moment = datetime.fromtimestamp(created_ms / 1000, UTC)
    tensors = parts.checkpoints[TWO_TOWER].tensors_sha256
    version_id = f"{moment:%Y%m%dT%H%M%S}{created_ms % 1000:03d}-{tensors[:8]}"
    path = versions / version_id
    with one_publisher(versions), collections_of(versions, version_id, index) as name_of, whole_folder(path) as folder:
        if path.exists():
            raise VersionError(f"{path} exists, and a version is never replaced: publish again")

        def tune(channel: str, rows: npt.NDArray[np.int64], vectors: Floats, queries: Floats) -> VectorIndex:
            return build_index(index, rows, vectors, queries, ks=list(ks), seed=seed, collection=name_of(channel))

        _write_parts(folder, parts, models, tune)
        write_table(folder / CATALOGUE, catalogue)
        manifest = {
            "format": FORMAT,
            "kind": "version",
            "id": version_id,
            "parent": current(versions),
            "created_ms": created_ms,
            "watermark_ms": samples.manifest["watermark_ms"],
            "last_day": samples.manifest["last_day"],
            "fusion": asdict(parts.fusion),
            "checkpoint_sha256": tensors,
            "collections": collections_in(folder),
            **recorded,
        }
        write_manifest(folder, {**manifest, "files": {}})
        write_golden(open_version(folder, check_hashes=False), folder)
        write_manifest(folder, {**manifest, "files": folder_listing(folder)})
    log.info("published %s", version_id)
    return version_id


def _matching_catalogue(parts: VersionParts) -> pa.Table:
    """The items with their attributes; raises a DataError where the parts do not belong together."""
    samples = parts.samples
    for checkpoint in (*parts.checkpoints.values(), *parts.rankers.values()):
        for name in (FEATURES_FILE, VOCABULARY_FILE):
            if checkpoint.manifest["files"][name]["sha256"] != samples.manifest["files"][name]["sha256"]:
                raise DataError(
                    f"{checkpoint.path} was trained on other samples than {samples.path} holds now: train before "
                    "publishing"
                )
    catalogue = check_entities(pq.read_table(parts.items_file), c.ITEM_ID, parts.items_file.name)
    if not catalogue.column(c.ITEM_ID).combine_chunks().equals(samples.items.ids):
        raise DataError(
            f"{parts.items_file} has other items than {samples.path}: run `twotower samples` and train again"
        )
    unavailable(catalogue)  # refuses a column of another type before anything is built
    return catalogue


def _write_parts(folder: Path, parts: VersionParts, models: ModelsOptions, tune: Tune) -> None:
    samples = parts.samples
    for name, checkpoint in parts.checkpoints.items():
        _write_trained(folder / "channels" / name, checkpoint, samples, tune, models)
    for name, channel in parts.counted.items():
        _write_counted(folder / "channels" / name, channel, samples, tune)
    for name, checkpoint in parts.rankers.items():
        _write_ranker(folder / RANKERS / name, checkpoint, samples)
    if parts.rankers:
        shutil.copyfile(samples.path / ITEMS_FILE, folder / RANKERS / ITEMS_FILE)
    for name in ("users.arrow", "clicks.arrow"):
        shutil.copyfile(samples.path / name, folder / name)


def _write_trained(folder: Path, checkpoint: Checkpoint, samples: Samples, tune: Tune, models: ModelsOptions) -> None:
    """Write a trained channel; with the two towers, the index of new items."""
    log.info("writing channel %s", folder.name)
    model = load_model(checkpoint)
    vectors = model.encode_items(samples.items.features)
    if not np.isfinite(vectors).all():
        raise DataError(f"{checkpoint.path}: item vectors are not finite: train again with a lower learning rate")
    folder.mkdir(parents=True)
    features = model.features
    export_tower(model.served_user_tower, (*features.user, *features.context), folder / "user_tower.onnx")
    export_tower(model.served_item_tower, features.item, folder / "item_tower.onnx")
    save_tables({name: table.weights for name, table in model.tables.items()}, folder)
    save(features, folder)
    write_table(folder / "items.arrow", pa.table({c.ITEM_ID: samples.items.ids, c.VECTOR: to_arrow(vectors)}))
    users = _user_columns(features, samples, _some_queries(samples))
    _check_export(folder, model, samples, users, vectors)
    queries = model.encode_users(users).reshape(-1, vectors.shape[1])
    tune(folder.name, np.arange(len(vectors)), vectors, queries).save(folder / "index")
    if folder.name == TWO_TOWER and NEW_ITEMS in models.channels:
        new = np.flatnonzero(samples.item_positives <= models.new_items.most_clicks)
        folder.with_name(NEW_ITEMS).mkdir()
        tune(NEW_ITEMS, new, vectors[new], queries).save(folder.with_name(NEW_ITEMS) / "index")


def _write_counted(folder: Path, channel: Counted, samples: Samples, tune: Tune) -> None:
    log.info("writing channel %s", folder.name)
    folder.mkdir()
    if isinstance(channel, ALS):
        queries = channel.user_vectors(_some_queries(samples).clicks)
        channel = channel.with_index(tune(folder.name, *channel.unit_vectors, queries[queries.any(axis=1)]))
    channel.save(folder)


def _write_ranker(folder: Path, checkpoint: Checkpoint, samples: Samples) -> None:
    """Write a ranker, and run it on users and items spread over all, as another process would.

    Raises:
        VersionError: its probabilities are not those of the trained one.
    """
    log.info("writing ranker %s", folder.name)
    model = load_ranker(checkpoint)
    write_ranker(folder, model, {key: checkpoint.manifest[key] for key in ("calibration", "position")})
    exported = OnnxRanker(folder, samples.items)
    rows = _spread(len(samples.items), SAMPLED)
    items = {name: take(column, rows) for name, column in samples.items.features.items()}
    queries = _some_queries(samples)
    for place in _spread(len(queries), RANKED).tolist():
        user = user_of(queries, place)
        columns = _user_columns(model.features, samples, user)
        trained = model.probability(torch.from_numpy(model.score(columns, items))).numpy()
        _check_rounding(f"the ranker {folder.name}", exported.score(user.features, user.clicks, rows) - trained)


def _spread(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` of the numbers 0 to count - 1, spread evenly."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _some_queries(samples: Samples) -> Queries:
    """Queries of users spread over all."""
    rows = _spread(len(samples.users), SAMPLED)
    return queries_of_users(samples.features, samples.users, samples.clicks, rows)


def _user_columns(features: FeatureSet, samples: Samples, queries: Queries) -> dict[str, Column]:
    """Encoded columns of users with their histories, as a model's user tower reads them."""
    columns = dict(queries.features)
    if (history := features.history) is not None:
        columns[history.name] = latest(queries.clicks, item_tokens(features, samples.items.ids), history.last)
    return columns


def _check_export(
    folder: Path, model: TwoTower, samples: Samples, users: Mapping[str, Column], vectors: Floats
) -> None:
    """Run the exported towers on users and items spread over all, as another process would.

    Raises:
        VersionError: their vectors are not those of the trained towers.
    """
    tables, features = map_tables(folder), model.features
    rows = _spread(len(vectors), SAMPLED)
    items = {name: take(column, rows) for name, column in samples.items.features.items()}
    for name, side, columns, trained in (
        ("user_tower.onnx", (*features.user, *features.context), users, model.encode_users(users)),
        ("item_tower.onnx", features.item, items, vectors[rows]),
    ):
        _check_rounding(name, OnnxTower(folder / name, side, tables).encode(columns) - trained)


def _check_rounding(exported: str, differences: Floats) -> None:
    off = np.abs(differences).max()
    if not off <= ROUNDING:
        raise VersionError(
            f"{exported} differs by {off:.2g} from the trained one: report this, with your versions of torch and "
            "onnxruntime"
        )


@contextmanager
def one_publisher(versions: Path) -> Iterator[None]:
    """Keep a second publisher out, and remove the remains of a killed one."""
    versions.mkdir(parents=True, exist_ok=True)
    with locked(
        versions / LOCK, lambda holder: VersionError(f"{holder} is publishing to {versions}: wait for it to end")
    ):
        for leftover in versions.glob(f"{TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
        yield


@contextmanager
def one_promoter(versions: Path) -> Iterator[None]:
    """Keep others from changing `CURRENT`, and from removing versions; two writers would share a temporary name."""
    with locked(versions / PROMOTING, VersionError, wait=True):
        yield


def current(versions: Path) -> str | None:
    """The id of the served version, None before the first is promoted."""
    try:
        return (versions / CURRENT).read_text(encoding="utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None


def current_path(versions: Path) -> Path:
    """The folder of the served version.

    Raises:
        VersionError: none is promoted yet.
    """
    version_id = current(versions)
    if version_id is None:
        raise VersionError(f"{versions} has no {CURRENT}: publish and promote a version first")
    return existing_path(versions, version_id)


def promote(versions: Path, version_id: str) -> None:
    """Make a version the served one, after its files and its golden queries have been checked.

    Raises:
        VersionError: no such version, or it is damaged; the served one stays.
    """
    if problems := verify(existing_path(versions, version_id)):
        raise VersionError(f"{version_id} is not promoted: {'; '.join(problems[:3])}")
    with one_promoter(versions):
        existing_path(versions, version_id)  # it may have been pruned while it was checked
        with whole_file(versions / CURRENT) as temporary:
            temporary.write_text(version_id + "\n", encoding="utf-8")
    log.info("promoted %s", version_id)


def roll_back(versions: Path, version_id: str | None = None) -> str:
    """Serve an earlier version again: the given one, or the parent of the served one.

    Raises:
        VersionError: there is nothing to go back to.
    """
    if version_id is None:
        path = current_path(versions)
        version_id = read_manifest(path)["parent"]
        if version_id is None:
            raise VersionError(f"{path.name} has no parent: name the version to go back to")
    promote(versions, version_id)
    return version_id


def verify(path: Path) -> list[str]:
    """Check every file of a version against its manifest and replay its golden queries; problems as sentences."""
    try:
        if problems := check_listing(path, read_manifest(path)["files"]):
            return problems
        check_collections(path)
        return replay(open_version(path, check_hashes=False))
    except TwotowerError as error:
        return [str(error)]
    except MemoryError:
        raise
    except Exception as error:  # the files passed every check, and still the version gives no answer
        return [f"golden queries: {error!r}"]


def list_versions(versions: Path) -> list[Listed]:
    """All versions, oldest first; one whose manifest cannot be read is reported and skipped."""
    listed = []
    for path in _complete(versions):
        try:
            manifest = read_manifest(path)
        except VersionError as error:
            log.warning("%s", error)
            continue
        listed.append(Listed(path.name, manifest["parent"], manifest["created_ms"], manifest["watermark_ms"]))
    return listed


def existing_path(versions: Path, version_id: str) -> Path:
    """The folder of a complete version.

    Raises:
        VersionError: there is none of that id.
    """
    paths = {path.name: path for path in _complete(versions)}
    if version_id not in paths:
        raise VersionError(f"{versions} has no version {version_id}; it has {', '.join(paths) or 'none'}")
    return paths[version_id]


def _complete(versions: Path) -> list[Path]:
    """The folders with a manifest, in the order of their names, which is that of time."""
    return [path.parent for path in sorted(versions.glob(f"[!.]*/{MANIFEST}"))]
