from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.features.columns import Bag, Beginnings, Column, take
from twotower.features.feature_set import FeatureSet, encode_table, fit
from twotower.features.options import Categorical, Features, MultiCategorical, Numeric, Sequence, Vector
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.towers.options import TowerOptions
from twotower.towers.two_tower import StepAssembler, TwoTower, tower_inputs

ROWS = 9
EVERY_KIND = Features(
    user={
        "user_id": Categorical("categorical"),
        "history": Sequence("sequence", last=4),
        "bought": Sequence("sequence", last=3),
        "age": Numeric("numeric", "buckets", buckets=3),
        "income": Numeric("numeric", "log"),
    },
    item={
        "item_id": Categorical("categorical"),
        "genres": MultiCategorical("multi_categorical", separator="|"),
        "year": Numeric("numeric"),
        "text": Vector("vector", size=3),
    },
    context={"hour": Categorical("categorical"), "scenes": MultiCategorical("multi_categorical")},
)


@pytest.fixture
def features() -> FeatureSet:
    return fit(EVERY_KIND, USERS, ITEMS, dict(zip(CONTEXT.column_names, CONTEXT.columns, strict=True)), 6, 0.5)


USERS = pa.table(
    {
        c.USER_ID: list("abcdefghi"),
        "bought": [[1], [], [2, 3, 4, 5, 6], None, [99], [1, 1], [8], [0, 99], []],
        "age": [1.0, 2, 3, None, 5, 6, 7, 8, 9],
        "income": [0.0, -5, 100, None, 3, 3, 3, 1e6, 1],
    }
)
ITEMS = pa.table(
    {
        c.ITEM_ID: np.arange(ROWS),
        "genres": ["x|y", "", None, "z", "x", "y|x|z", "x", "z|z", "y"],
        "year": [1990, 1991, None, 2000, 2001, 2002, 2003, 2004, 2005],
        "text": [[0.1, 0.2, 0.3]] * 4 + [None] + [[1.0, 2.0, 3.0]] * 4,
    }
)
CONTEXT = pa.table({"hour": [1, 2, 3, None, 5, 1, 1, 1, 2], "scenes": [["p"], [], None, ["p", "q"]] + [["q"]] * 5})


def columns(features: FeatureSet) -> tuple[dict[str, Column], dict[str, Column]]:
    """Encoded users with context and history (one of them empty), and items; repeated rows among them."""
    history = Bag(np.array([0, 2, 2, 5, 6, 6, 7, 8, 9, 9]), np.array([4, 2, 1, 3, 3, 9, 5, 0, 6], np.int32))
    user = encode_table(features.user_columns, USERS) | encode_table(features.context, CONTEXT) | {"history": history}
    picked = np.array([3, 1, 1, 0, 2, 8, 7, 6, 5, 4])
    return (
        {name: take(column, picked) for name, column in user.items()},
        {name: take(column, picked[:7]) for name, column in encode_table(features.item, ITEMS).items()},
    )


