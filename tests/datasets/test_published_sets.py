"""Every data set from a tiny file of the published form, which the test writes itself."""

import gzip
import io
import tarfile
import zipfile

import pytest
from typer.testing import CliRunner

from twotower.cli.main import app
from twotower.datasets.importers import DATASETS, import_dataset
from twotower.datasets.options import ImportOptions
from twotower.datasets.workspace import open_workspace
from twotower.schema.errors import ConfigError, DataError

S = 1_500_000_000

GENRES_OF_WAR = "0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|1|0"
GENRES_OF_LOVE = "0|0|0|0|0|1|0|0|0|0|0|0|0|0|1|0|0|0|0"
LOG_HEADING = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_hate,long_view,tab\n"
KUAI_USER = "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
KUAI_USER += "follow_user_num_range,fans_user_num_range,friend_user_num_range,register_days_range,"
KUAI_USER += ",".join(f"onehot_feat{number}" for number in range(18)) + "\n"
NEWS = 'N1\tworld\ta\tA "quoted title\t\thttps://x\t[]\t[]\n'

FILES = {
    "movielens-100k": {
        "ml-100k/u.data": f"1\t10\t5\t{S}\n1\t20\t3\t{S + 1}\n2\t10\t4\t{S + 2}\n",
        "ml-100k/u.user": "1|24|M|technician|85711\n2|53|F|other|T8H1N\n",
        "ml-100k/u.item": f"10|Amélie (2001)|01-Jan-2001||http://x|{GENRES_OF_LOVE}\n20|unknown||||{GENRES_OF_WAR}\n",
        "ml-100k/README": "terms",
    },
    "movielens-1m": {
        "ml-1m/ratings.dat": f"1::10::5::{S}\n1::20::3::{S + 1}\n2::10::4::{S + 2}\n",
        "ml-1m/users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
        "ml-1m/movies.dat": "10::Amélie (2001)::Comedy|Romance\n20::War (1990)::War\n",
    },
    "movielens-25m": {
        "ml-25m/ratings.csv": f"userId,movieId,rating,timestamp\n1,10,5.0,{S}\n1,20,3.0,{S + 1}\n2,10,4.0,{S + 2}\n",
        "ml-25m/movies.csv": 'movieId,title,genres\n10,"Fabulous Destiny, The (2001)",Comedy|Romance\n20,War,War\n',
        "ml-25m/tags.csv": "userId,movieId,tag,timestamp\n",
    },
    "amazon-reviews-2023": {
        "All_Beauty.jsonl": '{"rating": 5.0, "title": "Good", "text": "x", "images": [], "asin": "B1", "parent_asin": '
        f'"B0", "user_id": "AG", "timestamp": {S}123, "helpful_vote": 0, "verified_purchase": true}}\n'
        f'{{"rating": 2, "parent_asin": "001", "user_id": "AH", "timestamp": {S}124}}\n{{"rating": 5.0, "titl\n',
        "meta_All_Beauty.jsonl": '{"main_category": "All Beauty", "title": "Cream", "average_rating": 4.8, '
        '"rating_number": 10, "price": null, "store": "S", "categories": ["Beauty", "Skin"], "parent_asin": "B0"}\n'
        '{"main_category": null, "title": "Soap", "price": "from 5.00", "store": null, "categories": [], '
        '"parent_asin": "001"}\n',
    },
    "kuairand": {
        "KuaiRand-Pure/data/log_standard_4_08_to_4_21_pure.csv": f"{LOG_HEADING}1,10,20220408,0,{S}000,1,1,0,0,1,1\n"
        f"1,11,20220408,100,{S}001,0,0,0,1,0,1\n2,10,20220408,2300,{S}002,1,0,0,0,0,0\n",
        "KuaiRand-Pure/data/log_random_4_22_to_5_08_pure.csv": f"{LOG_HEADING}2,11,20220422,0,{S}003,0,0,0,0,0,1\n",
        "KuaiRand-Pure/data/user_features_pure.csv": "user_id,user_active_degree,onehot_feat4\n1,full,2.0\n2,x,\n",
        "KuaiRand-Pure/data/video_features_basic_pure.csv": 'video_id,author,music_type,tag\n10,7,9.0,"39,2"\n11,8,,\n',
        "KuaiRand-Pure/data/video_features_statistic_pure.csv": "video_id,show_cnt\n10,5\n",
    },
    "kuairec": {
        "KuaiRec 2.0/data/big_matrix.csv": "user_id,video_id,play_duration,video_duration,time,date,timestamp,"
        "watch_ratio\n"
        f"1,10,9,3,2020-07-05 00:08:23.438,20200705,{S}.438,3.0\n1,11,1,2,2020-07-05,20200705,{S + 1}.0,0.5\n"
        "2,10,3,3,,,,1.0\n",
        "KuaiRec 2.0/data/small_matrix.csv": "user_id,video_id\n",
        "KuaiRec 2.0/data/user_features.csv": KUAI_USER + "1,full,0,0,0,5,0,0,0,61-90" + ",1" * 18 + "\n"
        "2,full,0,0,0,5,0,0,0,61-90" + "," * 18 + "\n",
        "KuaiRec 2.0/data/item_categories.csv": 'video_id,feat\n10,[8]\n11,"[27, 9]"\n',
    },
    "globo": {
        "clicks/clicks_hour_000.csv": "user_id,session_id,session_start,session_size,click_article_id,click_timestamp,"
        "click_environment,click_deviceGroup,click_os,click_country,click_region,click_referrer_type\n"
        f"1,5,{S}000,2,10,{S}000,4,1,17,1,25,2\n1,5,{S}000,2,11,{S}001,4,1,17,1,25,2\n",
        "clicks_sample.csv": "user_id\n",
        "articles_metadata.csv": "article_id,category_id\n",
    },
    "mind": {
        "train/behaviors.tsv": "1\tU1\t11/15/2019 8:55:22 AM\tN3 N1\tN1-1 N2-0\n"
        "2\tU1\t11/15/2019 9:00:00 PM\tN3 N1\tN3-0\n"
        "3\tU2\t11/15/2019 9:00:00 AM\t\tN2-1 N3\n",
        "train/news.tsv": f"{NEWS}N2\tworld\ta\tTwo\tText\tu\t[]\t[]\n",
        "dev/news.tsv": "N2\tworld\ta\tTwo\tText\tu\t[]\t[]\nN3\tsport\tb\tThree\t\tu\t[]\t[]\n",
        "dev/behaviors.tsv": "1\tU1\t11/16/2019 8:55:22 AM\tN3 N1 N1\tN3-1\n",
        "train/entity_embedding.vec": "Q1\t0.1\n",
    },
    "taobao": {
        "UserBehavior.csv": f"1,10,7,pv,{S}\n1,10,7,buy,{S + 1}\n1,11,8,cart,{S + 2}\n2,11,8,fav,{S + 3}\n"
        f"2,10,7,pv,-2134949234\n2,10,7,look,{S}\n2,10\n",
    },
    "yelp": {
        "yelp_academic_dataset_review.json": '{"review_id": "r", "user_id": "u", "business_id": "b", "stars": 5.0, '
        '"useful": 0, "text": "x", "date": "2018-07-07 22:09:11"}\n{"review_id": "s", "user_id": "v", "business_id": '
        '"d", "stars": 1.0, "date": "2018-07-08 00:00:00"}\n',
        "yelp_academic_dataset_business.json": '{"business_id": "b", "name": "Bar", "city": "Tampa", "state": "FL", '
        '"latitude": 27.9, "longitude": -82.4, "stars": 4.5, "attributes": {"Wifi": "no"}, "categories": '
        '"Bars, Food"}\n'
        '{"business_id": "d", "name": "Den", "city": "Tampa", "state": "FL", "latitude": 28, "longitude": -82, '
        '"attributes": null, "categories": null}\n',
        "yelp_academic_dataset_user.json": "{}\n",
    },
    "gowalla": {
        "loc-gowalla_totalCheckins.txt": "0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847\n"
        "0\t2010-10-18T22:17:43Z\t30.2691029532\t-97.7493953705\t420315\n1\t2010-10-17T23:42:03Z\t30.0\t-97.7\t22847\n"
        "1\tyesterday\t30.0\t-97.7\t22847\n",
    },
    "retailrocket": {
        "events.csv": f"timestamp,visitorid,event,itemid,transactionid\n{S}000,1,view,10,\n{S}001,1,addtocart,10,\n"
        f"{S}002,1,transaction,10,4\n{S}003,2,view,11,\n{S}003,2,view,99,\n",
        "item_properties_part1.csv": f"timestamp,itemid,property,value\n{S + 9}000,10,categoryid,3\n"
        f"{S}000,11,888,n1.0 x\n",
        "item_properties_part2.csv": f"timestamp,itemid,property,value\n{S}000,10,categoryid,2\n"
        f"{S}000,12,available,1\n",
        "category_tree.csv": "categoryid,parentid\n2,1\n1,\n3,1\n",
    },
    "lastfm-2k": {
        "user_artists.dat": "userID\tartistID\tweight\n2\t51\t13883\n2\t52\t11690\n3\t51\t4\n",
        "artists.dat": 'id\tname\turl\tpictureURL\n51\tDuran "Duran\thttp://x\thttp://y\n52\tMörcheeba\thttp://x\t\n',
        "tags.dat": "tagID\ttagValue\n",
    },
    "lastfm-1k": {
        "lastfm-dataset-1K/userid-timestamp-artid-artname-traid-traname.tsv": "user_000001\t2009-05-04T23:08:57Z\tf1\t"
        'Deep Dish\t\tSong One\nuser_000001\t2009-05-04T13:54:10Z\t\tJust "A Band\t\tOne\nuser_000002\t'
        "2009-05-04T13:54:10Z\tf1\tDeep Dish\tt1\tTwo\n",
        "lastfm-dataset-1K/userid-profile.tsv": "#id\tgender\tage\tcountry\tregistered\n"
        "user_000001\tm\t\tJapan\tAug 13, 2006\n"
        "user_000002\tf\t22\tPeru\tFeb 24, 2006\n",
    },
}
LATIN = ("ml-100k/u.item", "ml-1m/movies.dat")


