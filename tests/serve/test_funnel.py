from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chisquare

from twotower.config import Settings
from twotower.features.columns import Bag, Column
from twotower.logs import Event, EventLogError
from twotower.pipeline.line import open_served
from twotower.publish.version import Version
from twotower.schema import columns as c
from twotower.schema.errors import DataError
from twotower.serve.channels import SideBySide
from twotower.serve.explain import explain
from twotower.serve.filters import Filter
from twotower.serve.funnel import STAGES, Served, page_of, recommend
from twotower.serve.options import FunnelOptions
from twotower.serve.request import Request, impressed_window, queries_of, retrieve
from twotower.serve.users import Recent

NOW_MS = 1_800_000_000_000
WINDOW = impressed_window(NOW_MS, 1000)
SIZES = FunnelOptions(retrieve=120, pre_rank=60, rank=30, explore_share=0.0, logged=7, cosine=0.0)
EVERYTHING = replace(SIZES, logged=1000)


class ByRow:
    """A ranker with a known order: the higher (or lower) the row, the better."""

    def __init__(self, sign: float = 1.0) -> None:
        self._sign = sign
        self.seen: list[int] = []

    def score(self, user: Mapping[str, Column], clicks: Bag, rows: np.ndarray) -> np.ndarray:
        self.seen.append(len(rows))
        return (0.5 + self._sign * rows / 1000).astype(np.float32)


@pytest.fixture(scope="module")
def bare(world: Settings) -> Version:
    return replace(open_served(world), rankers={})


@pytest.fixture(scope="module")
def version(bare: Version) -> Version:
    return replace(bare, rankers={"pre_rank": ByRow(), "rank": ByRow(-1)})


def user_row(version: Version) -> int:
    """A user with some clicks."""
    return int(np.flatnonzero(np.diff(version.clicks.indptr) >= 5)[0])


def user_of(version: Version) -> int:
    user_id: int = version.users.ids[user_row(version)].as_py()
    return user_id


def clicked_by(version: Version) -> list[str]:
    begin, end = version.clicks.indptr[user_row(version) :][:2]
    items: list[str] = version.item_ids.take(version.clicks.item_row[begin:end]).to_pylist()
    return items


def asked(version: Version, k: int = 10, **rest: Any) -> Request:
    return Request(k, rest.pop("exclude", "none"), user_of(version), **rest)


def served(version: Version, options: FunnelOptions = SIZES, request_id: str = "r", k: int = 10, **rest: Any) -> Served:
    return recommend(
        version, asked(version, k, **rest), Recent(), WINDOW, options, now_ms=NOW_MS, request_id=request_id
    )


def outcomes(record: Event) -> dict[Any, str]:
    return dict(zip(record.body["items"], record.body["outcomes"], strict=True))


def test_each_stage_hands_on_its_best_and_the_counts_add_up(version: Version) -> None:
    one = served(version, EVERYTHING)
    by_outcome: dict[str, list[int]] = {stage: [] for stage in STAGES}
    positions = version.items.find(pa.array(one.record.body["items"]))
    for row, outcome in zip(positions.tolist(), one.record.body["outcomes"], strict=True):
        by_outcome[outcome].append(row)
    counts = {stage: len(rows) for stage, rows in by_outcome.items()}
    assert counts == {c.PRE_RANK_REJECTED: 60, c.RANK_REJECTED: 30, c.RANKED_NOT_SHOWN: 20, c.IMPRESSED: 10}
    assert one.page.counts == {"retrieved": 120, **counts}
    # the pre-ranker keeps the highest rows, the ranker orders them from the lowest
    kept = sorted(row for stage in STAGES[1:] for row in by_outcome[stage])
    assert min(kept) > max(by_outcome[c.PRE_RANK_REJECTED])
    assert by_outcome[c.IMPRESSED] == kept[:10]
    assert sorted(by_outcome[c.RANKED_NOT_SHOWN]) == kept[10:30]


def test_the_ranker_sees_what_the_pre_ranker_kept_alone(bare: Version) -> None:
    pre_rank, rank = ByRow(), ByRow()
    served(replace(bare, rankers={"pre_rank": pre_rank, "rank": rank}))
    assert (pre_rank.seen, rank.seen) == ([120], [60])


