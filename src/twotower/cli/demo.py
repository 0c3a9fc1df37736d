"""`demo`: the whole line on a simulated world or on a public data set, ending in a running server that learns."""

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import httpx

from twotower.config.load import load
from twotower.config.settings import Settings
from twotower.datasets.importers import import_dataset
from twotower.datasets.options import ImportOptions
from twotower.pipeline.line import run_line
from twotower.pipeline.serving import serve
from twotower.schema.errors import ConfigError, TwotowerError
from twotower.serve.run import Address
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import simulate_workspace

log = logging.getLogger(__name__)

USERS, ITEMS, DAYS, SEED = 2000, 1500, 7, 0
SHOWN = 10
PATIENCE_S = 120.0
"""How long `--check` waits for a click to be learned."""


@dataclass(frozen=True)
class DataSet:
    """How a public data set is recognised, imported and configured for the demo."""

    name: str
    pattern: str
    """A file that only this data set has."""
    example: str
    holdout: str
    positive: str = "all"
    until: str | None = None


KNOWN = (
    DataSet("movielens-1m", "ratings.*", "movielens.toml", "time:0.9", positive="4"),
    DataSet("kuairand", "user_history_before_*.parquet", "kuairand.toml", "since:2022-05-03"),
    DataSet("globo", "clicks_*", "globo.toml", "since:2017-10-10", until="2017-10-10"),
)


def demo(data: Path | None, out: Path, overrides: list[str], check: bool, answer: Callable[[Any], None]) -> None:
    """Make a workspace, run the whole line in it, and serve it until a signal ends it.

    Beside the server a joiner and the incremental update follow its log. So a click changes the next answer by the
    user's history at once, and seconds later by what was learned of it. The workspace, model and log of an earlier demo
    in the same folder are used again.

    Args:
        data: the folder of a public data set; None = a simulated world.
        out: the folder of all demos.
        overrides: `section.key=value` each.
        check: instead of serving on, ask the server for a user, post a click, ask again, and end.
        answer: called with the result when the server is ready, or with the result of the check.

    Raises:
        ConfigError: no known data set in the folder.
    """
    started = time.monotonic()
    known = None if data is None else _recognise(data)
    workspace = out / (known.name if known else "simulated")
    example = known.example if known else "demo.toml"
    options = [f"workspace.path={json.dumps(str(workspace))}", *overrides]
    with as_file(files("twotower.cli") / "examples" / example) as config:
        settings = load(config, options)
        if not (workspace / "workspace.json").exists():
            log.info("making %s", workspace)
            if known is None or data is None:
                simulate_workspace(workspace, WorldOptions(users=USERS, items=ITEMS, days=DAYS, seed=SEED))
            else:
                imported = ImportOptions(holdout=known.holdout, positive=known.positive, until=known.until)
                import_dataset(known.name, data, workspace, imported)
        made = run_line(settings, promoted=True)
        seconds = round(time.monotonic() - started, 1)
        result = {"version": made["version"], "metrics": made["metrics"], "seconds": seconds}
        if check:
            answer({**_checked(config, [*options, "serve.port=0"]), **result})
            return
        port = settings.serve.port if _is_free(settings) else 0
        with ExitStack() as learning:

            def ready(address: Address) -> None:
                learning.enter_context(_learning(config, options))
                log.info("open %s   (Ctrl-C ends it)", address.url)
                answer({"url": address.url, **result})

            serve(load(config, [*options, f"serve.port={port}"]), ready)


def _recognise(data: Path) -> DataSet:
    for known in KNOWN:
        if any(data.glob(known.pattern)):
            return known
    names = ", ".join(f"{known.name} ({known.pattern})" for known in KNOWN)
    raise ConfigError(
        f"{data} holds none of the data sets that the demo knows: {names}. Use `twotower import` for others"
    )


def _is_free(settings: Settings) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.serve.host, settings.serve.port))
        except OSError:
            log.info("port %d is taken: using a free one", settings.serve.port)
            return False
    return True


@contextmanager
def _learning(config: Path, options: list[str]) -> Iterator[None]:
    """A joiner and an incremental update that follow the log, each in a process of its own."""
    with ExitStack() as opened:
        for command in (["join", "--follow"], ["update", "incremental", "--follow"]):
            opened.enter_context(_process(command, config, options, subprocess.DEVNULL))
        yield


@contextmanager
def _process(command: list[str], config: Path, options: list[str], stdout: int) -> Iterator[subprocess.Popen[str]]:
    """A command of the program beside this one, ended by a signal."""
    arguments = [part for option in options for part in ("--set", option)]
    running = subprocess.Popen(
        [sys.executable, "-m", "twotower", *command, "-c", str(config), *arguments], stdout=stdout, text=True
    )
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


def _checked(config: Path, options: list[str]) -> dict[str, Any]:
    """Ask a real server before and after a click of one user, and wait until the click has been learned.

    Raises:
        TwotowerError: the server does not start, or the click changes nothing or is not learned.
    """
    with ExitStack() as opened:
        server = opened.enter_context(_process(["serve"], config, options, subprocess.PIPE))
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise TwotowerError(f"the server ended with code {server.wait()} before it was ready")
        url = json.loads(line)["url"]
        ask = opened.enter_context(_asked(url))
        user_id = ask("GET", "/console/users?n=1")["users"][0]
        before = ask("POST", "/v1/retrieve", {"user_id": user_id, "k": SHOWN})
        clicked = before["items"][0]["item_id"]
        now_ms = time.time_ns() // 1_000_000
        click = {
            "event_id": f"check-{now_ms}",
            "type": "click",
            "user_id": user_id,
            "item_id": clicked,
            "ts_ms": now_ms,
        }
        accepted = ask("POST", "/v1/events", {"events": [click]})
        after = ask("POST", "/v1/retrieve", {"user_id": user_id, "k": SHOWN})
        if clicked in [item["item_id"] for item in after["items"]] or before["items"] == after["items"]:
            raise TwotowerError(f"the click on {clicked!r} did not change the next answer of user {user_id!r}")
        with _learning(config, options):
            deadline, learned = time.monotonic() + PATIENCE_S, after
            while learned["delta_seq"] <= before["delta_seq"]:
                if time.monotonic() > deadline:
                    raise TwotowerError(f"the click on {clicked!r} was not learned within {PATIENCE_S:g} s")
                time.sleep(0.1)
                learned = ask("POST", "/v1/retrieve", {"user_id": user_id, "k": SHOWN})
        asked = {"url": url, "user_id": user_id, "before": before, "clicked": clicked}
        return {**asked, **accepted, "after": after, "learned": learned}


@contextmanager
def _asked(url: str) -> Iterator[Callable[..., Any]]:
    """What asks a server over one connection, and gives its answer."""
    with httpx.Client(base_url=url, timeout=10) as client:

        def ask(method: str, path: str, document: Any = None) -> Any:
            try:
                return client.request(method, path, json=document).raise_for_status().json()
            except httpx.HTTPError as error:
                raise TwotowerError(f"{url}{path}: {error}") from None

        yield ask
