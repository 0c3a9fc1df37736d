"""Options of a simulated world."""

from dataclasses import dataclass

from twotower.schema.errors import ConfigError
from twotower.worlds.natures import DEFAULT, NATURES, Nature

FEWEST_ITEMS = 100


@dataclass(frozen=True)
class WorldOptions:
    """The size of a world, its nature, and the seed of everything that is drawn.

    Raises:
        ConfigError: a number that is too small, or no nature of that name.
    """

    users: int = 2000
    """Users by the end of the first log; each makes about 12 requests a week."""
    items: int = 1500
    """Items by the end of the first log, at least 100."""
    days: int = 7
    """Days of the first log. Some users and items come on each of them; on later days more come."""
    seed: int = 0
    """The same seed, sizes and nature give the same world."""
    like: str = DEFAULT
    """Name of its nature: `default`, or near to a real log: `kuairand`, `globo`."""

    def __post_init__(self) -> None:
        for name, least in (("users", 1), ("items", FEWEST_ITEMS), ("days", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: a simulated world takes {name} of at least {least}")
        if self.like not in NATURES:
            raise ConfigError(f"like={self.like!r}: a world is like one of {', '.join(NATURES)}")

    @property
    def nature(self) -> Nature:
        """What differs from one world to another."""
        return NATURES[self.like]
