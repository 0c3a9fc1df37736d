import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from twotower.cli import updating
from twotower.cli.line import open_served, places, run_line
from twotower.cli.main import app
from twotower.cli.updating import learn, open_as_served, open_chain
from twotower.config import Settings, parse
from twotower.datasets.simulate import simulate_workspace
from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_untrained
from twotower.features.columns import take
from twotower.features.feature_set import encode_table
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs import Event
from twotower.logs.entities import item_deleted, item_event, user_deleted
from twotower.models.channel import latest
from twotower.publish.delta import Delta, base_digest, last_seq, read_delta
from twotower.publish.onnx import OnnxTower
from twotower.publish.tables import LaidRows, map_tables
from twotower.publish.version import open_version
from twotower.schema import columns as c
from twotower.schema.errors import VersionError
from twotower.schema.files import folder_listing, read_json
from twotower.serve.request import Asked, retrieve
from twotower.serve.snapshots import Snapshots
from twotower.serve.users import Recent
from twotower.stream.shards import read_rows
from twotower.update import chain as module
from twotower.update.incremental import _only_updater
from twotower.update.learner import Touched


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
        one.item_id for one in retrieve(version, Asked(300, "none", user, channels=["two_tower"]), Recent(), 0, 0).items
    ]
    far = ranked[len(ranked) // 2]
    begin = version.watermark_ms + 1  # over ten hours: of one hour only a few would be trained
    happen(learning, [Event(f"e{n}", "click", user, begin + 180_000 * n, body={"item_id": far}) for n in range(200)])
    run(learning)
    laid = snapshots(learning).version
    after = [
        one.item_id for one in retrieve(laid, Asked(300, "none", user, channels=["two_tower"]), Recent(), 0, 0).items
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


@pytest.mark.parametrize("before", ["write_json", "read_parts", "write_delta", "delta"])
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


def test_users_whom_nothing_is_trained_on_are_witnesses(learning, happen, clicks) -> None:
    version = open_served(learning)
    settings = replace(learning, samples=replace(learning.samples, untrained_users=0.5))
    out = is_untrained(version.users.ids, 0.5)
    happen(settings, clicks(settings, 90))
    run(settings)
    [delta] = deltas(settings)
    assert delta.report["untrained"] + delta.report["positives"] == 90
    moved = set(delta.tables[c.USER_ID].rows.tolist())
    tokens = version.features.vocabularies[c.USER_ID].rows(version.users.ids)
    assert not moved & set(tokens[out].tolist()) - {UNKNOWN}
    assert len(delta.state["window"]) == delta.report["untrained"] > 20


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


def test_a_loss_of_recall_on_the_untrained_users_is_a_problem_beyond_the_margin(learning) -> None:
    where = places(learning)
    chain = open_chain(learning, open_served(learning).path, None)
    width = chain.version.item_vectors.shape[1]
    nothing = pa.array([], chain.version.item_ids.type)
    delta = Delta(chain.version.id, 1, None, {}, {}, nothing, np.zeros((0, width), np.float32), {})
    assert chain._problems(delta, Touched(), 0.30, 0.29) == []
    assert chain._problems(delta, Touched(), None, None) == []
    [problem] = chain._problems(delta, Touched(), 0.30, 0.27)
    assert problem == "recall@50 of the untrained users falls from 0.3000 to 0.2700"
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
        arguments = ["retrieve", "--set", place, "--users", users, "--k", 20, "--out", out, *options]
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
        snapshots(learning).version, Asked(21, "none", stranger, channels=["two_tower"]), Recent(), 0, 0
    )
    assert after == [one.item_id for one in expected.items if one.item_id != before[1][0]][:20]
    assert after != before[1]
    assert asked("--no-deltas") == before
    damaged = places(learning).deltas / version.id / "00000001" / "state.json"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    with pytest.raises(VersionError, match="damaged"):
        open_as_served(learning)


def test_histories_are_read_where_the_item_tower_has_no_ids(tmp_path: Path, happen, clicks) -> None:
    simulate_workspace(tmp_path / "world", users=100, items=100, days=3, seed=2)
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
    encoded = chain._encoded(read_rows(places(settings).shards, int(name), first, end - first))
    clicked_before = version.queries_of(encoded.user_ids).clicks
    expected = latest(clicked_before, version.two_tower.item_tokens, version.features.history.last)
    assert expected.rows.any()
    assert encoded.user["history"].rows.tolist() == expected.rows.tolist()
    assert chain.make(plan).refused == []


def test_numbers_for_popularity_stay_as_they_are_and_a_new_item_has_the_least(tmp_path: Path, happen, clicks) -> None:
    simulate_workspace(tmp_path / "world", users=100, items=100, days=3, seed=2)
    kind = {"kind": "categorical"}
    document = {
        "workspace": {"path": str(tmp_path / "world")},
        "features": {
            "user": {"user_id": kind, "history": {"kind": "sequence"}},
            "item": {"item_id": kind, "category": kind},
        },
        "models": {"dimension": 8, "channels": ["two_tower", "item_cf", "popular"]},
        "train": {"epochs": 1, "batch_size": 64, "popularity": 0.4},
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
