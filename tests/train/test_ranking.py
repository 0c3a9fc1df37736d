from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.evaluate.calibration import auc, sigmoid
from twotower.evaluate.ranking import evaluate_ranker, read_shown
from twotower.features.columns import Bag
from twotower.features.options import Categorical, Features, Sequence
from twotower.features.vocabulary import MISSING, UNKNOWN
from twotower.samples.build import build_samples
from twotower.samples.options import SamplesOptions
from twotower.samples.read import Samples, open_samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import sha256
from twotower.towers.options import PreRankOptions
from twotower.towers.ranker import Ranker
from twotower.train.checkpoint import TENSORS, load_ranker, open_checkpoint
from twotower.train.options import TrainOptions
from twotower.train.ranking import ImpressionBatches, RankerReport, train_ranker

OPTIONS = PreRankOptions(
    layers=[16], attention=8, positions=10, batch_size=256, learning_rate=0.005, table_learning_rate=0.1,
    id_dropout=0.0, calibration_share=0.2,
)  # fmt: skip
TRAIN = TrainOptions(checkpoint_s=1e9, threads=1)
FEATURES = Features(
    user={"camp": Categorical("categorical"), "history": Sequence("sequence", last=5)},
    item={"item_id": Categorical("categorical"), "camp": Categorical("categorical")},
    context={"scene": Categorical("categorical")},
)
USERS, ITEMS, PAGES, ON_PAGE = 60, 40, 4000, 5
BIAS = np.array([0.0, 0.0, -0.6, -1.2, -1.8, -2.4])
"""By position, from 1."""
START_MS = 1_700_000_000_000


def write_world(folder: Path, seed: int = 0) -> Path:
    """A log of pages drawn evenly, where a click has log-odds 1 for an item of the user's own camp and -1 for another,
    plus the bias of the position; the last tenth is held out.
    """
    rng = np.random.default_rng(seed)
    user, item = rng.integers(USERS, size=PAGES).repeat(ON_PAGE), rng.integers(ITEMS, size=PAGES * ON_PAGE)
    position = np.tile(np.arange(1, ON_PAGE + 1), PAGES)
    chance = sigmoid(np.where(user % 2 == item % 2, 1.0, -1.0) + BIAS[position])
    clicked = rng.random(len(user)) < chance
    at = START_MS + 1000 * np.arange(PAGES).repeat(ON_PAGE)
    table = pa.table(
        {
            c.EVENT_SEQ: np.arange(len(user)),
            c.USER_ID: user,
            c.ITEM_ID: item,
            c.REQUEST_TS_MS: at,
            c.CLICK_TS_MS: pa.array(at + position, mask=~clicked),
            c.OUTCOME: np.where(clicked, c.CLICKED, c.IMPRESSED),
            c.POSITION: pa.array(position, pa.int32()),
            "scene": rng.integers(3, size=len(user)),
        }
    )
    (folder / "events" / "date=2023-11-14").mkdir(parents=True)
    ends = int(0.9 * PAGES) * ON_PAGE
    pq.write_table(table.slice(0, ends), folder / "events" / "date=2023-11-14" / "0.parquet")
    pq.write_table(table.slice(ends).drop_columns([c.EVENT_SEQ]), folder / "holdout_impressions.parquet")
    pq.write_table(pa.table({c.USER_ID: np.arange(USERS), "camp": np.arange(USERS) % 2}), folder / "users.parquet")
    pq.write_table(pa.table({c.ITEM_ID: np.arange(ITEMS), "camp": np.arange(ITEMS) % 2}), folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("ranking") / "workspace")


@pytest.fixture(scope="module")
def samples(workspace: Path) -> Samples:
    build_samples(workspace, workspace / "samples", FEATURES, 8, SamplesOptions(held_out_users=0), impressions=True)
    return open_samples(workspace / "samples")


def run(samples: Samples, folder: Path, train: TrainOptions = TRAIN, **changed: Any) -> RankerReport:
    return train_ranker(samples, folder, replace(OPTIONS, **changed), train, name="rank")


def model_of(report: RankerReport) -> Ranker:
    return load_ranker(open_checkpoint(Path(report.checkpoint)))


@pytest.mark.parametrize("history", ["mean", "target"])
def test_a_ranker_finds_the_interaction_and_the_bias_of_positions(
    history: str, samples: Samples, workspace: Path, tmp_path: Path
) -> None:
    report = run(samples, tmp_path, history=history, epochs=3)
    np.testing.assert_allclose(report.position, BIAS[1:], atol=0.25)
    model, shown = model_of(report), read_shown(workspace / "holdout_impressions.parquet", samples)
    found = evaluate_ranker(samples, shown, model, 10, 0)
    own = np.where(shown.user_row % 2 == shown.item_row % 2, 1.0, 0.0)
    assert found["auc"] == pytest.approx(auc(own, shown.clicked), abs=0.02)  # no order is better than the truth
    assert found["ece"] < 0.04
    users = {"camp": samples.users.features["camp"][[0, 0]], "scene": shown.context["scene"][:2]}
    items = {name: column[[2, 3]] for name, column in samples.items.features.items()}
    nothing = Bag(np.zeros(3, np.int64), np.zeros(0, np.int32))
    scale, offset = model.calibration.tolist()
    odds = scale * model.score({**users, "history": nothing}, items) + offset
    np.testing.assert_allclose(odds, [1, -1], atol=0.45)


