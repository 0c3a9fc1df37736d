import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from twotower.channels.vector_channel import latest
from twotower.cli.main import app
from twotower.config import Settings, parse
from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_held_out
from twotower.features.columns import take
from twotower.features.feature_set import encode_table
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs import Event
from twotower.logs.events import item_deleted, item_event, user_deleted
from twotower.pipeline import updating
from twotower.pipeline.line import open_served, run_line
from twotower.pipeline.places import places
from twotower.pipeline.updating import check_held_out, learn, open_as_served, open_chain
from twotower.publish import overlay as overlay_module
from twotower.publish.delta import Delta, base_digest, chain_folder, delta_folder, last_seq, read_delta, verify_chain
from twotower.publish.manifest import digest
from twotower.publish.onnx import OnnxTower
from twotower.publish.tables import LaidRows, map_tables
from twotower.publish.version import open_version
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, UnavailableError, VersionError
from twotower.schema.files import folder_listing, read_json, write_json
from twotower.serve.monitors import monitors
from twotower.serve.request import Request, retrieve
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import Recent
from twotower.stream.shards import read_manifest, read_rows
from twotower.update import chain as module
from twotower.update import incremental
from twotower.update import learn as learning_module
from twotower.update.gate import SAMPLED_USERS, Gate, Recall, check_accumulators, lists_with, mean_cosine
from twotower.update.incremental import _only_updater
from twotower.update.learner import Learner, Touched
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace


def deltas(settings: Settings):
    version, folder = open_served(settings), places(settings).deltas
    follows, found = base_digest(version.path), []
    for seq in range(1, last_seq(folder, version.id) + 1):
        found.append(read_delta(folder, version.id, seq, follows))
        follows = found[-1].digest
    return found


def snapshots(settings: Settings) -> Snapshots:
    where = places(settings)
    return Snapshots(where.versions, deltas=where.deltas)


def run(settings: Settings, **options):
    return learn(settings, **{"follow": False, "dry_run": False, **options})


def test_rows_of_clicked_pairs_move_and_nothing_else_does(learning, happen, clicks) -> None:
    version = open_served(learning)
    before = folder_listing(version.path)
    events = clicks(learning, 150)
    happen(learning, events)
    report = run(learning)
    assert (report.kind, report.version, report.rows) == ("incremental", version.id, 150)
    assert report.seq == last_seq(places(learning).deltas, version.id) == 2
    assert report.watermark_ms == max(event.ts_ms for event in events)
    assert folder_listing(version.path) == before  # towers, tables, vectors, index: not a bit
    users = version.features.vocabularies[c.USER_ID].rows(version.users.ids)
    row_of = dict(zip(version.users.ids.to_pylist(), users.tolist(), strict=True))
    items = version.features.vocabularies[c.ITEM_ID].rows(version.item_ids)
    item_row_of = dict(zip(version.item_ids.to_pylist(), items.tolist(), strict=True))
    clicked = {event.body["item_id"] for event in events}
    admitted = {c.USER_ID: set[int](), c.ITEM_ID: set[int]()}
    for delta in deltas(learning):
        for name, ids in delta.new_ids.items():
            admitted[name] |= set(ids.column("row").to_pylist())
        assert set(delta.tables) <= {c.USER_ID, c.ITEM_ID}
        assert min(rows.rows.min() for rows in delta.tables.values()) >= FIRST
        assert set(delta.item_ids.to_pylist()) <= clicked
        moved = {name: set(rows.rows.tolist()) - admitted[name] for name, rows in delta.tables.items()}
        assert moved[c.USER_ID] <= {row_of[event.user_id] for event in events}
        assert moved[c.ITEM_ID] <= {item_row_of[item] for item in clicked}


def test_only_the_tables_that_are_named_move(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 60))
    run(replace(learning, update=replace(learning.update, tables=["user_id"])))
    [delta] = deltas(learning)
    assert set(delta.tables) == {c.USER_ID}
    assert len(delta.item_ids) == 0


def test_a_deleted_item_is_no_reason_to_refuse_where_only_users_are_learned(learning, happen, clicks) -> None:
    version = open_served(learning)
    item, before = version.item_ids[50].as_py(), version.watermark_ms + 1
    happen(learning, [item_deleted("d", before, item), *clicks(learning, 30)])
    report = run(replace(learning, update=replace(learning.update, tables=["user_id"])))
    assert (report.refused, report.reasons) == ([], [])
    [delta] = deltas(learning)
    assert delta.new_ids[c.ITEM_ID].to_pydict() == {"id": [item], "row": [UNKNOWN]}


