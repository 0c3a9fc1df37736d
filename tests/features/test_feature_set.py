from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twotower.features.feature_set import (
    FEATURES_FILE,
    VOCABULARY_FILE,
    FeatureSet,
    TableShape,
    encode_table,
    fit,
    fit_numeric,
    load,
    save,
    width,
)
from twotower.features.options import Categorical, Features, MultiCategorical, Numeric, Sequence, Vector
from twotower.schema.errors import ConfigError, DataError

CATEGORY = Categorical("categorical")
USERS = pa.table(
    {
        "user_id": ["u1", "u2"],
        "city": ["Bern", "Zürich"],
        "empty": pa.nulls(2),
        "age": [30, 40],
        "height": [1.5, 1.8],
        "seen": pa.array([[1], [2, 1]]),
        "face": pa.array([[0.5], [1.5]]),
    }
)
ITEMS = pa.table({"item_id": [1, 2, 3], "tags": ["a|b", None, "c"]})
CONTEXT = {"hour": pa.array([3, 8])}
FEATURES = Features(
    {
        "user_id": CATEGORY,
        "city": CATEGORY,
        "empty": CATEGORY,
        "age": Numeric("numeric", "log"),
        "height": Numeric("numeric", "buckets", 3),
        "seen": Sequence("sequence", 5, "attention"),
        "history": Sequence("sequence", 7),
        "face": Vector("vector", 1),
    },
    {"item_id": CATEGORY, "tags": MultiCategorical("multi_categorical", "|")},
    {"hour": CATEGORY},
)


def fitted() -> FeatureSet:
    return fit(FEATURES, USERS, ITEMS, CONTEXT, 16, 0.5)


def test_what_is_saved_is_loaded_again(tmp_path: Path) -> None:
    save(fitted(), tmp_path)
    loaded = load(tmp_path)
    assert loaded == fitted()
    again = tmp_path / "again"
    again.mkdir()
    save(loaded, again)
    for name in (FEATURES_FILE, VOCABULARY_FILE):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_loaded_vocabularies_are_mapped_not_read(tmp_path: Path) -> None:
    save(fitted(), tmp_path)
    before = pa.total_allocated_bytes()
    loaded = load(tmp_path)
    assert pa.total_allocated_bytes() == before
    assert loaded.vocabularies["item_id"].values.to_pylist() == [1, 2, 3]
    assert loaded.vocabularies["user_id"].values.to_pylist() == ["u1", "u2"]


def test_loaded_features_encode_to_the_same_bytes(tmp_path: Path) -> None:
    save(fitted(), tmp_path)
    ours, theirs = (encode_table(features.user_columns, USERS) for features in (fitted(), load(tmp_path)))
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        assert repr(column) == repr(theirs[name])


def test_sequences_share_the_table_of_item_ids() -> None:
    tables = fitted().tables
    assert tables["item_id"] == TableShape("item_id", 2 + 3 + 2, 16)
    assert tables["user_id"] == TableShape("user_id", 2 + 2 + 1, 16)
    assert tables["user.empty"].rows == 2
    assert sorted(tables) == [
        "context.hour",
        "item.tags",
        "item_id",
        "user.city",
        "user.empty",
        "user.height",
        "user_id",
    ]


def test_the_history_is_no_column_of_users() -> None:
    features = fitted()
    assert features.history is not None
    assert features.history.last == 7
    assert "history" not in [feature.name for feature in features.user_columns]


