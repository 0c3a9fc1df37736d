"""The chain of deltas of one version: its state as it is opened, the plan of the next delta, and its commit.

The rows of shards and events of the log that make a delta are written down first (`next.json`), so that a killed run
makes the same delta again. After a number of deltas, all of them are folded into one, so that a chain is
opened fast however long it is.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.logs import EventLog
from twotower.logs.events import ITEM, USER, EntityId
from twotower.publish.delta import (
    Delta,
    Reports,
    base_digest,
    chain_folder,
    last_seq,
    prune,
    read_chain,
    write_delta,
    write_folded,
)
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError, UnavailableError, VersionError
from twotower.schema.files import read_json, whole_file, write_json
from twotower.stream.shards import partitions, read_positives, usable_manifests
from twotower.towers.two_tower import TwoTower
from twotower.update.entities import LoggedEntities, read_changes
from twotower.update.gate import Gate
from twotower.update.learn import TOLD, Input, Learned, Plan, learn
from twotower.update.options import ChainOptions
from twotower.update.state import Base, ChainState

log = logging.getLogger(__name__)

PLAN = "next.json"
QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Sources:
    """What a chain reads and writes."""

    deltas: Path
    """The folder of the chains of all versions."""
    shards: Path
    """Joined samples."""
    event_log: EventLog | None
    """Events of users and items are read from it; None = there are none."""


@dataclass(frozen=True)
class Done:
    """A delta that was committed."""

    seq: int
    rows: int
    """Rows of the shards."""
    watermark_ms: int | None
    refused: list[str] = field(default_factory=list)
    """Why the gate refused it; its rows are in quarantine, and nothing was learned from them."""
    held_back: dict[str, int] = field(default_factory=dict)
    """Positives that were not trained, by the bound that they are beyond."""
    set_aside: list[str] = field(default_factory=list)
    """What could not be used, a sentence for each shard, user or item."""


class Chain:
    """A version's chain, opened by the one updater that may write it; `model` gives the model of its checkpoint.

    Raises:
        VersionError: a delta is damaged or missing.
    """

    def __init__(
        self, version: Version, model: Callable[[], TwoTower], sources: Sources, options: ChainOptions
    ) -> None:
        self.version = version
        self._base = Base(version)
        self._model = model
        self._sources = sources
        self._options = options
        self._folder = chain_folder(sources.deltas, version.id)
        self._digest = base_digest(version.path)
        self._unwritten: Delta | None = None
        """A folded delta that is not written yet."""
        self._writing: threading.Thread | None = None
        self.unreadable: list[str] = []
        """Manifests of shards that cannot be read, as the latest plan found them."""
        self._open()

    def _open(self) -> None:
        """Open the state behind the latest delta."""
        self.close()
        model, deltas = self._model(), self._sources.deltas
        self.state = ChainState(self._base, model, self._first_rows(), self._options)
        self._gate = Gate(self.version, model, self._options.update.gate)
        self.follows, self._reports = self._digest, Reports()
        last, fold_every = last_seq(deltas, self.version.id), self._options.update.fold_every
        for delta in read_chain(deltas, self.version.path):
            try:
                self.state.apply(delta)
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError, pa.ArrowException) as error:
                raise VersionError(
                    f"delta {delta.seq} of {self.version.id} has not the contents of a delta ({error!r}): restore it"
                ) from error
            self._note(delta)
            if not delta.folded and last - self.seq < fold_every:  # a killed run left it out
                self._fold()
        if self.seq < last:
            raise VersionError(f"delta {self.seq + 1} of {self.version.id} is gone, and {last} is there: restore it")
        if self.seq:
            self.state.lay()

    def _note(self, delta: Delta) -> None:
        """Note a delta that is committed."""
        self.follows = delta.digest
        self._reports.note(delta)

    @property
    def seq(self) -> int:
        """Number of the latest delta."""
        return self.state.seq

    def _first_rows(self) -> dict[str, int]:
        """By partition of the shards, the number of the first row that the version may not know."""
        last_day, first = self.version.last_day or "", dict[str, int]()
        for partition in partitions(self._sources.shards) if last_day else []:
            known = 0
            for shard in usable_manifests(self._sources.shards, partition).manifests:
                if shard.days and max(shard.days) >= last_day:
                    break
                known = shard.end_row
            first[str(partition)] = known
        return first

    def plan(self) -> Plan | None:
        """What the next delta is to be made of: what was planned before, or what there is, up to a number of rows.

        None where there is nothing new.
        """
        if (planned := self._planned()) is not None:
            return planned
        shards: dict[str, list[int]] = {}
        left, unreadable = self._options.update.rows_per_delta, list[str]()
        for partition in partitions(self._sources.shards):
            usable = usable_manifests(self._sources.shards, partition)
            unreadable += usable.problems
            first = self.state.offsets["shards"].get(str(partition), 0)
            end = min(usable.manifests[-1].end_row if usable.manifests else first, first + left)
            if end > first:
                shards[str(partition)] = [first, end]
                left -= end - first
        for problem in unreadable:
            if problem not in self.unreadable:
                log.error("%s goes on without: %s", self.version.id, problem)
        self.unreadable = unreadable
        read = self.state.offsets["log"]
        ends = self._sources.event_log.ends() if self._sources.event_log is not None else []
        plan = Plan(self.seq + 1, shards, {str(name): [read.get(str(name), 0), end] for name, end in enumerate(ends)})
        return plan if shards or self._changes(plan).entities else None

    def _planned(self) -> Plan | None:
        """What was planned before; a plan that cannot be is passed over with a log line."""
        path, offsets = self._folder / PLAN, self.state.offsets
        if not path.exists():
            return None
        try:
            plan = Plan(**read_json(path))
            rows = [(offsets["shards"].get(name, 0), *ends) for name, ends in plan.shards.items()]
            events = [(offsets["log"].get(name, 0), *ends) for name, ends in plan.events.items()]
            whole = all(type(end) is int and at == first <= end for at, first, end in [*rows, *events])
            fits = sum(end - first for _, first, end in rows) <= self._options.update.rows_per_delta
        except (DataError, TypeError, ValueError, AttributeError) as error:
            log.warning("%s is passed over, and planned again: %r", path, error)
            return None
        return plan if whole and fits and plan.seq == self.seq + 1 else None

    def _changes(self, plan: Plan) -> LoggedEntities:
        """The users and items that the log puts or deletes, as a plan says."""
        if self._sources.event_log is None:
            return LoggedEntities({}, {})
        types = {ITEM: self.state.id_type(c.ITEM_ID), USER: self.state.id_type(c.USER_ID)}
        return read_changes(self._sources.event_log, plan.events, self.state.entities, types)

    def _read(self, plan: Plan) -> Input:
        changes, shards = self._changes(plan), self._sources.shards
        parts = [read_positives(shards, int(name), first, end) for name, (first, end) in plan.shards.items()]
        aside = [*changes.problems, *(problem for part in parts for problem in part.problems)]
        for problem in aside:
            log.error("delta %d of %s goes on without: %s", plan.seq, self.version.id, problem)
        tables = [table for part in parts for table in part.tables]
        return Input(plan, tables, sum(part.rows for part in parts), changes, aside)

    def make(self, plan: Plan) -> Done:
        """Learn what is planned, judge it, and commit it: as it is, or as refused, with nothing learned.

        Whatever is in shards and log, a delta is committed: what cannot be used is set aside and reported, and
        the gate refuses goes to quarantine.

        Raises:
            UnavailableError: the vector database does not answer. Nothing is committed: make the same plan again.
        """
        if self._planned() != plan:
            write_json(self._folder / PLAN, asdict(plan))
        given, risen = self._read(plan), frozenset[EntityId]()
        learned = self._attempt(given, risen)
        while learned.risen:
            risen |= learned.risen
            log.warning(
                "delta %d of %s is learned without the items that rose too far in the lists of others: %s",
                *(plan.seq, self.version.id, sorted(risen)[:TOLD]),
            )
            self._open()
            learned = self._attempt(given, risen)
        if problems := list(learned.problems):
            log.error("delta %d of %s is refused: %s", plan.seq, self.version.id, "; ".join(problems))
            self._quarantine(given)
            self._open()
            learned = learn(self.state, self._gate, replace(given, tables=[]), refused=problems)
        assert learned.delta is not None
        digest = write_delta(self._sources.deltas, learned.delta, self.follows)
        (self._folder / PLAN).unlink()
        self._note(replace(learned.delta, digest=digest))
        self._fold()
        if self._unwritten is not None:
            self.tidy()
        report = learned.delta.report
        return Done(
            plan.seq, given.rows, self.state.watermark_ms, problems, report["held_back"], report.get("set_aside", [])
        )

    def _attempt(self, given: Input, risen: frozenset[EntityId]) -> Learned:
        """Learn what is given: an error of whatever kind is a problem of these rows."""
        try:
            return learn(self.state, self._gate, given, without=risen)
        except (OSError, MemoryError):  # of the machine, not of the rows
            raise
        except UnavailableError:
            self._open()
            raise
        except Exception as error:
            log.exception("delta %d of %s cannot be learned", given.plan.seq, self.version.id)
            return Learned(None, [f"it cannot be learned: {error!r}"])

    def _quarantine(self, given: Input) -> None:
        """Keep the rows of a delta that was refused: in one file, or in several where their columns differ in type."""
        try:
            parts = [pa.concat_tables(given.tables, promote_options="default")] if given.tables else []
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            parts = list(given.tables)
        for number, part in enumerate(parts):
            name = f"{given.plan.seq:08d}-{number}.parquet" if number else f"{given.plan.seq:08d}.parquet"
            with whole_file(self._folder / QUARANTINE / name) as temporary:
                pq.write_table(part, temporary)

    def _fold(self) -> None:
        """Fold all deltas so far into one, where their number says so; `tidy` writes it."""
        fold_every = self._options.update.fold_every
        if fold_every and self.seq % fold_every == 0:
            self._unwritten = replace(self.state.folded(), report=self._reports.folded(), digest=self.follows)

    def tidy(self) -> None:
        """Write the folded delta if there is one, and remove the deltas that folded ones replace.

        A thread does this while the next delta is made; `close` waits for it.
        """
        self.close()
        folded, self._unwritten = self._unwritten, None
        self._writing = threading.Thread(target=self._tidy, args=(folded,), name="folded delta")
        self._writing.start()

    def _tidy(self, folded: Delta | None) -> None:
        try:
            if folded is not None:
                write_folded(self._sources.deltas, folded, self._digest)
            prune(self._sources.deltas, self.version.id)
        except OSError:
            log.exception("%s goes on without a folded delta", self.version.id)

    def close(self) -> None:
        """Wait until the folded delta is written."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
