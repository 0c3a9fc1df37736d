from types import SimpleNamespace

import numpy as np

from twotower.features.columns import Bag, pointers
from twotower.samples.read import Clicks
from twotower_lab.ease import Ease, weights


def test_the_weights_minimise_the_squared_error_without_a_diagonal() -> None:
    clicked = (np.random.default_rng(0).random((30, 5)) < 0.4).astype(np.float32)
    found = weights(clicked, 2.0)
    for item in range(5):  # the closed form is a ridge regression of each item on all others (Steck 2019, eq. 6)
        others = np.delete(np.arange(5), item)
        given = clicked[:, others]
        wanted = np.linalg.solve(given.T @ given + 2.0 * np.eye(4), given.T @ clicked[:, item])
        np.testing.assert_allclose(found[others, item], wanted, atol=1e-4)
    assert not np.diag(found).any()


def test_what_was_clicked_is_not_listed_and_who_clicked_nothing_gets_nothing() -> None:
    clicks = [[0, 1], [0, 1], [1, 2], []]
    flat = np.array([item for own in clicks for item in own], np.int32)
    indptr = pointers(np.array([len(own) for own in clicks]))
    samples = SimpleNamespace(
        clicks=Clicks(indptr, flat, np.arange(len(flat))), users=clicks, items=range(4),
        item_positives=np.bincount(flat, minlength=4),
    )  # fmt: skip
    queries = type("Queries", (), {"clicks": Bag(indptr, flat), "__len__": lambda _: len(clicks)})()
    rows = Ease(samples, 1.0).retrieve(queries, 3).rows
    assert rows[:3, 0].tolist() == [2, 2, 0]
    assert (rows[:3, 1:] == -1).all()  # item 3 has no click and is no candidate
    assert (rows[3] == -1).all()
