"""A simulated world of which the truth is known: who likes what and when, who comes, and what is clicked on a page.

`simulate` meets it with a recommender of its own, `visit` with any other. What happens is a function of the seed and of
what it happens to (a mood: the user and the time; a click: the request, its item and its position), never of the order
of calls. So two recommenders meet the same day, and the same page is clicked in the same way. A world made for more
days is the same on the days that it shares with one made for fewer.

Dimensions: U users, N items, C categories, D the hidden vectors, R requests, P places of a page.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.features.bloom import mixed
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, HOUR_MS
from twotower.schema.errors import ConfigError
from twotower.worlds.arrays import Bools, Floats, Ints, joined, taken
from twotower.worlds.inhabitants import NAMES, Culture, DrawnItems, DrawnUsers, draw_culture, draw_items, draw_users
from twotower.worlds.natures import Nature
from twotower.worlds.options import WorldOptions

FIRST_DAY_MS: Final = 1_767_571_200_000
"""2026-01-05T00:00:00Z, a Monday."""
NOTHING: Final = -1
"""In a page: no item at this place."""

# Moods.
DAILY_MOOD_STD: Final = 0.4
"""Of what a quarter of the day adds to a category, every day."""
TREND_STD: Final = 0.4
"""Of what the hour adds to a category for everyone, never to come again."""
TREND_HOURS: Final = 4
"""From one trend to the next, which has nothing in common with it."""
MOOD_NORM: Final = 2.0
"""How far a user's own mood pulls the taste towards a category."""
MOOD_HOURS: Final = 3
"""How long a user stays in a mood."""
MOOD_SHARPNESS: Final = 0.5
"""A mood is drawn with probability proportional to exp(this x what the user likes about the category)."""
DRIFT_A_WEEK: Final = 0.15
"""Angle in radians by which a taste turns."""

# The click.
ACCIDENTS: Final = 0.01
"""Chance of a click on the first place whatever stands there."""
POSITION_EXPONENT: Final = 0.3

CONTEXT: Final = {"hour": pa.int64(), "scene": pa.string()}
"""The context of a request in logs, with its types."""
SCENES: Final = ("home", "detail", "search")
SCENES_OF_DEVICE: Final = ((0.7, 0.22, 0.08), (0.75, 0.18, 0.07), (0.5, 0.28, 0.22), (0.9, 0.08, 0.02))

_SHARED, _ITEMS, _USERS, _TREND, _REQUESTS, _MOOD, _PHASE, _CLICK, _DELAY = range(9)
"""What is drawn: a part of the key of every generator."""
_REQUESTS_A_DAY: Final = 10**9
"""More than there are: request numbers of different days differ."""
_AT_ONCE: Final = 1 << 21
"""Utilities computed at a time."""


def date_of(day: int) -> datetime.date:
    """The date of a day of a world.

    >>> str(date_of(6))
    '2026-01-11'
    """
    return datetime.datetime.fromtimestamp(FIRST_DAY_MS / 1000, datetime.UTC).date() + datetime.timedelta(day)


