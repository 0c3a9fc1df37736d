import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.config import Settings
from twotower.pipeline.line import open_served
from twotower.pipeline.places import places
from twotower.pipeline.versions import PublishedVersion, open_version
from twotower.publish.retrieve import retrieve_file
from twotower.schema.errors import ConfigError, DataError, VersionError


@pytest.fixture(scope="module")
def version(world: Settings) -> PublishedVersion:
    return open_version(world)


@pytest.mark.parametrize("channel", ["fused", "two_tower", "popular"])
def test_lists_are_those_of_the_command(version, world, channel, tmp_path):
    out = tmp_path / "o.parquet"
    workspace = places(world).workspace
    retrieve_file(open_served(world), workspace, "all", out, k=5, channel=channel, exclude="clicked")
    assert version.retrieve(k=5, channel=channel).to_arrow().equals(pq.read_table(out))


def test_users_are_ids_or_a_table_with_their_context(version):
    ids = [3, 1, 999_999]
    listed = version.retrieve(ids, k=4)
    assert len(listed) == 12
    assert listed.to_pandas().user_id.unique().tolist() == ids
    for table in (pd.DataFrame({"user_id": ids}), pl.DataFrame({"user_id": ids}), {"user_id": ids}, np.array(ids)):
        assert version.retrieve(table, k=4).to_arrow().equals(listed.to_arrow())
    assert version.user_vectors({"user_id": [3, 3], "scene": ["home", "search"]}).ids.to_pylist() == [3]
    home, search = (version.user_vectors({"user_id": [3], "scene": [one]}).vectors for one in ("home", "search"))
    assert not np.allclose(home, search)
    with pytest.raises(DataError, match="values are of type string where int64 is known"):
        version.user_vectors({"user_id": [3], "hour": ["3"]})


def test_no_users_have_no_rows(version):
    assert len(version.retrieve([], k=4)) == 0
    assert version.user_vectors([]).vectors.shape[0] == 0


def test_the_lists_are_the_nearest_of_the_vectors(version):
    users, items = version.user_vectors([3, 1]), version.item_vectors()
    np.testing.assert_allclose(np.linalg.norm(items.vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(users.vectors, axis=1), 1, atol=1e-5)
    best = np.argsort(-users.vectors @ items.vectors.T, axis=1)[:, :5]
    listed = version.retrieve([3, 1], k=5, channel="two_tower", exclude="none").to_arrow()["item_id"].to_pylist()
    assert [items.ids[i].as_py() for i in best.ravel().tolist()] == listed
    table = items.to_arrow()
    assert table.schema.field("vector").type == pa.list_(pa.float32(), items.vectors.shape[1])
    assert table["item_id"].to_pylist() == items.ids.to_pylist()


def test_similar_items_never_hold_the_item(version):
    ids = version.item_vectors().ids[:3].to_pylist()
    similar = version.similar(ids, k=4).to_arrow()
    assert similar["item_id"].to_pylist() == [one for one in ids for _ in range(4)]
    assert not set(zip(ids, ids, strict=True)) & set(
        zip(similar["item_id"].to_pylist(), similar["similar_item_id"].to_pylist(), strict=True)
    )
    assert len(version.similar(ids, k=4, channel="item_cf")) > 0


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda v: v.retrieve("everybody"), ConfigError, "users = 'everybody': give `all`"),
        (lambda v: v.retrieve(["x"]), DataError, "users: an id is not of type int64"),
        (lambda v: v.retrieve({"user_id": ["x"]}), DataError, "is of type string"),
        (lambda v: v.retrieve({"user": [1]}), DataError, "users has no column user_id"),
        (lambda v: v.retrieve([1], k=0), ConfigError, "k = 0"),
        (lambda v: v.retrieve([1], channel="none"), ConfigError, "two_tower, item_cf, popular and fused"),
        (lambda v: v.retrieve([1], exclude="all"), ConfigError, "clicked, impressed, none"),
        (lambda v: v.similar(["none"]), DataError, "has no item 'none'"),
        (lambda v: v.similar(v.item_vectors().ids[:1].to_pylist(), channel="popular"), ConfigError, "cannot say"),
        (lambda v: v.item_vectors("popular"), ConfigError, "has no vectors"),
        (lambda v: v.user_vectors("all", "swing"), DataError, "has no channel swing"),
    ],
)
def test_what_cannot_be_answered_is_refused(version, ask, error, said):
    with pytest.raises(error, match=said):
        ask(version)


def test_a_version_that_does_not_exist_is_refused(world):
    with pytest.raises(VersionError):
        open_version(world, "nothing")
