import numpy as np
import pytest

from twotower.features.columns import Bag, Column, concatenate, from_arrow, pointers, ranges, take, to_arrow

BAG = Bag(np.array([0, 2, 2, 3]), np.array([7, 8, 9], np.int32))
ROWS = np.array([4, 5, 6], np.int32)
NUMBERS = np.arange(6, dtype=np.float32).reshape(3, 2)


def plain(column: Column) -> list[list[float]]:
    if isinstance(column, Bag):
        return [column.rows[i:j].tolist() for i, j in zip(column.indptr[:-1], column.indptr[1:], strict=True)]
    return np.atleast_2d(np.asarray(column).T).T.tolist() if len(column) else []


@pytest.mark.parametrize("column", [BAG, ROWS, NUMBERS])
def test_arrow_gives_back_the_same_column_also_of_a_slice(column: Column) -> None:
    array = to_arrow(column)
    assert plain(from_arrow(array)) == plain(column)
    assert plain(from_arrow(array.slice(1))) == plain(column)[1:]
    assert len(from_arrow(array.slice(0, 0))) == 0


@pytest.mark.parametrize("column", [ROWS, NUMBERS])
def test_arrow_shares_the_memory_of_numbers(column: Column) -> None:
    assert not isinstance(column, Bag)
    back = from_arrow(to_arrow(column))
    assert not isinstance(back, Bag)
    assert np.shares_memory(back, column)
    assert back.flags.c_contiguous


@pytest.mark.parametrize("column", [BAG, ROWS, NUMBERS])
def test_take_and_concatenate_are_rows_by_their_number(column: Column) -> None:
    rows = plain(column)
    assert plain(take(column, np.array([2, 0, 0]))) == [rows[2], rows[0], rows[0]]
    assert plain(concatenate([column, take(column, np.array([1]))])) == [*rows, rows[1]]
    assert plain(take(column, np.zeros(0, np.int64))) == []


def test_ranges_of_nothing_are_nothing() -> None:
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
    assert ranges(np.array([5, 9]), np.array([0, 0])).tolist() == []
    assert pointers(np.zeros(0, np.int64)).tolist() == [0]
