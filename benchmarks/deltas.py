"""What a delta costs, how many samples a second are learned, and how long a chain of deltas takes to open.

    python benchmarks/deltas.py [--out benchmarks/results/deltas.json] [--smoke]

A simulated workspace with the defaults of `examples/demo.toml`, and clicks after its log with their requests (a
context, a history of 20 items), joined into shards, which are merged by the hour. Updaters learn them in deltas of 10,
100, 1,000 and 4,096 clicks, in turns; a server takes every delta up. End to end is from the shards to the committed
delta: rows read and decoded, judged, trained, laid over what is served, judged again, written and flushed. Beside it:
the same rows of each delta read from the shards alone, and from a Parquet file with a row group a delta.

For the opening, chains of so many deltas are written that touch rows drawn at random, as many a delta as 100 events a
second give (15 users, 14 items). Each is opened by a server and by an updater as it is, and folded, with as many deltas
behind the folded one as there can be. Times are medians, by the clock and by this process's own processor time, with
the 10th and the 90th percentile. Prints one JSON line.
"""

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import arguments_of, finish, note
from twotower.config import Settings, load
from twotower.features.vocabulary import FIRST
from twotower.logs import Event, LocalEventLog
from twotower.pipeline.line import open_served, run_line
from twotower.pipeline.places import places
from twotower.pipeline.streaming import join_log
from twotower.pipeline.updating import open_chain
from twotower.publish.delta import Delta, Rows, base_digest, chain_folder, delta_folder, read_delta, write_delta
from twotower.publish.tables import map_tables
from twotower.serve.snapshots import Snapshots
from twotower.stream.shards import read_rows
from twotower.update.chain import Chain
from twotower.update.learn import Plan
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

CONFIG = Path(__file__).parents[1] / "examples" / "demo.toml"
HISTORY = 20
TOUCHED = {"user_id": 15, "item_id": 14}
"""Rows that a delta touches in the chains that are opened."""


