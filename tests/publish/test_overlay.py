import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Settings
from twotower.features.vocabulary import UNKNOWN
from twotower.logs.entities import Entity
from twotower.pipeline.line import latest_checkpoint, open_served
from twotower.publish.delta import Delta, Rows
from twotower.publish.onnx import OnnxTower
from twotower.publish.overlay import EntityChanges, Overlay, _piled, check_item
from twotower.publish.tables import LaidRows, map_tables
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.serve.filters import Filter, passing
from twotower.serve.request import Request, impressed_window, retrieve, similar
from twotower.serve.users import Recent
from twotower.towers.two_tower import Table
from twotower.train.checkpoint import load_model

K = 1000


@pytest.fixture(scope="module")
def base(world: Settings) -> Version:
    return open_served(world)


def asked(user_id: Any = None, **options: Any) -> Request:
    return Request(K, "none", user_id, **options)


def answer(version: Version, user_id: Any = None, recent: Recent = Recent(), **options: Any) -> list[Any]:  # noqa: B008
    return retrieve(version, asked(user_id, **options), recent, range(0)).items


def ids(version: Version, *args: Any, **options: Any) -> list[Any]:
    return [item.item_id for item in answer(version, *args, **options)]


def delta(base: Version, seq: int = 1, **fields: Any) -> Delta:
    nothing = pa.array([], base.item_ids.type)
    width = base.item_vectors.shape[1]
    empty = Delta(base.id, seq, 1, {}, {}, nothing, np.zeros((0, width), np.float32), {})
    return replace(empty, **fields)


def a_user(base: Version, place: int) -> Any:
    """A user with a row of their own."""
    trained = np.flatnonzero(base.users.features[c.USER_ID] > UNKNOWN)
    return base.users.ids[int(trained[place])].as_py()


def test_new_items_share_the_users_vectors_of_the_two_towers(base: Version, monkeypatch: pytest.MonkeyPatch) -> None:
    towers = base.two_tower
    channels = {"new_items": towers.over("new_items", towers.index), **base.channels}
    item = Entity(features=put(base, 7))
    calls, encode = [], OnnxTower.encode
    monkeypatch.setattr(OnnxTower, "encode", lambda tower, columns: calls.append(1) or encode(tower, columns))
    laid = Overlay(replace(base, channels=channels)).lay(EntityChanges(items={new_id(base): item}))
    calls.clear()  # of the item tower
    assert new_id(base) in ids(laid, a_user(base, 1), channels=["new_items"])
    assert len(calls) == 1
    assert new_id(base) in ids(laid, a_user(base, 1), channels=["two_tower", "new_items"])
    assert len(calls) == 2


def test_a_touched_user_row_changes_that_users_answers_alone(base: Version) -> None:
    moved, other = a_user(base, 3), a_user(base, 4)
    row = int(base.users.features[c.USER_ID][base.users.positions.find(pa.array([moved]))[0]])
    values = np.full((1, base.item_vectors.shape[1]), 3, np.float32)
    overlay = Overlay(base)
    overlay.learn(delta(base, tables={c.USER_ID: Rows(np.array([row]), values)}))
    laid = overlay.lay(EntityChanges())
    assert laid.delta_seq == 1
    assert answer(laid, moved, channels=["two_tower"]) != answer(base, moved, channels=["two_tower"])
    assert answer(laid, other) == answer(base, other)
    assert retrieve(laid, asked(moved), Recent(), range(0)).delta_seq == 1


def test_a_new_user_has_a_row_from_the_delta_that_admits_them(base: Version) -> None:
    spare = map_tables(base.path / "channels" / "two_tower")[c.USER_ID].shape[0] - 1
    newcomer = 987_654 if base.users.ids.type == pa.int64() else "newcomer"
    overlay = Overlay(base)
    overlay.learn(
        delta(
            base,
            tables={c.USER_ID: Rows(np.array([spare]), np.full((1, base.item_vectors.shape[1]), 3, np.float32))},
            new_ids={c.USER_ID: pa.table({"id": [newcomer], "row": pa.array([spare], pa.int32())})},
        )
    )
    laid = overlay.lay(EntityChanges())
    assert answer(laid, newcomer, channels=["two_tower"]) != answer(base, newcomer, channels=["two_tower"])