def encoded(name, text):
    return text.encode("latin-1" if name in LATIN else "utf-8")


def as_folder(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(name, text))
    return folder


def as_zip(folder, files):
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, encoded(name, text))
        archive.writestr("__MACOSX/._x.csv", b"\0")
    return folder / "archive.zip"


def as_tar(folder, files):
    with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(encoded(name, text))
            archive.addfile(entry, io.BytesIO(encoded(name, text)))
    return folder / "archive.tar.gz"


@pytest.fixture
def imported(tmp_path):
    def read(name, form=as_zip, **options):
        source = tmp_path / "source"
        source.mkdir()
        report = import_dataset(name, form(source, FILES[name]), tmp_path / "w", ImportOptions(**options))
        workspace = open_workspace(tmp_path / "w")
        events = workspace.events().drop_columns(["event_seq", "click_ts_ms"])
        return report, events.to_pylist(), workspace.users().to_pylist(), workspace.items().to_pylist()

    return read


def test_every_data_set_has_files_here():
    assert set(FILES) | {"interactions", "movielens-32m"} == set(DATASETS)


def test_the_help_names_every_data_set():
    text = " ".join(CliRunner().invoke(app, ["import", "--help"], env={"COLUMNS": "300"}).output.split())
    assert all(name in text for name in DATASETS)


