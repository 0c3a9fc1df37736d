import io
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from twotower.config import load
from twotower.datasets.workspace import open_workspace
from twotower.schema import columns as c
from twotower.schema.clock import DAY_MS
from twotower.schema.errors import ConfigError
from twotower.schema.tables import check_entities, check_milliseconds, check_outcomes, joined_events
from twotower.worlds import simulate as sim
from twotower.worlds import words
from twotower.worlds.options import WorldOptions
from twotower.worlds.simulate import Simulation, simulate, simulate_workspace
from twotower.worlds.world import FIRST_DAY_MS, SCENES, Preferences

USERS, ITEMS, DAYS = 600, 800, 5
REPOSITORY = Path(__file__).parents[2]


@cache
def world() -> Simulation:
    return simulate(WorldOptions(users=USERS, items=ITEMS, days=DAYS, seed=1))


def truth() -> Preferences:
    return world().world.truth


def column(name: str, table: pa.Table | None = None) -> np.ndarray:
    return (world().events if table is None else table).column(name).to_numpy(zero_copy_only=False)


def user_rows() -> np.ndarray:
    return (column(c.USER_ID) - 1000) // 7


def item_rows() -> np.ndarray:
    return pc.index_in(world().events[c.ITEM_ID], world().items[c.ITEM_ID].combine_chunks()).to_numpy()


def day() -> np.ndarray:
    return (column(c.REQUEST_TS_MS) - FIRST_DAY_MS) // DAY_MS


def is_outcome(outcome: str) -> np.ndarray:
    return column(c.OUTCOME) == outcome


def utility() -> np.ndarray:
    scene = pc.index_in(world().events["scene"], pa.array(SCENES)).to_numpy()
    return truth().utility(user_rows(), item_rows(), column(c.REQUEST_TS_MS), scene)


def as_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = (simulate(WorldOptions(users=50, items=120, days=3, seed=seed)) for seed in (3, 3, 4))
    for name in ("users", "items", "events"):
        assert as_bytes(getattr(first, name)) == as_bytes(getattr(again, name))
        assert as_bytes(getattr(first, name)) != as_bytes(getattr(other, name))


def test_the_number_of_users_does_not_change_the_catalogue() -> None:
    assert simulate(WorldOptions(users=30, items=120, days=3, seed=3)).items.equals(
        simulate(WorldOptions(users=50, items=120, days=3, seed=3)).items
    )


def test_steps_that_do_not_fill_a_round_keep_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "STEP", 7)
    events = simulate(WorldOptions(users=60, items=120, days=3, seed=3)).events
    clicks = events.filter(pc.equal(events[c.OUTCOME], c.CLICKED)).select([c.USER_ID, c.ITEM_ID])
    assert clicks.num_rows > 50
    assert clicks.group_by([c.USER_ID, c.ITEM_ID]).aggregate([]).num_rows == clicks.num_rows


def test_users_and_items_are_tables_of_a_workspace() -> None:
    users, items = world().users, world().items
    assert check_entities(users, c.USER_ID, "users").equals(users)
    assert check_entities(items, c.ITEM_ID, "items").equals(items)
    assert users.column_names == ["user_id", "age", "gender", "city", "device"]
    assert items.column_names == ["item_id", "title", "category", "tags", "author", "price", "age_days"]
    assert users[c.USER_ID].type == pa.int64()
    assert users[c.USER_ID].to_pylist()[:3] == [1000, 1007, 1014]
    assert items[c.ITEM_ID].type == pa.string()
    assert items[c.ITEM_ID][123].as_py() == "i000123"


def test_some_features_are_missing_and_never_all() -> None:
    for table, names in ((world().users, ("age", "gender")), (world().items, ("price",))):
        for name in names:
            assert 0 < table[name].null_count < 0.15 * table.num_rows
    assert world().items["age_days"].null_count == 0


def test_tags_are_those_of_the_category_or_shared() -> None:
    for row in world().items.select(["category", "tags"]).to_pylist():
        tags = row["tags"].split("|")
        known = {*words.CATEGORIES[row["category"]][1].split(), *words.SHARED_TAGS}
        assert len(set(tags)) == len(tags)
        assert known.issuperset(tags)


