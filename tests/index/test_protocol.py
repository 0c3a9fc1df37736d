import numpy as np
import pytest

from twotower.index.protocol import Exclusions
from twotower.schema.errors import DataError


def test_lists_become_pieces_of_one_array() -> None:
    exclude = Exclusions.of([[3, 1], [], [7]])
    assert exclude.indptr.tolist() == [0, 2, 2, 3]
    assert exclude.rows.tolist() == [3, 1, 7]
    assert Exclusions.of([]).indptr.tolist() == [0]


@pytest.mark.parametrize("indptr", [[], [1, 2], [0, 1], [0, 3, 2]])
def test_pieces_that_do_not_fit_are_refused(indptr: list[int]) -> None:
    with pytest.raises(DataError, match="must rise from 0 to 2"):
        Exclusions(np.array(indptr, np.int64), np.array([5, 6]))


def test_rows_that_are_not_int64_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows float64\(1,\)"):
        Exclusions(np.array([0, 1]), np.array([5.0]))  # type: ignore[arg-type]
