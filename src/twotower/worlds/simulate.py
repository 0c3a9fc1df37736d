"""A simulated log: the world of `world` met by a recommender of its own.

That recommender has the whole funnel: sources of candidates, a pre-ranker that sees the truth through much noise, a
ranker that sees it through less, a page of a few positions. So its log has all five outcomes, and the best possible
retrieval is known. The same seed gives the same bytes: no sum is split among threads.

Dimensions: U users, N items, C categories, R requests of one step, K candidates of a request.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.datasets.holdout import HoldoutRule, split
from twotower.datasets.tables import Tables
from twotower.datasets.workspace import ITEMS, MANIFEST, USERS, ImportReport, write_workspace
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, ClockMs, now_ms
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.files import read_json, whole_file, write_json
from twotower.schema.tables import joined_events
from twotower.worlds.arrays import Bools, Floats, Ints, joined
from twotower.worlds.inhabitants import NAMES, strings, zipf
from twotower.worlds.options import WorldOptions
from twotower.worlds.world import (
    CONTEXT,
    FIRST_DAY_MS,
    NOTHING,
    SCENES,
    Preferences,
    Requests,
    World,
    date_of,
    make_world,
    rng_of,
)

SOURCE: Final = "simulate"
"""Of a workspace, in its manifest."""
HORIZON: Final = "horizon"
"""In the manifest: the first day of which nothing is in the tables, if they grew beyond the log."""

# The funnel: how many candidates a source gives, and how many go on.
CHANNELS: Final = ("same_category", "popular", "random", "new_items")
SOURCE_SIZES: Final = (32, 14, 10, 4)
PRE_RANK_NOISE: Final = 1.5
PRE_RANK_KEEPS: Final = 24
RANK_NOISE: Final = 0.5
RANK_TAIL: Final = 14
"""Of the 24 in the ranker's order, those after the 14th are its tail."""
SHOWN: Final = 8
LOGGED_PRE_RANK_REJECTED: Final = 5
LOGGED_RANK_REJECTED: Final = 3
LOGGED_NOT_SHOWN: Final = 2

POPULARITY_EXPONENT: Final = 1.0
POPULARITY_NOISE: Final = 0.3
"""Popularity is the rank of the quality and of this much chance."""
FLATTENING: Final = 0.6
"""Power of the weight with which an item is drawn within its category: flatter than by popularity."""
STEP: Final = 4096
"""Requests simulated at once: bounds the memory of a step, and is part of what a seed means."""

_POPULARITY, _FUNNEL = 100, 101
"""What is drawn, beside the parts of the world."""


@dataclass(frozen=True)
class Simulation:
    """A log and the world behind it."""

    world: World
    users: pa.Table
    """See `World.users`."""
    items: pa.Table
    """See `World.items`; ages are those of the last day."""
    events: pa.Table
    """Joined events, then `position`, `score` (the ranker's), `channel`, and the context `hour`, `scene`."""


@dataclass(frozen=True)
class _Rows:
    """Logged items of some requests; every field has the same length."""

    request: Ints
    item: Ints
    stage: Ints
    """Row in `c.OUTCOMES`."""
    position: Ints
    """From 1; 0 = not shown."""
    score: Floats
    """The ranker's; NaN where it never saw the item."""
    channel: Ints
    """Row in `CHANNELS`."""
    click_delay_ms: Ints
    """0 = no click."""


@dataclass(frozen=True)
class _Shelf:
    """The items of one day, laid out for weighted draws."""

    by_category: Ints
    """(alive,) rows of items, category by category."""
    edges: Floats
    """(C + 1,) where a category begins and ends on the scale of `cumulative`."""
    cumulative: Floats
    """(alive,) running sum of the weights within categories."""
    popular: Floats
    """(alive,) running sum of the weights of `by_category` as popular items, ending in 1."""
    newest: Ints
    """Rows of the items that appeared last, one in twenty."""


@dataclass(frozen=True)
class Arrivals:
    """How many rows came into the tables of a workspace."""

    users: int
    items: int