def test_negatives_move_away_where_that_is_configured_and_only_their_ids_do(learning, happen, clicks) -> None:
    away = replace(learning, update=replace(learning.update, negatives_move=True))
    version = open_served(away)
    before = folder_listing(version.path)
    events = clicks(away, 30)
    happen(away, events)
    run(away)
    assert folder_listing(version.path) == before
    [delta] = deltas(away)
    assert set(delta.tables) <= {c.USER_ID, c.ITEM_ID}
    clicked = {event.body["item_id"] for event in events}
    items = version.features.vocabularies[c.ITEM_ID].rows(version.item_ids)
    own = {int(items[version.item_ids.to_pylist().index(one)]) for one in clicked}
    moved = delta.tables[c.ITEM_ID].rows
    others = set(moved.tolist()) - own - set(delta.new_ids[c.ITEM_ID].column("row").to_pylist())
    assert others
    assert moved.min() >= FIRST
    # what nobody clicked is farther from those who clicked something else
    users = version.two_tower.user_vectors(version.queries(np.arange(len(version.users)))).mean(axis=0)
    served = snapshots(away).version
    rows = np.flatnonzero(np.isin(items, list(others)))
    assert (np.asarray(served.item_vectors[rows]) @ users).mean() < (version.item_vectors[rows] @ users).mean()


def test_what_a_user_clicks_again_and_again_comes_nearer(learning, happen) -> None:
    version = open_served(learning)
    trained = np.flatnonzero(version.users.features[c.USER_ID] > UNKNOWN)
    user = version.users.ids[int(trained[0])].as_py()
    ranked = [
        one.item_id
        for one in retrieve(version, Request(300, "none", user, channels=["two_tower"]), Recent(), range(0)).items
    ]
    far = ranked[len(ranked) // 2]
    begin = version.watermark_ms + 1  # over ten hours: of one hour only a few would be trained
    happen(learning, [Event(f"e{n}", "click", user, begin + 180_000 * n, body={"item_id": far}) for n in range(200)])
    run(learning)
    laid = snapshots(learning).version
    after = [
        one.item_id
        for one in retrieve(laid, Request(300, "none", user, channels=["two_tower"]), Recent(), range(0)).items
    ]
    assert after.index(far) < ranked.index(far) / 2
    assert laid.delta_seq == 2


def test_vectors_of_touched_items_are_those_of_the_frozen_tower_over_the_new_rows(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 90))
    run(learning)
    version, laid = open_served(learning), snapshots(learning).version
    [delta] = deltas(learning)
    folder = version.path / "channels" / "two_tower"
    tables = map_tables(folder)
    rows = delta.tables[c.ITEM_ID]
    laid_tables = {**tables, c.ITEM_ID: LaidRows(tables[c.ITEM_ID], rows.rows, rows.values)}
    at = version.items.find(delta.item_ids)
    columns = encode_table(version.features.item, pa.Table.from_batches([version.catalogue]))
    some = {name: take(column, at) for name, column in columns.items()}
    new = dict(
        zip(*(delta.new_ids[c.ITEM_ID].column(name).to_pylist() for name in ("id", "row")), strict=True)
        if c.ITEM_ID in delta.new_ids
        else []
    )
    some[c.ITEM_ID] = np.array(
        [new.get(one, token) for one, token in zip(delta.item_ids.to_pylist(), some[c.ITEM_ID], strict=True)], np.int32
    )
    expected = OnnxTower(folder / "item_tower.onnx", version.features.item, laid_tables).encode(some)
    np.testing.assert_allclose(laid.item_vectors[at], expected, atol=1e-5)


def test_a_new_id_has_a_row_after_enough_positives_and_no_sooner(learning, happen) -> None:
    version = open_served(learning)
    begin, item = version.watermark_ms + 1, version.item_ids[0].as_py()
    stranger = 10**6 if str(version.users.ids.type) == "int64" else "stranger"

    def click(number: int) -> list[Event]:
        return [Event(f"e{number}", "click", stranger, begin + number, body={"item_id": item})]

    happen(learning, click(1))
    run(learning)
    happen(learning, click(2))
    run(learning)
    happen(learning, click(3))
    run(learning)
    one, two, three = deltas(learning)
    assert c.USER_ID not in one.new_ids
    assert one.state["pending"][c.USER_ID] == [[stranger, 1]]
    spare = FIRST + len(version.features.vocabularies[c.USER_ID].values)
    assert two.new_ids[c.USER_ID].to_pydict() == {"id": [stranger], "row": [spare]}
    assert two.tables[c.USER_ID].rows.tolist() == [spare]
    assert c.USER_ID not in three.new_ids
    assert three.tables[c.USER_ID].rows.tolist() == [spare]
    assert one.report["without_user_row"] == 1


