import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings, load
from twotower.datasets.tables import end_of_day
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.index.build import connect
from twotower.index.options import IndexOptions
from twotower.logs.events import item_deleted, item_event, user_deleted, user_event
from twotower.pipeline import full as module
from twotower.pipeline.full import Reached, update_full
from twotower.pipeline.line import LATEST, open_served, run_line
from twotower.pipeline.places import places
from twotower.pipeline.updating import learn
from twotower.publish.prune import prune
from twotower.publish.publish import Listed, list_versions, roll_back, verify
from twotower.publish.version import read_manifest
from twotower.samples.read import open_samples
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError
from twotower.schema.files import read_json
from twotower.serve.snapshots import Snapshots
from twotower.train.checkpoint import load_model, open_checkpoint
from twotower.update.full import due_days, rows_of_day
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def three_days(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Settings:
    """A world of four days, trained on the first two; the others come later."""

    def configured(path: Path) -> Settings:
        overrides = [
            f"workspace.path={path}", "train.epochs=2", "train.batch_size=256", "models.dimension=16",
            'models.channels=["two_tower", "popular"]', "models.rankers=[]", "samples.vocabulary_room=0.5",
        ]  # fmt: skip
        return load(ROOT / "examples" / "demo.toml", overrides)

    def make(path: Path) -> None:
        simulate_workspace(path, WorldOptions(users=200, items=150, days=4, seed=2))
        late = sorted((path / "events").iterdir())[2:]
        for day in late:
            shutil.move(day, path / day.name)
        run_line(configured(path), promoted=True)
        for day in late:
            shutil.move(path / day.name, day)

    return configured(made_once("days", make))


@pytest.fixture
def days(three_days: Settings, tmp_path: Path) -> Settings:
    copied = shutil.copytree(three_days.workspace.path, tmp_path / "own")
    return replace(three_days, workspace=replace(three_days.workspace, path=str(copied)))


def names(settings: Settings) -> list[str]:
    return sorted(path.name.removeprefix("date=") for path in places(settings).events.iterdir())


def test_missed_days_are_learned_in_order_once_each(days) -> None:
    where, first = places(days), open_served(days).id
    due = names(days)[2:]
    assert update_full(days, dry_run=True).plan == {"days": due}
    assert [version.id for version in list_versions(where.versions)] == [first]
    report = update_full(days, dry_run=False)
    versions = list_versions(where.versions)
    assert [version.parent for version in versions] == [None, *[version.id for version in versions[:-1]]]
    assert len(versions) == 1 + len(due)
    assert report.version == open_served(days).id == versions[-1].id
    full = read_json(where.checkpoints / LATEST)["full"]
    assert [day["day"] for day in full] == due
    assert update_full(days, dry_run=False).rows == 0
    assert len(list_versions(where.versions)) == len(versions)


def test_a_full_update_publishes_into_a_database_and_can_be_rolled_back(days, pgvector_url: str) -> None:
    days = replace(days, index=IndexOptions("pgvector", url=pgvector_url))
    where = places(days)
    update_full(days, dry_run=False)
    served = open_served(days)
    assert served.manifest["collections"]["two_tower"]["count"] == len(served.items)
    assert verify(served.path) == []
    followed = Snapshots(where.versions)
    parent = roll_back(where.versions)
    assert followed.reload() == parent
    collections = [name for one in list_versions(where.versions) for name in collections_of(where.versions / one.id)]
    assert len(collections) == len(list_versions(where.versions)) - 1  # the first is embedded
    assert prune(where.versions, where.deltas, days.index).collections == []
    for name in collections:
        connect("pgvector", pgvector_url).drop(name)


def collections_of(path: Path) -> list[str]:
    return [said["name"] for said in read_manifest(path)["collections"].values()]


def test_a_day_begins_with_the_full_parameters_of_the_day_before_and_feeds_every_row_once(days) -> None:
    where, day = places(days), names(days)[2]
    before = load_model(
        open_checkpoint(where.checkpoints / read_json(where.checkpoints / LATEST)["checkpoints"]["two_tower"])
    )
    still = replace(
        days,
        train=replace(days.train, learning_rate=1e-12, table_learning_rate=1e-12, weight_decay=0.0),
        update=replace(days.update, decay=0.5, evict_after_days=None),
    )
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")
    report = update_full(still, dry_run=False)
    latest = read_json(where.checkpoints / LATEST)["checkpoints"]["two_tower"]
    after = load_model(open_checkpoint(where.checkpoints / latest))
    for name, parameter in before.state_dict().items():
        np.testing.assert_allclose(after.state_dict()[name].numpy(), parameter.numpy(), atol=1e-6)
    known = after.features.vocabularies[c.USER_ID]
    rows = before.features.vocabularies[c.USER_ID].rows(known.values)
    old, new = before.tables[c.USER_ID], after.tables[c.USER_ID]
    np.testing.assert_allclose(new.weights[FIRST : FIRST + len(rows)], old.weights[rows], atol=1e-6)
    own = rows_of_day(open_samples(where.samples), day)
    assert report.rows == len(own.positives)
    active = {int(row) for row in own.positives.user_row}
    quiet = [
        place
        for place, one in enumerate(known.values.to_pylist())
        if rows[place] != UNKNOWN and open_samples(where.samples).users.ids.to_pylist().index(one) not in active
    ]
    np.testing.assert_allclose(new.accumulator[FIRST:][quiet], 0.5 * old.accumulator[rows[quiet]], rtol=1e-6)
    clicked = pq.read_table(where.events / f"date={day}", partitioning=None)
    assert report.rows == sum(outcome == c.CLICKED for outcome in clicked.column(c.OUTCOME).to_pylist())
    assert (own.positives.copies == 1).all()


def test_what_came_after_the_day_is_replayed_before_the_switch(days, happen, clicks, monkeypatch) -> None:
    where = places(days)
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")
    end = max(
        at or 0
        for path in where.events.glob("date=*/*.parquet")
        for at in pq.read_table(path, partitioning=None).column(c.CLICK_TS_MS).to_pylist()
    )
    after = [replace(one, ts_ms=one.ts_ms + end + 2 * 86_400_000) for one in clicks(days, 60)]
    after = [replace(one, ts_ms=end + 86_400_000 + 1000 * n) for n, one in enumerate(after)]
    happen(days, after)
    old = learn(days, follow=False, dry_run=False)
    seen = []
    real = module.promote

    def promote(versions: Path, version: str) -> None:
        seen.append(Snapshots(versions, deltas=where.deltas).version.id)
        real(versions, version)

    monkeypatch.setattr(module, "promote", promote)
    report = update_full(days, dry_run=False)
    assert seen[0] == old.version
    served = Snapshots(where.versions, deltas=where.deltas)
    assert served.version.id == report.version != old.version
    assert served.version.delta_seq == report.seq >= 1
    assert served.watermark_ms == old.watermark_ms == after[-1].ts_ms
    roll_back(where.versions, None)
    happen(days, [replace(one, event_id=f"x{one.event_id}", ts_ms=one.ts_ms + 10**6) for one in after])
    resumed = learn(days, follow=False, dry_run=False)
    assert (resumed.version, resumed.seq > old.seq) == (old.version, True)


def test_a_version_that_fails_its_gate_is_not_promoted_and_the_chain_stays(days, monkeypatch) -> None:
    where, first = places(days), open_served(days).id
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")
    before = read_json(where.checkpoints / LATEST)["checkpoints"]
    wild = replace(
        days,
        train=replace(days.train, learning_rate=1.0),
        samples=replace(days.samples, held_out_users=0.5),
        update=replace(days.update, gate=replace(days.update.gate, k=10, min_positives=20, margin=0.0)),
    )
    with pytest.raises(ConfigError, match=r"held_out_users is 0\.5 .* was trained with 0\.01"):
        update_full(wild, dry_run=False)
    monkeypatch.setattr(module, "check_held_out", lambda *_: None)
    report = update_full(wild, dry_run=False)
    full = read_json(where.checkpoints / LATEST)
    assert (report.refused, open_served(days).id) == ([0], first)
    assert full["checkpoints"] == before == full["full"][0]["checkpoints"]
    assert "held-out users falls" in full["full"][0]["refused"][0]
    assert report.reasons == full["full"][0]["refused"]


def test_what_was_put_or_deleted_and_new_users_are_in_the_tables_of_the_next_version(days, happen) -> None:
    where, version = places(days), open_served(days)
    user, item = version.users.ids[0].as_py(), version.item_ids[0].as_py()
    attributes = {
        name: value
        for name, value in version.catalogue.slice(1, 1).to_pylist()[0].items()
        if name not in (c.ITEM_ID, c.AVAILABLE)
    }
    now = version.watermark_ms
    happen(
        days,
        [
            item_event("a", now, "zz new", attributes, None),
            item_deleted("b", now, item),
            user_deleted("c", now, user),
            user_event("d", now, 10**6, {"age": 33}),
        ],
    )
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")
    day = where.events / f"date={names(days)[2]}"
    [path] = day.glob("*.parquet")
    table = pq.read_table(path, partitioning=None)
    newcomers = [10**7 if at % 20 == 0 else one for at, one in enumerate(table.column(c.USER_ID).to_pylist())]
    ids = table.schema.get_field_index(c.USER_ID)
    pq.write_table(table.set_column(ids, c.USER_ID, pa.array(newcomers, table.schema.field(ids).type)), path)
    update_full(days, dry_run=False)
    made = open_served(days)
    assert made.id != version.id
    assert item not in made.item_ids.to_pylist()
    assert user not in made.users.ids.to_pylist()
    row = made.catalogue.slice(made.item_ids.to_pylist().index("zz new"), 1).to_pylist()[0]
    assert {name: row[name] for name in attributes} == attributes
    assert {10**6, 10**7} <= set(made.users.ids.to_pylist())
    assert 10**7 in made.features.vocabularies[c.USER_ID].values.to_pylist()


def killed_before(name: str, days: Settings, monkeypatch: pytest.MonkeyPatch) -> Listed:
    """The version that a run over one day published before it was killed there."""
    where = places(days)
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            update_full(days, dry_run=False)
    return list_versions(where.versions)[-1]


def test_a_run_that_was_killed_does_a_day_once(days, monkeypatch) -> None:
    where, first = places(days), open_served(days).id
    published = killed_before("promote", days, monkeypatch)
    report = update_full(days, dry_run=False)
    assert open_served(days).id == report.version == published.id
    assert len(read_json(where.checkpoints / LATEST)["full"]) == 1
    assert [version.id for version in list_versions(where.versions)] == [first, published.id]


def test_a_version_of_a_killed_run_that_was_damaged_since_is_made_again(days, monkeypatch) -> None:
    where, first = places(days), open_served(days).id
    published = killed_before("catch_up", days, monkeypatch)
    (where.versions / published.id / "users.arrow").unlink()
    report = update_full(days, dry_run=False)
    assert open_served(days).id == report.version
    assert [version.parent for version in list_versions(where.versions)] == [None, first, first]


def test_a_run_that_was_killed_behind_the_promotion_has_made_the_version_of_the_day(days, monkeypatch) -> None:
    where, first = places(days), open_served(days).id
    for late in names(days)[3:]:
        shutil.rmtree(where.events / f"date={late}")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._FullChain, "note", killed)
        with pytest.raises(KeyboardInterrupt):
            update_full(days, dry_run=False)
    promoted = open_served(days).id
    report = update_full(days, dry_run=False)
    assert report.version == open_served(days).id == promoted
    assert [version.id for version in list_versions(where.versions)] == [first, promoted]
    latest = read_json(where.checkpoints / LATEST)
    assert [(day["day"], day["version"]) for day in latest["full"]] == [(names(days)[2], promoted)]
    towers = open_checkpoint(where.checkpoints / latest["checkpoints"]["two_tower"])
    assert towers.tensors_sha256 == read_manifest(where.versions / promoted)["checkpoint_sha256"]
    assert update_full(days, dry_run=False).rows == 0