def test_events_have_the_schema_of_joined_events_and_more() -> None:
    expected = joined_events(pa.int64(), pa.string())
    for name, kind in (
        (c.POSITION, pa.int32()),
        (c.SCORE, pa.float32()),
        (c.CHANNEL, pa.string()),
        ("hour", pa.int64()),
        ("scene", pa.string()),
    ):
        expected = expected.append(pa.field(name, kind))
    assert world().events.schema == expected
    world().events.validate(full=True)
    check_milliseconds(world().events[c.REQUEST_TS_MS], "events")
    check_outcomes(world().events[c.OUTCOME], "events")


def test_events_are_numbered_in_the_order_of_time() -> None:
    assert (column(c.EVENT_SEQ) == np.arange(world().events.num_rows)).all()
    assert (np.diff(column(c.REQUEST_TS_MS)) >= 0).all()
    assert set(day()) == set(range(DAYS))


def test_request_times_rise_strictly_within_a_user() -> None:
    requests = world().events.group_by([c.REQUEST_ID, c.USER_ID, c.REQUEST_TS_MS, "hour", "scene"]).aggregate([])
    assert requests.num_rows == pc.count_distinct(requests[c.REQUEST_ID]).as_py()
    pairs = requests.group_by([c.USER_ID, c.REQUEST_TS_MS]).aggregate([])
    assert pairs.num_rows == requests.num_rows


