"""How good lists are by a simulated world's truth, beside what its log says of them.

A log knows of an item only if it was shown: a list of what users would like and were never shown scores nothing there.

B users, K candidates of a list, P places of a page.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from twotower.datasets.world import NOTHING, Requests, World

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def true_recall(
    world: World,
    user: Ints,
    ts_ms: Ints,
    lists: Ints,
    ks: Sequence[int],
    n: int = 50,
    clicked: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Floats]:
    """`true_recall@k` of each user: the share of the n items that they like best then which are among the first k.

    Those are the n of greatest utility among the items alive at that time which the user has not clicked.

    Args:
        world: with a horizon beyond these times.
        user: (B,) rows of users.
        ts_ms: (B,) milliseconds since 1970.
        lists: (B, K) rows of the world's items, best first, -1 = the list has ended.
        ks: cut-offs, at most K.
        n: how many items are wanted.
        clicked: (U, N) items that are not wanted again; absent = none.
    """
    wanted = world.top(user, ts_ms, n, clicked)
    size = len(world.truth.birth_day)
    owner = np.arange(len(user))[:, None] * size
    hit = np.isin(owner + lists, (owner + wanted)[wanted != NOTHING]) & (lists != NOTHING)
    possible = np.maximum((wanted != NOTHING).sum(axis=1), 1)
    return {f"true_recall@{k}": hit[:, :k].sum(axis=1) / possible for k in ks}


def page_clicks(world: World, requests: Requests, pages: Ints) -> Floats:
    """The clicks to expect on each page (R,); no chance is left in it but that of who asks when.

    Args:
        world: with a horizon beyond these requests.
        requests: R of them.
        pages: (R, P) rows of the world's items from the first position on, -1 = nothing.
    """
    expected: Floats = world.chances(requests, pages).sum(axis=1)
    return expected