def event(user, item, ts_ms, outcome="clicked", weight=None, request_id=None, **context):
    return {
        "request_id": request_id,
        "user_id": user,
        "item_id": item,
        "request_ts_ms": ts_ms,
        "outcome": outcome,
        "weight": weight,
        **context,
    }


RATINGS = [
    event(1, 10, S * 1000, weight=5),
    event(1, 20, S * 1000 + 1000, "impressed", weight=3),
    event(2, 10, S * 1000 + 2000, weight=4),
]


def test_movielens_100k(imported):
    report, events, users, items = imported("movielens-100k", positive="4")
    assert events == RATINGS
    assert users[1] == {"user_id": 2, "age": 53, "gender": "F", "occupation": "other", "zip": "T8H1N"}
    assert items == [
        {"item_id": 10, "title": "Amélie (2001)", "genres": "Comedy|Romance", "year": 2001},
        {"item_id": 20, "title": "unknown", "genres": "War", "year": None},
    ]
    assert [name.rsplit("/", 1)[1] for name in report.not_read] == ["README"]


def test_movielens_1m_from_its_archive(imported):
    _, events, _, items = imported("movielens-1m", positive="4")
    assert events == RATINGS
    assert items[0] == {"item_id": 10, "title": "Amélie (2001)", "genres": "Comedy|Romance", "year": 2001}


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar])
def test_movielens_25m_from_a_folder_or_an_archive(imported, form):
    report, events, users, items = imported("movielens-25m", form, positive="4")
    assert events == RATINGS
    assert users == [{"user_id": 1}, {"user_id": 2}]
    assert items == [
        {"item_id": 10, "title": "Fabulous Destiny, The (2001)", "genres": "Comedy|Romance", "year": 2001},
        {"item_id": 20, "title": "War", "genres": "War", "year": None},
    ]
    assert [name.rsplit("/", 1)[1] for name in report.not_read] == ["tags.csv"]