def simulate(options: WorldOptions) -> Simulation:
    """Simulate a world from 2026-01-05 on, and what its own recommender showed.

    A table of users by items (one byte each) remembers clicks, which bounds the size of a world. A request logs up to
    18 rows.

    Raises:
        ConfigError: nobody made a request.

    >>> simulation = simulate(WorldOptions(users=20, items=100, days=2))
    >>> simulation.users.num_rows, simulation.items.num_rows, simulation.events.column_names[:3]
    (20, 100, ['event_seq', 'request_id', 'user_id'])
    """
    world, days = make_world(options), options.days
    requests = joined([world.requests(day) for day in range(days)])
    if not len(requests):
        raise ConfigError(f"users={options.users}, days={days}: nobody made a request, raise either")
    rows = _run_funnel(requests, world, days)
    user_table, item_table = world.users(days - 1), world.items(days - 1)
    events = _event_table(requests, rows, user_table[c.USER_ID], item_table[c.ITEM_ID])
    return Simulation(world, user_table, item_table, events)


def simulate_workspace(path: Path, options: WorldOptions, clock_ms: ClockMs = now_ms) -> ImportReport:
    """Simulate a world and write it as a workspace, a folder that is empty or absent, whose last day is held out.

    Raises:
        ConfigError: fewer days, a world that ends later than now, nobody made a request, or something stands at `path`.
        DataError: the world is so small that nobody clicked before the last day, or on it.
    """
    days = options.days
    if days < 2:
        raise ConfigError(f"days={days}: the last day is held out, so simulate at least 2")
    past = (clock_ms() - FIRST_DAY_MS) // DAY_MS
    if days > past:
        raise ConfigError(
            f"days={days}: a world begins on {date_of(0)}, and this one would end later than now, where no stage takes "
            f"events: simulate at most {max(0, past)} days, and look at the clock of this machine"
        )
    simulation = simulate(options)
    tables = Tables(SOURCE, simulation.users, simulation.items, simulation.events)
    return write_workspace(path, tables, split(tables, HoldoutRule("since", day=date_of(days - 1))), asdict(options))


def world_of(workspace: Path, horizon: int | None = None) -> World | None:
    """The world that a workspace was simulated in, made again; None where it holds other data.

    It knows at least the days of the log and of what came into the tables later, and those before a given `horizon`.

    Raises:
        DataError: it was simulated by a release with other worlds.
    """
    manifest = read_json(workspace / MANIFEST) if (workspace / MANIFEST).exists() else {}
    if manifest.get("source") != SOURCE:
        return None
    if manifest["arguments"].keys() != asdict(WorldOptions()).keys():
        raise DataError(f"{workspace} was simulated by another release: simulate it again")
    options = WorldOptions(**manifest["arguments"])
    return make_world(options, max(horizon or 0, manifest.get(HORIZON, 0), options.days))


def add_arrivals(workspace: Path, world: World, day: int) -> Arrivals:
    """Write all users and items that are there by the end of a day (from 0) into the tables of a workspace.

    Ages become those of that day. Other changes of these tables are lost.
    """
    manifest = read_json(workspace / MANIFEST)
    before = max(manifest.get(HORIZON, 0), world.options.days)
    if day < before:
        return Arrivals(0, 0)
    for name, table in ((USERS, world.users(day)), (ITEMS, world.items(day))):
        with whole_file(workspace / name) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    write_json(workspace / MANIFEST, {**manifest, HORIZON: day + 1})
    return Arrivals(
        world.users(day).num_rows - world.users(before - 1).num_rows,
        world.items(day).num_rows - world.items(before - 1).num_rows,
    )


def _run_funnel(requests: Requests, world: World, days: int) -> _Rows:
    """Run all requests, in steps of different users' requests, so that a step knows its users' earlier clicks."""
    truth, rng = world.truth, rng_of(world.options.seed, _FUNNEL)
    weight = _popularity(world)
    clicked = np.zeros((len(truth.people.taste), len(truth.catalogue.vector)), dtype=np.bool_)
    day_of = (requests.ts_ms - FIRST_DAY_MS) // DAY_MS
    parts = []
    for day in range(days):
        morning_ms = FIRST_DAY_MS + day * DAY_MS
        taste = truth.taste_at(np.arange(len(truth.people.taste)), morning_ms)
        liking = np.exp(np.einsum("ud,cd->uc", taste, truth.centre))
        category_edges = np.cumsum(liking, axis=1) / liking.sum(axis=1, keepdims=True)  # (U, C)
        alive = world.alive(day)
        shelf = _shelf(truth, weight[alive] * np.exp(truth.freshness_at(alive, morning_ms)), alive)
        of_day = np.flatnonzero(day_of == day)
        turn = _turn(requests.user[of_day])
        for number in range(int(turn.max(initial=-1)) + 1):
            group = of_day[turn == number]
            for begin in range(0, len(group), STEP):
                step = group[begin : begin + STEP]
                rows = _one_step(step, requests.take(step), world, shelf, category_edges, clicked, rng)
                hit = rows.click_delay_ms > 0
                clicked[requests.user[rows.request[hit]], rows.item[hit]] = True
                parts.append(rows)
    return joined(parts)


