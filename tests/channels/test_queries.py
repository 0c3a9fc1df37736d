import numpy as np
import pyarrow as pa
import pytest

from twotower.channels.queries import queries_of_users
from twotower.features.columns import Bag, pointers
from twotower.features.feature_set import FeatureSet, encode_table, fit
from twotower.features.options import Categorical, Features, MultiCategorical, Sequence
from twotower.samples.read import Clicks, Entities

USERS = pa.table({"user_id": ["a", "b", "c"], "tags": ["x|y", "", "y"]})
ITEMS = pa.table({"item_id": [1, 2, 3, 4]})
CLICKS = Clicks(pointers(np.array([2, 0, 3])), np.array([3, 1, 0, 0, 2], np.int32), np.arange(5))


@pytest.fixture
def features() -> FeatureSet:
    wanted = Features(
        user={
            "user_id": Categorical("categorical"),
            "tags": MultiCategorical("multi_categorical", separator="|"),
            "history": Sequence("sequence"),
        },
        context={"hour": Categorical("categorical")},
    )
    return fit(wanted, USERS, ITEMS, {"hour": pa.array([7, 8])}, 4, 0.0)


def test_users_bring_their_features_clicks_and_exclusions_and_an_unknown_one_brings_nothing(
    features: FeatureSet,
) -> None:
    users = Entities(USERS.column("user_id").combine_chunks(), encode_table(features.user_columns, USERS))
    found = queries_of_users(
        features,
        users,
        CLICKS,
        np.array([2, -1, 0]),
        exclude=Bag(pointers(np.array([1, 0, 2])), np.array([3, 0, 1], np.int32)),
    )
    assert len(found) == 3
    assert found.features["user_id"].tolist() == [4, 1, 2]  # type: ignore[union-attr]
    assert found.features["hour"].tolist() == [0, 0, 0]  # type: ignore[union-attr]
    tags = found.features["tags"]
    assert isinstance(tags, Bag)
    assert (tags.indptr.tolist(), tags.rows.tolist()) == ([0, 1, 2, 4], [3, 0, 2, 3])
    assert (found.clicks.indptr.tolist(), found.clicks.rows.tolist()) == ([0, 3, 3, 5], [0, 0, 2, 3, 1])
    assert (found.exclude.indptr.tolist(), found.exclude.rows.tolist()) == ([0, 2, 2, 3], [0, 1, 3])


def test_a_context_is_taken_as_it_is_and_nothing_is_excluded_without_exclusions(features: FeatureSet) -> None:
    users = Entities(USERS.column("user_id").combine_chunks(), encode_table(features.user_columns, USERS))
    hour = np.array([3], np.int32)
    found = queries_of_users(features, users, CLICKS, np.array([1]), context={"hour": hour})
    assert found.features["hour"] is hour
    assert len(found.exclude.rows) == 0
