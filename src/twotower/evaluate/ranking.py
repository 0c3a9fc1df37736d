"""Judge rankers on held-out impressions, and the pre-ranker by which of the ranker's best candidates it keeps.

R held-out impressions, B users, n candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries
from twotower.channels.vector_channel import latest
from twotower.evaluate.calibration import auc, auc_within, calibration_error, log_loss, reliability, sigmoid
from twotower.evaluate.held_out import read_held_out
from twotower.evaluate.holdout import stored_queries
from twotower.evaluate.metrics import PerUser, summarise
from twotower.features.columns import Bag, Column, pointers, ranges, take
from twotower.features.feature_set import encode_table
from twotower.samples.read import Clicks, Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.schema.tables import as_ids
from twotower.towers.ranker import FIRST_POSITION, Ranker

BATCH = 8192
SHOWN = (c.USER_ID, c.ITEM_ID, c.OUTCOME, c.REQUEST_TS_MS, c.CLICK_TS_MS)
"""Columns of held-out impressions that rankers are judged by."""

Reals = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shown:
    """Held-out impressions of known items (R,)."""

    user_row: Longs
    """-1 = a user that the samples do not have."""
    item_row: Longs
    clicked: Reals
    position: npt.NDArray[np.int32]
    """From 1; all at the first where the log has no positions."""
    ts_ms: Longs
    context: dict[str, Column]
    clicks: Clicks
    """Those of training and, after them, those of the held-out period."""

    def __len__(self) -> int:
        return len(self.item_row)


def read_shown(path: Path, samples: Samples) -> Shown:
    """Held-out impressions as rows of the samples.

    Raises:
        DataError: there are none, or none of a known item, or they lack a context column.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist: rankers are judged by what was shown after their training; import or simulate the "
            "data again with --holdout"
        )
    context = samples.features.context
    table = read_held_out(path, [*SHOWN, *(f.name for f in context)]).rows
    item = samples.items.positions.find(as_ids(table.column(c.ITEM_ID), path.name).combine_chunks())
    known = item >= 0
    if not known.any():
        raise DataError(f"{path} has {len(item)} rows, none of them of an item of the samples")
    table, item = table.filter(pa.array(known)), item[known]
    position = np.zeros(table.num_rows, np.int32)
    if c.POSITION in table.column_names:
        position = table.column(c.POSITION).fill_null(0).to_numpy()
    user = samples.users.positions.find(as_ids(table.column(c.USER_ID), path.name).combine_chunks())
    clicked = pc.equal(table.column(c.OUTCOME), c.CLICKED).to_numpy()
    by_known = clicked & (user >= 0)
    click_ts_ms = table.column(c.CLICK_TS_MS).fill_null(0).to_numpy()
    return Shown(
        user,
        item,
        clicked.astype(np.float64),
        position if position.any() else np.full(len(position), FIRST_POSITION, np.int32),
        table.column(c.REQUEST_TS_MS).to_numpy(),
        encode_table(context, table),
        _joined(samples.clicks, user[by_known], item[by_known], click_ts_ms[by_known]),
    )


def _joined(clicks: Clicks, user_row: Longs, item_row: Longs, ts_ms: Longs) -> Clicks:
    """Clicks with further ones, each user's in the order of time."""
    count = len(clicks.indptr) - 1
    owner = np.concatenate([clicks.owners, user_row])
    at = np.concatenate([clicks.ts_ms, ts_ms])
    order = np.lexsort((at, owner))
    items = np.concatenate([clicks.item_row, item_row.astype(np.int32)])
    return Clicks(pointers(np.bincount(owner, minlength=count)), items[order], at[order])


def evaluate_ranker(samples: Samples, shown: Shown, model: Ranker, resamples: int, seed: int) -> dict[str, Any]:
    """How well a ranker orders held-out impressions, and whether its probabilities are calibrated.

    Order (AUC) is judged without positions, as candidates are scored; probabilities (log loss, calibration) at the
    positions where the items were shown. Histories are the clicks before the request, those of the held-out period
    included, as a server knows them. The model is calibrated.

    Returns:
        `impressions`, `clicked` (share), `users` (with both kinds), `auc`, `position_auc` (of pairs at the same place:
        what the log's own order put first is clicked more for its place, too), `user_auc` (mean over users, of equal
        weight, with its interval), `log_loss`, `log_loss_constant` (of the click rate of training), `ece`, `ece_raw`
        (before Platt scaling), `deciles` (share, mean probability, click rate).
    """
    logits = score_shown(samples, shown, model)
    biased = logits + bias_of(model, shown.position)
    scale, offset = (float(one) for one in model.calibration)
    p = sigmoid(scale * biased + offset)
    impressions = samples.impressions
    rate = shown.clicked.mean() if impressions is None else float(impressions.clicked.mean())
    return {
        "impressions": len(shown),
        "clicked": round(float(shown.clicked.mean()), 5),
        "auc": round(auc(logits, shown.clicked), 5),
        "position_auc": round(auc_within(logits, shown.clicked, shown.position), 5),
        **user_auc(logits, shown, resamples, seed),
        "log_loss": round(log_loss(p, shown.clicked), 5),
        "log_loss_constant": round(log_loss(np.full(len(p), rate), shown.clicked), 5),
        "ece": round(calibration_error(p, shown.clicked), 5),
        "ece_raw": round(calibration_error(sigmoid(biased), shown.clicked), 5),
        "deciles": [{key: round(value, 5) for key, value in row.items()} for row in reliability(p, shown.clicked)],
    }


