import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.features.vocabulary import Positions, Vocabulary, as_values, fit_vocabulary
from twotower.schema.errors import DataError

text = st.text(st.characters(codec="utf-8"), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.sets(text, max_size=80), st.lists(st.none() | text, max_size=30))
def test_many_lookups_agree_with_few_and_with_a_dictionary(known: set[str], asked: list[str | None]) -> None:
    vocabulary = fit_vocabulary("t", pa.array(list(known), pa.string()))
    place = {value: row for row, value in enumerate(vocabulary.values.to_pylist())}
    asked = [*asked, *list(known)[:5]]
    due = [-1 if value is None else place.get(value, -1) for value in asked]
    few = Positions(vocabulary.values).find(pa.array(asked[:64], pa.string()))
    many = Positions(vocabulary.values).find(pa.array(asked * 70, pa.string()))
    assert few.tolist() == due[:64]
    assert many.tolist() == due * 70


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(-(2**63), 2**63 - 1), max_size=80), st.lists(st.none() | st.integers(-5, 5), max_size=90))
def test_integers_are_found_where_they_stand(known: set[int], asked: list[int | None]) -> None:
    positions = Positions(fit_vocabulary("t", pa.array(list(known), pa.int64())).values)
    asked = [*asked, *known]
    ordered = sorted(known)
    due = [ordered.index(value) if value in known else -1 for value in asked]
    assert positions.find(pa.array(asked, pa.int64())).tolist() == due


def test_a_vocabulary_does_not_depend_on_the_order_of_its_values() -> None:
    one = fit_vocabulary("t", pa.array(["b", "é", "a", "😀", "B"]))
    two = fit_vocabulary("t", pa.array(["😀", "B", "a", "b", "é", "b"]))
    assert one.values.to_pylist() == two.values.to_pylist() == ["B", "a", "b", "é", "😀"]


def test_room_is_a_share_of_the_known_values_rounded_up() -> None:
    assert fit_vocabulary("t", pa.array([1, 2, 3]), 0.1).capacity == 2 + 3 + 1
    assert fit_vocabulary("t", pa.array([], pa.int64()), 0.1).capacity == 2


def test_a_slice_of_a_vocabulary_and_of_its_questions_is_searched_from_its_own_start() -> None:
    values = pa.array([1, 5, 8, 13]).slice(1)
    assert Vocabulary("t", values, 5).rows(pa.array([1, 13, 5, None]).slice(1)).tolist() == [4, 2, 0]
    texts = pa.array(["a", "b", "c"]).slice(1)
    assert Positions(texts).find(pa.array(["a", "c"]).slice(1)).tolist() == [1]


def test_numbers_asked_among_texts_are_refused_unless_all_are_null() -> None:
    with pytest.raises(DataError, match="of type int64 where string is known, such as \\[1\\]"):
        Positions(pa.array(["1"])).find(pa.array([1]))
    assert Positions(pa.array(["1"])).find(pa.nulls(2, pa.int64())).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (pa.array([1.0, float("nan"), float("inf"), None]), [1, None, None, None]),
        (pa.array([True, None, False]), [1, None, 0]),
        (pa.nulls(2), [None, None]),
        (pa.array(["x", None], pa.large_string()), ["x", None]),
        (pa.array(["x", None, "x"]).dictionary_encode(), ["x", None, "x"]),
        (pa.chunked_array([[1], [2]]), [1, 2]),
        (pa.chunked_array([], pa.int8()), []),
    ],
)
def test_categories_become_int64_or_string(column: pa.Array, values: list[object]) -> None:
    found = as_values(column, "x")
    assert found.to_pylist() == values
    assert found.type in (pa.int64(), pa.string())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.5]), "x holds numbers with a fraction"),
        (pa.array([1e300]), "beyond 2\\^53"),
        (pa.array([2**64 - 1], pa.uint64()), "integers that do not fit int64"),
        (pa.array([b"x"]), "x is of type binary: categories are"),
        (pa.array([0], pa.date32()), "x is of type date32"),
    ],
)
def test_what_has_no_categories_is_refused(column: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_values(column, "x")


def test_rows_are_int32() -> None:
    assert fit_vocabulary("t", pa.array([4])).rows(pa.array([4, 5, None])).dtype == np.int32
