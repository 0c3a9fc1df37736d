from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.features.options import Categorical, Features
from twotower.samples.options import EngineOptions
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError

FEATURES = Features(context={"scene": Categorical("categorical")})
START_MS = 1_700_000_000_000


def row(seq: int, user: int, item: int, at: int, outcome: str, position: int | None, click: int | None = None) -> Any:
    return {
        c.EVENT_SEQ: seq,
        c.USER_ID: user,
        c.ITEM_ID: item,
        c.REQUEST_TS_MS: START_MS + at,
        c.CLICK_TS_MS: None if click is None else START_MS + click,
        c.OUTCOME: outcome,
        c.POSITION: position,
        "scene": "home" if at < 100 else "feed",
    }


LOG = [
    row(0, 1, 10, 0, c.CLICKED, 2, 5),
    row(1, 1, 11, 0, c.IMPRESSED, 1),
    row(2, 1, 12, 0, c.RANKED_NOT_SHOWN, None),
    row(3, 1, 13, 0, c.PRE_RANK_REJECTED, None),
    row(4, 2, 10, 50, c.IMPRESSED, 1),
    row(5, 1, 12, 200, c.IMPRESSED, None),
    row(6, 1, 11, 200, c.CLICKED, 1, 210),
    row(7, 9, 11, 300, c.IMPRESSED, 1),  # nobody whom the users know
]
USERS, ITEMS = {c.USER_ID: [1, 2]}, {c.ITEM_ID: [10, 11, 12, 13]}


@pytest.mark.parametrize("engine", ["duckdb", "spark"])
def test_impressions_are_what_was_shown_with_what_was_clicked_before(
    engine: str, world: Any, build: Any, request: pytest.FixtureRequest
) -> None:
    options = request.getfixturevalue("spark") if engine == "spark" else EngineOptions()
    workspace = world(USERS, ITEMS, {"date=2023-11-14/0.parquet": LOG[::-1]})
    samples = build(workspace, FEATURES, impressions=True, engine=options)
    shown = samples.impressions
    # by time, then position; user 1 has clicked item 10 before the second request
    assert shown.ts_ms.tolist() == [START_MS + at for at in (0, 0, 50, 200, 200)]
    assert samples.users.ids.take(shown.user_row).to_pylist() == [1, 1, 2, 1, 1]
    assert samples.items.ids.take(shown.item_row).to_pylist() == [11, 10, 10, 12, 11]
    assert shown.position.tolist() == [1, 2, 1, 0, 1]
    assert shown.clicked.tolist() == [0, 1, 0, 0, 1]
    assert shown.history.tolist() == [0, 0, 0, 1, 1]
    scenes = samples.features.context[0]
    assert len(np.unique(shown.context[scenes.name])) == 2
    assert samples.manifest["used"][c.IMPRESSED] == {"unknown_user": 1, "of_rankers": 3}


def test_samples_without_rankers_have_no_impressions(world: Any, build: Any) -> None:
    samples = build(world(USERS, ITEMS, {"date=2023-11-14/0.parquet": LOG}), FEATURES)
    assert samples.impressions is None
    assert not (samples.path / "impressions.arrow").exists()
    assert samples.manifest["used"][c.IMPRESSED] == {"unknown_user": 1, "not_used": 3}


def test_impressions_begin_with_the_first_day(world: Any, build: Any) -> None:
    days = {"date=2023-11-14/0.parquet": LOG[:5], "date=2023-11-15/0.parquet": LOG[5:]}
    samples = build(world(USERS, ITEMS, days), FEATURES, impressions=True, first_day="2023-11-15")
    assert samples.impressions.history.tolist() == [1, 1]


@pytest.mark.parametrize("timed", [True, False])
def test_a_log_that_does_not_say_what_was_not_clicked_has_no_rankers(timed: bool, world: Any, build: Any) -> None:
    clicks = [one for one in LOG if one[c.OUTCOME] == c.CLICKED]
    if not timed:
        clicks = [{**one, c.REQUEST_TS_MS: None, c.CLICK_TS_MS: None} for one in clicks]
    path = "date=2023-11-14/0.parquet" if timed else "date=unknown/0.parquet"
    workspace = world(USERS, ITEMS, {path: clicks})
    with pytest.raises(ConfigError, match=r"models\.rankers learn from what was shown and not clicked"):
        build(workspace, FEATURES, impressions=True)
    assert not Path(workspace, "samples").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_log_that_says_no_positions_has_none(there: bool, world: Any, build: Any) -> None:
    log = [{key: None if key == c.POSITION else value for key, value in one.items()} for one in LOG]
    if not there:
        log = [{key: value for key, value in one.items() if key != c.POSITION} for one in log]
    samples = build(world(USERS, ITEMS, {"date=2023-11-14/0.parquet": log}), FEATURES, impressions=True)
    assert samples.impressions.position.tolist() == [0] * 5
