"""Start a server: the log, the store, the version, two ports."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from twotower.datasets.places import Places
from twotower.features.bloom import FilterShape
from twotower.features.open import open_store
from twotower.logs import open_log
from twotower.logs.options import EventLogOptions
from twotower.schema.errors import ConfigError, DataError
from twotower.schema.locks import locked
from twotower.serve.admin import make_admin_app
from twotower.serve.app import make_app
from twotower.serve.databases import DatabaseWatch
from twotower.serve.health import Health
from twotower.serve.metrics import Metrics
from twotower.serve.options import FunnelOptions, ServeOptions
from twotower.serve.parts import ServerParts
from twotower.serve.snapshots import POLL_S, Snapshots
from twotower.serve.users import RecentUsers

log = logging.getLogger(__name__)

FILTER_PERIODS, FILTER_ERROR_RATE = 7, 0.01
"""Periods of the window of impressions; share of other items that the filters leave out by mistake."""
READER = "the reader of the log"
ERASER = "the eraser of deleted users"
ADMIN = "the admin port"
WATCH = "the watch on the vector database"
"""Names of background threads."""
WATCH_S = 1.0


@dataclass(frozen=True)
class Address:
    """Where a started server listens."""

    url: str
    admin_url: str | None
    version: str


def run_server(
    places: Places,
    log_options: EventLogOptions,
    serve: ServeOptions,
    funnel: FunnelOptions,
    *,
    admin_token: str | None,
    extend: Callable[[FastAPI, ServerParts], None],
    ready: Callable[[Address], None],
) -> None:
    """Serve until a signal ends it.

    Admin requests must carry `admin_token`; without one there is no admin port. `extend` adds to the public
    application, such as the page; `ready` is called with the addresses when requests are answered.

    Raises:
        ConfigError: a port is taken; and what `open_parts` raises.
    """
    with open_parts(places, log_options, serve, funnel) as parts, ExitStack() as opened:
        snapshots, health = parts.snapshots, parts.health
        app = make_app(parts)
        extend(app, parts)
        public = opened.enter_context(_listen(serve.host, serve.port))
        admin_url = None
        if admin_token:
            admin_app = make_admin_app(snapshots, places.versions, admin_token)
            admin = opened.enter_context(_listen("127.0.0.1", serve.admin_port))
            admin_url = _url("127.0.0.1", admin)
            opened.enter_context(_in_background(_server(admin_app), admin, health))
        opened.enter_context(_repeating(health, READER, lambda: read_log(parts.users, health), POLL_S))
        opened.enter_context(_repeating(health, WATCH, parts.databases.look, WATCH_S))
        snapshots.follow(health)
        address = Address(_url(serve.host, public), admin_url, snapshots.version.id)
        server = _server(app)
        with _ended_by_signals(server):
            asyncio.run(_serve(server, public, lambda: ready(address)))


@contextmanager
def open_parts(
    places: Places, log_options: EventLogOptions, serve: ServeOptions, funnel: FunnelOptions
) -> Iterator[ServerParts]:
    """All that one process answers from: the version, the log, and what the log says about users.

    Raises:
        VersionError: there is no version to serve.
        UnavailableError: the vector database of the version does not answer.
        DataError: another server uses this workspace.
        EventLogError: the log cannot be opened.
        FeatureStoreError: nor can the feature store.
        ConfigError: the window of impressions is too short.
    """
    metrics, health = Metrics(), Health()
    with ExitStack() as opened:
        # First: without a version no folder is made.
        snapshots = Snapshots(places.versions, metrics.switched, places.deltas, without_index=serve.start_without_index)
        store_folder = places.feature_store
        lock = store_folder.with_name(f"{store_folder.name}.lock")
        opened.enter_context(locked(lock, lambda holder: _busy(store_folder, holder)))
        event_log = open_log(log_options, places.log)
        opened.callback(event_log.close)
        store = open_store(serve.feature_store, store_folder)
        opened.callback(store.close)
        window_ms = int(1000 * serve.impressed_window_s)
        shape = FilterShape.of(window_ms, FILTER_PERIODS, serve.impressed_items, FILTER_ERROR_RATE)
        users = RecentUsers(event_log, store, shape, lambda reason: metrics.passed_over.labels(reason).inc())
        if applied := users.catch_up():
            log.info("%d events of the log applied", applied)
        # Closing the log ends a running pass of the eraser.
        erase = partial(_erase, users)
        opened.enter_context(_repeating(health, ERASER, erase, log_options.erase_every_s, event_log.close))
        opened.callback(snapshots.close)
        snapshots.heed(lambda: users.entities)
        yield ServerParts(snapshots, event_log, users, DatabaseWatch(snapshots), serve, funnel, metrics, health)


def _busy(store: Path, holder: str) -> DataError:
    return DataError(
        f"{store.parent} is in use by {holder}: two servers cannot keep what they learn of users in one feature store. "
        "Stop that one, or serve another workspace"
    )


def _erase(users: RecentUsers) -> None:
    if number := users.erase_deleted():
        log.info("%d events of deleted users erased from the log", number)


@contextmanager
def _repeating(
    health: Health, name: str, work: Callable[[], None], every_s: float, end: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Do some work now and every `every_s`, in a thread; `end` is called before the thread is waited for."""
    stop = threading.Event()
    thread = health.repeat(name, work, every_s, stop)
    try:
        yield
    finally:
        stop.set()
        end()
        thread.join()


def read_log(users: RecentUsers, health: Health) -> None:
    """Read what is new in the log.

    Raises:
        DataError: after a failure, it is not the log that was read before: another one, emptied, or damaged.
    """
    if health.fails(READER):
        users.check_log()
    users.catch_up()


@contextmanager
def _in_background(server: uvicorn.Server, listening: socket.socket, health: Health) -> Iterator[None]:
    thread = threading.Thread(target=server.run, args=([listening],), name="admin", daemon=True)
    health.watch(ADMIN, thread)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """End the server on SIGINT and SIGTERM: running requests are answered, files are closed, the exit code is 0.

    While it runs, uvicorn catches both itself; it raises them again at its end, where they would kill the process.
    """

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _serve(server: uvicorn.Server, listening: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving


def _server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))


def _listen(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}. Set serve.port or serve.admin_port") from None
    # Connections inherit this. Without it the second packet of an answer waits for the client's acknowledgement of the
    # first, which Linux delays by 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _url(host: str, listening: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
