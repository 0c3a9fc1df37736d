"""The dense part of a tower as ONNX: rows of tables and numbers in, unit vectors out, one or one for each interest.

Looking ids up stays outside, in memory-mapped tables, so that a table can change without the network.
"""

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import onnxruntime
import torch
from torch import Tensor, nn

from twotower.features.columns import Column
from twotower.features.fitted import Fitted
from twotower.schema.files import map_file
from twotower.towers.towers import LENGTH, POPULARITY, Tower, WithPopularity, input_width, is_encoded
from twotower.towers.two_tower import Floats, Table, tower_inputs

VECTOR = "vector"


class _ByPosition(nn.Module):
    """A tower with its inputs one after the other, as the exporter wants them."""

    def __init__(self, tower: Tower | WithPopularity, names: list[str]) -> None:
        super().__init__()
        self.tower = tower
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        vector: Tensor = self.tower(dict(zip(self.names, inputs, strict=True)))
        return vector


def export_tower(tower: Tower | WithPopularity, features: Sequence[Fitted], path: Path) -> None:
    """Write a tower with the inputs of `tower_inputs`, each behind `input.`, and the output `vector`, (B, D) or
    (B, K, D).

    A feature is (B, width) float32; a sequence that the tower encodes is (B, L, width), with (B,) int64 lengths; the
    preference for popular items, where there is one, is (B, 2).
    """
    batch = torch.export.Dim("batch", min=1)
    examples: dict[str, Tensor] = {}
    shapes: list[dict[int, torch.export.Dim]] = []
    for place, feature in enumerate(features):
        if is_encoded(feature):
            examples[feature.name] = torch.zeros(3, 5, input_width(feature))
            shapes.append({0: batch, 1: torch.export.Dim(f"length{place}", min=1)})
            examples[feature.name + LENGTH] = torch.tensor([5, 2, 0])
        else:
            examples[feature.name] = torch.zeros(3, input_width(feature))
        shapes.append({0: batch})
    if isinstance(tower, WithPopularity) and tower.of_items:
        examples[POPULARITY] = torch.zeros(3, 2)
        shapes.append({0: batch})
    names = [f"input.{name}" for name in examples]
    export(_ByPosition(tower, list(examples)), tuple(examples.values()), names, VECTOR, tuple(shapes), path)


def export(
    module: nn.Module,
    examples: tuple[Tensor, ...],
    names: list[str],
    output: str,
    shapes: tuple[dict[int, torch.export.Dim], ...],
    path: Path,
) -> None:
    """Write a module as ONNX.

    Args:
        module: takes the inputs one after the other.
        examples: of the inputs.
        names: of the inputs.
        output: name of what it gives.
        shapes: for each input, its dimensions that are free.
        path: the file.
    """
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
            torch.onnx.export(
                module.eval(),
                examples,
                str(path),
                input_names=names,
                output_names=[output],
                dynamic_shapes=(shapes,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime with a network, on so many threads a call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # From bytes: a file that names further ones, with its weights, opens none of them.
    return onnxruntime.InferenceSession(bytes(map_file(path)), options, providers=["CPUExecutionProvider"])


class OnnxTower:
    """A tower run by ONNX Runtime over memory-mapped tables; safe to call from several threads.

    Args:
        path: the ONNX file.
        features: the tower's features.
        tables: embedding tables by name.
        threads: threads of one call.
    """

    def __init__(self, path: Path, features: Sequence[Fitted], tables: Mapping[str, Table], threads: int = 1) -> None:
        self._session = open_session(path, threads)
        self._preference = any(one.name == f"input.{POPULARITY}" for one in self._session.get_inputs())
        self._features = tuple(features)
        self._tables = tables

    def with_tables(self, tables: Mapping[str, Table]) -> Self:
        """The same network over other tables."""
        other = copy.copy(self)
        other._tables = tables
        return other

    def encode(self, columns: Mapping[str, Column]) -> Floats:
        """Vectors (B, D), or (B, K, D) of interests, from encoded columns."""
        inputs = tower_inputs(self._features, columns, self._tables, self._preference)
        vectors: Floats = self._session.run([VECTOR], {f"input.{name}": value for name, value in inputs.items()})[0]
        return vectors
