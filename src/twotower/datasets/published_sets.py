"""Descriptions of public data sets: their files, columns, times and event types, as their owners publish them."""

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.plain_lines import Lines
from twotower.datasets.published import PublishedDataset, PublishedTable, Rows, first_known, milliseconds
from twotower.datasets.tables import Dropped, replaced
from twotower.features.fitted import split
from twotower.schema import columns as c

TITLE: Final = "title"
YEAR: Final = "year"
GENRES: Final = "genres"
CATEGORY: Final = "category"
CATEGORIES: Final = "categories"
PRIOR_HISTORY: Final = "prior_history"

_MIND_TIME: Final = "%m/%d/%Y %I:%M:%S %p"

# fmt: off
_GENRES_100K: Final = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on


def _with_year(rows: Rows, _: Dropped) -> Rows:
    """MovieLens: the year at the end of a title as a column."""
    title = rows["items"][TITLE].cast(pa.string())
    year = pc.struct_field(pc.extract_regex(title, r"\((?P<year>\d{4})\)\s*$"), "year")
    return rows | {"items": rows["items"].append_column(YEAR, year.cast(pa.int64()))}


def _with_genres(rows: Rows, dropped: Dropped) -> Rows:
    """MovieLens-100K: one column for each genre becomes text like `Action|War`."""
    items = rows["items"]
    flags = [pc.equal(items[name].cast(pa.string()), "1") for name in _GENRES_100K]
    words = [
        pc.if_else(pc.fill_null(flag, False), name, pa.scalar(None, pa.string()))
        for flag, name in zip(flags, _GENRES_100K, strict=True)
    ]
    genres = pc.binary_join_element_wise(*words, "|", null_handling="skip")
    items = items.drop_columns(list(_GENRES_100K)).append_column(GENRES, genres)
    return _with_year(rows | {"items": items}, dropped)


def _without_brackets(rows: Rows, _: Dropped) -> Rows:
    """KuaiRec: the categories of a video, `[27, 9]`, become text like `27,9`."""
    text = rows["items"][CATEGORIES].cast(pa.string())
    return rows | {"items": replaced(rows["items"], CATEGORIES, pc.replace_substring_regex(text, r"[\[\]\s]", ""))}


def _by_impression(rows: Rows, dropped: Dropped) -> Rows:
    """MIND: a row for each item of a page, `N1-1 N2-0`; items without a label are dropped.

    The history of a user's first page becomes a feature: it lies before the log, and the log tells the rest.
    """
    pages = rows["events"].combine_chunks()
    timed = replaced(pages, c.TS_MS, milliseconds(pages[c.TS_MS], _MIND_TIME, "the times of MIND"))
    users = first_known(timed.filter(pc.is_valid(timed[c.TS_MS])), c.USER_ID, [PRIOR_HISTORY])
    history = split(users[PRIOR_HISTORY].combine_chunks(), " ", PRIOR_HISTORY)
    lists = pc.split_pattern_regex(pc.utf8_trim_whitespace(pc.fill_null(pages["impressions"], "")), r"\s+")
    events = pages.drop_columns(["impressions", PRIOR_HISTORY]).take(pc.list_parent_indices(lists))
    parts = pc.extract_regex(pc.list_flatten(lists), r"^(?P<item>.+?)(?:-(?P<label>[01]))?$")
    item, label = pc.struct_field(parts, "item"), pc.struct_field(parts, "label")
    outcome = pc.if_else(pc.equal(label, "1"), c.CLICKED, c.IMPRESSED)
    events = events.append_column(c.ITEM_ID, item).append_column(c.OUTCOME, outcome)
    unlabelled = pc.fill_null(pc.equal(label, ""), True)
    return rows | {
        "events": dropped.drop(events, unlabelled, "no_label"),
        "users": users.select([c.USER_ID]).append_column(PRIOR_HISTORY, history),
    }


def _with_categories(rows: Rows, _: Dropped) -> Rows:
    """RetailRocket: the first known category of an item, and the root of that category; no other property.

    Properties change with time. A later value would tell what was not known when an event happened. Items of the events
    without properties are added.
    """
    properties = rows.pop("properties")
    known = properties.filter(pc.equal(properties["property"].cast(pa.string()), "categoryid"))
    first = first_known(known, c.ITEM_ID, ["value"])
    ids = pc.unique(pa.chunked_array([*properties[c.ITEM_ID].chunks, *rows["events"][c.ITEM_ID].chunks]))
    category = first["value"].cast(pa.string()).combine_chunks()
    category = category.take(pc.index_in(ids, value_set=first[c.ITEM_ID].combine_chunks()))
    fields = [rows["events"].schema.field(c.ITEM_ID), pa.field(CATEGORY, pa.string())]
    items = pa.table([ids, category], schema=pa.schema(fields))
    if "tree" in rows:
        items = items.append_column("root_category", _roots(category, rows.pop("tree")))
    return rows | {"items": items}