def test_widths_grow_with_the_vocabulary_up_to_the_dimension() -> None:
    assert [width(values, 64) for values in (0, 1, 16, 10**9)] == [6, 6, 12, 64]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (Features({"agee": CATEGORY}), r"features.user.agee: no such column; there are user_id, city"),
        (Features(context={"hours": CATEGORY}), r"features.context.hours: no such column; there are hour"),
        (Features(item={"tags": Sequence("sequence")}), "features.item.tags: a sequence of items belongs to"),
    ],
)
def test_a_feature_without_its_column_is_refused(features: Features, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(features, USERS, ITEMS, CONTEXT, 16, 0.0)


@pytest.mark.parametrize("transform", ["standard", "log", "buckets"])
def test_statistics_do_not_depend_on_the_order_of_rows(transform: str) -> None:
    values = np.random.default_rng(0).lognormal(0, 9, 10_000)
    kind = Numeric("numeric", transform, 7)  # type: ignore[arg-type]
    one, two = (fit_numeric("x", "t", kind, pa.array(order), 8) for order in (values, values[::-1]))
    assert one == two


@pytest.mark.parametrize("values", [[], [None, None], [float("nan"), float("inf")]])
@pytest.mark.parametrize("transform", ["standard", "log", "buckets"])
def test_a_number_without_a_finite_value_still_encodes(values: list[float], transform: str) -> None:
    kind = Numeric("numeric", transform)  # type: ignore[arg-type]
    feature = fit_numeric("x", "t", kind, pa.array(values, pa.float64()), 8)
    assert np.isfinite(feature.encode(pa.array([1.0, None]))).all()


def test_numbers_too_great_to_standardise_are_refused() -> None:
    with pytest.raises(DataError, match="x holds numbers as great as 1e\\+308: use transform = 'log' or 'buckets'"):
        fit_numeric("x", "t", Numeric("numeric"), pa.array([1e308, 1e308, -1e308]), 8)


def test_a_damaged_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"features\.json does not exist"):
        load(tmp_path)
    save(fitted(), tmp_path)
    (tmp_path / FEATURES_FILE).write_text("{}")
    with pytest.raises(DataError, match="not of this format: KeyError"):
        load(tmp_path)
    save(fitted(), tmp_path)
    (tmp_path / VOCABULARY_FILE).write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"vocab\.arrow cannot be read"):
        load(tmp_path)


SHARING = Features(
    {"user_id": CATEGORY, "follows": MultiCategorical("multi_categorical", "|", table="author")},
    {"item_id": CATEGORY, "author": Categorical("categorical", table="author")},
    {"from_author": Categorical("categorical", table="author")},
)
FOLLOWERS = pa.table({"user_id": ["u1", "u2"], "follows": ["ann|bob", None]})
WRITTEN = pa.table({"item_id": [1, 2], "author": ["bob", "cyd"]})


def test_features_of_one_table_share_vocabulary_and_embedding() -> None:
    found = fit(SHARING, FOLLOWERS, WRITTEN, {"from_author": pa.array(["dan"])}, 16, 0.5)
    assert found.vocabularies["shared.author"].values.to_pylist() == ["ann", "bob", "cyd", "dan"]
    assert set(found.tables) == {"user_id", "item_id", "shared.author"}
    assert found.tables["shared.author"] == TableShape("shared.author", 6, width(4, 16))
    follows = encode_table([f for f in found.user if f.name == "follows"], FOLLOWERS)["follows"]
    author = encode_table([f for f in found.item if f.name == "author"], WRITTEN)["author"]
    assert (follows.rows.tolist(), author.tolist()) == ([2, 3, 0], [3, 4])


def test_a_shared_table_is_saved_and_loaded(tmp_path: Path) -> None:
    found = fit(SHARING, FOLLOWERS, WRITTEN, {"from_author": pa.array(["dan"])}, 16, 0.5)
    save(found, tmp_path)
    assert load(tmp_path) == found


def test_a_category_can_share_the_table_of_item_ids() -> None:
    favourite = Features({"favourite": Categorical("categorical", table="item_id")}, {"item_id": CATEGORY})
    users = pa.table({"user_id": ["u1"], "favourite": [2]})
    found = fit(favourite, users, WRITTEN, {}, 16, 0.5)
    assert list(found.tables) == ["item_id"]
    assert encode_table(found.user, users)["favourite"].tolist() == [3]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dimension": 3}, "is of one dimension, but features.user.follows has 3 and features.item.author has 5"),
        ({}, "is of one type, but features.user.follows has string and features.item.author has int64"),
    ],
)
def test_features_that_cannot_share_a_table_are_refused(given: dict[str, int], said: str) -> None:
    wanted = Features(
        {"follows": MultiCategorical("multi_categorical", "|", table="author", **given)},
        {"author": Categorical("categorical", table="author", dimension=5 if given else None)},
    )
    written = pa.table({"item_id": [1, 2], "author": ["bob", "cyd"] if given else [4, 5]})
    with pytest.raises(ConfigError, match=said):
        fit(wanted, FOLLOWERS, written, {}, 16, 0.5)
