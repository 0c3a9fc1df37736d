"""`doctor`: what is installed, what this machine can do, and whether what a configuration names answers.

A check is a function from the configuration to its findings. To check another system, write one and add it to `CHECKS`.
"""

import importlib
import os
import platform
import queue
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path
from typing import Final, Literal, TypeVar

import httpx
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from twotower.config.available import check_available
from twotower.config.settings import Settings
from twotower.pipeline.places import places
from twotower.schema.errors import ConfigError, TwotowerError, UnavailableError
from twotower.schema.files import TEMPORARY
from twotower.schema.machine import machine
from twotower.schema.secrets import ADMIN_TOKEN, secret, without_user

T = TypeVar("T")

PACKAGE: Final = "twotower"
PATIENCE_S: Final = 5.0
"""How long a system may take to answer."""
PORT_S: Final = 1.0
"""How long whatever holds a port may take to say what it is."""
STYLES: Final = {"ok": ("ok", "green"), "absent": ("-", "dim"), "failed": ("fails", "bold red")}
"""How the table shows a state."""


@dataclass(frozen=True)
class Finding:
    """What a check saw."""

    name: str
    state: Literal["ok", "absent", "failed"]
    """`absent` is what is not there and not needed; `failed` is what the configuration needs."""
    seen: str
    todo: str = ""
    """What to do; empty where nothing has to be done."""


@dataclass(frozen=True)
class Report:
    """What all checks saw."""

    ok: bool
    """Nothing that the configuration needs is missing or silent."""
    problems: list[str]
    """A sentence or two for each finding that failed: what was seen and what to do."""
    checks: list[Finding]


Check = Callable[[Settings], Iterator[Finding]]


def examine(settings: Settings) -> Report:
    """Look at this machine, and ask everything that a configuration names. It makes nothing and changes nothing."""
    findings: list[Finding] = []
    for check in CHECKS:
        name = check.__name__.strip("_")
        try:
            findings += check(settings)
        except Exception as error:  # the other checks still say what they see
            findings.append(Finding(name, "failed", repr(error), "Report it: this check itself has failed"))
    failed = [finding for finding in findings if finding.state == "failed"]
    problems = [". ".join(filter(None, (f"{finding.name}: {finding.seen}", finding.todo))) for finding in failed]
    return Report(not failed, problems, findings)


def as_table(report: Report) -> Table:
    """The findings for a terminal."""
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "what", "seen"):
        table.add_column(column, overflow="fold")
    for finding in report.checks:
        word, style = STYLES[finding.state]
        told = Text(finding.seen).append(f"\n{finding.todo}" if finding.todo else "", "cyan")
        table.add_row(Text(word, style), Text(finding.name), told)
    return table


def _python(_: Settings) -> Iterator[Finding]:
    seen, needed = platform.python_version(), str(metadata(PACKAGE)["Requires-Python"])
    if SpecifierSet(needed).contains(seen):
        yield Finding("Python", "ok", seen)
    else:
        yield Finding("Python", "failed", seen, f"Install Python {needed}")


def _packages(settings: Settings) -> Iterator[Finding]:
    """The package with its dependencies, and each extra."""
    lacking = [told for requirement in requirements() if (told := _lacking(requirement))]
    if lacking:
        yield Finding(PACKAGE, "failed", f"lacks {', '.join(lacking)}", f"pip install --upgrade {PACKAGE}")
    else:
        yield Finding(PACKAGE, "ok", f"{installed(PACKAGE)}, with everything that it depends on")
    yield Finding("torch", "ok" if (seen := installed("torch")) else "failed", seen or "is not installed")
    needed = dict(_extras_of(settings))
    for extra in extras():
        lacking = [told for requirement in requirements(extra) if (told := _lacking(requirement))]
        name, todo = f"extra {extra}", f'pip install "{PACKAGE}[{extra}]"'
        if not lacking:
            yield Finding(name, "ok", ", ".join(f"{r.name} {installed(r.name)}" for r in requirements(extra)))
        elif extra in needed:
            yield Finding(name, "failed", f"{needed[extra]} needs {', '.join(lacking)}", todo)
        else:
            yield Finding(name, "absent", f"without {', '.join(lacking)}", todo)
    for extra in needed.keys() - set(extras()):
        todo = f'It is of an earlier release: pip install --upgrade "{PACKAGE}[{extra}]"'
        yield Finding(f"extra {extra}", "failed", f"this installation of {PACKAGE} does not know it", todo)