def _roots(category: pa.Array, tree: pa.Table) -> pa.Array:
    """The root of each category in a tree of `category` and `parent`."""
    child, parent = (tree[name].cast(pa.string()).to_pylist() for name in (CATEGORY, "parent"))
    parents = {one: other for one, other in zip(child, parent, strict=True) if other is not None}
    roots = {}
    for name in category.unique().drop_null().to_pylist():
        root, seen = name, {name}
        while root in parents and parents[root] not in seen:
            root = parents[root]
            seen.add(root)
        roots[name] = root
    return pa.array([roots.get(name) for name in category.to_pylist()], pa.string())


MOVIELENS_100K: Final = PublishedDataset(
    name="movielens-100k",
    tables={
        "events": (
            PublishedTable(
                "u.data",
                {"user": c.USER_ID, "item": c.ITEM_ID, "rating": c.WEIGHT, "timestamp": c.TS_MS},
                Lines(("user", "item", "rating", "timestamp")),
            ),
        ),
        "users": (
            PublishedTable(
                "u.user",
                {"user": c.USER_ID, "age": "age", "gender": "gender", "occupation": "occupation", "zip": "zip"},
                Lines(("user", "age", "gender", "occupation", "zip"), "|"),
            ),
        ),
        "items": (
            PublishedTable(
                "u.item",
                {"item": c.ITEM_ID, TITLE: TITLE} | {genre: genre for genre in _GENRES_100K},
                Lines(("item", TITLE, "released", "released on video", "IMDb", *_GENRES_100K), "|", encoding="latin-1"),
            ),
        ),
    },
    time="s",
    rated=True,
    finish=_with_genres,
)


def _movielens(name: str) -> PublishedDataset:
    """MovieLens in its later form; only the size differs."""
    ratings = {"userId": c.USER_ID, "movieId": c.ITEM_ID, "rating": c.WEIGHT, "timestamp": c.TS_MS}
    return PublishedDataset(
        name=name,
        tables={
            "events": (PublishedTable("ratings.csv", ratings),),
            "items": (PublishedTable("movies.csv", {"movieId": c.ITEM_ID, TITLE: TITLE, GENRES: GENRES}),),
        },
        time="s",
        rated=True,
        finish=_with_year,
    )


_REVIEW: Final = {"user_id": c.USER_ID, "parent_asin": c.ITEM_ID, "rating": c.WEIGHT, "timestamp": c.TS_MS}

AMAZON: Final = PublishedDataset(
    name="amazon-reviews-2023",
    tables={
        "events": (
            PublishedTable("*.jsonl", _REVIEW, "json", without="meta_*"),
            PublishedTable("*.csv", _REVIEW),
        ),
        "items": (
            PublishedTable(
                "meta_*.jsonl",
                {
                    "parent_asin": c.ITEM_ID,
                    TITLE: TITLE,
                    "main_category": "main_category",
                    "store": "store",
                    CATEGORIES: CATEGORIES,
                },
                "json",
                needed=False,
            ),
        ),
    },
    time="ms",
    rated=True,
)

_KUAI_USERS: Final = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{number}" for number in range(18)),
)

KUAIREC: Final = PublishedDataset(
    name="kuairec",
    tables={
        "events": (
            PublishedTable(
                "big_matrix.csv",
                {"user_id": c.USER_ID, "video_id": c.ITEM_ID, "timestamp": c.TS_MS, "watch_ratio": c.WEIGHT},
            ),
        ),
        "users": (PublishedTable("user_features.csv", {"user_id": c.USER_ID} | {name: name for name in _KUAI_USERS}),),
        "items": (PublishedTable("item_categories.csv", {"video_id": c.ITEM_ID, "feat": CATEGORIES}),),
    },
    time="s",
    rated=True,
    finish=_without_brackets,
)

MIND: Final = PublishedDataset(
    name="mind",
    tables={
        "events": (
            PublishedTable(
                "behaviors.tsv",
                {
                    "impression": c.REQUEST_ID,
                    "user": c.USER_ID,
                    "time": c.TS_MS,
                    "history": PRIOR_HISTORY,
                    "impressions": "impressions",
                },
                Lines(("impression", "user", "time", "history", "impressions")),
            ),
        ),
        "items": (
            PublishedTable(
                "news.tsv",
                {
                    "news": c.ITEM_ID,
                    CATEGORY: CATEGORY,
                    "subcategory": "subcategory",
                    TITLE: TITLE,
                    "abstract": "abstract",
                },
                Lines(
                    ("news", CATEGORY, "subcategory", TITLE, "abstract", "url", "title_entities", "abstract_entities")
                ),
            ),
        ),
    },
    time=_MIND_TIME,
    requests_have_rows=True,
    finish=_by_impression,
)

