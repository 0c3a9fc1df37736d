"""Publish a checkpoint as a version; promote, verify and roll back.

A version is built under a temporary name and renamed when it is complete and has answered its golden queries. `CURRENT`
names the served one and is replaced by one rename, so that a reader sees the old or the new, never anything between.
"""

import fcntl
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.channels.als import ALS
from twotower.channels.fit import Counted
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries
from twotower.channels.vector_channel import latest
from twotower.features.columns import Bag, Column, take, to_arrow
from twotower.features.feature_set import FEATURES_FILE, VOCABULARY_FILE, save
from twotower.fusion.fuse import Fusion
from twotower.index.build import build_index
from twotower.index.options import IndexOptions
from twotower.publish.golden import replay, write_golden
from twotower.publish.onnx import OnnxTower, export_tower
from twotower.publish.ranker import OnnxRanker, write_ranker
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
    write_manifest,
)
from twotower.samples.columns_file import write_table
from twotower.samples.names import ITEMS_FILE
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError, VersionError
from twotower.schema.files import (
    MANIFEST,
    TEMPORARY,
    check_listing,
    folder_listing,
    whole_file,
    whole_folder,
)
from twotower.schema.tables import check_entities
from twotower.towers.ranker import Ranker
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
"""Largest difference between a number of a trained tower's vector and of the exported one's."""


@dataclass(frozen=True)
class Listed:
    """A version as `versions list` shows it."""

    id: str
    parent: str | None
    created_ms: int
    watermark_ms: int | None


def publish(
    versions: Path,
    checkpoints: Mapping[str, Checkpoint],
    samples: Samples,
    items_file: Path,
    channels: Mapping[str, Counted],
    rankers: Mapping[str, Checkpoint],
    *,
    fusion: Fusion,
    configuration: dict[str, Any],
    metrics: dict[str, Any],
    index_kind: str,
    index_recall: float,
    index_ks: Sequence[int],
    most_new_clicks: int = 0,
    seed: int,
    clock_ms: Callable[[], int],
) -> str:
    """Build a version from checkpoints and the samples they were trained on; it is not promoted.

    Args:
        versions: the folder of all versions.
        checkpoints: the trained channels by name, `two_tower` among them.
        samples: what they were trained on: users, histories, the catalogue's features.
        items_file: `items.parquet`, for the attributes that a page shows.
        channels: the channels that are counted, not trained, by name.
        rankers: the trained rankers, by name.
        fusion: how the channels become one list.
        configuration: the whole configuration, recorded; names the channels.
        metrics: of the evaluation, recorded.
        index_kind: `exact` or `faiss`.
        index_recall: share of the exact answer that the index must find.
        index_ks: list lengths that the index is tuned for.
        most_new_clicks: an item of at most so many training positives is new to the channel `new_items`.
        seed: of the index.
        clock_ms: milliseconds since 1970.

    Returns:
        The id of the version.

    Raises:
        DataError: checkpoint, samples and items do not belong together, or a vector is not finite.
        VersionError: another process is publishing, or the exported towers are not the trained ones.
    """
    for checkpoint in (*checkpoints.values(), *rankers.values()):
        for name in (FEATURES_FILE, VOCABULARY_FILE):
            if checkpoint.manifest["files"][name]["sha256"] != samples.manifest["files"][name]["sha256"]:
                raise DataError(
                    f"{checkpoint.path} was trained on other samples than {samples.path} holds now: train before "
                    "publishing"
                )
    catalogue = check_entities(pq.read_table(items_file), c.ITEM_ID, items_file.name)
    if not catalogue.column(c.ITEM_ID).combine_chunks().equals(samples.items.ids):
        raise DataError(f"{items_file} has other items than {samples.path}: run `twotower samples` and train again")
    unavailable(catalogue)  # refuses a column of another type before anything is built
    created_ms = clock_ms()
    moment = datetime.fromtimestamp(created_ms / 1000, UTC)
    tensors = checkpoints[TWO_TOWER].tensors_sha256
    version_id = f"{moment:%Y%m%dT%H%M%S}{created_ms % 1000:03d}-{tensors[:8]}"
    with _one_writer(versions), whole_folder(_new_path(versions, version_id)) as folder:
        tune = partial(build_index, IndexOptions(index_kind, index_recall), ks=list(index_ks), seed=seed)
        for name, checkpoint in checkpoints.items():
            log.info("writing channel %s", name)
            model = load_model(checkpoint)
            vectors = model.encode_items(samples.items.features)
            if not np.isfinite(vectors).all():
                raise DataError(
                    f"{checkpoint.path}: item vectors are not finite: train again with a lower learning rate"
                )
            users = _some_users(model, samples)
            _write_vector_channel(folder / "channels" / name, model, samples, vectors)
            _check_export(folder / "channels" / name, model, samples, users, vectors)
            queries = model.encode_users(users).reshape(-1, vectors.shape[1])
            tune(np.arange(len(vectors)), vectors, queries).save(folder / "channels" / name / "index")
            if name == TWO_TOWER and NEW_ITEMS in configuration["models"]["channels"]:
                new = np.flatnonzero(samples.item_positives <= most_new_clicks)
                (folder / "channels" / NEW_ITEMS).mkdir()
                tune(new, vectors[new], queries).save(folder / "channels" / NEW_ITEMS / "index")
        for name, channel in channels.items():
            log.info("writing channel %s", name)
            (folder / "channels" / name).mkdir()
            whole = channel
            if isinstance(channel, ALS):
                queries = channel.user_vectors(_some_queries(samples).clicks)
                whole = channel.with_index(tune(*channel.found, queries[queries.any(axis=1)]))
            whole.save(folder / "channels" / name)
        for name, checkpoint in rankers.items():
            log.info("writing ranker %s", name)
            ranker = load_ranker(checkpoint)
            about = {key: checkpoint.manifest[key] for key in ("calibration", "position")}
            write_ranker(folder / RANKERS / name, ranker, about)
            _check_ranker(folder / RANKERS / name, ranker, samples)
        if rankers:
            shutil.copyfile(samples.path / ITEMS_FILE, folder / RANKERS / ITEMS_FILE)
        for name in ("users.arrow", "clicks.arrow"):
            shutil.copyfile(samples.path / name, folder / name)
        write_table(folder / CATALOGUE, catalogue)
        manifest = {
            "format": FORMAT,
            "kind": "version",
            "id": version_id,
            "parent": current(versions),
            "created_ms": created_ms,
            "watermark_ms": samples.manifest["watermark_ms"],
            "last_day": samples.manifest["last_day"],
            "configuration": configuration,
            "fusion": asdict(fusion),
            "metrics": metrics,
            "checkpoint_sha256": tensors,
        }
        write_manifest(folder, {**manifest, "files": {}})
        write_golden(open_version(folder, check_hashes=False), folder)
        write_manifest(folder, {**manifest, "files": folder_listing(folder)})
    log.info("published %s", version_id)
    return version_id