def bias_of(model: Ranker, position: npt.NDArray[np.int32]) -> Reals:
    """What positions (R,) add to the log-odds."""
    curve = np.array([float(model.position[0].detach()), *model.curve()])
    return curve[np.minimum(position, len(curve) - 1)]


def user_auc(scores: Reals, shown: Shown, resamples: int, seed: int) -> dict[str, Any]:
    """The mean over users of the AUC among their own impressions, of those who have both kinds."""
    known = shown.user_row >= 0
    users = shown.user_row[known]
    order = np.argsort(users, kind="stable")
    edges = np.flatnonzero(np.diff(users[order])) + 1
    each = np.array(
        [
            auc(scores[known][rows], shown.clicked[known][rows])
            for rows in np.split(order, edges)
            if 0 < shown.clicked[known][rows].sum() < len(rows)
        ]
    )
    if not len(each):
        return {"users": 0, "user_auc": None}
    return {"users": len(each), "user_auc": summarise(PerUser({"auc": each}), resamples, seed)["auc"].report()}


def score_shown(samples: Samples, shown: Shown, model: Ranker) -> Reals:
    """Log-odds (R,) at the first position, before calibration."""
    found = []
    for start in range(0, len(shown), BATCH):
        rows = np.arange(start, min(start + BATCH, len(shown)))
        context = {name: take(column, rows) for name, column in shown.context.items()}
        users = shown.user_row[rows]
        queries = queries_of_users(samples.features, samples.users, samples.clicks, users, context=context)
        before = _clicks_before(shown.clicks, shown.user_row[rows], shown.ts_ms[rows])
        items = {name: take(column, shown.item_row[rows]) for name, column in samples.items.features.items()}
        found.append(model.score(with_history(samples, model, queries.features, before), items))
    return np.concatenate(found).astype(np.float64)


def with_history(samples: Samples, model: Ranker, columns: Mapping[str, Column], clicks: Bag) -> dict[str, Column]:
    """Columns of users with what they clicked, catalogue rows, as a ranker reads it."""
    if (history := model.features.history) is None:
        return dict(columns)
    tokens = history.vocabulary.rows(samples.items.ids)
    return {**columns, history.name: latest(clicks, tokens, history.last)}


def _clicks_before(clicks: Clicks, user_row: Longs, ts_ms: Longs) -> Bag:
    """The clicks of users (R,) before a time each."""
    safe = np.maximum(user_row, 0)
    start, stop = clicks.indptr[safe], np.where(user_row >= 0, clicks.indptr[safe + 1], clicks.indptr[safe])
    counts = stop - start
    owner = np.repeat(np.arange(len(user_row)), counts)
    places = ranges(start, counts)
    kept = clicks.ts_ms[places] < ts_ms[owner]
    return Bag(pointers(np.bincount(owner[kept], minlength=len(user_row))), clicks.item_row[places[kept]])


Retrieve = Callable[[Queries, int], npt.NDArray[np.int64]]
"""Candidates (B, n) of users, best first, -1 where a list has ended."""


def kept_of_top(
    samples: Samples,
    user_rows: Longs,
    retrieve: Retrieve,
    pre_rank: Ranker,
    rank: Ranker,
    *,
    retrieved: int,
    kept: int,
    top: int,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The share of the ranker's `top` best candidates that are among the `kept` ones of the pre-ranker.

    Here the ranker scores all candidates (`retrieved` of each user, (B,)), which it never does when serving. The first
    ones of the fused list are the baseline that a pre-ranker must beat.

    Returns:
        `users`, `retrieved` (mean), `kept`, `top`, `share` and `share_fused`, the latter two with intervals.
    """
    shares: list[tuple[float, float]] = []
    sizes = []
    for start in range(0, len(user_rows), 256):
        queries = stored_queries(samples, user_rows[start : start + 256])
        for place, listed in enumerate(retrieve(queries, retrieved)):
            candidates = listed[listed >= 0]
            if len(candidates) <= kept:
                continue
            first, best = (_ordered(samples, model, queries, place, candidates) for model in (pre_rank, rank))
            best = best[:top]
            shares.append((float(np.isin(best, first[:kept]).mean()), float((best < kept).mean())))
            sizes.append(len(candidates))
    if not sizes:
        return {"users": 0, "retrieved": retrieved, "kept": kept, "top": top, "share": None, "share_fused": None}
    values = dict(zip(("share", "share_fused"), np.array(shares).T, strict=True))
    figures = summarise(PerUser(values), resamples, seed)
    return {
        "users": len(sizes),
        "retrieved": round(float(np.mean(sizes)), 1),
        "kept": kept,
        "top": top,
        **{name: figure.report() for name, figure in figures.items()},
    }


def _ordered(samples: Samples, model: Ranker, queries: Queries, place: int, candidates: Longs) -> Longs:
    """The positions of one user's candidates in the order of a ranker."""
    one = np.array([place])
    clicks = take(queries.clicks, one)
    assert isinstance(clicks, Bag)
    columns = {name: take(column, one) for name, column in queries.features.items()}
    items = {name: take(column, candidates) for name, column in samples.items.features.items()}
    return np.argsort(-model.score(with_history(samples, model, columns, clicks), items), kind="stable")


def some_users(user_rows: Longs, most: int) -> Longs:
    """Distinct users spread evenly over those of a hold-out."""
    distinct = np.unique(user_rows[user_rows >= 0])
    return distinct[np.unique(np.linspace(0, len(distinct) - 1, min(most, len(distinct))).astype(np.int64))]