TAOBAO: Final = PublishedDataset(
    name="taobao",
    tables={
        "events": (
            PublishedTable(
                "UserBehavior.csv",
                {
                    "user": c.USER_ID,
                    "item": c.ITEM_ID,
                    CATEGORY: CATEGORY,
                    "behavior": c.EVENT_TYPE,
                    "timestamp": c.TS_MS,
                },
                Lines(("user", "item", CATEGORY, "behavior", "timestamp"), ","),
            ),
        ),
    },
    time="s",
    types={"pv": "click", "fav": "like", "cart": "cart", "buy": "purchase"},
    of_items=(CATEGORY,),
)

YELP: Final = PublishedDataset(
    name="yelp",
    tables={
        "events": (
            PublishedTable(
                "*review.json",
                {"user_id": c.USER_ID, "business_id": c.ITEM_ID, "stars": c.WEIGHT, "date": c.TS_MS},
                "json",
            ),
        ),
        "items": (
            PublishedTable(
                "*business.json",
                {
                    "business_id": c.ITEM_ID,
                    "name": TITLE,
                    "city": "city",
                    "state": "state",
                    "latitude": "latitude",
                    "longitude": "longitude",
                    CATEGORIES: CATEGORIES,
                },
                "json",
            ),
        ),
    },
    time="%Y-%m-%d %H:%M:%S",
    rated=True,
)

GOWALLA: Final = PublishedDataset(
    name="gowalla",
    tables={
        "events": (
            PublishedTable(
                "*totalCheckins.txt",
                {
                    "user": c.USER_ID,
                    "time": c.TS_MS,
                    "latitude": "latitude",
                    "longitude": "longitude",
                    "location": c.ITEM_ID,
                },
                Lines(("user", "time", "latitude", "longitude", "location")),
            ),
        ),
    },
    time="%Y-%m-%dT%H:%M:%SZ",
    of_items=("latitude", "longitude"),
)

RETAILROCKET: Final = PublishedDataset(
    name="retailrocket",
    tables={
        "events": (
            PublishedTable(
                "events.csv",
                {"timestamp": c.TS_MS, "visitorid": c.USER_ID, "event": c.EVENT_TYPE, "itemid": c.ITEM_ID},
            ),
        ),
        "properties": (
            PublishedTable(
                "item_properties*.csv",
                {"timestamp": c.TS_MS, "itemid": c.ITEM_ID, "property": "property", "value": "value"},
            ),
        ),
        "tree": (PublishedTable("category_tree.csv", {"categoryid": CATEGORY, "parentid": "parent"}, needed=False),),
    },
    time="ms",
    types={"view": "view", "addtocart": "cart", "transaction": "purchase"},
    finish=_with_categories,
)

LASTFM_2K: Final = PublishedDataset(
    name="lastfm-2k",
    tables={
        "events": (
            PublishedTable(
                "user_artists.dat",
                {"userID": c.USER_ID, "artistID": c.ITEM_ID, "weight": c.WEIGHT},
                Lines(("userID", "artistID", "weight"), heading="userID\t"),
            ),
        ),
        "items": (
            PublishedTable(
                "artists.dat",
                {"id": c.ITEM_ID, "name": TITLE},
                Lines(("id", "name", "url", "pictureURL"), heading="id\t"),
            ),
        ),
    },
    time=None,
    rated=True,
)

LASTFM_1K: Final = PublishedDataset(
    name="lastfm-1k",
    tables={
        "events": (
            PublishedTable(
                "userid-timestamp-artid-artname-traid-traname.tsv",
                {"user": c.USER_ID, "time": c.TS_MS, "artist name": c.ITEM_ID},
                Lines(("user", "time", "artist", "artist name", "track", "track name")),
            ),
        ),
        "users": (
            PublishedTable(
                "userid-profile.tsv",
                {"user": c.USER_ID, "gender": "gender", "age": "age", "country": "country"},
                Lines(("user", "gender", "age", "country", "registered"), heading="#id\t"),
            ),
        ),
    },
    time="%Y-%m-%dT%H:%M:%SZ",
)

PUBLISHED: Final = {
    dataset.name: dataset
    for dataset in (
        MOVIELENS_100K,
        _movielens("movielens-25m"),
        _movielens("movielens-32m"),
        AMAZON,
        KUAIREC,
        MIND,
        TAOBAO,
        YELP,
        GOWALLA,
        RETAILROCKET,
        LASTFM_2K,
        LASTFM_1K,
    )
}
"""Descriptions by name."""