def test_without_room_new_ids_stay_unknown_and_are_counted(learning, happen) -> None:
    version = open_served(learning)
    vocabulary = version.features.vocabularies[c.USER_ID]
    room = vocabulary.capacity - FIRST - len(vocabulary.values)
    begin, item = version.watermark_ms + 1, version.item_ids[0].as_py()
    number = str(version.users.ids.type) == "int64"
    happen(
        learning,
        [
            Event(f"e{n}", "click", 10**6 + n // 2 if number else f"new {n // 2}", begin + n, body={"item_id": item})
            for n in range(2 * room + 4)
        ],
    )
    run(learning)
    assert sum(delta.report["admitted"].get(c.USER_ID, 0) for delta in deltas(learning)) == room
    assert sum(delta.report["no_room"] for delta in deltas(learning)) == 2


@pytest.mark.parametrize("before", ["write_json", "read_positives", "write_delta", "delta"])
def test_a_run_that_was_killed_makes_the_same_bytes(
    learning, happen, clicks, content, monkeypatch: pytest.MonkeyPatch, before: str, tmp_path
) -> None:
    happen(learning, clicks(learning, 350))
    copied = tmp_path / "undisturbed"
    shutil.copytree(learning.workspace.path, copied)
    undisturbed = replace(learning, workspace=replace(learning.workspace, path=str(copied)))
    run(undisturbed)
    name = "write_delta" if before == "delta" else before
    real = getattr(module, name)

    def killed(*args, **options):
        killed.calls += 1
        if killed.calls == 2:
            if before == "delta":
                real(*args, **options)  # committed, and then killed
            raise KeyboardInterrupt
        return real(*args, **options)

    killed.calls = 0
    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        run(learning)
    monkeypatch.setattr(module, name, real)
    run(learning)
    assert content(places(learning).deltas) == content(places(undisturbed).deltas)


def test_what_was_planned_stays_planned_whatever_comes_meanwhile(
    learning, happen, clicks, monkeypatch: pytest.MonkeyPatch
) -> None:
    happen(learning, clicks(learning, 30))
    planned = run(learning, dry_run=True).plan

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_delta", killed)
        with pytest.raises(KeyboardInterrupt):
            run(learning)
    happen(learning, clicks(learning, 30, seed=1))
    run(learning)
    one, two = deltas(learning)
    assert one.offsets["shards"] == {name: end for name, (_, end) in planned.shards.items()}
    assert (one.report["rows"], two.report["rows"]) == (30, 30)


def test_a_second_run_has_nothing_to_do_and_a_dry_run_says_what_it_would_do(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 50))
    planned = run(learning, dry_run=True)
    assert sum(end - first for first, end in planned.plan.shards.values()) == 50
    assert deltas(learning) == []
    first = run(learning)
    assert run(learning) == replace(first, rows=0)
    assert run(learning, dry_run=True).plan is None


def test_one_updater_at_a_time(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 10))
    with _only_updater(places(learning).deltas, open_served(learning).id, False) as alone:
        assert alone
        with pytest.raises(VersionError, match="another updater"):
            run(learning)
    assert run(learning).seq == 1


def test_held_out_users_are_witnesses_and_are_not_trained(judged, happen, clicks) -> None:
    version = open_served(judged)
    out = is_held_out(version.users.ids, 0.2)
    happen(judged, clicks(judged, 90))
    run(judged)
    [delta] = deltas(judged)
    assert delta.report["held_out"] + delta.report["positives"] == 90
    moved = set(delta.tables[c.USER_ID].rows.tolist())
    tokens = version.features.vocabularies[c.USER_ID].rows(version.users.ids)
    assert not moved & set(tokens[out].tolist()) - {UNKNOWN}
    assert len(delta.state["window"]) == delta.report["held_out"] > 10


def test_a_share_of_held_out_users_that_was_not_trained_with_is_refused(judged, learning, happen, clicks) -> None:
    happen(judged, clicks(judged, 10))
    for share in (0.0, 0.5):
        changed = replace(judged, samples=replace(judged.samples, held_out_users=share))
        with pytest.raises(ConfigError, match=f"held_out_users is {share:g} .* was trained with 0.2"):
            run(changed)
    assert run(judged).rows == 10


def test_without_held_out_users_the_update_says_that_recall_is_not_judged(judged, monkeypatch, caplog) -> None:
    version = open_served(judged)
    configuration = {**version.manifest["configuration"], "samples": {"held_out_users": 0.0}}
    version = replace(version, manifest={**version.manifest, "configuration": configuration})
    check_held_out(replace(judged, samples=replace(judged.samples, held_out_users=0.0)), version)
    assert "the gate does not judge the recall" in caplog.text
    assert "bootstrap again with `twotower run`" in caplog.text


def test_a_delta_that_fails_the_gate_is_refused_and_learning_goes_on(learning, happen, clicks) -> None:
    happen(learning, clicks(learning, 40))
    run(learning)
    wild = replace(learning, update=replace(learning.update, learning_rate=1000.0))
    happen(learning, clicks(learning, 40, seed=1))
    report = run(wild)
    assert report.refused == [2]
    happen(learning, clicks(learning, 40, seed=2))
    assert run(learning).refused == []
    one, two, _ = deltas(learning)
    assert two.tables == {}
    assert any("long" in problem or "moved" in problem for problem in two.report["refused"])
    assert two.offsets["shards"] != one.offsets["shards"]
    quarantined = places(learning).deltas / two.version / "quarantine" / "00000002.parquet"
    assert quarantined.exists()
    served = snapshots(learning)
    assert served.version.delta_seq == 3
    assert [refusal.delta_seq for refusal in served.gated] == [2]


