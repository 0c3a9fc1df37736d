"""How often each positive is fed: hot items less often, cold items more often, by a hash that any engine computes.

N items.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ibis import _

from twotower.samples.engine import Engine
from twotower.samples.names import COPIES, ITEM_ROW, USER_ROW
from twotower.samples.options import ColdOptions, HotOptions
from twotower.schema import columns as c

PRIME, FACTOR = 2_147_483_647, 1_103_515_245
"""Of the hash: x -> x * FACTOR modulo PRIME."""
_WHOLE, _CHANCE = "whole", "chance"


def hashed(seed: int) -> Any:
    """A number in 0..2^31 - 2 for each row, from its event, user and item alone."""
    value = turned(_[c.EVENT_SEQ] % PRIME + seed % PRIME)
    value = turned(value + _[USER_ROW])
    return turned(value + _[ITEM_ROW])


def turned(value: Any) -> Any:
    """One turn of a multiplicative hash; all steps stay within 64 bits."""
    return (value.cast("int64") % PRIME) * FACTOR % PRIME


def expected_copies(clicks: npt.NDArray[np.int64], hot: HotOptions, cold: ColdOptions) -> npt.NDArray[np.float64]:
    """How often a click of each item is fed (N,), in expectation, by the clicks (N,) of each item.

    `word2vec` is the rule of that program's code, `sqrt` the one of the paper (Mikolov et al. 2013, eq. 5).
    """
    clicked = clicks > 0
    ratio = clicks / max(1e-12, clicks[clicked].mean() if clicked.any() else 1)
    safe = np.where(clicked, ratio, 1)
    hot_powers = {"none": 0.0, "sqrt": 0.5, "power": hot.power, "word2vec": 0.5}
    kept = (hot.threshold / safe) ** hot_powers[hot.form]
    if hot.form == "word2vec":
        kept += hot.threshold / safe
    cold_powers = {"none": 0.0, "sqrt": 0.5, "power": cold.power}
    repeated = np.minimum((cold.threshold / safe) ** cold_powers[cold.form], cold.most)
    copies: npt.NDArray[np.float64] = np.minimum(kept, 1) * np.maximum(repeated, 1)
    return np.where(clicked, copies, 1.0)


def with_copies(engine: Engine, positives: Any, copies: npt.NDArray[np.float64], seed: int) -> Any:
    """Positives with the number of times that each is fed: the whole part of `copies` (N,), and one more by chance."""
    whole = np.floor(copies)
    table = {
        ITEM_ROW: np.arange(len(copies), dtype=np.int32),
        _WHOLE: whole.astype(np.int32),
        _CHANCE: np.round((copies - whole) * PRIME).astype(np.int64),
    }
    of_item = engine.put("item_copies", pa.table(table))
    drawn = (hashed(seed) < _[_CHANCE]).cast("int32")
    joined = positives.inner_join(of_item, ITEM_ROW)
    return joined.mutate(**{COPIES: (_[_WHOLE] + drawn).cast("int32")}).drop(_WHOLE, _CHANCE)


def by_decile(clicks: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> list[int]:
    """Rows of each tenth of the clicked items, the least clicked tenth first.

    >>> by_decile(np.arange(20, 0, -1), np.arange(20, 0, -1))
    [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    """
    order = np.argsort(clicks, kind="stable")
    clicked = order[clicks[order] > 0]
    return [int(rows[part].sum()) for part in np.array_split(clicked, 10)]
