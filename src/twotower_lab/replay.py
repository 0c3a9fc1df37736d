"""The last days of a log, replayed hour by hour: test on what is clicked, then learn it.

A first model is trained on the days before and published. After that, every click is first asked for from the model of
that moment, and then given to the updates: deltas every few minutes, a full update every night. These are the updates
that serve. The shards are those that a joiner would have written: a row for each click, with the history that a request
would have had.

B clicks of a period, N items, D vector, H hours.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.channels.item_cf import fit_item_cf
from twotower.channels.item_to_item import ItemToItem
from twotower.channels.popular import Popular
from twotower.channels.retriever import Queries
from twotower.config.settings import Settings
from twotower.datasets.tables import end_of_day
from twotower.datasets.workspace import EVENTS, open_workspace
from twotower.features.columns import Bag, pointers, ranges, take
from twotower.features.feature_set import HISTORY
from twotower.features.vocabulary import FIRST
from twotower.index.protocol import Exclusions
from twotower.pipeline.full import update_full
from twotower.pipeline.line import build_samples, publish_version, train_model
from twotower.pipeline.places import places
from twotower.pipeline.updating import open_chain
from twotower.publish.publish import current_path
from twotower.samples.read import Clicks
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS, HOUR_MS
from twotower.schema.errors import DataError
from twotower.stream.clock import Clock
from twotower.stream.joiner import JoinCounts
from twotower.stream.joiner import Replay as ReplayFrom
from twotower.stream.rows import Row, RowRequest, Types, read_types
from twotower.stream.shards import JoinState, Manifest, write_shard
from twotower.update.gate import spaced
from twotower.update.learn import Plan
from twotower.worlds.truth import true_recall
from twotower.worlds.world import FIRST_DAY_MS, NOTHING, World
from twotower_lab.experiments import Way

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

K: Final = 20
LEAST: Final = 20
"""An hour with fewer clicks does not count."""
LOGGED: Final = 50
"""Largest number of clicks of its user that a request logs."""
LATER: Final = "later"
"""Folder of the events of the days to come."""
STREAM: Final = "stream"
"""Folder of their shards."""
JUDGED: Final = 40
"""In a world, largest number of users of an hour that are judged by their truth."""
AT_ONCE: Final = 1024
EDGE_DAYS: Final = 10
"""Days at the beginning and at the end of a long time that are compared."""
HOT: Final = 0.01
"""Share of the items, the most clicked ones, whose embeddings are watched."""


@dataclass(frozen=True)
class Later:
    """The clicks of the replayed days, in the order of time."""

    rows: pa.Table
    """As a shard has them."""
    ts_ms: Longs
    item: Longs
    """Rows of the workspace's items."""
    before: pa.Table
    """Clicks of the days before, the columns that both have."""
    judged: Bools
    """(B,) this is the user's first click on the item; other clicks are no test."""
    born_ms: Longs
    """(N,) when each item begins: in a real log at the hour of its first click."""
    item_ids: pa.Array
    """(N,) of the workspace."""
    days: list[str]

    @property
    def begin_ms(self) -> int:
        """Midnight before the first."""
        return end_of_day(self.days[0]) - DAY_MS + 1

    def rows_of(self, item_ids: pa.Array) -> Longs:
        """Rows of the workspace's items, -1 for other items."""
        rows: Longs = pc.index_in(item_ids, self.item_ids).fill_null(-1).to_numpy().astype(np.int64)
        return rows

    def clicked_before(self, world: World, row: int) -> Bools:
        """What each user (U) has clicked of the items (N) of a world before a click."""
        clicked = np.zeros((len(world.truth.people.taste), len(world.truth.catalogue.vector)), np.bool_)
        for clicks in (self.before, self.rows.slice(0, row)):
            clicked[world.user_rows(clicks[c.USER_ID]), world.item_rows(clicks[c.ITEM_ID])] = True
        return clicked

    def between(self, begin_ms: int, end_ms: int) -> tuple[int, int]:
        """The numbers of the first click of a period and of the first click after it."""
        begin, end = np.searchsorted(self.ts_ms, [begin_ms, end_ms])
        return int(begin), int(end)


@dataclass
class _Score:
    """What was found, click by click."""

    found: Bools
    true: dict[int, list[float]] = field(default_factory=dict)
    """By hour since the beginning."""