def test_a_loss_of_recall_on_the_held_out_users_is_a_problem_beyond_the_margin(learning) -> None:
    where = places(learning)
    chain = open_chain(learning, open_served(learning).path, None)
    width = chain.version.item_vectors.shape[1]
    nothing = pa.array([], chain.version.item_ids.type)
    delta = Delta(chain.version.id, 1, None, {}, {}, nothing, np.zeros((0, width), np.float32), {})
    learner = chain.state.learner
    gate = Gate(chain.version, learner.model, learning.update.gate)
    touched = Touched(learner.recent)
    assert gate.check(delta, touched, learner.vectors, Recall(0.30, 0.29)) == []
    assert gate.check(delta, touched, learner.vectors, Recall(None, None)) == []
    [problem] = gate.check(delta, touched, learner.vectors, Recall(0.30, 0.27))
    assert problem == "recall@50 of the held-out users falls from 0.3000 to 0.2700"
    assert not where.deltas.exists()


def test_a_deleted_user_leaves_the_table_and_an_item_that_was_put_is_learned(learning, happen, clicks) -> None:
    version = open_served(learning)
    trained = np.flatnonzero(version.users.features[c.USER_ID] > UNKNOWN)
    user, other = (version.users.ids[int(row)].as_py() for row in trained[:2])
    row = int(version.users.features[c.USER_ID][int(trained[0])])
    begin = version.watermark_ms + 1
    new = 10**9 if str(version.item_ids.type) == "int64" else "zz new"
    attributes = {
        name: value
        for name, value in version.catalogue.slice(0, 1).to_pylist()[0].items()
        if name not in (c.ITEM_ID, c.AVAILABLE)
    }
    happen(
        learning,
        [
            item_event("i", begin, new, attributes, None),
            user_deleted("u", begin, user),
            *(Event(f"e{n}", "click", other, begin + n, body={"item_id": new}) for n in range(20)),
        ],
    )
    run(learning)
    [delta] = deltas(learning)
    assert delta.new_ids[c.USER_ID].to_pydict() == {"id": [user], "row": [UNKNOWN]}
    place = delta.tables[c.USER_ID].rows.tolist().index(row)
    assert not delta.tables[c.USER_ID].values[place].any()
    assert delta.new_ids[c.ITEM_ID].column("id").to_pylist() == [new]
    assert delta.item_ids.to_pylist() == [new]
    assert {tuple(one[:2]) for one in delta.state["entities"]} == {("item", new), ("user", user)}
    assert run(learning).seq == 1


def test_a_chain_that_is_opened_again_goes_on_with_the_same_bytes(learning, happen, clicks, content, tmp_path) -> None:
    copied = tmp_path / "at once"
    shutil.copytree(learning.workspace.path, copied)
    at_once = replace(learning, workspace=replace(learning.workspace, path=str(copied)))
    entities = [item_event("i", 1_700_000_000_000, open_served(learning).item_ids[3].as_py(), None, False)]
    for seed in range(3):
        events = [*clicks(learning, 250, seed=seed), *(entities if seed == 1 else [])]
        happen(learning, events)
        run(learning)
    plans = [delta.offsets for delta in deltas(learning)]
    assert len(plans) == 9
    for seed in range(3):
        happen(at_once, [*clicks(learning, 250, seed=seed), *(entities if seed == 1 else [])])
        run(at_once)
    assert content(places(learning).deltas) == content(places(at_once).deltas)
    assert read_json(places(learning).deltas / deltas(learning)[0].version / "00000009" / "state.json")


def test_a_click_after_midnight_is_learned_though_the_version_knows_a_later_one_on_a_request_before(
    learning, happen, clicks, monkeypatch
) -> None:
    version = open_served(learning)
    midnight = end_of_day(version.last_day) + 1
    manifest = {**version.manifest, "watermark_ms": midnight + 3_600_000}
    monkeypatch.setattr(updating, "open_version", lambda path: replace(open_version(path), manifest=manifest))
    events = [replace(one, ts_ms=midnight + 1000 * n) for n, one in enumerate(clicks(learning, 30))]
    happen(learning, events)
    chain = open_chain(learning, version.path, None)
    chain.make(chain.plan())
    report = deltas(learning)[0].report
    assert (report["positives"], report["known_before"]) == (30, 0)
    assert replace(version, manifest=manifest).knows_until_ms == midnight - 1