def test_amazon_reviews_2023(imported):
    report, events, _, items = imported("amazon-reviews-2023", as_folder, positive="4")
    assert events == [event("AG", "B0", S * 1000 + 123, weight=5), event("AH", "001", S * 1000 + 124, "impressed", 2)]
    assert items == [
        {"item_id": "001", "title": "Soap", "main_category": None, "store": None, "categories": []},
        {
            "item_id": "B0",
            "title": "Cream",
            "main_category": "All Beauty",
            "store": "S",
            "categories": ["Beauty", "Skin"],
        },
    ]
    assert report.dropped == {"bad_line": 1}
    assert report.examples["bad_line"] == {"line": '{"rating": 5.0, "titl'}
    assert {"average_rating", "rating_number"} <= {
        one["column"] for one in report.columns if "left out" in one["became"]
    }


def test_amazon_reviews_as_packed_csv(tmp_path):
    rows = f"user_id,parent_asin,rating,timestamp\nAG,B1,5.0,{S}000\nAG,B2,1.0,{S}001\n"
    (tmp_path / "Toys.csv.gz").write_bytes(gzip.compress(rows.encode()))
    report = import_dataset("amazon-reviews-2023", tmp_path / "Toys.csv.gz", tmp_path / "w", ImportOptions())
    assert (report.events, report.items) == (2, 2)


def test_kuairand_as_published(imported):
    _, events, users, items = imported("kuairand", as_tar)
    assert [(one["outcome"], one["event_type"], one["hour"], one["tab"]) for one in events] == [
        ("clicked", "like", 0, 1),
        ("impressed", "dislike", 1, 1),
        ("clicked", "click", 23, 0),
        ("impressed", "view", 0, 1),
    ]
    assert users[0] == {"user_id": 1, "user_active_degree": "full", "onehot_feat4": 2}
    assert items[0] == {"item_id": 10, "author": 7, "music_type": 9, "tag": "39,2"}


def test_kuairec(imported):
    report, events, users, items = imported("kuairec", positive="2")
    assert events == [event(1, 10, S * 1000 + 438, weight=3), event(1, 11, S * 1000 + 1000, "impressed", 0.5)]
    assert report.dropped == {"null_time": 1}
    assert (len(users), users[0]["register_days_range"], users[0]["onehot_feat17"]) == (2, "61-90", 1)
    assert items == [{"item_id": 10, "categories": "8"}, {"item_id": 11, "categories": "27,9"}]


def test_globo_from_its_archive(imported):
    report, events, _, _ = imported("globo")
    assert [(one["item_id"], one["request_id"], one["region"]) for one in events] == [(10, "5", 25), (11, "5", 25)]
    assert [name.rsplit("/", 1)[1] for name in report.not_read] == ["articles_metadata.csv", "clicks_sample.csv"]


