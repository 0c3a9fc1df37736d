"""Checkpoints: safetensors and JSON, optimizer included, whole or absent.

A run has a folder of its own, named by a hash of its samples and settings, so that only the same run finds its
checkpoints again. `step-N` folders (N training rows seen) are for resuming and are removed when the run is done;
`model` is the finished checkpoint. The two newest `step-N` are kept, so that a damaged one costs only the steps since
the one before it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.channels.options import ModelsOptions
from twotower.features.feature_set import FEATURES_FILE, VOCABULARY_FILE
from twotower.features.feature_set import load as load_features
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.samples.read import Samples
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
from twotower.towers.options import PreRankOptions
from twotower.towers.ranker import Ranker
from twotower.towers.two_tower import PREFERENCE, TwoTower
from twotower.train.models import MF, MIND, TWO_TOWER, new_towers
from twotower.train.negatives import CountedFrequency, StreamingFrequency

log = logging.getLogger(__name__)

Frequency = CountedFrequency | StreamingFrequency
Model = TwoTower | Ranker

FORMAT = 4
TENSORS = "model.safetensors"
FINISHED = "model"
DIGEST = "digest"
"""Key of a manifest: the SHA-256 of all its other entries, because a flipped digit in JSON is still JSON."""
FREQUENCY = "frequency."
"""Before the names of tensors that an estimate of q keeps."""
KEPT = 2
"""Checkpoints for resuming that a run keeps."""


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
    last_loss: float | None
    """Mean loss of the last whole epoch; None before there is one."""


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
    samples: Samples,
    described: Mapping[str, Any],
    frequency: Frequency | None = None,
) -> None:
    """Write a checkpoint with everything that a later step or an update needs.

    `described` are further entries of the manifest, `settings` and `progress` among them. The features of the samples
    are saved with the model, and the state of q with streaming frequencies.
    """
    with whole_folder(folder) as temporary:
        save_file(_tensors(model, optimizer, frequency), temporary / TENSORS)
        for name in (FEATURES_FILE, VOCABULARY_FILE):
            shutil.copyfile(samples.path / name, temporary / name)
        manifest = {
            "format": FORMAT,
            "kind": "checkpoint",
            **{name: samples.manifest[name] for name in ("watermark_ms", "last_day")},
            **described,
            "files": folder_listing(temporary),
        }
        write_json(temporary / MANIFEST, {**manifest, DIGEST: _digest(manifest)})


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, its files and its manifest checked against their hashes.

    Raises:
        DataError: missing, damaged or of another format.
    """
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != "checkpoint" or manifest.get("format") not in (3, 4):
        raise DataError(f"{path} is no checkpoint of format {FORMAT}")
    if manifest.get(DIGEST) != _digest({key: value for key, value in manifest.items() if key != DIGEST}):
        raise DataError(f"{path} is damaged: {MANIFEST} does not have its own SHA-256. Train again, or restore it")
    check_fields(manifest, {"files": dict, "progress": dict}, f"{path}: {MANIFEST}")
    check_fields(manifest["files"], {TENSORS: dict}, f"{path}: files")
    if problems := check_listing(path, manifest["files"]):
        raise DataError(f"{path} is damaged: {'; '.join(problems)}. Train again, or restore it")
    return Checkpoint(path, manifest)


def load_model(checkpoint: Checkpoint) -> TwoTower:
    """The model of a checkpoint, ready to encode.

    Raises:
        DataError: its tensors are not those of the model that it describes.
    """
    with _as_described(checkpoint):
        settings = _present_settings(checkpoint.manifest)
        tensors = load_file(checkpoint.path / TENSORS)
        models = TypeAdapter(ModelsOptions).validate_json(json.dumps(settings["models"]))
        features, adjusted = load_features(checkpoint.path), f"table.{PREFERENCE}" in tensors
        model = new_towers(features, models, settings["channel"], adjusted=adjusted)
        _restore_model(model, tensors)
    return model.eval()