def test_retrieve_reads_the_version_as_it_is_served(learning, happen, clicks, tmp_path: Path) -> None:
    version = open_served(learning)
    out, place = tmp_path / "out.parquet", f"workspace.path={learning.workspace.path}"
    stranger, begin = 10**6, version.watermark_ms + 1
    pq.write_table(pa.table({"user_id": [stranger]}), tmp_path / "users.parquet")

    def asked(*options: str) -> tuple[dict[str, Any], list[Any]]:
        users = tmp_path / "users.parquet"
        listed = ["--users", users, "--k", 20, "--channel", "two_tower", "--out", out]
        arguments = ["retrieve", "--set", place, *listed, *options]
        told = CliRunner().invoke(app, [str(one) for one in arguments])
        assert told.exit_code == 0, told.output
        return json.loads(told.stdout.splitlines()[-1]), pq.read_table(out)["item_id"].to_pylist()

    before = asked()
    assert before[0]["delta_seq"] == 0
    item = before[1][-1]
    gone = item_deleted("d", begin, before[1][0])
    events = [Event(f"e{n}", "click", stranger, begin + n, body={"item_id": item}) for n in range(30)]
    happen(learning, [*events, gone])
    run(learning)
    told, after = asked()
    assert (told["version"], told["delta_seq"]) == (version.id, 1)
    expected = retrieve(
        snapshots(learning).version, Request(21, "none", stranger, channels=["two_tower"]), Recent(), range(0)
    )
    assert after == [one.item_id for one in expected.items if one.item_id != before[1][0]][:20]
    assert after != before[1]
    assert asked("--no-deltas") == before
    damaged = places(learning).deltas / version.id / "00000001" / "state.json"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    with pytest.raises(VersionError, match="damaged"):
        open_as_served(learning)


def test_histories_are_read_where_the_item_tower_has_no_ids(tmp_path: Path, happen, clicks) -> None:
    simulate_workspace(tmp_path / "world", WorldOptions(users=100, items=100, days=3, seed=2))
    kind = {"kind": "categorical"}
    document = {
        "workspace": {"path": str(tmp_path / "world")},
        "features": {"user": {"user_id": kind, "history": {"kind": "sequence"}}, "item": {"category": kind}},
        "models": {"dimension": 8, "channels": ["two_tower", "item_cf", "popular"]},
        "train": {"epochs": 1, "batch_size": 64},
    }
    settings = parse(document)
    run_line(settings, promoted=True)
    version = open_served(settings)
    happen(settings, clicks(settings, 40))
    chain = open_chain(settings, version.path, None)
    plan = chain.plan()
    assert plan is not None
    [(name, (first, end))] = [(name, ends) for name, ends in plan.shards.items()][:1]
    encoded = chain.state.encode(read_rows(places(settings).shards, int(name), first, end - first))
    clicked_before = version.queries_of(encoded.user_ids).clicks
    expected = latest(clicked_before, version.two_tower.item_tokens, version.features.history.last)
    assert expected.rows.any()
    assert encoded.user["history"].rows.tolist() == expected.rows.tolist()
    assert chain.make(plan).refused == []


def test_numbers_for_popularity_stay_as_they_are_and_a_new_item_has_the_least(tmp_path: Path, happen, clicks) -> None:
    simulate_workspace(tmp_path / "world", WorldOptions(users=100, items=100, days=3, seed=2))
    kind = {"kind": "categorical"}
    document = {
        "workspace": {"path": str(tmp_path / "world")},
        "features": {
            "user": {"user_id": kind, "history": {"kind": "sequence"}},
            "item": {"item_id": kind, "category": kind},
        },
        "models": {"dimension": 8, "channels": ["two_tower", "item_cf", "popular"]},
        "train": {"epochs": 1, "batch_size": 64, "logit_adjustment": 0.4},
        "samples": {"vocabulary_room": 1},
    }
    settings = parse(document)
    run_line(settings, promoted=True)
    version = open_served(settings)
    files = folder_listing(version.path)
    assert version.item_vectors.shape[1] == 10
    new, user, begin = "zz new", version.users.ids[0].as_py(), version.watermark_ms + 1
    put = item_event("i", begin, new, {"category": version.catalogue.column("category")[0].as_py()}, None)
    of_new = [Event(f"e{n}", "click", user, begin + n, body={"item_id": new}) for n in range(20)]
    happen(settings, [put, *of_new, *clicks(settings, 30, seed=1)])
    run(settings)
    laid = snapshots(settings).version
    assert laid.delta_seq >= 1
    assert folder_listing(version.path) == files
    vectors = np.asarray(laid.item_vectors[np.arange(len(laid.item_ids))])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    before = np.asarray(version.item_vectors)
    moved = np.abs(vectors[: len(before), :-2] - before[:, :-2]).max(axis=1) > 1e-4
    assert moved.any()
    np.testing.assert_allclose(vectors[: len(before), -2:], before[:, -2:], atol=1e-6)
    of_delta = next(delta for delta in reversed(deltas(settings)) if new in delta.item_ids.to_pylist())
    learned = of_delta.item_vectors[of_delta.item_ids.to_pylist().index(new)]
    np.testing.assert_allclose(learned[-2], before[:, -2].min(), atol=1e-6)


def lists_of(version, row: int) -> int:
    return int(lists_with(version, version.item_vectors[np.arange(len(version.item_ids))], np.array([row]))[0])


