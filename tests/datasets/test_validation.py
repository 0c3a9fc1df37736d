from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.datasets.holdout import HoldoutRule, parse_holdout, split
from twotower.datasets.tables import Source, Tables, assemble
from twotower.datasets.validation import hold_out_validation
from twotower.datasets.workspace import open_workspace, write_workspace
from twotower.schema.errors import ConfigError

DAY = 86_400_000


def tables(timed: bool) -> Tables:
    """Ten users who click one item of ten each day for twenty days."""
    user, day = (a.ravel() for a in np.meshgrid(np.arange(10), np.arange(20), indexing="ij"))
    columns = {"user_id": user, "item_id": (user + day) % 10 if timed else day}
    times = {"ts_ms": (19_000 + day) * DAY + user} if timed else {}
    return assemble(Source("shop", pa.table({**columns, **times})))


def workspace(path: Path, timed: bool, rule: str | None) -> Path:
    whole = tables(timed)
    held_out = None if rule is None else split(whole, parse_holdout(rule))
    write_workspace(path, whole, held_out, {"holdout": rule})
    return path


@pytest.mark.parametrize(
    ("rule", "again"),
    [
        ("leave-one-out", "leave-one-out"),
        ("time:0.8", "time:0.8"),
        ("since:2022-01-24", "since:2022-01-20"),  # four days are held out, so the four before them
        (None, "time:0.9"),
    ],
)
def test_the_rule_of_the_hold_out_is_applied_once_more(tmp_path: Path, rule: str | None, again: str) -> None:
    source = workspace(tmp_path / "one", True, rule)
    report = hold_out_validation(source, tmp_path / "two")
    before, after = open_workspace(source), open_workspace(tmp_path / "two")
    expected = split(Tables("shop", before.users(), before.items(), before.events()), parse_holdout(again))
    assert after.events().equals(expected.events)
    assert after.holdout().equals(expected.holdout)
    assert report.events + report.holdout + report.holdout_cold == before.events().num_rows


def test_nothing_of_the_test_set_is_read(tmp_path: Path) -> None:
    source = workspace(tmp_path / "one", True, "leave-one-out")
    for name in ("holdout.parquet", "holdout_cold.parquet", "train_positives.parquet"):
        (source / name).unlink()
    hold_out_validation(source, tmp_path / "two")


def test_without_time_a_share_of_each_users_positives_is_drawn(tmp_path: Path) -> None:
    source = workspace(tmp_path / "one", False, None)
    hold_out_validation(source, tmp_path / "two")
    held = open_workspace(tmp_path / "two").holdout()
    assert np.bincount(held["user_id"].to_numpy()).tolist() == [2] * 10  # of twenty
    assert len(set(held["item_id"].to_pylist())) > 5
    hold_out_validation(source, tmp_path / "three")
    assert open_workspace(tmp_path / "three").holdout().equals(held)


def test_a_random_hold_out_of_events_with_a_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has a time, and a random hold-out would be judged by what came before"):
        hold_out_validation(workspace(tmp_path / "one", True, None), tmp_path / "two", "random:0.1")


def test_rules_are_read() -> None:
    assert [parse_holdout(text) for text in ("leave-one-out", "time:0.5")] == [
        HoldoutRule("leave-one-out"),
        HoldoutRule("time", 0.5),
    ]
    with pytest.raises(ConfigError, match="give a share between 0 and 1"):
        parse_holdout("random:1.5")


def test_parquet_of_a_validation_workspace_is_that_of_an_import(tmp_path: Path) -> None:
    source = workspace(tmp_path / "one", True, "time:0.8")
    hold_out_validation(source, tmp_path / "two")
    for name in ("users.parquet", "items.parquet", "holdout.parquet"):
        assert pq.read_schema(source / name).equals(pq.read_schema(tmp_path / "two" / name))


def test_what_happened_at_once_stays_together_in_a_validation_split_too(tmp_path: Path) -> None:
    user, item = (a.ravel() for a in np.meshgrid(np.arange(20), np.arange(4), indexing="ij"))
    instants = (DAY * 19_000, DAY * 19_001, DAY * 19_002)
    rows = [pa.table({"user_id": user, "item_id": item, "ts_ms": np.full(len(user), at)}) for at in instants]
    whole = assemble(Source("shop", pa.concat_tables(rows)))
    write_workspace(tmp_path / "one", whole, split(whole, HoldoutRule("time", 0.9)), {"holdout": "time:0.9"})
    assert open_workspace(tmp_path / "one").events().num_rows == 160
    hold_out_validation(tmp_path / "one", tmp_path / "two")
    after = open_workspace(tmp_path / "two")
    assert after.instants(after.events()).to_pylist() == [DAY * 19_000] * 80
    assert after.holdout().num_rows == 80


def test_a_held_out_event_of_the_future_does_not_say_how_long_the_hold_out_is(tmp_path: Path) -> None:
    source = workspace(tmp_path / "one", True, "since:2022-01-24")
    path = source / "holdout.parquet"
    held = pq.read_table(path)
    far = pa.table([held["user_id"][:1], held["item_id"][:1], pa.array([30_000 * DAY])], schema=held.schema)
    pq.write_table(pa.concat_tables([held, far]), path)
    hold_out_validation(source, tmp_path / "two", clock_ms=lambda: 20_000 * DAY)
    assert open_workspace(tmp_path / "two").dates()[-1] == "2022-01-19"
