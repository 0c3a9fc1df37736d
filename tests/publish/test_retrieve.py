from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.features.vocabulary import UNKNOWN
from twotower.logs.entities import Entity
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.publish.delta import Delta, Rows
from twotower.publish.overlay import EntityChanges, Overlay
from twotower.publish.retrieve import RetrieveReport, retrieve_file, shown_items
from twotower.publish.tables import map_tables
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.formats import read_rows, write_rows
from twotower.serve.request import Request, retrieve
from twotower.serve.users import Recent


@pytest.fixture(scope="module")
def version(world: Settings) -> Version:
    return open_served(world)


@pytest.fixture
def ask(version: Version, world: Settings, tmp_path: Path):
    def asked(users: str = "all", k: int = 5, channel: str = "two_tower", exclude: str = "clicked") -> pa.Table:
        out = tmp_path / "out.parquet"
        count = retrieve_file(version, places(world).workspace, users, out, k=k, channel=channel, exclude=exclude).users
        table = pq.read_table(out)
        assert pq.read_schema(out).names == ["user_id", "item_id", "rank", "score", "channel"]
        assert len(set(table["user_id"].to_pylist())) <= count
        return table

    return asked


def users_file(tmp_path: Path, **columns: object) -> str:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def clicked(version: Version) -> set[tuple[int, str]]:
    owner = np.repeat(np.arange(len(version.users)), np.diff(version.clicks.indptr))
    users, items = version.users.ids.take(pa.array(owner)), version.item_ids.take(pa.array(version.clicks.item_row))
    return set(zip(users.to_pylist(), items.to_pylist(), strict=True))


def pairs(table: pa.Table) -> set[tuple[int, str]]:
    return set(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))


@pytest.mark.parametrize("channel", ["two_tower", "item_cf", "popular", "fused"])
def test_every_user_gets_distinct_items_by_rank_and_falling_score(ask, version: Version, channel: str) -> None:
    table = ask(channel=channel).to_pandas()
    assert set(table["channel"]) == {channel}
    assert not table.duplicated(["user_id", "item_id"]).any()
    for _, one in table.groupby("user_id"):
        assert one["rank"].tolist() == list(range(1, len(one) + 1))
        assert one["score"].is_monotonic_decreasing
    if channel != "item_cf":  # which knows no one without clicks
        assert table.groupby("user_id").size().eq(5).all()
        assert table["user_id"].nunique() == len(version.users)


def test_clicked_items_are_left_out_unless_they_are_asked_for(ask, version: Version) -> None:
    assert not pairs(ask(k=100)) & clicked(version)
    assert clicked(version) <= pairs(ask(k=1000, exclude="none"))


def test_impressed_leaves_out_what_the_events_say_was_shown(ask, version: Version, world: Settings) -> None:
    events = pq.read_table(places(world).workspace / "events", partitioning=None).to_pandas()
    shown = events[events["outcome"].isin(["impressed", "clicked"])]
    seen = set(zip(shown["user_id"], shown["item_id"], strict=True))
    answered = pairs(ask(k=1000, exclude="impressed"))
    everything = {(user, item) for user in version.users.ids.to_pylist() for item in version.item_ids.to_pylist()}
    assert answered == everything - seen