def test_the_rest_of_the_day_in_which_the_chain_began_is_due(tmp_path: Path, days) -> None:
    midnight = end_of_day("2026-01-01") + 1
    noon = midnight - DAY_MS // 2
    for day, last in (("2026-01-01", midnight - 1), ("2026-01-02", midnight + 1)):
        (tmp_path / f"date={day}").mkdir()
        pq.write_table(pa.table({c.REQUEST_TS_MS: [noon, last]}), tmp_path / f"date={day}" / "part-0.parquet")
    assert due_days(tmp_path, tmp_path / "none", "2026-01-01", noon) == ["2026-01-01", "2026-01-02"]
    # the latest click on a request of that day came after midnight: the next day is due all the same
    assert due_days(tmp_path, tmp_path / "none", "2026-01-01", midnight + 60_000) == ["2026-01-02"]
    reached = Reached("2026-01-01", midnight + 60_000)
    assert [reached.learned_ms(day) for day in ("2026-01-01", "2026-01-02")] == [midnight + 60_000, 0]
    samples = open_samples(places(days).samples)
    day, times = names(days)[0], samples.positives.ts_ms
    rest = rows_of_day(samples, day, end_of_day(day) - DAY_MS // 2).positives.ts_ms
    np.testing.assert_array_equal(rest, times[(times > end_of_day(day) - DAY_MS // 2) & (times <= end_of_day(day))])


def test_a_day_is_due_when_it_is_whole(tmp_path: Path) -> None:
    for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
        (tmp_path / f"date={day}").mkdir()
    assert due_days(tmp_path, tmp_path / "none", "2026-01-01") == ["2026-01-02", "2026-01-03"]
    assert due_days(tmp_path, tmp_path / "none", "2026-01-02") == ["2026-01-03"]
