"""Kill the updaters again and again, and compare what is left with an undisturbed run.

    python benchmarks/soak/update.py --part incremental --kills 500 --seed 0
    python benchmarks/soak/update.py --part full --kills 200 --seed 0
    python benchmarks/soak/update.py --part line --kills 500 --seed 0

A process is killed (SIGKILL) at a random moment; or right before a random one of the files and folders below its
workspace that it writes, flushes, removes or makes; or right before a random rename. What lies between two commits may
take microseconds, which the clock alone would seldom meet. Another process goes on, until one ends by itself.

`incremental`: shards grow in steps, users and items are put and deleted, the gate is so strict that it refuses some
deltas, and every four deltas are folded. In the end every file below `deltas/` is that of an undisturbed run
(`next.json` and the lock aside), and a server's snapshot takes up the last delta.

`full`: two days are due, and what comes after them is in the shards and was learned for the served version already. In
the end each day has one version, in their order, and every file of the workspace is that of an undisturbed run, and no
other is there: versions, deltas, checkpoints, samples, tables of users and items. Versions have their names from the
clock: ids are replaced by their places in the chain, and of manifests everything is compared but the time of their
making, the path of the workspace and digests that cover these.

`line`: a writer appends to the log and notes what is acknowledged, a joiner and an updater follow; each is killed now
and then and started again at once. What a delta is made of depends on what has arrived, so here bytes differ. In the
end every acknowledged event is in the log once at its offset, the shards have the rows of an undisturbed joiner and
each click of the log once, each delta has learned the rows between the offsets of the delta before and its own, and the
clicks that were learned, each once, are those of the log and of an undisturbed updater.

The processes are forks of this one, which has imported everything and run nothing. A part ends with a line, one JSON
object.
"""

import argparse
import itertools
import json
import logging
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forks
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from forks import Work

from twotower.config import Settings, parse
from twotower.datasets.places import Places
from twotower.features.bloom import is_held_out
from twotower.logs import Event, LocalEventLog
from twotower.logs.events import item_deleted, item_event, user_deleted
from twotower.pipeline.full import FULL, FULL_LOCK, update_full
from twotower.pipeline.line import LATEST, run_line
from twotower.pipeline.places import places
from twotower.pipeline.streaming import join_log
from twotower.pipeline.updating import learn
from twotower.publish.delta import FOLDED, Delta, base_digest, delta_folder, last_seq, read_delta
from twotower.publish.manifest import DIGEST
from twotower.publish.publish import CURRENT, PROMOTING, current_path, list_versions, verify
from twotower.publish.version import read_manifest
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.files import MANIFEST, TEMPORARY, read_json
from twotower.serve.snapshots import Snapshots
from twotower.stream.shards import manifests, partitions, read_rows
from twotower.update.chain import PLAN, QUARANTINE
from twotower.update.incremental import LOCK
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

BY_THE_CLOCK = {"created_ms", "follows", "stands_for", DIGEST}
"""Of manifests: the time of a version's making, and digests of manifests that have it."""
GROWTHS = 3
"""How often the shards grow in a round of `incremental`."""
CLICKS = 150
"""Of such a growth."""
REACH = 0.3
"""Share of the time of an undisturbed growth within which a process is killed, so that one growth takes several."""
REACH_OF_DAYS = 0.6
"""The same of an undisturbed full update of two days."""
KILLS_A_LINE = 50
"""A line begins anew after so many kills, so that its chain stays short."""
LONGEST_S = 0.35
"""Between two kills of a line."""
RETRIED = 20
"""Steps that a writer sends again, as a client does that got no answer."""
PAUSE_S = 0.004
"""Of the writer, between two appends."""

Click = tuple[Any, Any, int]
"""Of whom, on what, when."""


