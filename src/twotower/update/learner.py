"""The incremental step: from clicked rows to new rows of the ID tables; everything else is frozen, bit for bit.

A step moves only the rows of its positive pairs: the user's and the item's own, and with `negatives_move` those of its
negatives. Histories, other features and both networks take no gradient, and the rows for missing and unknown ids never
move.

B positives of a step, K negatives, N items of the catalogue, D vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from twotower.features.columns import Bag, Column, concatenate, pointers, take
from twotower.features.vocabulary import FIRST, UNKNOWN
from twotower.logs.events import EntityId
from twotower.publish.delta import Rows
from twotower.schema import columns as c
from twotower.towers.losses import Mask, SharedNegatives, shared_loss
from twotower.towers.two_tower import StepAssembler, TwoTower, table_of
from twotower.train.negatives import Draws, EasyNegatives
from twotower.train.towers import configured_loss
from twotower.update.options import ChainOptions
from twotower.update.rows import StreamPositives

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass
class Touched:
    """What moved while a delta is learned."""

    recent: Longs
    """(W,) catalogue rows of the latest positives, oldest first, those of the delta included."""
    rows: dict[str, set[int]] = field(default_factory=dict)
    """By table."""
    items: set[int] = field(default_factory=set)
    """Catalogue rows whose vectors changed."""
    admitted: dict[str, list[tuple[EntityId, int]]] = field(default_factory=dict)
    """By table, ids with their new rows."""
    no_room: int = 0
    """Ids that would have been admitted if the table had a free row."""
    loss: float = 0.0
    """Sum over positives."""
    before: dict[str, dict[int, Floats]] = field(default_factory=dict)
    """By table, the rows that moved, as they were; new ones are not among them."""

    def note(self, table: str, rows: Longs, weights: Floats) -> None:
        """Note that some rows are about to move."""
        known, before = self.rows.setdefault(table, set()), self.before.setdefault(table, {})
        for row in rows.tolist():
            if row not in known:
                known.add(row)
                before[row] = weights[row].copy()

    def before_of(self, table: str, moved: Rows) -> Rows:
        """Those of the moved rows that were there before, as they were."""
        before = self.before.get(table, {})
        if not before:
            return Rows.none(moved.values.shape[1])
        rows = np.array(sorted(before), np.int64)
        return Rows(rows, np.stack([before[row] for row in rows.tolist()]))


class Learner:
    """The tables of a version and what they become; each positive counts as much as in a batch of `train.batch_size`,
    so that the scale of the optimizer state still fits.

    Args:
        model: of the version's checkpoint; its tables are changed in place.
        catalogue: encoded features of the N items, ids included.
        item_vectors: (N, D) as served; changed in place.
        item_clicks: (N,) of the version, for negatives drawn by clicks.
        options: how it learns.
    """

    def __init__(
        self,
        model: TwoTower,
        catalogue: dict[str, Column],
        item_vectors: Floats,
        item_clicks: Longs,
        options: ChainOptions,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.options = options.update
        self._train = options.train
        self._negatives = replace(options.samples.negatives, count=options.update.negatives, shared=True)
        self._rate = options.update.learning_rate or options.train.table_learning_rate
        self._loss = configured_loss(options.train)
        self.learned: dict[str, dict[EntityId, int]] = {c.USER_ID: {}, c.ITEM_ID: {}}
        """By table, rows of ids whose row is not the version's."""
        self.pending: dict[str, dict[EntityId, int]] = {c.USER_ID: {}, c.ITEM_ID: {}}
        """By table, positives of ids that have no row yet."""
        vocabularies = model.features.vocabularies
        self.next_row = {name: FIRST + len(vocabulary.values) for name, vocabulary in vocabularies.items()}
        self.recent = np.zeros(0, np.int64)
        """(W,) catalogue rows of the latest positives, oldest first."""
        self._assembler = StepAssembler(model.features, model.tables)
        self.set_items(catalogue, item_vectors, item_clicks)

    def set_items(self, catalogue: dict[str, Column], item_vectors: Floats, item_clicks: Longs) -> None:
        """Learn from these items from now on: encoded features, vectors (N, D) and clicks (N,)."""
        self._columns, self.vectors, self.clicks = catalogue, item_vectors, item_clicks
        self._easy = EasyNegatives(self._negatives, item_clicks)
        self._position = np.full(len(item_vectors), -1, np.int64)
        self._readers = _readers_of(self.model, catalogue)
        self.item_tokens = np.zeros(len(item_vectors), np.int32)
        """(N,) row of each item in the table of item ids."""
        if c.ITEM_ID in catalogue:
            self.item_tokens = _as_rows(catalogue[c.ITEM_ID])

    def _admit(self, table: str, ids: Sequence[EntityId], tokens: npt.NDArray[np.int32], touched: Touched) -> None:
        """Count ids (B,) without a row, and give one to those that have come often enough; changes `tokens`."""
        if table not in self.options.tables or table not in self.model.tables:
            return
        embedding, pending, learned = self.model.tables[table], self.pending[table], self.learned[table]
        for place in np.flatnonzero(tokens == UNKNOWN).tolist():
            entity_id = ids[place]
            if learned.get(entity_id, UNKNOWN) != UNKNOWN:
                tokens[place] = learned[entity_id]
                continue
            pending[entity_id] = pending.get(entity_id, 0) + 1
            if pending[entity_id] < self.options.admit_after:
                continue
            row = self.next_row[table]
            if row >= len(embedding.weights):
                touched.no_room += 1
                continue
            del pending[entity_id]
            self.next_row[table] += 1
            embedding.weights[row] = embedding.weights[UNKNOWN]
            embedding.accumulator[row] = 0
            learned[entity_id] = tokens[place] = row
            touched.rows.setdefault(table, set()).add(row)
            touched.admitted.setdefault(table, []).append((entity_id, row))

    def forget(self, table: str, entity_id: EntityId, row: int, touched: Touched) -> None:
        """Clear the row of an id, which has no own row from now on."""
        embedding = self.model.tables[table]
        touched.rows.setdefault(table, set()).add(row)
        embedding.weights[row] = 0
        embedding.accumulator[row] = 0
        self.learned[table][entity_id] = UNKNOWN

    def step(self, rows: StreamPositives, number: Sequence[int], touched: Touched) -> None:
        """Train B positives, and note in `touched` what moves; with the seed, the step's number fixes all draws."""
        options = self.options
        user_tokens = self._admit_all(rows, touched)
        generator = np.random.default_rng([options.seed, *number])
        negatives, log_weight = self._draw(len(rows), touched.recent, generator)
        learned = np.concatenate([rows.item_row, negatives]) if options.negatives_move else rows.item_row
        distinct, place = np.unique(learned, return_inverse=True)
        inputs = self._assembler.assemble(
            rows.user, {name: take(column, distinct) for name, column in self._columns.items()}
        )
        user, item = (
            {name: x if name == own and name in options.tables else x.detach() for name, x in side.items()}
            for own, side in ((c.USER_ID, inputs.user), (c.ITEM_ID, inputs.item))
        )
        users, items = self.model.user_tower(user), self.model.item_tower(item)
        others = torch.from_numpy(self.model.as_trained(self.vectors[negatives]))
        if options.negatives_move:
            others = items[torch.from_numpy(place[len(rows) :])]
        total = shared_loss(
            self._loss,
            users,
            torch.cat([others, items]),
            torch.from_numpy(len(negatives) + place[: len(rows)]),
            SharedNegatives(log_weight, self._mask(negatives, rows.item_row, rows.clicked)),
            share=torch.from_numpy(rows.weight / np.float32(self._train.batch_size)),
            calibration=self.model.calibration,
        )
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
        pairs = {c.USER_ID: np.unique(user_tokens), c.ITEM_ID: np.unique(self.item_tokens[distinct])}
        for name in options.tables:
            moved, own = inputs.touched.get(name), pairs[name]
            if moved is None or moved.values.grad is None:
                continue
            gradient = moved.values.grad.numpy()
            kept = np.flatnonzero(np.isin(moved.rows, own[own >= FIRST]) & gradient.any(axis=1))
            touched.note(name, moved.rows[kept], self.model.tables[name].weights)
            self.model.tables[name].update(moved.rows[kept], gradient[kept], self._rate)
            if name == c.ITEM_ID:
                self._refresh(self._readers_rows(distinct, moved.rows[kept]), touched)
        touched.loss += float(total.detach()) * self._train.batch_size
        touched.recent = np.concatenate([touched.recent, rows.item_row])[-options.recent :]

    def _admit_all(self, rows: StreamPositives, touched: Touched) -> npt.NDArray[np.int32]:
        """Give rows to ids of some positives; returns the users' rows in their table."""
        user_tokens = np.zeros(0, np.int32)
        if c.USER_ID in rows.user:
            user_tokens = _as_rows(rows.user[c.USER_ID])
            self._admit(c.USER_ID, rows.user_ids.to_pylist(), user_tokens, touched)
        if c.ITEM_ID in self._columns:
            item_tokens = self.item_tokens[rows.item_row]
            self._admit(c.ITEM_ID, rows.item_ids.to_pylist(), item_tokens, touched)
            self.item_tokens[rows.item_row] = item_tokens
        return user_tokens

    def _refresh(self, rows: Longs, touched: Touched) -> None:
        """Compute the vectors of some items again."""
        if not len(rows):
            return
        columns = {name: take(column, rows) for name, column in self._columns.items()}
        self.vectors[rows] = self.model.encode_items(columns)
        touched.items.update(rows.tolist())

    def rows_of(self, table: str, touched: Touched) -> Rows:
        """The rows of a table that moved."""
        rows = np.array(sorted(touched.rows.get(table, ())), np.int64)
        return Rows(rows, self.model.tables[table].weights[rows])

    def _readers_rows(self, own: Longs, rows: Longs) -> Longs:
        """The items whose vectors read some rows of the table of item ids: as their own id, or by another feature."""
        if self._readers is None:
            return own[np.isin(self.item_tokens[own], rows)]
        order, starts = self._readers
        parts = [order[starts[row] : starts[row + 1]] for row in rows.tolist()]
        return np.unique(np.concatenate([own[np.isin(self.item_tokens[own], rows)], *parts]))

    def _draw(self, batch: int, recent: Longs, generator: np.random.Generator) -> tuple[Longs, Floats]:
        """Catalogue rows of distinct negatives (K,), and the log of how much each counts."""
        count, size = self.options.negatives, len(recent)
        wanted = round(self._negatives.easy.in_batch * count) if size else 0
        drawn = self._easy.draw_shared(max(batch, count), generator)
        if wanted:
            drawn = np.concatenate([recent[generator.integers(size, size=wanted)], drawn])
        if not len(drawn):
            drawn = generator.integers(len(self.vectors), size=count)
        negatives, copies = np.unique(drawn, return_counts=True)
        given = self._easy.draws(max(batch, count))
        draws = Draws(float(wanted), given.uniform, given.clicks)
        if not draws.total:
            draws = Draws(0.0, float(count), 0.0)
        with np.errstate(divide="ignore"):
            frequency = np.log(np.bincount(recent, minlength=len(self.vectors))[negatives]) - np.log(max(size, 1))
        log_weight = np.log(copies) - self._easy.log_expected(negatives, frequency, draws)
        if not self._train.is_softmax:
            log_weight = log_weight + self._easy.log_target(negatives)
        return negatives, log_weight.astype(np.float32)

    def _mask(self, negatives: Longs, item_row: Longs, clicked: Bag) -> Mask:
        """What is no negative of a row (B,): its own item, and what its user clicked."""
        self._position[negatives] = np.arange(len(negatives))
        both = concatenate([clicked, Bag(np.arange(len(item_row) + 1), item_row.astype(np.int32))])
        owner = np.repeat(np.arange(2 * len(item_row)), np.diff(both.indptr)) % max(len(item_row), 1)
        at = self._position[both.rows]
        pairs = np.unique(owner[at >= 0] * len(negatives) + at[at >= 0])
        self._position[negatives] = -1
        owner = pairs // len(negatives)
        return Mask(pointers(np.bincount(owner, minlength=len(item_row))), pairs % len(negatives))


def _as_rows(column: Column) -> npt.NDArray[np.int32]:
    """A column of ids, as rows of their table."""
    assert isinstance(column, np.ndarray)
    assert column.dtype == np.int32
    return column  # type: ignore[return-value]


def _readers_of(model: TwoTower, columns: Mapping[str, Column]) -> tuple[Longs, Longs] | None:
    """Items by the rows of the table of item ids that their other features read; None = no feature reads any."""
    pairs = [
        np.stack([np.repeat(np.arange(len(column)), np.diff(column.indptr)), column.rows.astype(np.int64)])
        if isinstance(column, Bag)
        else np.stack([np.arange(len(column)), np.asarray(column, np.int64)])
        for feature in model.features.item
        if feature.name != c.ITEM_ID and table_of(feature) == c.ITEM_ID
        for column in [columns[feature.name]]
    ]
    if not pairs:
        return None
    item, row = np.concatenate(pairs, axis=1)
    order = np.argsort(row, kind="stable")
    size = len(model.tables[c.ITEM_ID].weights)
    return item[order], pointers(np.bincount(row, minlength=size))