def test_an_item_that_is_pushed_is_held_back_and_rises_no_further_than_others(learning, happen) -> None:
    """Ten clicks each of all known users on one item that hardly anybody saw."""
    version = open_served(learning)
    rows = np.argsort(np.bincount(version.clicks.item_row, minlength=version.items.base), kind="stable")
    pushed, begin = version.item_ids[int(rows[0])].as_py(), (version.watermark_ms // 3_600_000 + 1) * 3_600_000
    events = [
        Event(f"e{n}-{user}", "click", user, begin + n, body={"item_id": pushed})
        for n in range(10)
        for user in version.users.ids.to_pylist()
    ]
    happen(learning, events)
    report = run(learning)
    assert sum(report.held_back.values()) > 0.98 * len(events)
    assert set(report.held_back) == {"pair", "item"}
    assert sum(delta.report["positives"] for delta in deltas(learning)) <= learning.update.bounds.item
    assert deltas(learning)[0].report["held_back"]["item"] > 0
    assert monitors(snapshots(learning), begin).held_back == deltas(learning)[-1].report["held_back"]
    listed = lists_of(snapshots(learning).version, rows[0])
    assert listed < SAMPLED_USERS / 2


def test_an_item_that_rises_further_than_its_users_explain_is_left_out_of_its_delta(learning, happen, clicks) -> None:
    bounds = replace(learning.update.bounds, pair=1000, user=1000, item=1000)
    gate = replace(learning.update.gate, max_rise=0.1)
    loose = replace(learning, update=replace(learning.update, bounds=bounds, gate=gate, rows_per_delta=2000))
    version = open_served(loose)
    rows = np.argsort(np.bincount(version.clicks.item_row, minlength=version.items.base), kind="stable")
    pushed, begin = version.item_ids[int(rows[0])].as_py(), (version.watermark_ms // 3_600_000 + 1) * 3_600_000
    users = version.users.ids.to_pylist()
    pushes = [Event(f"e{n}", "click", users[n % len(users)], begin + n, body={"item_id": pushed}) for n in range(900)]
    happen(loose, pushes)
    without = replace(loose, update=replace(loose.update, gate=replace(loose.update.gate, max_rise=1000.0)))
    shutil.copytree(loose.workspace.path, Path(loose.workspace.path).with_name("without"))
    place = str(Path(loose.workspace.path).with_name("without"))
    without = replace(without, workspace=replace(without.workspace, path=place))
    assert run(without).held_back == {}
    assert lists_of(snapshots(without).version, rows[0]) > 0.1 * SAMPLED_USERS
    report = run(loose)
    [delta] = deltas(loose)
    assert (report.refused, report.held_back) == ([], {"risen": delta.report["held_back"]["risen"]})
    assert delta.report["risen"] == [pushed]
    assert delta.report["positives"] == 0
    assert lists_of(snapshots(loose).version, rows[0]) <= 0.1 * SAMPLED_USERS


def alike_items(version, count: int) -> list[Event]:
    attributes = {
        name: value
        for name, value in version.catalogue.slice(0, 1).to_pylist()[0].items()
        if name not in (c.ITEM_ID, c.AVAILABLE)
    }
    return [item_event(f"i{n}", 1_700_000_000_000, f"alike {n:05d}", attributes, None) for n in range(count)]


def test_alike_items_that_are_put_are_no_collapse_of_what_was_learned(learning, happen, clicks) -> None:
    gate = replace(learning.update.gate, max_mean_cosine_rise=0.02)
    learning = replace(learning, update=replace(learning.update, gate=gate))
    happen(learning, [*alike_items(open_served(learning), 800), *clicks(learning, 40)])
    report = run(learning)
    assert (report.refused, report.set_aside) == ([], [])
    assert deltas(learning)[0].report["positives"] > 0
    chain = open_chain(learning, open_served(learning).path, None)
    base = np.asarray(chain.version.item_vectors)
    rise = mean_cosine(chain.state.learner.vectors) - mean_cosine(base)
    assert rise > learning.update.gate.max_mean_cosine_rise


def test_a_refused_delta_is_followed_by_the_next_one_though_the_gate_would_refuse_it_empty(
    learning, happen, clicks, monkeypatch
) -> None:
    happen(learning, [*alike_items(open_served(learning), 3), *clicks(learning, 40)])
    with monkeypatch.context() as patched:
        patched.setattr(learning_module, "check_served", lambda *_: ["golden queries: another answer"])
        report = run(learning)
    assert (report.seq, report.refused, report.reasons) == (1, [1], ["golden queries: another answer"])
    happen(learning, clicks(learning, 40, seed=1))
    assert run(learning).refused == []
    one, two = deltas(learning)
    assert (one.tables, one.report["refused"]) == ({}, ["golden queries: another answer"])
    assert len(one.state["entities"]) == 3
    assert two.report["positives"] > 0


def test_a_vector_database_that_is_away_refuses_no_delta(learning, happen, clicks, monkeypatch) -> None:
    """A run that follows waits for it; another one ends, and the next one makes the same delta."""

    def away(*_: Any) -> list[str]:
        raise UnavailableError("PostgreSQL at somewhere: connection refused")

    happen(learning, clicks(learning, 40))
    check = learning_module.check_served
    monkeypatch.setattr(learning_module, "check_served", away)
    with pytest.raises(UnavailableError):
        run(learning)
    assert deltas(learning) == []
    monkeypatch.setattr(incremental, "AWAY_S", 0.0)
    answers = iter([away, away, check])

    def check_in_turn(*given: Any) -> list[str]:
        return next(answers)(*given)

    monkeypatch.setattr(learning_module, "check_served", check_in_turn)
    where, slept = places(learning), list[float]()
    report = incremental.update_incremental(
        where.versions,
        where.deltas,
        lambda path: open_chain(learning, path, None),
        follow_s=0.5,
        stopped=lambda: 0.5 in slept,
        sleep=slept.append,
    )
    assert (report.rows, report.seq, report.refused) == (40, 1, [])
    assert slept == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("error", [ValueError("strange rows"), RuntimeError("index out of range"), AssertionError()])
def test_an_error_while_a_delta_is_learned_refuses_it_and_the_chain_goes_on(
    learning, happen, clicks, monkeypatch, error
) -> None:
    def fails(*_):
        raise error

    happen(learning, clicks(learning, 40))
    with monkeypatch.context() as patched:
        patched.setattr(Learner, "step", fails)
        report = run(learning)
    assert report.refused == [1]
    assert report.reasons == [f"it cannot be learned: {error!r}"]
    assert (places(learning).deltas / report.version / "quarantine" / "00000001.parquet").exists()
    happen(learning, clicks(learning, 40, seed=1))
    assert run(learning).refused == []


def test_an_item_that_cannot_be_taken_in_is_set_aside_alone(learning, happen, clicks, monkeypatch) -> None:
    put = alike_items(open_served(learning), 3)
    real = overlay_module.item_columns

    def fails(base, item_id, *rest):
        if item_id == "alike 00001":
            raise ValueError("it cannot be encoded")
        return real(base, item_id, *rest)

    monkeypatch.setattr(overlay_module, "item_columns", fails)
    happen(learning, [*put, *clicks(learning, 40)])
    report = run(learning)
    assert (report.refused, report.set_aside) == ([], ["item 'alike 00001': ValueError('it cannot be encoded')"])
    [delta] = deltas(learning)
    assert delta.report["set_aside"] == report.set_aside
    happen(learning, clicks(learning, 40, seed=1))
    report = run(learning)
    assert (report.refused, report.rows) == ([], 40)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "gone", "manifest"])
