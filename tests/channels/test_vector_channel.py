from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from twotower.channels.retriever import Queries
from twotower.channels.vector_channel import VectorChannel
from twotower.features.columns import Bag, Column
from twotower.features.feature_set import FeatureSet, fit
from twotower.features.options import Categorical, Features, Sequence
from twotower.index.exact import ExactIndex
from twotower.index.protocol import Exclusions
from twotower.towers.two_tower import Floats


def test_the_encoder_sees_the_latest_clicks_as_rows_of_the_table_and_the_index_its_vector() -> None:
    wanted = Features(user={"history": Sequence("sequence", last=2)}, item={"item_id": Categorical("categorical")})
    features = fit(wanted, pa.table({"user_id": [1]}), pa.table({"item_id": [10, 30]}), {}, 4, 0.0)
    catalogue = pa.array([10, 20, 30])
    history = features.history
    assert history is not None
    seen: list[Bag] = []

    def encode(columns: Mapping[str, Column]) -> Floats:
        bag = columns["history"]
        assert isinstance(bag, Bag)
        seen.append(bag)
        return np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)

    index = ExactIndex.build(np.arange(3), np.array([[1, 0], [0.5, 0.5], [0, 1]], np.float32))
    channel = VectorChannel("two_tower", features, history.vocabulary.rows(catalogue), encode, index)
    clicks = Bag(np.array([0, 3, 3]), np.array([0, 1, 2], np.int32))
    found = channel.retrieve(Queries({}, clicks, Exclusions.of([[0], []])), 2)
    assert seen[0].indptr.tolist() == [0, 2, 2]
    assert seen[0].rows.tolist() == [1, 3]  # item 20 had no training positive: unknown
    assert found.rows.tolist() == [[1, 2], [2, 1]]


def test_interests_are_searched_each_and_an_item_is_as_near_as_the_nearest_of_them() -> None:
    items = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    interests = np.array([[[1, 0], [0, 1]], [[-1, 0], [-1, 0]], [[0, 0], [0, 0]]], np.float32)
    channel = VectorChannel(
        "mind",
        fit_ids(),
        np.zeros(4, np.int32),
        lambda columns: interests,
        ExactIndex.build(np.arange(4), items),
    )
    queries = Queries({}, Bag(np.zeros(4, np.int64), np.zeros(0, np.int32)), Exclusions.of([[2], [], []]))
    found = channel.retrieve(queries, 3)
    assert found.rows.tolist() == [[0, 1, 3], [3, 2, 1], [-1, -1, -1]]
    np.testing.assert_allclose(found.scores[0], [1, 0.8, 0], atol=1e-6)


def fit_ids() -> FeatureSet:
    wanted = Features(user={"user_id": Categorical("categorical")}, item={"item_id": Categorical("categorical")})
    return fit(wanted, pa.table({"user_id": [1]}), pa.table({"item_id": [10, 30]}), {}, 4, 0.0)
