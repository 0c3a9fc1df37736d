"""Held-out clicks by thirds of the users and by scenes, on a log that can be checked by eye."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.evaluate.holdout import Truth
from twotower.features.columns import Bag, pointers
from twotower.features.vocabulary import Positions
from twotower.samples.read import Clicks
from twotower_lab import groups
from twotower_lab.groups import Group, scenes, spread, thirds


class Known:
    """The users or items of samples, with ids from 0."""

    def __init__(self, size: int) -> None:
        self.size, self.positions = size, Positions(pa.array(range(size)))

    def __len__(self) -> int:
        return self.size


def samples(clicks: list[list[int]], items: int) -> Any:
    """As much of samples as the groups read: who clicked what."""
    indptr = pointers(np.array([len(own) for own in clicks]))
    flat = np.array([item for own in clicks for item in own], np.int32)
    return SimpleNamespace(
        clicks=Clicks(indptr, flat, np.arange(len(flat))),
        users=Known(len(clicks)),
        items=Known(items),
        features=SimpleNamespace(context=()),
    )


def held_out(items: list[list[int]]) -> Truth:
    """One user after another with these held-out items."""
    flat = np.array([item for own in items for item in own], np.int32)
    return Truth(np.arange(len(items)), Bag(pointers(np.array([len(own) for own in items])), flat))


def test_the_spread_is_one_minus_the_length_of_the_mean_of_unit_vectors() -> None:
    clicks = [[0, 1], [0, 1, 1], [2], [0, 2, 3]]
    clicked = np.array([[item in own for item in range(4)] for own in clicks], float)
    vectors = (clicked / np.linalg.norm(clicked, axis=0)).T
    lengths = [np.linalg.norm(vectors[sorted(set(own))].mean(axis=0)) for own in clicks]
    np.testing.assert_allclose(spread(samples(clicks, 4)), 1 - np.array(lengths))


def test_thirds_divide_the_users_by_their_clicks() -> None:
    clicks = [[0] * count for count in (1, 2, 3, 4, 5, 6)]
    found = {
        group.name: group.truth.user_rows.tolist()
        for group in thirds(samples(clicks, 2), Group("", held_out([[1]] * 6)))
    }
    assert found["least clicks "] == [0, 1]
    assert found["middle clicks "] == [2, 3]
    assert found["most clicks "] == [4, 5]


def test_a_user_is_asked_once_in_each_scene_where_they_click(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [  # user, item, scene, clicked, in the order of time
        (0, 0, 1, False), (0, 1, 1, True), (0, 2, 4, True), (0, 3, 4, True),
        (1, 0, 4, False), (1, 1, 1, True),
        (2, 2, 1, True),
    ]  # fmt: skip
    user, item, scene, clicked = (list(column) for column in zip(*rows, strict=True))
    outcome = ["clicked" if one else "impressed" for one in clicked]
    table = {"user_id": user, "item_id": item, "tab": scene, "outcome": outcome, "request_ts_ms": range(len(rows))}
    pq.write_table(pa.table(table).take([6, 5, 4, 3, 2, 1, 0]), tmp_path / "holdout_impressions.parquet")
    monkeypatch.setattr(groups, "LEAST_REQUESTS", 2)
    warm = Group("", held_out([[1, 2, 3], [1], [2]]))
    found = {group.name: group.truth for group in scenes(samples([[]] * 3, 4), tmp_path, warm, context=True)}
    assert list(found) == ["elsewhere ", "each scene ", "scene 1 "]
    assert found["elsewhere "].user_rows.tolist() == [1]  # the first request of the others is in scene 1
    each = found["each scene "]
    lists = [each.items.rows[a:b].tolist() for a, b in zip(each.items.indptr, each.items.indptr[1:], strict=False)]
    assert [*zip(each.user_rows.tolist(), lists, strict=True)] == [(0, [1]), (0, [2, 3]), (1, [1]), (2, [2])]
    assert found["scene 1 "].user_rows.tolist() == [0, 1, 2]
