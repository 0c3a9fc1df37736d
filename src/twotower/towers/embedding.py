"""Embedding tables that are read and updated by the row, never as a whole.

A step compacts the rows that it touches into a small dense matrix, back-propagates into that, and writes those rows
back with row-wise Adagrad (Duchi et al. 2011, with one accumulator a row). No work of a step grows with the table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.features.vocabulary import FIRST

EPSILON = 1e-10
INITIAL_LENGTH = 0.1
"""Norm of a new row, about."""


@dataclass
class EmbeddingTable:
    """One table with its optimizer state; `update` changes both in place."""

    weights: npt.NDArray[np.float32]
    """(rows, D)"""
    accumulator: npt.NDArray[np.float32]
    """(rows,) running sum of the mean squared gradient of each row."""

    @classmethod
    def new(cls, rows: int, dimension: int, generator: np.random.Generator) -> "EmbeddingTable":
        """A table whose rows are drawn from a normal distribution with a small norm (about 0.1).

        A large initial norm would add noise that row-wise Adagrad cannot undo and that the cosine keeps visible. The
        rows for missing and unknown ids begin at zero, so that they add nothing where training never met them.
        """
        weights = generator.standard_normal((rows, dimension), dtype=np.float32) * np.float32(
            INITIAL_LENGTH / np.sqrt(dimension)
        )
        weights[:FIRST] = 0
        return cls(weights, np.zeros(rows, np.float32))

    def update(self, rows: npt.NDArray[np.int64], gradient: npt.NDArray[np.float32], rate: float) -> None:
        """One step of row-wise Adagrad on distinct rows (U,) with their gradient (U, D)."""
        self.accumulator[rows] += np.einsum("ij,ij->i", gradient, gradient) / np.float32(gradient.shape[1])
        step = np.float32(rate) / (np.sqrt(self.accumulator[rows]) + np.float32(EPSILON))
        self.weights[rows] -= gradient * step[:, None]

    def repair(self, rows: npt.NDArray[np.int64]) -> int:
        """Set accumulators that are not finite to the median of the others; gives how many there were.

        A row with an infinite accumulator never moves again, and one with NaN becomes NaN at its next step.

        >>> table = EmbeddingTable(np.zeros((3, 1), np.float32), np.array([2, np.inf, 4], np.float32))
        >>> table.repair(np.arange(3)), table.accumulator.tolist()
        (1, [2.0, 3.0, 4.0])
        """
        broken = rows[~np.isfinite(self.accumulator[rows])]
        if len(broken):
            used = self.accumulator[np.isfinite(self.accumulator) & (self.accumulator > 0)]
            self.accumulator[broken] = np.median(used) if len(used) else 0
        return len(broken)


class Compactor:
    """Finds the distinct rows among those a step touches, in time that depends on the step alone.

    It keeps one number for each row of the table and never clears them: an old number is recognised because it does not
    point back.
    """

    def __init__(self, rows: int) -> None:
        self._position = np.zeros(rows, np.int32)

    def compact(self, rows: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Distinct rows (U,) in the order of their last occurrence, and the position of each input among them (n,).

        >>> distinct, position = Compactor(9).compact(np.array([7, 3, 7], np.int32))
        >>> distinct.tolist(), position.tolist()
        ([3, 7], [1, 0, 1])
        """
        order = np.arange(len(rows), dtype=np.int32)
        self._position[rows] = order
        distinct = rows[self._position[rows] == order]
        self._position[distinct] = np.arange(len(distinct), dtype=np.int32)
        return distinct.astype(np.int64), self._position[rows].astype(np.int64)


@dataclass(frozen=True)
class TouchedRows:
    """The rows of one table that a step touches, as a dense matrix that takes a gradient."""

    rows: npt.NDArray[np.int64]
    """(U,)"""
    values: Tensor
    """(U, D), a leaf."""


def mean_of_bags(values: Tensor, position: Tensor, indptr: Tensor) -> Tensor:
    """The mean of the rows of each bag (B, D): `position` (nnz,) in `values` (U, D); an empty bag is zero."""
    return torch.nn.functional.embedding_bag(position, values, indptr, mode="mean", include_last_offset=True)
