import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from twotower.evaluate import holdout
from twotower.evaluate.holdout import evaluate, read_truth
from twotower.models.item_cf import ItemCF
from twotower.models.popular import Popular
from twotower.samples import Samples
from twotower.schema import columns as c
from twotower.schema.errors import DataError

Write = Callable[..., None]


def test_channels_are_judged_on_the_same_users_without_what_they_clicked(
    samples: Samples, tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (0, 3), (0, 3), (2, 1)])
    channels = [ItemCF.fit(samples.clicks, 6), Popular.fit(samples.item_positives)]
    result = evaluate(samples, tmp_path, channels, [1, 2], resamples=50)
    # Popular: 0, 1, then 2 and 3 by row. User 0 has 0 and 1: sees 2, 3. User 2 has 0 and 3: sees 1, 2.
    assert (result["users"], result["channel"]) == (2, "item_cf")
    assert result["popular"]["recall@1"]["value"] == 0.75
    assert result["popular"]["recall@2"]["value"] == 1
    difference = result["recall@1"]["value"] - result["popular"]["recall@1"]["value"]
    assert result["popular"]["recall@1"]["difference"]["value"] == difference
    assert result["popular"]["coverage@2"] == {"value": 3 / 4, "ci95": None}
    assert result["cold"] == {}


def test_cold_users_and_items_are_judged_apart(
    samples: Samples, tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2)])
    reasons = [c.NEW_USER, c.NEW_USER, c.NEW_USER, c.NEW_ITEM]
    write(tmp_path / "holdout_cold.parquet", [(3, 0), (3, 3), (99, 1), (1, 5)], reason=reasons)
    with caplog.at_level(logging.WARNING):
        result = evaluate(samples, tmp_path, [Popular.fit(samples.item_positives)], [2], resamples=10)
    assert set(result["cold"]) == {c.NEW_USER, c.NEW_ITEM}
    assert result["cold"][c.NEW_USER]["users"] == 1
    assert result["cold"][c.NEW_USER]["popular"]["recall@2"]["value"] == 0.5
    assert result["cold"][c.NEW_ITEM]["popular"]["recall@2"]["value"] == 0
    assert "holdout_cold.parquet, new_user: 1 of 3 rows are not of a known user and item and left out" in caplog.text


def test_cold_rows_that_are_all_unknown_do_not_end_the_evaluation(
    samples: Samples, tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2)])
    write(tmp_path / "holdout_cold.parquet", [(99, 1)], reason=[c.NEW_USER])
    assert evaluate(samples, tmp_path, [Popular.fit(samples.item_positives)], [2], 10)["cold"] == {}


def test_few_users_at_a_time_give_the_same(
    samples: Samples, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "holdout.parquet", [(0, 2), (1, 3), (2, 1)])
    whole = evaluate(samples, tmp_path, [Popular.fit(samples.item_positives)], [2], 10)
    monkeypatch.setattr(holdout, "BATCH", 2)
    assert evaluate(samples, tmp_path, [Popular.fit(samples.item_positives)], [2], 10) == whole


def test_the_truth_is_distinct_pairs_by_user(samples: Samples, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "holdout.parquet", [(2, 5), (0, 3), (2, 1), (0, 3), (77, 0)])
    truth = read_truth(tmp_path / "holdout.parquet", samples)
    assert truth.user_rows.tolist() == [0, 2]
    assert (truth.items.indptr.tolist(), truth.items.rows.tolist()) == ([0, 1, 3], [3, 1, 5])


def test_without_a_hold_out_there_is_nothing_to_evaluate(samples: Samples, tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="import the data with --holdout or --test"):
        read_truth(tmp_path / "holdout.parquet", samples)
    write(tmp_path / "holdout.parquet", [(77, 0), (0, 88)])
    with pytest.raises(DataError, match="has 2 rows, none of them of a user and an item of the workspace"):
        read_truth(tmp_path / "holdout.parquet", samples)
