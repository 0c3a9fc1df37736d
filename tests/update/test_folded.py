"""A chain that is folded says what the chain of all its deltas says, byte for byte."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower.config import Settings
from twotower.config.load import as_dict
from twotower.features.vocabulary import UNKNOWN
from twotower.logs import Event
from twotower.logs.events import item_deleted, item_event, user_deleted, user_event
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.updating import learn
from twotower.publish.delta import (
    base_digest,
    chain_folder,
    delta_folder,
    folded_folder,
    folded_seqs,
    last_seq,
    read_folded,
)
from twotower.publish.tables import map_tables
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import VersionError
from twotower.serve.snapshots import Snapshots
from twotower.update import chain as module

EVERY = 4


def run(settings: Settings, fold_every: int = EVERY, **options: Any):
    update = replace(settings.update, fold_every=fold_every, **options)
    return learn(replace(settings, update=update), follow=False, dry_run=False)


def chain_of(settings: Settings) -> Path:
    return chain_folder(places(settings).deltas, open_served(settings).id)


def numbers(settings: Settings) -> list[int]:
    """Of the deltas that are still there."""
    return sorted(int(path.name) for path in chain_of(settings).iterdir() if path.name.isdigit())


def folded(settings: Settings) -> list[int]:
    return folded_seqs(places(settings).deltas, open_served(settings).id)


def snapshots(settings: Settings) -> Snapshots:
    where = places(settings)
    return Snapshots(where.versions, deltas=where.deltas)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Settings, str], Settings]:
    """Another workspace with what one holds now."""

    def copied(settings: Settings, name: str) -> Settings:
        path = shutil.copytree(settings.workspace.path, tmp_path / name)
        return replace(settings, workspace=replace(settings.workspace, path=str(path)))

    return copied


@pytest.fixture
def small(judged: Settings) -> Settings:
    """Deltas of ten rows, and many witnesses."""
    gate = replace(judged.update.gate, window=25, min_positives=5)
    return replace(judged, update=replace(judged.update, rows_per_delta=10, gate=gate))


def a_life(version: Version) -> list[list[Event]]:
    """What happens in four parts: clicks, ids that come, go and come again, items that are put and deleted."""
    generator = np.random.default_rng(0)
    begin, items = version.watermark_ms + 1, version.item_ids.to_pylist()
    users = version.users.ids.to_pylist()
    new_user, new_item, other_item = 10**6, "zz new", "zz other"
    put = {
        name: value
        for name, value in version.catalogue.slice(7, 1).to_pylist()[0].items()
        if name not in (c.ITEM_ID, c.AVAILABLE)
    }
    ticks = iter(range(begin, begin + 10**6, 1000))

    def clicks(count: int, *pairs: Sequence[Any]) -> list[Event]:
        drawn = [
            (users[generator.integers(len(users))], items[generator.integers(40)]) for _ in range(count - len(pairs))
        ]
        return [
            Event(f"c{at}", "click", user, at, body={c.ITEM_ID: item})
            for (user, item), at in zip([*pairs, *drawn], ticks, strict=False)
        ]

    def entity(make: Callable[..., Event], *what: Any) -> Event:
        at = next(ticks)
        return make(f"e{at}", at, *what)

    return [
        [
            entity(item_event, new_item, put, None),
            entity(item_event, items[3], put, True),
            entity(user_event, users[5], {}),
            *clicks(58, *[(new_user, new_item)] * 4, *[(users[1], items[3])] * 3, *[(users[2], items[9])] * 3),
        ],
        [
            entity(user_deleted, new_user),
            entity(item_deleted, items[3]),
            entity(item_event, other_item, put, None),
            *clicks(47, *[(users[4], new_item)] * 3, *[(users[2], other_item)] * 3),
        ],
        [
            entity(item_deleted, other_item),
            entity(item_event, items[9], None, False),
            entity(item_event, items[3], {}, None),
            entity(user_event, new_user, {}),
            *clicks(45, *[(new_user, items[4])] * 5),
        ],
        [entity(item_event, items[9], None, True), *clicks(61, *[(users[2], items[9])] * 3, (users[3], new_item))],
    ]


def state_of(version: Version) -> dict[str, Any]:
    """What a server answers with, as bytes."""
    queries = version.queries(np.arange(len(version.users)))
    found = {name: channel.retrieve(queries, 50) for name, channel in version.channels.items()}
    tables = map_tables(version.path / "channels" / "two_tower")
    laid = version.user_tower._tables
    return {
        "ids": version.item_ids.to_pylist(),
        "seq": version.delta_seq,
        "gone": version.gone.tobytes(),
        "users": version.since.tokens,
        "tokens": version.two_tower.item_tokens.tobytes(),
        "vectors": version.item_vectors[np.arange(len(version.item_ids))].tobytes(),
        "tables": {name: laid[name][np.arange(len(table))].tobytes() for name, table in tables.items()},
        "user_vectors": version.two_tower.user_vectors(queries).tobytes(),
        "answers": {name: (one.rows.tobytes(), one.scores.tobytes()) for name, one in found.items()},
    }


@pytest.fixture
def both(small: Settings, happen, copy) -> tuple[Settings, Settings]:
    """The same life of two workspaces: one has all deltas, the other was folded on the way."""
    parts = a_life(open_served(small))
    plain, short = small, copy(small, "folded")
    for part in parts[:3]:
        for settings, every in ((plain, 0), (short, EVERY)):
            happen(settings, part)
            run(settings, every)
    return plain, short


def test_a_folded_chain_serves_the_same_bytes(both) -> None:
    plain, short = both
    last = last_seq(places(plain).deltas, open_served(plain).id)
    assert numbers(plain) == list(range(1, last + 1))
    assert folded(short) == [EVERY * (last // EVERY) - EVERY, EVERY * (last // EVERY)]
    assert numbers(short) == list(range(folded(short)[0] + 1, last + 1))
    one, other = snapshots(plain), snapshots(short)
    assert one.version.delta_seq == last == last_seq(places(short).deltas, open_served(short).id)
    assert state_of(other.version) == state_of(one.version)
    assert (other.report, other.gated, other.watermark_ms) == (one.report, one.gated, one.watermark_ms)
    assert one.report["recall"]
    said = read_folded(places(short).deltas, one.version.id, base_digest(one.version.path))
    of_user = said.new_ids[c.USER_ID].to_pydict()  # who was deleted, and has come again
    rows = [row for one, row in zip(of_user["id"], of_user["row"], strict=True) if one == 10**6]
    assert (rows[0], len(rows), rows[1] > UNKNOWN) == (UNKNOWN, 2, True)


def test_an_updater_goes_on_from_a_folded_delta_with_the_same_bytes(both, happen, content) -> None:
    plain, short = both
    part = a_life(open_served(plain))[3]
    for settings, every in ((plain, 0), (short, EVERY)):
        happen(settings, part)
        run(settings, every)
    all_of_them, left = content(chain_of(plain)), content(chain_of(short))
    assert {name: left[name] for name in left if not name.startswith("folded/")} == {
        name: all_of_them[name]
        for name in all_of_them
        if name.startswith("quarantine/") or int(name[:8]) > folded(short)[0]
    }
    assert state_of(snapshots(short).version) == state_of(snapshots(plain).version)


def test_a_folded_delta_is_the_same_whether_it_is_made_on_the_way_or_later(both, content) -> None:
    plain, short = both
    latest = folded(short)[-1]
    run(plain)
    assert folded(plain) == [latest]
    assert content(chain_of(plain) / "folded") == {
        name: kept for name, kept in content(chain_of(short) / "folded").items() if name.startswith(f"{latest:08d}")
    }
    assert numbers(plain)[0] == 1  # another folded one is to stand beside it first


@pytest.mark.parametrize("killed_in", ["write_folded", "prune"])
def test_what_a_killed_run_left_out_is_made_up_for(both, happen, content, monkeypatch, killed_in: str) -> None:
    plain, short = both
    part = a_life(open_served(plain))[3]
    happen(short, part)
    monkeypatch.setattr(module, killed_in, lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    run(short)  # goes on without
    monkeypatch.undo()
    run(short)
    happen(plain, part)
    run(plain)
    run(plain, fold_every=EVERY)
    last = last_seq(places(plain).deltas, open_served(plain).id)
    assert folded(short)[-1] == EVERY * (last // EVERY)
    assert content(folded_folder(places(short).deltas, open_served(short).id, folded(short)[-1])) == content(
        folded_folder(places(plain).deltas, open_served(plain).id, folded(short)[-1])
    )
    assert numbers(short)[0] == folded(short)[0] + 1


KILLED = """
import json, os, signal, sys
from twotower.pipeline.updating import learn
from twotower.config.load import parse
from twotower.publish import delta