def test_the_towers_cosine_counts_in_the_order_and_not_in_the_score(version: Version) -> None:
    both = {"pre_rank": ByRow(0.0), "rank": ByRow(0.0)}  # rankers that think all alike
    alike = replace(version, rankers=both)
    one = served(alike, replace(EVERYTHING, cosine=2.0), channels=["two_tower"])
    nearest = retrieve(alike, asked(version, 60, channels=["two_tower"]), Recent(), WINDOW)
    assert [item.item_id for item in one.page.items] == [item.item_id for item in nearest.items[:10]]
    assert {item.score for item in one.page.items} == {0.5}
    kept = {item for item, outcome in outcomes(one.record).items() if outcome != c.PRE_RANK_REJECTED}
    assert kept == {item.item_id for item in nearest.items}
    far = version.two_tower.cosines(
        queries_of(version, asked(version), Recent(), range(0)), np.arange(len(version.item_ids))
    )
    found = dict(zip(version.item_ids.to_pylist(), far.tolist(), strict=True))
    assert [found[item.item_id] for item in nearest.items] == pytest.approx(
        [item.score for item in nearest.items], abs=1e-5
    )


def test_without_rankers_the_fused_order_is_kept_and_nothing_is_rejected(bare: Version) -> None:
    one = served(bare, EVERYTHING)
    assert one.page.counts == {
        "retrieved": 60, "pre_rank_rejected": 0, "rank_rejected": 0, "ranked_not_shown": 50, "impressed": 10,
    }  # fmt: skip
    scores = [item.score for item in one.page.items]
    assert scores == sorted(scores, reverse=True)


def test_a_page_longer_than_the_stages_is_filled_all_the_same(version: Version) -> None:
    one = served(version, k=100)
    assert one.page.counts[c.IMPRESSED] == 100
    assert [item.position for item in one.page.items] == list(range(1, 101))


def test_the_record_has_the_page_and_a_stated_share_of_each_other_stage(version: Version) -> None:
    one = served(version)
    body = one.record.body
    assert len({len(body[name]) for name in ("items", "outcomes", "positions", "scores", "channels")}) == 1
    assert body["items"][:10] == [item.item_id for item in one.page.items]
    assert body["positions"] == [*range(1, 11), *[None] * 21]
    shares = dict(zip(body["outcomes"], body["probabilities"], strict=True))
    assert shares == pytest.approx({"impressed": 1, "ranked_not_shown": 7 / 20, "rank_rejected": 7 / 30,
                                    "pre_rank_rejected": 7 / 60}, abs=1e-6)  # fmt: skip
    assert len(set(body["items"])) == len(body["items"]) == 31
    assert all((score is None) == (outcome == c.PRE_RANK_REJECTED)
               for score, outcome in zip(body["scores"], body["outcomes"], strict=True))  # fmt: skip
    assert body["counts"] == one.page.counts


def test_rejected_items_enter_the_record_evenly(version: Version) -> None:
    drawn: dict[str, int] = {}
    for number in range(400):
        for item, outcome in outcomes(served(version, request_id=f"r{number}").record).items():
            if outcome == c.PRE_RANK_REJECTED:
                drawn[item] = drawn.get(item, 0) + 1
    assert len(drawn) == 60
    assert chisquare(list(drawn.values())).pvalue > 0.001


def test_exploration_takes_the_last_place_in_its_share_of_requests_evenly_and_says_with_what_probability(
    version: Version,
) -> None:
    sizes = replace(SIZES, explore_share=0.5)
    usual = [item.item_id for item in served(version).page.items]
    explored: dict[str, int] = {}
    for number in range(800):
        one = served(version, sizes, f"r{number}")
        assert [item.item_id for item in one.page.items[:9]] == usual[:9]
        last = one.page.items[9]
        propensities = one.record.body["propensities"]
        assert [item.explored for item in one.page.items[:9]] == [False] * 9
        if last.explored:
            assert last.item_id not in usual[:9]
            assert last.item_id != usual[9] or len(usual) > 120
            explored[last.item_id] = explored.get(last.item_id, 0) + 1
            assert propensities == [*[None] * 9, pytest.approx(0.5 / 110), *[None] * (len(propensities) - 10)]
            assert last.score is not None
            assert one.page.counts["retrieved"] == 120 == sum(one.page.counts.values()) - 120
        else:
            assert last.item_id == usual[9]
            assert set(propensities) == {None}
    assert 330 < sum(explored.values()) < 470  # 400, give or take five deviations
    assert chisquare([*explored.values(), *[0] * (110 - len(explored))]).pvalue > 0.001


