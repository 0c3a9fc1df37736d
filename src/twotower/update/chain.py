"""The chain of deltas of one version: what was learned so far, the next delta, its gate and its commit.

State is the version and its deltas in their order, and nothing else: a chain that is opened again has the bytes of the
one that wrote them. What a delta is made of, rows of shards and events of the log, is written down before it is made
(`next.json`), so that a killed run makes the same delta again. So that a chain is opened fast however long it is, all
that is behind every so many deltas is folded into one.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.datasets.tables import end_of_day
from twotower.features.bloom import is_untrained
from twotower.features.columns import Bag, Column, concatenate, take
from twotower.features.feature_set import encode_table
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs import EventLog
from twotower.logs.entities import Entity, after
from twotower.logs.events import ITEM, USER, EntityDeleted, EntityId, EntityPut
from twotower.publish.delta import (
    Delta,
    Reports,
    Rows,
    base_digest,
    chain_folder,
    last_seq,
    prune,
    read_next,
    write_delta,
    write_folded,
)
from twotower.publish.overlay import EntityChanges, Overlay, item_columns
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError, VersionError, shown
from twotower.schema.files import read_json, whole_file, write_json
from twotower.schema.tables import is_id
from twotower.stream.shards import partitions, read_positives, usable_manifests
from twotower.towers.embedding import EmbeddingTable
from twotower.towers.two_tower import TwoTower
from twotower.update.bounds import ITEM as OF_ITEM
from twotower.update.bounds import PAIR, RISEN, Bounds, ClickWindows
from twotower.update.bounds import USER as OF_USER
from twotower.update.gate import (
    LISTED,
    SAMPLED_USERS,
    Limits,
    alikeness,
    by_hour,
    check_accumulators,
    check_rows,
    check_served,
    drift,
    hits,
    lists_with,
    recall_among,
    typical_length,
)
from twotower.update.learner import Learner, Learning, Touched
from twotower.update.rows import Positives, positives_of, tokens_of, usable

log = logging.getLogger(__name__)

PLAN = "next.json"
QUARANTINE = "quarantine"
WINDOW = "window"
VECTORS = "vectors"
"""Of items that were put or deleted, as the updater has them."""
JUDGED_SCORES = 4_000_000
"""Scores that test-then-train recall costs a delta at most: a large catalogue has few positives judged."""
JUDGED_K = 20
TOLD = 20
"""Reasons that a delta's report has, at most."""
_EVENTS = 10_000

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Named = tuple[str, EntityId]
"""The type of an event, `user` or `item`, and an id."""


@dataclass(frozen=True)
class Plan:
    """What the next delta is made of."""

    seq: int
    shards: Mapping[str, Sequence[int]]
    """By partition, the numbers of the first row and of the one behind the last."""
    events: Mapping[str, Sequence[int]]
    """By partition of the log, the offsets between which events of users and items are read."""


@dataclass(frozen=True)
class Done:
    """A delta that was committed."""

    seq: int
    rows: int
    """Of the shards."""
    watermark_ms: int | None
    refused: list[str] = field(default_factory=list)
    """Why the gate did not let it through; its rows are in quarantine, and nothing of them was learned."""
    held_back: Mapping[str, int] = field(default_factory=dict)
    """Positives that were not trained, by the bound that they are beyond."""
    set_aside: list[str] = field(default_factory=list)
    """What could not be used, a sentence for each shard, user or item."""


@dataclass(frozen=True)
class Asked:
    """Rows as a state of the chain sees them."""

    places: Longs
    """(B,) of the rows that were given, those of items that there are."""
    positives: Positives
    """B of them."""
    users: Floats
    """(B, D) the vectors of their users."""


