"""Golden queries: a few users with their answers, stored in a version and replayed before it is served.

Every channel answers, and so does every ranker, about items spread over the catalogue. The fused list is left out: it
follows from these, and near ties, which another processor may round the other way, change its scores by whole ranks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.publish.ranker import user_of
from twotower.publish.version import GOLDEN, RANKERS, Version
from twotower.schema.files import read_json, write_json

USERS = 16
K = 20
RANKED = 200
"""Items that each ranker is asked about."""
FOUND_AGAIN = 0.8
"""Share of a recorded list that a vector database must find again."""
TOLERANCE = 1e-4
"""Largest difference of a score: processors round differently, a wrong table or tower changes far more."""


def write_golden(version: Version, folder: Path) -> None:
    """Record the answers of every channel for users spread over the version, and for an unknown user."""
    write_json(folder / GOLDEN, {"k": K, "queries": list(_answers(version))})


def replay(version: Version) -> list[str]:
    """Ask the golden queries again; gives a sentence for each answer that is not as recorded."""
    recorded, answers = read_json(version.path / GOLDEN)["queries"], list(_answers(version))
    if len(answers) != len(recorded):
        return [f"{len(recorded)} golden queries are recorded, {len(answers)} are expected"]
    problems, approximate = [], version.manifest.get("collections", {})
    for expected, answer in zip(recorded, answers, strict=True):
        compare = _missed if expected["channel"] in approximate else _difference
        if (sentence := compare(expected, answer)) is not None:
            where = f"golden query of user {expected['user_id']!r}, channel {expected['channel']}"
            problems.append(f"{where}: {sentence}")
    return problems


def _missed(expected: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """What a vector database does not find again, or None: it may build its index anew, and then finds other items at
    the end of a list. An item that it finds has the score that is recorded.
    """
    old, new = (dict(zip(one["items"], one["scores"], strict=True)) for one in (expected, answer))
    both = old.keys() & new.keys()
    if len(both) < FOUND_AGAIN * len(old) or len(new) != len(old):
        return f"{len(both)} of {len(old)} items are found again"
    off = max((abs(old[item] - new[item]) for item in both), default=0.0)
    return None if off <= TOLERANCE * max(1.0, *map(abs, old.values()), 0.0) else f"a score is off by {off:.2g}"


def _difference(expected: dict[str, Any], answer: dict[str, Any]) -> str | None:
    """What is not as recorded, or None; items whose scores are nearly tied may change places."""
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


def _answers(version: Version) -> Iterator[dict[str, Any]]:
    """The first K items of each channel for each user, then the best of the same items by each ranker."""
    spread = np.linspace(0, len(version.users) - 1, min(USERS, len(version.users))).astype(np.int64)
    users = np.concatenate([spread, [-1]])
    queries = version.queries(users, exclude=version.clicks.items)

    def answer(user: int, name: str, rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32]) -> dict[str, Any]:
        return {
            "user_id": version.users.ids[user].as_py() if user >= 0 else None,
            "channel": name,
            "items": version.items.at(rows),
            "scores": [round(float(score), 6) for score in scores],
        }

    for name, channel in version.channels.items():
        lists = channel.retrieve(queries, K)
        for user, rows, scores in zip(users.tolist(), lists.rows, lists.scores, strict=True):
            yield answer(user, name, rows[rows >= 0], scores[rows >= 0])
    ranked = np.unique(np.linspace(0, len(version.items) - 1, RANKED).astype(np.int64))
    for name, ranker in version.rankers.items():
        for place, user in enumerate(users.tolist()):
            user_queries = user_of(queries, place)
            scores = ranker.score(user_queries.features, user_queries.clicks, ranked)
            best = np.argsort(-scores, kind="stable")[:K]
            yield answer(user, f"{RANKERS}/{name}", ranked[best], scores[best])