def test_the_same_request_draws_the_same(version: Version) -> None:
    sizes = replace(SIZES, explore_share=0.5)
    assert served(version, sizes, "a") == served(version, sizes, "a")
    assert len({str(served(version, sizes, f"{i}").record.body["items"]) for i in range(5)}) == 5


def test_a_page_can_be_read_from_its_record(version: Version) -> None:
    one = served(version, replace(SIZES, explore_share=1.0))
    assert page_of(Event.from_json({"event_id": "e", "type": "request", "user_id": 1, "ts_ms": 1_800_000_000_000,
                                    "request_id": "r", **one.record.body})) == one.page  # fmt: skip
    with pytest.raises(DataError, match="no page"):
        page_of(replace(one.record, body={"items": [1]}))


def test_the_record_has_what_the_models_saw_of_the_user(version: Version) -> None:
    context, features = {"hour": 9, "scene": "home"}, {"age": 30}
    body = served(version, context=context, features=features).record.body
    assert body["history"] == clicked_by(version)[-30:]
    assert (body["context"], body["features"]) == (context, features)


def test_someone_without_an_id_gets_a_page_and_no_record(version: Version) -> None:
    one = recommend(version, Request(10, "none"), Recent(), WINDOW, SIZES, now_ms=NOW_MS, request_id="r")
    assert len(one.page.items) == 10
    assert one.record is None


@pytest.mark.parametrize("ranked", [True, False])
def test_an_explanation_says_of_every_item_what_a_request_does_with_it(
    ranked: bool, version: Version, bare: Version
) -> None:
    one = version if ranked else bare
    wanted = asked(one, filters={"category": Filter(deny=["chess"])}, exclude="clicked")
    recent = Recent()
    ended = outcomes(recommend(one, wanted, recent, WINDOW, EVERYTHING, now_ms=NOW_MS, request_id="r").record)
    clicked = set(clicked_by(one))
    categories = dict(zip(one.item_ids.to_pylist(), one.catalogue.column("category").to_pylist(), strict=True))
    seen = set()
    for item in one.item_ids.to_pylist()[::4]:
        told = explain(one, wanted, recent, WINDOW, EVERYTHING, item_id=item)
        reasons = [*(["clicked"] if item in clicked else []), *(["category"] if categories[item] == "chess" else [])]
        assert told.filtered == reasons
        assert told.outcome == ended.get(item, "filtered" if reasons else "not_retrieved")
        assert told.why
        seen.add(told.outcome)
        assert set(told.channels) == set(one.channels)
        if told.outcome != "filtered":
            assert (told.fused.rank is not None) == (item in ended)
        assert (told.rank is None) == (not ranked)
    assert seen >= ({"impressed", "rank_rejected", "pre_rank_rejected", "filtered"} if ranked else {"filtered"})


def test_an_explanation_follows_an_item_that_is_left_out(version: Version) -> None:
    best = served(version, exclude="impressed").page.items[0].item_id
    recent = Recent(shown=((1_800_000_000_000, best),))
    told = explain(version, asked(version, exclude="impressed"), recent, WINDOW, SIZES, item_id=best)
    assert (told.outcome, told.filtered, told.rank.rank) == ("filtered", ["impressed"], 1)
    assert told.known_user
    assert told.clicks > 0


def test_an_explanation_of_what_the_version_does_not_have_says_so(version: Version) -> None:
    told = explain(version, asked(version), Recent(), WINDOW, SIZES, item_id="nothing")
    assert told.outcome == "unknown_item"
    stranger = explain(
        version, Request(10, "none", 999_999_999), Recent(), WINDOW, SIZES, item_id=version.item_ids[0].as_py()
    )
    assert (stranger.known_user, stranger.clicks) == (False, 0)


