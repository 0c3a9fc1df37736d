from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from twotower.channels.retriever import Candidates, Queries
from twotower.evaluate import channels as module
from twotower.evaluate.channels import evaluate_channels
from twotower.evaluate.options import EvaluateOptions
from twotower.evaluate.page import markdown, plot
from twotower.fusion.fuse import reciprocal_rank
from twotower.samples.read import Samples
from twotower.schema import columns as c

Write = Callable[..., None]


class Listed:
    """A channel whose lists are given, by what a user clicked."""

    def __init__(self, name: str, lists: dict[tuple[int, ...], list[int]]) -> None:
        self.name, self.lists, self.asked = name, lists, set[int]()

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        self.asked.add(k)
        rows = np.full((len(queries), k), -1, np.int64)
        for user in range(len(queries)):
            clicks = queries.clicks.rows[queries.clicks.indptr[user] : queries.clicks.indptr[user + 1]]
            listed = self.lists[tuple(sorted(clicks.tolist()))][:k]
            rows[user, : len(listed)] = listed
        return Candidates(rows, np.where(rows >= 0, np.float32(1), np.float32(-np.inf)))


USER_0, USER_1, USER_2, USER_3 = (0, 1), (0, 1, 2), (0, 3), ()
A = {USER_0: [2, 4, 5], USER_1: [4, 5], USER_2: [1, 2], USER_3: [0]}
B = {USER_0: [3, 2], USER_1: [3, 4], USER_2: [2], USER_3: []}
HELD_OUT = [(0, 2), (0, 3), (1, 3), (2, 1)]


@pytest.fixture
def report(samples: Samples, tmp_path: Path, write: Write) -> Callable[..., dict[str, Any]]:
    def reported(depth: int = 3, ks: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
        write(tmp_path / "holdout.parquet", HELD_OUT)
        write(tmp_path / "holdout_cold.parquet", [(3, 0), (3, 1)], reason=[c.NEW_USER, c.NEW_USER])
        channels = {"a": Listed("a", A), "b": Listed("b", B)}
        fuse = lambda lists, k: reciprocal_rank(lists, k).candidates  # noqa: E731
        options = EvaluateOptions(channels_k=list(ks), bootstrap=50)
        return evaluate_channels(samples, tmp_path, channels, fuse, options, depth=depth)

    return reported


def values(of: dict[str, dict[str, Any]], key: str = "value") -> list[float]:
    return [of[k][key] for k in ("1", "2")]


def test_recall_of_each_channel_of_their_union_and_of_the_fused_list(report) -> None:
    recall = report()["recall"]
    assert values(recall["a"]) == [0.5, 0.5]
    assert values(recall["b"]) == [0.5, pytest.approx(2 / 3, abs=1e-5)]
    assert values(recall["union"]) == [1, 1]
    # User 0: 2, 3; user 1: 4, 3; user 2: 2, 1.
    assert values(recall["fused"]) == [pytest.approx(1 / 6, abs=1e-5), 1]
    low, high = recall["b"]["2"]["ci95"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_channels_are_fused_as_deep_as_asked_and_no_deeper(report) -> None:
    # With lists of one item everything ties, and the lower row wins: 2, 3, 1.
    assert report(depth=1)["recall"]["fused"]["1"]["value"] == pytest.approx((0.5 + 1 + 1) / 3, abs=1e-5)


def test_fused_is_compared_with_the_best_single_channel(report) -> None:
    best = report()["best"]
    assert [best[k]["channel"] for k in ("1", "2")] == ["a", "b"]
    assert best["2"]["difference"]["value"] == pytest.approx(1 / 3, abs=1e-5)


def test_what_a_channel_alone_finds_and_what_the_union_loses_without_it(report) -> None:
    unique = report()["unique"]
    assert values(unique["a"], "share") == [2 / 4, 1 / 4]
    assert values(unique["b"], "share") == [2 / 4, 2 / 4]
    assert unique["a"]["2"]["loss"]["value"] == pytest.approx(1 - 2 / 3, abs=1e-5)
    assert unique["b"]["2"]["loss"]["value"] == 0.5


def test_overlap_is_the_share_of_the_rows_list_in_the_columns(report) -> None:
    overlap = report()["overlap"]["2"]
    assert (overlap["a"]["b"], overlap["b"]["a"]) == (3 / 6, 3 / 5)
    assert overlap["a"]["a"] == overlap["b"]["b"] == 1
    assert overlap["fused"]["a"] == pytest.approx(4 / 6, abs=1e-4)


def test_deciles_keep_items_with_as_many_positives_together(report) -> None:
    rare, popular = report()["deciles"]
    assert (rare["positives"], rare["pairs"], popular["positives"], popular["pairs"]) == ([1, 1], 3, [2, 2], 1)
    assert values({k: {"value": v} for k, v in rare["recall"]["a"].items()}) == [pytest.approx(1 / 3, abs=1e-5)] * 2
    assert popular["recall"]["b"] == {"1": 0, "2": 0}


def test_cold_users_are_judged_apart(report) -> None:
    found = report()
    assert (found["users"], found["pairs"], set(found["cold"])) == (3, 4, {c.NEW_USER})
    assert found["cold"][c.NEW_USER]["users"] == 1
    assert found["cold"][c.NEW_USER]["recall"]["a"]["1"]["value"] == 0.5
    assert found["cold"][c.NEW_USER]["recall"]["b"]["1"]["value"] == 0


def test_cut_offs_end_at_the_size_of_the_catalogue(report) -> None:
    assert report(ks=(2, 500, 2000))["ks"] == [2, 6]


def test_few_users_at_a_time_give_the_same(report, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report()
    monkeypatch.setattr(module, "CELLS", 6)
    assert report() == whole


def test_the_report_has_every_table_and_the_plot_every_list(report) -> None:
    found = report()
    page = markdown(found)
    assert "| a | 0.5000 [" in page
    assert "## Overlap at 2" in page
    assert "| b | 0.600 | 1.000 |" in page
    assert "| 1 to 1 | 3 | 0.333 |" in page
    assert f"## `{c.NEW_USER}`: 1 users" in page
    drawn = ElementTree.fromstring(plot(found))
    assert {"a", "b", "fused", "union"} <= {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
