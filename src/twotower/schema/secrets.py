"""Users, passwords and tokens of the systems that the configuration names: they come from the environment alone."""

import os


def secret(name: str) -> str | None:
    """The value of an environment variable, None where it is not set or empty; never to be shown or recorded."""
    return os.environ.get(name) or None
