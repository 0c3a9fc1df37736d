"""`init`: what the files of a user are. Which table is which, what each column is, and what a first configuration needs
to know of them; the files are read as a whole, so that what is said of a column holds for all its rows.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets import columns_seen as seen
from twotower.datasets.files import read_raw
from twotower.datasets.options import ImportSection, TableFiles, Unit
from twotower.datasets.sources import ATOMIC, Read, find_files, is_delimited
from twotower.datasets.tables import KNOWN_TYPES, RESERVED
from twotower.datasets.text_file import PLAIN_TEXT, TextForm, text_form
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.tables import is_list

Features = dict[str, dict[str, dict[str, Any]]]
Ask = Callable[[str, list[str]], str]
"""Puts a question with its possible answers, the safer one first, and gives one of them."""
_TAKEN: Final = frozenset({*c.JOINED, *RESERVED, c.TS_MS, "rating", c.HISTORY})
_MANY: Final = 20
"""Rows that an attribute must repeat in before one joined table is split by it."""
_TAIL: Final = 0.9
"""Facts about what is new are read off the events after this quantile of time."""


@dataclass(frozen=True)
class Hints:
    """What the user says of the files."""

    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    unit: Unit | None = None
    timezone: str = "UTC"


@dataclass(frozen=True)
class ProposedColumn:
    """A column of the files, and what is to become of it."""

    file: str
    column: str
    type: str
    missing: int | None
    examples: list[str]
    becomes: str


@dataclass(frozen=True)
class Facts:
    """What decides a first configuration."""

    events: int
    positives: int
    users: int
    items: int
    has_impressions: bool
    days: float | None
    """From the first event to the last; None without times."""
    new_items: float
    """Share of the last tenth of events that are of items not seen before."""
    new_users: float
    """The same of users."""
    item_life_days: float
    """Median time between the first and the last event of an item."""


@dataclass(frozen=True)
class Proposal:
    """What `init` makes of the files."""

    section: ImportSection
    features: Features
    """By side and name, as a configuration has them."""
    columns: list[ProposedColumn]
    notes: list[str]
    """Where another reading was possible, and what is not used."""
    facts: Facts


@dataclass
class _Table:
    """Files with the same columns."""

    files: list[str]
    read: Read
    form: TextForm
    said: dict[str, str] = field(default_factory=dict)
    """What becomes of each column."""

    @property
    def label(self) -> str:
        first = Path(self.files[0]).name
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"

    @property
    def rows(self) -> pa.Table:
        return self.read.rows

    def best(self, side: str) -> str | None:
        """The column that is most surely the ids of a side; `id` counts where the file's name says the side."""
        ranks = {name: seen.id_rank(name, side) for name in self.rows.column_names}
        stem = Path(self.files[0]).name.partition(".")[0].lower()
        named_so = re.fullmatch(seen.FILE_NAMES[side], stem) is not None
        if named_so:
            ranks.update({name: 1 for name in ranks if seen.words(name) in ("id", "编号")})
        known = {name: rank for name, rank in ranks.items() if rank is not None}
        return min(known, key=lambda name: known[name]) if known else None

    def is_key(self, name: str | None) -> bool:
        """Each row has its own value."""
        if name is None or is_list(self.rows[name].type):
            return False
        column = self.rows[name]
        return bool(column.null_count == 0 and pc.count_distinct(column).as_py() == len(column))

    def as_files(self, columns: dict[str, str], **others: Any) -> TableFiles:
        form = self.form
        delimiter = None if form.delimiter in (",", None) else form.delimiter
        return TableFiles(self.files, columns, form.encoding, delimiter, form.heading, **others)


def propose(paths: Sequence[Path], hints: Hints, ask: Ask | None = None) -> Proposal:
    """Say what files are, and how they become a workspace.

    Where two readings are possible, `ask` is asked; without it, the safer one is taken and noted.

    Raises:
        ConfigError: no table has users and items, or a named column does not exist.
        DataError: a file cannot be read.
    """
    return _Proposer(hints, ask).propose(_opened(paths))


def _opened(paths: Sequence[Path]) -> list[_Table]:
    """The tables of files and folders; files with the same columns are one table."""
    tables: list[_Table] = []
    for path in paths:
        for table in _tables_of(path):
            names = set(table.rows.column_names)
            same = next((one for one in tables if set(one.rows.column_names) == names and one.form == table.form), None)
            if same is None:
                tables.append(table)
                continue
            same.files += table.files
            same.read = read_raw(same.as_files({}))
    return tables


