from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.channels.lists import WeighedLists
from twotower.channels.options import PopularOptions
from twotower.channels.popular import Popular
from twotower.channels.queries import queries_of_users
from twotower.channels.retriever import Queries
from twotower.features.columns import Bag
from twotower.features.options import Categorical, Features
from twotower.index.protocol import Exclusions
from twotower.samples.build import build_samples
from twotower.samples.read import Samples, open_samples
from twotower.schema.errors import ConfigError


def test_items_stand_by_clicks_then_by_row_without_what_is_excluded_or_never_clicked() -> None:
    model = Popular.of_counts(np.array([2, 0, 5, 2, 1]))
    nobody = Bag(np.zeros(3, np.int64), np.zeros(0, np.int32))
    found = model.retrieve(Queries({}, nobody, Exclusions.of([[], [2, 3, 3, 99]])), 4)
    assert found.rows.tolist() == [[2, 0, 3, 4], [0, 4, -1, -1]]
    assert found.scores.tolist() == [[5, 2, 2, 1], [2, 1, -np.inf, -np.inf]]


def test_a_segment_has_its_own_list_and_then_the_wholes() -> None:
    lists = Bag(np.array([0, 4, 4, 4, 6, 7]), np.array([3, 0, 1, 2, 1, 0, 2], np.int32))
    model = Popular(WeighedLists(lists, np.array([9, 5, 4, 1, 4, 2, 1], np.float32)), "country")
    nobody = Bag(np.zeros(4, np.int64), np.zeros(0, np.int32))
    queries = Queries({"country": np.array([2, 3, 0], np.int32)}, nobody, Exclusions.of([[0], [3], []]))
    found = model.retrieve(queries, 3)
    assert found.rows.tolist() == [[1, 3, 2], [2, 0, 1], [3, 0, 1]]
    assert found.scores.tolist() == [[4, -1, -4], [1, -2, -3], [-1, -2, -3]]
    assert model.retrieve(queries, 1).rows.tolist() == [[1], [2], [3]]


def samples_of(folder: Path, untimed: bool = False) -> Samples:
    """Users of two countries; what one of them clicks in the last of three days differs."""
    day = 86_400_000
    clicks = [(1, 10, 0), (1, 11, 2), (2, 11, 2), (3, 12, 1), (3, 10, 2), (4, 12, 2), (4, 12, 2)]
    first = 1_700_000_000_000 // day * day
    (folder / "events").mkdir(parents=True)
    pq.write_table(pa.table({"user_id": [1, 2, 3, 4], "country": ["a", "a", "b", "b"]}), folder / "users.parquet")
    pq.write_table(pa.table({"item_id": [10, 11, 12, 13]}), folder / "items.parquet")
    for date in ["unknown"] if untimed else range(3):
        rows = [(n, u, i) for n, (u, i, d) in enumerate(clicks) if untimed or d == date]
        at = [None if untimed else first + int(date) * day + 1000 * n for n, _, _ in rows]
        name = date if untimed else f"2023-11-{14 + int(date)}"
        (folder / "events" / f"date={name}").mkdir()
        columns = {
            "event_seq": [n for n, _, _ in rows],
            "request_id": [str(n) for n, _, _ in rows],
            "user_id": [u for _, u, _ in rows],
            "item_id": [i for _, _, i in rows],
            "request_ts_ms": pa.array(at, pa.int64()),
            "click_ts_ms": pa.array(at, pa.int64()),
            "outcome": ["clicked"] * len(rows),
        }
        pq.write_table(pa.table(columns), folder / "events" / f"date={name}" / "part.parquet")
    features = Features(
        user={"user_id": Categorical("categorical"), "country": Categorical("categorical")},
        item={"item_id": Categorical("categorical")},
    )
    build_samples(folder, folder / "samples", features, 4)
    return open_samples(folder / "samples")


def test_popular_counts_a_window_and_segments(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    rows = np.array([0, 2])
    queries = queries_of_users(samples.features, samples.users, samples.clicks, rows)
    assert Popular.fit(samples).retrieve(queries, 4).rows[0].tolist() == [2, 0, 1, -1]
    recent = Popular.fit(samples, PopularOptions(window_days=1.0)).retrieve(queries, 4)
    assert recent.rows[0].tolist() == [1, 2, 0, -1]
    assert recent.scores[0, :3].tolist() == [2, 2, 1]
    found = Popular.fit(samples, PopularOptions(window_days=1.0, segment="country")).retrieve(queries, 4)
    assert found.rows.tolist() == [[1, 2, 0, -1], [2, 0, 1, -1]]
    assert found.scores[1, :3].tolist() == [2, 1, -1]


def test_a_saved_channel_with_segments_answers_alike(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.arange(4))
    channel = Popular.fit(samples, PopularOptions(segment="country"))
    channel.save(tmp_path)
    np.testing.assert_array_equal(Popular.load(tmp_path).retrieve(queries, 3).rows, channel.retrieve(queries, 3).rows)


def test_windows_without_time_and_segments_of_no_feature_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the events have none"):
        Popular.fit(samples_of(tmp_path / "untimed", untimed=True), PopularOptions(window_days=1.0))
    with pytest.raises(ConfigError, match=r"segment = 'planet' is no .* there are country, user_id"):
        Popular.fit(samples_of(tmp_path / "timed"), PopularOptions(segment="planet"))


def test_with_a_half_life_older_clicks_count_less(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.array([0]))
    found = Popular.fit(samples, PopularOptions(half_life_days=1.0)).retrieve(queries, 3)
    # Of the last day: item 11 twice, 12 twice, 10 once; 12 once more a day before, 10 two days before.
    assert found.rows[0].tolist() == [2, 1, 0]
    assert found.scores[0] == pytest.approx([2.5, 2.0, 1.25], abs=1e-3)


def test_a_half_life_without_time_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="half_life_days counts by time"):
        Popular.fit(samples_of(tmp_path, untimed=True), PopularOptions(half_life_days=1.0))


def test_with_a_prior_a_segment_of_few_clicks_follows_the_whole(tmp_path: Path) -> None:
    samples = samples_of(tmp_path)
    queries = queries_of_users(samples.features, samples.users, samples.clicks, np.array([0, 2]))
    # The whole: item 12 three times, 10 and 11 twice. Country a: 10 once, 11 twice; b: 12 three times, 10 once.
    for channel in saved_too(Popular.fit(samples, PopularOptions(segment="country", prior=7.0)), tmp_path):
        found = channel.retrieve(queries, 3)
        assert found.rows.tolist() == [[1, 0, 2], [2, 0, 1]]
        np.testing.assert_allclose(found.scores, [[4, 3, 3], [6, 3, 2]], rtol=1e-6)
        assert channel.retrieve(queries, 2).rows.tolist() == [[1, 0], [2, 0]]
    strong = Popular.fit(samples, PopularOptions(segment="country", prior=700.0)).retrieve(queries, 3)
    assert strong.rows.tolist() == [[2, 1, 0], [2, 0, 1]]


def saved_too(channel: Popular, folder: Path) -> list[Popular]:
    """The channel, and what is read when it was saved."""
    channel.save(folder)
    return [channel, Popular.load(folder)]


def test_a_prior_without_a_segment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prior = 3 is for the lists of segments"):
        Popular.fit(samples_of(tmp_path), PopularOptions(prior=3.0))
