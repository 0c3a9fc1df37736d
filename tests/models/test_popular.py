import numpy as np

from twotower.features.columns import Bag
from twotower.index.protocol import Exclusions
from twotower.models.popular import Popular
from twotower.models.retriever import Queries


def test_items_stand_by_clicks_then_by_row_without_what_is_excluded_or_never_clicked() -> None:
    model = Popular.fit(np.array([2, 0, 5, 2, 1]))
    nobody = Bag(np.zeros(3, np.int64), np.zeros(0, np.int32))
    found = model.retrieve(Queries({}, nobody, Exclusions.of([[], [2, 3, 3, 99]])), 4)
    assert found.rows.tolist() == [[2, 0, 3, 4], [0, 4, -1, -1]]
    assert found.scores.tolist() == [[5, 2, 2, 1], [2, 1, -np.inf, -np.inf]]