class Chain:
    """A version's chain, opened by the one updater that may write it.

    Args:
        version: the base, as `open_version` gives it.
        model: gives the model of its checkpoint.
        deltas: the folder of the chains of all versions.
        shards: joined samples.
        event_log: whose events of users and items are followed; None = none are.
        learning: how it learns.
        limits: of the gate.
        most_rows: rows of a delta at most.
        untrained: share of users whom nothing is trained on.
        hide_clicked: recall is measured without what a user clicked before.
        fold_every: all is folded into one behind every so many deltas; 0 = never.
        bounds: what one user and one item can move.
    """

    def __init__(
        self,
        version: Version,
        model: Callable[[], TwoTower],
        deltas: Path,
        shards: Path,
        event_log: EventLog | None,
        learning: Learning,
        limits: Limits,
        most_rows: int,
        untrained: float,
        hide_clicked: bool,
        fold_every: int = 0,
        bounds: Bounds | None = None,
    ) -> None:
        self.version = version
        self._model = model
        self._deltas = deltas
        self._shards = shards
        self._log = event_log
        self._learning = learning
        self._limits = limits
        self._most_rows = most_rows
        self._untrained = untrained
        self._hide_clicked = hide_clicked
        self._fold_every = fold_every
        self._bounds = bounds or Bounds()
        self._base = base_digest(version.path)
        self._unwritten: Delta | None = None
        """A folded delta that is due."""
        self._writing: threading.Thread | None = None
        self._base_columns = encode_table(version.features.item, pa.Table.from_batches([version.catalogue]))
        self._base_clicks = np.bincount(version.clicks.item_row, minlength=len(version.item_ids)).astype(np.int64)
        self._base_alike = alikeness(np.asarray(version.item_vectors))
        self.unreadable: list[str] = []
        """Manifests of shards that cannot be read, as the latest plan found them."""
        self.repaired = 0
        """Accumulators of the checkpoint or of deltas that were not finite; each has the table's median instead."""
        self._load()

    def _load(self) -> None:
        """The state behind the latest delta."""
        self.close()
        version = self.version
        self._overlay, self._entities, self._laid = Overlay(version, by_id=True), EntityChanges(), version
        self._follows, self._reports = self._base, Reports()
        self.seq, self.watermark_ms = 0, version.watermark_ms
        self._rows_at = self._first_rows()
        self._events_at: dict[str, int] = {}
        self._window: list[_Witness] = []
        self._windows = ClickWindows(self._bounds)
        self._deleted_ms: dict[Named, int] = {}
        """When ids were deleted last: clicks up to then are of another user or item."""
        model, self.repaired = self._model(), 0
        for name, table in model.tables.items():
            self._repair(name, table, np.arange(len(table.accumulator)))
        self._learner = Learner(
            model,
            _writable(self._base_columns),
            np.array(version.item_vectors),
            self._base_clicks,
            self._learning,
        )
        self._learner.recent = _latest_clicks(version, self._learning.recent)
        tables = self._learner.model.tables
        vocabularies = version.features.vocabularies
        self._typical = {
            name: typical_length(tables[name].weights, len(vocabularies[name].values))
            for name in self._learning.tables
            if name in tables
        }
        self._largest = {name: float(tables[name].accumulator.max(initial=0)) for name in self._typical}
        last = last_seq(self._deltas, version.id)
        while self.seq < last:
            delta = read_next(self._deltas, version.id, self._base, self.seq, self._follows)
            if delta is None:
                raise VersionError(f"delta {self.seq + 1} of {version.id} is gone, and {last} is there: restore it")
            try:
                self._replay(delta)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError, pa.ArrowException) as error:
                raise VersionError(
                    f"delta {delta.seq} of {version.id} has other contents than a delta has ({error!r}): restore it"
                ) from error
            if not delta.folded and last - self.seq < self._fold_every:  # a killed run left it out
                self._fold_when_due()
        if self.seq:
            self._laid = self._overlay.lay(self._entities)

    def _replay(self, delta: Delta) -> None:
        """Take in a delta that was committed."""
        state, learner = delta.state, self._learner
        if delta.folded:  # it has these whole
            learner.recent, self._window, self._windows = np.zeros(0, np.int64), [], ClickWindows(self._bounds)
            learner.next_row |= state["next_row"]
        deleted = {(kind, one): ts_ms for kind, one, ts_ms in state.get("deleted", [])}
        self._take_entities({(kind, one): Entity(**entity) for kind, one, entity in state["entities"]}, deleted)
        self._windows.restore(state.get("counted", [[]] * 4), state.get("risen", []))
        for name, rows in delta.tables.items():
            table = learner.model.tables[name]
            table.weights[rows.rows] = rows.values
            table.accumulator[rows.rows] = delta.optimizer[f"{name}.accumulator"]
            self._repair(name, table, rows.rows)
        for name, ids in delta.new_ids.items():
            known, at = ids.column("id").to_pylist(), ids.column("row").to_pylist()
            learner.learned[name].update(zip(known, at, strict=True))
            learner.next_row[name] = max([learner.next_row[name], *(row + 1 for row in at)])
        if c.ITEM_ID in delta.new_ids:
            self._set_tokens(delta.new_ids[c.ITEM_ID])
        for name, changes in state["pending"].items():
            for one, count in changes:
                if count:
                    learner.pending[name][one] = count
                else:
                    learner.pending[name].pop(one, None)
        self._overlay.learn(delta)
        rows_at = self._laid.items.find(delta.item_ids)
        learner.vectors[rows_at] = delta.item_vectors
        if delta.folded:
            learner.vectors[self._rows_put()] = delta.optimizer[VECTORS]
        recent = self._laid.items.find(pa.array(state["recent"], self.version.item_ids.type))
        learner.recent = np.concatenate([learner.recent, recent[recent >= 0]])[-self._learning.recent :]
        vectors = delta.optimizer.get(WINDOW, np.zeros((0, 0), np.float32))
        seen = [_Witness(one, vector) for one, vector in zip(state["window"], vectors, strict=True)]
        self._window = [*self._window, *seen][-self._limits.window :]
        self._move_on(delta)

    def _repair(self, name: str, table: EmbeddingTable, rows: Longs) -> None:
        """Give rows whose accumulator is not finite, and which would never move again, the median of the others."""
        if count := table.repair(rows):
            self.repaired += count
            log.warning(
                "%d accumulators of %s in %s were not finite: they have the median now", count, name, self.version.id
            )

    def _move_on(self, delta: Delta) -> None:
        self._rows_at = {name: int(row) for name, row in delta.offsets["shards"].items()}
        self._events_at = {name: int(offset) for name, offset in delta.offsets["log"].items()}
        self.seq, self.watermark_ms, self._follows = delta.seq, delta.watermark_ms, delta.digest
        self._reports.note(delta)

    def _rows_put(self) -> Longs:
        """Catalogue rows of all items that were put or deleted: their vectors are not of the deltas alone."""
        kind = self.version.item_ids.type
        rows = self._laid.items.find(pa.array([one for one in self._entities.items if _fits(one, kind)], kind))
        return rows[rows >= 0]

    def _fold_when_due(self) -> None:
        """Keep all that is behind the latest delta, as one that stands for them all."""
        if not self._fold_every or self.seq % self._fold_every:
            return
        learner, delta, entities = self._learner, self._overlay.folded(), self._entities
        put = [*((ITEM, *one) for one in entities.items.items()), *((USER, *one) for one in entities.users.items())]
        window = {WINDOW: np.stack([one.vector for one in self._window])} if self._window else {}
        self._unwritten = replace(
            delta,
            watermark_ms=self.watermark_ms,
            offsets={"shards": self._rows_at, "log": self._events_at},
            report=self._reports.folded(),
            optimizer={**self._accumulators(delta.tables), **window, VECTORS: learner.vectors[self._rows_put()]},
            state={
                "entities": [[kind, one, asdict(entity)] for kind, one, entity in put],
                "pending": _changes({name: {} for name in learner.pending}, learner.pending),
                "recent": self._laid.item_ids.take(pa.array(learner.recent)).to_pylist(),
                "window": [one.item_id for one in self._window],
                "next_row": dict(learner.next_row),
                "deleted": [[kind, one, ts_ms] for (kind, one), ts_ms in sorted(self._deleted_ms.items())],
                **self._windows.folded(),
            },
            digest=self._follows,
        )

    def _accumulators(self, tables: Mapping[str, Rows]) -> dict[str, Floats]:
        """Of the rows of a delta, under their names in it."""
        mine = self._learner.model.tables
        return {f"{name}.accumulator": mine[name].accumulator[rows.rows] for name, rows in tables.items()}

    def tidy(self) -> None:
        """Write the folded delta that is due, if there is one, and remove what folded ones stand for.

        That is done in a thread of its own, beside the next delta; `close` waits for it.
        """
        self.close()
        due, self._unwritten = self._unwritten, None
        self._writing = threading.Thread(target=self._tidy, args=(due,), name="folded delta")
        self._writing.start()

    def _tidy(self, due: Delta | None) -> None:
        try:
            if due is not None:
                write_folded(self._deltas, due, self._base)
            prune(self._deltas, self.version.id)
        except OSError:
            log.exception("%s goes on without a folded delta", self.version.id)

    def close(self) -> None:
        """Wait until the folded delta is written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def plan(self) -> Plan | None:
        """What the next delta is to be made of: what was planned before, or what there is, up to a number of rows.

        None where there is nothing new.
        """
        if (planned := self._planned()) is not None:
            return planned
        shards: dict[str, list[int]] = {}
        left, unreadable = self._most_rows, list[str]()
        for partition in partitions(self._shards):
            usable = usable_manifests(self._shards, partition)
            found = usable.manifests
            unreadable += usable.problems
            first = self._rows_at.get(str(partition), 0)
            end = min(found[-1].end_row if found else first, first + left)
            if end > first:
                shards[str(partition)] = [first, end]
                left -= end - first
        for problem in unreadable:
            if problem not in self.unreadable:
                log.error("%s goes on without: %s", self.version.id, problem)
        self.unreadable = unreadable
        events = self._new_events()
        if not shards and not self._read_entities(events).found:
            return None
        return Plan(self.seq + 1, shards, events)

    def _planned(self) -> Plan | None:
        """What was planned before; a plan that cannot be is passed over with a log line."""
        path = self._plan_path
        if not path.exists():
            return None
        try:
            plan = Plan(**read_json(path))
            rows = [(self._rows_at.get(name, 0), *ends) for name, ends in plan.shards.items()]
            offsets = [(self._events_at.get(name, 0), *ends) for name, ends in plan.events.items()]
            whole = all(type(end) is int and at == first <= end for at, first, end in [*rows, *offsets])
            fits = sum(end - first for _, first, end in rows) <= self._most_rows
        except (DataError, TypeError, ValueError, AttributeError) as error:
            log.warning("%s is passed over, and planned again: %r", path, error)
            return None
        return plan if whole and fits and plan.seq == self.seq + 1 else None

    @property
    def _plan_path(self) -> Path:
        return chain_folder(self._deltas, self.version.id) / PLAN

    def make(self, plan: Plan) -> Done:
        """Learn what is planned, judge it, and commit it: as it is, or as refused, with nothing learned.

        Whatever is in shards and log, a delta is committed: what cannot be used is set aside and said, and what the
        gate refuses goes to quarantine.
        """
        document = {"seq": plan.seq, "shards": plan.shards, "events": plan.events}
        if not self._plan_path.exists() or self._planned() != plan:
            write_json(self._plan_path, document)
        entities = self._read_entities(plan.events)
        parts = [read_positives(self._shards, int(name), first, end) for name, (first, end) in plan.shards.items()]
        tables = [table for part in parts for table in part.tables]
        count = sum(part.rows for part in parts)
        aside = [*entities.problems, *(problem for part in parts for problem in part.problems)]
        for problem in aside:
            log.error("delta %d of %s goes on without: %s", plan.seq, self.version.id, problem)
        risen: frozenset[EntityId] = frozenset()
        learned = self._attempt(plan, tables, entities, aside, risen)
        while learned.risen and not learned.problems:
            risen |= learned.risen
            log.warning(
                "delta %d of %s is learned without the items that rose too far in the lists of others: %s",
                *(plan.seq, self.version.id, sorted(risen)[:TOLD]),
            )
            self._load()
            learned = self._attempt(plan, tables, entities, aside, risen)
        if problems := learned.problems:
            log.error("delta %d of %s is refused: %s", plan.seq, self.version.id, "; ".join(problems))
            self._quarantine(plan.seq, tables)
            learned = self._without_rows(plan, entities, aside, problems)
        assert learned.delta is not None
        written = write_delta(self._deltas, learned.delta, self._follows)
        self._plan_path.unlink()
        self._move_on(replace(learned.delta, digest=written))
        self._fold_when_due()
        if self._unwritten is not None:
            self.tidy()
        report = learned.delta.report
        return Done(plan.seq, count, self.watermark_ms, problems, report["held_back"], report.get("set_aside", []))

    def _quarantine(self, seq: int, tables: Sequence[pa.Table]) -> None:
        """Keep the rows of a delta that was refused: in one file, or in several where their columns differ in type."""
        try:
            parts = [pa.concat_tables(tables, promote_options="default")] if tables else []
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            parts = list(tables)
        for number, part in enumerate(parts):
            name = f"{seq:08d}-{number}.parquet" if number else f"{seq:08d}.parquet"
            with whole_file(self._plan_path.parent / QUARANTINE / name) as temporary:
                pq.write_table(part, temporary)

    def _attempt(
        self,
        plan: Plan,
        tables: Sequence[pa.Table],
        entities: "_Events",
        aside: list[str],
        risen: frozenset[EntityId],
    ) -> "_Learned":
        """The next delta, or why there is none: an error of whatever kind is a problem of these rows."""
        try:
            return self._learn(plan, tables, entities, aside, [], risen)
        except (OSError, MemoryError):  # of the machine, not of the rows
            raise
        except Exception as error:
            log.exception("delta %d of %s cannot be learned", plan.seq, self.version.id)
            return _Learned(None, [f"it cannot be learned: {error!r}"])

    def _without_rows(self, plan: Plan, entities: "_Events", aside: list[str], problems: list[str]) -> "_Learned":
        """The empty delta in the place of a refused one, with the users and items that were put or deleted; the gate
        is not asked: nothing was learned. Those that cannot be taken in are set aside.
        """
        self._load()
        try:
            return self._learn(plan, [], entities, aside, problems)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            log.exception("users or items of delta %d of %s cannot be taken in", plan.seq, self.version.id)
            why = repr(error)
        self._load()
        wrong = {named: self._wrong_with(named, one) for named, one in entities.found.items()}
        bad = {named: said for named, said in wrong.items() if said} or dict.fromkeys(entities.found, why)
        sentences = [f"{kind} {one!r}: {said}" for (kind, one), said in bad.items()]
        return self._learn(plan, [], entities.without(bad), [*aside, *sentences], problems)

    def _wrong_with(self, named: Named, entity: Entity) -> str | None:
        """Why a user or an item cannot be laid over the version, None where it can."""
        kind, one = named
        alone = EntityChanges({one: entity}, {}) if kind == ITEM else EntityChanges({}, {one: entity})
        try:
            self._overlay.copied().lay(alone)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            return repr(error)
        return None

    def _learn(
        self,
        plan: Plan,
        tables: Sequence[pa.Table],
        entities: "_Events",
        aside: list[str],
        refused: list[str],
        risen: frozenset[EntityId] = frozenset(),
    ) -> "_Learned":
        """The next delta and what is wrong with it; learner and overlay are behind it then."""
        learner, touched = self._learner, Touched()
        pending = {name: dict(counts) for name, counts in learner.pending.items()}
        told = set(self._overlay.aside.told)
        self._take_entities(entities.found, entities.deleted_ms)
        forgotten = self._forget(entities.deleted_ms, touched)
        sorted_out = self._sort_out(tables, risen)
        aside = [*aside, *sorted_out.problems]
        positives = sorted_out.positives
        rows = np.unique(positives.item_row)
        before = lists_with(self._laid, learner.vectors, rows) if len(rows) else rows
        judged = self._judge(positives)
        seen = (
            [
                _Witness(one, vector)
                for one, vector in zip(
                    sorted_out.untrained.item_ids.to_pylist(), learner.user_vectors(sorted_out.untrained), strict=True
                )
            ]
            if len(sorted_out.untrained)
            else []
        )
        window = [*self._window, *seen][-self._limits.window :]
        recall = self._recall(window)
        for step, start in enumerate(range(0, len(positives), self._learning.batch_size)):
            part = positives.take(np.arange(start, min(start + self._learning.batch_size, len(positives))))
            learner.step(part, (plan.seq, step), touched)
        after_training = self._recall(window)
        tables_moved = {name: learner.rows_of(name, touched) for name in sorted(touched.rows)}
        moved = np.array(sorted(touched.items), np.int64)
        counted = self._windows.note(
            positives.user_ids.to_pylist(), positives.item_ids.to_pylist(), positives.ts_ms.tolist()
        )
        report = {
            **sorted_out.counts,
            "admitted": {name: len(ids) for name, ids in touched.admitted.items()},
            "no_room": touched.no_room,
            "waiting": {name: len(ids) for name, ids in learner.pending.items() if ids},
            "loss": round(touched.loss / max(1, len(positives)), 6),
            "recall": judged,
            "recall_untrained": {"before": recall, "after": after_training},
            "drift": round(drift(learner.recent, learner.clicks), 6),
            "held_back": sorted_out.held_back,
            **({"risen": sorted(risen)[:TOLD]} if risen else {}),
            **({"repaired": self.repaired} if self.repaired else {}),
            **({"set_aside": aside[:TOLD]} if aside else {}),
            **({"refused": refused} if refused else {}),
        }
        delta = Delta(
            self.version.id,
            plan.seq,
            max([*([] if self.watermark_ms is None else [self.watermark_ms]), *sorted_out.times], default=None),
            tables_moved,
            {
                name: _ids([*forgotten.get(name, []), *touched.admitted.get(name, [])], self._id_type(name))
                for name in sorted({*forgotten, *touched.admitted})
            },
            self._laid.item_ids.take(pa.array(moved)),
            learner.vectors[moved],
            {
                "shards": self._rows_at | {name: int(end) for name, (_, end) in plan.shards.items()},
                "log": self._events_at | {name: int(end) for name, (_, end) in plan.events.items()},
            },
            report,
            {
                **self._accumulators(tables_moved),
                **({WINDOW: np.stack([one.vector for one in seen])} if seen else {}),
            },
            {
                "entities": [[kind, one, asdict(entity)] for (kind, one), entity in entities.found.items()],
                "deleted": [[kind, one, ts_ms] for (kind, one), ts_ms in entities.deleted_ms.items()],
                "pending": _changes(pending, learner.pending),
                "recent": positives.item_ids.to_pylist(),
                "window": [one.item_id for one in seen],
                "counted": counted,
                "risen": [],
            },
        )
        problems = [] if refused else self._problems(delta, touched, recall, after_training)
        if problems:
            return _Learned(delta, problems)
        trial = self._overlay.copied()
        trial.learn(delta)
        laid = trial.lay(self._entities)
        noted = {named: why for named, why in trial.aside.told.items() if named not in told}
        if noted:
            aside += [f"{kind} {shown(one)}: {why}" for (kind, one), why in noted.items()]
            report["set_aside"] = aside[:TOLD]
        if not refused and (problems := check_served(laid, learner.vectors, self._limits)):
            return _Learned(delta, problems)
        too_far = frozenset[EntityId]()
        if len(positives):
            clicked_ids = self._laid.item_ids.take(pa.array(rows)).to_pylist()
            after_all = lists_with(laid, learner.vectors, rows)
            changes = dict(zip(clicked_ids, (after_all - before).tolist(), strict=True))
            delta.state["risen"].extend(self._windows.note_risen(int(positives.ts_ms[-1]), changes.items()))
            too_far = self._too_far(positives.ts_ms, changes)
        if not too_far:
            self._overlay, self._laid, self._window = trial, laid, window
        return _Learned(delta, [], too_far)

    def _too_far(self, times: Longs, clicked_items: Iterable[EntityId]) -> frozenset[EntityId]:
        """The items that rose further within the windows of some times than their users explain."""
        users, limits, ts_ms = min(SAMPLED_USERS, len(self.version.users)), self._limits, np.unique(times).tolist()
        rises = self._windows.rises(clicked_items, ts_ms, LISTED)
        return frozenset(
            one
            for one, rise in rises.items()
            if rise.positives >= limits.rise_least and rise.lists / users > limits.most_rise + rise.explained
        )

    def _problems(self, delta: Delta, touched: Touched, before: float | None, after: float | None) -> list[str]:
        """What the gate has against a delta, before it is asked what would be served."""
        problems: list[str] = []
        for name, rows in delta.tables.items():
            problems += check_rows(name, rows, touched.before_of(name, rows), self._typical[name], self._limits)
            accumulator = self._learner.model.tables[name].accumulator[rows.rows]
            problems += check_accumulators(name, accumulator, self._largest[name], self._limits)
        if not np.isfinite(delta.item_vectors).all():
            problems.append("vectors of items are not finite")
        if problems:
            return problems
        # Of the version's own items: those put since may be as alike as they like, that was not learned.
        alike = alikeness(self._learner.vectors[: self.version.items.base]) - self._base_alike
        if alike > self._limits.most_alike:
            problems.append(f"items are more alike than in the version, by {alike:.3f} in the mean cosine")
        if before is not None and after is not None and after < before - self._limits.margin:
            problems.append(f"recall@{self._limits.k} of the untrained users falls from {before:.4f} to {after:.4f}")
        return problems

    def _recall(self, window: Sequence["_Witness"]) -> float | None:
        """Of the untrained users, None where there are too few."""
        rows = self._laid.items.find(pa.array([one.item_id for one in window], self.version.item_ids.type))
        there = np.flatnonzero(rows >= 0)
        if len(there) < self._limits.least:
            return None
        users = np.stack([window[at].vector for at in there.tolist()])
        return round(recall_among(users, rows[there], self._learner.vectors, self._limits.k), 6)

    def _judge(self, positives: Positives) -> dict[str, list[int]]:
        """Test, then train: which of the positives to come would have been found, by hour."""
        if not len(positives):
            return {}
        most = max(1, JUDGED_SCORES // len(self._learner.vectors))
        index = np.unique(np.linspace(0, len(positives) - 1, min(most, len(positives))).astype(np.int64))
        part = positives.take(index)
        nothing = Bag(np.zeros(len(part) + 1, np.int64), np.zeros(0, np.int32))
        hidden = part.clicked if self._hide_clicked else nothing
        users = self._learner.user_vectors(part)
        return by_hour(part.ts_ms, hits(users, part.item_row, self._learner.vectors, hidden, JUDGED_K))

    def ask(self, rows: pa.Table) -> "Asked":
        """What the state behind the latest delta makes of clicked rows, before anything is learned from them.

        Args:
            rows: of shards.
        """
        items = self._laid.items.find(rows.column(c.ITEM_ID).combine_chunks())
        known = np.flatnonzero((items >= 0) & ~self._laid.gone[np.maximum(items, 0)])
        positives = self._encoded(rows.take(pa.array(known)))
        return Asked(known, positives, self._learner.user_vectors(positives))

    @property
    def item_ids(self) -> pa.Array:
        """(N,) items of the version and those put since."""
        return self._laid.item_ids

    def embeddings(self, table: str) -> Floats:
        """The rows of a table of ids as they are behind the latest delta."""
        return self._learner.model.tables[table].weights

    @property
    def item_vectors(self) -> Floats:
        """(N, D) as they are behind the latest delta."""
        return self._learner.vectors

    def _sort_out(self, tables: Sequence[pa.Table], risen: frozenset[EntityId]) -> "_Sorted":
        """What of the rows is trained on, what the gate is to judge by, and what is left out."""
        counts = dict.fromkeys(("rows", "positives", "untrained", "known_before", "unusable"), 0)
        parts, times, problems = list[Positives](), list[int](), list[str]()
        for table in tables:
            counts["rows"] += table.num_rows
            try:
                part = self._sort_part(table)
            except (OSError, MemoryError):
                raise
            except Exception as error:
                log.exception("%d rows cannot be encoded", table.num_rows)
                problems.append(f"{table.num_rows} rows: they cannot be encoded: {error!r}")
                continue
            parts.append(part.positives)
            times += part.times
            counts = {name: counts.get(name, 0) + part.counts.get(name, 0) for name in {**counts, **part.counts}}
        both = Positives.together([self._encoded(_no_rows(self.version)), *parts])
        users, items = both.user_ids.to_pylist(), both.item_ids.to_pylist()
        why = self._windows.admit(users, items, both.ts_ms.tolist())
        if risen:
            why[[one in risen for one in items]] = RISEN
        held_back = {name: int((why == name).sum()) for name in (PAIR, OF_USER, OF_ITEM, RISEN)}
        if any(held_back.values()):
            log.warning("%s: positives beyond update.bounds are not trained: %s", self.version.id, held_back)
        out = is_untrained(both.user_ids, self._untrained) if len(both) else np.zeros(0, np.bool_)
        positives = both.take(np.flatnonzero((why == "") & ~out))
        untrained = both.take(np.flatnonzero((why == "") & out))
        counts |= {"positives": len(positives), "untrained": len(untrained)}
        if len(both):
            counts |= {
                "without_user_row": _unknown(positives.user.get(c.USER_ID)),
                "without_item_row": _unknown(self._learner.item_tokens[positives.item_row]),
            }
        return _Sorted(positives, untrained, counts, times, held_back, problems)

    def _sort_part(self, rows: pa.Table) -> "_Part":
        """The positives of one shard, trained on or not, without what is late, unknown, deleted or no positive."""
        fine = usable(rows, self.version)
        counts = {"unusable": int((~fine).sum())}
        found = rows.filter(pa.array(fine))
        times = _times(found)
        late = np.zeros(len(times), np.bool_)
        if self.version.watermark_ms is not None and self.version.last_day is not None:
            asked = pc.coalesce(found.column(c.REQUEST_TS_MS), found.column(c.CLICK_TS_MS)).combine_chunks()
            late = (asked.to_numpy() <= end_of_day(self.version.last_day)) & (times <= self.version.watermark_ms)
        item_ids, user_ids = (found.column(name).combine_chunks() for name in (c.ITEM_ID, c.USER_ID))
        items = self._laid.items.find(item_ids)
        there = (items >= 0) & ~self._laid.gone[np.maximum(items, 0)]
        gone = {one for one, entity in self._entities.users.items() if entity.deleted}
        deleted = np.array([one in gone for one in user_ids.to_pylist()], np.bool_)
        former = self._of_former(ITEM, item_ids, times) | self._of_former(USER, user_ids, times)
        positives = self._encoded(found.filter(pa.array(~late & there & ~deleted & ~former)))
        counts |= {
            "known_before": int(late.sum()),
            "unknown_items": int((~late & ~there).sum()),
            "deleted_users": int((~late & deleted).sum()),
            "before_deletion": int((~late & there & ~deleted & former).sum()),
        }
        return _Part(positives, counts, times[~late].tolist())

    def _of_former(self, kind: str, ids: pa.Array, times: Longs) -> npt.NDArray[np.bool_]:
        """Which clicks (B,) are of a user or an item that was deleted after them: another has its id now."""
        deleted_ms = {one: ts_ms for (of, one), ts_ms in self._deleted_ms.items() if of == kind}
        if not deleted_ms:
            return np.zeros(len(times), np.bool_)
        return times <= np.array([deleted_ms.get(one, -1) for one in ids.to_pylist()], np.int64)

    def _encoded(self, rows: pa.Table) -> Positives:
        tokens = self._learner.item_tokens if self._items_have_ids else self._laid.two_tower.item_tokens
        encoded = positives_of(self._laid, rows, tokens)
        if any(feature.name == c.USER_ID for feature in self.version.features.user):
            learned = self._learner.learned[c.USER_ID]
            encoded.user[c.USER_ID] = tokens_of(self.version.features, c.USER_ID, encoded.user_ids, learned)
        return encoded

    def _forget(self, deleted: Mapping[Named, int], touched: Touched) -> dict[str, list[tuple[EntityId, int]]]:
        """Free the rows of deleted users and items: they are zero, and the ids unknown."""
        learner, forgotten = self._learner, dict[str, list[tuple[EntityId, int]]]()
        for kind, one in deleted:
            table = c.ITEM_ID if kind == ITEM else c.USER_ID
            if table not in learner.model.tables or (kind == ITEM and self._is_known(one)):
                continue
            ids = pa.array([one], self._id_type(table))
            token = int(tokens_of(self.version.features, table, ids, learner.learned[table])[0])
            learner.pending[table].pop(one, None)
            if token >= FIRST:
                learner.forget(table, one, token, touched)
            forgotten.setdefault(table, []).append((one, UNKNOWN))
            if table == c.ITEM_ID:
                self._set_tokens(_ids([(one, UNKNOWN)], self._id_type(table)))
        return forgotten

    def _is_known(self, item_id: EntityId) -> bool:
        """The version itself was trained on the item that has the id now: it was put again before its watermark."""
        entity = self._entities.items.get(item_id)
        return entity is not None and entity.fresh and not entity.deleted and not self._overlay.is_another(entity)

    def _id_type(self, table: str) -> pa.DataType:
        return (self.version.item_ids if table == c.ITEM_ID else self.version.users.ids).type

    def _take_entities(self, put: Mapping[Named, Entity], deleted: Mapping[Named, int]) -> None:
        """Take in users and items that were put, and those that were deleted, with the time."""
        if not put:
            return
        self._deleted_ms |= deleted
        former = {one for kind, one in deleted if kind == ITEM}
        self._window = [one for one in self._window if one.item_id not in former]
        items = {one: entity for (kind, one), entity in put.items() if kind == ITEM}
        users = {one: entity for (kind, one), entity in put.items() if kind != ITEM}
        self._entities = EntityChanges(
            {**self._entities.items, **items} if items else self._entities.items, {**self._entities.users, **users}
        )
        learner, before = self._learner, self._laid
        self._laid = self._overlay.lay(self._entities)
        if not items:
            return
        laid, base = self._laid, self.version.items.base
        former_ids = pa.array(sorted(former), before.item_ids.type)
        recent = before.item_ids.take(pa.array(learner.recent))
        recent = laid.items.find(recent.filter(pc.invert(pc.is_in(recent, former_ids))))
        vectors = np.concatenate(
            [learner.vectors[:base], np.zeros((len(laid.item_ids) - base, learner.vectors.shape[1]), np.float32)]
        )
        index = np.arange(len(laid.item_ids))
        parts: dict[str, list[Column]] = {name: [column] for name, column in self._base_columns.items()}
        for place, (one, row) in enumerate(sorted(laid.put.items(), key=lambda entry: entry[1])):
            columns = item_columns(self.version, one, self._entities.items[one], UNKNOWN)
            for name, column in columns.items():
                parts[name].append(column)
            index[row] = base + place
            vectors[row] = laid.item_vectors[np.array([row])][0]
        columns = {name: take(concatenate(part), index) for name, part in parts.items()}
        clicks = np.concatenate([self._base_clicks, np.zeros(len(index) - base, np.int64)])
        clicks[self._fresh_rows()] = 0
        if c.ITEM_ID in columns:
            columns[c.ITEM_ID] = tokens_of(self.version.features, c.ITEM_ID, laid.item_ids, learner.learned[c.ITEM_ID])
        learner.set_items(columns, vectors, clicks)
        learner.recent = recent[recent >= 0]

    def _fresh_rows(self) -> Longs:
        """Catalogue rows of items that were deleted and put again: what the version counted was of others."""
        fresh = [one for one, entity in self._entities.items.items() if entity.fresh and not self._is_known(one)]
        rows = self._laid.items.find(pa.array(fresh, self.version.item_ids.type))
        return rows[rows >= 0]

    @property
    def _items_have_ids(self) -> bool:
        """The item tower reads them; else only histories do, and the rows of items do not move."""
        return c.ITEM_ID in self._base_columns

    def _set_tokens(self, ids: pa.Table) -> None:
        """Note the rows of items in their table."""
        if not self._items_have_ids:
            return
        rows = self._laid.items.find(ids.column("id").combine_chunks())
        tokens = self._learner.item_tokens
        tokens[rows[rows >= 0]] = ids.column("row").to_numpy()[rows >= 0]

    def _first_rows(self) -> dict[str, int]:
        """Where the shards may have rows that the version does not know of, by partition."""
        last_day, first = self.version.last_day or "", dict[str, int]()
        for partition in partitions(self._shards) if last_day else []:
            at = 0
            for shard in usable_manifests(self._shards, partition).manifests:
                if shard.days and max(shard.days) >= last_day:
                    break
                at = shard.end_row
            first[str(partition)] = at
        return first

    def _new_events(self) -> dict[str, list[int]]:
        """Offsets of the log from which, and up to which, it is to be read."""
        if self._log is None:
            return {}
        return {
            str(partition): [self._events_at.get(str(partition), 0), end]
            for partition, end in enumerate(self._log.ends())
        }

    def _read_entities(self, events: Mapping[str, Sequence[int]]) -> "_Events":
        """What the log says of users and items between offsets, on top of what is known."""
        found: dict[Named, Entity] = {}
        deleted_ms: dict[Named, int] = {}
        strange = dict[str, int]()
        for name, (begin, end) in events.items():
            offset = begin
            while self._log is not None and offset < end:
                records = [one for one in self._log.read(int(name), offset, _EVENTS) if one.offset < end]
                for place, event in ((record.offset, record.event) for record in records):
                    said = event.content
                    if not isinstance(said, EntityPut | EntityDeleted):
                        continue
                    kind, one = said.kind, said.entity_id
                    if not is_id(one, self._id_type(c.ITEM_ID if kind == ITEM else c.USER_ID)):
                        strange[kind] = strange.get(kind, 0) + 1
                        continue
                    known = self._entities.items if kind == ITEM else self._entities.users
                    found[kind, one] = after(found.get((kind, one), known.get(one)), said, event.ts_ms, place)
                    if isinstance(said, EntityDeleted):
                        deleted_ms[kind, one] = event.ts_ms
                if not records:
                    break
                offset = records[-1].next_offset
        problems = [f"{count} events of an {kind}: their id is none of this version" for kind, count in strange.items()]
        return _Events(found, deleted_ms, problems)


@dataclass(frozen=True)
class _Events:
    """What the log says of users and items."""

    found: Mapping[Named, Entity]
    deleted_ms: Mapping[Named, int]
    """When those that were deleted were, the last time."""
    problems: list[str] = field(default_factory=list)

    def without(self, names: Iterable[Named]) -> "_Events":
        """The same without some users and items."""
        out = set(names)
        return _Events(
            {one: entity for one, entity in self.found.items() if one not in out},
            {one: ts_ms for one, ts_ms in self.deleted_ms.items() if one not in out},
        )


@dataclass(frozen=True)
class _Witness:
    """A positive of a user whom nothing is trained on."""

    item_id: EntityId
    vector: Floats
    """(D,) of the user, when it was seen."""


@dataclass(frozen=True)
class _Sorted:
    positives: Positives
    untrained: Positives
    counts: dict[str, int]
    times: list[int]
    held_back: dict[str, int]
    """Positives that are not trained, by the bound that they are beyond."""
    problems: list[str]
    """Why shards could not be used."""


@dataclass(frozen=True)
class _Part:
    positives: Positives
    """Of users who are trained on, and of others."""
    counts: dict[str, int]
    times: list[int]


@dataclass(frozen=True)
class _Learned:
    delta: Delta | None
    """None where it could not even be made."""
    problems: list[str]
    risen: frozenset[EntityId] = frozenset()
    """Items that rose too far."""


def _writable(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Columns whose ids may be changed: an item that is admitted has another row."""
    ids = columns.get(c.ITEM_ID)
    return {**columns, **({c.ITEM_ID: ids.copy()} if isinstance(ids, np.ndarray) else {})}


