"""The errors a user of the system meets; every other exception is a defect of ours."""


class TwotowerError(Exception):
    """Something the user can mend; the message says what was seen and what to do."""


class DataError(TwotowerError):
    """A file or a table is not what its schema says."""


class ConfigError(TwotowerError):
    """The configuration or the command line asks for something that cannot be."""


class VersionError(TwotowerError):
    """A published version is missing, damaged or not of this format."""


def shown(value: object) -> str:
    """A value for a message: its representation, cut where it is long.

    >>> shown("e1"), len(shown("x" * 1000))
    ("'e1'", 83)
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
