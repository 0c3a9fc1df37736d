"""A simulated world: users with hidden tastes, a catalogue, and the log of the recommender that they met.

The recommender of this world has the whole funnel: sources of candidates, a pre-ranker that sees the truth through much
noise, a ranker that sees it through less, a page of a few positions. So its log has all five outcomes, and what a
retriever could have known at best (`Truth`) is known too. The same seed gives the same rows to the byte; nothing is
multiplied by a library that splits its sums among threads.

Dimensions: U users, N items, C categories, D the hidden vectors, R requests of one step, K candidates of a request.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.datasets.holdout import Since, split
from twotower.datasets.tables import DAY_MS, Tables
from twotower.datasets.workspace import ImportReport, write_workspace
from twotower.schema import columns as c
from twotower.schema.errors import ConfigError
from twotower.schema.tables import joined_events

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


FIRST_DAY_MS: Final = 1_767_571_200_000
"""2026-01-05T00:00:00Z, a Monday."""
HOUR_MS: Final = 3_600_000

FEWEST_ITEMS: Final = 100
"""A request draws 60 candidates; with fewer items than this there is nothing to choose from."""

# The vectors.
DIMENSION: Final = 16
TASTE_NORM: Final = 4.5
QUALITY_STD: Final = 0.3
PRICE_EFFECT: Final = -0.15
MOOD_STD: Final = 0.5

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

# The click.
CLICK_BIAS: Final = -3.6
CLICK_NOISE: Final = 0.5
POSITION_EXPONENT: Final = 0.3

POPULARITY_EXPONENT: Final = 1.0
FLATTENING: Final = 0.6
"""Power of the weight with which an item is drawn within its category: flatter than by popularity."""
SESSIONS_A_DAY: Final = 0.6
REQUESTS_A_SESSION: Final = 2.7
STEP: Final = 4096
"""Requests simulated at once: bounds the memory of a step, and is part of what a seed means."""

SCENES: Final = ("home", "detail", "search")
SCENE_EFFECT: Final = (0.0, 0.2, 0.5)
DEVICES: Final = ("phone", "tablet", "desktop", "tv")
DEVICE_SHARES: Final = (0.62, 0.13, 0.2, 0.05)
SCENES_OF_DEVICE: Final = ((0.7, 0.22, 0.08), (0.75, 0.18, 0.07), (0.5, 0.28, 0.22), (0.9, 0.08, 0.02))
GENDERS: Final = ("female", "male", "other")
GENDER_SHARES: Final = (0.49, 0.47, 0.04)
AGE_BANDS: Final = (25, 35, 45, 60)
"""Lower edges of the second band and the following ones."""
CITIES: Final = _words(
    "Alderhaven Brackwater Caldermouth Dunmere Eastfold Farrowgate Glimmerford Harrowick Ironbridge Jasperton "
    "Kestrelby Larkhollow Mossvale Northmoor Oakenshaw Pinecrest Quarrydale Ravensport Silverton Thornbury"
)
VOLUME_BY_HOUR: Final = (
    *(12, 7, 4, 3, 3, 5, 12, 26, 38, 36, 33, 35),
    *(46, 44, 36, 34, 37, 45, 58, 70, 80, 84, 62, 30),
)  # fmt: skip

CATEGORIES: Final = {
    "astronomy": (
        "comet telescope orbit nebula eclipse starmap planet observatory",
        "planets telescopes galaxies moon rockets sky-charts meteors physics",
    ),
    "baking": (
        "loaf pastry oven dough tart biscuit sourdough crumb",
        "bread cakes sourdough chocolate pies gluten-free yeast icing",
    ),
    "chess": (
        "gambit endgame rook tournament opening bishop checkmate pawn",
        "openings endgames tactics blitz puzzles grandmasters strategy history-of-chess",
    ),
    "cinema": (
        "scene director camera script matinee trailer premiere reel",
        "drama comedy documentary animation noir directors soundtracks short-films",
    ),
    "cycling": (
        "saddle climb peloton gravel sprocket descent wheel commute",
        "road gravel mountain commuting bike-repair touring racing e-bikes",
    ),
    "football": (
        "derby striker penalty keeper transfer league corner kickoff",
        "league cup goals transfers training youth women referees",
    ),
    "gardening": (
        "orchard seedling compost hedge greenhouse tulip pruning meadow",
        "vegetables roses compost balcony trees herbs lawns bees",
    ),
    "history": (
        "empire archive castle treaty harbour chronicle market voyage",
        "medieval antiquity explorers castles letters trade maps museums",
    ),
    "music": (
        "melody chorus guitar encore rhythm vinyl concert piano",
        "jazz folk classical electronic guitar piano live singing",
    ),
    "savings": (
        "budget ledger pension mortgage dividend receipt coin loan",
        "budgets pensions funds housing taxes insurance side-jobs banking",
    ),
    "travel": (
        "harbour railway island hostel border passport lagoon road",
        "islands trains mountains cities hostels food packing photography",
    ),
    "woodwork": (
        "chisel bench joint plank lathe cabinet varnish saw",
        "joinery carving tools furniture oak finishing turning toys",
    ),
}
"""For each category the nouns of its titles, and its tags."""
SHARED_TAGS: Final = _words("beginner expert budget weekend family quick classic")
ADJECTIVES: Final = _words(
    "quiet golden first forgotten patient hidden crooked honest late bright stubborn little northern slow borrowed "
    "winding humble curious silver early wandering second simple restless"
)
ENDINGS: Final = _words(
    "at dawn|by the river|in winter|for two|after the rain|without hurry|on a small table|in ten steps|under the hill|"
    "from memory|of the north|against the clock",
    "|",
)
FIRST_NAMES: Final = _words("Ada Bruno Clara Dimo Elin Faro Greta Hugo Iris Jonas Kaja Levi Mira Nilo Orla Pavel")
LAST_NAMES: Final = _words(
    "Ashgrove Birchley Coldwell Dovetail Elmhurst Fennick Gorsedale Hartwood Inglemoor Juniper Kettlewell Lindqvale "
    "Marlowe Netherby Osmund Pennyfold Quillon Rookwood Stillwater Tamsin Underhay Vanebrook Wexcombe Yarrow"
)


@dataclass(frozen=True)
class Truth:
    """What no log tells: the rows are those of the world's `users` and `items`."""

    taste: Floats
    """(U, D), each of norm `TASTE_NORM`."""
    item_vector: Floats
    """(N, D), each of norm 1."""
    quality: Floats
    """(N,) what everyone likes about an item."""
    category: Ints
    """(N,) row in the sorted names of the categories."""
    mood: Floats
    """(4, C) what a quarter of the day adds to a category."""
    start_day: Ints
    """(U,) the day, from 0, on which a user first may come."""
    birth_day: Ints
    """(N,) the day on which an item appears; negative if before the first."""

    def utility(self, user: Ints, item: Ints, hour: Ints, scene: Ints) -> Floats:
        """How much a user likes an item in a context: taste . item + quality + mood + scene.

        The arguments broadcast against each other.

        Args:
            user: rows of users.
            item: rows of items.
            hour: 0 to 23, UTC.
            scene: rows in `SCENES`.

        Returns:
            Utilities, in the log-odds of a click, of the broadcast shape.
        """
        # einsum runs in numpy's own single-threaded loop, so that the sums do not depend on a thread count
        affinity = np.einsum("...d,...d->...", self.taste[user], self.item_vector[item])
        mood = self.mood[np.asarray(hour) // 6, self.category[item]]
        total: Floats = affinity + self.quality[item] + mood + np.asarray(SCENE_EFFECT)[scene]
        return total


@dataclass(frozen=True)
class World:
    """The tables of a simulated world and the truth behind them."""

    users: pa.Table
    """`user_id` (int64), `age`, `gender`, `city`, `device`; some features are null."""
    items: pa.Table
    """`item_id` (string), `title`, `category`, `tags`, `author`, `price`, `age_days` on the last day."""
    events: pa.Table
    """Joined events, then `position`, `score` (the ranker's), `channel`, and the context `hour`, `scene`."""
    truth: Truth
    """What no log tells."""


@dataclass(frozen=True)
class _Requests:
    """Requests in the order of time; users break ties."""

    user: Ints
    """(requests,) rows of users."""
    ts_ms: Ints
    """(requests,) strictly rising within a user."""
    scene: Ints
    """(requests,) rows in `SCENES`."""
    day: Ints
    """(requests,) from 0."""
    turn: Ints
    """(requests,) how many requests the user made earlier on that day."""


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
class _Catalogue:
    table: pa.Table
    vector: Floats
    """(N, D)"""
    quality: Floats
    """(N,)"""
    category: Ints
    """(N,)"""
    birth_day: Ints
    """(N,)"""
    weight: Floats
    """(N,) how often an item is offered, by Zipf's law."""


@dataclass(frozen=True)
class _People:
    table: pa.Table
    taste: Floats
    """(U, D)"""
    start_day: Ints
    """(U,)"""
    activity: Floats
    """(U,) sessions a day."""
    device: Ints
    """(U,) rows in `DEVICES`."""


def simulate(users: int, items: int, days: int, seed: int) -> World:
    """Simulate a world from 2026-01-05 on.

    A table of users by items (one byte each) remembers clicks, which bounds the size of a world.

    Args:
        users: number of users; each makes about 11 requests a week, and a request logs up to 18 rows.
        items: number of items, at least 100.
        days: number of days, at least 1.
        seed: not negative; the same seed and sizes give the same rows.

    Raises:
        ConfigError: a size or a seed that is too small.

    >>> world = simulate(users=20, items=100, days=2, seed=0)
    >>> world.users.num_rows, world.items.num_rows, world.events.column_names[:3]
    (20, 100, ['event_seq', 'request_id', 'user_id'])
    """
    smallest = {"users": (users, 1), "items": (items, FEWEST_ITEMS), "days": (days, 1), "seed": (seed, 0)}
    for name, (value, least) in smallest.items():
        if value < least:
            raise ConfigError(f"{name}={value}: a simulated world takes {name} of at least {least}")
    # one generator a part: another number of users leaves the catalogue as it is
    shared, of_items, of_users, of_requests, of_funnel = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(5)
    )
    centres = _unit(shared.standard_normal((len(CATEGORIES), DIMENSION)))
    mood = MOOD_STD * shared.standard_normal((4, len(CATEGORIES)))

    catalogue = _catalogue(items, days, centres, of_items)
    people = _people(users, days, centres, of_users)
    truth = Truth(
        taste=people.taste,
        item_vector=catalogue.vector,
        quality=catalogue.quality,
        category=catalogue.category,
        mood=mood,
        start_day=people.start_day,
        birth_day=catalogue.birth_day,
    )
    requests = _requests(people, days, of_requests)
    rows = _run_funnel(requests, truth, centres, catalogue.weight, of_funnel)
    events = _event_table(requests, rows, people.table.column(c.USER_ID), catalogue.table.column(c.ITEM_ID))
    return World(people.table, catalogue.table, events, truth)


