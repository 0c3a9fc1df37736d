"""Users, passwords and TLS of every outside system; no password is shown or recorded."""

import logging
import socket
import ssl
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from twotower.config import parse
from twotower.features.redis_store import RedisFeatureStore
from twotower.features.store import FeatureStoreError
from twotower.index.milvus import MilvusDatabase
from twotower.index.pgvector import PgvectorDatabase
from twotower.logs import EventLogError
from twotower.logs.kafka import KafkaEventLog
from twotower.logs.redis import RedisEventLog
from twotower.schema.errors import ConfigError, TwotowerError, UnavailableError
from twotower.schema.secrets import Credentials

PASSWORD = "hidden-4711"
"""As in conftest."""
REDIS = {
    "LOG": (lambda url: RedisEventLog(url, f"test-{uuid.uuid4().hex}"), EventLogError),
    "FEATURE_STORE": (lambda url: RedisFeatureStore(url, f"test-{uuid.uuid4().hex}"), FeatureStoreError),
}


@pytest.fixture
def as_user(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets user and password of a system."""

    def set_both(system: str, user: str, password: str = PASSWORD) -> None:
        monkeypatch.setenv(f"TWOTOWER_{system}_USER", user)
        monkeypatch.setenv(f"TWOTOWER_{system}_PASSWORD", password)

    return set_both


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Any:
    """Within it an error must come, and neither it nor what is logged may have the password; gives the message."""

    @contextmanager
    def refusing(error: type[TwotowerError]) -> Iterator[list[str]]:
        told: list[str] = []
        with caplog.at_level(logging.DEBUG), pytest.raises(error) as raised:
            yield told
        told.append(str(raised.value))
        shown = "".join(traceback.format_exception(raised.value))
        assert PASSWORD not in shown
        assert PASSWORD not in caplog.text

    return refusing


@pytest.mark.parametrize("system", REDIS)
def test_redis_lets_a_user_in_over_tls(secure_redis: Any, as_user: Any, system: str) -> None:
    as_user(system, "shop")
    REDIS[system][0](secure_redis.url).close()


@pytest.mark.parametrize("system", REDIS)
def test_redis_refuses_a_wrong_password_and_an_unknown_certificate(
    secure_redis: Any, as_user: Any, refused: Any, system: str
) -> None:
    opened, error = REDIS[system]
    with refused(error) as told:
        opened(secure_redis.url)
    assert "AUTH" in told[0]
    as_user(system, "shop", f"{PASSWORD}-wrong")
    with refused(error) as told:
        opened(secure_redis.url)
    assert "invalid username-password pair" in told[0]
    as_user(system, "shop")
    for parameters in ("", "?ssl_ca_certs=absent.pem"):
        with refused(error) as told:
            opened(secure_redis.url.partition("?")[0] + parameters)
        assert "cannot be opened" in told[0]


@pytest.mark.parametrize("section", ["stream.log", "serve.feature_store", "index"])
@pytest.mark.parametrize(
    "url",
    [
        "redis://shop:{}@host:6379/0",
        "redis://:{}@host",
        "host:9092,shop:{}@host:9092",
        "host:9092?sasl.password={}",
        "host:9092?ssl.key.pem={}",
        "redis://host?db=1&PASSWORD={}",
        "postgresql://shop:{}@host/shop",
        "postgresql://shop:{}?x@host/shop",
        "postgresql://host/shop?sslmode=require&password={}",
    ],
)
def test_an_address_with_a_password_is_refused_without_showing_it(section: str, url: str) -> None:
    kind = {"stream.log": "redis", "serve.feature_store": "redis", "index": "pgvector"}[section]
    with pytest.raises(ConfigError, match="an address holds no password") as error:
        parse({}, [f"{section}.kind={kind}", f'{section}.url="{url.format(PASSWORD)}"'])
    assert PASSWORD not in str(error.value)


def test_credentials_do_not_show_themselves() -> None:
    assert PASSWORD not in repr(Credentials("shop", PASSWORD))


@pytest.fixture
def locked_postgres(pgvector_url: str) -> Iterator[str]:
    """The address of a database whose user `shop` needs a password; over a socket of the file system."""
    with psycopg.connect(pgvector_url, autocommit=True) as connection:
        rules = Path(connection.execute("SHOW hba_file").fetchone()[0])
        before = rules.read_text()
        connection.execute(f"CREATE ROLE shop LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
        rules.write_text("local all shop scram-sha-256\n" + before)
        connection.execute("SELECT pg_reload_conf()")
    try:
        yield pgvector_url.replace("postgres@", "")
    finally:
        rules.write_text(before)
        with psycopg.connect(pgvector_url, autocommit=True) as connection:
            connection.execute("DROP ROLE shop")
            connection.execute("SELECT pg_reload_conf()")


def test_postgresql_lets_a_user_in_and_refuses_a_wrong_password(
    locked_postgres: str, as_user: Any, refused: Any
) -> None:
    as_user("INDEX", "shop")
    database = PgvectorDatabase(locked_postgres)
    assert database.names("absent") == []
    database._idle.get_nowait().close()
    as_user("INDEX", "shop", f"{PASSWORD}-wrong")
    with refused(UnavailableError) as told:
        PgvectorDatabase(locked_postgres).names("absent")
    assert "password authentication failed" in told[0]


def test_an_index_that_does_not_answer_is_told_without_the_password(as_user: Any, refused: Any) -> None:
    as_user("INDEX", "shop")
    for database in (MilvusDatabase("https://127.0.0.1:9"), PgvectorDatabase("postgresql://127.0.0.1:9/x")):
        with refused(UnavailableError):
            database.names("absent")


def test_kafka_is_told_who_the_user_is(as_user: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def client(settings: dict[str, Any]) -> Any:
        made.append(settings)
        raise TimeoutError("no broker")

    monkeypatch.setattr("twotower.logs.kafka.AdminClient", client)
    as_user("LOG", "shop")
    with refused(ConfigError) as told:
        KafkaEventLog("127.0.0.1:9", "shop")
    assert "?security.protocol=SASL_SSL" in told[0]
    with refused(EventLogError):
        KafkaEventLog("127.0.0.1:9,127.0.0.2:9?security.protocol=SASL_SSL", "shop")
    names = ("bootstrap.servers", "security.protocol", "sasl.mechanism", "sasl.username", "sasl.password")
    expected = ["127.0.0.1:9,127.0.0.2:9", "SASL_SSL", "SCRAM-SHA-512", "shop", PASSWORD]
    assert [made[0][name] for name in names] == expected
    with refused(ConfigError) as told:
        KafkaEventLog("127.0.0.1:9?acks=0", "shop")
    assert "has the property acks of a client" in told[0]


@pytest.mark.parametrize("trusted", [True, False])
def test_kafka_checks_the_certificate_of_a_broker(
    certificate: Path, as_user: Any, refused: Any, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """A listener that speaks TLS and no Kafka: who trusts its certificate greets it."""
    monkeypatch.setattr("twotower.logs.kafka._TIMEOUT_S", 2.0)
    as_user("LOG", "shop")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    greetings: list[bytes] = []

    def answer(listening: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listening.accept()
            except OSError:
                return
            try:
                accepted.settimeout(5)
                with context.wrap_socket(accepted, server_side=True) as connection:
                    greetings.append(connection.recv(1000))
            except OSError:
                accepted.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer, args=[listening])
        answering.start()
        url = f"127.0.0.1:{listening.getsockname()[1]}?security.protocol=SASL_SSL"
        try:
            with refused(EventLogError):
                KafkaEventLog(url + (f"&ssl.ca.location={certificate / 'cert.pem'}" if trusted else ""), "shop")
        finally:
            listening.shutdown(socket.SHUT_RDWR)
    answering.join()
    assert bool(greetings) == trusted
    assert not any(PASSWORD.encode() in greeting for greeting in greetings)
