import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.channels.options import ModelsOptions
from twotower.features.columns import Bag
from twotower.features.feature_set import FeatureSet
from twotower.features.options import Categorical, Features, Sequence
from twotower.samples.options import EasyShares, NegativesOptions
from twotower.samples.read import Clicks, Entities, Positives, Samples
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import MANIFEST, sha256
from twotower.towers.embedding import EmbeddingTable
from twotower.towers.losses import Loss, Scores, sampled_softmax
from twotower.towers.options import TowerOptions
from twotower.towers.two_tower import PREFERENCE
from twotower.train.batches import BatchMaker
from twotower.train.checkpoint import TENSORS, load_model, open_checkpoint
from twotower.train.negatives import (
    CountedFrequency,
    EasyNegatives,
    HardNegatives,
    NegativeSources,
    fed_frequency,
)
from twotower.train.options import TrainOptions
from twotower.train.towers import TrainReport, WarmStart, batch_loss, check_loss, train

BuildWorld = Callable[..., Samples]
NEGATIVES = NegativesOptions()
DNN, NO_LAYERS = TowerOptions("dnn", [16]), TowerOptions("dnn", [])
MODELS = ModelsOptions(dimension=8, user_tower=DNN, item_tower=DNN)
OPTIONS = TrainOptions(
    temperature=0.2, batch_size=48, epochs=3, learning_rate=0.003, table_learning_rate=0.1, dropout=0.1,
    checkpoint_s=1e9, threads=1,
)  # fmt: skip


def run(
    samples: Samples,
    folder: Path,
    *,
    models: ModelsOptions = MODELS,
    negatives: NegativesOptions = NEGATIVES,
    own: Loss | None = None,
    clock: Callable[[], float] = time.monotonic,
    **changed: Any,
) -> TrainReport:
    return train(samples, folder, replace(OPTIONS, **changed), models, negatives, loss=own, clock=clock)


def tensors(report: TrainReport) -> str:
    return sha256(Path(report.checkpoint) / TENSORS)


@pytest.fixture
def samples(build_world: BuildWorld, two_camps: list[Any]) -> Samples:
    return build_world(two_camps, 32, 16)


class Stopped(Exception):
    pass


def stopping_clock(calls: int) -> Callable[[], float]:
    """A second a call, so that every step is checkpointed; the call after the last one ends the run like a kill."""
    ticks = itertools.count()

    def clock() -> float:
        if (now := next(ticks)) >= calls:
            raise Stopped
        return float(now)

    return clock


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(samples: Samples, tmp_path: Path) -> None:
    one = run(samples, tmp_path / "one")
    assert tensors(run(samples, tmp_path / "two")) == tensors(one)
    assert tensors(run(samples, tmp_path / "three", seed=1)) != tensors(one)