def _popularity(world: World) -> Floats:
    """How often an item is offered (N,): Zipf's law over the ranks of a noisy quality."""
    quality = world.truth.catalogue.quality
    noisy = quality + POPULARITY_NOISE * rng_of(world.options.seed, _POPULARITY).standard_normal(len(quality))
    rank = np.argsort(np.argsort(-noisy, kind="stable"), kind="stable")
    return zipf(len(quality), POPULARITY_EXPONENT)[rank]


def _turn(user: Ints) -> Ints:
    """How often each user stands earlier in a column.

    >>> _turn(np.array([5, 3, 5, 5])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(user, kind="stable")
    rank = np.arange(len(user))
    begins = np.diff(user[order], prepend=-1) != 0
    turn = np.empty(len(user), np.int64)
    turn[order] = rank - np.maximum.accumulate(np.where(begins, rank, 0))
    return turn


def _shelf(truth: Preferences, weight: Floats, alive: Ints) -> _Shelf:
    newest = alive[np.lexsort((alive, -truth.catalogue.birth_day[alive]))][: max(1, len(alive) // 20)]
    order = np.argsort(truth.catalogue.category[alive], kind="stable")
    by_category, weight = alive[order], weight[order]
    cumulative = np.cumsum(weight**FLATTENING)
    last = np.cumsum(np.bincount(truth.catalogue.category[by_category], minlength=len(NAMES))) - 1
    popular = np.cumsum(weight)
    return _Shelf(by_category, np.append(0.0, cumulative[last]), cumulative, popular / popular[-1], newest)


def _candidates(user_edges: Floats, shelf: _Shelf, rng: np.random.Generator) -> Ints:
    """Draw candidates (R, K), source by source in the order of `CHANNELS`; an item may come more than once."""
    many = len(user_edges)
    liked, popular, random, new = SOURCE_SIZES
    category = (rng.random((many, liked, 1)) > user_edges[:, None, :-1]).sum(axis=2)
    low, high = shelf.edges[category], shelf.edges[category + 1]
    of_category = np.searchsorted(shelf.cumulative, low + rng.random((many, liked)) * (high - low), side="right")
    of_all = np.searchsorted(shelf.popular, rng.random((many, popular)), side="right")
    any_item = rng.integers(0, len(shelf.by_category), (many, random))
    rows = np.minimum(np.concatenate([of_category, of_all, any_item], axis=1), len(shelf.by_category) - 1)
    newest = shelf.newest[rng.integers(0, len(shelf.newest), (many, new))]
    return np.concatenate([shelf.by_category[rows], newest], axis=1)


def _one_step(
    step: Ints,
    requests: Requests,
    world: World,
    shelf: _Shelf,
    category_edges: Floats,
    clicked: Bools,
    rng: np.random.Generator,
) -> _Rows:
    """Run requests of different users, numbered by `step`, through sources, pre-ranker, ranker, page and clicks."""
    item, channel, real, kept, score = _ranked(requests, world.truth, shelf, category_edges, rng)

    # the page: the first ones that the user has not clicked yet
    free = kept & ~clicked[requests.user[:, None], item]
    place = np.cumsum(free, axis=1)
    shown = free & (place <= SHOWN)
    position = np.where(shown, place, 0)
    pages = np.full((len(item), SHOWN), NOTHING)
    pages[np.nonzero(shown)[0], place[shown] - 1] = item[shown]
    delay = np.where(shown, np.take_along_axis(world.clicks(requests, pages), np.maximum(position, 1) - 1, axis=1), 0)

    rejected = real & ~kept
    tail = kept & ~shown & (np.arange(item.shape[1]) >= RANK_TAIL)
    not_shown = kept & ~shown & ~tail
    logged = (
        shown
        | _some(rejected, LOGGED_PRE_RANK_REJECTED, rng)
        | _some(tail, LOGGED_RANK_REJECTED, rng)
        | _some(not_shown, LOGGED_NOT_SHOWN, rng)
    )
    stage = np.select([rejected, tail, not_shown, delay > 0], [0, 1, 2, 4], default=3)
    return _Rows(
        request=np.broadcast_to(step[:, None], item.shape)[logged],
        item=item[logged],
        stage=stage[logged],
        position=position[logged],
        score=score[logged],
        channel=channel[logged],
        click_delay_ms=delay[logged],
    )


def _ranked(
    requests: Requests, truth: Preferences, shelf: _Shelf, category_edges: Floats, rng: np.random.Generator
) -> list[npt.NDArray[Any]]:
    """Candidates in the order of pre-ranker and ranker.

    Returns:
        (R, K) each: items, their channels, whether an item stands there for the first time, whether the pre-ranker
        kept it, and the ranker's score.
    """
    user = requests.user[:, None]
    item = _candidates(category_edges[requests.user], shelf, rng)
    channel = np.broadcast_to(np.repeat(np.arange(len(CHANNELS)), SOURCE_SIZES), item.shape)
    utility = truth.utility(user, item, requests.ts_ms[:, None], requests.scene[:, None])

    # the pre-ranker; an item drawn twice counts once, for its first source
    real = ~_repeated(item)
    view = utility + PRE_RANK_NOISE * rng.standard_normal(item.shape)
    order = np.argsort(np.where(real, -view, np.inf), axis=1, kind="stable")
    item, channel, utility, real = _reordered(order, item, channel, utility, real)
    kept = real & (np.arange(item.shape[1]) < PRE_RANK_KEEPS)

    # the ranker orders what is left; the others stay behind it
    score = np.where(kept, utility + RANK_NOISE * rng.standard_normal(item.shape), np.nan)
    order = np.argsort(np.where(kept, -score, np.inf), axis=1, kind="stable")
    return _reordered(order, item, channel, real, kept, score)


def _event_table(requests: Requests, rows: _Rows, user_id: pa.ChunkedArray, item_id: pa.ChunkedArray) -> pa.Table:
    """The log: requests in order, each as far as its items came, the page by position."""
    order = np.lexsort((rows.item, rows.position, np.minimum(rows.stage, c.OUTCOMES.index(c.IMPRESSED)), rows.request))
    request, click_delay_ms, position = rows.request[order], rows.click_delay_ms[order], rows.position[order]
    score = np.round(rows.score[order], 4).astype(np.float32)
    ts_ms = requests.ts_ms[request]
    request_id = pa.array([f"r{number:08d}" for number in range(len(requests.ts_ms))], pa.string())
    further = {c.POSITION: pa.int32(), c.SCORE: pa.float32(), c.CHANNEL: pa.string(), **CONTEXT}
    schema = pa.schema([*joined_events(user_id.type, item_id.type), *pa.schema(further)])
    return pa.table(
        {
            c.EVENT_SEQ: np.arange(len(order)),
            c.REQUEST_ID: request_id.take(pa.array(request)),
            c.USER_ID: user_id.combine_chunks().take(pa.array(requests.user[request])),
            c.ITEM_ID: item_id.combine_chunks().take(pa.array(rows.item[order])),
            c.REQUEST_TS_MS: ts_ms,
            c.CLICK_TS_MS: pa.array(ts_ms + click_delay_ms, pa.int64(), mask=click_delay_ms == 0),
            c.OUTCOME: strings(c.OUTCOMES, rows.stage[order]),
            c.WEIGHT: pa.nulls(len(order), pa.float32()),
            c.POSITION: pa.array(position, pa.int32(), mask=position == 0),
            c.SCORE: pa.array(score, pa.float32(), mask=np.isnan(score)),
            c.CHANNEL: strings(CHANNELS, rows.channel[order]),
            "hour": requests.hour[request],
            "scene": strings(SCENES, requests.scene[request]),
        },
        schema=schema,
    )


def _reordered(order: Ints, *grids: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [np.take_along_axis(grid, order, axis=1) for grid in grids]


def _repeated(grid: Ints) -> Bools:
    """Which values stand earlier in their row already, (R, K).

    >>> _repeated(np.array([[5, 3, 5, 5]])).tolist()
    [[False, False, True, True]]
    """
    order = np.argsort(grid, axis=1, kind="stable")
    inner = np.diff(np.take_along_axis(grid, order, axis=1), axis=1, prepend=-1) == 0
    repeated = np.empty(grid.shape, dtype=np.bool_)
    np.put_along_axis(repeated, order, inner, axis=1)
    return repeated


def _some(mask: Bools, count: int, rng: np.random.Generator) -> Bools:
    """At most `count` of the true ones of each row, drawn evenly, (R, K)."""
    key = np.where(mask, rng.random(mask.shape), np.inf)
    chosen = np.zeros_like(mask)
    np.put_along_axis(chosen, np.argsort(key, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen & mask
