"""Checkpoints: safetensors and JSON, optimizer included, whole or absent.

A run has a folder of its own, named by a hash of its samples and settings, so that a killed run finds its own
checkpoints again and another run never does. `step-N` folders (N training rows seen) are for resuming and go when the
run is done; `model` is the finished checkpoint. The two newest `step-N` are kept, so that one damaged on disk costs the
steps since the one before it and no more.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.features.feature_set import FEATURES_FILE, VOCABULARY_FILE, FeatureSet
from twotower.features.feature_set import load as load_features
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.schema.errors import DataError
from twotower.schema.files import (
    MANIFEST,
    check_fields,
    check_listing,
    folder_listing,
    read_json,
    whole_folder,
    write_json,
)
from twotower.towers.ranker import Ranker, RankerShape
from twotower.towers.towers import Network
from twotower.towers.two_tower import PREFERENCE, TwoTower
from twotower.train.negatives import CountedFrequency, StreamingFrequency

log = logging.getLogger(__name__)

Frequency = CountedFrequency | StreamingFrequency
Model = TwoTower | Ranker

FORMAT = 3
TENSORS = "model.safetensors"
FINISHED = "model"
DIGEST = "digest"
"""Key of a manifest: the SHA-256 of all its other entries, because a flipped digit in JSON is still JSON."""
FREQUENCY = "frequency."
"""Before the names of tensors that an estimate of q keeps."""
KEPT = 2
"""Checkpoints for resuming that a run keeps."""


@dataclass(frozen=True)
class Shape:
    """What it takes to build a model before its tensors are read."""

    dimension: int
    user: Network
    item: Network
    dropout: float
    ids_alone: bool = False
    """Of all features only the ids: matrix factorisation."""
    interests: int = 0
    """Vectors of a user, found by routing the click history; 0 = one vector, no routing."""
    rounds: int = 3
    """Of the routing."""
    popularity: bool = False
    """Vectors are served with two numbers more, for popularity alone."""

    def features_of(self, features: FeatureSet) -> FeatureSet:
        """What a model of this shape reads, out of all features.

        Raises:
            ConfigError: it needs a feature that is not there.
        """
        if self.ids_alone:
            return features.of_ids()
        return features.with_interests(self.interests, self.rounds) if self.interests else features


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    epoch: int
    """The epoch in which the next step is, from 0."""
    step: int
    """The next step within it."""
    rows: int
    """Training rows seen."""
    epoch_loss: float
    """Sum of the losses of this epoch's steps so far."""
    last_loss: float
    """Mean loss of the last whole epoch; NaN before there is one."""


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def tensors_sha256(self) -> str:
        """Hash of the tensors: what a version says it was made from."""
        return str(self.manifest["files"][TENSORS]["sha256"])