def test_touched_vectors_are_found_like_those_of_an_index_built_anew(base: Version) -> None:
    generator = np.random.default_rng(0)
    rows = np.sort(generator.choice(len(base.item_ids), 40, replace=False))
    vectors = generator.standard_normal((40, base.item_vectors.shape[1])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    overlay = Overlay(base)
    overlay.learn(delta(base, item_ids=base.item_ids.take(pa.array(rows[::-1])), item_vectors=vectors[::-1].copy()))
    laid = overlay.lay(EntityChanges())
    whole = np.array(base.item_vectors)
    whole[rows] = vectors
    queries = laid.queries(np.arange(50))
    users = laid.two_tower.user_vectors(queries)
    found = laid.two_tower.retrieve(queries, 20)
    best = np.sort(users @ whole.T, axis=1)[:, ::-1][:, :20]
    np.testing.assert_allclose(found.scores, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(users @ whole.T, found.rows, axis=1), found.scores, atol=1e-5)
    np.testing.assert_array_equal(laid.item_vectors[rows], vectors)


def put(base: Version, like: int) -> dict[str, Any]:
    """Features as those of an item."""
    row = base.catalogue.slice(like, 1).to_pylist()[0]
    return {name: value for name, value in row.items() if name not in (c.ITEM_ID, c.AVAILABLE)}


def new_id(base: Version, number: int = 1) -> Any:
    return 10**9 + number if base.item_ids.type == pa.int64() else f"zz new {number}"


def test_an_item_that_is_put_is_retrieved_from_its_features_by_the_frozen_tower(base: Version, world: Settings) -> None:
    one = new_id(base)
    laid = Overlay(base).lay(EntityChanges(items={one: Entity(features=put(base, 7))}))
    assert one in ids(laid, channels=["two_tower"])
    model, samples = load_model(latest_checkpoint(world)), base.features.item
    table = pa.Table.from_batches([base.catalogue.slice(7, 1)])
    columns = {f.name: f.encode(table.column(f.name).combine_chunks()) for f in samples}
    columns[c.ITEM_ID] = np.array([UNKNOWN], np.int32)
    np.testing.assert_allclose(
        laid.item_vectors[np.array([len(base.item_ids)])], model.encode_items(columns), atol=1e-5
    )
    assert one not in ids(base)
    assert one in [item.item_id for item in similar(laid, base.item_ids[7].as_py(), K).items]
    assert similar(laid, one, 5).channels["item_cf"] == []


def test_clicks_on_an_item_that_was_put_are_a_history_and_exclude_it(base: Version) -> None:
    one = new_id(base)
    laid = Overlay(base).lay(EntityChanges(items={one: Entity(features=put(base, 7))}))
    window = impressed_window(base.watermark_ms + 2, 100)
    recent = Recent(clicks=((base.watermark_ms + 1, one),), shown=((base.watermark_ms + 1, one),))
    for exclude in ("clicked", "impressed"):
        found = retrieve(laid, Request(K, exclude, a_user(base, 1)), recent, window)
        assert found.failed_channels == []
        assert one not in [item.item_id for item in found.items]


def test_features_that_are_put_for_a_known_item_change_its_vector_and_its_attributes(base: Version) -> None:
    mine, other = (
        base.item_ids[3].as_py(),
        next(row for row in range(len(base.item_ids)) if put(base, row)["category"] != put(base, 3)["category"]),
    )
    laid = Overlay(base).lay(EntityChanges(items={mine: Entity(features=put(base, other))}))
    assert not np.array_equal(laid.item_vectors[np.array([3])], base.item_vectors[[3]])
    wanted = Filter(allow=[put(base, other)["category"]])
    assert (passing(base, "category", wanted)[3], passing(laid, "category", wanted)[3]) == (False, True)
    changed = passing(base, "category", wanted) != passing(laid, "category", wanted)
    assert np.flatnonzero(changed).tolist() == [3]
    assert len(laid.item_ids) == len(base.item_ids)


@pytest.mark.parametrize("gone", [Entity(deleted=True, fresh=True), Entity(available=False)])
def test_an_item_that_is_gone_is_in_no_channel(base: Version, gone: Entity) -> None:
    popular = ids(base, channels=["popular"])[0]
    laid = Overlay(base).lay(EntityChanges(items={popular: gone}))
    for channel in base.channels:
        assert popular not in ids(laid, channels=[channel])
        assert len(ids(laid, channels=[channel])) == len(ids(base, channels=[channel])) - (
            popular in ids(base, channels=[channel])
        )


def test_an_item_that_is_put_after_it_was_deleted_has_nothing_of_before(base: Version) -> None:
    mine = base.item_ids[3].as_py()
    laid = Overlay(base).lay(EntityChanges(items={mine: Entity(features=put(base, 3), fresh=True)}))
    again = Overlay(base).lay(EntityChanges(items={new_id(base): Entity(features=put(base, 3))}))
    row = laid.items.find(pa.array([mine]))
    np.testing.assert_array_equal(laid.item_vectors[row], again.item_vectors[np.array([len(base.item_ids)])])


def test_replicas_that_learned_step_by_step_and_at_once_have_the_same_bytes(base: Version) -> None:
    width = base.item_vectors.shape[1]
    generator = np.random.default_rng(1)
    deltas = [
        delta(
            base,
            seq,
            tables={
                c.USER_ID: Rows(np.arange(2, 30), generator.standard_normal((28, width)).astype(np.float32)),
                c.ITEM_ID: Rows(np.arange(5, 40), generator.standard_normal((35, width)).astype(np.float32)),
            },
            item_ids=base.item_ids.slice(seq, 20),
            item_vectors=generator.standard_normal((20, width)).astype(np.float32),
        )
        for seq in (1, 2, 3)
    ]
    first = {new_id(base, 2): Entity(features=put(base, 9))}
    items = {**first, new_id(base, 1): Entity(features=put(base, 8)), base.item_ids[0].as_py(): Entity(deleted=True)}
    slow, fast = Overlay(base), Overlay(base)
    slow.lay(EntityChanges(items=first))
    for one in deltas:
        slow.learn(one)
        slow.lay(EntityChanges(items=first))
        fast.learn(one)
    one, two = slow.lay(EntityChanges(items=items)), fast.lay(EntityChanges(items=dict(reversed(items.items()))))
    every = np.arange(len(one.item_ids))
    assert one.item_ids.equals(two.item_ids)
    assert one.item_vectors[every].tobytes() == two.item_vectors[every].tobytes()
    queries = one.queries(np.arange(len(base.users)))
    assert one.two_tower.user_vectors(queries).tobytes() == two.two_tower.user_vectors(queries).tobytes()
    for name in base.channels:
        found, other = one.channels[name].retrieve(queries, 50), two.channels[name].retrieve(queries, 50)
        assert found.rows.tobytes() == other.rows.tobytes()
        assert found.scores.tobytes() == other.scores.tobytes()


def test_features_that_items_do_not_have_or_of_another_type_are_refused(base: Version) -> None:
    check_item(base, put(base, 0))
    check_item(base, {})
    with pytest.raises(DataError, match="no attribute colour"):
        check_item(base, {"colour": "red"})
    with pytest.raises(DataError, match="price"):
        check_item(base, {"price": "dear"})


def test_the_history_reads_the_rows_that_a_delta_touched(base: Version) -> None:
    clicked = base.item_ids[5].as_py()
    token = int(base.two_tower.item_tokens[5])
    recent = Recent(clicks=((base.watermark_ms + 1, clicked),))
    values = np.full((1, base.item_vectors.shape[1]), 2, np.float32)
    overlay = Overlay(base)
    overlay.learn(delta(base, tables={c.ITEM_ID: Rows(np.array([token]), values)}))
    laid = overlay.lay(EntityChanges())
    assert answer(laid, None, recent, channels=["two_tower"]) != answer(base, None, recent, channels=["two_tower"])
    assert answer(laid, channels=["two_tower"]) == answer(base, channels=["two_tower"])


def test_pieces_of_a_table_are_few_and_say_what_all_deltas_say() -> None:
    draw = np.random.default_rng(0)
    table = np.zeros((5000, 2), np.float32)
    pieces: tuple[Rows, ...] = ()
    expected = table.copy()
    for step in range(1, 301):
        rows = np.sort(draw.choice(5000, int(draw.integers(0, 40)), replace=False))
        newer = Rows(rows, np.full((len(rows), 2), step, np.float32))
        expected[rows] = step
        pieces = _piled(pieces, newer)
        sizes = [len(piece.rows) for piece in pieces]
        assert all(below >= 16 * above for below, above in itertools.pairwise(sizes))
    laid: Table = table
    for piece in pieces:
        laid = LaidRows(laid, piece.rows, piece.values)
    assert laid.shape == table.shape
    np.testing.assert_array_equal(laid[np.arange(5000)], expected)


def test_more_items_than_the_version_has_may_be_put_at_once(base: Version) -> None:
    many = {new_id(base, number): Entity(features={}) for number in range(2 * len(base.item_ids) + 50)}
    laid = Overlay(base).lay(EntityChanges(items=many))
    tokens = laid.two_tower.item_tokens
    np.testing.assert_array_equal(tokens[: len(base.item_ids)], base.two_tower.item_tokens)
    assert (tokens[len(base.item_ids) :] == UNKNOWN).all()
    assert len(tokens) == len(laid.items) == len(base.item_ids) + len(many)


def test_items_get_their_rows_in_the_order_of_the_log(base: Version) -> None:
    first = {new_id(base, 9): Entity(features={}, began=3)}
    second = {**first, new_id(base, 1): Entity(features={}, began=4)}
    step_by_step = Overlay(base)
    held = step_by_step.lay(EntityChanges(items=first))
    laid = step_by_step.lay(EntityChanges(items=second))
    assert laid.items.at(np.arange(2) + len(base.item_ids)) == [new_id(base, 9), new_id(base, 1)]
    assert Overlay(base).lay(EntityChanges(items=dict(reversed(second.items())))).item_ids.equals(laid.item_ids)
    assert len(held.items) == len(base.item_ids) + 1
    assert held.items.find(pa.array([new_id(base, 1)])).tolist() == [-1]


def test_an_item_that_was_put_again_before_the_version_was_made_is_the_versions(base: Version) -> None:
    one = base.item_ids[3].as_py()
    entity = Entity(features=put(base, 3), fresh=True, deleted_ms=base.watermark_ms)
    known = Overlay(base).lay(EntityChanges(items={one: entity}))
    assert len(known.items) == len(base.items)
    other = Overlay(base).lay(EntityChanges(items={one: replace(entity, deleted_ms=base.watermark_ms + 1)}))
    assert other.items.find(pa.array([one])).tolist() == [len(base.items)]
    assert other.gone[3]
