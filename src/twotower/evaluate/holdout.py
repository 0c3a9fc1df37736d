"""Judge channels on the held-out positives of a workspace, warm and cold users and items apart.

U users of the samples, B users who are judged.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.lists import end_to_end
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Candidates, Queries, Retriever
from twotower.datasets.workspace import HOLDOUT, HOLDOUT_COLD, HOLDOUT_IMPRESSIONS
from twotower.evaluate.held_out import read_held_out
from twotower.evaluate.metrics import PerUser, difference, score_lists, summarise
from twotower.evaluate.options import EvaluateOptions
from twotower.features.columns import Bag, Column, concatenate, pointers, take
from twotower.features.feature_set import encode_table
from twotower.features.vocabulary import Positions
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.schema.clock import BEYOND_NOW
from twotower.schema.errors import DataError
from twotower.schema.tables import as_ids

log = logging.getLogger(__name__)

BATCH = 1024
"""Users asked at a time."""


@dataclass(frozen=True)
class Truth:
    """Held-out positives by user."""

    user_rows: npt.NDArray[np.int64]
    """(B,)"""
    items: Bag
    """Their distinct held-out items."""
    context: Mapping[str, Column] = field(default_factory=dict)
    """Of the request by which each user is asked, encoded (B rows); empty = requests carry none."""
    beyond_now: int = 0
    """Held-out rows that are left out, because they are later than now."""


@dataclass(frozen=True)
class FirstRequests:
    """The context in which each user first asked after training."""

    context: dict[str, Column]
    """Encoded (U rows); missing values where a user never asked."""
    known: npt.NDArray[np.bool_]
    """(U,) the user did."""


def evaluate(
    samples: Samples, workspace: Path, channels: Sequence[Retriever], options: EvaluateOptions, *, seed: int = 0
) -> dict[str, Any]:
    """Metrics of the first channel and of baselines, with intervals and paired differences; cold users and items apart.

    What a user clicked in training is not offered. Each user is asked once, as in the first held-out request.

    Args:
        samples: what the channels were trained on.
        workspace: with `holdout.parquet` and, if there are cold ones, `holdout_cold.parquet`.
        channels: the judged one first, then baselines.
        options: cut-offs, resamples, and whether requests carry a context.
        seed: of the resampling.

    Returns:
        Metrics by name, each `{"value", "ci95"}`; `users`; `dropped`: rows of the hold-out that are left out, by
        reason; `context`: the `features` that requests carry and the `users` whose first request is known; each
        baseline's figures under its name, recall also as `difference` of the judged channel to it; `cold`: the same
        by reason.

    Raises:
        DataError: there is no hold-out, or none of its users and items are known.
    """
    first = first_requests(workspace / HOLDOUT_IMPRESSIONS, samples) if options.context else None
    warm = asked_first(read_truth(workspace / HOLDOUT, samples), first)
    judged, *baselines = channels
    scores = {channel.name: _score(samples, channel, warm, options.k) for channel in channels}

    def figures(per_user: PerUser) -> dict[str, Any]:
        return {name: figure.report() for name, figure in summarise(per_user, options.bootstrap, seed).items()}

    result: dict[str, Any] = {
        "users": len(warm.user_rows),
        "channel": judged.name,
        "context": carried(warm, first),
        "dropped": {BEYOND_NOW: warm.beyond_now} if warm.beyond_now else {},
        **figures(scores[judged.name]),
    }
    for baseline in baselines:
        theirs = figures(scores[baseline.name])
        for k in options.k:
            ours, other = (scores[name].values[f"recall@{k}"] for name in (judged.name, baseline.name))
            theirs[f"recall@{k}"]["difference"] = difference(ours, other, options.bootstrap, seed).report()
        result[baseline.name] = theirs
    result["cold"] = {
        reason: {
            "users": len(truth.user_rows),
            **{channel.name: figures(_score(samples, channel, truth, options.k)) for channel in channels},
        }
        for reason, truth in cold_truths(workspace, samples, first).items()
    }
    return result


def judge(samples: Samples, channel: Retriever, truth: Truth, metric: str) -> float:
    """One metric of a channel, such as `recall@50`, without what users clicked in training."""
    k = int(metric.partition("@")[2])
    return float(_score(samples, channel, truth, [k]).values[metric].mean())


def read_truth(path: Path, samples: Samples) -> Truth:
    """Held-out positives as rows of the samples' users and items.

    Raises:
        DataError: the file is missing, or no row is of a known user and item.
    """
    return _read_truth(path, samples.users.positions, samples.items.positions)


def check_truth(path: Path, users: pa.ChunkedArray, items: pa.ChunkedArray) -> None:
    """Refuse a hold-out that judges nothing, before anything is trained; ids of users and items ascend.

    Raises:
        DataError: the file is missing, or no row is of a known user and item.
    """
    _read_truth(path, Positions(users.combine_chunks()), Positions(items.combine_chunks()))


def _read_truth(path: Path, users: Positions, items: Positions) -> Truth:
    held_out = read_held_out(path, [c.USER_ID, c.ITEM_ID])
    if (truth := _known_truth(held_out.rows, users, items, path.name)) is None:
        raise DataError(
            f"{path} has {held_out.rows.num_rows} rows, none of them of a user and an item of the workspace: nothing "
            "can be judged by it. Hold out other events, or remove the file to go on without"
        )
    return replace(truth, beyond_now=held_out.beyond_now)


def first_requests(path: Path, samples: Samples) -> FirstRequests | None:
    """The context of each user's first impression in the held-out period, clicked or not.

    It is not the context of a held-out click, which would tell which of a user's requests ends in a click.

    Returns:
        None where there are no features of contexts, or no held-out impressions; the latter is logged.

    Raises:
        DataError: the impressions lack a column.
    """
    features = samples.features.context
    if not features:
        return None
    names = ", ".join(feature.name for feature in features)
    if not path.exists():
        log.warning("%s does not exist: held-out users are asked without their context (%s)", path, names)
        return None
    wanted = [c.USER_ID, c.REQUEST_TS_MS, *(feature.name for feature in features)]
    table = read_held_out(path, wanted).rows.select(wanted)
    user = samples.users.positions.find(as_ids(table.column(c.USER_ID), path.name).combine_chunks())
    order = np.lexsort((table.column(c.REQUEST_TS_MS).fill_null(0).to_numpy(), user))
    users, place = np.unique(user[order], return_index=True)
    users, chosen = users[users >= 0], order[place[users >= 0]]
    row = np.full(len(samples.users), len(chosen))
    row[users] = np.arange(len(chosen))
    encoded = encode_table(features, table.take(pa.array(chosen)))
    context = {f.name: take(concatenate([encoded[f.name], f.absent(1)]), row) for f in features}
    return FirstRequests(context, row < len(chosen))


def asked_first(truth: Truth, first: FirstRequests | None) -> Truth:
    """The same users, asked as in their first held-out request; None = without a context."""
    if first is None:
        return truth
    if unknown := int((~first.known[truth.user_rows]).sum()):
        asked = len(truth.user_rows)
        log.warning("%d of %d users have no held-out impression: asked without a context", unknown, asked)
    return replace(truth, context={name: take(column, truth.user_rows) for name, column in first.context.items()})


def held_out(workspace: Path, samples: Samples, context: bool) -> Truth:
    """The hold-out of a workspace, its users asked as `evaluate` asks them.

    Raises:
        DataError: there is no hold-out, or none of its users and items are known.
    """
    first = first_requests(workspace / HOLDOUT_IMPRESSIONS, samples) if context else None
    return asked_first(read_truth(workspace / HOLDOUT, samples), first)


def carried(truth: Truth, first: FirstRequests | None) -> dict[str, Any]:
    """What the requests of users carry, as it stands in reports: `features`, and of how many `users`."""
    known = 0 if first is None else int(first.known[truth.user_rows].sum())
    return {"features": list(truth.context), "users": known}


def _known_truth(table: pa.Table, users: Positions, items: Positions, where: str) -> Truth | None:
    """Rows of known users and items, the others counted in the log; None where there are no known ones."""
    user = users.find(as_ids(table.column(c.USER_ID), f"{where}, column {c.USER_ID}").combine_chunks())
    item = items.find(as_ids(table.column(c.ITEM_ID), f"{where}, column {c.ITEM_ID}").combine_chunks())
    both = (user >= 0) & (item >= 0)
    if unknown := int((~both).sum()):
        log.warning("%s: %d of %d rows are not of a known user and item and left out", where, unknown, len(both))
    if not both.any():
        return None
    size = len(items.values)
    pairs = np.unique(user[both] * size + item[both])
    owners, place = np.unique(pairs // size, return_inverse=True)
    return Truth(owners, Bag(pointers(np.bincount(place)), (pairs % size).astype(np.int32)))


def cold_truth(path: Path, reason: str, samples: Samples) -> Truth | None:
    """The cold held-out positives of one reason; None where the file has none of known users and items."""
    if not path.exists():
        return None
    held_out = read_held_out(path, [c.USER_ID, c.ITEM_ID, c.REASON])
    rows = held_out.rows.filter(pc.equal(held_out.rows.column(c.REASON), reason))
    return _known_truth(rows, samples.users.positions, samples.items.positions, f"{path.name}, {reason}")


def cold_truths(workspace: Path, samples: Samples, first: FirstRequests | None) -> dict[str, Truth]:
    """The cold held-out positives of a workspace by reason, their users asked as in their first held-out request."""
    truths = {reason: cold_truth(workspace / HOLDOUT_COLD, reason, samples) for reason in (c.NEW_USER, c.NEW_ITEM)}
    return {reason: asked_first(truth, first) for reason, truth in truths.items() if truth is not None}


def _score(samples: Samples, channel: Retriever, truth: Truth, ks: Sequence[int]) -> PerUser:
    lists = ranked(samples, channel, truth.user_rows, min(max(ks), len(samples.items)), truth.context)
    return score_lists(lists, truth.items, samples.item_positives, ks)


def ranked(
    samples: Samples,
    channel: Retriever,
    user_rows: npt.NDArray[np.int64],
    k: int,
    context: Mapping[str, Column] | None = None,
) -> npt.NDArray[np.int64]:
    """The k best items (B, k) of each user (B,) by one channel, without what they clicked in training.

    `context` is that of the requests, encoded (B rows); without it they carry none.
    """
    return candidates(samples, channel, user_rows, k, context).rows


def candidates(
    samples: Samples,
    channel: Retriever,
    user_rows: npt.NDArray[np.int64],
    k: int,
    context: Mapping[str, Column] | None = None,
) -> Candidates:
    """The same with their scores."""
    parts = []
    for start in range(0, len(user_rows), BATCH):
        rows = np.arange(start, min(start + BATCH, len(user_rows)))
        told = {name: take(column, rows) for name, column in (context or {}).items()}
        parts.append(channel.retrieve(stored_queries(samples, user_rows[rows], told), k))
    return end_to_end(parts)


def stored_queries(
    samples: Samples, user_rows: npt.NDArray[np.int64], context: Mapping[str, Column] | None = None
) -> Queries:
    """Queries of users (B,) of the samples, who are not offered what they clicked in training."""
    clicks = samples.clicks
    return queries_of_users(samples.features, samples.users, clicks, user_rows, context=context, exclude=clicks.items)
