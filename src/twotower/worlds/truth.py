"""How good lists are by a simulated world's truth, beside the judgement by its log.

A log knows of an item only if it was shown, so a list of good items that were never shown scores nothing there.

B users, K candidates of a list, P places of a page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from twotower.channels.retriever import Retriever
from twotower.evaluate.held_out import read_held_out
from twotower.evaluate.holdout import held_out, ranked
from twotower.evaluate.metrics import PerUser, difference, summarise
from twotower.evaluate.options import EvaluateOptions
from twotower.samples.read import Samples
from twotower.schema import columns as c
from twotower.worlds.arrays import Bools, Floats, Ints
from twotower.worlds.world import NOTHING, Requests, World

WANTED: Final = 50
"""How many of the items that a user likes best are looked for."""
PAGE: Final = 8
"""Places of the page whose clicks are expected."""
BEST: Final = "best"
"""In a report: what could be had at most."""


def evaluate_by_truth(
    samples: Samples,
    workspace: Path,
    world: World,
    channels: Sequence[Retriever],
    options: EvaluateOptions,
    seed: int = 0,
) -> dict[str, Any]:
    """True recall and expected clicks of channels, for the users of the hold-out when they first click in it.

    Lists and arguments are those of `evaluate`; the workspace was simulated in this world.

    Returns:
        By channel, and for `best`, the best possible lists: `true_recall@k` and `page_clicks`, each
        `{"value", "ci95"}`, of baselines also `difference` of the judged channel to them; besides `users`, and `wanted`
        and `page`, their sizes.
    """
    asked = held_out(workspace, samples, options.context)
    rows = asked.user_rows
    user = world.user_rows(samples.users.ids.take(pa.array(rows)))
    ts_ms = first_times(workspace / "holdout.parquet", world)[user]
    item = world.item_rows(samples.items.ids)
    clicked = clicked_by(samples, world, item)
    requests = Requests(np.arange(len(user)), user, ts_ms, np.zeros(len(user), np.int64))
    most = min(max(options.k), len(samples.items))
    lists = {BEST: world.top(user, ts_ms, most, clicked)}
    for channel in channels:
        found = ranked(samples, channel, rows, most, asked.context)
        lists[channel.name] = np.where(found == NOTHING, NOTHING, item[found])
    values = {name: true_recall(world, user, ts_ms, found, options.k, WANTED, clicked) for name, found in lists.items()}
    for name, found in lists.items():
        values[name]["page_clicks"] = page_clicks(world, requests, found[:, :PAGE])
    report: dict[str, Any] = {"users": len(user), "wanted": WANTED, "page": PAGE}
    judged = channels[0].name
    for name, of in values.items():
        figures = summarise(PerUser(of), options.bootstrap, seed)
        report[name] = {metric: figure.report() for metric, figure in figures.items()}
        if name not in (judged, BEST):
            for metric, theirs in of.items():
                between = difference(values[judged][metric], theirs, options.bootstrap, seed)
                report[name][metric]["difference"] = between.report()
    return report


def first_times(holdout: Path, world: World) -> Ints:
    """(U,) the time of each user's first held-out click."""
    table = read_held_out(holdout, [c.USER_ID, c.TS_MS]).rows
    first = np.full(len(world.truth.people.taste), np.iinfo(np.int64).max)
    np.minimum.at(first, world.user_rows(table[c.USER_ID]), table[c.TS_MS].to_numpy())
    return first


def clicked_by(samples: Samples, world: World, item: Ints) -> Bools:
    """(U, N) what each user of the world has clicked."""
    clicked = np.zeros((len(world.truth.people.taste), len(world.truth.catalogue.vector)), np.bool_)
    user = np.repeat(world.user_rows(samples.users.ids), np.diff(samples.clicks.indptr))
    clicked_item = item[samples.clicks.item_row]
    known = clicked_item != NOTHING  # a server's own items are not of the world
    clicked[user[known], clicked_item[known]] = True
    return clicked


def true_recall(
    world: World,
    user: Ints,
    ts_ms: Ints,
    lists: Ints,
    ks: Sequence[int],
    n: int = WANTED,
    clicked: Bools | None = None,
) -> dict[str, Floats]:
    """`true_recall@k` of each user: the share of the n items that they like best then which are among the first k.

    Those are the n of greatest utility among the items available at that time which the user has not clicked.

    Args:
        world: with a horizon beyond these times.
        user: (B,) rows of users.
        ts_ms: (B,) milliseconds since 1970.
        lists: (B, K) rows of the world's items, best first, -1 = the list has ended.
        ks: cut-offs, at most K.
        n: as above.
        clicked: (U, N) items that are left out; absent = none.
    """
    wanted = world.top(user, ts_ms, n, clicked)
    size = len(world.truth.catalogue.birth_day)
    owner = np.arange(len(user))[:, None] * size
    hit = np.isin(owner + lists, (owner + wanted)[wanted != NOTHING]) & (lists != NOTHING)
    possible = np.maximum((wanted != NOTHING).sum(axis=1), 1)
    return {f"true_recall@{k}": hit[:, :k].sum(axis=1) / possible for k in ks}


def page_clicks(world: World, requests: Requests, pages: Ints) -> Floats:
    """The expected number of clicks on each page (R,), for pages of items (R, P), -1 = nothing."""
    expected: Floats = world.chances(requests, pages).sum(axis=1)
    return expected
