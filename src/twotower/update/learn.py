"""Makes one delta: the state learns the positives of joined rows, and the gate judges the result."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.features.columns import Bag
from twotower.logs.events import EntityId
from twotower.publish.delta import Delta
from twotower.schema.errors import shown
from twotower.update.entities import LoggedEntities
from twotower.update.gate import Gate, Recall, by_hour, check_served, drift, hits, lists_with, recall_among, spaced
from twotower.update.learner import Touched
from twotower.update.rows import StreamPositives
from twotower.update.select import Selection, select
from twotower.update.state import ChainState, Witness, pending_changes, window_of

JUDGED_SCORES = 4_000_000
"""Largest number of scores that test-then-train recall costs a delta: in a large catalogue few positives are judged."""
JUDGED_K = 20
TOLD = 20
"""Largest number of reasons in a delta's report."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What the next delta is made of."""

    seq: int
    shards: Mapping[str, Sequence[int]]
    """By partition, the numbers of the first row and of the one behind the last."""
    events: Mapping[str, Sequence[int]]
    """By partition of the log, the offsets between which events of users and items are read."""


@dataclass(frozen=True)
class Input:
    """What a delta is made of, as it was read."""

    plan: Plan
    tables: Sequence[pa.Table]
    """Joined rows, by shard."""
    rows: int
    """Rows of the shards that were read."""
    changes: LoggedEntities
    set_aside: Sequence[str]
    """What could not be read."""


@dataclass(frozen=True)
class Learned:
    """The result of learning from an input."""

    delta: Delta | None
    """None where it could not be made."""
    problems: Sequence[str] = ()
    """Why the gate refuses it."""
    risen: frozenset[EntityId] = frozenset()
    """Items that rose too far: the delta must be learned without them."""


def learn(
    state: ChainState,
    gate: Gate,
    given: Input,
    *,
    without: frozenset[EntityId] = frozenset(),
    refused: Sequence[str] = (),
) -> Learned:
    """Learn the next delta into the state. Where something is wrong with it, the state must be opened again.

    Nothing is learned of the items `without`, which rose too far. With `refused`, the reasons why the rows were
    refused, the delta holds users and items only, and the gate is not asked.
    """
    known_aside = set(state.told_aside)
    lesson = _lesson(state, given, without)
    delta = _delta(state, lesson, _report(state, lesson, without, refused))
    vectors, positives = state.learner.vectors, lesson.selection.trained
    if not refused and (problems := gate.check(delta, lesson.touched, vectors, lesson.recall)):
        return Learned(delta, problems)
    state.apply(delta)
    laid = state.lay()
    noted = [
        f"{kind} {shown(entity_id)}: {why}"
        for (kind, entity_id), why in state.told_aside.items()
        if (kind, entity_id) not in known_aside
    ]
    if aside := [*given.set_aside, *lesson.selection.problems, *noted]:
        delta = replace(delta, report={**delta.report, "set_aside": aside[:TOLD]})
    if not refused and (problems := check_served(laid, vectors, state.options.update.gate)):
        return Learned(delta, problems)
    if not len(positives):
        return Learned(delta)
    ids = laid.item_ids.take(pa.array(lesson.rows)).to_pylist()
    changes = zip(ids, (lists_with(laid, vectors, lesson.rows) - lesson.listed).tolist(), strict=True)
    risen = state.windows.risen(int(positives.ts_ms[-1]), changes)
    state.windows.restore([[]] * 4, risen)
    too_far = gate.risen_too_far(state.windows, positives.ts_ms, ids)
    return Learned(replace(delta, state={**delta.state, "risen": risen}), risen=frozenset(too_far))


@dataclass(frozen=True)
class _Lesson:
    """What the learner made of an input."""

    given: Input
    selection: Selection
    rows: Longs
    """Catalogue rows of the items whose positives were trained."""
    listed: Longs
    """In how many lists these were before."""
    touched: Touched
    forgotten: Mapping[str, list[tuple[EntityId, int]]]
    """By table, ids that lost their rows."""
    pending: Mapping[str, Mapping[EntityId, int]]
    """By table, positives of ids without a row, before."""
    witnesses: list[Witness]
    """Positives of held-out users."""
    judged: dict[str, list[int]]
    """Test-then-train recall."""
    recall: Recall


