"""What differs from one simulated world to another: how fast it changes, how much is clicked, when people come."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Nature:
    """The numbers of a world that real logs disagree about; the defaults are those of a world of its own."""

    click_bias: float = -4.7
    """Log-odds of a click at utility 0."""
    scene_effect: tuple[float, ...] = (0.0, 0.2, 0.5)
    """What each of the scenes (home, detail, search) adds to the utility of everything."""
    quality_std: float = 0.8
    """Spread of what everyone likes about an item: the wider, the more of the clicks a few items have."""
    freshness: float = 0.8
    """What an item's utility has more at its birth."""
    half_life_days: float = 2.0
    """Age at which half of that is left."""
    new_items_a_day: float = 0.025
    """Share of the items of the first morning."""
    new_users_a_day: float = 0.025
    """Share of the users of the first morning."""
    past_days: float = 120.0
    """Mean age of the items of the first morning."""
    sessions_a_day: float = 0.5
    """Of a user on average, those who come back soon not counted."""
    activity_shape: float = 1.1
    """Of the gamma distribution of users' activity: the smaller, the more of the clicks a few users make."""
    comes_back: float = 0.25
    """Chance that a session is followed by another one soon."""
    back_hours: float = 2.0
    """Mean time to that one."""
    requests_a_session: float = 2.7
    """On average."""
    volume_by_hour: tuple[int, ...] = (
        *(12, 7, 4, 3, 3, 5, 12, 26, 38, 36, 33, 35),
        *(46, 44, 36, 34, 37, 45, 58, 70, 80, 84, 62, 30),
    )
    """24 weights by hour of UTC."""


DEFAULT: Final = "default"
NATURES: Final[Mapping[str, Nature]] = {
    DEFAULT: Nature(),
    "kuairand": Nature(
        click_bias=-3.1,
        scene_effect=(0.0, 0.3, -2.2),
        freshness=0.3,
        half_life_days=7.0,
        new_items_a_day=0.004,
        sessions_a_day=0.12,
        activity_shape=1.0,
        volume_by_hour=(
            *(33, 39, 45, 51, 57, 56, 50, 52, 55, 60, 57, 57),
            *(60, 65, 65, 58, 35, 22, 14, 9, 8, 10, 18, 26),
        ),
    ),
    "globo": Nature(
        click_bias=-9.0,
        quality_std=2.5,
        freshness=2.5,
        half_life_days=0.7,
        new_items_a_day=0.1,
        past_days=5.0,
        sessions_a_day=0.1,
        activity_shape=0.5,
        comes_back=0.2,
        back_hours=3.0,
        volume_by_hour=(
            *(40, 38, 29, 20, 11, 6, 4, 5, 9, 20, 36, 57),
            *(52, 54, 60, 63, 72, 69, 65, 70, 66, 53, 51, 48),
        ),
    ),
}
"""By the name that `simulate --like` takes: one of its own, and two that are near to a real log."""
