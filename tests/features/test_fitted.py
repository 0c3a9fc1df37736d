from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.features.columns import Bag, Column, concatenate
from twotower.features.feature_set import FeatureSet, encode_request, encode_table, fit
from twotower.features.fitted import Categories, Category, Fitted, Items, Number, PrecomputedVector, raw_column, split
from twotower.features.options import Categorical, Feature, Features, MultiCategorical, Numeric, Sequence, Vector
from twotower.features.vocabulary import MISSING, UNKNOWN, fit_vocabulary
from twotower.schema.errors import DataError

TRAINING: dict[str, list[Any]] = {
    "city": ["Bern", "Zürich", None, "東京"],
    "code": [7, -3, 7, None],
    "member": [True, False, None, True],
    "price": [1.5, None, 9.0, 2.0],
    "income": [10, 20, 30, None],
    "visits": [0.0, 1e6, 3.0, -5.0],
    "height": [1.0, 2.0, 3.0, 4.0],
    "tags": ["a|b", "", None, " b |ü|a"],
    "likes": [["x", "y"], [], None, ["x", None]],
    "seen": [[10, 30], [], None, [20]],
    "face": [[1.0, 2.0], None, [], [3.0, -1.0]],
}
KINDS: dict[str, Feature] = {
    "city": Categorical("categorical"),
    "code": Categorical("categorical"),
    "member": Categorical("categorical"),
    "price": Numeric("numeric"),
    "income": Numeric("numeric"),
    "visits": Numeric("numeric", "log"),
    "height": Numeric("numeric", "buckets", 4),
    "tags": MultiCategorical("multi_categorical", "|"),
    "likes": MultiCategorical("multi_categorical"),
    "seen": Sequence("sequence", 2),
    "face": Vector("vector", 2),
}
TYPES = {
    "seen": pa.list_(pa.int64()),
    "likes": pa.list_(pa.string()),
    "face": pa.list_(pa.float64()),
    "city": pa.string(),
    "tags": pa.string(),
    "code": pa.int64(),
    "member": pa.bool_(),
}
ITEMS = pa.table({"item_id": [10, 20, 30]})


def table(values: dict[str, list[Any]]) -> pa.Table:
    return pa.table({name: pa.array(column, TYPES.get(name, pa.float64())) for name, column in values.items()})


def fitted() -> FeatureSet:
    item = {"item_id": Categorical("categorical")}
    return fit(Features(KINDS, item), table(TRAINING), ITEMS, {}, 8, 0.0)


def same_bytes(left: Column, right: Column) -> bool:
    if isinstance(left, Bag) and isinstance(right, Bag):
        return same_bytes(left.rows, right.rows) and left.indptr.tobytes() == right.indptr.tobytes()
    assert not isinstance(left, Bag)
    assert not isinstance(right, Bag)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


number = st.none() | st.floats() | st.integers(-(2**60), 2**60).map(float)
VALUES = {
    "city": st.none() | st.text(st.characters(codec="utf-8"), max_size=3) | st.sampled_from(["Bern", "Zürich", "東京"]),
    "code": st.none() | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([7, -3]),
    "member": st.none() | st.booleans(),
    "price": number,
    "income": number,
    "visits": number,
    "height": number,
    "tags": st.none() | st.lists(st.sampled_from(["a", "b", " b ", "ü", "other", ""]), max_size=4).map("|".join),
    "likes": st.none() | st.lists(st.none() | st.sampled_from(["x", "y", "other", ""]), max_size=4),
    "seen": st.none() | st.lists(st.none() | st.sampled_from([10, 20, 30, 40]), max_size=4),
    "face": st.none() | st.just([]) | st.lists(number, min_size=2, max_size=2),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries(VALUES), min_size=1, max_size=70))
def test_a_whole_table_and_single_requests_encode_to_the_same_bytes(rows: list[dict[str, Any]]) -> None:
    features = fitted().user
    whole = encode_table(features, table({name: [row[name] for row in rows] for name in KINDS}))
    single = [encode_request(features, row, "request") for row in rows]
    for name, column in whole.items():
        assert same_bytes(column, concatenate([one[name] for one in single])), name