def _latest_clicks(version: Version, count: int) -> Longs:
    """Catalogue rows of the latest clicks of a version, oldest first."""
    order = np.argsort(version.clicks.ts_ms, kind="stable")[-count:]
    rows: Longs = version.clicks.item_row[order].astype(np.int64)
    return rows


def _ids(pairs: Sequence[tuple[EntityId, int]], kind: pa.DataType) -> pa.Table:
    return pa.table(
        {"id": pa.array([one for one, _ in pairs], kind), "row": pa.array([row for _, row in pairs], pa.int32())}
    )


def _fits(one: EntityId, kind: pa.DataType) -> bool:
    return type(one) is (int if kind == pa.int64() else str)


def _changes(
    before: Mapping[str, Mapping[EntityId, int]], now: Mapping[str, Mapping[EntityId, int]]
) -> dict[str, list[list[Any]]]:
    """Counts of ids that are other than before, by id; 0 = not counted any more."""
    return {
        name: sorted(
            [one, counts.get(one, 0)] for one in {**before[name], **counts} if counts.get(one) != before[name].get(one)
        )
        for name, counts in now.items()
    }


def _unknown(tokens: Any) -> int:
    return int((tokens == UNKNOWN).sum()) if isinstance(tokens, np.ndarray) else 0


def _no_rows(version: Version) -> pa.Table:
    kinds = {c.USER_ID: version.users.ids.type, c.ITEM_ID: version.item_ids.type, c.OUTCOME: pa.string()}
    times = dict.fromkeys((c.REQUEST_TS_MS, c.CLICK_TS_MS), pa.int64())
    return pa.schema([*kinds.items(), *times.items()]).empty_table()


def _times(rows: pa.Table) -> Longs:
    at = pc.coalesce(rows.column(c.CLICK_TS_MS), rows.column(c.REQUEST_TS_MS))
    times: Longs = at.combine_chunks().to_numpy(zero_copy_only=False)
    return times