def _lesson(state: ChainState, given: Input, without: frozenset[EntityId]) -> _Lesson:
    """Train what is given; it changes the state's learner and entities."""
    learner, options = state.learner, state.options
    pending = {name: dict(counts) for name, counts in learner.pending.items()}
    state.take(given.changes)
    touched = Touched(learner.recent)
    forgotten = state.forget(given.changes.deleted_ms, touched)
    selection = select(state, given.tables, held_out_users=options.samples.held_out_users, risen=without)
    positives, out = selection.trained, selection.held_out
    rows = np.unique(positives.item_row)
    listed = lists_with(state.laid, learner.vectors, rows) if len(rows) else rows
    judged = _judge(state, positives)
    vectors = list(learner.model.encode_users(out.user)) if len(out) else []
    witnesses = [Witness(*pair) for pair in zip(out.item_ids.to_pylist(), vectors, strict=True)]
    before = _recall(state, witnesses)
    for step, start in enumerate(range(0, len(positives), options.update.batch_size)):
        part = np.arange(start, min(start + options.update.batch_size, len(positives)))
        learner.step(positives.take(part), (given.plan.seq, step), touched)
    recall = Recall(before, _recall(state, witnesses))
    return _Lesson(given, selection, rows, listed, touched, forgotten, pending, witnesses, judged, recall)


def _report(state: ChainState, lesson: _Lesson, without: frozenset[EntityId], refused: Sequence[str]) -> dict[str, Any]:
    """The report of a delta."""
    learner, selection, touched = state.learner, lesson.selection, lesson.touched
    return {
        **selection.counts,
        "admitted": {name: len(ids) for name, ids in touched.admitted.items()},
        "no_room": touched.no_room,
        "waiting": {name: len(ids) for name, ids in learner.pending.items() if ids},
        "loss": round(touched.loss / max(1, len(selection.trained)), 6),
        "recall": lesson.judged,
        "recall_held_out": asdict(lesson.recall),
        "drift": round(drift(touched.recent, learner.clicks), 6),
        "held_back": selection.held_back,
        **({"risen": sorted(without)[:TOLD]} if without else {}),
        **({"repaired": state.repaired} if state.repaired else {}),
        **({"refused": list(refused)} if refused else {}),
    }


def _delta(state: ChainState, lesson: _Lesson, report: Mapping[str, Any]) -> Delta:
    """The delta of a lesson, without what is known only when it is laid over the version."""
    learner, touched, plan = state.learner, lesson.touched, lesson.given.plan
    positives, latest_ms = lesson.selection.trained, lesson.selection.latest_ms
    tables = {name: learner.rows_of(name, touched) for name in sorted(touched.rows)}
    moved = np.array(sorted(touched.items), np.int64)
    return Delta(
        state.version.id,
        plan.seq,
        max((ts_ms for ts_ms in (state.watermark_ms, latest_ms) if ts_ms is not None), default=None),
        tables,
        {
            name: _ids([*lesson.forgotten.get(name, []), *touched.admitted.get(name, [])], state.id_type(name))
            for name in sorted({*lesson.forgotten, *touched.admitted})
        },
        state.laid.item_ids.take(pa.array(moved)),
        learner.vectors[moved],
        {
            kind: state.offsets[kind] | {name: int(end) for name, (_, end) in spans.items()}
            for kind, spans in (("shards", plan.shards), ("log", plan.events))
        },
        report,
        {**state.accumulators(tables), **window_of(lesson.witnesses)},
        {
            **lesson.given.changes.state(),
            "pending": pending_changes(lesson.pending, learner.pending),
            "recent": positives.item_ids.to_pylist(),
            "window": [witness.item_id for witness in lesson.witnesses],
            "counted": state.windows.counted(
                positives.user_ids.to_pylist(), positives.item_ids.to_pylist(), positives.ts_ms.tolist()
            ),
            "risen": [],
        },
    )


def _ids(pairs: Sequence[tuple[EntityId, int]], kind: pa.DataType) -> pa.Table:
    ids, rows = [entity_id for entity_id, _ in pairs], [row for _, row in pairs]
    return pa.table({"id": pa.array(ids, kind), "row": pa.array(rows, pa.int32())})


def _recall(state: ChainState, witnesses: Sequence[Witness]) -> float | None:
    """Recall of the latest positives of held-out users, None where there are too few."""
    options, latest = state.options.update.gate, state.with_latest(witnesses)
    rows = state.rows_of([witness.item_id for witness in latest])
    there = np.flatnonzero(rows >= 0)
    if len(there) < options.min_positives:
        return None
    users = np.stack([latest[at].vector for at in there.tolist()])
    return round(recall_among(users, rows[there], state.learner.vectors, options.k), 6)


def _judge(state: ChainState, positives: StreamPositives) -> dict[str, list[int]]:
    """Test, then train: which of the positives to come would have been found, by hour."""
    if not len(positives):
        return {}
    vectors = state.learner.vectors
    part = positives.take(spaced(len(positives), max(1, JUDGED_SCORES // len(vectors))))
    nothing = Bag(np.zeros(len(part) + 1, np.int64), np.zeros(0, np.int32))
    hidden = part.clicked if state.options.hide_clicked else nothing
    users = state.learner.model.encode_users(part.user)
    return by_hour(part.ts_ms, hits(users, part.item_row, vectors, hidden, JUDGED_K))
