import io
import socket
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from twotower.config import Settings
from twotower.config.load import parse
from twotower.index import pgvector
from twotower.logs import LocalEventLog
from twotower.pipeline import doctor
from twotower.pipeline.doctor import Finding, Report, as_table, examine, within
from twotower.schema.errors import UnavailableError

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
NOBODY = "127.0.0.1:9"
"""Where nothing listens."""


@pytest.fixture(autouse=True)
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extras are those of the project file, whenever the package was installed."""
    optional = PROJECT["optional-dependencies"]
    monkeypatch.setattr(doctor, "extras", lambda: list(optional))
    declared = {"": PROJECT["dependencies"], **optional}
    monkeypatch.setattr(doctor, "requirements", lambda extra="": list(map(Requirement, declared[extra])))


@pytest.fixture
def found(tmp_path: Path) -> Any:
    """Gives the findings by name for some settings; no port is taken unless a test says so."""

    def of(document: dict[str, Any]) -> dict[str, Finding]:
        settings = parse({"workspace": {"path": str(tmp_path / "workspace")}, "serve": {"port": 0}} | document)
        report = examine(settings)
        assert report.ok == all(finding.state != "failed" for finding in report.checks)
        return {finding.name: finding for finding in report.checks}

    return of


def test_the_defaults_need_nothing_that_is_not_installed(found: Any) -> None:
    findings = found({})
    assert [finding for finding in findings.values() if finding.state == "failed"] == []
    assert findings["workspace"].state == "absent"
    assert findings["torch"].seen == doctor.installed("torch")
    assert {f"extra {extra}" for extra in PROJECT["optional-dependencies"]} <= findings.keys()


def test_a_missing_extra_fails_only_where_it_is_needed(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "implicit" else known(name))
    extra = found({})["extra als"]
    assert (extra.state, extra.seen, extra.todo) == ("absent", "without implicit", 'pip install "twotower[als]"')
    extra = found({"models": {"channels": ["two_tower", "als"]}})["extra als"]
    assert (extra.state, extra.seen) == ("failed", "the channel als needs implicit")


def test_a_feature_store_in_redis_needs_its_extra(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "redis" else known(name))
    options = {"kind": "redis", "url": f"redis://{NOBODY}/0"}
    assert found({"serve": {"port": 0, "feature_store": options}})["extra redis"].state == "failed"


def test_a_library_that_is_too_old_is_missing(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "0.5.6" if name == "numba" else known(name))
    assert found({})["extra swing"].seen == "without numba>=0.63 (0.5.6 is installed)"


def test_an_extra_of_a_library_counts(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "psycopg-binary" else known(name))
    assert found({})["extra pgvector"].seen == "without psycopg-binary"


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"index": {"kind": "pgvector", "url": f"postgresql://{NOBODY}/x"}}, "vector database"),
        ({"index": {"kind": "milvus", "url": f"http://{NOBODY}"}}, "vector database"),
        ({"stream": {"log": {"kind": "redis", "url": f"redis://{NOBODY}/0"}}}, "event log"),
        ({"serve": {"feature_store": {"kind": "redis", "url": f"redis://{NOBODY}/0"}}}, "feature store"),
        ({"stream": {"log": {"kind": "kafka", "url": NOBODY}}}, "event log"),
    ],
)
def test_a_system_that_is_away_is_named_without_secrets(
    section: dict[str, Any], name: str, found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for system in ("INDEX", "FEATURE_STORE"):
        monkeypatch.setenv(f"TWOTOWER_{system}_PASSWORD", "secret")
    finding = found(section)[name]
    assert finding.state == "failed"
    assert NOBODY in finding.seen + finding.todo
    assert "secret" not in finding.seen + finding.todo
    assert finding.todo.startswith("Start it, or set ")


def test_a_database_that_answers_tells_its_versions(found: Any, pgvector_url: str) -> None:
    finding = found({"index": {"kind": "pgvector", "url": pgvector_url}})["vector database"]
    assert finding.state == "ok"
    assert finding.seen.startswith("PostgreSQL 18.")
    assert " with pgvector 0.8." in finding.seen


def test_a_database_that_is_too_old_fails(found: Any, pgvector_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgvector, "OLDEST", (99, 0, 0))
    finding = found({"index": {"kind": "pgvector", "url": pgvector_url}})["vector database"]
    assert finding.state == "failed"
    assert "99.0.0 or newer is needed" in finding.seen


def test_a_redis_that_answers_tells_its_version(found: Any, redis_url: str) -> None:
    finding = found({"stream": {"log": {"kind": "redis", "url": redis_url, "name": "nobody"}}})["event log"]
    assert finding.state == "ok"
    assert finding.seen.startswith("Redis ")
    assert finding.seen.endswith("; no log nobody yet, the server makes it")


def test_a_topic_with_another_number_of_partitions_fails(found: Any, kafka_servers: Any) -> None:
    log = {"kind": "kafka", "url": kafka_servers("doctor"), "name": "doctor"}
    assert found({"stream": {"log": log}})["event log"].seen == "Kafka, 3 brokers; the log doctor with 4 partitions"
    finding = found({"stream": {"log": log | {"partitions": 3}}})["event log"]
    assert finding.state == "failed"
    assert finding.seen.endswith("set stream.log.partitions = 4")


def test_a_workspace_is_looked_at(found: Any, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    assert found({})["workspace"].seen.endswith("users.parquet does not exist: import or simulate a workspace first")
    LocalEventLog.open(workspace / "log", partitions=2).close()
    assert "has 2 partitions, 4 are configured" in found({})["event log"].seen
    workspace.rename(tmp_path / "moved")
    workspace.touch()
    assert found({})["workspace"].state == "failed"


def test_a_whole_workspace_is_ready(world: Settings) -> None:
    assert [finding.state for finding in examine(world).checks if finding.name == "workspace"] == ["ok"]


def test_a_port_that_something_else_holds_fails(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_ADMIN_TOKEN", "secret")
    monkeypatch.setattr(doctor, "PORT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        findings = found({"serve": {"port": port, "admin_port": 0}})
    assert findings["serve.port"].state == "failed"
    assert findings["serve.port"].seen == f"cannot listen at 127.0.0.1:{port}: Address already in use"
    assert findings["serve.port"].todo == "End what listens there, or set serve.port; 0 = any free one"
    assert findings["serve.admin_port"].state == "ok"


def test_a_port_of_a_running_server_of_ours_is_no_problem(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_served_at", lambda host, port: "20260101T000000000-abc")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        finding = found({"serve": {"port": busy.getsockname()[1]}})["serve.port"]
    assert (finding.state, finding.seen[-21:]) == ("ok", "20260101T000000000-abc"[-21:])


def test_a_check_that_hangs_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE_S", 0.05)
    ended = threading.Event()
    with pytest.raises(UnavailableError, match=r"no answer within 0.05 s"):
        within(ended.wait)
    ended.set()
    assert within(lambda: 3) == 3


def test_a_check_that_fails_hides_no_other(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Settings) -> Any:
        raise ValueError("of ours")

    monkeypatch.setattr(doctor, "CHECKS", (broken, *doctor.CHECKS))
    findings = found({})
    assert findings["broken"].seen == "ValueError('of ours')"
    assert findings["Python"].state == "ok"


def test_the_table_shows_names_in_brackets() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(
        as_table(Report(False, [], [Finding("extra als", "failed", "without x", 'pip install "twotower[als]"')]))
    )
    assert 'pip install "twotower[als]"' in console.export_text()
