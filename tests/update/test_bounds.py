from typing import Any

import numpy as np

from twotower.update.bounds import ITEM, PAIR, USER, ClickWindows
from twotower.update.options import BoundsOptions

HOUR_MS = 3_600_000


def columns(clicks: list[tuple[str, str, int]]) -> list[list[Any]]:
    return [[one[place] for one in clicks] for place in range(3)]


def why(windows: ClickWindows, clicks: list[tuple[str, str, int]]) -> list[str]:
    users, items, ts_ms = zip(*clicks, strict=True)
    return windows.admit(users, items, ts_ms).tolist()


def trained(windows: ClickWindows, clicks: list[tuple[str, str, int]]) -> None:
    kept = np.array(why(windows, clicks)) == ""
    windows.restore(windows.counted(*columns([one for one, keep in zip(clicks, kept, strict=True) if keep])), [])


def test_repeats_of_a_pair_and_of_a_user_are_held_back() -> None:
    windows = ClickWindows(BoundsOptions(pair=2, user=3))
    assert why(windows, [("u", "a", 0)] * 3 + [("u", "b", 0), ("u", "c", 0), ("v", "a", 0)]) == [
        *("", "", PAIR, "", USER, "")
    ]


def test_one_item_has_a_share_of_the_positives_of_all_others_and_no_less_than_the_fixed_bound() -> None:
    windows = ClickWindows(BoundsOptions(item=5, item_share=0.5))
    alone = [(f"u{n}", "pushed", 0) for n in range(20)]
    assert why(windows, alone) == [""] * 5 + [ITEM] * 15
    others = [(f"v{n}", f"i{n}", 0) for n in range(16)]
    assert why(windows, [*others, *alone]).count(ITEM) == 12


def test_what_was_trained_counts_in_its_window_alone_whatever_the_order_of_time() -> None:
    windows = ClickWindows(BoundsOptions(pair=1))
    trained(windows, [("u", "a", 0)])
    assert why(windows, [("u", "a", 1), ("u", "a", HOUR_MS), ("u", "a", HOUR_MS - 1)]) == [PAIR, "", PAIR]
    trained(windows, [("u", "a", 2_000_000 * HOUR_MS)])  # a time far ahead fills its own window
    assert why(windows, [("u", "a", 1), ("u", "a", HOUR_MS)]) == [PAIR, ""]


def test_counts_that_are_read_again_are_the_same_and_folding_keeps_them() -> None:
    first, again = ClickWindows(BoundsOptions()), ClickWindows(BoundsOptions())
    notes = []
    for hour in (3, 1, 2, 3):
        clicks = [(f"u{n % 5}", f"i{n % 3}", hour * HOUR_MS + n) for n in range(20)]
        risen = first.risen(clicks[-1][2], [("i1", 4), ("i2", -1), ("i0", 0)])
        notes.append((first.counted(*columns(clicks)), risen))
        first.restore(*notes[-1])
    for counted, risen in notes:
        again.restore(counted, risen)
    folded = ClickWindows(BoundsOptions())
    folded.restore(**first.folded())
    assert first.folded() == again.folded() == folded.folded()
    assert folded.rises(["i1"], [3 * HOUR_MS], 2) == first.rises(["i1"], [3 * HOUR_MS], 2)


def test_what_as_many_users_clicked_as_the_last_of_a_list_may_be_in_every_list() -> None:
    windows = ClickWindows(BoundsOptions(item_share=0.25))
    clicks = [(f"u{n}", item, 0) for item, users in (("a", 40), ("b", 20), ("c", 10), ("d", 5)) for n in range(users)]
    trained(windows, clicks)
    rises = windows.rises(["a", "b", "c", "d"], [0], 3)
    assert [rises[item].explained for item in "bcd"] == [1.375, 1.0, 0.5]


def test_an_item_that_is_alone_in_its_window_is_explained_by_nothing() -> None:
    windows = ClickWindows(BoundsOptions())
    trained(windows, [(f"u{n}", "pushed", 0) for n in range(40)])
    windows.restore([[]] * 4, windows.risen(0, [("pushed", 100)]))
    rise = windows.rises(["pushed"], [0], 20)["pushed"]
    assert (rise.lists, rise.positives, rise.explained) == (100, 40, 0.0)