def test_a_damaged_shard_is_set_aside_and_the_others_are_learned(learning, happen, clicks, damage) -> None:
    for seed in range(3):
        happen(learning, clicks(learning, 20, seed=seed))
    [partition] = [path for path in places(learning).shards.iterdir() if any(path.glob("*.tfrecord"))][:1]
    damaged = sorted(path for path in partition.glob("*.positives.tfrecord") if path.stat().st_size)[0]
    content = damaged.read_bytes()
    manifest = damaged.with_name(f"{damaged.name.split('.')[0]}.json")
    lost = json.loads(manifest.read_text())["rows"]
    if damage == "manifest":
        manifest.write_text("{")
        read_manifest.cache_clear()  # as in a new process
    elif damage == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes({"cut": content[:-5], "noise": content[:-40] + bytes(40), "empty": b""}[damage])
    report = run(learning)
    assert (report.rows, report.refused, len(report.set_aside)) == (60 - lost, [], 1)
    assert deltas(learning)[0].report["set_aside"] == report.set_aside
    assert run(learning).rows == 0
    if damage != "manifest":  # the joiner cannot go on without that
        happen(learning, clicks(learning, 20, seed=3))
        assert run(learning).rows == 20


def test_rows_of_another_shape_and_wild_weights_are_left_out_and_counted(learning, happen, clicks, monkeypatch) -> None:
    happen(learning, clicks(learning, 40))
    real = module.read_positives

    def strange(*where):
        parts = real(*where)
        changed = []
        for table in parts.tables:
            weights = pa.array([1e29, np.nan, -1.0, np.inf, None][:5] + [1.0] * table.num_rows, pa.float32())
            at = table.schema.get_field_index(c.WEIGHT)
            changed.append(table.set_column(at, c.WEIGHT, weights[: table.num_rows]))
        others = [
            parts.tables[0].drop_columns([c.REQUEST_TS_MS]),
            parts.tables[0].set_column(2, c.ITEM_ID, pa.array([1] * parts.tables[0].num_rows)),
            pa.table({c.OUTCOME: ["clicked"]}),
        ]
        return replace(parts, tables=[*changed, *(others if where[1] == 0 or changed else [])])

    monkeypatch.setattr(module, "read_positives", strange)
    report = run(learning)
    assert report.refused == []
    [delta] = deltas(learning)
    counted = delta.report
    assert counted["unusable"] > 0
    assert len(report.set_aside) >= 3
    assert all("cannot be encoded" in said for said in report.set_aside)
    assert all(np.isfinite(values).all() for name, values in delta.optimizer.items() if name.endswith("accumulator"))