def test_inputs_with_gradients_are_those_of_whole_tables_for_every_kind_of_feature(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]))
    for table in model.tables.values():
        table.weights[:2] = np.random.default_rng(0).normal(size=(2, table.weights.shape[1]))
    user, item = columns(features)
    step = StepAssembler(model.features, model.tables).assemble(user, item)
    tables = {name: table.weights for name, table in model.tables.items()}
    assert set(step.touched) == {"user_id", "item_id", "user.age", "item.genres", "context.hour", "context.scenes"}
    for assembled, side, encoded in (
        (step.user, (*features.user, *features.context), user),
        (step.item, features.item, item),
    ):
        whole = tower_inputs(side, encoded, tables)
        assert set(assembled) == set(whole)
        for name, expected in whole.items():
            np.testing.assert_allclose(assembled[name].detach().numpy(), expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("encoder", ["attention", "transformer", "interests"])
@pytest.mark.parametrize("network", ["dnn", "dcn"])
def test_vectors_with_gradients_are_those_of_whole_tables_for_encoded_sequences(encoder: Any, network: str) -> None:
    sequence = Sequence("sequence", last=4, encoder="attention" if encoder == "interests" else encoder)
    wanted = Features(
        user={"history": sequence, "bought": sequence, "age": Numeric("numeric")},
        item={"item_id": Categorical("categorical")},
    )
    features = fit(wanted, USERS, ITEMS, {}, 6, 0.5)
    if encoder == "interests":
        features = features.with_interests(3, 2)
    model = TwoTower(features, 6, TowerOptions(network, [8]), TowerOptions("dnn", []))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    history = Bag(np.array([0, 2, 2, 5, 6, 6, 7, 8, 9, 9]), np.array([4, 2, 1, 3, 3, 9, 5, 0, 6], np.int32))
    user = encode_table(features.user_columns, USERS) | {"history": history}
    step = StepAssembler(model.features, model.tables).assemble(user, encode_table(features.item, ITEMS))
    whole = model.encode_users(user)
    np.testing.assert_allclose(model.user_tower(step.user).detach().numpy(), whole, rtol=1e-5, atol=1e-6)
    shared = Beginnings(history, np.array([2, 2, 0, 8]), np.array([1, 3, 2, 0]))
    cut = Bag(np.array([0, 1, 4, 6, 6]), history.rows[[2, 2, 3, 3, 0, 1]])
    picked = {name: take(column, np.array([2, 2, 0, 8])) for name, column in user.items()}
    step = StepAssembler(model.features, model.tables).assemble(
        picked | {"history": shared}, encode_table(features.item, ITEMS)
    )
    vectors = model.user_tower(step.user)
    np.testing.assert_allclose(vectors.detach().numpy(), model.encode_users(picked | {"history": cut}), atol=1e-6)
    vectors.square().mean().backward()
    gradient = step.touched["item_id"].values.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()


def test_the_mean_of_a_history_by_hand(features: FeatureSet) -> None:
    table = np.arange(20, dtype=np.float32).reshape(10, 2)
    history = Bag(np.array([0, 2, 2, 3]), np.array([1, 4, 9], np.int32))
    (feature,) = (feature for feature in features.user if feature.name == "history")
    assert tower_inputs([feature], {"history": history}, {"item_id": table})["history"].tolist() == [
        [5.0, 6.0],
        [0.0, 0.0],
        [18.0, 19.0],
    ]


def test_gradients_reach_the_rows_touched_from_every_feature_that_reads_them(features: FeatureSet) -> None:
    """Item ids are read by the item tower and both sequences: their gradients add up."""
    model = TwoTower(features, 6, TowerOptions("dnn", []), TowerOptions("dnn", []))
    user, item = columns(features)
    step = StepAssembler(model.features, model.tables).assemble(user, item)
    sum(value.sum() for value in (*step.user.values(), *step.item.values()) if value.requires_grad).backward()  # type: ignore[union-attr]
    touched = step.touched["item_id"]
    expected = np.zeros(len(model.tables["item_id"].weights))
    np.add.at(expected, np.asarray(item[c.ITEM_ID]), 1.0)
    for name in ("history", "bought"):
        bag: Any = user[name]
        counts = np.diff(bag.indptr)
        np.add.at(expected, bag.rows, np.repeat(1 / np.maximum(counts, 1), counts))
    assert touched.values.grad is not None
    assert sorted(touched.rows.tolist()) == np.flatnonzero(expected).tolist()
    np.testing.assert_allclose(touched.values.grad[:, 0].numpy(), expected[touched.rows], rtol=1e-6)


def test_vectors_are_of_unit_length_and_training_mode_is_left_as_it_was(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]), dropout=0.5).train()
    user, item = columns(features)
    vectors = model.encode_users(user)
    np.testing.assert_allclose(np.square(vectors).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors, model.encode_users(user))  # no dropout
    assert model.encode_items(item).shape == (7, 6)
    assert model.training
    assert model.user_tower.training


def test_vectors_do_not_depend_on_the_rest_of_the_batch(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]))
    user, _ = columns(features)
    together = model.encode_users(user)
    for row in range(len(together)):
        alone = model.encode_users({name: take(column, np.array([row])) for name, column in user.items()})
        np.testing.assert_allclose(alone[0], together[row], atol=1e-6)