def load_ranker(checkpoint: Checkpoint) -> Ranker:
    """The ranker of a checkpoint, ready to score.

    Raises:
        DataError: its tensors are not those of the model that it describes.
    """
    with _as_described(checkpoint):
        described = json.dumps(_present_settings(checkpoint.manifest)["ranker"])
        options = TypeAdapter(PreRankOptions).validate_json(described)
        model = Ranker(load_features(checkpoint.path), options)
        _restore_model(model, load_file(checkpoint.path / TENSORS))
    return model.eval()


def _present_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint as this release writes them; those of format 3 describe a shape."""
    if manifest["format"] == FORMAT:
        settings: dict[str, Any] = manifest["settings"]
        return settings
    shape = manifest["shape"]

    def network(old: dict[str, Any]) -> dict[str, Any]:
        return {"network": old["kind"], "layers": old["layers"], "crosses": old["crosses"]}

    if "network" in shape:
        return {"ranker": shape | network(shape["network"])}
    towers = {f"{side}_tower": network(shape[side]) for side in ("user", "item")}
    models: dict[str, Any] = {"dimension": shape["dimension"], **towers}
    if shape["interests"]:
        models[MIND] = {name: shape[name] for name in ("interests", "rounds")}
    return {"channel": MIND if shape["interests"] else MF if shape["ids_alone"] else TWO_TOWER, "models": models}


@contextmanager
def _as_described(checkpoint: Checkpoint) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{checkpoint.path} has other contents than it says ({error!r}): train again, or restore it"
        ) from None


def take_over(checkpoint: Checkpoint, model: TwoTower, optimizer: torch.optim.Adam, decay: float) -> None:
    """Begin with the parameters and the optimizer state of another run, which has other ids but the same features.

    A row goes with its id. An id that the other run did not have begins as the unknown one, without an accumulator. The
    accumulators of the tables are multiplied by `decay`.

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


def finished(folder: Path) -> Checkpoint | None:
    """The finished checkpoint of a run, if there is one; a damaged one is made again."""
    if not (folder / FINISHED).exists():
        return None
    try:
        done = open_checkpoint(folder / FINISHED)
    except DataError as error:
        log.warning("training again: %s", error)
        return None
    log.info("this run is finished: %s", done.path)
    drop_all_but(folder, [FINISHED])
    return done


def all_finite(model: Model) -> bool:
    """All numbers of a model are finite."""
    dense = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    tables = [array for table in model.tables.values() for array in (table.weights, table.accumulator)]
    return dense and all(bool(np.isfinite(array).all()) for array in tables)


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
        if isinstance(frequency, StreamingFrequency):
            for name, own in frequency.state.items():
                np.copyto(own, tensors[f"{FREQUENCY}{name}"].numpy())
        return Progress(**manifest["progress"])
    return None


def drop_older_steps(folder: Path) -> None:
    """Keep the newest checkpoints for resuming, once the latest one is on disk."""
    drop_all_but(folder, [path.name for path in _steps(folder)[-KEPT:]])


def drop_all_but(folder: Path, kept: Sequence[str]) -> None:
    """Remove all folders of a run but some, also what a killed writer left; the files of evaluation stay."""
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path)


def _steps(folder: Path) -> list[Path]:
    """The checkpoints for resuming, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tensors(model: Model, optimizer: torch.optim.Adam, frequency: Frequency | None) -> dict[str, Tensor]:
    tensors = {f"dense.{name}": value.detach() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value.detach().clone()
    for name, table in model.tables.items():
        tensors[f"table.{name}"] = torch.from_numpy(table.weights)
        tensors[f"accumulator.{name}"] = torch.from_numpy(table.accumulator)
    if isinstance(frequency, StreamingFrequency):
        tensors |= {f"{FREQUENCY}{name}": torch.from_numpy(value) for name, value in frequency.state.items()}
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