def configuration(workspace: Path) -> Settings:
    """Small everywhere, with a gate that refuses some of the deltas."""
    user = {
        "user_id": {"kind": "categorical"},
        "age": {"kind": "numeric", "transform": "standard"},
        "history": {"kind": "sequence", "last": 10, "encoder": "mean"},
    }
    item = {"item_id": {"kind": "categorical"}, "category": {"kind": "categorical"}}
    return parse(
        {
            "workspace": {"path": str(workspace)},
            "features": {"user": user, "item": item},
            "samples": {"vocabulary_room": 0.5, "held_out_users": 0.1},
            "models": {
                "dimension": 8,
                "user_tower": {"layers": [16]},
                "item_tower": {"layers": [16]},
                "channels": ["two_tower", "popular"],
                "rankers": [],
            },
            "train": {"epochs": 2, "batch_size": 256, "threads": 1, "checkpoint_s": 0.005},
            "stream": {"shard_events": 60, "merged_mb": 1, "follow_s": 0.01},
            "update": {
                "rows_per_delta": 15,
                "batch_size": 8,
                "negatives": 32,
                "recent": 64,
                "follow_s": 0.02,
                "fold_every": 4,
                "gate": {"max_move": 0.6, "k": 10, "min_positives": 20, "margin": 0.1},
            },
        }
    )


def moved(settings: Settings, workspace: Path) -> Settings:
    """The same for a copy of the workspace."""
    return replace(settings, workspace=replace(settings.workspace, path=str(workspace)))


# ------------------------------------------------------------------------------------------------ worlds and events


@dataclass(frozen=True)
class World:
    """A published workspace, only read: rounds begin with copies."""

    settings: Settings
    users: list[int]
    items: list[str]
    begin_ms: int
    """Behind all that the version knows of."""


