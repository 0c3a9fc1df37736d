"""The dense part of a tower as ONNX: rows of tables and numbers in, unit vectors out.

Looking ids up stays outside, in memory-mapped tables, so that a table can change without the network.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from twotower.features.columns import Column
from twotower.features.fitted import Fitted
from twotower.models.towers import Tower, input_width
from twotower.models.two_tower import Floats, tower_inputs

VECTOR = "vector"


class _ByPosition(nn.Module):
    """A tower with its inputs one after the other, as the exporter wants them."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, *inputs: Tensor) -> Tensor:
        vector: Tensor = self.tower(dict(zip(self.tower.names, inputs, strict=True)))
        return vector


def export_tower(tower: Tower, features: Sequence[Fitted], path: Path) -> None:
    """Write a tower with one input for each feature, (B, width) float32, and the output `vector` (B, D)."""
    names = [f"input.{feature.name}" for feature in features]
    examples = tuple(torch.zeros(3, input_width(feature)) for feature in features)
    batch = torch.export.Dim("batch", min=1)
    quiet = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in quiet]
    for logger in quiet:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
            torch.onnx.export(
                _ByPosition(tower).eval(),
                examples,
                str(path),
                input_names=names,
                output_names=[VECTOR],
                dynamic_shapes=(tuple({0: batch} for _ in features),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)


class OnnxTower:
    """A tower run by ONNX Runtime over memory-mapped tables; safe to call from several threads.

    Args:
        path: the ONNX file.
        features: the tower's features.
        tables: embedding tables by name.
        threads: threads of one call.
    """

    def __init__(
        self, path: Path, features: Sequence[Fitted], tables: Mapping[str, npt.NDArray[np.float32]], threads: int = 1
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._features = tuple(features)
        self._tables = tables

    def encode(self, columns: Mapping[str, Column]) -> Floats:
        """Vectors (B, D) from encoded columns."""
        inputs = tower_inputs(self._features, columns, self._tables)
        vectors: Floats = self._session.run([VECTOR], {f"input.{name}": value for name, value in inputs.items()})[0]
        return vectors