def test_mind(imported):
    report, events, users, items = imported("mind")
    morning, later = 1_573_808_122_000, 1_573_808_400_000
    assert {(one["user_id"], one["item_id"], one["outcome"], one["request_id"]) for one in events[:2]} == {
        ("U1", "N1", "clicked", "1"),
        ("U1", "N2", "impressed", "1"),
    }
    assert events[2:] == [
        event("U2", "N2", later, request_id="3"),
        event("U1", "N3", 1_573_851_600_000, "impressed", request_id="2"),
        event("U1", "N3", morning + 86_400_000, request_id="1"),
    ]
    assert events[0]["request_ts_ms"] == events[1]["request_ts_ms"] == morning
    assert report.dropped == {"no_label": 1, "repeated_id": 1}
    assert users == [{"user_id": "U1", "prior_history": ["N3", "N1"]}, {"user_id": "U2", "prior_history": []}]
    assert [(one["item_id"], one["title"]) for one in items] == [
        ("N1", 'A "quoted title'),
        ("N2", "Two"),
        ("N3", "Three"),
    ]


def test_taobao_keeps_event_types_and_counts_what_cannot_be_used(imported):
    report, events, _, items = imported("taobao", as_folder)
    assert [(one["user_id"], one["item_id"], one["event_type"], one["outcome"]) for one in events] == [
        (1, 10, "click", "clicked"),
        (1, 10, "purchase", "clicked"),
        (1, 11, "cart", "clicked"),
        (2, 11, "like", "clicked"),
    ]
    assert items == [{"item_id": 10, "category": 7}, {"item_id": 11, "category": 8}]
    assert report.dropped == {"bad_line": 1, "bad_time": 1, "unknown_event_type": 1}
    assert report.examples["unknown_event_type"]["event_type"] == "look"


def test_the_file_of_events_may_have_any_name(tmp_path):
    (tmp_path / "part.csv").write_text(FILES["taobao"]["UserBehavior.csv"])
    assert import_dataset("taobao", tmp_path / "part.csv", tmp_path / "w", ImportOptions()).events == 4


def test_yelp(imported):
    _, events, _, items = imported("yelp", as_tar, positive="4")
    assert events == [
        event("u", "b", 1_531_001_351_000, weight=5),
        event("v", "d", 1_531_008_000_000, "impressed", weight=1),
    ]
    assert items[0] == {
        "item_id": "b",
        "title": "Bar",
        "city": "Tampa",
        "state": "FL",
        "latitude": 27.9,
        "longitude": -82.4,
        "categories": "Bars, Food",
    }


def test_gowalla(tmp_path):
    text = FILES["gowalla"]["loc-gowalla_totalCheckins.txt"]
    (tmp_path / "loc-gowalla_totalCheckins.txt.gz").write_bytes(gzip.compress(text.encode()))
    report = import_dataset("gowalla", tmp_path / "loc-gowalla_totalCheckins.txt.gz", tmp_path / "w", ImportOptions())
    workspace = open_workspace(tmp_path / "w")
    assert workspace.events()["request_ts_ms"].to_pylist() == [1_287_358_923_000, 1_287_440_263_000, 1_287_532_527_000]
    assert workspace.items().to_pylist() == [
        {"item_id": 22847, "latitude": 30.0, "longitude": -97.7},
        {"item_id": 420315, "latitude": 30.2691029532, "longitude": -97.7493953705},
    ]
    assert report.dropped == {"bad_time": 1}


def test_retailrocket_takes_the_first_known_category(imported):
    _, events, _, items = imported("retailrocket")
    assert [(one["item_id"], one["event_type"]) for one in events if one["user_id"] == 1] == [
        (10, "view"),
        (10, "cart"),
        (10, "purchase"),
    ]
    assert items == [
        {"item_id": 10, "category": "2", "root_category": "1"},
        {"item_id": 11, "category": None, "root_category": None},
        {"item_id": 12, "category": None, "root_category": None},
        {"item_id": 99, "category": None, "root_category": None},
    ]