def _tables_of(path: Path) -> list[_Table]:
    if not path.is_dir():
        return [_table_of(path)]
    files = find_files(path).files
    try:
        return [_table_of(path, files[0].path)]
    except DataError:
        if len(files) < 2:
            raise
        return [_table_of(file.path) for file in files]


def _table_of(path: Path, first: Path | None = None) -> _Table:
    first = first or path
    form = text_form(first) if first.exists() and is_delimited(first) else PLAIN_TEXT
    if {first.suffix.lower(), first.with_suffix("").suffix.lower()} & set(ATOMIC):
        form = replace(form, delimiter="\t", heading=True)
    table = _Table([str(path)], Read(pa.table({}), ()), form)
    table.read = read_raw(table.as_files({}))
    return table


class _Proposer:
    """The steps of a proposal, which collect what they say."""

    def __init__(self, hints: Hints, ask: Ask | None) -> None:
        self.hints, self.ask = hints, ask
        self.notes: list[str] = []

    def propose(self, tables: list[_Table]) -> Proposal:
        events, user, item = self._events(tables)
        others = self._others([table for table in tables if table is not events], events, user, item)
        columns, options = self._event_columns(events, user, item)
        features: Features = {
            "user": {c.USER_ID: {"kind": "categorical"}},
            "item": {c.ITEM_ID: {"kind": "categorical"}},
            "context": {},
        }
        found: dict[str, Any] = {}
        for side, key, other in (("user", user, item), ("item", item, user)):
            if side in others:
                found[f"{side}s"] = self._given(*others[side], side, features)
            elif names := self._attributes(events, columns, key, other=other, side=side):
                found[f"{side}s"] = self._split(events, [key, *names], side, features)
                columns.update(dict.fromkeys(names, ""))
        for name, to in columns.items():
            is_context = to and events.said.get(name, "").startswith("context")
            if is_context and re.fullmatch(seen.CONTEXT_NAMES, seen.words(name)):
                features["context"][to] = {"kind": "categorical"}
                events.said[name] = f"context {to}, a feature: categorical"
        section = ImportSection(events=events.as_files(columns), **found, timezone=self.hints.timezone, **options)
        facts = _facts(events, columns, section)
        section = replace(section, holdout=_holdout(facts, c.TS_MS in columns.values()))
        for table in tables:
            if not table.said:
                self.notes.append(f"{table.label} is not used: none of its columns are the ids of {events.label}")
        return Proposal(section, features, [row for table in tables for row in _report(table)], self.notes, facts)

    def _given(self, table: _Table, key: str, side: str, features: Features) -> TableFiles:
        """Users or items that have files of their own."""
        is_key = table.is_key(key)
        if not is_key:
            self.notes.append(f"{table.label} has several rows of one {key}: they become one row")
        return self._entities(table, key, side, features, merge=not is_key)

    def _split(self, events: _Table, names: list[str], side: str, features: Features) -> TableFiles:
        """Users or items that are columns of the events; the first name is that of their ids."""
        key, *others = names
        split = _Table(events.files, replace(events.read, rows=events.rows.select(names)), events.form)
        found = self._entities(split, key, side, features, merge=True)
        events.said.update({name: split.said[name] for name in others})
        self.notes.append(f"{', '.join(others)}: the same in all rows of a {key}, so they go to the {side}s")
        return found

    def _choose(self, question: str, answers: list[str], note: str) -> str:
        if self.ask is not None and len(answers) > 1:
            return self.ask(question, answers)
        self.notes.append(note)
        return answers[0]

    def _events(self, tables: list[_Table]) -> tuple[_Table, str, str]:
        """The table of events, and its columns of users and items."""
        found = []
        for table in tables:
            user = self._hinted(table, self.hints.user_column) or table.best("user")
            item = self._hinted(table, self.hints.item_column) or table.best("item")
            if user is None and item is None and not table.form.heading and table.rows.num_columns > 1:
                user, item = table.rows.column_names[:2]
                self.notes.append(
                    f"{table.label} has no heading: its first column is taken for users, its second one for items; "
                    "--user-column and --item-column say otherwise"
                )
            if user is not None and item is not None and user != item:
                found.append((table, user, item))
        if not found:
            names = "; ".join(f"{table.label}: {', '.join(table.rows.column_names)}" for table in tables)
            raise ConfigError(
                "no file has both users and items by the names of its columns: name them with --user-column and "
                f"--item-column. There are {names}"
            )
        found.sort(key=lambda one: (one[0].is_key(one[1]) or one[0].is_key(one[2]), -one[0].rows.num_rows))
        return found[0]

    def _hinted(self, table: _Table, name: str | None) -> str | None:
        return name if name in table.rows.column_names else None

    def _others(self, tables: list[_Table], events: _Table, user: str, item: str) -> dict[str, tuple[_Table, str]]:
        """The tables of users and of items: those whose column has most of the ids of the events."""
        ids = {"user": seen.texts_of(events.rows[user]), "item": seen.texts_of(events.rows[item])}
        best: dict[str, tuple[float, _Table, str]] = {}
        for table in tables:
            shares = [
                (_share(ids[side], table.rows[name]), side, name)
                for side in ids
                for name in table.rows.column_names
                if (name == table.best(side) or table.is_key(name))
            ]
            # the name of a column decides where integers of users and items are the same
            shares.sort(key=lambda one: (one[0] > 0.3, one[2] == table.best(one[1]), one[0]), reverse=True)
            if shares and shares[0][0] > 0.3:
                share, side, name = shares[0]
                if side not in best or share > best[side][0]:
                    best[side] = (share, table, name)
        return {side: (table, name) for side, (_, table, name) in best.items()}

    def _event_columns(self, events: _Table, user: str, item: str) -> tuple[dict[str, str], dict[str, Any]]:
        """New names of the columns of events, and what the section says of them."""
        rows, said = events.rows, events.said
        columns = {user: c.USER_ID, item: c.ITEM_ID}
        options: dict[str, Any] = {}
        said[user], said[item] = "user_id", "item_id"
        if time := self._time(events, columns):
            columns[time[0]] = c.TS_MS
            form = time[1]
            said[time[0]] = "ts_ms" + (
                f", in {form.unit}" if form.unit else f", as {form.format}" if form.format else ""
            )
            options.update({"time_unit": form.unit or "ms", "time_format": form.format})
        for name in rows.column_names:
            if name not in columns:
                columns[name] = self._known(events, name, columns, options)
        self._rating(events, columns, options)
        for name in [name for name, to in columns.items() if not to]:
            columns[name] = self._context(events, name, columns)
        return columns, options

    def _known(self, events: _Table, name: str, columns: dict[str, str], options: dict[str, Any]) -> str:
        """The name of this system for a column that says clicks, requests or weights; nothing for the others."""
        word, column, to = seen.words(name), events.rows[name], ""
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        if re.fullmatch(seen.OUTCOME_NAMES, word) and c.OUTCOME not in columns.values():
            clicked = seen.click_values(column)
            if clicked is not None:
                options["clicked"] = clicked
                events.said[name] = f"outcome: {', '.join(clicked)} = clicked, else impressed"
                return c.OUTCOME
            to = c.OUTCOME if set(seen.texts_of(column).to_pylist()) <= set(c.OUTCOMES) else ""
        elif re.fullmatch(seen.REQUEST_NAMES, word) and c.REQUEST_ID not in columns.values():
            to = c.REQUEST_ID
        elif word == c.WEIGHT and is_number:
            to = c.WEIGHT
        if to:
            events.said[name] = to
        return to

    def _rating(self, events: _Table, columns: dict[str, str], options: dict[str, Any]) -> None:
        for name in events.rows.column_names:
            column = events.rows[name]
            is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
            if columns[name] or not is_number or not re.fullmatch(seen.RATING_NAMES, seen.words(name)):
                continue
            if {c.OUTCOME, c.WEIGHT} & set(columns.values()):
                continue
            columns[name] = "rating"
            top = pc.max(column).as_py() or 0
            least = next((least for most, least in ((5, 4), (10, 7), (100, 70)) if 1 < top <= most), None)
            events.said[name] = "rating"
            if least is not None:
                note = f"{name} goes up to {top:g}: ratings of at least {least} are positives (import.positive)"
                chosen = self._choose(f"Which ratings in {name} are positives?", [str(least), "all"], note)
                options["positive"] = chosen
                events.said[name] = f"rating; positives are {'all' if chosen == 'all' else f'at least {chosen}'}"

    def _context(self, events: _Table, name: str, columns: dict[str, str]) -> str:
        """The name of a further column of events, or nothing where it cannot be kept."""
        kind = events.rows[name].type
        if not name.strip() or is_list(kind) or pa.types.is_nested(kind) or pa.types.is_time(kind):
            events.said[name] = f"left out: events take no {kind}"
            return ""
        if pa.types.is_duration(kind):
            events.said[name] = "left out: events take no durations"
            return ""
        to = re.sub(r":(token|float)$", "", name)
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if to in KNOWN_TYPES and is_number and to != c.CHANNEL:
            events.said[name] = to
            return to
        to = _free(to, columns)
        events.said[name] = f"context {to}, no feature"
        return to

    def _time(self, events: _Table, columns: dict[str, str]) -> tuple[str, seen.TimeForm] | None:
        rows, hinted = events.rows, self.hints.time_column
        if hinted is not None:
            if hinted not in rows.column_names:
                raise ConfigError(f"--time-column {hinted}: {events.label} has {', '.join(rows.column_names)}")
            form = seen.time_form(rows[hinted])
            if form is None and self.hints.unit is None:
                shown = ", ".join(seen.examples_of(rows[hinted]))
                raise ConfigError(f"--time-column {hinted} holds {shown}, which is no time of a form that is known")
            return hinted, self._time_form(hinted, form or seen.TimeForm())
        likely = [name for name in rows.column_names if name not in columns and seen.looks_like_time(name, rows[name])]
        forms = {name: form for name in likely if (form := seen.time_form(rows[name])) is not None}
        for name in likely:
            if name not in forms:
                shown = ", ".join(seen.examples_of(rows[name]))
                self.notes.append(f"{name} is named like a time, but {shown} is no time: it is kept as context")
        if not forms:
            self.notes.append(f"{events.label} has no time of its events: hold-outs by time cannot be made")
            return None
        name = next(iter(forms))
        if len(forms) > 1:
            note = f"{', '.join(forms)} are times: {name} is taken for that of the event; --time-column says otherwise"
            name = self._choose("Which column is the time of the event?", list(forms), note)
        return name, self._time_form(name, forms[name])

    def _time_form(self, name: str, form: seen.TimeForm) -> seen.TimeForm:
        if self.hints.unit is not None:
            return replace(form, unit=self.hints.unit)
        if form.format is not None and form.other_format is not None:
            note = f"{name} fits {form.format} and {form.other_format}: the first is taken (import.time_format)"
            chosen = self._choose(f"How is {name} written?", [form.format, form.other_format], note)
            return replace(form, format=chosen)
        return form

    def _attributes(self, events: _Table, columns: dict[str, str], key: str, *, other: str, side: str) -> list[str]:
        """Columns of one joined table that are the same in all rows of an id, and not in those of the other ids."""
        taken = []
        for name, to in columns.items():
            if not to or not events.said.get(name, "").startswith("context"):
                continue
            hinted = seen.words(name).startswith(("user_", "item_"))
            if hinted and not seen.words(name).startswith(side):
                continue
            if _depends(events.rows, key, name) and (hinted or not _depends(events.rows, other, name)):
                taken.append(name)
        return taken

    def _entities(
        self,
        table: _Table,
        key: str,
        side: str,
        features: Features,
        merge: bool,
    ) -> TableFiles:
        """What becomes of the columns of users or items."""
        own = c.USER_ID if side == "user" else c.ITEM_ID
        columns, numbers, days = {key: own}, [], []
        table.said[key] = own
        for name in table.rows.column_names:
            if name == key:
                continue
            column = table.rows[name]
            what = seen.feature_seen(name, column, side == "user")
            if not name.strip() or pa.types.is_null(column.type) or (merge and is_list(column.type)):
                columns[name], table.said[name] = "", f"left out: {what.note or 'rows of one id are merged'}"
                continue
            to = _free(re.sub(r":\w+$", "", name), columns, {own, c.USER_ID, c.ITEM_ID, c.HISTORY})
            if to == c.AVAILABLE and not pa.types.is_boolean(column.type):
                to = f"source_{to}"
            columns[name] = to
            numbers += [to] if what.is_number_in_text else []
            days += [to] if what.is_day else []
            if what.feature and to not in features["context"]:
                features[side][to] = what.feature
            said = f"a feature: {what.feature['kind']}" if what.feature else "no feature"
            table.said[name] = f"{side}s.{to}, {said}" + (f" ({what.note})" if what.note else "")
        return table.as_files(columns, merge=merge, numbers=numbers, days=days)