def test_the_hour_is_that_of_the_request() -> None:
    assert (column("hour") == column(c.REQUEST_TS_MS) // 3_600_000 % 24).all()


def test_only_clicked_rows_have_a_click_time_and_it_is_later() -> None:
    clicked = is_outcome(c.CLICKED)
    delay = column(c.CLICK_TS_MS) - column(c.REQUEST_TS_MS)
    assert (np.isnan(delay) == ~clicked).all()
    assert (delay[clicked] > 0).all()


def test_most_clicks_come_before_the_users_next_request() -> None:
    clicked = is_outcome(c.CLICKED)
    key = user_rows() * 10**13 + column(c.REQUEST_TS_MS)
    following = np.append(np.unique(key), np.iinfo(np.int64).max)
    next_request = following[np.searchsorted(following, key[clicked], side="right")]
    in_time = user_rows()[clicked] * 10**13 + column(c.CLICK_TS_MS)[clicked] < next_request
    assert 0.8 < in_time.mean() < 1.0


def test_nobody_is_shown_an_item_that_they_clicked_before() -> None:
    shown = is_outcome(c.CLICKED) | is_outcome(c.IMPRESSED)
    click_of: dict[tuple[int, int], int] = {}
    for key, seq, clicked in zip(
        zip(user_rows()[shown].tolist(), item_rows()[shown].tolist(), strict=True),
        column(c.EVENT_SEQ)[shown].tolist(),
        is_outcome(c.CLICKED)[shown].tolist(),
        strict=True,
    ):
        assert key not in click_of, seq
        if clicked:
            click_of[key] = seq
    assert len(click_of) > 1000


def test_an_item_stands_once_in_a_request() -> None:
    assert world().events.group_by([c.REQUEST_ID, c.ITEM_ID]).aggregate([]).num_rows == world().events.num_rows


def test_a_request_logs_a_whole_page_and_a_sample_of_each_stage() -> None:
    counts = world().events.group_by([c.REQUEST_ID, c.OUTCOME]).aggregate([([], "count_all")])
    most = {
        outcome: pc.max(counts.filter(pc.equal(counts[c.OUTCOME], outcome))["count_all"]).as_py()
        for outcome in (c.PRE_RANK_REJECTED, c.RANK_REJECTED, c.RANKED_NOT_SHOWN)
    }
    assert most == {c.PRE_RANK_REJECTED: 5, c.RANK_REJECTED: 3, c.RANKED_NOT_SHOWN: 2}
    shown = world().events.filter(pc.is_valid(world().events[c.POSITION]))
    pages = shown.group_by(c.REQUEST_ID).aggregate([(c.POSITION, "max"), (c.POSITION, "count"), (c.POSITION, "sum")])
    size = pages["position_max"].to_numpy()
    assert (size == 8).mean() > 0.98
    assert (pages["position_count"].to_numpy() == size).all()
    assert (pages["position_sum"].to_numpy() == size * (size + 1) // 2).all()


def test_only_shown_items_have_a_position_and_all_that_were_ranked_a_score() -> None:
    shown = is_outcome(c.CLICKED) | is_outcome(c.IMPRESSED)
    assert (np.isnan(column(c.POSITION)) == ~shown).all()
    assert (np.isnan(column(c.SCORE)) == is_outcome(c.PRE_RANK_REJECTED)).all()
    assert world().events[c.WEIGHT].null_count == world().events.num_rows
    assert set(column(c.CHANNEL)) == set(sim.CHANNELS)


def test_the_page_is_in_the_order_of_the_score() -> None:
    events = (
        world()
        .events.filter(pc.is_valid(world().events[c.POSITION]))
        .sort_by([(c.REQUEST_ID, "ascending"), (c.POSITION, "ascending")])
    )
    same = column(c.REQUEST_ID, events)[1:] == column(c.REQUEST_ID, events)[:-1]
    assert (np.diff(column(c.SCORE, events))[same] <= 0).all()


def test_the_further_an_item_came_the_better_it_is() -> None:
    mean = {outcome: utility()[is_outcome(outcome)].mean() for outcome in c.OUTCOMES}
    assert mean[c.PRE_RANK_REJECTED] < mean[c.RANK_REJECTED] - 0.2
    assert mean[c.RANK_REJECTED] < mean[c.RANKED_NOT_SHOWN] - 0.2
    assert mean[c.RANK_REJECTED] < mean[c.IMPRESSED] - 0.2
    assert mean[c.IMPRESSED] < mean[c.CLICKED] - 0.2


def test_the_click_rate_falls_with_the_position() -> None:
    shown = ~np.isnan(column(c.POSITION))
    position = column(c.POSITION)[shown].astype(int)
    rate = np.bincount(position, weights=is_outcome(c.CLICKED)[shown])[1:] / np.bincount(position)[1:]
    assert (np.diff(rate) < 0).all()
    # by the position itself too: at equal utility the first place is clicked more than the last
    band = (utility() > 2.0) & (utility() < 3.0)
    first, last = (is_outcome(c.CLICKED)[band & (column(c.POSITION) == place)].mean() for place in (1, 8))
    assert first > 1.3 * last


def test_few_items_hold_much_of_the_clicks() -> None:
    clicks = np.sort(np.bincount(item_rows()[is_outcome(c.CLICKED)], minlength=ITEMS))[::-1]
    assert clicks[: ITEMS // 10].sum() > 0.35 * clicks.sum()
    # the slope of log clicks over log rank, between the tenth item and the middle
    rank = np.arange(10, ITEMS // 2)
    slope = np.polyfit(np.log(rank), np.log(clicks[rank - 1]), 1)[0]
    assert -1.5 < slope < -0.4


def test_users_and_items_appear_on_later_days_and_never_earlier() -> None:
    assert (day() >= truth().people.start_day[user_rows()]).all()
    assert (day() >= truth().catalogue.birth_day[item_rows()]).all()
    clicked, last = is_outcome(c.CLICKED), day() == DAYS - 1
    for rows in (user_rows(), item_rows()):
        assert set(rows[clicked & last]) - set(rows[clicked & ~last])
    assert (column("age_days", world().items) == DAYS - 1 - truth().catalogue.birth_day).all()


def test_features_tell_a_part_of_the_taste() -> None:
    big = simulate(WorldOptions(users=4000, items=100, days=1, seed=2))
    city = big.users["city"].combine_chunks().dictionary_encode().indices.to_numpy()
    taste = big.world.truth.people.taste
    total = taste.var(axis=0).sum()
    within = sum((city == row).mean() * taste[city == row].var(axis=0).sum() for row in np.unique(city))
    assert 0.03 < 1 - within / total < 0.5


def test_knowing_the_taste_beats_popularity_by_far_on_the_last_day() -> None:
    clicked, last = is_outcome(c.CLICKED), day() == DAYS - 1
    before, after = (np.zeros((USERS, ITEMS), np.bool_) for _ in range(2))
    before[user_rows()[clicked & ~last], item_rows()[clicked & ~last]] = True
    after[user_rows()[clicked & last], item_rows()[clicked & last]] = True
    popular = np.broadcast_to(before.sum(axis=0), after.shape)
    some = after.any(axis=1)

    def recall(score: np.ndarray) -> float:
        top = np.argsort(np.where(before, -np.inf, score), axis=1)[some, :-21:-1]
        return float((np.take_along_axis(after[some], top, axis=1).sum(axis=1) / after[some].sum(axis=1)).mean())

    assert recall(truth().people.taste @ truth().catalogue.vector.T + truth().catalogue.quality) > 2 * recall(popular)


def test_repeated_items_of_a_row_are_found() -> None:
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 5, (20, 8))
    expected = [[value in row[:place] for place, value in enumerate(row)] for row in grid.tolist()]
    assert sim._repeated(grid).tolist() == expected


def test_a_sample_is_even_and_of_the_given_size() -> None:
    mask = np.tile([True, False, True, True, True], (4000, 1))
    drawn = sim._some(mask, 2, np.random.default_rng(0))
    assert (drawn.sum(axis=1) == 2).all()
    assert not drawn[:, 1].any()
    # each of four with probability one half: a standard deviation of 0.008
    assert np.abs(drawn[:, mask[0]].mean(axis=0) - 0.5).max() < 0.03
    assert sim._some(mask[:1], 9, np.random.default_rng(0)).tolist() == mask[:1].tolist()


@pytest.mark.parametrize(
    ("users", "items", "days", "seed", "said"),
    [
        (0, 100, 1, 0, "users=0"),
        (1, 99, 1, 0, "items=99"),
        (1, 100, 0, 0, "days=0"),
        (1, 100, 1, -1, "seed=-1"),
    ],
)
def test_sizes_that_make_no_world_are_refused(users: int, items: int, days: int, seed: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(WorldOptions(users=users, items=items, days=days, seed=seed))


def test_a_world_without_any_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="users=1, days=1: nobody made a request"):
        simulate(WorldOptions(users=1, items=100, days=1, seed=2))


def test_a_workspace_holds_out_the_last_day(tmp_path: Path) -> None:
    report = simulate_workspace(tmp_path / "w", WorldOptions(users=80, items=120, days=3, seed=5))
    whole = simulate(WorldOptions(users=80, items=120, days=3, seed=5))
    workspace = open_workspace(tmp_path / "w")
    assert workspace.dates() == ["2026-01-05", "2026-01-06"]
    assert workspace.users().equals(whole.users)
    assert workspace.items().equals(whole.items)
    assert workspace.events().equals(whole.events.slice(0, report.events))
    late = whole.events.slice(report.events)
    assert pc.min(late[c.REQUEST_TS_MS]).as_py() >= FIRST_DAY_MS + 2 * DAY_MS
    assert report.holdout + report.holdout_cold == pc.sum(pc.equal(late[c.OUTCOME], c.CLICKED)).as_py()
    assert report.holdout > 0


def test_a_workspace_of_one_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="days=1: the last day is held out"):
        simulate_workspace(tmp_path / "w", WorldOptions(users=80, items=120, days=1, seed=5))
    assert not (tmp_path / "w").exists()


def test_a_world_that_ends_later_than_now_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"begins on 2026-01-05.*at most 2 days"):
        simulate_workspace(tmp_path / "w", WorldOptions(80, 120, 3), clock_ms=lambda: FIRST_DAY_MS + 3 * DAY_MS - 1)
    assert not (tmp_path / "w").exists()


def test_the_demos_configuration_is_the_example_and_names_columns_that_exist() -> None:
    example = REPOSITORY / "examples" / "demo.toml"
    assert example.read_bytes() == (REPOSITORY / "src" / "twotower" / "cli" / "examples" / "demo.toml").read_bytes()
    features = load(example).features
    assert set(features.user) - {"history"} <= set(world().users.column_names)
    assert set(features.item) <= set(world().items.column_names)
    assert set(features.context) <= set(world().events.column_names)
