"""What all tests share: real data where there are any, and no silent skips in CI."""

import os

# Before the first import of NumPy or torch. Two workers share few cores, and one thread gives the same sums every time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import fcntl
import hashlib
import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from twotower.config import Settings

FEW = 'models.channels=["two_tower", "item_cf", "popular"]'
TRAINED = ("train.epochs=2", "train.batch_size=256", "models.dimension=16", FEW)
"""What the tiny world is trained with, beside its file."""
REAL_DATA = Path(os.environ.get("TWOTOWER_DATA") or Path(__file__).parents[2] / "shared" / "data")
ALLOWED_SKIPS = tuple(
    line
    for line in (Path(__file__).parent / "allowed_skips.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a run have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def made_once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a folder in the first worker that asks for its name; all of them only read it."""

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / f"once-{name}", shared / f"once-{name}.finished"
        with (shared / f"once-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                finished.touch()
        return folder

    return made


@pytest.fixture(scope="session", autouse=True)
def export_each_kind_once(shared: Path) -> Iterator[None]:
    """All workers export each kind of network once, and put other weights into what was exported: an export takes
    seconds. Publishing compares every exported network with the trained one.
    """
    import torch
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    export, read, operators = torch.onnx.export, ONNXRegistry.from_torchlib, list[ONNXRegistry]()

    def digest(*parts: Any) -> str:
        torch.save(parts, content := io.BytesIO())
        return hashlib.sha256(content.getbuffer()).hexdigest()

    def read_once(*given: Any, **options: Any) -> ONNXRegistry:
        if not operators:
            operators.append(read(*given, **options))
        return operators[0]

    def exported(module: Any, examples: Any, path: str, **options: Any) -> None:
        weights = {name: value.detach() for name, value in module.state_dict().items()}
        bare = copy.deepcopy(module)
        bare.load_state_dict({name: torch.zeros_like(value) for name, value in weights.items()})
        kind = f"exported-{digest(bare, examples, repr(options))}"
        for kept in shared.glob(f"{kind}-*.onnx"):
            inputs = json.loads(kept.with_suffix(".json").read_text())
            folded = {name: value for name, value in weights.items() if name not in inputs}
            if kept.stem.endswith(digest(folded)):
                write_with_weights(kept, {name: weights[name] for name in inputs}, path)
                return
        export(module, examples, path, **options)
        shapes = initializers(path)
        inputs = [name for name, value in weights.items() if shapes.get(name) == value.shape]
        folded = {name: value for name, value in weights.items() if name not in inputs}
        kept = shared / f"{kind}-{digest(folded)}.onnx"
        written = {kept.with_suffix(".json"): json.dumps(inputs).encode(), kept: Path(path).read_bytes()}
        for target, content in written.items():
            half = Path(f"{target}.{os.getpid()}")
            half.write_bytes(content)
            half.rename(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", exported)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(read_once))
        yield


def initializers(path: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of an exported network that are inputs of it; others were folded into constants."""
    import onnx

    return {weight.name: tuple(weight.dims) for weight in onnx.load(path).graph.initializer}


def write_with_weights(kept: Path, weights: dict[str, Any], path: str) -> None:
    """Write an exported network with other weights."""
    import onnx

    network = onnx.load(kept)
    for place in network.graph.initializer:
        if place.name in weights:
            place.CopyFrom(onnx.numpy_helper.from_array(weights[place.name].numpy(), place.name))
    onnx.save(network, path)


@pytest.fixture(scope="session")
def world(
    made_once: Callable[[str, Callable[[Path], object]], Path],
) -> "Settings":
    """The configuration of a tiny simulated workspace, trained, published and promoted; it is only read."""
    from twotower.config import load
    from twotower.pipeline.line import run_line  # torch and Ibis take seconds to load, and most tests need neither
    from twotower.worlds.options import WorldOptions
    from twotower.worlds.simulate import simulate_workspace

    def configured(folder: Path) -> "Settings":
        overrides = [f"workspace.path={folder / 'workspace'}", *TRAINED]
        return load(Path(__file__).parents[1] / "examples" / "demo.toml", overrides)

    def make(folder: Path) -> None:
        simulate_workspace(folder / "workspace", WorldOptions(users=300, items=300, days=3, seed=1))
        run_line(configured(folder), promoted=True)

    return configured(made_once("world", make))


@pytest.fixture(scope="session")
def odd_world(tmp_path_factory: pytest.TempPathFactory) -> "Settings":
    """A tiny published workspace with strings as users, integers as items, and attributes of many types; only read."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from twotower.config import parse
    from twotower.pipeline.line import run_line

    path = tmp_path_factory.mktemp("odd") / "workspace"
    (path / "events" / "date=2023-11-15").mkdir(parents=True)
    items = np.arange(40)
    attributes = {
        "item_id": items[::-1].copy(),
        "labels": [["a", "b"][: i % 3] for i in items],
        "added": pa.array([None if i % 5 == 0 else int(i) for i in items], pa.timestamp("ms")),
        "price": pa.array([None if i % 7 == 0 else i + 0.5 for i in items]),
        "size": pa.array([float("nan") if i % 7 == 0 else float(i % 4) for i in items]),
        "fresh": pa.array([None if i % 4 == 0 else bool(i % 2) for i in items]),
        "kind": pa.array([None if i % 9 == 0 else f"kind {i % 3}" for i in items]).dictionary_encode(),
    }
    pq.write_table(pa.table(attributes), path / "items.parquet", row_group_size=7)
    pq.write_table(pa.table({"user_id": [f"user/{u}" for u in range(30)]}), path / "users.parquet")
    generator = np.random.default_rng(0)
    times = 1_700_000_000_000 + 1000 * np.arange(600)
    clicks = {
        "event_seq": np.arange(600),
        "user_id": [f"user/{u}" for u in generator.integers(30, size=600)],
        "item_id": generator.integers(40, size=600),
        "request_ts_ms": times,
        "click_ts_ms": times + 1,
        "outcome": ["clicked"] * 600,
    }
    pq.write_table(pa.table(clicks), path / "events" / "date=2023-11-15" / "0.parquet")
    train = {"epochs": 1, "batch_size": 64}
    settings = parse({"workspace": {"path": str(path)}, "models": {"dimension": 8}, "train": train})
    run_line(settings, promoted=True)
    return settings


@pytest.fixture
def own_world(world: "Settings", tmp_path: Path) -> "Settings":
    """The same for a test that changes it."""
    copied = shutil.copytree(world.workspace.path, tmp_path / "own")
    return replace(world, workspace=replace(world.workspace, path=str(copied)))


@pytest.fixture
def database_world(own_world: "Settings", pgvector_url: str) -> "Iterator[Settings]":
    """The same, with versions that are published into PostgreSQL; the one that is served is embedded."""
    from twotower.index.build import connect
    from twotower.index.options import IndexOptions
    from twotower.pipeline.places import places

    models = replace(own_world.models, channels=("two_tower", "popular", "new_items"))
    yield replace(own_world, index=IndexOptions("pgvector", url=pgvector_url), models=models)
    home, database = places(own_world).versions / ".collections", connect("pgvector", pgvector_url)
    for name in database.names(home.read_text().strip()) if home.exists() else ():
        database.drop(name)


@pytest.fixture(scope="session")
def as_trained() -> list[str]:
    """The options of a command by which its configuration is that of the tiny world."""
    return [word for override in TRAINED for word in ("--set", override)]


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Any]":
    """The options of a Spark that runs as long as the tests of this process: starting one takes ten seconds."""
    from twotower.samples.options import EngineOptions
    from twotower.samples.spark_engine import find_java, open_spark
    from twotower.schema.errors import ConfigError

    try:
        find_java(os.environ.get("JAVA_HOME"))
    except ConfigError:
        pytest.skip("Java 17 is not installed: apt-get install openjdk-17-jre-headless")
    from pyspark import SparkContext

    # Tests run most code only a few times: compiling it well would take longer than running it.
    os.environ["SPARK_SUBMIT_OPTS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    with open_spark(EngineOptions("spark"), tmp_path_factory.mktemp("spark")):
        java = SparkContext._gateway.proc
        # Small data: making Java code for each query would take longer than running it.
        interpreted = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
        yield EngineOptions("spark", options={**interpreted, "spark.sql.shuffle.partitions": "3"})
    assert java.returncode is not None, "Java still runs"


@dataclass
class RedisServer:
    """A Redis server on loopback that flushes every write."""

    folder: Path
    port: int
    options: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it with what its folder holds, and wait until it answers."""
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed: apt-get install redis-server")
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        kept = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen([program, *where, *kept, *self.options], stdout=log, stderr=log)
        for _ in range(400):
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as answering:
                    answering.sendall(b"PING\r\n")
                    if answering.recv(100).startswith((b"+PONG", b"-NOAUTH")):
                        return
            except OSError:
                pass
            time.sleep(0.02)
        raise RuntimeError((self.folder / "log").read_text())

    def kill(self) -> None:
        """End it at once, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis server for one test, to be killed and started again."""
    yield from _redis(tmp_path)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Redis server for all tests of this process."""
    for server in _redis(tmp_path_factory.mktemp("redis")):
        yield server.url


PASSWORD = "hidden-4711"
"""Of the servers that ask for one; no message may have it."""


@dataclass
class SecureRedis:
    """A Redis server that lets only the user `shop` in, over TLS too."""

    server: RedisServer
    url: str
    """With TLS, and without user and password."""


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `cert.pem`, which signs itself, and `key.pem`, of a server on loopback."""
    folder = tmp_path_factory.mktemp("certificate")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(folder / "key.pem")]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command = ["openssl", "req", "-x509", "-days", "2", *key, *named, "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def secure_redis(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[SecureRedis]:
    """A Redis server with a password and TLS, for all tests of this process."""
    files = ["--tls-cert-file", str(certificate / "cert.pem"), "--tls-key-file", str(certificate / "key.pem")]
    tls = ["--tls-port", str(port := _free_port()), *files, "--tls-auth-clients", "no"]
    users = ["--user", "shop", "on", f">{PASSWORD}", "~*", "&*", "+@all", "--user", "default", "off"]
    for server in _redis(tmp_path_factory.mktemp("secure"), [*tls, *users]):
        yield SecureRedis(server, f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={certificate / 'cert.pem'}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def _redis(folder: Path, options: list[str] | None = None) -> Iterator[RedisServer]:
    server = RedisServer(folder, _free_port(), options or [])
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def pgvector_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server with pgvector for all tests of this process."""
    from twotower.cli.databases import database

    with database("pgvector", tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="session")
def milvus_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Milvus server for all tests of this process."""
    from twotower.cli.databases import database

    with database("milvus", tmp_path_factory.mktemp("milvus")) as url:
        yield url


@pytest.fixture(scope="session")
def kafka_servers() -> Callable[[str], str]:
    """Makes a topic of four partitions at librdkafka's own brokers, in this process; gives their addresses."""
    import confluent_kafka

    owner = confluent_kafka.Producer({"test.mock.num.brokers": 3, "log_level": 3})
    brokers = owner.list_topics(timeout=10).brokers.values()
    addresses = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)

    def with_topic(name: str) -> str:
        owner.list_topics(name, timeout=10)  # these brokers make what is asked for, and know no other way
        return addresses

    return with_topic


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Gives the path of a file or folder of the real data by its name, or skips the test where it is absent."""

    def path_of(name: str) -> Path:
        path = REAL_DATA / name
        if not path.exists():
            pytest.skip(f"real data absent: no {name} in $TWOTOWER_DATA or ../shared/data")
        return path

    return path_of


@pytest.fixture(scope="session")
def some_movielens(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder of MovieLens-1M with the ratings of its first 300 users; skips the test where the data are absent."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def make(folder: Path) -> None:
        for name in ("ratings", "users", "movies"):
            table = pq.read_table(source / f"{name}.parquet")
            rows = table if name == "movies" else table.filter(pc.field("user_id") <= 300)
            pq.write_table(rows, folder / f"{name}.parquet")

    if not (source := REAL_DATA / "ml-1m").exists():
        pytest.skip("real data absent: no ml-1m in $TWOTOWER_DATA or ../shared/data")
    return made_once("movielens", make)


class NoSilentSkips:
    """Fails every skip whose reason is not allowed, also those of whole modules and of doctests."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if not hasattr(report, "wasxfail"):
            refuse_skip(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        refuse_skip(report)
        return report


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure, unless its reason begins like a line of `allowed_skips.txt`."""
    if not report.skipped:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped with CI=true, and tests/allowed_skips.txt does not allow this reason: {reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests on Spark and on Milvus first, at both ends of what is shared out: then one worker runs all of a
    kind, and one server of it runs.
    """

    def needs(item: pytest.Item, what: str) -> bool:
        return any(name.startswith(what) for name in getattr(item, "fixturenames", ())) or f"[{what}" in item.name

    items.sort(key=lambda item: (not needs(item, "spark"), needs(item, "milvus")))


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin it also sees what is outside of tests/, unlike the hooks of a conftest.
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(NoSilentSkips())


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> "Callable[..., Any]":
    """Runs a command in this process; gives its JSON, which is all that stdout may hold."""
    import json

    from twotower.cli.main import app

    def ran(*arguments: object, code: int = 0) -> Any:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert (ended.value.code or 0) == code, captured.err
        ran.err = captured.err
        if code and not captured.out:
            return None
        assert captured.out.count("\n") == 1, captured.out
        return json.loads(captured.out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))

    return ran