def _free(name: str, columns: dict[str, str], taken: frozenset[str] | set[str] = _TAKEN) -> str:
    """A name that neither this system nor another column has."""
    others = {to.lower() for to in columns.values()} | taken
    while name.lower() in others:
        name = f"source_{name}"
    return name


def _share(ids: pa.ChunkedArray, column: pa.ChunkedArray) -> float:
    """Share of ids that are in a column."""
    if not len(ids) or is_list(column.type):
        return 0.0
    return float(pc.mean(pc.is_in(ids, seen.texts_of(column).combine_chunks()).cast(pa.float64())).as_py())


def _depends(rows: pa.Table, key: str, name: str) -> bool:
    """Every id has one value, there are several values, and ids with several rows show it."""
    pairs = rows.select([key, name]).group_by([key, name], use_threads=False).aggregate([([], "count_all")])
    ids = pc.count_distinct(rows[key], "all").as_py()
    values = pc.count_distinct(rows[name]).as_py()
    return bool(pairs.num_rows == ids and values > 1 and rows.num_rows - ids >= _MANY)


def _report(table: _Table) -> list[ProposedColumn]:
    return [
        ProposedColumn(
            table.label,
            column.name,
            column.type,
            column.missing,
            [] if column.to is None else seen.examples_of(table.rows[column.to]),
            table.said.get(column.name, column.note or "not used"),
        )
        for column in table.read.columns
    ]