def _write_vector_channel(folder: Path, model: TwoTower, samples: Samples, vectors: Any) -> None:
    folder.mkdir(parents=True)
    features = model.features
    export_tower(model.served_user_tower, (*features.user, *features.context), folder / "user_tower.onnx")
    export_tower(model.served_item_tower, features.item, folder / "item_tower.onnx")
    save_tables({name: table.weights for name, table in model.tables.items()}, folder)
    save(features, folder)
    write_table(folder / "items.arrow", pa.table({c.ITEM_ID: samples.items.ids, c.VECTOR: to_arrow(vectors)}))


def _some_users(model: TwoTower, samples: Samples) -> dict[str, Column]:
    """Encoded columns of users spread over all, with their clicks: what the version will be asked."""
    queries = _some_queries(samples)
    columns = dict(queries.features)
    if (history := model.features.history) is not None:
        columns[history.name] = latest(queries.clicks, item_tokens(model.features, samples.items.ids), history.last)
    return columns


def _some_queries(samples: Samples) -> Queries:
    rows = np.unique(np.linspace(0, len(samples.users) - 1, SAMPLED).astype(np.int64))
    return queries_of_users(samples.features, samples.users, samples.clicks, rows)


def _check_export(
    folder: Path, model: TwoTower, samples: Samples, users: Mapping[str, Column], vectors: Floats
) -> None:
    """Run the exported towers on users and on items spread over the catalogue, as another process would.

    Raises:
        VersionError: their vectors are not those of the trained towers.
    """
    tables = map_tables(folder)
    rows = np.unique(np.linspace(0, len(vectors) - 1, SAMPLED).astype(np.int64))
    items = {name: take(column, rows) for name, column in samples.items.features.items()}
    features = model.features
    for name, side, columns, trained in (
        ("user_tower.onnx", (*features.user, *features.context), users, model.encode_users(users)),
        ("item_tower.onnx", features.item, items, vectors[rows]),
    ):
        off = np.abs(OnnxTower(folder / name, side, tables).encode(columns) - trained).max()
        if not off <= ROUNDING:
            raise VersionError(
                f"{name} differs by {off:.2g} from the trained tower: report this, with your versions of "
                "torch and onnxruntime"
            )


def _check_ranker(folder: Path, model: Ranker, samples: Samples) -> None:
    """Run an exported ranker on users and items spread over all, as another process would.

    Raises:
        VersionError: its probabilities are not those of the trained one.
    """
    exported = OnnxRanker(folder, samples.items)
    rows = np.unique(np.linspace(0, len(samples.items) - 1, SAMPLED).astype(np.int64))
    items = {name: take(column, rows) for name, column in samples.items.features.items()}
    queries = _some_queries(samples)
    for place in np.unique(np.linspace(0, len(queries) - 1, RANKED).astype(np.int64)):
        user = {name: take(column, np.array([place])) for name, column in queries.features.items()}
        clicks = take(queries.clicks, np.array([place]))
        assert isinstance(clicks, Bag)
        columns = dict(user)
        if (history := model.features.history) is not None:
            columns[history.name] = latest(clicks, item_tokens(model.features, samples.items.ids), history.last)
        trained = model.probability(torch.from_numpy(model.score(columns, items))).numpy()
        off = np.abs(exported.score(user, clicks, rows) - trained).max()
        if not off <= ROUNDING:
            raise VersionError(
                f"{folder.name}: the exported ranker differs by {off:.2g} from the trained one: report this, with your "
                "versions of torch and onnxruntime"
            )


def _new_path(versions: Path, version_id: str) -> Path:
    if (versions / version_id).exists():
        raise VersionError(f"{versions / version_id} exists, and a version is never replaced: publish again")
    return versions / version_id


@contextmanager
def _one_writer(versions: Path) -> Iterator[None]:
    """Keep a second publisher out, and remove what a killed one left."""
    versions.mkdir(parents=True, exist_ok=True)
    with (versions / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VersionError(f"another process is publishing to {versions}: wait for it to end") from None
        for leftover in versions.glob(f"{TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
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
    with (versions / PROMOTING).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would share the temporary name
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
        return replay(open_version(path, check_hashes=False))
    except (DataError, VersionError) as error:
        return [str(error)]
    except MemoryError:
        raise
    except Exception as error:  # what is in the files passed every check, and still cannot be asked
        return [f"golden queries: {error!r}"]


def list_versions(versions: Path) -> list[Listed]:
    """All versions, oldest first; one whose manifest cannot be read is reported and passed over."""
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
