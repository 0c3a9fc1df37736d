"""Users, passwords and tokens of the systems that the configuration names: they come from the environment alone."""

import os
from dataclasses import dataclass, field
from typing import Final, Literal

ADMIN_TOKEN: Final = "TWOTOWER_ADMIN_TOKEN"
"""The variable of the token that admin requests carry."""


@dataclass(frozen=True)
class Credentials:
    """User and password of a system; None where they are not set. Never to be shown or recorded."""

    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def given(self, user: str, password: str) -> dict[str, str]:
        """Those that are set, under the names that a client has for them.

        >>> Credentials(password="x").given("username", "password")
        {'password': 'x'}
        """
        named = {user: self.user, password: self.password}
        return {name: value for name, value in named.items() if value is not None}


def secret(name: str) -> str | None:
    """The value of an environment variable, None where it is not set or empty; never to be shown or recorded."""
    return os.environ.get(name) or None


def credentials(system: Literal["INDEX", "LOG", "FEATURE_STORE"]) -> Credentials:
    """User and password of a system, from `TWOTOWER_<system>_USER` and `TWOTOWER_<system>_PASSWORD`."""
    return Credentials(secret(f"TWOTOWER_{system}_USER"), secret(f"TWOTOWER_{system}_PASSWORD"))


def without_user(url: str) -> str:
    """An address as messages show it: without user and password, and without parameters.

    >>> without_user("rediss://me:secret@host:6379/0?ssl_ca_certs=FILE")
    'rediss://host:6379/0'
    >>> without_user("host:9092,host:9093")
    'host:9092,host:9093'
    """
    scheme, separator, rest = url.partition("?")[0].rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