@pytest.mark.parametrize("name", sorted(KINDS))
def test_an_absent_value_encodes_like_a_null_in_a_table(name: str) -> None:
    [feature] = [feature for feature in fitted().user if feature.name == name]
    column = pa.array([None, None], TYPES.get(name, pa.float64()))
    assert same_bytes(feature.encode(column), feature.absent(2))
    assert same_bytes(feature.encode(pa.nulls(2)), feature.absent(2))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_slice_of_a_column_encodes_like_a_copy_of_it(name: str) -> None:
    [feature] = [feature for feature in fitted().user if feature.name == name]
    column = table(TRAINING).column(name).combine_chunks()
    copy = pa.array(column.slice(1, 2).to_pylist(), column.type)
    assert same_bytes(feature.encode(column.slice(1, 2)), feature.encode(copy))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_rows_encode_to_no_rows(name: str) -> None:
    [feature] = [feature for feature in fitted().user if feature.name == name]
    assert len(feature.encode(table({name: []}).column(name).combine_chunks())) == 0


@pytest.mark.parametrize("name", ["city", "code", "tags", "price"])
def test_a_dictionary_column_encodes_like_its_values(name: str) -> None:
    [feature] = [feature for feature in fitted().user if feature.name == name]
    column = table(TRAINING).column(name).combine_chunks()
    assert same_bytes(feature.encode(column.dictionary_encode()), feature.encode(column))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint64(), pa.float32(), pa.float64()])
def test_every_width_of_numbers_is_the_same_category(kind: pa.DataType) -> None:
    known = Category("age", fit_vocabulary("age", pa.array([18, 25])), 4)
    assert known.encode(pa.array([25, None, 3], kind)).tolist() == [3, MISSING, UNKNOWN]


def test_a_whole_float_and_a_boolean_in_a_request_are_integers() -> None:
    known = Category("age", fit_vocabulary("age", pa.array([1, 25])), 4)
    encoded = [encode_request([known], {"age": value}, "request")["age"] for value in (25.0, True, float("nan"))]
    assert np.concatenate(encoded).tolist() == [3, 2, MISSING]


def test_an_all_null_column_knows_no_value_and_refuses_none() -> None:
    known = Category("city", fit_vocabulary("city", pa.array([None, None], pa.int64())), 4)
    assert known.vocabulary.capacity == 2
    assert known.encode(pa.array(["Bern", None])).tolist() == [UNKNOWN, MISSING]
    assert known.encode(pa.array([4])).tolist() == [UNKNOWN]


def test_a_vocabulary_of_one_value_has_one_row_behind_missing_and_unknown() -> None:
    known = Category("city", fit_vocabulary("city", pa.array(["Bern", "Bern"])), 4)
    assert known.encode(pa.array(["Bern", "Rom"])).tolist() == [2, UNKNOWN]


def test_bags_are_distinct_ascending_and_count_all_unknown_values_once() -> None:
    tags = Categories("tags", fit_vocabulary("tags", pa.array(["a", "b"])), 4, "|")
    bag = tags.encode(pa.array(["b|a|b", "x|y", "x|a", "", None]))
    assert [bag.rows[i:j].tolist() for i, j in zip(bag.indptr, bag.indptr[1:], strict=False)] == [
        [2, 3],
        [UNKNOWN],
        [UNKNOWN, 2],
        [MISSING],
        [MISSING],
    ]


def test_a_request_may_give_several_values_as_a_list_where_tables_have_a_separator() -> None:
    tags = Categories("tags", fit_vocabulary("tags", pa.array(["a", "b"])), 4, "|")
    assert encode_request([tags], {"tags": ["b", None, "a"]}, "request")["tags"].rows.tolist() == [2, 3]


def test_a_sequence_keeps_its_last_items_in_their_order_and_repeats() -> None:
    seen = Items("seen", fit_vocabulary("item_id", pa.array([10, 20, 30])), 4, 3, "mean", from_clicks=False)
    bag = seen.encode(pa.array([[10, 20, None, 30, 20], [99], []]))
    assert bag.indptr.tolist() == [0, 3, 4, 4]
    assert bag.rows.tolist() == [3, 4, 3, UNKNOWN]


def test_a_standard_score_is_that_of_the_training_values() -> None:
    [income] = [feature for feature in fitted().user if feature.name == "income"]
    assert income.encode(pa.array([20.0, 30.0, None])).tolist() == [
        [0.0, 0.0],
        [pytest.approx(10 / np.std([10, 20, 30])), 0.0],
        [0.0, 1.0],
    ]


def test_nan_and_infinities_are_missing_numbers() -> None:
    number = Number("x", False, 5.0, 2.0)
    assert number.encode(pa.array([float("nan"), float("inf"), float("-inf")])).tolist() == [[0, 1]] * 3