def test_lastfm_2k(imported):
    _, events, _, items = imported("lastfm-2k", positive="100")
    assert sorted((one["user_id"], one["item_id"], one["outcome"], one["weight"]) for one in events) == [
        (2, 51, "clicked", 13883),
        (2, 52, "clicked", 11690),
        (3, 51, "impressed", 4),
    ]
    assert items == [{"item_id": 51, "title": 'Duran "Duran'}, {"item_id": 52, "title": "Mörcheeba"}]


def test_lastfm_1k(imported):
    _, events, users, items = imported("lastfm-1k", as_tar)
    assert [(one["user_id"], one["item_id"]) for one in events][2] == ("user_000001", "Deep Dish")
    assert users == [
        {"user_id": "user_000001", "gender": "m", "age": None, "country": "Japan"},
        {"user_id": "user_000002", "gender": "f", "age": 22, "country": "Peru"},
    ]
    assert [one["item_id"] for one in items] == ["Deep Dish", 'Just "A Band']


def test_the_report_says_what_a_column_became_elsewhere(imported):
    report, *_ = imported("retailrocket")
    became = {(one["table"], one["column"]): one["became"] for one in report.columns}
    assert became["events", "event"] == "event_type (context)"
    assert became["events", "transactionid"] == "left out: not used"
    assert became["items", "property"] == became["items", "parentid"] == "read to make other columns"
    assert became["items", "itemid"] == "item_id"


def test_words_for_ratings_and_times_are_counted(tmp_path):
    rows = f"1 10 5 {S}|1 20 good {S}|2 20 4 soon|2 20 4 |2 20 4 99999999999999999999|2 20 4.5 {S}.5|"
    rows = rows.replace(" ", "\t").replace("|", "\n")
    as_folder(tmp_path / "s", FILES["movielens-100k"] | {"ml-100k/u.data": rows})
    report = import_dataset("movielens-100k", tmp_path / "s", tmp_path / "w", ImportOptions())
    assert report.dropped == {"bad_rating": 1, "bad_time": 2, "null_time": 1}
    assert open_workspace(tmp_path / "w").events()["request_ts_ms"].to_pylist() == [S * 1000, S * 1000 + 500]


@pytest.mark.parametrize("name", ["taobao", "mind", "retailrocket", "gowalla", "lastfm-1k"])
def test_a_rating_where_there_is_none_is_refused(imported, name):
    with pytest.raises(ConfigError, match=f"{name} has no ratings; use `all`"):
        imported(name, positive="4")


def test_a_missing_file_is_named_with_the_archive_that_may_hold_it(tmp_path):
    as_zip(tmp_path, FILES["mind"])
    with pytest.raises(DataError, match=r"has no file behaviors\.tsv, .* give the archive archive\.zip itself"):
        import_dataset("mind", tmp_path, tmp_path / "w", ImportOptions())


def test_a_cut_archive_is_refused(tmp_path):
    path = as_zip(tmp_path, FILES["mind"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be unpacked"):
        import_dataset("mind", path, tmp_path / "w", ImportOptions())


def test_errors_name_the_archive(tmp_path):
    path = as_zip(tmp_path, {"ratings.csv": "userId,movieId\n1,2\n", "movies.csv": "movieId,title,genres\n1,a,b\n"})
    with pytest.raises(DataError, match=r"archive\.zip/ratings\.csv has no column rating"):
        import_dataset("movielens-32m", path, tmp_path / "w", ImportOptions())


def test_an_archive_cannot_write_outside(tmp_path):
    path = as_zip(
        tmp_path,
        {"../../../ratings.csv": FILES["movielens-25m"]["ml-25m/ratings.csv"]}
        | {"movies.csv": FILES["movielens-25m"]["ml-25m/movies.csv"]},
    )
    assert import_dataset("movielens-25m", path, tmp_path / "w", ImportOptions()).events == 3
    assert {entry.name for entry in tmp_path.iterdir()} == {"archive.zip", "w"}
