import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twotower.schema.errors import ConfigError
from twotower.schema.files import write_json
from twotower_lab import kinds, trials
from twotower_lab.experiments import DATA, EXPERIMENTS, Claim
from twotower_lab.results import judged
from twotower_lab.run import listed, results, run, write_report
from twotower_lab.trials import Unit, check_definitions, finished, key_of, result_path, units, usable

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "lab"
MEASURES = {"recall@50", "true_recall@50", "ndcg@20", "page_clicks", "pop_pct@50"}


def arm_files(out: Path) -> list[Path]:
    return sorted((out / "networks" / "smoke").rglob("*.json"))


def test_every_arm_is_a_configuration_and_every_claim_is_about_arms_that_there_are() -> None:
    check_definitions()
    for experiment in EXPERIMENTS.values():
        assert set(experiment.data) <= set(DATA)
        for arm in experiment.arms.values():
            assert set(arm.on) <= set(experiment.data)
        for claim in experiment.claims:
            assert {claim.better, *claim.than} <= set(experiment.arms)
    assert [one["name"] for one in listed()] == list(EXPERIMENTS)


def test_an_experiment_from_a_world_to_a_verdict(networks: Path) -> None:
    result = results(networks)["networks"]
    assert result["skipped"] == {"kuairand": "a smoke run has worlds alone"}
    assert result["data"]["world"]["seeds"] == 1
    arms = [json.loads(path.read_text()) for path in arm_files(networks)]
    assert [one["arm"] for one in arms] == ["DCN-v2", "DNN"]
    assert set(arms[0]["values"]) >= MEASURES
    dcn, dnn = (np.array(one["values"]["true_recall@50"]) for one in arms)
    claim = result["claims"][0]
    assert [one["kind"] for one in claim["conditions"]] == ["true", "logged"]
    judged = claim["conditions"][0]
    assert judged["judged"]
    assert judged["value"] == pytest.approx((dcn - dnn).mean(), abs=1e-6)
    half = 1.959964 * (dcn - dnn).std(ddof=1) / len(dcn) ** 0.5
    assert judged["high"] == pytest.approx((dcn - dnn).mean() + half, abs=1e-5)
    assert claim["verdict"] == ("holds" if judged["low"] > 0 else "does not")
    assert (networks / "networks" / "plot.svg").read_text().startswith("<svg")
    assert "twotower lab run networks --smoke --jobs 1 --out DIR" in (networks / "report.html").read_text()


def test_an_interrupted_run_goes_on_where_it_was(networks: Path, tmp_path: Path, monkeypatch) -> None:
    done = trials.finished(networks, Unit("networks", "world", 0, ("DNN", "DCN-v2"), True), "DNN")
    out = tmp_path / "lab"
    kept = result_path(out, Unit("networks", "world", 0, ("DNN", "DCN-v2"), True), "DNN")
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(done))
    before = kept.stat().st_mtime_ns
    trained = []
    train = kinds.train_model
    monkeypatch.setattr(kinds, "train_model", lambda settings: (trained.append(settings), train(settings))[1])
    run(["networks"], out, smoke=True)
    assert [settings.models.user_tower.network for settings in trained] == ["dcn"]
    assert kept.stat().st_mtime_ns == before
    first, second = (
        [{key: value for key, value in json.loads(path.read_text()).items() if key in ("arm", "values")}
         for path in arm_files(folder)]
        for folder in (networks, out)
    )  # fmt: skip
    assert first == second  # the same seed finds the same, whatever ran before it
    trained.clear()
    run(["networks"], out, smoke=True)
    assert not trained


def test_a_result_of_another_definition_or_a_damaged_one_is_made_again(networks: Path, tmp_path: Path) -> None:
    smoke = Unit("networks", "world", 0, ("DNN", "DCN-v2"), True)
    assert finished(networks, smoke, "DNN") is not None
    assert finished(networks, replace(smoke, smoke=False), "DNN") is None
    assert finished(networks, replace(smoke, seed=1), "DNN") is None
    assert key_of(smoke, "DNN") != key_of(smoke, "DCN-v2")
    path = result_path(tmp_path, smoke, "DNN")
    path.parent.mkdir(parents=True)
    path.write_text('{"key": ')
    assert finished(tmp_path, smoke, "DNN") is None


def test_results_of_other_experiments_stay_in_the_report(networks: Path) -> None:
    report = run(["index"], networks, smoke=True)
    assert list(report["experiments"]) == ["index"]
    assert list(results(networks)) == ["networks", "index"]
    page = (networks / "report.html").read_text()
    assert 'id="networks"' in page
    assert 'id="index"' in page