def test_scores_end_at_a_thousand_deviations() -> None:
    assert Number("x", False, 0.0, 1e-9).encode(pa.array([1e308, -1e308, 1.0])).tolist() == [
        [1000, 0],
        [-1000, 0],
        [1000, 0],
    ]


def test_a_constant_number_scores_zero_and_others_their_distance() -> None:
    [feature] = fit(
        Features({"x": Numeric("numeric")}, {"item_id": Categorical("categorical")}),
        pa.table({"x": [0.1, 0.1, 0.1]}),
        ITEMS,
        {},
        8,
        0.0,
    ).user
    np.testing.assert_allclose(feature.encode(pa.array([0.1, 1.1])), [[0, 0], [1, 0]], atol=1e-6)


def test_integers_beyond_exact_doubles_are_numbers_too() -> None:
    assert Number("x", False, 0.0, 2.0**53).encode(pa.array([2**53 + 1])).tolist() == [[1, 0]]


def test_buckets_hold_equal_shares_and_a_new_number_falls_into_one() -> None:
    [height] = [feature for feature in fitted().user if feature.name == "height"]
    assert height.encode(pa.array([1.0, 2.0, 3.0, 4.0, -9.0, 99.0, None])).tolist() == [2, 3, 4, 5, 2, 5, MISSING]


def test_a_vector_with_a_hole_or_beyond_float32_is_missing_as_a_whole() -> None:
    face = PrecomputedVector("face", 2)
    column = pa.array([[1, 2], [1, None], [1, float("nan")], [1e300, 0], None], pa.list_(pa.float64()))
    assert face.encode(column).tolist() == [[1, 2, 0], *[[0, 0, 1]] * 4]


def test_fixed_size_vectors_with_nulls_and_slices_keep_their_places() -> None:
    column = pa.array([[0, 0], [1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)).slice(1)
    assert PrecomputedVector("face", 2).encode(column).tolist() == [[1, 2, 0], [0, 0, 1], [3, 4, 0]]


def test_a_list_column_with_nulls_is_split_without_their_hidden_values() -> None:
    hidden = pa.ListArray.from_arrays(pa.array([0, 2, 3]), pa.array([1, 2, 3]), mask=pa.array([True, False]))
    assert split(hidden, None, "x").to_pylist() == [[], [3]]


WRONG: list[tuple[Fitted, Any, str]] = [
    (Category("code", fit_vocabulary("code", pa.array([7])), 4), "7", "of type string where int64 is known"),
    (Category("city", fit_vocabulary("city", pa.array(["7"])), 4), 7, "of type int64 where string is known"),
    (Category("code", fit_vocabulary("code", pa.array([7])), 4), 7.5, "numbers with a fraction"),
    (Category("code", fit_vocabulary("code", pa.array([7])), 4), 2**64 - 1, "does not fit int64"),
    (Category("code", fit_vocabulary("code", pa.array([7])), 4), {"a": 1}, "holds {'a': 1}, where"),
    (Category("city", fit_vocabulary("city", pa.array(["a"])), 4), "\ud800", "half a surrogate pair"),
    (Number("price", False, 0, 1), "12", "price is of type string, where numbers are expected"),
    (Categories("tags", fit_vocabulary("tags", pa.array(["a"])), 4, None), "a", "where a list is expected"),
    (Categories("tags", fit_vocabulary("tags", pa.array(["a"])), 4, "|"), 3, "has a separator but is of type int64"),
    (Categories("tags", fit_vocabulary("tags", pa.array(["a"])), 4, "|"), ["a", 3], "no value of one type"),
    (PrecomputedVector("face", 2), [1.0, 2.0, 3.0], "a vector of 3 numbers where 2 are expected"),
    (PrecomputedVector("face", 2), ["a", "b"], "where numbers are expected"),
]


@pytest.mark.parametrize(("feature", "value", "message"), WRONG)
def test_a_value_of_another_type_is_refused_with_what_was_seen(feature: Fitted, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        encode_request([feature], {feature.name: value}, "request")


def test_a_name_that_is_no_feature_is_refused_with_those_that_are() -> None:
    with pytest.raises(DataError, match="request: citty is no feature of this model; its features are x"):
        encode_request([Number("x", False, 0, 1)], {"citty": "Bern"}, "request")


def test_raw_columns_have_the_type_of_their_values() -> None:
    assert raw_column(Number("x", False, 0, 1), True).type == pa.bool_()