def run_folder(checkpoints: Path, samples_manifest: dict[str, Any], settings: dict[str, Any]) -> Path:
    """The folder of a run: the same samples and settings always have the same one."""
    identity = json.dumps([FORMAT, samples_manifest["files"], settings], sort_keys=True)
    return checkpoints / f"run-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def save_checkpoint(
    folder: Path,
    model: Model,
    optimizer: torch.optim.Adam,
    shape: Shape | RankerShape,
    progress: Progress,
    features_from: Path,
    rest: Any,
    frequency: Frequency | None = None,
) -> None:
    """Write a checkpoint with everything that a later step or an update needs."""
    with whole_folder(folder) as temporary:
        save_file(_tensors(model, optimizer, frequency), temporary / TENSORS)
        for name in (FEATURES_FILE, VOCABULARY_FILE):
            shutil.copyfile(features_from / name, temporary / name)
        described = {
            "format": FORMAT,
            "kind": "checkpoint",
            "shape": asdict(shape),
            "progress": _plain(progress),
            **rest,
        }
        described["files"] = folder_listing(temporary)
        write_json(temporary / MANIFEST, {**described, DIGEST: _digest(described)})


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, its files and its manifest checked against their hashes.

    Raises:
        DataError: missing, damaged or of another format.
    """
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "checkpoint" or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is no checkpoint of format {FORMAT}")
    if manifest.get(DIGEST) != _digest({key: value for key, value in manifest.items() if key != DIGEST}):
        raise DataError(f"{path} is damaged: {MANIFEST} does not have its own SHA-256. Train again, or restore it")
    check_fields(manifest, {"files": dict, "shape": dict, "progress": dict}, f"{path}: {MANIFEST}")
    check_fields(manifest["files"], {TENSORS: dict}, f"{path}: files")
    if problems := check_listing(path, manifest["files"]):
        raise DataError(f"{path} is damaged: {'; '.join(problems)}. Train again, or restore it")
    return Checkpoint(path, manifest)


def load_model(checkpoint: Checkpoint) -> TwoTower:
    """The model of a checkpoint, ready to encode.

    Raises:
        DataError: its tensors are not those of the shape that it says.
    """
    described = checkpoint.manifest["shape"]
    with _as_described(checkpoint):
        towers = {side: Network(**described[side]) for side in ("user", "item")}
        shape = Shape(**{**described, **towers})
        features = shape.features_of(load_features(checkpoint.path))
        model = TwoTower(features, shape.dimension, shape.user, shape.item, shape.dropout, 0, shape.popularity)
        _restore_model(model, load_file(checkpoint.path / TENSORS))
    return model.eval()


@contextmanager
def _as_described(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{checkpoint.path} has other contents than it says ({error!r}): train again, or restore it"
        ) from None


def take_over(checkpoint: Checkpoint, model: TwoTower, optimizer: torch.optim.Adam, decay: float) -> None:
    """Begin with the parameters and the optimizer state of another run, whose ids are other ones.

    A row goes with its id. An id that the other run did not have begins as the unknown one, without an accumulator.

    Args:
        checkpoint: of the other run; its features are those of the model but for the ids.
        model: changed in place.
        optimizer: changed in place.
        decay: what the accumulators of the tables are multiplied by.

    Raises:
        DataError: the model has another shape.
    """
    tensors = load_file(checkpoint.path / TENSORS)
    before = load_features(checkpoint.path).vocabularies
    try:
        model.load_state_dict({k.removeprefix("dense."): v for k, v in tensors.items() if k.startswith("dense.")})
        for name, table in model.tables.items():
            if name == PREFERENCE:  # of this run's own counts
                continue
            weights, accumulator = (tensors[f"{kind}.{name}"].numpy() for kind in ("table", "accumulator"))
            rows = np.arange(len(table.weights))
            if (vocabulary := model.features.vocabularies.get(name)) is not None:
                rows[FIRST : FIRST + len(vocabulary.values)] = before[name].rows(vocabulary.values)
                rows[FIRST + len(vocabulary.values) :] = UNKNOWN
            table.weights[:] = weights[rows]
            table.accumulator[:] = np.where((rows == UNKNOWN) & (np.arange(len(rows)) >= FIRST), 0, accumulator[rows])
            if repaired := table.repair(np.arange(len(rows))):
                log.warning("%d accumulators of %s were not finite: they have the median now", repaired, name)
            table.accumulator *= np.float32(decay)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"{checkpoint.path} has another shape than is configured ({error}): train anew with `twotower run`"
        ) from None
    _restore_optimizer(model, optimizer, tensors)


def load_ranker(checkpoint: Checkpoint) -> Ranker:
    """The ranker of a checkpoint, ready to score."""
    described = checkpoint.manifest["shape"]
    with _as_described(checkpoint):
        shape = RankerShape(**{**described, "network": Network(**described["network"])})
        model = Ranker(shape.features_of(load_features(checkpoint.path)), shape, seed=0)
        _restore_model(model, load_file(checkpoint.path / TENSORS))
    return model.eval()


def finished(folder: Path) -> Checkpoint | None:
    """The finished checkpoint of a run, if there is one; a damaged one is made again."""
    if not (folder / FINISHED).exists():
        return None
    try:
        return open_checkpoint(folder / FINISHED)
    except DataError as error:
        log.warning("training again: %s", error)
        return None


def all_finite(model: Model) -> bool:
    """No number of a model is infinite or none at all."""
    dense = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    tables = [array for table in model.tables.values() for array in (table.weights, table.accumulator)]
    return dense and all(bool(np.isfinite(array).all()) for array in tables)


def seed_of_step(seed: int, epoch: int, step: int) -> int:
    """What dropout begins with in a step, so that it depends on the step alone."""
    return int(np.random.default_rng([seed, epoch, step, 3]).integers(1 << 63))


def resume(
    folder: Path, model: Model, optimizer: torch.optim.Adam, frequency: Frequency | None = None
) -> Progress | None:
    """Load the latest whole checkpoint of a run into model, optimizer and q, or say that there is none.

    Damaged ones are removed on the way, with a warning.
    """
    for path in reversed(_steps(folder)):
        try:
            manifest = open_checkpoint(path).manifest
        except DataError as error:
            log.warning("going back to the checkpoint before: %s", error)
            shutil.rmtree(path)
            continue
        tensors = load_file(path / TENSORS)
        _restore_model(model, tensors)
        _restore_optimizer(model, optimizer, tensors)
        kept = {key: value.numpy() for key, value in tensors.items() if key.startswith(FREQUENCY)}
        if frequency is not None:
            frequency.restore({key.removeprefix(FREQUENCY): value for key, value in kept.items()})
        done = manifest["progress"]
        return Progress(**{**done, "last_loss": math.nan if done["last_loss"] is None else done["last_loss"]})
    return None


def save_step(
    folder: Path,
    model: Model,
    optimizer: torch.optim.Adam,
    shape: Shape | RankerShape,
    progress: Progress,
    features_from: Path,
    frequency: Frequency | None = None,
) -> None:
    """Write a checkpoint for resuming into the folder of a run; older ones go, when it is on disk."""
    save_checkpoint(folder / f"step-{progress.rows}", model, optimizer, shape, progress, features_from, {}, frequency)
    drop_all_but(folder, [path.name for path in _steps(folder)[-KEPT:]])


def drop_all_but(folder: Path, keep: Iterable[str]) -> None:
    """Empty the folder of a run, down to some checkpoints and to the files that evaluation keeps beside them; what a
    killed writer left behind goes too.
    """
    kept = set(keep)
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints for resuming, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(progress: Progress) -> dict[str, Any]:
    return {**asdict(progress), "last_loss": None if math.isnan(progress.last_loss) else progress.last_loss}


def _tensors(model: Model, optimizer: torch.optim.Adam, frequency: Frequency | None) -> dict[str, Tensor]:
    tensors = {f"dense.{name}": value.detach() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().clone()
    for name, table in model.tables.items():
        tensors[f"table.{name}"] = torch.from_numpy(table.weights)
        tensors[f"accumulator.{name}"] = torch.from_numpy(table.accumulator)
    for name, value in ({} if frequency is None else frequency.state()).items():
        tensors[f"{FREQUENCY}{name}"] = torch.from_numpy(value)
    return {name: value.contiguous() for name, value in sorted(tensors.items())}


def _restore_model(model: Model, tensors: dict[str, Tensor]) -> None:
    model.load_state_dict({k.removeprefix("dense."): v for k, v in tensors.items() if k.startswith("dense.")})
    for name, table in model.tables.items():
        # Copied: a mapped table would be paged in from a file that the run removes.
        np.copyto(table.weights, tensors[f"table.{name}"].numpy())
        np.copyto(table.accumulator, tensors[f"accumulator.{name}"].numpy())


def _restore_optimizer(model: Model, optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        keys = [key for key in tensors if key.startswith("adam.") and key.split(".", 2)[2] == name]
        optimizer.state[parameter] = {key.split(".")[1]: tensors[key].clone() for key in keys}