def test_without_events_impressed_is_refused(version: Version, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--exclude impressed needs the events"):
        shown_items(version, tmp_path)


def test_unknown_and_repeated_users_are_answered_once_each_in_their_order(
    ask, version: Version, tmp_path: Path
) -> None:
    known = version.users.ids[3].as_py()
    table = ask(users_file(tmp_path, user_id=[-5, known, -5, known]), k=3)
    assert table["user_id"].to_pylist() == [-5] * 3 + [known] * 3
    alone = ask(users_file(tmp_path, user_id=[known]), k=3)
    assert table.slice(3)["item_id"].equals(alone["item_id"])


def test_context_columns_of_the_users_file_change_the_answer(ask, version: Version, tmp_path: Path) -> None:
    known = version.users.ids.to_pylist()[:20]
    silent = ask(users_file(tmp_path, user_id=known), k=20)
    hours = [ask(users_file(tmp_path, user_id=known, hour=[hour] * 20), k=20) for hour in (3, 20)]
    assert not hours[0].equals(hours[1])
    assert not hours[0].equals(silent)
    file = users_file(tmp_path, user_id=[known[0], known[1], known[0]], hour=[3, 3, 20])
    assert ask(file, k=20).equals(ask(users_file(tmp_path, user_id=known[:2], hour=[3, 3]), k=20))  # the first row


def test_the_context_that_requests_carry_or_lack_is_told(
    version: Version, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = users_file(tmp_path, user_id=[1, 2], hour=[3, 4])
    report = retrieve_file(
        version, tmp_path, file, tmp_path / "out.parquet", k=5, channel="two_tower", exclude="clicked"
    )
    assert report == RetrieveReport(2, ["hour"])
    assert f"--users {file} has no scene: requests carry none" in caplog.text


@pytest.mark.parametrize("end", [".parquet", ".csv", ".jsonl"])
def test_files_of_all_formats_give_and_get_the_same(end: str, ask, version: Version, tmp_path: Path) -> None:
    known, schema = version.users.ids.to_pylist()[:3], pa.schema([("user_id", pa.int64()), ("hour", pa.int64())])
    asked = pa.table({"user_id": [*known, -5], "hour": [3, None, 20, 3]}, schema)
    with write_rows(tmp_path / f"who{end}", schema) as write:
        write(asked)
    out = tmp_path / f"lists{end}"
    report = retrieve_file(
        version, tmp_path, str(tmp_path / f"who{end}"), out, k=5, channel="two_tower", exclude="clicked"
    )
    assert report == RetrieveReport(4, ["hour"])
    expected = ask(users_file(tmp_path, user_id=asked["user_id"], hour=asked["hour"]))
    types = dict(zip(expected.schema.names, expected.schema.types, strict=True))
    found = read_rows(out, types, "--users").cast(expected.schema)
    assert found.equals(expected)


def test_what_was_shown_later_than_now_is_not_left_out(version: Version, world: Settings) -> None:
    events = places(world).workspace / "events"
    assert len(shown_items(version, events).rows) > 0
    assert len(shown_items(version, events, clock_ms=lambda: 0).rows) == 0


def test_no_users_give_an_empty_file(ask, tmp_path: Path) -> None:
    assert ask(users_file(tmp_path, user_id=pa.array([], pa.int64()))).num_rows == 0


def test_more_than_the_catalogue_gives_all_that_there_is(ask, version: Version) -> None:
    table = ask(k=10_000, exclude="none")
    assert table.num_rows == len(version.users) * len(version.item_ids)
    assert np.isfinite(table["score"].to_numpy()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "--k 0: at least one item"),
        ({"exclude": "seen"}, "--exclude seen: it is one of clicked, impressed, none"),
        ({"channel": "mind"}, "--channel mind: version .* has two_tower, item_cf, popular and fused"),
    ],
)
def test_wrong_options_are_refused(ask, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(**arguments)


def test_a_users_file_that_is_none_is_refused(ask, tmp_path: Path) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    with pytest.raises(ConfigError, match=r"ends in .parquet or .csv or .jsonl"):
        ask(str(tmp_path / "text"))
    cases = [
        (str(tmp_path / "absent.csv"), "cannot be read: No such file"),
        (str(text), "cannot be read: "),
        (users_file(tmp_path, user=[1]), "has no column user_id"),
    ]
    for users, message in cases:
        with pytest.raises(DataError, match=message):
            ask(users)
    for ids, message in [(["a"], "is of type string"), ([None, 1], "null ids"), ([1.5], "is of type double")]:
        with pytest.raises(DataError, match=message):
            ask(users_file(tmp_path, user_id=ids))


def test_a_refused_request_leaves_the_old_file(ask, tmp_path: Path) -> None:
    before = ask()
    with pytest.raises(DataError):
        ask(users_file(tmp_path, user_id=["a"]))
    assert pq.read_table(tmp_path / "out.parquet").equals(before)


def test_what_was_learned_and_put_since_is_answered_like_a_server_answers(version: Version, tmp_path: Path) -> None:
    tokens = version.users.features[c.USER_ID]
    moved, put, deleted, plain = version.users.ids.take(pa.array(np.flatnonzero(tokens > UNKNOWN)[:4])).to_pylist()
    learned, stranger, new_item = 10**6, 10**6 + 1, "zz new"
    row = int(tokens[version.users.positions.find(pa.array([moved]))[0]])
    spare = map_tables(version.path / "channels" / "two_tower")[c.USER_ID].shape[0] - 1
    width = version.item_vectors.shape[1]
    draw = np.random.default_rng(0)
    overlay = Overlay(version)
    overlay.learn(
        Delta(
            version.id,
            1,
            None,
            {c.USER_ID: Rows(np.array([row, spare]), draw.standard_normal((2, width)).astype(np.float32))},
            {c.USER_ID: pa.table({"id": [learned], "row": pa.array([spare], pa.int32())})},
            version.item_ids.slice(0, 1),
            draw.standard_normal((1, width)).astype(np.float32),
            {},
        )
    )
    features = version.catalogue.slice(7, 1).to_pylist()[0]
    like = Entity(features={name: one for name, one in features.items() if name not in (c.ITEM_ID, c.AVAILABLE)})
    users = {put: Entity(features={"city": "nowhere"}), deleted: Entity(deleted=True, fresh=True)}
    served = overlay.lay(EntityChanges({new_item: like}, users))
    everyone = [moved, learned, put, deleted, plain, stranger]
    out, file = tmp_path / "out.parquet", users_file(tmp_path, user_id=everyone)
    for channel in ("two_tower", "fused"):
        assert retrieve_file(served, tmp_path, file, out, k=40, channel=channel, exclude="clicked").users == len(
            everyone
        )
        table, channels = pq.read_table(out), [] if channel == "fused" else [channel]
        for one in everyone:
            expected = retrieve(served, Request(40, "clicked", one, channels=channels), Recent(), range(0))
            mine = table.filter(pc.equal(table["user_id"], one))
            assert mine["item_id"].to_pylist() == [item.item_id for item in expected.items]
    retrieve_file(served, tmp_path, "all", out, k=400, channel="two_tower", exclude="none")
    answered = pq.read_table(out)
    assert set(answered["user_id"].to_pylist()) == set(version.users.ids.to_pylist()) - {deleted}
    assert new_item in answered["item_id"].to_pylist()
    users_of_all = pq.read_table(out).filter(pc.equal(answered["user_id"], plain))
    assert len(users_of_all) == len(version.item_ids) + 1
