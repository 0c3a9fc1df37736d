"""Queries for many users at once, from samples or from a version: what evaluation and `retrieve` ask with."""

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
    context: dict[str, Column],
    exclude: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]] | None,
) -> Queries:
    """Queries with each user's stored features and clicks; a user row of -1 is a user of whom nothing is known.

    Args:
        features: the fitted features.
        users: all known users with their encoded features.
        clicks: their clicks.
        user_rows: (B,) rows of `users`, or -1.
        context: encoded context columns (B rows), or empty for a request without any.
        exclude: the items left out for each known user (CSR by user row), or None for none.
    """
    known = user_rows >= 0
    safe = np.where(known, user_rows, 0)
    columns: dict[str, Column] = {}
    for feature in features.user_columns:
        stored = take(users.features[feature.name], safe)
        # Someone without a row is an unknown user, not a user whose id is missing: that is what training made of ids
        # that it left out.
        absent = np.full(len(safe), UNKNOWN, np.int32) if feature.name == c.USER_ID else feature.absent(len(safe))
        columns[feature.name] = stored if known.all() else _blend(stored, absent, known)
    for feature in features.context:
        columns[feature.name] = context[feature.name] if context else feature.absent(len(safe))
    excluded = Exclusions.of([[]] * len(safe)) if exclude is None else Exclusions(*_slices(*exclude, safe, known))
    indptr, rows = _slices(clicks.indptr, clicks.item_row, safe, known)
    return Queries(columns, Bag(indptr, rows.astype(np.int32)), excluded)


def _slices(
    indptr: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    user_rows: npt.NDArray[np.int64],
    known: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    counts = np.where(known, indptr[user_rows + 1] - indptr[user_rows], 0)
    return pointers(counts), rows[ranges(indptr[user_rows], counts)].astype(np.int64)


def _blend(stored: Column, absent: Column, known: npt.NDArray[np.bool_]) -> Column:
    """Stored rows where the user is known, missing ones elsewhere."""
    both = concatenate([stored, absent])
    return take(both, np.where(known, np.arange(len(known)), len(known) + np.arange(len(known))))
