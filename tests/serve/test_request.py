from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from twotower.config import Settings
from twotower.features.bloom import FilterShape, Seen, hash_ids
from twotower.pipeline.line import open_served
from twotower.publish.version import Version
from twotower.serve.filters import Filter
from twotower.serve.request import Request, excluded_rows, find_items, newer_clicks, queries_of, retrieve
from twotower.serve.users import Recent


@pytest.fixture(scope="module")
def version(odd_world: Settings) -> Version:
    return open_served(odd_world)


def test_items_of_another_type_or_beyond_int64_are_not_in_the_catalogue(version: Version) -> None:
    assert find_items(version, [3, "3", True, 2**70, -(2**70), 39, 40]).tolist() == [3, -1, -1, -1, -1, 39, -1]


def test_clicks_after_the_watermark_follow_those_of_the_version_in_the_order_of_time(version: Version) -> None:
    watermark = version.watermark_ms
    recent = Recent(clicks=((watermark + 9, 1), (watermark, 2), (watermark + 5, 3), (watermark + 5, 99), (5, 4)))
    for user_id in (version.users.ids[7].as_py(), None):
        without, clicked = (
            queries_of(version, Request(1, "none", user_id), one, range(0)).clicks.rows.tolist()
            for one in (Recent(), recent)
        )
        assert clicked == [*without, 3, 1]
        assert bool(without) == (user_id is not None)


def test_without_a_watermark_every_click_of_the_log_counts(version: Version) -> None:
    timeless = replace(version, manifest={**version.manifest, "watermark_ms": None})
    assert newer_clicks(timeless, Recent(clicks=((5, 4), (3, 6)))).tolist() == [6, 4]


def test_exclusions_join_clicks_impressions_of_the_window_and_filters(version: Version) -> None:
    recent = Recent(shown=((100, 5), (99, 6), (100, 77), (1000, 7)))
    clicks = np.array([8, 8, 2], np.int32)

    def rows(exclude: str, **filters: Filter) -> list[int]:
        return excluded_rows(version, Request(10, exclude, filters=filters), clicks, recent, range(100, 1000)).tolist()

    assert rows("none") == []
    assert rows("clicked") == [2, 8]
    assert rows("impressed") == [2, 5, 8]
    assert rows("none", item_id=Filter(allow=[0, 1])) == list(range(2, 40))
    assert rows("clicked", item_id=Filter(deny=[0, 1])) == [0, 1, 2, 8]


def test_impressions_in_filters_are_left_out_while_they_are_within_the_window(version: Version) -> None:
    seen = Seen(FilterShape.of(700, 7, 70, 0.001)).add([150, 350, 350], hash_ids(pa.array([5, 6, 77])))
    recent = Recent(shown=((650, 9),), seen=seen)

    def rows(exclude: str, since_ms: int) -> list[int]:
        return excluded_rows(
            version, Request(10, exclude), np.zeros(0, np.int32), recent, range(since_ms, 1000)
        ).tolist()

    assert [rows("impressed", since_ms) for since_ms in (150, 200, 650)] == [[5, 6, 9], [6, 9], [9]]
    assert rows("clicked", 150) == []


def test_all_items_of_an_answer_are_of_the_version_that_it_names(version: Version) -> None:
    renamed = replace(version, id="another")
    answers = [retrieve(one, Request(5, "none"), Recent(), range(0)) for one in (version, renamed)]
    assert [answer.version for answer in answers] == [version.id, "another"]
    assert answers[0].items == answers[1].items
