from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.features.columns import Bag, Column
from twotower.features.feature_set import FeatureSet, encode_table, fit
from twotower.features.options import Categorical, Features, Sequence
from twotower.schema.errors import ConfigError
from twotower.towers.options import PreRankOptions
from twotower.towers.ranker import Ranker, TargetAttention, ranker_features

ITEMS = pa.table({"item_id": [0, 1, 2, 3], "kind": ["a", "b", "a", "b"]})
USERS = pa.table({"user_id": [0, 1, 2], "city": ["x", "y", "x"]})
USER = {
    "user_id": Categorical("categorical"),
    "city": Categorical("categorical"),
    "history": Sequence("sequence", last=5, encoder="attention"),
}
ITEM = {"item_id": Categorical("categorical"), "kind": Categorical("categorical")}


def options(**changed: Any) -> PreRankOptions:
    return PreRankOptions(**{"layers": [8], "attention": 4, "positions": 3, **changed})


def features(user: dict[str, Any] = USER, item: dict[str, Any] = ITEM) -> FeatureSet:
    return fit(Features(user=user, item=item), USERS, ITEMS, {}, 6, 0.0)


def ranker(of: PreRankOptions, seed: int = 0) -> Ranker:
    model = Ranker(features(), of, seed)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def columns(rows: list[int], histories: list[list[int]]) -> dict[str, Column]:
    counts = [len(history) for history in histories]
    tokens = np.array([item + 2 for history in histories for item in history], np.int32)
    own = features()
    encoded = encode_table([f for f in own.user if f.name != "history"], USERS.take(pa.array(rows)))
    return {**encoded, "history": Bag(np.concatenate([[0], np.cumsum(counts)]), tokens)}


@pytest.mark.parametrize("history", ["mean", "target"])
@pytest.mark.parametrize("network", ["dnn", "dcn"])
def test_one_user_beside_many_candidates_scores_as_each_pair_alone(network: str, history: str) -> None:
    model = ranker(options(network=network, history=history))
    items = encode_table(model.features.item, ITEMS)
    together = model.score(columns([1], [[0, 3, 3]]), items)
    for row in range(4):
        alone = model.score(columns([1], [[0, 3, 3]]), encode_table(model.features.item, ITEMS.slice(row, 1)))
        np.testing.assert_allclose(alone, together[row : row + 1], rtol=1e-5)
    rows = model.score(columns([1] * 4, [[0, 3, 3]] * 4), items)
    np.testing.assert_allclose(rows, together, rtol=1e-5)


def test_attention_is_a_mean_of_items_each_times_its_weight() -> None:
    torch.manual_seed(0)
    attention = TargetAttention(3, 4, 5)
    torch.nn.init.normal_(attention.age)
    items, candidate = torch.randn(2, 4, 3), torch.randn(2, 3)
    length = torch.tensor([3, 0])
    found = attention(items, length, candidate)
    expected = torch.zeros(3)
    for place in range(3):
        one = items[0, place]
        hidden = attention.item(one) + attention.candidate(candidate[0]) + attention.product(one * candidate[0])
        expected += attention.weight(torch.relu(hidden + attention.age[3 - 1 - place])) * one / 3
    torch.testing.assert_close(found[0], expected)
    assert found[1].tolist() == [0, 0, 0]


def test_the_candidate_decides_what_of_a_history_counts() -> None:
    model = ranker(options(history="target"))
    attention = model.attention["history"]
    items = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(2))
    found = attention(items, torch.tensor([2]), torch.eye(6))
    directions = found / found.norm(dim=1, keepdim=True)
    assert (directions @ directions.T).abs().min() < 0.99


def test_positions_add_their_bias_and_the_first_adds_none() -> None:
    model = ranker(options())
    model.position.data = torch.tensor([0.5, 9.0, -1.0, -2.0])
    assert model.bias(torch.tensor([0, 1, 2, 3, 4, 60])).tolist() == [0.5, 0.0, -1.0, -2.0, -2.0, -2.0]
    assert model.curve() == [0.0, -1.0, -2.0]
    items = encode_table(model.features.item, ITEMS)
    user = columns([0], [[1]])
    shown = model.score(user, items, np.array([1, 2, 3, 1], np.int32))
    np.testing.assert_allclose(shown - model.score(user, items), [0, -1, -2, 0], atol=1e-5)


def test_a_network_begins_at_the_click_rate() -> None:
    model = Ranker(features(), options())
    model.output.weight.data.zero_()
    model.begin_at(0.2)
    logits = model.score(columns([0], [[]]), encode_table(model.features.item, ITEMS))
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), 0.2, rtol=1e-5)


def test_the_same_seed_gives_the_same_ranker() -> None:
    one, other = (Ranker(features(), options(), 3) for _ in range(2))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=0, atol=0)
    np.testing.assert_array_equal(one.tables["item_id"].weights, other.tables["item_id"].weights)


@pytest.mark.parametrize(
    ("user", "item"),
    [({"user_id": USER["user_id"]}, ITEM), (USER, {"kind": ITEM["kind"]})],
)
def test_attention_without_a_history_or_without_item_ids_is_refused(user: Any, item: Any) -> None:
    with pytest.raises(ConfigError, match='history = "target" lets the candidate attend'):
        ranker_features(features(user, item), options(history="target"))
    mean = features(user, item)
    scored = Ranker(mean, options())
    given = {name: column for name, column in columns([0], [[]]).items() if name in {f.name for f in mean.user}}
    assert scored.score(given, encode_table(mean.item, ITEMS)).shape == (4,)
