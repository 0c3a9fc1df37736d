"""Golden queries: a few users with their answers, stored in a version and replayed before anyone serves from it.

Every channel answers for itself, and so does every ranker, about items spread over the catalogue. The fused list is
left out: it follows from theirs, and near ties, which another processor may round the other way, change its scores by
whole ranks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.channels.retriever import Queries
from twotower.features.columns import Bag, take
from twotower.publish.version import GOLDEN, RANKERS, Version
from twotower.schema.files import read_json, write_json

USERS = 16
K = 20
RANKED = 200
"""Items that each ranker is asked about."""
TOLERANCE = 1e-4
"""Largest difference of a score: processors round differently, a wrong table or tower is off by far more."""


def write_golden(version: Version, folder: Path) -> None:
    """Record the answers of every channel for users spread over the version, and for a stranger."""
    write_json(folder / GOLDEN, {"k": K, "queries": _answers(version, _rows(version))})


def replay(version: Version) -> list[str]:
    """Ask the golden queries again; one sentence for each answer that is not as recorded, none where all agree."""
    recorded = read_json(version.path / GOLDEN)
    answers = _answers(version, _rows(version))
    if len(answers) != len(recorded["queries"]):
        return [f"{len(recorded['queries'])} golden queries are recorded, {len(answers)} are due"]
    problems = []
    for expected, answer in zip(recorded["queries"], answers, strict=True):
        if (sentence := _difference(expected, answer)) is not None:
            where = f"golden query of user {expected['user_id']!r}, channel {expected['channel']}"
            problems.append(f"{where}: {sentence}")
    return problems


def _difference(expected: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """What is not as recorded, None where all is; items whose scores are as good as tied may change places."""
    old, new = np.array(expected["scores"]), np.array(answer["scores"])
    if len(old) != len(new):
        return f"{len(new)} items, {len(old)} are recorded"
    if not len(old):
        return None
    tolerance = TOLERANCE * max(1.0, abs(old[0]))
    off = np.abs(old - new).max()
    if not off <= tolerance:
        return f"a score is off by {off:.2g}"
    clear = [item for item, score in zip(expected["items"], old, strict=True) if score > old[-1] + tolerance]
    if lost := [item for item in clear if item not in answer["items"]]:
        return f"{lost[0]!r} is not among the items"
    return None


def _rows(version: Version) -> "np.ndarray[Any, np.dtype[np.int64]]":
    spread = np.linspace(0, len(version.users) - 1, min(USERS, len(version.users))).astype(np.int64)
    return np.concatenate([spread, [-1]])


def _answers(version: Version, user_rows: "np.ndarray[Any, np.dtype[np.int64]]") -> list[dict[str, Any]]:
    queries = version.queries(user_rows, exclude=(version.clicks.indptr, version.clicks.item_row))
    answers = []
    for name, channel in version.channels.items():
        lists = channel.retrieve(queries, K)
        for place, row in enumerate(user_rows):
            kept = lists.rows[place] >= 0
            answers.append(
                {
                    "user_id": version.users.ids[int(row)].as_py() if row >= 0 else None,
                    "channel": name,
                    "items": version.item_ids.take(lists.rows[place][kept]).to_pylist(),
                    "scores": [round(float(score), 6) for score in lists.scores[place][kept]],
                }
            )
    return answers + _ranked(version, queries, user_rows)


def _ranked(
    version: Version, queries: Queries, user_rows: "np.ndarray[Any, np.dtype[np.int64]]"
) -> list[dict[str, Any]]:
    """The best of the same items by each ranker."""
    rows = np.unique(np.linspace(0, len(version.item_ids) - 1, RANKED).astype(np.int64))
    answers = []
    for name, ranker in version.rankers.items():
        for place, row in enumerate(user_rows):
            one = np.array([place])
            clicks = take(queries.clicks, one)
            assert isinstance(clicks, Bag)
            user = {feature: take(column, one) for feature, column in queries.features.items()}
            scores = ranker.score(user, clicks, rows)
            best = np.argsort(-scores, kind="stable")[:K]
            answers.append(
                {
                    "user_id": version.users.ids[int(row)].as_py() if row >= 0 else None,
                    "channel": f"{RANKERS}/{name}",
                    "items": version.item_ids.take(pa.array(rows[best])).to_pylist(),
                    "scores": [round(float(score), 6) for score in scores[best]],
                }
            )
    return answers
