"""`import`: from a data set's own files to a workspace."""

from dataclasses import replace
from pathlib import Path
from typing import Final

from twotower.datasets import globo, interactions, kuairand, movielens
from twotower.datasets.holdout import Split, parse_day, parse_holdout, split, split_given
from twotower.datasets.interactions import IN_MILLISECONDS, EventTime
from twotower.datasets.tables import Source, assemble, parse_positive
from twotower.datasets.workspace import ImportReport, check_vacant, write_workspace
from twotower.schema.clock import ClockMs, now_ms
from twotower.schema.errors import ConfigError

DATASETS: Final = (movielens.NAME, kuairand.NAME, globo.NAME, interactions.NAME)


def import_dataset(
    name: str,
    src: Path,
    out: Path,
    holdout: str | None = None,
    test: Path | None = None,
    positive: str = "all",
    until: str | None = None,
    users: Path | None = None,
    items: Path | None = None,
    event_time: EventTime = IN_MILLISECONDS,
    clock_ms: ClockMs = now_ms,
) -> ImportReport:
    """Make a workspace of a data set.

    Args:
        name: one of `DATASETS`.
        src: its folder or file.
        out: the workspace, a folder that is empty or absent.
        holdout: `time:Q`, `since:YYYY-MM-DD`, `leave-one-out`, `pause:DAYS` or `random:SHARE`; absent = none.
        test: held-out interactions as a file; excludes `holdout`.
        positive: `all`, or the least rating of a positive.
        until: the last day to import, YYYY-MM-DD; absent = all.
        users: for `interactions`, a file of users with features.
        items: for `interactions`, a file of items with features.
        event_time: for `interactions` and `test`, the column of times.
        clock_ms: milliseconds since 1970; later events are dropped.

    Raises:
        ConfigError: an option that is unknown, of a wrong form, or not for this data set; something stands at `out`.
        DataError: the source is not what it should be.
    """
    if holdout is not None and test is not None:
        raise ConfigError("--holdout and --test exclude each other: a hold-out is a rule or a file")
    rule = None if holdout is None else parse_holdout(holdout)
    last = None if until is None else parse_day(until, "--until")
    check_vacant(out)
    source = _read_source(name, src, positive, users, items, test, event_time)
    if test is not None:
        read = interactions.read_test(test, parse_positive(positive), event_time)
        not_read = (*source.not_read, *map(str, read.not_read))
        source = replace(source, test=read.rows, columns={**source.columns, "test": read.columns}, not_read=not_read)
    tables = assemble(source, last, clock_ms)
    held_out: Split | None = None
    if test is not None:
        held_out = split_given(tables)
    elif rule is not None:
        held_out = split(tables, rule)
    paths = {"src": src, "test": test, "users": users, "items": items}
    arguments = {"holdout": holdout, "positive": positive, "until": until, "event_time": _said(event_time)}
    given = {option: None if path is None else str(path) for option, path in paths.items()}
    return write_workspace(out, tables, held_out, arguments | given)


def _said(event_time: EventTime) -> str | None:
    """Where times come from, as the manifest has it."""
    if event_time.column is not None:
        return f"{event_time.column} ({event_time.unit})"
    return "absent" if event_time.absent else None


def _read_source(
    name: str,
    src: Path,
    positive: str,
    users: Path | None,
    items: Path | None,
    test: Path | None,
    event_time: EventTime,
) -> Source:
    if name == interactions.NAME:
        return interactions.read_interactions(src, positive, users, items, test, event_time)
    if test is None and event_time != IN_MILLISECONDS:
        raise ConfigError(
            f"--time-column, --time-unit and --without-time go with `{interactions.NAME}`; {name} has its own"
        )
    if users is not None or items is not None:
        raise ConfigError(f"--users and --items go with `{interactions.NAME}`; {name} brings its own")
    if name == movielens.NAME:
        return movielens.read_movielens(src, positive)
    if name == kuairand.NAME:
        return kuairand.read_kuairand(src, positive)
    if name == globo.NAME:
        return globo.read_globo(src, positive)
    raise ConfigError(f"there is no data set {name!r}; there are {', '.join(DATASETS)}")
