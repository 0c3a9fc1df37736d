from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.channels.retriever import similar_items
from twotower.config import Settings
from twotower.pipeline.line import open_served, publish_version
from twotower.publish.version import unavailable
from twotower.schema.errors import DataError


def test_an_item_that_is_not_available_is_retrieved_by_no_channel(own_world: Settings) -> None:
    before = open_served(own_world)
    path = Path(own_world.workspace.path) / "items.parquet"
    items = pq.read_table(path)
    available = [None if place % 7 == 0 else place % 3 > 0 for place in range(items.num_rows)]
    pq.write_table(items.append_column("available", pa.array(available)), path)
    publish_version(own_world, promoted=True)
    version = open_served(own_world)
    gone = {id_ for id_, here in zip(items["item_id"].to_pylist(), available, strict=True) if here is False}
    assert set(version.item_ids.filter(pa.array(unavailable(version.catalogue))).to_pylist()) == gone

    def brought(opened, name: str) -> list[list[str]]:
        found = opened.channels[name].retrieve(opened.queries(np.arange(0, 300, 30)), 300).rows
        return [opened.item_ids.take(pa.array(rows[rows >= 0])).to_pylist() for rows in found]

    for name in version.channels:
        expected = [[item for item in items if item not in gone] for items in brought(before, name)]
        assert brought(version, name) == expected, name
        similar = similar_items(version.channels[name], np.arange(300), 300)
        if name == "popular":
            assert similar is None
        else:
            rows = similar.rows[similar.rows >= 0]
            assert rows.size
            assert not unavailable(version.catalogue)[rows].any()


def test_availability_that_is_no_boolean_is_refused(own_world: Settings) -> None:
    path = Path(own_world.workspace.path) / "items.parquet"
    items = pq.read_table(path)
    pq.write_table(items.append_column("available", pa.array([1] * items.num_rows)), path)
    with pytest.raises(DataError, match="available is of type int64, where booleans are expected"):
        publish_version(own_world, promoted=True)