def _facts(events: _Table, columns: dict[str, str], section: ImportSection) -> Facts:
    """Counts of the events, by users, items and time."""
    names = {to: name for name, to in columns.items() if to}
    users, items = (_codes(events.rows[names[key]]) for key in (c.USER_ID, c.ITEM_ID))
    count, positives, days, life = len(users), len(users), None, 0.0
    if section.clicked:
        marks = pc.utf8_lower(pc.utf8_trim_whitespace(events.rows[names[c.OUTCOME]].cast(pa.string())))
        positives = pc.sum(pc.is_in(marks, pa.array(section.clicked))).as_py() or 0
    new = {"items": 0.0, "users": 0.0}
    if c.TS_MS in names and (times := _approximate_ms(events.rows[names[c.TS_MS]], section)) is not None:
        days = float(times.max() - times.min()) / DAY_MS
        late = times > np.quantile(times, _TAIL)
        first = {}
        for what, codes in (("items", items), ("users", users)):
            earliest = np.full(codes.max() + 1, np.inf)
            np.minimum.at(earliest, codes, times)
            first[what] = earliest
            new[what] = float((earliest[codes[late]] > np.quantile(times, _TAIL)).mean()) if late.any() else 0.0
        last = np.full(items.max() + 1, -np.inf)
        np.maximum.at(last, items, times)
        life = float(np.median(last - first["items"])) / DAY_MS
    return Facts(
        events=count,
        positives=positives,
        users=len(np.unique(users)),
        items=len(np.unique(items)),
        has_impressions=positives < count,
        days=days,
        new_items=new["items"],
        new_users=new["users"],
        item_life_days=life,
    )


def _codes(column: pa.ChunkedArray) -> Any:
    return column.combine_chunks().dictionary_encode("encode").indices.to_numpy(zero_copy_only=False)


def _approximate_ms(column: pa.ChunkedArray, section: ImportSection) -> Any:
    """Times in milliseconds, of no zone; missing ones as the earliest."""
    if section.time_format is not None:
        column = pc.strptime(pc.utf8_trim_whitespace(column.cast(pa.string())), format=section.time_format, unit="ms")
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        factor = 1.0
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        factor = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}[section.time_unit]
    else:
        return None
    least = pc.min(column).as_py()
    return None if least is None else pc.fill_null(column, least).cast(pa.float64()).to_numpy() * factor


def _holdout(facts: Facts, has_time: bool) -> str:
    """The last tenth of time; `leave-one-out` where nearly nobody of then is known, a share of pairs without time."""
    if not has_time:
        return "random:0.2"
    return "time:0.9" if facts.days and facts.days * facts.events > 0 and facts.new_users < 0.98 else "leave-one-out"