def set_aside(workspace: Path, days: int, world: World | None) -> Later:
    """Take the last days out of a workspace, and put their events aside.

    In the world in which it was simulated, items begin when they are born; in a real log, at their first click.

    Raises:
        DataError: there are no more days than these.
    """
    opened = open_workspace(workspace)
    dates = opened.dates()
    if len(dates) <= days:
        raise DataError(f"{workspace} has {len(dates)} days: fewer than {days} can be replayed")
    clicks = opened.events()
    clicks = clicks.filter(pc.equal(clicks[c.OUTCOME], c.CLICKED))
    clicks = clicks.append_column("at", pc.coalesce(clicks[c.CLICK_TS_MS], clicks[c.REQUEST_TS_MS])).sort_by("at")
    (workspace / LATER).mkdir()
    for date in dates[-days:]:
        (workspace / EVENTS / f"{c.DATE}={date}").rename(workspace / LATER / f"{c.DATE}={date}")
    later = _later(clicks, opened.items()[c.ITEM_ID], dates[-days:])
    if world is None:
        return later
    born = FIRST_DAY_MS + DAY_MS * world.truth.catalogue.birth_day[world.item_rows(later.item_ids)]
    return replace(later, born_ms=born.astype(np.int64))


def _later(clicks: pa.Table, items: pa.ChunkedArray, days: list[str]) -> Later:
    ts_ms = clicks["at"].to_numpy()
    user = pc.dictionary_encode(clicks[c.USER_ID].combine_chunks()).indices.to_numpy().astype(np.int64)
    item = pc.index_in(clicks[c.ITEM_ID].combine_chunks(), items.combine_chunks()).to_numpy().astype(np.int64)
    order = np.lexsort((np.arange(len(user)), user))  # by user, then time
    starts = np.searchsorted(user[order], np.arange(user.max() + 1))
    place = np.empty(len(user), np.int64)
    place[order] = np.arange(len(user))
    known = np.minimum(place - starts[user], LOGGED)
    first = np.zeros(len(user), np.bool_)
    first[np.unique(user * len(items) + item, return_index=True)[1]] = True
    born = np.full(len(items), np.iinfo(np.int64).max)
    np.minimum.at(born, item, ts_ms // HOUR_MS * HOUR_MS)
    begin_ms = end_of_day(days[0]) - DAY_MS + 1
    since = clicks[c.REQUEST_TS_MS].to_numpy() >= begin_ms  # a click past midnight may be of the last of the first days
    later = np.flatnonzero(since & (ts_ms <= end_of_day(days[-1])))
    flat = order[ranges(place[later] - known[later], known[later])]
    history = pa.ListArray.from_arrays(
        pa.array(pointers(known[later]).astype(np.int32)), clicks[c.ITEM_ID].combine_chunks().take(pa.array(flat))
    )
    rows = clicks.take(pa.array(later)).append_column(HISTORY, history)
    before, item_ids = clicks.filter(pa.array(~since)), items.combine_chunks()
    return Later(rows, ts_ms[later], item[later], before, first[later], born, item_ids, days)


def write_hours(folder: Path, later: Later, types: Types) -> None:
    """Write the shards of all hours into a folder, as a joiner would have written them."""
    ids = [later.rows[name].to_pylist() for name in (c.USER_ID, c.ITEM_ID, c.REQUEST_TS_MS, HISTORY)]
    context = {name: later.rows[name].to_pylist() for name in types.context if name in later.rows.column_names}
    every = range(later.begin_ms, later.begin_ms + len(later.days) * DAY_MS, HOUR_MS)
    hours = [hour_ms for hour_ms in every if np.diff(later.between(hour_ms, hour_ms + HOUR_MS))[0]]
    for hour_ms, next_ms in zip(hours, [*hours[1:], every.stop], strict=True):
        begin, end = later.between(hour_ms, next_ms)
        rows = []
        for place in range(begin, end):
            user, item, asked_ms, history = (column[place] for column in ids)
            known = {name: values[place] for name, values in context.items()}
            request = RowRequest(user, None, asked_ms, known, history=history)
            rows.append(Row(request, item, c.CLICKED, int(later.ts_ms[place])))
        manifest = Manifest(
            partition=0,
            begin=begin,
            end=end,
            first_row=begin,
            hour=hour_ms // HOUR_MS,
            watermark_ms=next_ms,
            counts=JoinCounts(events=len(rows)),
            state=JoinState(ReplayFrom(begin, Clock())),
        )
        write_shard(folder, [rows], types, manifest)


def first_model(settings: Settings, workspace: Path, later: Later) -> None:
    """Train and publish on the first days, and write the shards of the others aside."""
    write_hours(workspace / STREAM, later, read_types(workspace, settings.features.user, settings.features.context))
    build_samples(settings)
    train_model(settings)
    publish_version(settings, promoted=True)


def replay(
    settings: Settings, way: Way, later: Later, world: World | None = None
) -> tuple[dict[str, Floats], dict[str, Any]]:
    """Replay the days from the first model on.

    Args:
        settings: of the arm; its workspace has the first model and is changed.
        way: how the model continues.
        later: what is clicked.
        world: in which the workspace was simulated; None = a real log.

    Returns:
        By measure the hours with enough clicks (H,): `recall@20` of first clicks of a user on an item, and of a world
        `true_recall@20`; for many days also single numbers, see `_edges`. And facts of the arm.
    """
    workspace = Path(settings.workspace.path)
    score = _Score(np.zeros(len(later.ts_ms), np.bool_))
    asks = _Crowd(way.crowd, later) if way.crowd else _Model(settings, later, world, score)
    for number in range(24 * len(later.days)):
        hour_ms = later.begin_ms + number * HOUR_MS
        if number and number % 24 == 0 and way.nightly != "no":
            assert isinstance(asks, _Model)
            asks.night(way.nightly, later.days[number // 24 - 1])
        _reveal(workspace, *later.between(hour_ms, hour_ms + HOUR_MS))
        step_ms = min(HOUR_MS, (way.every_min or 60) * 60_000)
        for begin_ms in range(hour_ms, hour_ms + HOUR_MS, step_ms):
            begin, end = later.between(begin_ms, begin_ms + step_ms)
            if begin < end:
                score.found[begin:end] = asks.found(begin, end, begin_ms)
            if way.every_min and (begin_ms + step_ms - later.begin_ms) % (way.every_min * 60_000) == 0:
                assert isinstance(asks, _Model)
                asks.learn(end)
        if number % 24 == 23:
            log.info("%s: recall %.4f", later.days[number // 24], _by_day(score, later)[number // 24])
    values, facts = _by_hour(score, later), {"by_day": _by_day(score, later)}
    if isinstance(asks, _Model):
        facts |= asks.facts()
        if len(later.days) >= 2 * EDGE_DAYS:
            values |= _edges(score, later, asks.moves)
    return values, facts


class _Model:
    """A model that continues, in the state of its chain of deltas."""

    def __init__(self, settings: Settings, later: Later, world: World | None, score: _Score) -> None:
        self._settings = settings
        self._later = later
        self._world = world
        self._score = score
        self._hide = settings.serve.exclude != "none"
        self.moves: list[float] = []
        self._nights_s: list[float] = []
        self._deltas, self._deltas_s, self._refused = 0, 0.0, 0
        self._at = 0
        self._open()

    def _open(self) -> None:
        self._chain = open_chain(self._settings, current_path(places(self._settings).versions), None)
        self._row = self._later.rows_of(self._chain.state.laid.item_ids)
        """(N,) of the chain, rows of the workspace's items as they were at first; -1 for other items."""
        if self._world is not None:
            self._world_row = self._world.item_rows(self._chain.state.laid.item_ids)

    def found(self, begin: int, end: int, now_ms: int) -> Bools:
        """Which of some clicks are among the first K for their users, before the model learns them."""
        hit = np.zeros(end - begin, np.bool_)
        wanted = np.flatnonzero(self._later.judged[begin:end])
        alive = np.flatnonzero((self._row >= 0) & (self._later.born_ms[self._row] <= now_ms))
        column = np.full(len(self._row), -1)
        column[alive] = np.arange(len(alive))
        vectors = self._chain.state.learner.vectors[alive]
        judge = set(spaced(len(wanted), JUDGED).tolist())
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            rows, state = self._later.rows.take(pa.array(begin + part)), self._chain.state
            known = np.flatnonzero(state.known_items(rows.column(c.ITEM_ID).combine_chunks()))
            positives = state.encode(rows.take(pa.array(known)))
            own = column[positives.item_row]
            there = own >= 0
            scores = state.learner.model.encode_users(positives.user) @ vectors.T
            mine = np.where(there, np.take_along_axis(scores, np.maximum(own, 0)[:, None], axis=1)[:, 0], np.inf)
            if self._hide:
                clicked = positives.clicked
                hidden = column[clicked.rows]
                owner = np.repeat(np.arange(len(scores)), np.diff(clicked.indptr))[hidden >= 0]
                scores[owner, hidden[hidden >= 0]] = -np.inf
            above = (scores > mine[:, None]).sum(axis=1)
            hit[part[known]] = there & (above < K)
            if self._world is not None:
                chosen = [at for at, place in enumerate(known.tolist()) if start + place in judge]
                self._judge(begin + part[known[chosen]], alive, scores[chosen])
        return hit

    def _judge(self, rows: Longs, alive: Longs, scores: npt.NDArray[np.float32]) -> None:
        """The true recall of some lists."""
        assert self._world is not None
        if not len(rows):
            return
        best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        listed = self._world_row[alive[best]]
        listed[np.take_along_axis(scores, best, axis=1) == -np.inf] = NOTHING
        user = self._world.user_rows(self._later.rows[c.USER_ID].take(pa.array(rows)))
        ts_ms = self._later.ts_ms[rows]
        clicked = self._later.clicked_before(self._world, int(rows.min()))
        true = true_recall(self._world, user, ts_ms, listed, [K], K, clicked)[f"true_recall@{K}"]
        for hour, recall in zip(((ts_ms - self._later.begin_ms) // HOUR_MS).tolist(), true.tolist(), strict=True):
            self._score.true.setdefault(hour, []).append(recall)

    def learn(self, end: int) -> None:
        """A delta of the clicks since the last one."""
        if end == self._at:
            return
        started = time.process_time()
        done = self._chain.make(Plan(self._chain.seq + 1, {"0": [self._at, end]}, {}))
        self._deltas, self._refused = self._deltas + 1, self._refused + bool(done.refused)
        self._deltas_s += time.process_time() - started
        self._at = end

    def night(self, nightly: str, day: str) -> None:
        """Learn from the day before, whose events are now complete."""
        workspace = Path(self._settings.workspace.path)
        (workspace / LATER / f"{c.DATE}={day}").rename(workspace / EVENTS / f"{c.DATE}={day}")
        started, before = time.process_time(), self._hot()
        if nightly == "full":
            update_full(self._settings, dry_run=False)
        else:
            build_samples(self._settings)
            train_model(self._settings)
            publish_version(self._settings, promoted=True)
        self._nights_s.append(time.process_time() - started)
        self._open()
        self._at = self._later.between(0, self._later.begin_ms + DAY_MS * (1 + self._later.days.index(day)))[0]
        after = self._hot()
        both = [item_id for item_id in before if item_id in after]
        self.moves.append(
            float(
                np.mean(
                    [
                        np.linalg.norm(after[item_id] - before[item_id]) / np.linalg.norm(before[item_id])
                        for item_id in both
                    ]
                )
            )
        )

    def _hot(self) -> dict[Any, npt.NDArray[np.float32]]:
        """The embeddings of the most clicked items of the version, by id."""
        version = self._chain.version
        order = np.argsort(-np.bincount(version.clicks.item_row, minlength=version.items.base), kind="stable")
        rows = order[: max(1, int(HOT * len(order)))]
        tokens = version.two_tower.item_tokens[rows]
        table = self._chain.state.learner.model.tables[c.ITEM_ID].weights
        return {
            item_id: table[token].copy()
            for item_id, token in zip(version.item_ids.take(pa.array(rows)).to_pylist(), tokens.tolist(), strict=True)
            if token >= FIRST
        }

    def facts(self) -> dict[str, Any]:
        """Counts, processor time and movement."""
        facts: dict[str, Any] = {"deltas": self._deltas, "refused": self._refused}
        if self._deltas:
            facts["delta_ms"] = round(1000 * self._deltas_s / self._deltas, 1)
        if self._nights_s:
            facts["night_s"] = round(float(np.mean(self._nights_s)), 1)
            facts["hot_moves"] = [round(move, 4) for move in self.moves]
        return facts


class _Crowd:
    """What was clicked in the hour before, in place of a model."""

    def __init__(self, name: str, later: Later) -> None:
        self._name = name
        self._later = later
        names = ["at", c.USER_ID, c.ITEM_ID]
        clicks = pa.concat_tables([later.before.select(names), later.rows.select(names)]).sort_by("at").combine_chunks()
        self._user = pc.dictionary_encode(clicks[c.USER_ID].combine_chunks()).indices.to_numpy().astype(np.int64)
        self._item = later.rows_of(clicks[c.ITEM_ID].combine_chunks())
        self._ts_ms = clicks["at"].to_numpy()
        lists = later.rows[HISTORY].combine_chunks()
        lengths = pc.list_value_length(lists).to_numpy().astype(np.int64)
        self._histories = Bag(pointers(lengths), later.rows_of(lists.flatten()).astype(np.int32))

    def found(self, begin: int, end: int, now_ms: int) -> Bools:
        """Which of some clicks are among the first K for their users."""
        hit = np.zeros(end - begin, np.bool_)
        part = begin + np.flatnonzero(self._later.judged[begin:end])
        first, last = np.searchsorted(self._ts_ms, [now_ms - HOUR_MS, now_ms])
        if first < last and len(part):
            counts = np.bincount(self._item[first:last], minlength=len(self._later.item_ids))
            channel = (
                Popular.of_counts(counts) if self._name == "popular" else self._item_cf(slice(int(first), int(last)))
            )
            clicked = take(self._histories, part)
            queries = Queries({}, clicked, Exclusions(clicked.indptr, clicked.rows.astype(np.int64)))
            wanted = self._later.item[part]
            rows = channel.retrieve(queries, K).rows
            hit[part - begin] = (rows == wanted[:, None]).any(axis=1) & (counts[wanted] > 0)
        return hit

    def _item_cf(self, hour: slice) -> ItemToItem:
        user, item, ts_ms = self._user[hour], self._item[hour], self._ts_ms[hour]
        order = np.lexsort((ts_ms, user))
        counts = np.bincount(np.unique(user, return_inverse=True)[1])
        clicks = Clicks(pointers(counts), item[order].astype(np.int32), ts_ms[order])
        return fit_item_cf(clicks, len(self._later.item_ids))


def _reveal(workspace: Path, begin: int, end: int) -> None:
    """Let the updates see the shard of an hour."""
    for path in (workspace / STREAM).glob(f"partition-0000/{begin:020d}-{end:020d}.*"):
        there = workspace / "shards" / "partition-0000" / path.name
        there.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, there)


def _by_hour(score: _Score, later: Later) -> dict[str, Floats]:
    """The measures of the hours with enough clicks."""
    hour = (later.ts_ms - later.begin_ms) // HOUR_MS
    counts = np.bincount(hour[later.judged], minlength=24 * len(later.days))
    hits = np.bincount(hour[later.judged & score.found], minlength=len(counts))
    hours = np.flatnonzero(counts >= LEAST)
    values = {f"recall@{K}": hits[hours] / counts[hours]}
    if score.true:
        values[f"true_recall@{K}"] = np.array([np.mean(score.true[hour]) for hour in hours.tolist()])
    return values


def _by_day(score: _Score, later: Later) -> list[float]:
    """Recall of each day, over its clicks."""
    day = ((later.ts_ms - later.begin_ms) // DAY_MS)[later.judged]
    hits = np.bincount(day, score.found[later.judged], len(later.days))
    shares: list[float] = (hits / np.maximum(np.bincount(day, minlength=len(later.days)), 1)).round(4).tolist()
    return shares


def _edges(score: _Score, later: Later, moves: Sequence[float]) -> dict[str, Floats]:
    """Each measure over the last ten days, and how much it grew since the first ten; single numbers."""
    days = {f"recall@{K}": np.array(_by_day(score, later))}
    if score.true:
        days[f"true_recall@{K}"] = np.array(
            [
                np.mean([recall for hour in range(24 * day, 24 * day + 24) for recall in score.true.get(hour, [])])
                for day in range(len(later.days))
            ]
        )
    values = {}
    for name, by_day in days.items():
        end = by_day[-EDGE_DAYS:].mean()
        values[f"{name}, last days"] = np.array([end])
        values[f"{name}, growth"] = np.array([end - by_day[:EDGE_DAYS].mean()])
    if moves:
        values["hot_moves, last days"] = np.array([np.mean(moves[-EDGE_DAYS:])])
    return values
