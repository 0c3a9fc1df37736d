"""`import`: from a data set's own files to a workspace."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Final

from twotower.datasets import globo, interactions, kuairand, movielens
from twotower.datasets.archive import opened
from twotower.datasets.holdout import parse_day, parse_holdout, split, split_given
from twotower.datasets.options import IN_MILLISECONDS, ImportOptions
from twotower.datasets.published import read_published
from twotower.datasets.published_sets import PUBLISHED
from twotower.datasets.tables import Source, assemble
from twotower.datasets.workspace import ImportReport, check_vacant, write_workspace
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError

Reader = Callable[[Path, ImportOptions], Source]


def _unpacked(reader: Reader, *patterns: str) -> Reader:
    """A reader of a folder that also takes its archive, of which files of these patterns are unpacked."""

    def read(src: Path, options: ImportOptions) -> Source:
        with opened(src, lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)) as (folder, others):
            source = reader(folder, options)
        return replace(source, not_read=tuple(sorted((*source.not_read, *others))))

    return read


DATASETS: Final[Mapping[str, Reader]] = {
    movielens.NAME: _unpacked(movielens.read_movielens, "ratings.*", "users.*", "movies.*"),
    kuairand.NAME: _unpacked(kuairand.read_kuairand, "log_*", "user_features_*", "video_features_basic_*"),
    globo.NAME: _unpacked(globo.read_globo, "clicks_hour_*"),
    **{name: partial(read_published, dataset) for name, dataset in PUBLISHED.items()},
    interactions.NAME: interactions.read_interactions,
}
"""How each data set is read, by its name."""
_WITHOUT_RATINGS: Final = (kuairand.NAME, globo.NAME)


def import_dataset(name: str, src: Path, out: Path, options: ImportOptions, clock_ms: ClockMs = now_ms) -> ImportReport:
    """Make a workspace of the folder or file of a data set; `out` is empty or absent. Events after now are dropped.

    Raises:
        ConfigError: an option that is unknown, of a wrong form, or not for this data set; something stands at `out`.
        DataError: the source is not what it should be.
    """
    _check(name, options)
    rule = None if options.holdout is None else parse_holdout(options.holdout)
    last = None if options.until is None else parse_day(options.until, "--until")
    check_vacant(out)
    source = DATASETS[name](src, options)
    if options.test is not None:
        read = interactions.read_test(options.test, options)
        not_read = (*source.not_read, *map(str, read.not_read))
        source = replace(source, test=read.rows, columns={**source.columns, "test": read.columns}, not_read=not_read)
    tables = assemble(source, last, clock_ms)
    held_out = split_given(tables) if options.test is not None else None if rule is None else split(tables, rule)
    return write_workspace(out, tables, held_out, _arguments(src, options))


def _check(name: str, options: ImportOptions) -> None:
    """Refuse options that exclude each other or do not go with the data set."""
    if name not in DATASETS:
        raise ConfigError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
    if options.holdout is not None and options.test is not None:
        raise ConfigError("--holdout and --test exclude each other: a hold-out is a rule or a file")
    if name in _WITHOUT_RATINGS and options.positive != "all":
        raise ConfigError(f"--positive {options.positive}: {name} has clicks, no ratings; use `all`")
    if name == interactions.NAME:
        return
    if options.test is None and options.event_time != IN_MILLISECONDS:
        raise ConfigError(
            f"--time-column, --time-unit and --without-time go with `{interactions.NAME}`; {name} has its own"
        )
    if options.users is not None or options.items is not None:
        raise ConfigError(f"--users and --items go with `{interactions.NAME}`; {name} brings its own")


def _arguments(src: Path, options: ImportOptions) -> dict[str, Any]:
    """How the workspace was made, as JSON values for its manifest."""
    time = options.event_time
    said = f"{time.column} ({time.unit})" if time.column is not None else "absent" if time.absent else None
    given = {"src": src, **vars(options), "event_time": said}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