def simulate_workspace(path: Path, users: int, items: int, days: int, seed: int) -> ImportReport:
    """Simulate a world and write it as a workspace whose last day is held out.

    Args:
        path: the workspace, a folder that is empty or absent.
        users: see `simulate`.
        items: see `simulate`.
        days: see `simulate`; at least 2, because the last one is held out.
        seed: see `simulate`.

    Raises:
        ConfigError: a size or a seed that is too small, or something stands at `path`.
        DataError: the world is so small that nobody clicked before the last day, or on it.
    """
    if days < 2:
        raise ConfigError(f"days={days}: the last day is held out, so simulate at least 2")
    world = simulate(users, items, days, seed)
    tables = Tables(source="simulate", users=world.users, items=world.items, events=world.events)
    last_day = datetime.datetime.fromtimestamp(FIRST_DAY_MS / 1000, datetime.UTC).date() + datetime.timedelta(days - 1)
    arguments = {"users": users, "items": items, "days": days, "seed": seed}
    return write_workspace(path, tables, split(tables, Since(last_day)), arguments)


def _catalogue(items: int, days: int, centres: Floats, rng: np.random.Generator) -> _Catalogue:
    """Items with features that tell much of their vectors, but not all."""
    names = sorted(CATEGORIES)
    nouns = np.array([CATEGORIES[name][0].split() for name in names])
    own_tags = np.array([CATEGORIES[name][1].split() for name in names])
    category = rng.choice(len(names), items, p=_zipf(len(names), 0.5))
    category[: len(names)] = np.arange(len(names))  # no category is empty ...
    birth_day = np.where(
        rng.random(items) < 0.15, rng.integers(0, days, items), -1 - rng.exponential(120.0, items).astype(np.int64)
    )
    birth_day[: len(names)] = -400  # ... on any day

    # authors write in one category; the first ones of a category write most
    authors_each = max(2, items // (8 * len(names)))
    author = category + len(names) * rng.choice(authors_each, items, p=_zipf(authors_each, 0.8))
    author_vector = _unit(rng.standard_normal((authors_each * len(names), DIMENSION)))

    # one to three tags of the category, and for some items one that all categories share
    tag_vector = _unit(rng.standard_normal((*own_tags.shape, DIMENSION)))
    order = np.argsort(rng.random((items, own_tags.shape[1])), axis=1, kind="stable")[:, :3]
    has_tag = np.arange(3) < rng.integers(1, 4, items)[:, None]
    of_tags = (tag_vector[category[:, None], order] * has_tag[:, :, None]).sum(axis=1) / has_tag.sum(axis=1)[:, None]
    shared_tag = rng.integers(0, 3 * len(SHARED_TAGS), items)
    shared_vector = np.zeros((3 * len(SHARED_TAGS), DIMENSION))
    shared_vector[: len(SHARED_TAGS)] = _unit(rng.standard_normal((len(SHARED_TAGS), DIMENSION)))

    noise = _unit(rng.standard_normal((items, DIMENSION)))
    vector = _unit(
        centres[category] + 0.5 * of_tags + 0.2 * shared_vector[shared_tag] + 0.5 * author_vector[author] + 0.4 * noise
    )
    log_price = 0.8 * rng.standard_normal(items)
    price = np.round(np.exp(log_price + rng.normal(2.5, 0.5, len(names))[category]), 2)
    quality = QUALITY_STD * rng.standard_normal(items) + PRICE_EFFECT * log_price
    place = np.argsort(np.argsort(-(quality + QUALITY_STD * rng.standard_normal(items)), kind="stable"), kind="stable")

    adjective = rng.integers(0, len(ADJECTIVES), items)
    noun = nouns[category, rng.integers(0, nouns.shape[1], items)]
    ending = rng.integers(0, len(ENDINGS), items)
    tags = [
        "|".join([*mine[:count], *([SHARED_TAGS[shared]] if shared < len(SHARED_TAGS) else [])])
        for mine, count, shared in zip(
            own_tags[category[:, None], order].tolist(), has_tag.sum(axis=1).tolist(), shared_tag.tolist(), strict=True
        )
    ]
    table = pa.table(
        {
            c.ITEM_ID: pa.array([f"i{row:06d}" for row in range(items)], pa.string()),
            "title": pa.array(
                [
                    f"The {ADJECTIVES[first]} {second} {ENDINGS[third]}"
                    for first, second, third in zip(adjective.tolist(), noun.tolist(), ending.tolist(), strict=True)
                ],
                pa.string(),
            ),
            "category": pa.array([names[row] for row in category.tolist()], pa.string()),
            "tags": pa.array(tags, pa.string()),
            "author": pa.array([_author_name(row) for row in author.tolist()], pa.string()),
            "price": pa.array(price, pa.float64(), mask=rng.random(items) < 0.06),
            "age_days": pa.array(days - 1 - birth_day, pa.int64()),
        }
    )
    return _Catalogue(table, vector, quality, category, birth_day, _zipf(items, POPULARITY_EXPONENT)[place])


def _people(users: int, days: int, centres: Floats, rng: np.random.Generator) -> _People:
    """Users whose age, gender and city tell a part of their taste."""
    age = np.clip(np.round(rng.normal(36.0, 13.0, users)), 16, 80).astype(np.int64)
    gender = rng.choice(len(GENDERS), users, p=GENDER_SHARES)
    city = rng.choice(len(CITIES), users, p=_zipf(len(CITIES), 1.0))
    device = rng.choice(len(DEVICES), users, p=DEVICE_SHARES)
    late = rng.random(users) < 0.15
    start_day = np.where(late, rng.integers(0, days, users), 0)
    activity = rng.gamma(1.3, SESSIONS_A_DAY / 1.3, users)

    of_age = _unit(rng.standard_normal((len(AGE_BANDS) + 1, DIMENSION)))[np.searchsorted(AGE_BANDS, age, side="right")]
    of_gender = _unit(rng.standard_normal((len(GENDERS), DIMENSION)))[gender]
    of_city = _unit(rng.standard_normal((len(CITIES), DIMENSION)))[city]
    favourites = rng.integers(0, len(CATEGORIES), (users, 2))
    noise = _unit(rng.standard_normal((users, DIMENSION)))
    taste = TASTE_NORM * _unit(
        0.7 * of_age
        + 0.5 * of_gender
        + 0.4 * of_city
        + 0.8 * centres[favourites[:, 0]]
        + 0.4 * centres[favourites[:, 1]]
        + 0.5 * noise
    )
    table = pa.table(
        {
            c.USER_ID: pa.array(1000 + 7 * np.arange(users), pa.int64()),
            "age": pa.array(age, pa.int64(), mask=rng.random(users) < 0.05),
            "gender": _strings(GENDERS, gender, missing=rng.random(users) < 0.04),
            "city": _strings(CITIES, city),
            "device": _strings(DEVICES, device),
        }
    )
    return _People(table, taste, start_day, activity, device)


def _requests(people: _People, days: int, rng: np.random.Generator) -> _Requests:
    """Sessions by the hourly curve, a few requests each, 20 s to some minutes apart."""
    by_day = rng.poisson(people.activity[:, None] * (np.arange(days) >= people.start_day[:, None]))  # (U, days)
    user, day = (np.repeat(axis, by_day.ravel()) for axis in np.indices(by_day.shape).reshape(2, -1))
    hour = rng.choice(24, len(user), p=np.array(VOLUME_BY_HOUR) / sum(VOLUME_BY_HOUR))
    begin = day * DAY_MS + hour * HOUR_MS + rng.integers(0, HOUR_MS, len(user))

    length = rng.geometric(1.0 / REQUESTS_A_SESSION, len(user))
    session = np.repeat(np.arange(len(user)), length)
    first = np.repeat(np.cumsum(length) - length, length)
    gap = 20_000 + rng.exponential(60_000.0, len(session)).astype(np.int64)
    elapsed = np.cumsum(gap)
    ts_ms = begin[session] + elapsed - elapsed[first]
    user = user[session]
    if not len(user):
        raise ConfigError(f"users={people.table.num_rows}, days={days}: nobody made a request, raise either")

    # strictly rising within a user: a running maximum of time minus rank; a span longer than the log keeps users apart
    order = np.lexsort((ts_ms, user))
    user, ts_ms = user[order], ts_ms[order]
    rank = np.arange(len(user))
    span = int(ts_ms.max()) + len(user)
    ts_ms = np.maximum.accumulate(user * span + ts_ms - rank) - user * span + rank
    inside = ts_ms < days * DAY_MS
    user, ts_ms = user[inside], ts_ms[inside]

    day = ts_ms // DAY_MS
    rank = np.arange(len(user))
    new_group = np.diff(user * (days + 1) + day, prepend=-1) != 0
    turn = rank - np.maximum.accumulate(np.where(new_group, rank, 0))

    scene_edges = np.cumsum(SCENES_OF_DEVICE, axis=1)[people.device[user]]  # (requests, scenes)
    scene = (rng.random((len(user), 1)) > scene_edges[:, :-1]).sum(axis=1)
    order = np.lexsort((user, ts_ms))
    return _Requests(
        user=user[order], ts_ms=FIRST_DAY_MS + ts_ms[order], scene=scene[order], day=day[order], turn=turn[order]
    )


def _run_funnel(requests: _Requests, truth: Truth, centres: Floats, weight: Floats, rng: np.random.Generator) -> _Rows:
    """Run all requests, in steps of different users' requests, so that a step knows its users' earlier clicks."""
    liking = np.exp(np.einsum("ud,cd->uc", truth.taste, centres))
    category_edges = np.cumsum(liking, axis=1) / liking.sum(axis=1, keepdims=True)  # (U, C)
    clicked = np.zeros((len(truth.taste), len(truth.item_vector)), dtype=np.bool_)
    parts = []
    for day in range(int(requests.day.max()) + 1):
        shelf = _shelf(truth, weight, day)
        of_day = np.flatnonzero(requests.day == day)
        for turn in range(int(requests.turn[of_day].max(initial=-1)) + 1):
            group = of_day[requests.turn[of_day] == turn]
            for begin in range(0, len(group), STEP):
                step = group[begin : begin + STEP]
                rows = _one_step(step, requests, truth, shelf, category_edges, clicked, rng)
                hit = rows.click_delay_ms > 0
                clicked[requests.user[rows.request[hit]], rows.item[hit]] = True
                parts.append(rows)
    return _joined(parts)


def _shelf(truth: Truth, weight: Floats, day: int) -> _Shelf:
    alive = np.flatnonzero(truth.birth_day <= day)
    newest = alive[np.lexsort((alive, -truth.birth_day[alive]))][: max(1, len(alive) // 20)]
    by_category = alive[np.argsort(truth.category[alive], kind="stable")]
    cumulative = np.cumsum(weight[by_category] ** FLATTENING)
    last = np.cumsum(np.bincount(truth.category[by_category], minlength=len(CATEGORIES))) - 1
    popular = np.cumsum(weight[by_category])
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
    requests: _Requests,
    truth: Truth,
    shelf: _Shelf,
    category_edges: Floats,
    clicked: Bools,
    rng: np.random.Generator,
) -> _Rows:
    """Run requests of different users through sources, pre-ranker, ranker, page and clicks."""
    user = requests.user[step][:, None]
    hour = (requests.ts_ms[step][:, None] // HOUR_MS) % 24
    scene = requests.scene[step][:, None]
    item = _candidates(category_edges[user[:, 0]], shelf, rng)  # (R, K), as are all grids below
    channel = np.broadcast_to(np.repeat(np.arange(len(CHANNELS)), SOURCE_SIZES), item.shape)
    utility = truth.utility(user, item, hour, scene)

    # the pre-ranker; an item drawn twice counts once, for its first source
    real = ~_repeated(item)
    view = utility + PRE_RANK_NOISE * rng.standard_normal(item.shape)
    order = np.argsort(np.where(real, -view, np.inf), axis=1, kind="stable")
    item, channel, utility, real = _reordered(order, item, channel, utility, real)
    column = np.arange(item.shape[1])
    kept = real & (column < PRE_RANK_KEEPS)

    # the ranker orders what is left; the others stay behind it
    score = np.where(kept, utility + RANK_NOISE * rng.standard_normal(item.shape), np.nan)
    order = np.argsort(np.where(kept, -score, np.inf), axis=1, kind="stable")
    item, channel, utility, real, kept, score = _reordered(order, item, channel, utility, real, kept, score)

    # the page: the first ones that the user has not clicked yet
    free = kept & ~clicked[user, item]
    place = np.cumsum(free, axis=1)
    shown = free & (place <= SHOWN)
    position = np.where(shown, place, 0)
    log_odds = CLICK_BIAS + utility + CLICK_NOISE * rng.standard_normal(item.shape)
    chance = 1.0 / (1.0 + np.exp(-log_odds)) * np.maximum(position, 1) ** -POSITION_EXPONENT
    click = shown & (rng.random(item.shape) < chance)
    delay = 2_000 + 1_500 * position + rng.exponential(10_000.0, item.shape).astype(np.int64)

    rejected = real & ~kept
    tail = kept & ~shown & (column >= RANK_TAIL)
    not_shown = kept & ~shown & ~tail
    logged = (
        shown
        | _some(rejected, LOGGED_PRE_RANK_REJECTED, rng)
        | _some(tail, LOGGED_RANK_REJECTED, rng)
        | _some(not_shown, LOGGED_NOT_SHOWN, rng)
    )
    stage = np.select([rejected, tail, not_shown, click], [0, 1, 2, 4], default=3)
    return _Rows(
        request=np.broadcast_to(step[:, None], item.shape)[logged],
        item=item[logged],
        stage=stage[logged],
        position=position[logged],
        score=score[logged],
        channel=channel[logged],
        click_delay_ms=np.where(click, delay, 0)[logged],
    )


def _event_table(requests: _Requests, rows: _Rows, user_id: pa.ChunkedArray, item_id: pa.ChunkedArray) -> pa.Table:
    """The log: requests in order, each as far as its items came, the page by position."""
    order = np.lexsort((rows.item, rows.position, np.minimum(rows.stage, c.OUTCOMES.index(c.IMPRESSED)), rows.request))
    request, click_delay_ms, position = rows.request[order], rows.click_delay_ms[order], rows.position[order]
    score = np.round(rows.score[order], 4).astype(np.float32)
    ts_ms = requests.ts_ms[request]
    request_id = pa.array([f"r{number:08d}" for number in range(len(requests.ts_ms))], pa.string())
    schema = joined_events(user_id.type, item_id.type)
    for name, kind in ((c.POSITION, pa.int32()), (c.SCORE, pa.float32()), (c.CHANNEL, pa.string())):
        schema = schema.append(pa.field(name, kind))
    schema = schema.append(pa.field("hour", pa.int64())).append(pa.field("scene", pa.string()))
    return pa.table(
        {
            c.EVENT_SEQ: np.arange(len(order)),
            c.REQUEST_ID: request_id.take(pa.array(request)),
            c.USER_ID: user_id.combine_chunks().take(pa.array(requests.user[request])),
            c.ITEM_ID: item_id.combine_chunks().take(pa.array(rows.item[order])),
            c.REQUEST_TS_MS: ts_ms,
            c.CLICK_TS_MS: pa.array(ts_ms + click_delay_ms, pa.int64(), mask=click_delay_ms == 0),
            c.OUTCOME: _strings(c.OUTCOMES, rows.stage[order]),
            c.WEIGHT: pa.nulls(len(order), pa.float32()),
            c.POSITION: pa.array(position, pa.int32(), mask=position == 0),
            c.SCORE: pa.array(score, pa.float32(), mask=np.isnan(score)),
            c.CHANNEL: _strings(CHANNELS, rows.channel[order]),
            "hour": (ts_ms // HOUR_MS) % 24,
            "scene": _strings(SCENES, requests.scene[request]),
        },
        schema=schema,
    )


def _joined(parts: Sequence[_Rows]) -> _Rows:
    names = [field.name for field in fields(_Rows)]
    return _Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


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
    some: Bools = chosen & mask
    return some


def _unit(vectors: Floats) -> Floats:
    """Vectors (..., D) divided by their norms."""
    unit: Floats = vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
    return unit


def _zipf(size: int, exponent: float) -> Floats:
    """Probabilities (size,) that fall with the rank, as rank to the power -exponent."""
    weight = np.arange(1.0, size + 1.0) ** -exponent
    share: Floats = weight / weight.sum()
    return share


def _strings(names: Sequence[str], rows: Ints, missing: Bools | None = None) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(rows, pa.int64(), mask=missing))


def _author_name(row: int) -> str:
    """A name for each author; a numeral tells namesakes apart.

    >>> _author_name(0), _author_name(1), _author_name(384)
    ('Ada Ashgrove', 'Bruno Ashgrove', 'Ada Ashgrove 2')
    """
    generation, name = divmod(row, len(FIRST_NAMES) * len(LAST_NAMES))
    last, first = divmod(name, len(FIRST_NAMES))
    return f"{FIRST_NAMES[first]} {LAST_NAMES[last]}" + (f" {generation + 1}" if generation else "")
