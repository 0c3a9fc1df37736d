"""Start a server: the log, the store, the version, two ports."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from twotower.features.bloom import Shape
from twotower.features.store import LmdbFeatureStore
from twotower.logs import EventLog
from twotower.schema.errors import ConfigError, DataError
from twotower.serve.admin import make_admin_app
from twotower.serve.app import Metrics, make_app
from twotower.serve.entities import add_entities
from twotower.serve.funnel import Sizes
from twotower.serve.health import Health
from twotower.serve.snapshots import POLL_S, Snapshots
from twotower.serve.users import RecentUsers

log = logging.getLogger(__name__)

READER = "the reader of the log"
ERASER = "the eraser of deleted users"
ADMIN = "the admin port"
"""Names of background threads."""


@dataclass(frozen=True)
class Address:
    """Where a started server listens."""

    url: str
    admin_url: str | None
    version: str


def run_server(
    *,
    versions: Path,
    deltas: Path,
    open_log: Callable[[], EventLog],
    store_folder: Path,
    erase_every_s: float,
    host: str,
    port: int,
    admin_port: int,
    admin_token: str | None,
    exclude: str,
    impressed_window_ms: int,
    impressed_shape: Shape,
    channel_timeout_ms: float,
    sizes: Sizes,
    page: int,
    extend: Callable[[FastAPI, Snapshots, RecentUsers], None],
    ready: Callable[[Address], None],
) -> None:
    """Serve until a signal ends it.

    Args:
        versions: the folder of all versions.
        deltas: the folder of the deltas of all versions.
        open_log: opens the event log to write.
        store_folder: the feature store.
        erase_every_s: how often deleted users' events are erased from the log.
        host: address of the public port.
        port: public port; 0 = any free one.
        admin_port: port of the admin verbs on 127.0.0.1; 0 = any free one.
        admin_token: what admin requests must carry; None = no admin port.
        exclude: what is left out unless a request says otherwise.
        impressed_window_ms: how long an impression is left out.
        impressed_shape: of the filters of impressions before the latest.
        channel_timeout_ms: how long a request waits for its channels, where it has several.
        sizes: of the stages of a request for a page.
        page: items of a page, unless a request says otherwise.
        extend: adds to the public application, such as the page.
        ready: called with the addresses when requests are answered.

    Raises:
        VersionError: there is no version to serve.
        EventLogError: another process writes the log.
        ConfigError: a port is taken.
    """
    metrics, health = Metrics(), Health()
    with ExitStack() as opened:
        snapshots = Snapshots(versions, metrics.switched, deltas)  # first: without a version nothing is made
        event_log = open_log()
        opened.callback(event_log.close)
        store = LmdbFeatureStore(store_folder)
        opened.callback(store.close)
        users = RecentUsers(event_log, store, impressed_shape, lambda reason: metrics.passed_over.labels(reason).inc())
        if applied := users.catch_up():
            log.info("%d events of the log applied", applied)
        opened.enter_context(_erasing(event_log, users, erase_every_s, health))
        opened.callback(snapshots.close)
        snapshots.heed(lambda: users.entities)
        app = make_app(
            snapshots,
            event_log,
            users,
            metrics,
            exclude=exclude,
            impressed_window_ms=impressed_window_ms,
            channel_timeout_ms=channel_timeout_ms,
            sizes=sizes,
            page=page,
            health=health,
        )
        add_entities(app, snapshots, event_log, users)
        extend(app, snapshots, users)
        public = opened.enter_context(_listen(host, port))
        admin_url = None
        if admin_token:
            admin_app = make_admin_app(snapshots, versions, admin_token)
            admin = opened.enter_context(_listen("127.0.0.1", admin_port))
            admin_url = _url("127.0.0.1", admin)
            opened.enter_context(_in_background(_server(admin_app), admin, health))
        opened.enter_context(_reading(users, health))
        snapshots.follow(health)
        address = Address(_url(host, public), admin_url, snapshots.version.id)
        server = _server(app)
        with _ended_by_signals(server):
            asyncio.run(_serve(server, public, lambda: ready(address)))


@contextmanager
def _erasing(event_log: EventLog, users: RecentUsers, every_s: float, health: Health) -> Iterator[None]:
    """Erase deleted users' events from the log, now and every so often; the log is closed at the end."""
    stop = threading.Event()

    def erase() -> None:
        if number := users.erase_deleted():
            log.info("%d events of deleted users erased from the log", number)

    thread = health.repeat(ERASER, erase, every_s, stop)
    try:
        yield
    finally:
        stop.set()
        event_log.close()  # ends a pass that is under way
        thread.join()


@contextmanager
def _reading(users: RecentUsers, health: Health) -> Iterator[None]:
    """Read what others write to the log, five times a second."""
    stop = threading.Event()
    thread = health.repeat(READER, lambda: read_log(users, health), POLL_S, stop)
    try:
        yield
    finally:
        stop.set()
        thread.join()


def read_log(users: RecentUsers, health: Health) -> None:
    """Read what is new in the log, after a failure only where it is still the log that was read before.

    Raises:
        DataError: it is another one, or emptied, or damaged.
    """
    if health.fails(READER) and not users.is_of_this_log():
        raise DataError(
            "the log does not hold what was read of it before: it was emptied, replaced or damaged. Restore it, or "
            "restart the server: it then reads the log from its beginning, and forgets what only the lost log said"
        )
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
    """Take SIGINT and SIGTERM as a wish to end: running requests are answered, files are closed, the exit code is 0.

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
    # Connections inherit it. Without it the second packet of an answer waits for the client's acknowledgement of the
    # first, which Linux delays by 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _url(host: str, listening: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"
