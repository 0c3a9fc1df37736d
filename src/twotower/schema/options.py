"""Types of the values of options, with their limits."""

import datetime
import re
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def at_most(most: float) -> AfterValidator:
    """Refuse a number that nothing can be made of: it would end as an overflow, or take all memory."""

    def check(value: float) -> float:
        if value > most:
            raise ValueError(f"{value:.6g} is too large: at most {most:.15g}")
        return value

    return AfterValidator(check)


def _text(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value[:100]!r} is no text that can be printed, which is needed here")
    return value


_LARGEST = 2**31 - 1
Positive = Annotated[int, Field(gt=0), at_most(_LARGEST)]
Whole = Annotated[int, Field(ge=0), at_most(_LARGEST)]
Threads = Annotated[int, Field(gt=0), at_most(1024)]
Width = Annotated[int, Field(gt=0), at_most(16_384)]
"""Width of a layer or a vector."""
Length = Annotated[int, Field(gt=0), at_most(1_000_000)]
"""Length of a list that is held as a whole."""
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False), at_most(1e12)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), at_most(1e38)]
"""A learning rate within float32: one that is too high ends in a loss that is not finite."""
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), at_most(1e12)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False), at_most(1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, AfterValidator(_text)]


def _address(value: str) -> str:
    """Refuse an address that holds a password: configurations are recorded in versions and shown in messages."""
    address, _, parameters = value.partition("?")
    users = [part.rpartition("@")[0] for part in address.rpartition("://")[2].split(",")]
    users.append(value.partition("://")[2].partition("/")[0].rpartition("@")[0])  # a password may have a "?" in it
    named = [part.partition("=")[0].lower() for part in re.split("[&;]", parameters)]
    if any(":" in user for user in users) or any(word in name for name in named for word in _SECRET):
        raise ValueError("an address holds no password: set it in the environment, see the description of this key")
    return value


_SECRET = ("password", "passwd", "pwd", "secret", "token", ".pem")
"""What names of parameters have in them that are secrets."""
Address = Annotated[Text, AfterValidator(_address)]
"""Where an outside system is, without a password."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,200}$")]
"""Of what is ours in an outside system."""
Exclude = Literal["clicked", "impressed", "none"]
"""Which items a user is not offered again; impressed ones include clicked ones."""
EXCLUDE: Final = get_args(Exclude)


def calendar_day(day: str) -> str:
    """A day as it is written in this system.

    Raises:
        ValueError: another form, or no such day.
    """
    try:
        if datetime.date.fromisoformat(day).isoformat() == day:
            return day
    except ValueError:
        pass
    raise ValueError("a day is written YYYY-MM-DD, such as 2024-01-31")


Day = Annotated[str, AfterValidator(calendar_day)]