def test_the_same_run_gives_the_same_bytes(samples: Samples, tmp_path: Path) -> None:
    changed = {"dropout": 0.3, "history": "target", "id_dropout": 0.2}
    one, other = (run(samples, tmp_path / name, **changed) for name in ("one", "other"))
    assert sha256(Path(one.checkpoint) / TENSORS) == sha256(Path(other.checkpoint) / TENSORS)
    assert one.calibration == other.calibration
    again = run(samples, tmp_path / "one", **changed)
    assert (again.rows_per_s, again.calibration, again.position) == (0.0, one.calibration, one.position)
    third = run(samples, tmp_path / "one", replace(TRAIN, seed=1), **changed)
    assert sha256(Path(third.checkpoint) / TENSORS) != sha256(Path(one.checkpoint) / TENSORS)


class Stopped(Exception):
    pass


def test_a_killed_run_ends_as_one_that_was_not(samples: Samples, tmp_path: Path) -> None:
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise Stopped
        return float(calls)

    with pytest.raises(Stopped):
        train_ranker(
            samples,
            tmp_path / "killed",
            replace(OPTIONS, epochs=2),
            replace(TRAIN, checkpoint_s=0.5),
            name="rank",
            clock=clock,
        )
    assert list((tmp_path / "killed").glob("run-*/step-*"))
    killed, whole = run(samples, tmp_path / "killed", epochs=2), run(samples, tmp_path / "whole", epochs=2)
    assert sha256(Path(killed.checkpoint) / TENSORS) == sha256(Path(whole.checkpoint) / TENSORS)
    assert killed.loss == pytest.approx(whole.loss)


def test_calibration_sees_the_latest_requests_alone_and_none_is_parted(samples: Samples, tmp_path: Path) -> None:
    report = run(samples, tmp_path, calibration_share=0.2001)
    shown = samples.impressions
    assert shown is not None
    assert report.calibration.rows % ON_PAGE == 0
    assert report.calibration.rows == pytest.approx(0.2 * len(shown), abs=ON_PAGE)
    assert report.rows == len(shown) - report.calibration.rows
    assert report.calibration.ece <= report.calibration.ece_before + 0.005


def test_an_id_that_nobody_clicked_trains_as_missing_and_unknown_ids_are_a_share_of_all(samples: Samples) -> None:
    shown = samples.impressions
    assert shown is not None
    ids = samples.items.features["item_id"].copy()
    ids[:5] = UNKNOWN
    changed = replace(samples, items=replace(samples.items, features={**samples.items.features, "item_id": ids}))
    batches = ImpressionBatches(changed, samples.features, 0.25)
    rows = np.arange(8000)
    drawn = batches.drawn(rows, np.random.default_rng(0)).item["item_id"]
    never = shown.item_row[rows] < 5
    for part in (never, ~never):
        assert (drawn[part] == UNKNOWN).mean() == pytest.approx(0.25, abs=0.05)
    assert set(drawn[never].tolist()) == {MISSING, UNKNOWN}
    assert (batches.plain(rows).item["item_id"][never] == UNKNOWN).all()


def test_histories_are_the_clicks_before_the_request(samples: Samples) -> None:
    shown, clicks = samples.impressions, samples.clicks
    assert shown is not None
    batches = ImpressionBatches(samples, samples.features, 0.0)
    rows = np.array([100, 5000, len(shown) - 1])
    history = batches.plain(rows).user["history"]
    assert isinstance(history, Bag)
    tokens = samples.features.history.vocabulary.rows(samples.items.ids)  # type: ignore[union-attr]
    for place, row in enumerate(rows):
        mine = slice(clicks.indptr[shown.user_row[row]], clicks.indptr[shown.user_row[row] + 1])
        before = clicks.item_row[mine][clicks.ts_ms[mine] < shown.ts_ms[row]][-5:]
        found = history.rows[history.indptr[place] : history.indptr[place + 1]]
        assert found.tolist() == tokens[before].tolist()


def test_a_log_without_positions_has_no_bias(samples: Samples, tmp_path: Path) -> None:
    shown = samples.impressions
    assert shown is not None
    report = run(replace(samples, impressions=replace(shown, position=np.zeros_like(shown.position))), tmp_path)
    assert report.position == [0.0]
    assert model_of(report).position.detach().numpy().tolist() == [0.0] * 11


def one_outcome(samples: Samples, clicked: int) -> Samples:
    shown = samples.impressions
    assert shown is not None
    return replace(samples, impressions=replace(shown, clicked=np.full_like(shown.clicked, clicked)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda samples: replace(samples, impressions=None), DataError, "has no impressions"),
        (lambda samples: one_outcome(samples, 1), DataError, "needs some of both kinds"),
        (lambda samples: one_outcome(samples, 0), DataError, "needs some of both kinds"),
        (
            lambda samples: replace(samples, features=replace(samples.features, user=())),
            ConfigError,
            'history = "target" lets the candidate attend',
        ),
    ],
)
def test_what_no_ranker_can_learn_from_is_refused(
    change: Callable[[Samples], Samples], error: type[Exception], says: str, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run(change(samples), tmp_path, history="target")
