"""The errors a user of the system meets; every other exception is a defect of ours."""


class TwotowerError(Exception):
    """Something the user can mend; the message says what was seen and what to do."""


class DataError(TwotowerError):
    """A file or a table is not what its schema says."""


class ConfigError(TwotowerError):
    """The configuration or the command line asks for something that cannot be."""


class VersionError(TwotowerError):
    """A published version is missing, damaged or not of this format."""


class UnavailableError(TwotowerError):
    """A system that the configuration names does not answer, or refuses; the message names it, without secrets."""


MOST_SHOWN = 200
"""Characters of somebody's input that a message repeats."""


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """A value as a message shows it: its `repr`, cut where it is long.

    >>> shown("x" * 9, 6)
    "'xxx...'"
    >>> shown([1, 2])
    '[1, 2]'
    """
    if isinstance(value, str) and len(value) > most:
        return f"{value[: most - 3]!r}"[:-1] + "...'"
    if isinstance(value, int) and value.bit_length() > 4 * most:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple) and len(value) > most:
        value = value[:most]
    return cut(repr(value), most)


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """A text as a message repeats it: its beginning where it is long.

    >>> cut("abcdefgh", 6)
    'abc...'
    """
    return text if len(text) <= most else text[: most - 3] + "..."
