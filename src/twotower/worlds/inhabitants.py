"""Users and items of a simulated world: features that tell much of their hidden vectors, but not all.

U users, N items, C categories, D the hidden vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.schema import columns as c
from twotower.worlds import words
from twotower.worlds.arrays import Bools, Floats, Ints
from twotower.worlds.natures import Nature

DIMENSION: Final = 16
TASTE_NORM: Final = 4.5
PRICE_EFFECT: Final = -0.15
NAMES: Final = tuple(sorted(words.CATEGORIES))
"""The categories in the order of their rows."""
GENDER_SHARES: Final = (0.49, 0.47, 0.04)
DEVICE_SHARES: Final = (0.62, 0.13, 0.2, 0.05)
AGE_BANDS: Final = (25, 35, 45, 60)
"""Lower edges of the second band and the following ones."""

_NOUNS: Final = np.array([words.CATEGORIES[name][0].split() for name in NAMES])
_TAGS: Final = np.array([words.CATEGORIES[name][1].split() for name in NAMES])


@dataclass(frozen=True)
class Culture:
    """What all users and items of a world share: the vectors of what their features name, each of norm 1."""

    category: Floats
    """(C, D)"""
    tag: Floats
    """(C, tags of a category, D)"""
    shared_tag: Floats
    """(3 x shared tags, D); two in three are none and have the vector 0."""
    author: Floats
    """(A x C, D) of authors, category after category within a place: row = category + C x place."""
    age_band: Floats
    gender: Floats
    city: Floats
    price_level: Floats
    """(C,) mean logarithm of the price."""


@dataclass(frozen=True)
class DrawnItems:
    """Items as they are drawn, by row."""

    table: pa.Table
    """`item_id` and features, without the age."""
    vector: Floats
    """(N, D)"""
    quality: Floats
    """(N,)"""
    category: Ints
    """(N,) row in `NAMES`."""
    birth_day: Ints
    """(N,)"""


@dataclass(frozen=True)
class DrawnUsers:
    """Users as they are drawn, by row."""

    table: pa.Table
    """`user_id` and features."""
    taste: Floats
    """(U, D) on the first day."""
    turn: Floats
    """(U, D) of the same norm and perpendicular to it: where the taste drifts."""
    start_day: Ints
    """(U,)"""
    activity: Floats
    """(U,) times the average."""
    device: Ints
    """(U,) row in `words.DEVICES`."""


def draw_culture(items: int, rng: np.random.Generator) -> Culture:
    """The culture of a world that begins with this many items."""
    many = len(NAMES)
    shared = np.zeros((3 * len(words.SHARED_TAGS), DIMENSION))
    shared[: len(words.SHARED_TAGS)] = unit(rng.standard_normal((len(words.SHARED_TAGS), DIMENSION)))
    return Culture(
        category=unit(rng.standard_normal((many, DIMENSION))),
        tag=unit(rng.standard_normal((*_TAGS.shape, DIMENSION))),
        shared_tag=shared,
        author=unit(rng.standard_normal((many * max(2, items // (8 * many)), DIMENSION))),
        age_band=unit(rng.standard_normal((len(AGE_BANDS) + 1, DIMENSION))),
        gender=unit(rng.standard_normal((len(words.GENDERS), DIMENSION))),
        city=unit(rng.standard_normal((len(words.CITIES), DIMENSION))),
        price_level=rng.normal(2.5, 0.5, many),
    )


def draw_items(
    first_row: int, birth_day: Ints, culture: Culture, nature: Nature, rng: np.random.Generator
) -> DrawnItems:
    """Items born on the given days (N,), whose ids count up from `first_row`.

    The first items of a world are old, one of each category. The generator is used for these items only.
    """
    count, many = len(birth_day), len(NAMES)
    category = rng.choice(many, count, p=zipf(many, 0.5))
    if first_row == 0:  # no category is empty, on any day
        category[:many] = np.arange(many)
        birth_day = np.where(np.arange(count) < many, -400, birth_day)

    # authors write in one category; the first ones of a category write most
    places = len(culture.author) // many
    author = category + many * rng.choice(places, count, p=zipf(places, 0.8))

    # one to three tags of the category, and for some items one that all categories share
    order = np.argsort(rng.random((count, _TAGS.shape[1])), axis=1, kind="stable")[:, :3]
    has_tag = np.arange(3) < rng.integers(1, 4, count)[:, None]
    of_tags = (culture.tag[category[:, None], order] * has_tag[:, :, None]).sum(axis=1) / has_tag.sum(axis=1)[:, None]
    shared_tag = rng.integers(0, len(culture.shared_tag), count)

    vector = unit(
        culture.category[category]
        + 0.5 * of_tags
        + 0.2 * culture.shared_tag[shared_tag]
        + 0.5 * culture.author[author]
        + 0.4 * unit(rng.standard_normal((count, DIMENSION)))
    )
    log_price = 0.8 * rng.standard_normal(count)
    price = np.round(np.exp(log_price + culture.price_level[category]), 2)
    quality = nature.quality_std * rng.standard_normal(count) + PRICE_EFFECT * log_price
    table = pa.table(
        {
            c.ITEM_ID: pa.array([f"i{row:06d}" for row in range(first_row, first_row + count)], pa.string()),
            "title": pa.array(_titles(category, rng), pa.string()),
            "category": strings(NAMES, category),
            "tags": pa.array(_tags(_TAGS[category[:, None], order], has_tag.sum(axis=1), shared_tag), pa.string()),
            "author": pa.array([words.author_name(row) for row in author.tolist()], pa.string()),
            "price": pa.array(price, pa.float64(), mask=rng.random(count) < 0.06),
        }
    )
    return DrawnItems(table, vector, quality, category, birth_day)


def _titles(category: Ints, rng: np.random.Generator) -> list[str]:
    count = len(category)
    adjective = rng.integers(0, len(words.ADJECTIVES), count)
    noun = _NOUNS[category, rng.integers(0, _NOUNS.shape[1], count)]
    ending = rng.integers(0, len(words.ENDINGS), count)
    return [
        f"The {words.ADJECTIVES[first]} {second} {words.ENDINGS[third]}"
        for first, second, third in zip(adjective.tolist(), noun.tolist(), ending.tolist(), strict=True)
    ]


def _tags(names: npt.NDArray[np.str_], own: Ints, shared: Ints) -> list[str]:
    """The first `own` names of each item, and the tag that all categories share, where it is one."""
    return [
        "|".join([*mine[:many], *words.SHARED_TAGS[place : place + 1]])
        for mine, many, place in zip(names.tolist(), own.tolist(), shared.tolist(), strict=True)
    ]


def draw_users(
    first_row: int, start_day: Ints, culture: Culture, nature: Nature, rng: np.random.Generator
) -> DrawnUsers:
    """Users who may come from the given days (U,) on, whose ids count up from `first_row`.

    Their age, gender and city tell a part of their taste. The generator is used for these users only.
    """
    count = len(start_day)
    age = np.clip(np.round(rng.normal(36.0, 13.0, count)), 16, 80).astype(np.int64)
    gender = rng.choice(len(words.GENDERS), count, p=GENDER_SHARES)
    city = rng.choice(len(words.CITIES), count, p=zipf(len(words.CITIES), 1.0))
    device = rng.choice(len(words.DEVICES), count, p=DEVICE_SHARES)
    activity = rng.gamma(nature.activity_shape, 1.0 / nature.activity_shape, count)

    favourites = rng.integers(0, len(NAMES), (count, 3))
    noise = unit(rng.standard_normal((2, count, DIMENSION)))
    taste = unit(
        0.7 * culture.age_band[np.searchsorted(AGE_BANDS, age, side="right")]
        + 0.5 * culture.gender[gender]
        + 0.4 * culture.city[city]
        + 0.8 * culture.category[favourites[:, 0]]
        + 0.4 * culture.category[favourites[:, 1]]
        + 0.5 * noise[0]
    )
    later = culture.category[favourites[:, 2]] + 0.5 * noise[1]
    turn = unit(later - (later * taste).sum(axis=1, keepdims=True) * taste)
    table = pa.table(
        {
            c.USER_ID: pa.array(1000 + 7 * np.arange(first_row, first_row + count), pa.int64()),
            "age": pa.array(age, pa.int64(), mask=rng.random(count) < 0.05),
            "gender": strings(words.GENDERS, gender, missing=rng.random(count) < 0.04),
            "city": strings(words.CITIES, city),
            "device": strings(words.DEVICES, device),
        }
    )
    return DrawnUsers(table, TASTE_NORM * taste, TASTE_NORM * turn, start_day, activity, device)


def unit(vectors: Floats) -> Floats:
    """Vectors (..., D) divided by their norms."""
    result: Floats = vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
    return result


def zipf(size: int, exponent: float) -> Floats:
    """Probabilities (size,) that fall with the rank, as rank to the power -exponent."""
    weight = np.arange(1.0, size + 1.0) ** -exponent
    share: Floats = weight / weight.sum()
    return share


def strings(names: Sequence[str], rows: Ints, missing: Bools | None = None) -> pa.Array:
    """The names of rows, null where they are missing."""
    return pa.array(names, pa.string()).take(pa.array(rows, pa.int64(), mask=missing))