@dataclass
class Times:
    """Milliseconds by the clock and of this process."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def of(self, what: Callable[[], Any]) -> Any:
        """Call something, and note its time."""
        clock, processor = time.perf_counter(), time.process_time()
        result = what()
        self.clock.append(1000 * (time.perf_counter() - clock))
        self.processor.append(1000 * (time.process_time() - processor))
        return result

    def figures(self) -> dict[str, Any]:
        """As they stand in the report."""
        return {"clock_ms": spread(self.clock), "processor_ms": spread(self.processor)}


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"p50": round(float(middle), 2), "p10": round(float(low), 2), "p90": round(float(high), 2)}


def make_world(path: Path, users: int, items: int, days: int) -> Settings:
    """A published workspace."""
    simulate_workspace(path, WorldOptions(users=users, items=items, days=days, seed=0))
    changes = [
        *(f"workspace.path={json.dumps(str(path))}", "models.rankers=[]", "train.epochs=2"),
        "stream.log.partitions=1",
        *('models.channels=["two_tower", "item_cf", "popular"]', "update.fold_every=0"),
    ]
    settings = load(CONFIG, changes)
    run_line(settings, promoted=True)
    return settings


def happen(settings: Settings, clicks: int) -> None:
    """Clicks after the version, each with its request, in shards."""
    version, draw = open_served(settings), random.Random(0)
    users, items = version.users.ids.to_pylist(), version.item_ids.to_pylist()
    begin, events = (version.watermark_ms or 0) + 1000, []
    for n in range(clicks):
        user, item, at = draw.choice(users), draw.choice(items), begin + 100 * n
        asked = {"items": [item], "outcomes": ["impressed"], "positions": [1], "context": {"hour": 12},
                 "history": draw.sample(items, HISTORY)}  # fmt: skip
        events += [
            Event(f"r{n}", "request", user, at, f"r{n}", asked),
            Event(f"c{n}", "click", user, at + 50, f"r{n}", {"item_id": item}),
        ]
    log = LocalEventLog.open(places(settings).log, sync="never")
    for start in range(0, len(events), 1000):
        log.append(events[start : start + 1000])
    log.close()
    join_log(settings, follow=False, flush=True, share="1/1")


def copy_of(settings: Settings, name: str) -> Settings:
    """Another workspace with the same content."""
    path = Path(settings.workspace.path)
    copied = shutil.copytree(path, path.parent / name)
    return replace(settings, workspace=replace(settings.workspace, path=str(copied)))


def rows_of(shards: Path, plan: Plan) -> pa.Table:
    """The rows of a delta."""
    return pa.concat_tables(
        [read_rows(shards, int(name), first, end - first) for name, (first, end) in plan.shards.items()],
        promote_options="default",
    )


@dataclass
class Learned:
    """An updater and a server of a workspace of its own."""

    settings: Settings
    clicks: int
    chain: Chain
    server: Snapshots
    plans: list[Plan] = field(default_factory=list)
    update: Times = field(default_factory=Times)
    take_up: Times = field(default_factory=Times)
    touched: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, settings: Settings, clicks: int) -> "Learned":
        """An updater that makes deltas of so many clicks."""
        settings = copy_of(settings, f"in-{clicks}")
        settings = replace(settings, update=replace(settings.update, rows_per_delta=clicks))
        where = places(settings)
        chain = open_chain(settings, open_served(settings).path, None)
        return cls(settings, clicks, chain, Snapshots(where.versions, deltas=where.deltas))

    def next(self) -> None:
        """One more delta, taken up by the server."""

        def learn() -> None:
            plan = self.chain.plan()
            assert plan is not None
            assert not self.chain.make(plan).refused
            self.plans.append(plan)

        follows = self.chain.follows
        self.update.of(learn)
        self.take_up.of(self.server.refresh)
        assert self.server.version.delta_seq == self.chain.seq
        deltas, version = places(self.settings).deltas, self.chain.version.id
        delta = read_delta(deltas, version, self.chain.seq, follows)
        self.touched.append(sum(len(rows.rows) for rows in delta.tables.values()))
        self.sizes.append(sum(path.stat().st_size for path in delta_folder(deltas, version, self.chain.seq).iterdir()))

    def figures(self) -> dict[str, Any]:
        """The first delta is left out: everything is met for the first time."""
        shards, read, parquet = places(self.settings).shards, Times(), Times()
        file = shards / "rows.parquet"
        tables = [read.of(lambda plan=plan: rows_of(shards, plan)) for plan in self.plans]
        schema = pa.unify_schemas([table.schema for table in tables])
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=table.num_rows)
        with pq.ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                parquet.of(lambda group=group: opened.read_row_group(group))
        rows = [table.num_rows for table in tables]
        figures = {"clicks": self.clicks, "deltas": len(rows) - 1, "rows_touched": spread(self.touched[1:]),
                   "bytes": spread(self.sizes[1:])}  # fmt: skip
        for name, times in (("update", self.update), ("take_up", self.take_up)):
            kept = Times(times.clock[1:], times.processor[1:])
            figures[name] = kept.figures()
        for name, times in (("end_to_end", self.update), ("shards_read", read), ("parquet_read", parquet)):
            figures[f"{name}_samples_a_s"] = {
                "clock": round(1000 * sum(rows[1:]) / sum(times.clock[1:])),
                "processor": round(1000 * sum(rows[1:]) / sum(times.processor[1:])),
            }
        return figures


def write_chain(settings: Settings, count: int) -> None:
    """Deltas that touch rows at random."""
    version, deltas, draw = open_served(settings), places(settings).deltas, np.random.default_rng(0)
    tables = map_tables(version.path / "channels" / "two_tower")
    vocabularies = version.features.vocabularies
    rows_of_items = vocabularies["item_id"].rows(version.item_ids)
    known = np.flatnonzero(rows_of_items >= FIRST)
    users = FIRST + len(vocabularies["user_id"].values)
    vectors, width, follows = np.asarray(version.item_vectors), tables["item_id"].shape[1], base_digest(version.path)
    nothing: dict[str, list[Any]] = {"user_id": [], "item_id": []}
    with mock.patch("twotower.schema.files.os.fsync"):  # they are only read, and would take minutes to flush
        for seq in range(1, count + 1):
            items = np.sort(draw.choice(known, TOUCHED["item_id"], replace=False))
            rows = {
                "item_id": np.sort(rows_of_items[items]).astype(np.int64),
                "user_id": np.sort(FIRST + draw.choice(users - FIRST, TOUCHED["user_id"], replace=False)),
            }
            ids = version.item_ids.take(pa.array(items))
            delta = Delta(
                version.id,
                seq,
                (version.watermark_ms or 0) + 250 * seq,
                {name: Rows(one, draw.standard_normal((len(one), width)).astype(np.float32) * 0.1)
                 for name, one in rows.items()},
                {},
                ids,
                vectors[items],
                {"shards": {}, "log": {}},
                {"positives": len(items), "recall": {str(seq // 14_400): [3, len(items)]}},
                {f"{name}.accumulator": np.ones(len(one), np.float32) for name, one in rows.items()},
                {"entities": [], "pending": nothing, "recent": ids.to_pylist(), "window": []},
            )  # fmt: skip
            follows = write_delta(deltas, delta, follows)


def measure_opening(settings: Settings, count: int, repeats: int, every: int) -> list[dict[str, Any]]:
    """A chain as it is, then folded."""
    where, path = places(settings), open_served(settings).path
    if count:
        write_chain(settings, count)
    found = []
    for folded in (False, True) if count else (False,):
        written, removed = Times(), Times()
        if folded:
            fold_at(settings, count - every, every, written)
            fold_at(settings, count, every, removed)  # the second, so that what the first stands for goes
        server, updater = Times(), Times()
        for _ in range(repeats):
            opened = server.of(lambda: Snapshots(where.versions, deltas=where.deltas))
            assert (opened.version.delta_seq, opened.refused_delta) == (count, None)
            chain = updater.of(lambda: open_chain(settings, path, None))
            assert chain.seq == count
        files = [one for one in chain_folder(where.deltas, path.name).rglob("*") if one.is_file()]
        size = sum(one.stat().st_size for one in files)
        found.append({"deltas": count, "folded": folded, "files": len(files), "mb": round(size / 1e6, 1),
                      "server": server.figures(), "updater": updater.figures(),
                      **({"written_ms": round(written.clock[0]), "written_and_removed_ms": round(removed.clock[0])}
                         if folded else {})})  # fmt: skip
        note(json.dumps(found[-1]))
    return found


def fold_at(settings: Settings, last: int, every: int, written: Times) -> None:
    """Write the folded delta that is due at a number or before it, as an updater does that opens the chain."""
    where, version = places(settings), open_served(settings)
    chain, away = chain_folder(where.deltas, version.id), Path(settings.workspace.path) / "away"
    away.mkdir()
    later = [one for one in chain.iterdir() if one.name.isdigit() and int(one.name) > last]
    for one in later:
        one.rename(away / one.name)
    opened = open_chain(replace(settings, update=replace(settings.update, fold_every=every)), version.path, None)

    def write() -> None:
        opened.tidy()
        opened.close()

    written.of(write)
    for one in later:
        (away / one.name).rename(chain / one.name)
    away.rmdir()


def main() -> None:
    arguments = arguments_of(__doc__, "a small world, few and short chains").parse_args()
    smoke = arguments.smoke
    sizes = {10: 4, 100: 3} if smoke else {10: 41, 100: 31, 1000: 13, 4096: 9}
    chains = {0: 2, 39: 2} if smoke else {0: 5, 999: 5, 9_999: 3}
    every = 10 if smoke else 250
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        world = (300, 300, 3) if smoke else (5_000, 3_000, 7)
        settings = make_world(Path(scratch) / "world", *world)
        opening = [one for count, times in chains.items()
                   for one in measure_opening(copy_of(settings, f"chain-{count}"), count, times, every)]  # fmt: skip
        happen(settings, max(size * count for size, count in sizes.items()) + max(sizes))
        learned = [Learned.of(settings, size) for size in sizes]
        for turn in range(max(sizes.values())):
            for one in learned:
                if turn < sizes[one.clicks]:
                    one.next()
        deltas = [one.figures() for one in learned]
    finish(
        arguments,
        "deltas",
        load_average_before=round(load_before, 1),
        world=dict(zip(("users", "items", "days"), world, strict=True)),
        fold_every=every,
        deltas=deltas,
        opening=opening,
    )


if __name__ == "__main__":
    main()
