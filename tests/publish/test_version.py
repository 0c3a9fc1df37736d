from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.channels.queries import queries_of_users
from twotower.channels.vector_channel import latest
from twotower.config import Settings
from twotower.features.columns import Bag, Column, take
from twotower.pipeline.line import latest_checkpoint, open_served
from twotower.pipeline.places import places
from twotower.publish.onnx import OnnxTower
from twotower.publish.tables import map_tables
from twotower.publish.version import Version, item_tokens
from twotower.samples.read import Clicks, Samples, open_samples
from twotower.serve.request import Request, queries_of
from twotower.serve.users import Recent
from twotower.towers.two_tower import TwoTower
from twotower.train.batches import BatchMaker
from twotower.train.checkpoint import load_model
from twotower.train.negatives import CountedFrequency, NegativeSources, fed_frequency
from twotower.train.options import TrainOptions


@dataclass(frozen=True)
class Side:
    """A version beside what it was made of."""

    version: Version
    samples: Samples
    model: TwoTower


@pytest.fixture(scope="module", params=["world", "odd_world"])
def side(request: pytest.FixtureRequest) -> Side:
    settings: Settings = request.getfixturevalue(request.param)
    return Side(open_served(settings), open_samples(places(settings).samples), load_model(latest_checkpoint(settings)))


def as_bytes(column: Column) -> list[bytes]:
    return [column.indptr.tobytes(), column.rows.tobytes()] if isinstance(column, Bag) else [column.tobytes()]


def test_the_exported_user_tower_gives_the_vectors_of_the_trained_one(side: Side) -> None:
    rows = np.arange(len(side.samples.users))
    queries = queries_of_users(side.samples.features, side.samples.users, side.samples.clicks, rows)
    exported = side.version.two_tower.user_vectors(queries)
    columns = dict(queries.features)
    history = side.samples.features.history
    columns[history.name] = history.encode(
        pa.array(
            [
                side.samples.items.ids.take(pa.array(part)).to_pylist()
                for part in np.split(queries.clicks.rows, queries.clicks.indptr[1:-1])
            ]
        )
    )
    trained = side.model.encode_users(columns)
    assert exported.shape == (len(rows), side.version.item_vectors.shape[1])
    np.testing.assert_allclose(exported, trained, atol=1e-5, rtol=0)


def test_the_stored_item_vectors_are_those_of_the_exported_item_tower(side: Side) -> None:
    folder = side.version.path / "channels" / "two_tower"
    tower = OnnxTower(folder / "item_tower.onnx", side.version.features.item, map_tables(folder))
    np.testing.assert_allclose(tower.encode(side.samples.items.features), side.version.item_vectors, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(side.version.item_vectors, axis=1), 1, atol=1e-5)


def test_a_request_has_the_bytes_that_training_read_for_the_same_user_and_history(side: Side) -> None:
    """The version knows no clicks here; the log brings those before each training row's request."""
    samples, features = side.samples, side.samples.features
    clicks = samples.clicks
    none = Clicks(np.zeros_like(clicks.indptr), clicks.item_row[:0], clicks.ts_ms[:0])
    version = replace(side.version, clicks=none, manifest={**side.version.manifest, "watermark_ms": 0})
    sources = NegativeSources(None, CountedFrequency(fed_frequency(samples)))
    maker = BatchMaker(samples, TrainOptions(batch_size=len(samples.positives), id_dropout=0.0), sources)
    order = maker._order(0).positives
    [batch] = maker.epoch(0)
    for place, row in enumerate(order[:100]):
        user_row = int(samples.positives.user_row[row])
        start = clicks.indptr[user_row]
        before = slice(start, start + int(samples.positives.history[row]))
        item_ids = samples.items.ids.take(pa.array(clicks.item_row[before])).to_pylist()
        recent = Recent(tuple(zip(clicks.ts_ms[before].tolist(), item_ids, strict=True)))
        asked = Request(10, "none", samples.users.ids[user_row].as_py())
        assert version.user_row(asked.user_id) == user_row
        queries = queries_of(version, asked, recent, range(0))
        tokens = item_tokens(features, version.item_ids)
        columns = {**queries.features, features.history.name: latest(queries.clicks, tokens, features.history.last)}
        for feature in features.user:
            trained = take(batch.user[feature.name], np.array([place]))
            assert as_bytes(columns[feature.name]) == as_bytes(trained), feature.name


def features_of(version: Version, asked: Request) -> Mapping[str, Column]:
    return queries_of(version, asked, Recent(), range(0)).features


def test_raw_features_in_a_request_are_encoded_as_the_stored_ones(world: Settings) -> None:
    version = open_served(world)
    users = {row["user_id"]: row for row in pq.read_table(places(world).workspace / "users.parquet").to_pylist()}
    names = [feature.name for feature in version.features.user_columns if feature.name != "user_id"]
    assert names
    for user_row in range(0, len(version.users), 7):
        raw = users[version.users.ids[user_row].as_py()]
        given = features_of(version, Request(10, "none", features={name: raw[name] for name in names}))
        stored = features_of(version, Request(10, "none", raw["user_id"]))
        for name in names:
            assert as_bytes(given[name]) == as_bytes(stored[name]), name


def test_raw_context_in_a_request_is_encoded_as_in_the_samples(world: Settings) -> None:
    version, samples = open_served(world), open_samples(places(world).samples)
    events = pq.read_table(places(world).workspace / "events", partitioning=None)
    raw = {(row["user_id"], row["request_ts_ms"]): row for row in events.to_pylist()}
    positives = samples.positives
    for row in range(0, len(positives), 50):
        user_id = samples.users.ids[int(positives.user_row[row])].as_py()
        event = raw[(user_id, int(positives.ts_ms[row]))]
        asked = Request(10, "none", context={name: event[name] for name in positives.context})
        columns = features_of(version, asked)
        for name, column in positives.context.items():
            assert as_bytes(columns[name]) == as_bytes(take(column, np.array([row]))), name
