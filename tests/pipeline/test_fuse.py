import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from twotower.channels.retriever import Candidates, Queries, Retriever
from twotower.config import Settings
from twotower.config.load import as_dict, parse
from twotower.pipeline import line
from twotower.pipeline.fuse import fuse
from twotower.pipeline.line import evaluate_channels_of, fusion_of, open_served, publish_version
from twotower.samples.read import Samples
from twotower.schema.errors import ConfigError, DataError


def options(settings: Settings, *more: str) -> list[str]:
    text = Path(settings.workspace.path).parent / "config.toml"
    text.write_text(
        "[features.user]\nuser_id = { kind = 'categorical' }\nhistory = { kind = 'sequence' }\n"
        f"[workspace]\npath = {json.dumps(settings.workspace.path)}\n[models]\ndimension = 8\n"
        "[train]\nepochs = 2\nbatch_size = 256\n[fusion]\ndepth = 100\nk = [20, 50]\nusers = 150\n"
        "[evaluate]\nchannels_k = [20, 50, 2000]\n"
    )
    return ["-c", str(text), *more]


def test_weights_chosen_on_validation_are_published_and_every_way_to_ask_agrees(
    run, own_world: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workspace = Path(own_world.workspace.path)
    kept = (workspace / "holdout.parquet").rename(workspace / "kept.parquet")  # nobody may look at it
    config = options(own_world)
    answer = run("fuse", *config)
    stored = json.loads((workspace / "fusion.json").read_text())
    assert answer["path"] == str(workspace / "fusion.json")
    assert stored["weights"] == answer["weights"]
    assert set(stored["weights"]) == set(stored["channels"]) == {"two_tower", "item_cf", "popular"}
    assert max(stored["weights"].values()) == 1
    assert stored["depth"] == 100
    assert set(answer["recall"]) == {"two_tower", "item_cf", "popular", "fused", "equal_weights"}
    assert 0 < answer["users"] <= 150
    assert run("fuse", *config) == answer  # nothing is trained again

    kept.rename(workspace / "holdout.parquet")
    run("samples", *config)
    run("train", *config)
    with monkeypatch.context() as without:
        without.setattr(line, "can_plot", lambda: False)
        files = run("evaluate", *config, "--channels")["files"]
    assert [Path(file).suffix for file in files] == [".json", ".md"]
    assert "pip install 'twotower[plots]'" in caplog.text
    report = run("evaluate", *config, "--channels")
    assert [Path(file).suffix for file in report["files"]] == [".json", ".md", ".svg"]
    assert report["fusion"] == {
        **{name: stored[name] for name in ("weights", "constants", "depth")}, "reserved": {},
    }  # fmt: skip
    assert report["ks"][:2] == [20, 50]
    assert all(Path(file).exists() for file in report["files"])
    assert json.loads(Path(report["files"][0]).read_text())["recall"] == report["recall"]

    run("train", *config)  # a finished run stays finished, whatever reports stand beside it
    assert all(Path(file).exists() for file in report["files"])
    version = run("publish", *config)["version"]
    assert run("versions", "verify", version, *config)["ok"]
    out = workspace / "fused.parquet"
    run("retrieve", *config, "--users", workspace / "holdout.parquet", "--k", 50, "--channel", "fused", "--out", out)
    listed, held = pq.read_table(out).to_pylist(), pq.read_table(workspace / "holdout.parquet").to_pylist()
    truth: dict[int, set[int]] = {}
    for row in held:
        truth.setdefault(row["user_id"], set()).add(row["item_id"])
    hits = dict.fromkeys(truth, 0)
    for row in listed:
        hits[row["user_id"]] += row["item_id"] in truth[row["user_id"]]
    recall = np.mean([hits[user] / len(items) for user, items in truth.items()])
    assert report["recall"]["fused"]["50"]["value"] == pytest.approx(recall, abs=0.002)


def test_the_configuration_goes_before_what_was_chosen(run, own_world: Settings) -> None:
    path = Path(own_world.workspace.path) / "fusion.json"
    chosen = {"weights": {"popular": 0.0}, "constants": {}, "depth": 7}
    path.write_text(json.dumps({**chosen, "channels": own_world.models.channels}))
    publish_version(own_world, promoted=True)
    assert open_served(own_world).manifest["fusion"] == {**chosen, "reserved": {}}
    given = parse(as_dict(own_world), ["fusion.weights={ two_tower = 2 }", "fusion.depth=9"])
    publish_version(given, promoted=True)
    assert open_served(given).manifest["fusion"] == {
        "weights": {"two_tower": 2.0}, "constants": {}, "depth": 9, "reserved": {},
    }  # fmt: skip


def test_a_choice_among_other_channels_is_refused(run, own_world: Settings) -> None:
    path = Path(own_world.workspace.path) / "fusion.json"
    path.write_text(json.dumps({"channels": ["two_tower", "mf"]}))
    place = ["--set", f"workspace.path={json.dumps(own_world.workspace.path)}"]
    assert run("publish", *place, code=1) is None
    assert "was chosen for two_tower, mf, and the channels are " in run.err
    assert run("publish", *place, "--set", "fusion.weights={ mv = 1 }", code=2) is None
    assert "fusion.weights.mv" in run.err


class Rare:
    """A channel as a user writes one: the least clicked items first, alike for everyone."""

    name = "rare"

    def __init__(self, samples: Samples) -> None:
        self.order = np.argsort(samples.item_positives, kind="stable")

    def retrieve(self, queries: Queries, k: int) -> Candidates:
        rows = np.full((len(queries), k), -1, np.int64)
        for user in range(len(queries)):
            excluded = queries.exclude.rows[queries.exclude.indptr[user] : queries.exclude.indptr[user + 1]]
            offered = self.order[~np.isin(self.order, excluded)][:k]
            rows[user, : len(offered)] = offered
        return Candidates(rows, np.where(rows >= 0, -np.arange(k, dtype=np.float32), np.float32(-np.inf)))


def test_a_channel_of_ones_own_is_judged_fused_and_given_a_weight(own_world: Settings) -> None:
    def own(samples: Samples) -> dict[str, Retriever]:
        return {"rare": Rare(samples)}

    settings = parse(as_dict(own_world), ["fusion.depth=100", "fusion.k=[20, 50]", "fusion.users=100"])
    report = evaluate_channels_of(settings, own)
    assert report["channels"] == [*settings.models.channels, "rare"]
    assert report["recall"]["rare"].keys() == report["recall"]["fused"].keys()
    assert "rare" in report["unique"]
    chosen = fuse(settings, own)
    assert set(chosen.weights) == {*settings.models.channels, "rare"}
    assert chosen.weights["rare"] == 0  # nobody clicks these
    with pytest.raises(DataError, match=r"was chosen for .*rare, and the channels are"):
        fusion_of(settings)
    assert fusion_of(settings, chosen.weights).weights == chosen.weights
    with pytest.raises(ConfigError, match=r"popular: models\.channels has this name already"):
        evaluate_channels_of(settings, lambda samples: {"popular": Rare(samples)})


def test_one_channel_leaves_nothing_to_choose(run, own_world: Settings) -> None:
    place = ["--set", f"workspace.path={json.dumps(own_world.workspace.path)}"]
    assert run("fuse", *place, "--set", 'models.channels=["two_tower"]', code=2) is None
    assert "fusing takes two channels or more" in run.err


def test_several_parts_are_held_out_one_before_the_other(run, own_world: Settings) -> None:
    workspace = Path(own_world.workspace.path)
    answer = run("fuse", *options(own_world, "--set", "fusion.parts=2", "--set", "tune.holdout=time:0.8"))
    first, second = sorted(workspace.glob("fusing/*/part-*/workspace"))
    whole, left = (sorted(path.name for path in (one / "events").iterdir()) for one in (first, second))
    held = [pq.read_table(one / "holdout.parquet", columns=["ts_ms"])["ts_ms"].to_numpy() for one in (first, second)]
    assert held[1].max() < held[0].min()
    assert set(left) <= set(whole)
    assert json.loads((second / "workspace.json").read_text())["arguments"] == {"holdout": "time:0.8", "of": str(first)}
    assert len(answer["gain"]["by_part"]) == 2
    assert 0 < answer["users"] <= 150
    assert json.loads((workspace / "fusion.json").read_text())["validation"]["gain"] == answer["gain"]