def _extras_of(settings: Settings) -> Iterator[tuple[str, str]]:
    """The extras that a configuration needs, and why."""
    for channel in settings.models.channels:
        if channel in ("als", "swing"):
            yield channel, f"the channel {channel}"
    if settings.engine.name == "spark":
        yield "spark", 'engine.name = "spark"'
    if settings.stream.log.kind != "local":
        yield settings.stream.log.kind, f'stream.log.kind = "{settings.stream.log.kind}"'
    if settings.serve.feature_store.url is not None:
        yield settings.serve.feature_store.kind, f'serve.feature_store.kind = "{settings.serve.feature_store.kind}"'
    if settings.index.url is not None:
        yield settings.index.kind, f'index.kind = "{settings.index.kind}"'


def extras() -> list[str]:
    """The extras of this package."""
    return metadata(PACKAGE).get_all("Provides-Extra") or []


def requirements(extra: str = "") -> list[Requirement]:
    """What this package needs, or what one of its extras adds to that."""
    return _requirements_of(PACKAGE, extra)


def _requirements_of(package: str, extra: str) -> list[Requirement]:
    def holds(requirement: Requirement, value: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": value})

    needed = [Requirement(line) for line in distribution(package).requires or []]
    return [r for r in needed if holds(r, extra) and not (extra and holds(r, ""))]


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is not."""
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def _lacking(requirement: Requirement) -> str:
    """What is missing of a requirement; empty where nothing is."""
    version = installed(requirement.name)
    if version is None:
        return requirement.name
    if not requirement.specifier.contains(Version(version), prereleases=True):
        return f"{requirement.name}{requirement.specifier} ({version} is installed)"
    parts = [
        _lacking(part) for extra in sorted(requirement.extras) for part in _requirements_of(requirement.name, extra)
    ]
    return ", ".join(filter(None, parts))


def _java(settings: Settings) -> Iterator[Finding]:
    needed = settings.engine.name == "spark"
    if not needed and installed("pyspark") is None:
        return
    from twotower.samples.spark_engine import find_java

    try:
        yield Finding("Java", "ok", str(find_java(os.environ.get("JAVA_HOME"))))
    except ConfigError as error:
        yield Finding("Java", "failed" if needed else "absent", str(error))


def _machine(settings: Settings) -> Iterator[Finding]:
    yield Finding("machine", "ok", machine())
    memory = _memory()
    yield Finding("memory", "ok", ", ".join(f"{_gb(size)} {what}" for what, size in memory.items()) or "unknown")
    folder = _existing(places(settings).workspace)
    yield Finding("disk", "ok", f"{_gb(shutil.disk_usage(folder).free)} free for the workspace")


def _memory() -> dict[str, int]:
    """Bytes of memory, by Linux' own word, as far as it says."""
    told = Path("/proc/meminfo")
    lines = told.read_text(encoding="ascii").splitlines() if told.exists() else []
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    words = {"MemTotal": "in total", "MemAvailable": "available"}
    return {word: sizes[name] for name, word in words.items() if name in sizes}


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _gpu(_: Settings) -> Iterator[Finding]:
    if installed("torch") is None:
        return
    torch = importlib.import_module("torch")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    told = [torch.cuda.get_device_properties(number) for number in range(count)]
    seen = ", ".join(f"{device.name} with {_gb(device.total_memory)}" for device in told)
    yield Finding("GPU", "ok" if seen else "absent", seen or "none that torch sees")


def _configuration(settings: Settings) -> Iterator[Finding]:
    try:
        check_available(settings)
        yield Finding("configuration", "ok", "its sections fit each other")
    except ConfigError as error:
        yield Finding("configuration", "failed", str(error))


def _workspace(settings: Settings) -> Iterator[Finding]:
    workspace = places(settings).workspace
    if not workspace.exists():
        folder = _existing(workspace)
        if os.access(folder, os.W_OK):
            todo = "Make it with `twotower import` or `twotower simulate`"
            yield Finding("workspace", "absent", f"{workspace} does not exist yet", todo)
        else:
            todo = "Set workspace.path, or change the rights"
            yield Finding("workspace", "failed", f"{workspace} cannot be made: {folder} cannot be written", todo)
        return
    from twotower.pipeline.ready import check_ready

    try:
        within(lambda: _write_in(workspace))
        check_ready(settings)
        yield Finding("workspace", "ok", f"{workspace} has its tables, and can be written")
    except TwotowerError as error:
        yield Finding("workspace", "failed", str(error))


def _write_in(folder: Path) -> None:
    """Refuse a folder that cannot be written; on a network disk that hangs this does not return.

    Raises:
        ConfigError: it is no folder, or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None


def _event_log(settings: Settings) -> Iterator[Finding]:
    from twotower.logs.open import describe_log

    options = settings.stream.log
    url = without_user(options.url or "absent")
    todo = "" if options.kind == "local" else f"Start it, or set stream.log.url (now {url})"
    yield _asked("event log", lambda: describe_log(options, places(settings).log), todo)


def _feature_store(settings: Settings) -> Iterator[Finding]:
    options = settings.serve.feature_store
    if options.url is None:
        yield Finding("feature store", "ok", f"{options.kind}, embedded")
        return
    from twotower.features.open import describe_store

    todo = f"Start it, or set serve.feature_store.url (now {without_user(options.url)})"
    yield _asked("feature store", lambda: describe_store(options), todo)


def _vector_database(settings: Settings) -> Iterator[Finding]:
    options = settings.index
    if options.url is None:
        yield Finding("index", "ok", f"{options.kind}, embedded")
        return
    from twotower.index.build import connect

    try:
        database = connect(options.kind, options.url)
    except ConfigError as error:
        yield Finding("vector database", "failed", str(error))
        return
    todo = f"Start it, or set index.url (now {without_user(options.url)})"
    yield _asked("vector database", database.describe, todo)


def _ports(settings: Settings) -> Iterator[Finding]:
    yield _port(settings.serve.host, settings.serve.port, "serve.port")
    if secret(ADMIN_TOKEN):
        yield _port("127.0.0.1", settings.serve.admin_port, "serve.admin_port")
    else:
        yield Finding("serve.admin_port", "absent", f"without {ADMIN_TOKEN} a server has no admin port")


def _port(host: str, port: int, key: str) -> Finding:
    """Whether a server can listen there; one of ours that already does is no problem."""
    if port == 0:
        return Finding(key, "ok", "any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
        return Finding(key, "ok", f"{host}:{port} is free")
    except OSError as error:
        if version := _served_at(host, port):
            return Finding(key, "ok", f"a twotower server listens at {host}:{port}, with version {version}")
        seen = f"cannot listen at {host}:{port}: {str(error.strerror).partition(' (while')[0]}"
        return Finding(key, "failed", seen, f"End what listens there, or set {key}; 0 = any free one")


def _served_at(host: str, port: int) -> str | None:
    """The version that a server of ours serves at a port, None where it is no such server."""
    where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        told = httpx.get(f"http://{f'[{where}]' if ':' in where else where}:{port}/v1/version", timeout=PORT_S).json()
    except (httpx.HTTPError, ValueError):
        return None
    return str(told["version"]) if isinstance(told, dict) and "delta_seq" in told and "version" in told else None


def _asked(name: str, ask: Callable[[], str], todo: str) -> Finding:
    try:
        return Finding(name, "ok", within(ask))
    except ConfigError as error:  # the sentence says what to do
        return Finding(name, "failed", str(error))
    except TwotowerError as error:
        return Finding(name, "failed", str(error), todo)


def within(ask: Callable[[], T]) -> T:
    """What a function gives, if it does within `PATIENCE_S`; otherwise it is left behind in its thread.

    Raises:
        UnavailableError: it takes longer.
    """
    answers: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # raised below, in the thread that waits
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = answers.get(timeout=PATIENCE_S)
    except queue.Empty:
        raise UnavailableError(f"no answer within {PATIENCE_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


CHECKS: tuple[Check, ...] = (
    _python,
    _packages,
    _java,
    _machine,
    _gpu,
    _configuration,
    _workspace,
    _event_log,
    _feature_store,
    _vector_database,
    _ports,
)
"""All checks, in the order of the table."""