def test_an_accumulator_without_bounds_is_refused_and_one_in_a_chain_is_repaired(learning, happen, clicks) -> None:
    assert check_accumulators("t", np.array([1e7], np.float32), 1.0) == [
        "t: an accumulator is 1e+07, the version's largest is 1"
    ]
    happen(learning, clicks(learning, 40))
    run(learning)
    [folder] = (places(learning).deltas / open_served(learning).id).glob("0*1")
    tensors = load_file(folder / "optimizer.safetensors")
    name = next(one for one in tensors if one.endswith("accumulator"))
    tensors[name][0] = np.inf
    save_file(tensors, folder / "optimizer.safetensors")
    manifest = {key: value for key, value in read_json(folder / "manifest.json").items() if key != "digest"}
    manifest["files"] = folder_listing(folder)
    write_json(folder / "manifest.json", {**manifest, "digest": digest(manifest)})
    chain = open_chain(learning, open_served(learning).path, None)
    assert chain.state.repaired == 1
    assert all(np.isfinite(table.accumulator).all() for table in chain.state.learner.model.tables.values())


def test_an_item_that_the_version_was_trained_on_keeps_its_row_though_it_was_put_again_before(learning, happen, clicks):
    version = open_served(learning)
    row = int(np.argmax(np.bincount(version.clicks.item_row)))
    item, before = version.item_ids[row].as_py(), version.watermark_ms - 1000
    again = [item_deleted("d", before, item), item_event("p", before + 1, item, {"category": "astronomy"}, None)]
    happen(learning, [*again, *clicks(learning, 40)])
    report = run(learning)
    assert (report.refused, report.set_aside) == ([], [])
    [delta] = deltas(learning)
    assert item not in {one for ids in delta.new_ids.values() for one in ids.column("id").to_pylist()}
    chain = open_chain(learning, version.path, None)
    assert chain.state.learner.item_tokens[row] == version.features.vocabularies[c.ITEM_ID].rows(version.item_ids)[row]
    assert chain.state.learner.clicks[row] > 0


def test_a_damaged_delta_is_told_by_verify_and_the_chain_without_it_is_learned_anew(learning, happen, clicks) -> None:
    where, version = places(learning), open_served(learning)
    happen(learning, clicks(learning, 40))
    assert run(learning).seq == 1
    assert verify_chain(where.deltas, version.path) == []
    state = delta_folder(where.deltas, version.id, 1) / "state.json"
    state.write_bytes(state.read_bytes()[:-5])
    [problem] = verify_chain(where.deltas, version.path)
    assert "is damaged: state.json" in problem
    assert f"remove {chain_folder(where.deltas, version.id)}" in problem
    with pytest.raises(VersionError, match="Restore it from a copy"):
        run(learning)
    shutil.rmtree(chain_folder(where.deltas, version.id))
    assert (run(learning).rows, verify_chain(where.deltas, version.path)) == (40, [])


def test_a_shard_without_clicks_is_no_problem_while_a_user_is_deleted(learning, happen, clicks) -> None:
    version = open_served(learning)
    user, at = version.users.ids[0].as_py(), version.watermark_ms
    shown = {"items": [version.item_ids[0].as_py()], "outcomes": ["impressed"]}
    happen(learning, [user_deleted("d", at + 1, user), Event("q", "request", 1001, at + 2, "r", shown)])
    report = run(learning)
    assert (report.refused, report.set_aside) == ([], [])


def test_a_click_before_the_deletion_of_an_item_is_not_learned_by_the_one_that_has_its_id_now(learning, happen) -> None:
    version = open_served(learning)
    row = int(np.argmax(np.bincount(version.clicks.item_row)))
    item, begin = version.item_ids[row].as_py(), version.watermark_ms + 1
    users = version.users.ids.to_pylist()
    attributes = {
        name: value
        for name, value in version.catalogue.slice(row, 1).to_pylist()[0].items()
        if name not in (c.ITEM_ID, c.AVAILABLE)
    }
    happen(
        learning,
        [
            *(Event(f"a{n}", "click", users[n], begin + n, body={"item_id": item}) for n in range(10)),
            item_deleted("d", begin + 100, item),
            item_event("p", begin + 101, item, attributes, None),
            *(Event(f"b{n}", "click", users[n], begin + 200 + n, body={"item_id": item}) for n in range(4)),
        ],
    )
    run(learning)
    first = deltas(learning)[0]
    assert (first.report["before_deletion"], first.report["positives"]) == (10, 4)
    assert set(first.state["recent"]) == {item}
    chain = open_chain(learning, version.path, None)
    assert chain.state.learner.clicks[row] == 0
    old = int(version.features.vocabularies[c.ITEM_ID].rows(version.item_ids)[row])
    assert int(chain.state.learner.item_tokens[row]) not in (old, UNKNOWN)
    assert snapshots(learning).version.two_tower.item_tokens[row] == chain.state.learner.item_tokens[row]
    # what is said of it later frees its embedding no second time
    happen(learning, [item_event("q", begin + 900, item, attributes, None)])
    run(learning)
    assert deltas(learning)[-1].tables == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"seq": 1, "shards": {"0": [0, 1000000000000]}, "events": {}}'])
def test_a_plan_that_cannot_be_is_made_again(learning, happen, clicks, content: str) -> None:
    happen(learning, clicks(learning, 30))
    path = places(learning).deltas / open_served(learning).id / "next.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert run(learning).rows == 30