def make_world(folder: Path, later_days: int) -> World:
    """A tiny simulated world, published after two days; of further days there are events, that no version knows."""
    workspace = folder / "world"
    settings = configuration(workspace)

    def publish() -> None:
        simulate_workspace(workspace, WorldOptions(users=100, items=100, days=3 + later_days, seed=0))
        late = sorted((workspace / "events").iterdir())[2:]
        for day in late:
            day.rename(workspace / day.name)
        run_line(settings, promoted=True)
        for day in late:
            (workspace / day.name).rename(day)

    forks.run(publish)
    users = pq.read_table(workspace / "users.parquet").column(c.USER_ID).to_pylist()
    items = pq.read_table(workspace / "items.parquet").column(c.ITEM_ID).to_pylist()
    watermark_ms = read_manifest(current_path(places(settings).versions))["watermark_ms"]
    return World(settings, users, items, (watermark_ms // DAY_MS + 1 + later_days) * DAY_MS)


def copied(world: World, workspace: Path) -> Settings:
    """The settings of a fresh copy of a world."""
    shutil.copytree(world.settings.workspace.path, workspace)
    return moved(world.settings, workspace)


def happen(settings: Settings, events: Sequence[Event]) -> None:
    """Append events to a workspace's log and join it to its end."""

    def appended() -> None:
        with closing(LocalEventLog.open(places(settings).log, sync="never")) as log:
            log.append(events)
        join_log(settings, follow=False, flush=True, share="1/1")

    forks.run(appended)


def some_clicks(world: World, draw: random.Random, name: str, count: int, begin_ms: int, step_ms: int) -> list[Event]:
    """Clicks of users on items, one after the other."""
    return [
        Event(
            f"{name}-{n}",
            "click",
            draw.choice(world.users),
            begin_ms + n * step_ms,
            body={c.ITEM_ID: draw.choice(world.items)},
        )
        for n in range(count)
    ]


def with_entities(world: World, clicks: Sequence[Event], number: int) -> list[Event]:
    """The same with an item that is new and clicked, one that is deleted, and a user who is deleted, in the middle."""
    place = len(clicks) // 2
    at_ms, new = clicks[place].ts_ms, f"new {number}"
    put = [
        item_event(f"put {number}", at_ms, new, {"category": "other"}, None),
        item_deleted(f"gone {number}", at_ms, world.items[-1 - number]),
        user_deleted(f"left {number}", at_ms, world.users[-1 - number]),
    ]
    begun = [replace(one, body={c.ITEM_ID: new}) if n % 20 == 0 else one for n, one in enumerate(clicks[place:])]
    return [*clicks[:place], *put, *begun]


# ------------------------------------------------------------------------------------------------ what is compared


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, plans and locks aside."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (PLAN, LOCK, FULL_LOCK, PROMOTING)
    }


def same(name: str, mine: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    """Hold files against those of an undisturbed run.

    Raises:
        AssertionError: they are others, or have another content.
    """
    missing, more = sorted(theirs.keys() - mine.keys()), sorted(mine.keys() - theirs.keys())
    assert not missing, f"{name}: {missing} are missing"
    assert not more, f"{name}: {more} are not there undisturbed"
    other = [path for path in theirs if mine[path] != theirs[path]]
    assert not other, f"{name}: {other} have other bytes than undisturbed"


def check_served(settings: Settings) -> None:
    """Verify all versions, and open what is served as a server does.

    Raises:
        AssertionError: a version is damaged; what is served is not the version with all its deltas.
    """
    where = places(settings)
    for listed in list_versions(where.versions):
        assert verify(where.versions / listed.id) == [], listed
    served = Snapshots(where.versions, deltas=where.deltas)
    assert served.refused_delta is None, served.refused_delta
    assert served.version.delta_seq == last_seq(where.deltas, served.version.id), "not all deltas are served"


def deltas_of(where: Places, version_id: str) -> Iterator[Delta]:
    """The deltas of a version in their order, each checked that it follows the one before."""
    follows = base_digest(where.versions / version_id)
    for seq in range(1, last_seq(where.deltas, version_id) + 1):
        yield read_delta(where.deltas, version_id, seq, follows)
        follows = read_json(delta_folder(where.deltas, version_id, seq) / MANIFEST)[DIGEST]


class Left:
    """What kills leave behind, by how it is called: how often each was seen new after a kill.

    Args:
        patterns: globs below the folder by name.
    """

    def __init__(self, patterns: dict[str, str]) -> None:
        self._patterns = patterns
        self._known: set[tuple[str, int]] = set()
        self.counts: Counter[str] = Counter()

    def look(self, folder: Path) -> None:
        """Count what is new since the last look."""
        for name, pattern in self._patterns.items():
            for path in folder.glob(pattern):
                mark = (str(path), path.stat().st_ctime_ns)
                self.counts[name] += mark not in self._known
                self._known.add(mark)


# ------------------------------------------------------------------------------------------------ the three parts


def incremental(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill so many incremental updaters; counts of what happened."""
    draw, world = random.Random(seed), make_world(folder, later_days=0)
    growths = []
    for number in range(GROWTHS):
        clicks = some_clicks(world, draw, f"c{number}", CLICKS, world.begin_ms + number * DAY_MS, 60_000)
        growths.append(with_entities(world, clicks, number))

    def grow(settings: Settings, learned: Callable[[int, Work], None]) -> Places:
        for number, events in enumerate(growths):
            happen(settings, events)
            learned(number, lambda: learn(settings, follow=False, dry_run=False))
        forks.run(lambda: check_served(settings))
        return places(settings)

    usual: list[forks.Ran] = []
    undisturbed = copied(world, folder / "undisturbed")
    where = places(undisturbed)
    grow(undisturbed, lambda _, work: usual.append(forks.measured(work, where.deltas)))
    expected, deltas = content(where.deltas), last_seq(where.deltas, current_path(where.versions).name)
    killed, rounds = 0, 0
    left = Left(
        {
            "a plan": f"*/{PLAN}",
            "half a plan": f"*/{TEMPORARY}{PLAN}",
            "half a delta": f"*/{TEMPORARY}[0-9]*",
            "half a folded delta": f"*/{FOLDED}/{TEMPORARY}*",
            "half a quarantined file": f"*/{QUARANTINE}/{TEMPORARY}*",
        }
    )
    own = moved(world.settings, folder / "round")

    def learned(number: int, work: Work) -> None:
        nonlocal killed
        while killed < kills:
            if forks.disturbed(work, places(own).deltas, draw, usual[number], REACH):
                return
            killed += 1
            left.look(places(own).deltas)
        forks.run(work)

    while killed < kills:
        rounds += 1
        copied(world, Path(own.workspace.path))
        same(f"round {rounds}", content(grow(own, learned).deltas), expected)
        shutil.rmtree(own.workspace.path)
    return {
        "rounds": rounds,
        "deltas": deltas * rounds,
        "refused": sum(f"/{QUARANTINE}/" in name for name in expected) * rounds,
        "left_by_kills": dict(sorted(left.counts.items())),
    }


def full(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill this many full updates; counts of what happened."""
    draw, world = random.Random(seed), make_world(folder, later_days=1)
    update, train = (
        replace(world.settings.update, rows_per_delta=50, fold_every=2),
        replace(world.settings.train, batch_size=32),
    )
    prepared = replace(world.settings, update=update, train=train)
    world = replace(world, settings=prepared)
    clicks = some_clicks(world, draw, "c", 120, world.begin_ms, 2 * DAY_MS // 120)
    happen(prepared, with_entities(world, clicks, 0))
    forks.run(lambda: learn(prepared, follow=False, dry_run=False))
    where = places(prepared)
    first = current_path(where.versions).name
    plan = update_full(prepared, dry_run=True).plan
    assert isinstance(plan, dict)
    due = plan["days"]
    assert len(due) == 2, f"{due} are due"

    def work(settings: Settings) -> Work:
        return lambda: update_full(settings, dry_run=False)

    undisturbed = copied(world, folder / "undisturbed")
    usual = forks.measured(work(undisturbed), Path(undisturbed.workspace.path))
    expected = learned_days(undisturbed, first, due)
    own = moved(world.settings, folder / "round")
    mine = places(own)
    killed, rounds = 0, 0
    left = Left(
        {
            "half of the samples": f"{TEMPORARY}samples",
            "half a training": "checkpoints/run-*/step-*",
            "half a version": f"versions/{TEMPORARY}*",
            "half a delta": f"deltas/*/{TEMPORARY}[0-9]*",
            "a planned delta": f"deltas/*/{PLAN}",
        }
    )
    while killed < kills:
        rounds += 1
        copied(world, mine.workspace)
        while killed < kills:
            if forks.disturbed(work(own), mine.workspace, draw, usual, REACH_OF_DAYS):
                break
            killed += 1
            left.look(mine.workspace)
            done = {day["version"] for day in read_json(mine.checkpoints / LATEST).get(FULL, [])}
            left.counts["promoted and not noted"] += current_path(mine.versions).name not in {first, *done}
        else:
            forks.run(work(own))
        same(f"round {rounds}", learned_days(own, first, due), expected)
        shutil.rmtree(mine.workspace)
    return {
        "rounds": rounds,
        "days": len(due) * rounds,
        "deltas": sum(name.startswith("deltas/") and name.endswith(f"/{MANIFEST}") for name in expected) * rounds,
        "undisturbed_s": round(usual.seconds, 2),
        "left_by_kills": dict(sorted(left.counts.items())),
    }


def learned_days(settings: Settings, first: str, due: Sequence[str]) -> dict[str, bytes]:
    """What full updates have made, by names and with contents that do not depend on the clock.

    Raises:
        AssertionError: a day has no version or several, or a version is damaged.
    """
    where, found = places(settings), dict[str, bytes]()
    chain = [current_path(where.versions).name]
    while (parent := read_manifest(where.versions / chain[0])["parent"]) is not None:
        chain.insert(0, parent)
    latest = read_json(where.checkpoints / LATEST)
    assert chain[0] == first
    assert [day["day"] for day in latest[FULL]] == due, f"learned were {latest[FULL]}"
    assert [day["version"] for day in latest[FULL]] == chain[1:], f"{chain[1:]} are not {latest[FULL]}"
    assert [listed.id for listed in list_versions(where.versions)] == chain, "there are versions beside the chain"
    forks.run(lambda: check_served(settings))

    def named(text: str) -> str:
        for place, version_id in enumerate(chain):
            text = text.replace(version_id, f"version {place}")
        return text

    def timeless(manifest: bytes) -> bytes:
        kept = {key: value for key, value in json.loads(manifest).items() if key not in BY_THE_CLOCK}
        text = json.dumps(kept, sort_keys=True).replace(json.dumps(str(where.workspace)), '"workspace"')
        return named(text).encode()

    for name, got in content(where.workspace).items():
        what = got
        if name.startswith(("versions/", "deltas/")) and Path(name).name == MANIFEST:
            what = timeless(got)
        elif name in (f"versions/{CURRENT}", f"checkpoints/{LATEST}"):
            what = named(got.decode()).encode()
        found[named(name)] = what
    return found


def line(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill so many writers, joiners and updaters of lines; counts of what happened."""
    draw, world = random.Random(seed), make_world(folder, later_days=0)
    lenient = replace(world.settings.update.gate, max_move=1e6, max_length=1e6, max_mean_cosine_rise=2.0, margin=1.0)
    update = replace(world.settings.update, rows_per_delta=200, batch_size=64, gate=lenient, fold_every=0)
    world = replace(world, settings=replace(world.settings, update=update))
    totals: Counter[str] = Counter()
    for first in range(0, kills, KILLS_A_LINE):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            totals += one_line(world, Path(own), draw, min(KILLS_A_LINE, kills - first))
        totals["lines"] += 1
    return dict(totals)


def one_line(world: World, folder: Path, draw: random.Random, kills: int) -> Counter[str]:
    """Run a line whose processes are killed so often, then hold what it left against what was sent, and against a line
    over the same log that nobody disturbed.
    """
    own, writers = copied(world, folder / "line"), 0
    where, acks = places(own), folder / "line" / "acks"
    happen(own, [])
    works: dict[str, Work] = {
        "writer": lambda: write_on(where.log, acks, world, writers),
        "joiner": lambda: join_log(own, follow=True, flush=False, share="1/1"),
        "updater": lambda: learn(own, follow=True, dry_run=False),
    }
    running = {name: forks.start(work) for name, work in works.items()}
    count: Counter[str] = Counter()
    for kill in range(kills):
        time.sleep(draw.uniform(0, LONGEST_S))
        name = draw.choice(list(works)) if kill < kills - len(works) else next(iter(running))
        assert not forks.wait(running.pop(name), 0), f"the {name} ended by itself"
        count[f"kills_of_the_{name}"] += 1
        writers += name == "writer"
        if kill < kills - len(works):
            running[name] = forks.start(works[name])
    undisturbed = copied(world, folder / "undisturbed")
    shutil.copytree(where.log, places(undisturbed).log)
    for settings in (own, undisturbed):
        forks.run(lambda settings=settings: join_log(settings, follow=False, flush=True, share="1/1"))
        forks.run(lambda settings=settings: learn(settings, follow=False, dry_run=False))
    forks.run(lambda: check_served(own))
    clicks = check_log(where.log, acks, world, count)
    for partition in partitions(places(undisturbed).shards):
        rows, others = (read_rows(places(settings).shards, partition) for settings in (own, undisturbed))
        assert rows == others, f"partition {partition}: other rows than undisturbed"
    learned, others = (check_learned(settings) for settings in (own, undisturbed))
    assert learned == others, "other clicks were learned than undisturbed"
    share = own.samples.held_out_users
    users = pa.array([user for user, _, _ in clicks])
    trained = [click for click, out in zip(clicks, is_held_out(users, share).tolist(), strict=True) if not out]
    assert learned == Counter(trained), "clicks of the log were not learned, or twice"
    version = current_path(where.versions).name
    for name, settings in (("deltas", own), ("deltas_undisturbed", undisturbed)):
        count[name] += last_seq(places(settings).deltas, version)
    count["learned"] += learned.total()
    return count


def events_of(world: World, of_run: int, step: int) -> list[Event]:
    """What a writer sends in one step: a request with its clicks, or clicks without one."""
    draw = random.Random(f"{of_run}-{step}")
    ts_ms, user = world.begin_ms + 1_800_000 * of_run + 1000 * step, draw.choice(world.users)
    items, name = draw.sample(world.items, 5), f"{of_run}-{step}"
    sent, request = [], None
    if draw.random() < 0.7:
        request = f"r{name}"
        outcomes = [c.IMPRESSED] * 3 + [c.RANK_REJECTED] * 2
        sent = [Event(f"q{name}", "request", user, ts_ms, request, {"items": items, "outcomes": outcomes})]
    for n in range(draw.choice([0, 1, 1, 2])):
        body = {c.ITEM_ID: items[n]}
        sent.append(Event(f"c{name}-{n}", "click", user, ts_ms + 100 * (n + 1), request, body))
    return sent


def write_on(log_folder: Path, acks: Path, world: World, number: int) -> None:
    """Append until killed; a line in a file for each acknowledgement. First goes again what the run before, as far as
    its acknowledgements tell, sent last.
    """
    answered = [json.loads(text)[0].split("-")[:2] for text in whole_lines(acks)]
    last = max((int(step) for of_run, step in answered if int(of_run[1:]) == number - 1), default=0)
    retried = [(number - 1, step) for step in range(max(0, last - RETRIED // 2), last + RETRIED)] if number else []
    with closing(LocalEventLog.open(log_folder, sync="always")) as log, acks.open("ab", buffering=0) as file:
        file.write(b"\n")  # behind half a line of the run before
        for of_run, step in itertools.chain(retried, ((number, step) for step in itertools.count())):
            if sent := events_of(world, of_run, step):
                answers = log.append(sent)
                lines = [
                    json.dumps([one.event_id, ack.partition, ack.offset])
                    for one, ack in zip(sent, answers, strict=True)
                ]
                file.write("".join(f"{text}\n" for text in lines).encode())
            time.sleep(PAUSE_S)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that were written to their ends."""
    text = path.read_text() if path.exists() else ""
    return [one for one in text.splitlines(keepends=True) if one.startswith("[") and one.endswith("]\n")]


def check_log(log_folder: Path, acks: Path, world: World, count: Counter[str]) -> list[Click]:
    """The clicks of a log, after what it acknowledged was looked for in it.

    Raises:
        AssertionError: something is missing, doubled, changed, or elsewhere.
    """
    found: dict[str, tuple[int, int]] = {}
    clicks: list[Click] = []
    with closing(LocalEventLog.reader(log_folder)) as log:
        for partition in range(log.partitions):
            offset = 0
            while records := log.read(partition, offset, 1000):
                for record in records:
                    event, offset = record.event, record.next_offset
                    of_run, step = event.event_id[1:].split("-")[:2]
                    assert event in events_of(world, int(of_run), int(step)), f"{event} was not sent"
                    assert event.event_id not in found, f"{event.event_id} is in the log twice"
                    found[event.event_id] = (partition, record.offset)
                    if event.type == "click":
                        clicks.append((event.user_id, event.body[c.ITEM_ID], event.ts_ms))
    acknowledged = {name: (partition, offset) for name, partition, offset in map(json.loads, whole_lines(acks))}
    for name, place in acknowledged.items():
        assert found.get(name) == place, f"{name} was acknowledged at {place}, and is at {found.get(name)}"
    count["acknowledged"] += len(acknowledged)
    count["events"] += len(found)
    count["clicks"] += len(clicks)
    return clicks


def check_learned(settings: Settings) -> Counter[Click]:
    """The clicks that the deltas of a workspace have learned, after each was held against its range of the shards.

    Raises:
        AssertionError: a delta was refused, or has learned other rows than those behind the delta before it.
    """
    where, learned = places(settings), Counter[Click]()
    at = dict.fromkeys(partitions(where.shards), 0)
    for delta in deltas_of(where, current_path(where.versions).name):
        assert "refused" not in delta.report, delta.report["refused"]
        clicks = list[Click]()
        for partition in sorted(at):
            end = delta.offsets["shards"].get(str(partition), at[partition])
            assert end >= at[partition], f"delta {delta.seq} goes back in partition {partition}"
            part = read_rows(where.shards, partition, at[partition], end - at[partition])
            at[partition] = end
            own = part.filter(pc.field(c.OUTCOME) == c.CLICKED).select([c.USER_ID, c.ITEM_ID, c.CLICK_TS_MS])
            clicks += zip(*(column.to_pylist() for column in own.columns), strict=True)
        out = is_held_out(pa.array([user for user, _, _ in clicks], pa.int64()), settings.samples.held_out_users)
        trained = [click for click, untrained in zip(clicks, out.tolist(), strict=True) if not untrained]
        read = delta.report["rows"]
        assert read == len(clicks), f"delta {delta.seq} has read {read} clicked rows of {len(clicks)}"
        assert delta.state["recent"] == [item for _, item, _ in trained], f"delta {delta.seq} has other positives"
        learned.update(trained)
    for partition, end in at.items():
        assert end == manifests(where.shards, partition)[-1].end_row, f"partition {partition} is not learned to its end"
    return learned


PARTS = {"incremental": incremental, "full": full, "line": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="default: all, one after the other")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    forks.import_late_modules()
    logging.disable()  # what the gate refuses is meant to be refused
    for part in [arguments.part] if arguments.part else PARTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            counts = PARTS[part](Path(folder), arguments.kills, arguments.seed)
        seconds = round(time.monotonic() - began, 1)
        result = {"part": part, "kills": arguments.kills, "seed": arguments.seed, "seconds": seconds, **counts}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