real = delta.folder_listing


def listing(folder):
    if folder.parent.name == "folded":  # its files are there, its manifest and its name are not
        os.kill(os.getpid(), signal.SIGKILL)
    return real(folder)


delta.folder_listing = listing
learn(parse(json.loads(sys.argv[1])), follow=False, dry_run=False)
"""


def test_an_updater_that_is_killed_while_it_folds_ends_with_the_same_bytes(
    small, happen, clicks, content, copy
) -> None:
    small = replace(small, update=replace(small.update, fold_every=EVERY))
    happen(small, clicks(small, 100))
    undisturbed = copy(small, "undisturbed")
    run(undisturbed)
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(as_dict(small))],
        stderr=subprocess.DEVNULL,
        env=environment,
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (folded(small), 4 <= len(numbers(small)) < 10) == ([], True)
    assert [path.name for path in (chain_of(small) / "folded").iterdir()] == [".tmp-00000004"]
    run(small)
    assert content(chain_of(small)) == content(chain_of(undisturbed))
    assert folded(small) == [4, 8]


def test_a_damaged_folded_delta_is_passed_over_for_the_one_before(both, caplog: pytest.LogCaptureFixture) -> None:
    plain, short = both
    version, deltas = open_served(short), places(short).deltas
    latest = folded_folder(deltas, version.id, folded(short)[-1])
    whole = latest / "state.json"
    flip(whole)
    with caplog.at_level(logging.ERROR):
        served = snapshots(short)
    assert "state.json does not have the SHA-256" in caplog.text
    assert served.refused_delta is None
    assert state_of(served.version) == state_of(snapshots(plain).version)
    run(short)  # the updater makes it anew
    caplog.clear()
    snapshots(short)
    assert caplog.text == ""


def test_without_any_whole_folded_delta_what_is_missing_is_said(both) -> None:
    _, short = both
    version, deltas = open_served(short), places(short).deltas
    for seq in folded(short):
        flip(folded_folder(deltas, version.id, seq) / "tables.safetensors")
    served = snapshots(short)
    assert served.version.delta_seq == 0
    assert served.refused_delta.delta_seq == 1
    assert "00000001 is gone, and no whole folded delta replaces it" in served.refused_delta.problem
    with pytest.raises(VersionError, match="no whole folded delta"):
        run(short)
    (chain_of(short) / "folded").rename(chain_of(short) / "elsewhere")
    with pytest.raises(VersionError, match="no whole folded delta"):
        run(short)


def test_a_server_that_is_far_behind_takes_the_folded_delta(small, happen, clicks) -> None:
    happen(small, clicks(small, 30))
    run(small)
    served = snapshots(small)
    assert served.version.delta_seq == 3
    happen(small, clicks(small, 140, seed=1))
    run(small)
    assert numbers(small)[0] > 4
    assert served.reload() == served.version.id
    assert (served.version.delta_seq, served.refused_delta) == (17, None)
    assert state_of(served.version) == state_of(snapshots(small).version)
    assert (served.report, served.gated) == (snapshots(small).report, snapshots(small).gated)


def test_a_folded_delta_gets_over_a_damaged_one(small, happen, clicks) -> None:
    happen(small, clicks(small, 20))
    run(small)
    served, version = snapshots(small), open_served(small)
    happen(small, clicks(small, 30, seed=1))
    run(small)
    flip(delta_folder(places(small).deltas, version.id, 3) / "tables.safetensors")
    where, away = chain_of(small) / "folded", chain_of(small) / "away"
    where.rename(away)
    for _ in range(2):
        served.reload()
        assert (served.version.delta_seq, served.refused_delta.delta_seq) == (2, 3)
    with pytest.raises(VersionError, match="damaged"):
        run(small)
    away.rename(where)
    served.reload()
    assert (served.version.delta_seq, served.refused_delta) == (5, None)
    assert run(small).seq == 5


def test_what_the_gate_refused_is_told_on(small, happen, clicks) -> None:
    gate = replace(small.update.gate, margin=1.0)  # whatever random clicks do to recall
    small = replace(small, update=replace(small.update, gate=gate))
    happen(small, clicks(small, 20))
    run(small)
    happen(small, clicks(small, 20, seed=1))
    assert run(small, learning_rate=1000.0).refused == [3, 4]
    happen(small, clicks(small, 100, seed=2))
    run(small)
    assert numbers(small)[0] > 4
    served = snapshots(small)
    assert [refusal.delta_seq for refusal in served.gated] == [3, 4]
    assert all("long" in refusal.problem or "moved" in refusal.problem for refusal in served.gated)
