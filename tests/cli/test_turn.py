"""A closed turn by commands: serve, visit, join, samples, train, publish."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.logs import Event, LocalEventLog
from twotower.schema import columns as c

CONFIG = Path(__file__).parents[2] / "examples" / "demo.toml"
RETRIEVED, PRE_RANKED, RANKED, LOGGED = 120, 60, 25, 10
SMALL = [
    *("train.epochs=1", "train.batch_size=256", "models.dimension=16", "evaluate.bootstrap=50"),
    'models.channels=["two_tower", "item_cf", "popular"]',
    *("pre_rank.calibration_share=0.3", "rank.calibration_share=0.3"),
    *("serve.port=0", "serve.admin_port=0", "samples.negatives.hard_share=0.5", f"funnel.retrieve={RETRIEVED}"),
    *(f"funnel.pre_rank={PRE_RANKED}", f"funnel.rank={RANKED}", f"funnel.logged={LOGGED}"),
]
REQUESTS, PAGE = 150, 8


@contextmanager
def served(options: list[str]) -> Iterator[str]:
    """The address of a running server."""
    command = [sys.executable, "-m", "twotower", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


def logged_events(folder: Path) -> list[Event]:
    with closing(LocalEventLog.reader(folder)) as log:
        return [one.event for partition in range(log.partitions) for one in log.read(partition, 0, 100_000)]


def joined_events(workspace: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(workspace.glob("events/*/joined-*.parquet")))


def test_what_the_funnel_shows_and_rejects_today_is_what_the_next_version_learns(run, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    options = ["-c", str(CONFIG), *(x for o in (f"workspace.path={workspace}", *SMALL) for x in ("--set", o))]
    run("simulate", "--out", workspace, "--users", 300, "--items", 300, "--days", 4, "--seed", 1)
    first = run("run", *options)
    before = run("samples", *options)
    with served(options) as url:
        visited = run("visit", *options, "--url", url, "--day", 4, "--requests", REQUESTS, "--page", PAGE)
        joined = run("join", *options, "--flush")

        # what became of every candidate of every request adds up
        records = [event for event in logged_events(workspace / "log") if event.type == "request"]
        assert len(records) == visited["requests"] == REQUESTS
        for record in records:
            counts = record.body["counts"]
            assert counts == {
                "retrieved": RETRIEVED,
                c.PRE_RANK_REJECTED: RETRIEVED - counts[c.IMPRESSED] - counts[c.RANKED_NOT_SHOWN]
                - counts[c.RANK_REJECTED],
                c.RANK_REJECTED: counts[c.RANK_REJECTED],
                c.RANKED_NOT_SHOWN: counts[c.RANKED_NOT_SHOWN],
                c.IMPRESSED: PAGE,
            }  # fmt: skip
            # an item that is shown to explore may come from any of the stages, and leaves its own
            explored = [one for one in record.body["propensities"] if one is not None]
            assert abs(counts[c.PRE_RANK_REJECTED] - (RETRIEVED - PRE_RANKED)) <= len(explored)
            assert abs(counts[c.RANK_REJECTED] - (PRE_RANKED - RANKED)) <= len(explored)
            listed = Counter(record.body["outcomes"])
            assert listed == {name: PAGE if name == c.IMPRESSED else LOGGED for name in list(counts)[1:]}
        assert visited["impressions"] == REQUESTS * PAGE
        assert visited["clicks"] > 0

        # the log, joined: each listed item once, and each click at its impression
        rows = joined_events(workspace)
        outcomes = Counter(rows.column(c.OUTCOME).to_pylist())
        listed = sum((Counter(record.body["outcomes"]) for record in records), Counter())
        assert outcomes == {
            **listed,
            c.IMPRESSED: visited["impressions"] - visited["clicks"],
            c.CLICKED: visited["clicks"],
        }
        assert outcomes == Counter(joined["outcomes"])
        assert (joined["late"], joined["duplicates"], joined["unjoined"], joined["dropped"]) == (0, 0, 0, {})

        # what was rejected is what positives are compared with, half of all; what was shown is not
        after = run("samples", *options)
        for name, count in outcomes.items():
            assert after["outcomes"][name] == before["outcomes"][name] + count
        assert set(after["used"][c.IMPRESSED]) == {"of_rankers"}
        for name in (c.PRE_RANK_REJECTED, c.RANK_REJECTED):
            assert after["used"][name]["hard_negative"] > before["used"][name]["hard_negative"]

        second = run("run", *options)
        assert second["version"] != first["version"]
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/v1/version").json()["version"] != second["version"]:
            assert time.monotonic() < deadline, "the server does not take up the next version"
            time.sleep(0.1)
        user_id = records[0].user_id
        page = httpx.post(f"{url}/v1/recommend", json={"user_id": user_id}).json()
        assert (page["version"], page["logged"]) == (second["version"], True)
    manifest = json.loads((Path(second["path"]) / "manifest.json").read_text())
    assert manifest["watermark_ms"] >= max(rows.column(c.CLICK_TS_MS).to_pylist(), key=lambda ts_ms: ts_ms or 0)