def test_no_users_have_no_vectors(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]))
    user, _ = columns(features)
    nobody = {name: take(column, np.zeros(0, np.int64)) for name, column in user.items()}
    assert model.encode_users(nobody).shape == (0, 6)


def test_initial_weights_are_those_of_the_seed_and_draw_nothing_from_outside(features: FeatureSet) -> None:
    def weights(seed: int) -> list[bytes]:
        model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]), seed=seed)
        dense = [parameter.detach().numpy().tobytes() for parameter in model.parameters()]
        return dense + [table.weights.tobytes() for table in model.tables.values()]

    torch.manual_seed(1)
    one, state = weights(3), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert weights(3) == one
    assert all(a != b for a, b in zip(weights(4), one, strict=True) if np.frombuffer(a, np.float32).any())


@pytest.mark.parametrize("wanted", ["no sequence but in the user tower", "numbers alone"])
def test_towers_without_ids_work(wanted: str, features: FeatureSet) -> None:
    if wanted == "numbers alone":
        chosen = FeatureSet(_named(features.user, "income"), _named(features.item, "year", "text"), ())
    else:
        chosen = FeatureSet(_named(features.user, "bought"), _named(features.item, "year"), ())
    model = TwoTower(chosen, 4, TowerOptions("dnn", []), TowerOptions("dnn", [5]))
    user, item = columns(features)
    if wanted != "numbers alone":
        user["bought"] = Bag(np.zeros(11, np.int64), np.zeros(0, np.int32))  # nobody bought anything
    step = StepAssembler(model.features, model.tables).assemble(user, item)
    (model.user_tower(step.user).sum() + model.item_tower(step.item).sum()).backward()
    assert model.encode_users(user).shape == (10, 4)


def _named(features: tuple[Any, ...], *names: str) -> tuple[Any, ...]:
    chosen: Callable[[Any], bool] = lambda feature: feature.name in names  # noqa: E731
    return tuple(filter(chosen, features))


def test_preferred_items_come_first_by_the_product_and_the_preference_together(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]), adjusted=True)
    user, _ = columns(features)
    items = encode_table(features.item, ITEMS)
    model.prefer(items, preferred := np.linspace(-3, 1, ROWS))
    users, served = model.encode_users(user), model.encode_items(items)
    assert users.shape[1] == served.shape[1] == 8
    np.testing.assert_allclose(np.square(users).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.square(served).sum(axis=1), 1, rtol=1e-5)
    product = model.as_trained(users) @ model.as_trained(served).T
    middle = preferred - preferred.mean()
    np.testing.assert_allclose(users @ served.T, (product + middle) / np.sqrt(2 * (1 + 2**2)), atol=1e-6)

    unknown = {name: take(column, np.array([0])) for name, column in items.items()} | {
        c.ITEM_ID: np.array([1], np.int32)
    }
    trained = model.as_trained(model.encode_items(unknown))
    expected = (model.as_trained(users) @ trained.T - 2) / np.sqrt(2 * (1 + 2**2))
    np.testing.assert_allclose(users @ model.encode_items(unknown).T, expected, atol=1e-6)


def test_items_that_are_alike_popular_are_ordered_as_without(features: FeatureSet) -> None:
    model = TwoTower(features, 6, TowerOptions("dnn", [8]), TowerOptions("dnn", [8]), adjusted=True)
    user, item = columns(features)
    model.prefer(encode_table(features.item, ITEMS), np.full(ROWS, -5.0))
    users, items = model.encode_users(user), model.encode_items(item)
    np.testing.assert_allclose(
        users @ items.T, model.as_trained(users) @ model.as_trained(items).T / np.sqrt(2), atol=1e-6
    )


def test_a_preference_is_known_by_the_ids_of_items(features: FeatureSet) -> None:
    chosen = FeatureSet(features.user, _named(features.item, "year"), ())
    with pytest.raises(ConfigError, match="add item_id"):
        TwoTower(chosen, 4, TowerOptions("dnn", []), TowerOptions("dnn", []), adjusted=True)