def test_the_state_of_the_global_generator_changes_nothing(samples: Samples, tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = tensors(run(samples, tmp_path / "one"))
    torch.manual_seed(2)
    assert tensors(run(samples, tmp_path / "two")) == one


def test_a_run_that_stops_anywhere_and_resumes_gives_the_bytes_of_an_undisturbed_one(
    samples: Samples, tmp_path: Path
) -> None:
    undisturbed = run(samples, tmp_path / "undisturbed")
    for calls in range(3, 28, 5):
        folder = tmp_path / str(calls)
        with pytest.raises(Stopped):
            run(samples, folder, checkpoint_s=0.5, clock=stopping_clock(calls))
        resumed = run(samples, folder, checkpoint_s=0.5, clock=stopping_clock(1000))
        assert tensors(resumed) == tensors(undisturbed)
        assert resumed.loss == undisturbed.loss
        assert resumed.rows == undisturbed.rows == 3 * 192
        assert [path.name for path in Path(resumed.checkpoint).parent.iterdir()] == ["model"]


@pytest.fixture
def stopped(samples: Samples, tmp_path: Path) -> Path:
    """The folder of a run that stopped in its second epoch with a checkpoint of each of the last two steps."""
    with pytest.raises(Stopped):
        run(samples, tmp_path / "stopped", checkpoint_s=0.5, clock=stopping_clock(22))
    (folder,) = (tmp_path / "stopped").iterdir()
    return folder


def test_the_two_newest_checkpoints_are_kept(stopped: Path) -> None:
    steps = sorted(int(path.name.removeprefix("step-")) for path in stopped.iterdir())
    assert len(steps) == 2
    assert steps[1] - steps[0] == 48


@pytest.mark.parametrize("name", [TENSORS, MANIFEST, "features.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str, how: str, samples: Samples, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = sorted(stopped.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    content = bytearray((newest / name).read_bytes())
    if how == "missing":
        (newest / name).unlink()
    elif how == "cut":
        (newest / name).write_bytes(content[: len(content) // 2])
    else:
        place = content.index(b'"rows": ') + 8 if name == MANIFEST else len(content) // 2
        content[place] ^= 1
        (newest / name).write_bytes(content)
    (stopped / ".tmp-step-99").mkdir()  # what a kill within a write leaves
    caplog.set_level(logging.INFO)
    resumed = run(samples, tmp_path / "stopped")
    assert "going back to the checkpoint before" in caplog.text
    rows = int(older.name.removeprefix("step-"))
    assert f"resuming {stopped.name} at epoch {rows // 192 + 1}, step {rows % 192 // 48}" in caplog.text
    assert tensors(resumed) == tensors(run(samples, tmp_path / "undisturbed"))
    assert [path.name for path in stopped.iterdir()] == ["model"]


def test_resuming_leaves_the_checkpoint_as_it_is(samples: Samples, stopped: Path, tmp_path: Path) -> None:
    newest = max(stopped.iterdir(), key=lambda path: int(path.name.removeprefix("step-")))
    before = sha256(newest / TENSORS)
    with pytest.raises(Stopped):
        run(samples, tmp_path / "stopped", checkpoint_s=1e9, clock=stopping_clock(3))
    assert sha256(newest / TENSORS) == before


def test_a_finished_run_is_not_repeated(samples: Samples, tmp_path: Path) -> None:
    first = run(samples, tmp_path)
    tensors_file = Path(first.checkpoint) / TENSORS
    written = tensors_file.stat().st_mtime_ns
    again = run(samples, tmp_path)
    assert (again.checkpoint, again.rows, again.loss) == (first.checkpoint, first.rows, first.loss)
    assert (again.rows_per_s, again.seconds) == (0, 0)
    assert tensors_file.stat().st_mtime_ns == written


def test_a_finished_run_that_is_damaged_is_trained_again(samples: Samples, tmp_path: Path) -> None:
    first = run(samples, tmp_path)
    good = tensors(first)
    (Path(first.checkpoint) / TENSORS).write_bytes(b"nonsense")
    assert tensors(run(samples, tmp_path)) == good


def test_other_settings_are_another_run(samples: Samples, tmp_path: Path) -> None:
    one, other = run(samples, tmp_path), run(samples, tmp_path, temperature=0.3)
    assert one.checkpoint != other.checkpoint


def test_two_camps_are_told_apart(samples: Samples, tmp_path: Path) -> None:
    """Every user's eight nearest items are those of the own camp, the two that were never clicked among them."""
    report = run(samples, tmp_path, epochs=30, temperature=0.5, id_dropout=0.5)
    model = load_model(open_checkpoint(Path(report.checkpoint)))
    clicks, history = samples.clicks, model.features.history
    assert history is not None
    tokens = history.vocabulary.rows(samples.items.ids)[clicks.item_row]
    users = {**samples.users.features, "history": Bag(clicks.indptr, tokens), "hour": np.zeros(32, np.int32)}
    scores = model.encode_users(users) @ model.encode_items(samples.items.features).T
    nearest = np.sort(np.argsort(-scores, axis=1)[:, :8], axis=1)
    expected = np.arange(8) + 8 * (np.arange(32) % 2)[:, None]
    np.testing.assert_array_equal(nearest, expected)


def test_the_loss_falls_to_its_known_minimum(build_world: BuildWorld, tmp_path: Path) -> None:
    """Two users click one item each, again and again: their vectors and those of the items end up opposite."""
    events = [
        SimpleNamespace(user=i % 2, item=i % 2, request_ms=10 * i, click_ms=10 * i + 1, weight=1.0) for i in range(96)
    ]
    samples = build_world(events, 2, 2)
    report = run(
        samples,
        tmp_path,
        models=replace(MODELS, user_tower=NO_LAYERS, item_tower=NO_LAYERS),
        dropout=0.0,
        epochs=150,
        temperature=0.5,
        id_dropout=0.0,
        batch_size=96,
    )
    # Opposite vectors, cosines 1 and -1; 48 copies of the other item where 95 / 2 are expected.
    best = np.log1p(np.exp(-4) * 48 / 47.5)
    assert best <= report.loss < best * 1.05


@pytest.mark.parametrize("negatives", ["in_batch", "mixture", "own"])
@pytest.mark.parametrize("adjustment", [0.0, 0.5])
def test_the_cosine_is_the_log_of_an_items_share_and_popularity_more(
    build_world: BuildWorld, tmp_path: Path, adjustment: float, negatives: str
) -> None:
    """Users of whom nothing is known click one of three items, 60, 30 or 10 of a hundred."""
    items = np.repeat([0, 1, 2], [192, 96, 32])
    events = [
        SimpleNamespace(user=i, item=int(item), request_ms=10 * i, click_ms=10 * i + 1, weight=1.0)
        for i, item in enumerate(np.random.default_rng(0).permutation(items))
    ]
    features = Features(user={"history": Sequence("sequence")})
    samples = build_world(events, len(events), 3, features)
    report = run(
        samples,
        tmp_path,
        models=replace(MODELS, user_tower=NO_LAYERS, item_tower=NO_LAYERS),
        dropout=0.0,
        epochs=120,
        schedule="linear",
        temperature=0.4,
        logit_adjustment=adjustment,
        negatives=SOURCES[negatives],
        id_dropout=0.0,
        batch_size=80,
    )
    model = load_model(open_checkpoint(Path(report.checkpoint)))
    nobody = {"history": Bag(np.zeros(2, np.int64), np.zeros(0, np.int32))}
    logits = (model.encode_users(nobody) @ model.encode_items(samples.items.features).T)[0] / 0.4
    if adjustment:  # both vectors are shortened for the numbers that carry it; the last two of an item's are as long
        logits *= np.sqrt(2 * (1 + (0.4 * adjustment * np.log(192 / 32) / 2) ** 2))
    expected = (1 + adjustment) * np.log([192, 96, 32])
    np.testing.assert_allclose(logits - logits[0], expected - expected[0], atol=0.15)


def test_rows_of_no_weight_teach_nothing(build_world: BuildWorld, two_camps: list[Any], tmp_path: Path) -> None:
    """Each user also clicks the other camp; where those rows weigh nothing the own camp wins, where they weigh more,
    the other one.
    """
    events = []
    for event in two_camps:
        for item, kind in ((event.item, 0), ((event.item + 8) % 16, 1)):
            events.append(
                type(event)(event.user, item, 2 * event.request_ms + kind, 2 * event.request_ms + kind + 1, kind)
            )
    features = Features(user={"user_id": Categorical("categorical")})
    samples = build_world(events, 32, 16, features)
    report = run(samples, tmp_path, epochs=40, temperature=0.1, id_dropout=0.0)
    model = load_model(open_checkpoint(Path(report.checkpoint)))
    scores = model.encode_users(samples.users.features) @ model.encode_items(samples.items.features).T
    own = np.arange(16)[None, :] // 8 == (np.arange(32) % 2)[:, None]
    assert scores[~own].mean() > scores[own].mean() + 0.15


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the loss is nan at epoch 1, step \d: lower train.learning_rate = 1e\+30"):
        run(samples, tmp_path, learning_rate=1e30)


def test_numbers_that_are_not_finite_at_the_end_are_no_checkpoint(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step only: its loss was still good."""
    monkeypatch.setattr(EmbeddingTable, "update", lambda table, *_: table.weights.fill(np.nan))
    with pytest.raises(DataError, match="training ended with numbers that are not finite"):
        run(samples, tmp_path, epochs=1, batch_size=1000)


def test_a_checkpoint_is_loaded_with_the_vectors_it_was_saved_with(samples: Samples, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Path(run(samples, tmp_path).checkpoint))
    one, other = load_model(checkpoint), load_model(checkpoint)
    vectors = one.encode_items(samples.items.features)
    np.testing.assert_array_equal(vectors, other.encode_items(samples.items.features))
    assert checkpoint.tensors_sha256 == sha256(checkpoint.path / TENSORS)
    assert checkpoint.manifest["settings"]["train"]["seed"] == 0
    assert not one.training


LOSSES = ["sampled_softmax", "corrected_log_q", "bsl", "triplet_hinge", "triplet_logistic", "pointwise"]
SOURCES = {
    "in_batch": NegativesOptions(),
    "uniform": NegativesOptions(EasyShares(0, 1, 0), count=8),
    "clicks": NegativesOptions(EasyShares(0, 0, 1), count=8),
    "mixture": NegativesOptions(EasyShares(0.5, 0.25, 0.25)),
    "own": NegativesOptions(EasyShares(0.5, 0.25, 0.25), count=4, shared=False),
    "streaming": NegativesOptions(frequency="streaming"),
}


def camps_told_apart(samples: Samples, report: TrainReport) -> float:
    """Share of users to whom every item of their own camp is nearer than any of the other."""
    model = load_model(open_checkpoint(Path(report.checkpoint)))
    history = model.features.history
    assert history is not None
    tokens = history.vocabulary.rows(samples.items.ids)[samples.clicks.item_row]
    users = {**samples.users.features, "history": Bag(samples.clicks.indptr, tokens), "hour": np.zeros(32, np.int32)}
    scores = model.encode_users(users) @ model.encode_items(samples.items.features).T
    own = np.arange(16)[None, :] // 8 == (np.arange(32) % 2)[:, None]
    right = scores[own].reshape(32, 8).min(axis=1) > scores[~own].reshape(32, 8).max(axis=1)
    return float(right.mean())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_tells_two_camps_apart_with_every_kind_of_negatives(
    samples: Samples, tmp_path: Path, loss: str, source: str
) -> None:
    chosen = {"loss": loss, "temperature": 0.3, "margin": 0.5, "sigma": 5.0}
    report = run(samples, tmp_path, epochs=25, **chosen, negatives=SOURCES[source], id_dropout=0.3)
    assert camps_told_apart(samples, report) > 0.9


def squared_hinge(scores: Scores) -> torch.Tensor:
    gap = torch.relu(scores.negatives - scores.positive + 0.5)
    return (scores.weight * gap**2).sum(dim=1, keepdim=True) / scores.total


def cubed_hinge(scores: Scores) -> torch.Tensor:
    gap = torch.relu(scores.negatives - scores.positive + 0.5)
    return (scores.weight * gap**3).sum(dim=1, keepdim=True) / scores.total


@pytest.mark.parametrize("source", ["in_batch", "own"])
def test_a_loss_of_ones_own_tells_two_camps_apart(samples: Samples, tmp_path: Path, source: str) -> None:
    report = run(samples, tmp_path, epochs=25, own=squared_hinge, negatives=SOURCES[source], id_dropout=0.3)
    assert camps_told_apart(samples, report) > 0.9


def test_a_checkpoint_names_a_loss_of_ones_own_and_another_is_another_run(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(samples, tmp_path, own=squared_hinge, checkpoint_s=0.5, clock=stopping_clock(17))
    resumed = run(samples, tmp_path, own=squared_hinge)
    assert tensors(resumed) == tensors(run(samples, tmp_path / "undisturbed", own=squared_hinge))
    checkpoint = open_checkpoint(Path(resumed.checkpoint))
    assert checkpoint.manifest["settings"]["own_loss"]["name"].endswith("test_loop.squared_hinge")
    others = [run(samples, tmp_path, own=cubed_hinge), run(samples, tmp_path)]
    assert len({resumed.checkpoint, *(other.checkpoint for other in others)}) == 3


@pytest.mark.parametrize("other", [None, cubed_hinge])
def test_a_run_goes_on_from_another_only_with_its_loss(samples: Samples, tmp_path: Path, other: Loss | None) -> None:
    warm = WarmStart(open_checkpoint(Path(run(samples, tmp_path, own=squared_hinge).checkpoint)))
    check_loss(warm.checkpoint, squared_hinge)
    with pytest.raises(ConfigError, match=r"another loss \(.*squared_hinge\) than is to go on from it"):
        train(samples, tmp_path, OPTIONS, MODELS, NEGATIVES, loss=other, warm=warm)


def test_a_loss_without_a_name_is_refused(samples: Samples, tmp_path: Path) -> None:
    def local(scores: Scores) -> torch.Tensor:
        return squared_hinge(scores)

    for unnamed in (local, lambda scores: scores.total, sampled_softmax(0.1)):
        with pytest.raises(ConfigError, match="write it as a function at the top level of a file"):
            run(samples, tmp_path, own=unnamed)


def test_a_run_with_a_streaming_q_resumes_to_the_same_bytes(samples: Samples, tmp_path: Path) -> None:
    streaming = NegativesOptions(frequency="streaming")
    undisturbed = run(samples, tmp_path / "undisturbed", negatives=streaming)
    with pytest.raises(Stopped):
        run(samples, tmp_path / "x", negatives=streaming, checkpoint_s=0.5, clock=stopping_clock(17))
    resumed = run(samples, tmp_path / "x", negatives=streaming, checkpoint_s=0.5, clock=stopping_clock(1000))
    assert tensors(resumed) == tensors(undisturbed)


def test_hard_negatives_that_the_log_does_not_have_are_refused_when_they_are_asked_for(
    samples: Samples, tmp_path: Path
) -> None:
    assert run(samples, tmp_path, negatives=NegativesOptions(hard_share=None)).rows  # half where there are any
    with pytest.raises(ConfigError, match=r"hard_share = 0.5, but no positive has a rejected item in its request"):
        run(samples, tmp_path, negatives=NegativesOptions(hard_share=0.5))


def test_a_streaming_q_without_in_batch_negatives_is_refused(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='frequency = "streaming" estimates q of in-batch negatives'):
        run(samples, tmp_path, negatives=NegativesOptions(EasyShares(0, 1, 0), frequency="streaming"))


def hard_share_of_the_gradient(size: int, share: float) -> float:
    """Of the pull away from negatives, how much is away from hard ones: items 10 to 19; positives are items 0 to 9.

    All vectors but the positives' have one coordinate of their own kind, so that the gradient tells them apart.
    """
    rows = 512
    lists = Bag(np.arange(rows + 1) * 4, np.tile(np.arange(10, 20), rows)[: 4 * rows].astype(np.int32))
    row = np.arange(rows, dtype=np.int32)
    item_row = (row % 10).astype(np.int32)
    clicks = Clicks(np.arange(rows + 1), item_row, np.zeros(rows, np.int64))
    ones, zeros = np.ones(rows, np.float32), np.zeros(rows, np.int64)
    positives = Positives(
        row, item_row, row * 0, ones, zeros, {}, np.ones(rows, np.int32), {c.PRE_RANK_REJECTED: lists}
    )
    samples = Samples(
        Path(),
        {},
        FeatureSet((), (), ()),
        positives,
        Entities(pa.array(row), {}),
        Entities(pa.array(np.arange(size)), {}),
        clicks,
        np.bincount(item_row, minlength=size),
    )
    easy = EasyNegatives(NegativesOptions(EasyShares(0.5, 0.25, 0.25)), samples.item_positives)
    hard = HardNegatives(samples.positives.hard, {c.PRE_RANK_REJECTED: 4})
    sources = NegativeSources(easy, CountedFrequency(fed_frequency(samples)), hard, share)
    batch = next(BatchMaker(samples, TrainOptions(batch_size=rows, id_dropout=0.0), sources).epoch(0))
    kind = np.where(batch.item_row < 10, 0, np.where(batch.item_row < 20, 1, 2))
    items = torch.from_numpy(np.eye(3)[kind])
    users = torch.nn.functional.normalize(torch.tensor([[0.0, 1.0, 1.0]]).double(), dim=1).repeat(rows, 1)
    users.requires_grad_()
    loss = batch_loss(sampled_softmax(0.05), users, items, batch, hard_share=share, calibration=torch.zeros(2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert users.grad is not None
    pull = users.grad.sum(dim=0)
    return float(pull[1] / (pull[1] + pull[2]))


@pytest.mark.parametrize("size", [1000, 1_000_000])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_hard_negatives_have_their_share_of_the_gradient_however_large_the_catalogue(size: int, share: float) -> None:
    assert hard_share_of_the_gradient(size, share) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize("half_life_days", [None, 1.0])
def test_what_is_popular_fades_with_the_clicks(
    build_world: BuildWorld, tmp_path: Path, half_life_days: float | None
) -> None:
    """Item 0 has three clicks, item 1 four that are two half-lives older; item 2 has none."""
    day_ms = 86_400_000
    events = [
        SimpleNamespace(user=i, item=item, request_ms=at, click_ms=at + 1, weight=1.0)
        for i, (item, at) in enumerate([(0, 2 * day_ms)] * 3 + [(1, 0)] * 4)
    ]
    samples = build_world(events, len(events), 3)
    report = run(
        samples,
        tmp_path,
        models=ModelsOptions(dimension=4, user_tower=NO_LAYERS, item_tower=NO_LAYERS),
        dropout=0.0,
        temperature=0.5,
        logit_adjustment=0.4,
        half_life_days=half_life_days,
        epochs=1,
        batch_size=4,
    )
    model = load_model(open_checkpoint(Path(report.checkpoint)))
    bias = model.tables[PREFERENCE].weights[np.asarray(samples.items.features["item_id"])][:, 0]
    clicks = np.array([3, 4, 1] if half_life_days is None else [3, 1, 0.5**10])
    wanted = 0.5 * 0.4 * np.log(clicks)
    middle = (wanted.max() + wanted.min()) / 2
    np.testing.assert_allclose(bias, (wanted - middle) / np.sqrt(1 + np.ptp(wanted) ** 2 / 4), atol=1e-6)
