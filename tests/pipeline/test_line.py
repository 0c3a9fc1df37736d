from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.channels.queries import queries_of_users
from twotower.channels.vector_channel import VectorChannel
from twotower.config import Settings
from twotower.config.load import as_dict, parse
from twotower.evaluate.holdout import held_out
from twotower.features.columns import take
from twotower.pipeline.fuse import some_users
from twotower.pipeline.line import channel_of, latest_checkpoint, open_served, run_line
from twotower.pipeline.places import places
from twotower.pipeline.versions import open_version
from twotower.publish.tower import ExportedTower
from twotower.samples.read import open_samples
from twotower.serve.request import Request, retrieve
from twotower.serve.users import Recent
from twotower.train.checkpoint import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("encoder", ["attention", "transformer"])
def test_a_version_answers_as_the_trained_towers_do_whatever_encodes_histories(
    encoder: str, own_world: Settings
) -> None:
    changes = [
        f'features.user.history.encoder="{encoder}"',
        'models.user_tower.network="dcn"',
        "models.rankers=[]",
        'models.channels=["two_tower", "mind"]',
        "train.epochs=1",
    ]
    settings = parse(as_dict(own_world), changes)
    run_line(settings, promoted=True)
    check_vectors(settings, ["two_tower", "mind"])
    check_histories(settings)
    check_export(settings, ["two_tower", "mind"])


def check_vectors(settings: Settings, channels: list[str]) -> None:
    """The vectors of a version are those of the trained towers."""
    samples, version = open_samples(places(settings).samples), open_served(settings)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.arange(60))
    for name in channels:
        served = version.channels[name]
        assert isinstance(served, VectorChannel)
        trained = channel_of(load_model(latest_checkpoint(settings, name)), samples, name)
        np.testing.assert_allclose(served.user_vectors(queries), trained.user_vectors(queries), atol=1e-5)
    assert version.channels["mind"].user_vectors(queries).shape == (60, 4, settings.models.dimension)  # type: ignore[attr-defined]


def check_histories(settings: Settings) -> set[str]:
    """A user asks twice, the second time with a click that the version has not seen; gives the channels that answer."""
    samples, version = open_samples(places(settings).samples), open_served(settings)
    user_id = samples.users.ids[int(np.argmax(np.diff(samples.clicks.indptr)))].as_py()
    asked = Request(20, "none", user_id)
    now = int(version.watermark_ms or 0) + 1000
    before = retrieve(version, asked, Recent(), range(now))
    clicked = samples.items.ids[0].as_py()
    after = retrieve(version, asked, Recent(clicks=((now, clicked),)), range(now))
    assert [item.item_id for item in before.items] != [item.item_id for item in after.items]
    assert before.failed_channels == []
    return {name for item in before.items for name in item.channels}


def check_export(settings: Settings, channels: list[str]) -> None:
    """Exported towers give the vectors of the version, from the raw features and clicks of a user."""
    version, workspace = open_served(settings), places(settings).workspace
    row = int(np.argmax(np.diff(version.clicks.indptr)))
    user_id, clicks = version.users.ids[row].as_py(), version.clicks.items
    clicked = version.item_ids.take(pa.array(clicks.rows[clicks.indptr[row] : clicks.indptr[row + 1]])).to_pylist()
    [user] = pq.read_table(workspace / "users.parquet", filters=[("user_id", "=", user_id)]).to_pylist()
    for name in channels:
        published, folder = open_version(settings), workspace / f"towers-{name}"
        known = published.export_towers(folder, name).user_features
        raw = {column: value for column, value in {**user, "history": clicked}.items() if column in known}
        vector = published.user_vectors([user_id], name).vectors[0]
        np.testing.assert_allclose(ExportedTower(folder).vector(raw), vector, atol=1e-5)


def test_a_version_answers_as_its_channels_do(own_world: Settings) -> None:
    changes = [
        "models.rankers=[]",
        'models.channels=["two_tower", "mind", "new_items", "als", "mf", "same_category", "popular"]',
        "models.mf.epochs=2",
        "models.als.factors=8",
        'models.same_category.attributes=["category", "author"]',
        'models.popular={ window_days = 1, segment = "device" }',
        "train.epochs=1",
    ]
    settings = parse(as_dict(own_world), changes)
    run_line(settings, promoted=True)
    check_vectors(settings, ["two_tower", "mind", "mf"])
    check_export(settings, ["mf"])
    assert check_histories(settings) >= {"two_tower", "mind", "mf", "als", "popular"}
    assert latest_checkpoint(settings, "mf").manifest["progress"]["epoch"] == 2
    samples, version = open_samples(places(settings).samples), open_served(settings)
    user_id, now = samples.users.ids[0].as_py(), int(version.watermark_ms or 0) + 1000
    new = retrieve(version, Request(20, "none", user_id, channels=["new_items"]), Recent(), range(now))
    assert new.items
    found = version.items.find(pa.array([item.item_id for item in new.items]))
    assert (samples.item_positives[found] == 0).all()
    nobody = retrieve(version, Request(20, "none"), Recent(), range(now))
    assert len(nobody.items) == 20


def test_recommendations_for_held_out_requests_are_those_that_evaluate_judges(
    run, own_world: Settings, as_trained: list[str], tmp_path: Path
) -> None:
    workspace = places(own_world).workspace
    config = ["-c", tmp_path / "demo.toml", *as_trained, "--set", f"workspace.path={workspace}"]
    config += ["--set", "models.rankers=[]"]
    (tmp_path / "demo.toml").write_text((EXAMPLES / "demo.toml").read_text())
    held_out = pq.read_table(workspace / "holdout.parquet").to_pandas()[["user_id", "item_id"]].drop_duplicates()
    found = []
    for users, in_context in (("holdout_impressions", "true"), ("holdout", "false")):
        judged = run("evaluate", *config, "--set", f"evaluate.context={in_context}")
        out = tmp_path / f"{users}.parquet"
        asked = ["--users", workspace / f"{users}.parquet", "--k", 50, "--channel", "two_tower"]
        report = run("retrieve", *config, *asked, "--out", out)
        assert set(judged["context"]["features"]) == set(report["context"])
        listed = pq.read_table(out).to_pandas()[["user_id", "item_id"]].assign(hit=1.0)
        hits = held_out.merge(listed, "left", on=["user_id", "item_id"]).fillna({"hit": 0.0})
        assert hits.groupby("user_id")["hit"].mean().mean() == pytest.approx(judged["recall@50"]["value"], abs=1e-4)
        found.append(judged)
    assert found[0]["context"] == {"features": ["hour", "scene"], "users": found[0]["users"]}
    assert found[1]["context"] == {"features": [], "users": 0}
    assert found[0]["truth"]["two_tower"] != found[1]["truth"]["two_tower"]
    assert found[0]["popular"]["recall@50"]["value"] == found[1]["popular"]["recall@50"]["value"]


def test_trials_and_fusing_ask_as_evaluate_does(world: Settings) -> None:
    samples = open_samples(places(world).samples)
    truth = held_out(places(world).workspace, samples, world.evaluate.context)
    assert list(truth.context) == ["hour", "scene"]
    some = some_users(truth, 20, 0)
    place = np.searchsorted(truth.user_rows, some.user_rows)
    for name, column in some.context.items():
        np.testing.assert_array_equal(column, take(truth.context[name], place))
    silent = held_out(places(world).workspace, samples, context=False)
    assert silent.context == {}
    assert silent.user_rows.tolist() == truth.user_rows.tolist()
