"""Queries of users from samples or a version: the one way from user rows to what channels are asked with."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from twotower.channels.retriever import Queries
from twotower.features.columns import Bag, Column, concatenate, pointers, ranges, take
from twotower.features.feature_set import FeatureSet
from twotower.features.vocabulary import UNKNOWN
from twotower.index.protocol import Exclusions
from twotower.samples.read import Clicks, Entities
from twotower.schema import columns as c


def queries_of_users(
    features: FeatureSet,
    users: Entities,
    clicks: Clicks,
    user_rows: npt.NDArray[np.int64],
    *,
    context: Mapping[str, Column] | None = None,
    exclude: Bag | None = None,
) -> Queries:
    """Queries of users with their stored features and clicks.

    Args:
        features: the fitted features.
        users: all known users with their encoded features.
        clicks: their clicks.
        user_rows: (B,) rows of `users`; -1 is an unknown user.
        context: encoded context columns (B rows); None or empty = the requests carry none.
        exclude: catalogue rows left out for each of `users`; None = none.
    """
    known = user_rows >= 0
    safe = np.where(known, user_rows, 0)
    columns: dict[str, Column] = {}
    for feature in features.user_columns:
        stored = take(users.features[feature.name], safe)
        # A user without a row is unknown, not one whose id is missing: training treats ids that it leaves out so.
        absent = np.full(len(safe), UNKNOWN, np.int32) if feature.name == c.USER_ID else feature.absent(len(safe))
        columns[feature.name] = stored if known.all() else _blend(stored, absent, known)
    for feature in features.context:
        columns[feature.name] = context[feature.name] if context else feature.absent(len(safe))
    excluded = Exclusions.none(len(safe))
    if exclude is not None:
        left_out = _of_users(exclude, safe, known)
        excluded = Exclusions(left_out.indptr, left_out.rows.astype(np.int64))
    return Queries(columns, _of_users(clicks.items, safe, known), excluded)


def _of_users(lists: Bag, user_rows: npt.NDArray[np.int64], known: npt.NDArray[np.bool_]) -> Bag:
    starts = lists.indptr[user_rows]
    counts = np.where(known, lists.indptr[user_rows + 1] - starts, 0)
    return Bag(pointers(counts), lists.rows[ranges(starts, counts)])


def _blend(stored: Column, absent: Column, known: npt.NDArray[np.bool_]) -> Column:
    """Stored rows where the user is known, missing ones elsewhere."""
    both = concatenate([stored, absent])
    return take(both, np.where(known, np.arange(len(known)), len(known) + np.arange(len(known))))