def rng_of(seed: int, part: int, day: int = 0) -> np.random.Generator:
    """A generator of its own for each part of a world and each day."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(part, day)))


def uniform(seed: int, *keys: Ints | int) -> Floats:
    """Uniform numbers in [0, 1) that are a function of the seed and of integer keys, which broadcast (see `mixed`).

    >>> uniform(0, 1, np.array([2, 3])).round(3).tolist(), uniform(0, np.array([1]), 3).round(3).tolist()
    ([0.85, 0.461], [0.461])
    """
    state = np.array([seed % 2**64], np.uint64)
    for key in keys:
        state = mixed(state ^ mixed(np.atleast_1d(key).astype(np.uint64)))
    result: Floats = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result.reshape(np.broadcast_shapes(*map(np.shape, keys)))


@dataclass(frozen=True)
class Requests:
    """Requests in the order of time; users break ties."""

    number: Ints
    """(R,) names a request of a world, on whichever day."""
    user: Ints
    """(R,) rows of users."""
    ts_ms: Ints
    """(R,) strictly rising within a user."""
    scene: Ints
    """(R,) rows in `SCENES`."""

    def __len__(self) -> int:
        return len(self.number)

    def take(self, rows: npt.NDArray[Any]) -> "Requests":
        """Some of them, by place or by mask."""
        return taken(self, rows)

    @property
    def hour(self) -> Ints:
        """(R,) 0 to 23, UTC."""
        return self.ts_ms // HOUR_MS % 24


@dataclass(frozen=True)
class Preferences:
    """The truth of a world, which no log has: who likes what, and when."""

    options: WorldOptions
    people: DrawnUsers
    catalogue: DrawnItems
    centre: Floats
    """(C, D) of the categories, each of norm 1."""
    mood_edges: Floats
    """(U, C) running sums of the probabilities of a user's own moods."""
    daily_mood: Floats
    """(4, C) what a quarter of the day adds to a category."""
    trend: Floats
    """(knots, C) one every `TREND_HOURS`."""

    def taste_at(self, user: Ints, ts_ms: Ints | int) -> Floats:
        """What a user likes in the long run, (..., D): the taste of the first day, turned by `DRIFT_A_WEEK`."""
        angle = DRIFT_A_WEEK / 7 * (np.asarray(ts_ms) - FIRST_DAY_MS)[..., None] / DAY_MS
        return np.cos(angle) * self.people.taste[user] + np.sin(angle) * self.people.turn[user]

    def mood_at(self, user: Ints, ts_ms: Ints | int) -> Ints:
        """The category that a user is in the mood for (...,), anew every `MOOD_HOURS`, at times of the user's own."""
        length = MOOD_HOURS * HOUR_MS
        phase = (uniform(self.options.seed, _PHASE, user) * length).astype(np.int64)
        number = (np.asarray(ts_ms) - FIRST_DAY_MS + phase) // length
        drawn = uniform(self.options.seed, _MOOD, user, number)
        mood: Ints = (drawn[..., None] > self.mood_edges[user][..., :-1]).sum(axis=-1)
        return mood

    def trend_at(self, category: Ints, ts_ms: Ints | int) -> Floats:
        """What the hour adds to a category for everyone (...,): it turns from one trend into the next."""
        place = (np.asarray(ts_ms) - FIRST_DAY_MS) / (TREND_HOURS * HOUR_MS)
        knot = np.floor(place).astype(np.int64)
        angle = np.pi / 2 * (place - knot)
        return np.cos(angle) * self.trend[knot, category] + np.sin(angle) * self.trend[knot + 1, category]

    def freshness_at(self, item: Ints, ts_ms: Ints | int) -> Floats:
        """What an item's age adds (...,): half of it is gone after every half-life."""
        age_days = (np.asarray(ts_ms) - FIRST_DAY_MS) / DAY_MS - self.catalogue.birth_day[item]
        nature = self.options.nature
        return nature.freshness * np.exp2(-age_days / nature.half_life_days)

    def utility(self, user: Ints, item: Ints, ts_ms: Ints, scene: Ints) -> Floats:
        """The log-odds of a click, but for a constant: (taste + own mood) . item + quality + moods + freshness + scene.

        Rows of users and items, times and rows in `SCENES` broadcast against each other.
        """
        wish = self.taste_at(user, ts_ms) + MOOD_NORM * self.centre[self.mood_at(user, ts_ms)]
        # einsum runs in numpy's own single-threaded loop, so that the sums do not depend on a thread count
        affinity = np.einsum("...d,...d->...", wish, self.catalogue.vector[item])
        category = self.catalogue.category[item]
        daily = self.daily_mood[np.asarray(ts_ms) // HOUR_MS % 24 // 6, category]
        of_all = self.catalogue.quality[item] + daily + self.trend_at(category, ts_ms) + self.freshness_at(item, ts_ms)
        total: Floats = affinity + of_all + np.asarray(self.options.nature.scene_effect)[scene]
        return total


@dataclass(frozen=True)
class World:
    """A world on the days before its horizon; see `make_world`."""

    options: WorldOptions
    horizon: int
    """The first day that it knows nothing of."""
    truth: Preferences

    def users(self, day: int) -> pa.Table:
        """`user_id` (int64), `age`, `gender`, `city`, `device` of everyone there by the end of a day; some are null."""
        return self.truth.people.table.slice(0, self._there(self.truth.people.start_day, day))

    def items(self, day: int) -> pa.Table:
        """`item_id` (string), `title`, `category`, `tags`, `author`, `price`, `age_days` on that day.

        Of all items there by the end of the day, or of the first log if that ends later: an age may be negative.
        """
        count = self._there(self.truth.catalogue.birth_day, day)
        return self.truth.catalogue.table.slice(0, count).append_column(
            "age_days", pa.array(max(day, self.options.days - 1) - self.truth.catalogue.birth_day[:count], pa.int64())
        )

    def alive(self, day: int) -> Ints:
        """Rows of the items that exist on a day."""
        self._check(day)
        return np.flatnonzero(self.truth.catalogue.birth_day <= day)

    def requests(self, day: int) -> Requests:
        """Who asks on a day.

        Sessions follow the hourly curve, and some are followed by another one soon. Each has a few requests, 20 s to
        some minutes apart. Requests that would fall into the next day do not happen.
        """
        self._check(day)
        nature, rng = self.options.nature, rng_of(self.options.seed, _REQUESTS, day)
        there = np.flatnonzero(self.truth.people.start_day <= day)
        user = np.repeat(there, rng.poisson(nature.sessions_a_day * self.truth.people.activity[there]))
        curve = np.array(nature.volume_by_hour)
        begin = rng.choice(24, len(user), p=curve / curve.sum()) * HOUR_MS + rng.integers(0, HOUR_MS, len(user))

        chain = rng.geometric(1.0 - nature.comes_back, len(user))
        wait = rng.exponential(nature.back_hours * HOUR_MS, chain.sum()).astype(np.int64)
        user, begin = np.repeat(user, chain), np.repeat(begin, chain) + _elapsed(chain, wait)
        length = rng.geometric(1.0 / nature.requests_a_session, len(user))
        gap = 20_000 + rng.exponential(60_000.0, length.sum()).astype(np.int64)
        user, ts_ms = np.repeat(user, length), np.repeat(begin, length) + _elapsed(length, gap)

        # strictly rising within a user: a running maximum of time minus rank; a span longer than all keeps users apart
        order = np.lexsort((ts_ms, user))
        user, ts_ms = user[order], ts_ms[order]
        rank = np.arange(len(user))
        span = int(ts_ms.max(initial=0)) + len(user)
        ts_ms = np.maximum.accumulate(user * span + ts_ms - rank) - user * span + rank
        edges = np.cumsum(SCENES_OF_DEVICE, axis=1)[self.truth.people.device[user]]  # (R, scenes)
        scene = (rng.random((len(user), 1)) > edges[:, :-1]).sum(axis=1)
        order = np.lexsort((user, ts_ms))
        order = order[ts_ms[order] < DAY_MS]
        number = day * _REQUESTS_A_DAY + np.arange(len(order))
        return Requests(number, user[order], FIRST_DAY_MS + day * DAY_MS + ts_ms[order], scene[order])

    def chances(self, requests: Requests, pages: Ints) -> Floats:
        """The probability of a click on each place of pages of items (R, P), -1 = nothing: see `click_chance`."""
        shown = pages != NOTHING
        item = np.where(shown, pages, 0)
        utility = self.truth.utility(requests.user[:, None], item, requests.ts_ms[:, None], requests.scene[:, None])
        return np.where(shown, click_chance(utility, 1 + np.arange(pages.shape[1]), self.options.nature), 0.0)

    def clicks(self, requests: Requests, pages: Ints) -> Ints:
        """What is clicked on pages (R, P), as in `chances`: milliseconds from the request to the click, 0 = no click.

        Every place is clicked by itself, after 2 s, 1.5 s more for each position, and an exponential time (mean 10 s).
        So some clicks come after the user's next request.
        """
        number = requests.number[:, None]
        hit = uniform(self.options.seed, _CLICK, number, pages) < self.chances(requests, pages)
        thinking = -10_000.0 * np.log1p(-uniform(self.options.seed, _DELAY, number, pages))
        delay = 2_000 + 1_500 * (1 + np.arange(pages.shape[1])) + thinking.astype(np.int64)
        return np.where(hit, delay, 0)

    def top(self, user: Ints, ts_ms: Ints, n: int, clicked: Bools | None = None) -> Ints:
        """The n available items that each user (B,) likes best at a given time (B,), (B, n), best first.

        What each user of the world has `clicked` (U, N) is left out. The scene adds the same to every item and does not
        matter. Equal utilities are ordered by row; -1 where there are no more items.
        """
        best = np.full((len(user), n), NOTHING, np.int64)
        step = max(1, _AT_ONCE // len(self.truth.catalogue.birth_day))
        for start in range(0, len(user), step):
            mine, when = user[start : start + step, None], np.asarray(ts_ms)[start : start + step, None]
            born = self.truth.catalogue.birth_day <= (when - FIRST_DAY_MS) // DAY_MS
            free = born if clicked is None else born & ~clicked[mine[:, 0], : born.shape[1]]
            utility = self.truth.utility(mine, np.arange(born.shape[1])[None, :], when, np.zeros((1, 1), np.int64))
            value = np.where(free, -utility, np.inf)
            order = np.argsort(value, axis=1, kind="stable")[:, :n]
            best[start : start + step, : order.shape[1]] = np.where(
                np.take_along_axis(free, order, axis=1), order, NOTHING
            )
        return best

    def user_ids(self, rows: Ints) -> pa.Array:
        """Ids of users by row."""
        return self.truth.people.table[c.USER_ID].combine_chunks().take(pa.array(rows))

    def item_ids(self, rows: Ints) -> pa.Array:
        """Ids of items by row."""
        return self.truth.catalogue.table[c.ITEM_ID].combine_chunks().take(pa.array(rows))

    def user_rows(self, user_id: pa.Array | pa.ChunkedArray) -> Ints:
        """Rows of users by id, -1 for those that the world does not have."""
        return _rows(user_id, self.truth.people.table[c.USER_ID])

    def item_rows(self, item_id: pa.Array | pa.ChunkedArray) -> Ints:
        """Rows of items by id, -1 for those that the world does not have."""
        return _rows(item_id, self.truth.catalogue.table[c.ITEM_ID])

    def _there(self, since: Ints, day: int) -> int:
        """How many rows are there by the end of a day, or of the first log: rows of later days follow those."""
        self._check(day)
        return int(
            np.searchsorted(np.maximum(since, self.options.days - 1), max(day, self.options.days - 1), side="right")
        )

    def _check(self, day: int) -> None:
        if not 0 <= day < self.horizon:
            raise ConfigError(f"day={day}: this world was made for days 0 to {self.horizon - 1}, raise its horizon")


def make_world(options: WorldOptions, horizon: int | None = None) -> World:
    """Make a world that begins on 2026-01-05.

    Args:
        options: of the world.
        horizon: how many days can be asked about; absent = those of the first log.

    Raises:
        ConfigError: the horizon lies before the end of the first log.

    >>> world = make_world(WorldOptions(users=20, items=100, days=2), horizon=5)
    >>> world.items(1).num_rows, world.items(4).num_rows
    (100, 106)
    """
    horizon = options.days if horizon is None else horizon
    if horizon < options.days:
        raise ConfigError(f"horizon={horizon}: this world takes a horizon of at least {options.days}")
    shared = rng_of(options.seed, _SHARED)
    culture = draw_culture(options.items, shared)
    daily_mood = DAILY_MOOD_STD * shared.standard_normal((4, len(NAMES)))
    people, catalogue = _people(options, horizon, culture), _catalogue(options, horizon, culture)
    knots = [
        rng_of(options.seed, _TREND, day).standard_normal((24 // TREND_HOURS, len(NAMES))) for day in range(horizon + 1)
    ]
    appeal = np.exp(MOOD_SHARPNESS * np.einsum("ud,cd->uc", people.taste, culture.category))
    truth = Preferences(
        options=options,
        people=people,
        catalogue=catalogue,
        centre=culture.category,
        mood_edges=np.cumsum(appeal, axis=1) / appeal.sum(axis=1, keepdims=True),
        daily_mood=daily_mood,
        trend=TREND_STD * np.concatenate(knots),
    )
    return World(options, horizon, truth)


def click_chance(utility: Floats, position: Ints, nature: Nature) -> Floats:
    """The probability of a click, (a + (1 - a) sigmoid(bias + utility)) / position^0.3, with a = 1 % of accidents.

    A position-based model (Craswell et al. 2008): a place is looked at with probability position^-0.3, and what is
    looked at is clicked by its utility, or by accident. Utilities and positions (from 1) broadcast.
    """
    by_liking = 1.0 / (1.0 + np.exp(-nature.click_bias - utility))
    return (ACCIDENTS + (1.0 - ACCIDENTS) * by_liking) * np.asarray(position) ** -POSITION_EXPONENT


def _catalogue(options: WorldOptions, horizon: int, culture: Culture) -> DrawnItems:
    nature, rng, count = options.nature, rng_of(options.seed, _ITEMS), options.items
    share = _share(nature.new_items_a_day, options.days)
    old = -1 - rng.exponential(nature.past_days, count).astype(np.int64)
    birth_day = np.where(rng.random(count) < share, rng.integers(0, options.days, count), old)
    parts = [draw_items(0, birth_day, culture, nature, rng)]
    for day, row, born in _later(options, horizon, count, share):
        parts.append(draw_items(row, born, culture, nature, rng_of(options.seed, _ITEMS, day)))
    return joined(parts)


def _people(options: WorldOptions, horizon: int, culture: Culture) -> DrawnUsers:
    nature, rng, count = options.nature, rng_of(options.seed, _USERS), options.users
    share = _share(nature.new_users_a_day, options.days)
    start_day = np.where(rng.random(count) < share, rng.integers(0, options.days, count), 0)
    parts = [draw_users(0, start_day, culture, nature, rng)]
    for day, row, come in _later(options, horizon, count, share):
        parts.append(draw_users(row, come, culture, nature, rng_of(options.seed, _USERS, day)))
    return joined(parts)


def _share(rate: float, days: int) -> float:
    """The share of all that came during these days, at a daily rate of those who were there before."""
    return rate * days / (1.0 + rate * days)


def _later(options: WorldOptions, horizon: int, count: int, share: float) -> Iterator[tuple[int, int, Ints]]:
    """Each day after the first log with its first new row, and that day for each of the new rows."""
    more = round(count * share / options.days)
    for number, day in enumerate(range(options.days, horizon)):
        yield day, count + number * more, np.full(more, day)


def _elapsed(length: Ints, gap: Ints) -> Ints:
    """Running sums of gaps within groups of the given lengths; each group begins at 0.

    >>> _elapsed(np.array([2, 3]), np.array([9, 1, 9, 2, 3])).tolist()
    [0, 1, 0, 2, 5]
    """
    total = np.cumsum(gap)
    first: Ints = np.repeat(np.cumsum(length) - length, length)
    return total - total[first]


def _rows(ids: pa.Array | pa.ChunkedArray, known: pa.ChunkedArray) -> Ints:
    found: Ints = pc.fill_null(pc.index_in(ids, known.combine_chunks()), NOTHING).to_numpy().astype(np.int64)
    return found
