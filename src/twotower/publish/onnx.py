"""The dense part of a tower as ONNX: rows of tables and numbers in; a unit vector, or one for each interest, out.

Ids are looked up outside, in memory-mapped tables, so that a table can change without the network.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
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

Call = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


Dims = dict[int, "torch.export.Dim"]
"""The dimensions of an input whose sizes are free."""


def example_inputs(features: Sequence[Fitted], rows: int, free: Dims) -> dict[str, tuple[Tensor, Dims]]:
    """An example of each input that features give, and the dimensions of it that are free.

    A feature is (B, width) float32; a sequence that the tower encodes is (B, L, width), with (B,) int64 lengths. `rows`
    is the B of the examples; `free` says whether B is free.
    """
    inputs: dict[str, tuple[Tensor, Dims]] = {}
    for place, feature in enumerate(features):
        if is_encoded(feature):
            length = torch.export.Dim(f"length{place}", min=1)
            inputs[feature.name] = (torch.zeros(rows, 5, input_width(feature)), {**free, 1: length})
            inputs[feature.name + LENGTH] = (torch.tensor([5, 2, 0])[:rows], free)
        else:
            inputs[feature.name] = (torch.zeros(rows, input_width(feature)), free)
    return inputs


def export_tower(tower: Tower | WithPopularity, features: Sequence[Fitted], path: Path) -> None:
    """Write a tower with the inputs of `tower_inputs`, each behind `input.`, and the output `vector`, (B, D) or
    (B, K, D).

    The preference for popular items is one more input, (B, 2), where there is one.
    """
    free: Dims = {0: torch.export.Dim("batch", min=1)}
    inputs = example_inputs(features, 3, free)
    if isinstance(tower, WithPopularity) and tower.of_items:
        inputs[POPULARITY] = (torch.zeros(3, 2), free)
    export(tower, {f"input.{name}": given for name, given in inputs.items()}, VECTOR, path, _vector)


def _vector(tower: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    vector: Tensor = tower({name.removeprefix("input."): value for name, value in inputs.items()})
    return vector


class _ByPosition(nn.Module):
    """A module whose inputs come one after the other, as the exporter wants them."""

    def __init__(self, module: nn.Module, names: list[str], call: Call) -> None:
        super().__init__()
        self.module = module
        self.names = names
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.module, dict(zip(self.names, inputs, strict=True)))


def export(module: nn.Module, inputs: Mapping[str, tuple[Tensor, Dims]], output: str, path: Path, call: Call) -> None:
    """Write a module as ONNX.

    `inputs` are by name an example and its free dimensions; `call` gives the output of the module for named inputs.
    """
    examples, shapes = zip(*inputs.values(), strict=True)
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
            torch.onnx.export(
                _ByPosition(module, list(inputs), call).eval(),
                examples,
                str(path),
                input_names=list(inputs),
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
    """ONNX Runtime with a network; `threads` are those of one call."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # From bytes, so that no other file is opened that the network names as the place of its weights.
    return onnxruntime.InferenceSession(bytes(map_file(path)), options, providers=["CPUExecutionProvider"])


class OnnxTower:
    """A tower run by ONNX Runtime over memory-mapped tables, by name; safe to call from several threads."""

    def __init__(self, path: Path, features: Sequence[Fitted], tables: Mapping[str, Table], threads: int = 1) -> None:
        self._session = open_session(path, threads)
        self._preference = any(given.name == f"input.{POPULARITY}" for given in self._session.get_inputs())
        self._features = tuple(features)
        self._tables = tables

    @property
    def tables(self) -> Mapping[str, Table]:
        """The tables that it reads, by name."""
        return self._tables

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