def test_the_user_tower_runs_once_for_a_request(version: Version) -> None:
    towers, calls = version.two_tower, []

    def counted(columns: Mapping[str, Column]) -> np.ndarray:
        calls.append(columns)
        return version.user_tower.encode(columns)

    towers = replace(towers, encode_users=counted)
    channels = {**version.channels, "two_tower": towers, "new_items": towers.over("new_items", towers.index)}
    counting, side_by_side = replace(version, channels=channels), SideBySide(20.0)
    options = replace(SIZES, cosine=2.0, explore_share=1.0)
    common = (counting, asked(version), Recent(), WINDOW)
    served = recommend(*common, options, now_ms=NOW_MS, request_id="r", ask=side_by_side.ask)
    assert len(calls) == 1
    assert served.page.items
    explain(*common, options, item_id=served.page.items[0].item_id)
    assert len(calls) == 2
    retrieve(*common, side_by_side.ask)
    assert len(calls) == 3


# Over HTTP.


def recommended(server: Any, **body: Any) -> dict[str, Any]:
    response = server.http.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def records(server: Any) -> list[Event]:
    return [
        record.event
        for partition in range(server.log.partitions)
        for record in server.log.read(partition, 0, 1000)
        if record.event.type == "request"
    ]


def test_a_page_is_in_the_log_and_is_not_shown_again(server: Any) -> None:
    user_id = user_of(server.version)
    first = recommended(server, user_id=user_id, k=5)
    assert first.keys() == {
        "request_id", "version", "delta_seq", "items", "counts", "failed_channels", "logged",
    }  # fmt: skip
    assert first["logged"]
    assert first["items"][0].keys() == {"item_id", "position", "score", "channels", "explored"}
    record = records(server)[0]
    assert (record.request_id, record.user_id, record.ts_ms) == (first["request_id"], user_id, server.now_ms)
    second = recommended(server, user_id=user_id, k=5)
    assert not {item["item_id"] for item in first["items"]} & {item["item_id"] for item in second["items"]}
    assert server.metric('twotower_funnel_items_total{outcome="impressed"}') == 10


def test_a_request_that_is_sent_again_gets_its_page_and_one_record(server: Any) -> None:
    user_id = user_of(server.version)
    body = {"user_id": user_id, "request_id": "again", "ts_ms": 1_790_000_000_000}
    assert recommended(server, **body) == recommended(server, **body)
    assert [(one.request_id, one.ts_ms) for one in records(server)] == [("again", 1_790_000_000_000)]


def test_a_page_is_given_though_its_record_cannot_be_written(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise EventLogError("the disk is full")

    monkeypatch.setattr(server.log, "append", full)
    page = recommended(server, user_id=user_of(server.version))
    assert (len(page["items"]), page["logged"]) == (10, False)
    assert server.metric("twotower_unlogged_requests_total") == 1


def test_an_explanation_is_given_over_http(server: Any) -> None:
    user_id, item_id = user_of(server.version), server.version.item_ids[0].as_py()
    response = server.http.post("/v1/explain", json={"user_id": user_id, "item_id": item_id})
    assert response.status_code == 200, response.text
    told = response.json()
    assert told["item_id"] == item_id
    assert set(told["channels"]) == set(server.version.channels)


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("recommend", {"k": 0}, "k"),
        ("recommend", {"k": 201}, "k"),
        ("recommend", {"ts_ms": 1_700_000_000}, "ts_ms"),
        ("recommend", {"user_id": "x"}, "ids of users"),
        ("recommend", {"request_id": ""}, "request_id"),
        ("recommend", {"channels": ["nothing"]}, "no channel nothing"),
        ("explain", {}, "item_id"),
        ("explain", {"item_id": "i000001", "filters": {"nothing": [1]}}, "no attribute nothing"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(route: str, body: Any, message: str, server: Any) -> None:
    response = server.http.post(f"/v1/{route}", json=body)
    assert response.status_code == 422
    assert message in response.json()["error"]