def test_processes_beside_each_other_find_what_one_finds(networks: Path, tmp_path: Path) -> None:
    run(["networks"], tmp_path, smoke=True, jobs=2)
    for first, second in zip(arm_files(networks), arm_files(tmp_path), strict=True):
        assert json.loads(first.read_text())["values"] == json.loads(second.read_text())["values"]


def test_a_log_that_is_absent_is_left_out_with_its_reason(tmp_path: Path) -> None:
    assert usable("world", None, False) is None
    assert usable("kuairand", None, False) == "no kuairand in --data, $TWOTOWER_DATA or ../shared/data"
    assert usable("movielens", tmp_path, False) == "no ml-1m in --data, $TWOTOWER_DATA or ../shared/data"
    (tmp_path / "ml-1m").mkdir()
    assert usable("movielens", tmp_path, False) is None
    assert usable("movielens", tmp_path, True) == "a smoke run has worlds alone"


def test_units_share_a_workspace_except_those_that_change_it() -> None:
    shared = list(units("shown", "kuairand", 2, False))
    assert [unit.seed for unit in shared] == [0, 1]
    assert "rejected ones alone" not in shared[0].arms
    assert [len(unit.arms) for unit in units("feedback", "small_world", 1, True)] == [1] * 6


def test_a_claim_over_several_arms_is_judged_by_the_strongest_of_them() -> None:
    def arm(*values: float) -> dict[int, dict]:
        return {0: {"values": {"recall@50": list(values), "true_recall@50": list(values)}}}

    arms = {"a": arm(0.5, 0.52), "b": arm(0.1, 0.12), "c": arm(0.45, 0.53), "d": arm(0.7, 0.72)}
    claim = judged(Claim("a is best of these", "a", ("b", "c")), {"world": arms})
    assert claim["verdict"] == "does not"  # nothing is seen between a and c
    assert claim["conditions"][0]["against"] == "c"
    assert judged(Claim("a is better than b", "a", ("b",)), {"world": arms})["verdict"] == "holds"
    assert judged(Claim("a is less", "a", ("d",), lower=True), {"world": arms})["verdict"] == "holds"
    assert judged(Claim("a is something", "a"), {"world": arms})["verdict"] == "holds"
    # below on a real log, where users are the same, and above in the world: it depends
    log = {"a": arm(0.1, 0.12), "b": arm(0.5, 0.52)}
    both = judged(Claim("a is better than b", "a", ("b",)), {"world": arms, "kuairand": log})
    assert both["verdict"] == "depends"
    assert [(one["data"], one["kind"]) for one in both["conditions"] if one["judged"]] == [
        ("world", "true"),
        ("kuairand", "logged"),
    ]
    assert judged(Claim("nobody ran it", "x", ("a",)), {"world": arms})["verdict"] == "not asked"


def test_where_clicks_say_the_opposite_of_the_truth_they_lie() -> None:
    good = {0: {"values": {"recall@50": [0.1, 0.12], "true_recall@50": [0.8, 0.82]}}}
    liked = {0: {"values": {"recall@50": [0.5, 0.52], "true_recall@50": [0.4, 0.42]}}}
    claim = judged(Claim("it is good", "good", ("liked",)), {"world": {"good": good, "liked": liked}})
    assert claim["verdict"] == "holds"
    assert claim["conditions"][1]["offline"] == "lies"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"names": ["nothing"]}, "there is no experiment 'nothing': one of features"),
        ({"names": ["all"], "seeds": 0}, "seeds=0, jobs=1: at least 1"),
        ({"names": ["all"], "jobs": 0}, "jobs=0: at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run(out=tmp_path, **arguments)


def test_the_report_shows_all_results_that_its_folder_holds(networks: Path, tmp_path: Path) -> None:
    result = results(networks)["networks"]
    for name in ("index", "networks", "of_before"):  # one of them is no experiment any longer
        write_json(tmp_path / name / "result.json", {**result, "name": name})
    told = write_report(tmp_path)
    assert told == {"report": str(tmp_path / "report.html"), "experiments": ["networks", "index", "of_before"]}
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<h2 id="([^"]+)"', page) == told["experiments"]
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(tmp_path / "nothing")


def test_the_committed_report_shows_the_committed_results() -> None:
    page = (COMMITTED / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<h2 id="([^"]+)"', page) == list(results(COMMITTED))


def test_several_experiments_are_run_by_their_names_and_those_without_data_are_left_out(
    networks: Path, tmp_path: Path
) -> None:
    shutil.copytree(networks, tmp_path / "lab")
    told = run(["networks", "mind", "networks"], tmp_path / "lab", smoke=True)
    assert list(told["experiments"]) == ["networks"]
    with pytest.raises(ConfigError, match="nothing can be run: a smoke run has worlds alone"):
        run(["mind"], tmp_path / "lab", smoke=True)
