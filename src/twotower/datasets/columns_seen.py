"""What a column of somebody's files may be, judged by its name and its values: an id, a time, a click, a feature."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from twotower.datasets.files import as_numbers, unit_of
from twotower.schema.tables import is_list

_ID: Final = "(_?(id|no|key|code|number|token|hash|uuid|sku))"
_CHINESE_ID: Final = "(_?(id|编号|号|编码|代码|标识))"
_USERS: Final = (
    "(user|customer|cust|member|account|visitor|buyer|client|reader|viewer|listener|player|person|profile|reviewer|"
    "shopper|subscriber|author_of_review)"
)
_ITEMS: Final = (
    "(item|product|prod|sku|goods|article|news|movie|film|video|book|song|track|listing|offer|ad|content|doc|document|"
    "post|story|asin|parent_asin|isbn|game|recipe|course|hotel|poi|venue|business|clip|photo|app|job|program|anime)"
)
ID_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "user": (f"{_USERS}{_ID}|uid|(用户|会员|顾客|客户|买家){_CHINESE_ID}", f"{_USERS}|用户|会员|顾客|客户|买家"),
    "item": (
        f"{_ITEMS}{_ID}|iid|asin|parent_asin|isbn|(商品|物品|货品|产品|文章|电影|视频|图书|新闻|歌曲|课程){_CHINESE_ID}|货号",
        f"{_ITEMS}|商品|物品|货品|产品|文章|电影|视频|图书|新闻|歌曲|课程",
    ),
}
"""Names of ids, the surer ones first."""
FILE_NAMES: Final[Mapping[str, str]] = {
    "user": rf".*({_USERS}|用户|会员|顾客|客户).*",
    "item": rf".*({_ITEMS}|catalog|商品|物品|产品|文章|电影).*",
}
"""Names of files whose column `id` is that of users or of items."""
_TIME: Final = r"(^|_)(time|timestamp|ts|date|datetime|when|day|epoch|unixtime|created|at)(_|$)|ts_ms|时间|日期"
_NO_EVENT: Final = (
    r"birth|regist|sign_?up|signed|join|releas|publish|launch|updat|modif|expir|since|zone|hour|weekday|"
    r"注册|出生|上架|发布|更新"
)
"""In names of times that are not of an event."""
OUTCOME_NAMES: Final = r"(is_?|has_?)?(click|clicked|clk)|label|outcome|target|interacted|是否点击|点击"
RATING_NAMES: Final = r"rating|ratings|stars|overall|rate|review_score|评分|打分|星级"
REQUEST_NAMES: Final = r"request_?id|req_?id|impression_?id|page_?view_?id|search_?id"
CONTEXT_NAMES: Final = (
    r"device(_?(type|group|os))?|os|platform|browser|scene|tab|page|page_?(name|type)|country|region|city|hour|weekday|"
    r"language|locale|environment|app_?version|network|referrer(_?type)?|placement|slot|设备|平台|场景|城市|地区"
)
"""Names of what a request knows before anything is shown; of other columns of events that is not sure."""
_TEXT_NAMES: Final = (
    r".*(title|name|desc|description|text|summary|abstract|body|comment|review|url|link|image|email|mail|phone|address|"
    r"标题|名称|姓名|描述|简介|内容|邮箱|电话|地址).*"
)
_CODE_NAMES: Final = r".*(_id|id|code|zip|type|kind|category|class|level|group|gender|sex|brand|occupation|status)$"
_YES: Final = frozenset({"1", "1.0", "true", "yes", "y", "t", "是", "clicked", "click"})
_NO: Final = frozenset({"0", "0.0", "false", "no", "n", "f", "否", "impressed", "impression", "none", "-1"})
_FORMATS: Final = (
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d %H:%M",
    "%Y-%m-%d %H:%M",
    "%Y/%m/%d",
    "%Y%m%d%H%M%S",
    "%Y%m%d",
    "%d.%m.%Y %H:%M:%S",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y",
    "%Y年%m月%d日 %H:%M:%S",
    "%Y年%m月%d日",
    "%m/%d/%Y %H:%M:%S",
    "%d/%m/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M",
    "%d/%m/%Y %H:%M",
    "%m/%d/%Y",
    "%d/%m/%Y",
)
_MONEY: Final = (
    r"^\s*(US)?[$€£¥￥₹₩]\s*-?[0-9][0-9.,]*\s*$|^\s*-?[0-9][0-9.,]*\s*([$€£¥￥₹₩]|USD|EUR|GBP|CNY|RMB|元)\s*$"
)
_THOUSANDS: Final = r"^\s*-?[0-9]{1,3}(,[0-9]{3})*(\.[0-9]+)?\s*$"
_SEPARATORS: Final = ("|", ";", ", ", ",", "、", "/")
FEW_NUMBERS: Final = 20
"""Integers of at most this many values are categories."""
_LONG_TEXT: Final = 40


@dataclass(frozen=True)
class TimeForm:
    """How a column says a time: a unit of numbers, a format of text, or neither where it says it itself."""

    unit: str | None = None
    format: str | None = None
    other_format: str | None = None
    """A second format that all values fit too."""


@dataclass(frozen=True)
class FeatureSeen:
    """What becomes of a column of users or items."""

    feature: dict[str, Any] = field(default_factory=dict)
    """As a configuration has it; empty = kept, but no feature."""
    note: str = ""
    is_number_in_text: bool = False
    is_day: bool = False


def words(name: str) -> str:
    """A name in lower case with underscores, without the type of RecBole's headings.

    >>> words("userId"), words("Show Time"), words("item_id:token")
    ('user_id', 'show_time', 'item_id')
    """
    name = re.sub(r":(token|float|token_seq|float_seq)$", "", name.strip())
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def id_rank(name: str, side: str) -> int | None:
    """How surely a name is that of the ids of a side, 0 the surest; None = it is not."""
    said = words(name)
    sure, likely = ID_NAMES[side]
    if re.fullmatch(sure, said):
        return 0
    if re.fullmatch(likely, said):
        return 1
    return 2 if re.search(f"(^|_)({sure})$", said) else None


def texts_of(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The distinct values as text; empty for lists."""
    if is_list(column.type) or pa.types.is_nested(column.type):
        return pa.chunked_array([], pa.string())
    return pa.chunked_array([pc.unique(pc.drop_null(column)).cast(pa.string())])


def examples_of(column: pa.ChunkedArray, count: int = 3) -> list[str]:
    """The first distinct values, shortened."""
    seen: list[str] = []
    for value in pc.drop_null(column.slice(0, 1000)).to_pylist():
        text = str(value) if len(str(value)) <= 24 else f"{str(value)[:23]}…"
        if text not in seen:
            seen.append(text)
        if len(seen) == count:
            break
    return seen


def looks_like_time(name: str, column: pa.ChunkedArray) -> bool:
    """A column whose name or type is that of a time of an event."""
    if re.search(_NO_EVENT, words(name)):
        return False
    typed = pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)
    return typed or re.search(_TIME, words(name)) is not None


def time_form(column: pa.ChunkedArray) -> TimeForm | None:
    """How a column says times; None = it does not."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return TimeForm()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        middle = pc.quantile(column, 0.5, interpolation="lower")[0].as_py()
        if middle is None:
            return None
        if (unit := unit_of(float(middle))) is not None:
            if unit == "s" and pa.types.is_integer(kind) and middle > 10**13:
                return None
            return TimeForm(unit=unit)
        column = column.cast(pa.string()) if pa.types.is_integer(kind) else pa.chunked_array([], pa.string())
    if not pa.types.is_string(column.type) or column.null_count == len(column):
        return None
    text = pc.utf8_trim_whitespace(pc.unique(pc.drop_null(column)))
    fits = [form for form in _FORMATS if _parses(text, form)]
    return TimeForm(format=fits[0], other_format=fits[1] if len(fits) > 1 else None) if fits else None


def _parses(text: pa.Array, form: str) -> bool:
    if form == "%Y%m%d" and not pc.all(pc.equal(pc.utf8_length(text), 8)).as_py():
        return False
    try:
        years = pc.year(pc.strptime(text, format=form, unit="s"))
    except pa.ArrowException:
        return False
    return bool(pc.all(pc.and_(pc.greater(years, 1979), pc.less(years, 2101))).as_py())


def click_values(column: pa.ChunkedArray) -> list[str] | None:
    """The values that are a click, of a column of two kinds of values; None = it does not say clicks."""
    values = {text.strip().lower() for text in texts_of(column).to_pylist()}
    if not values or not values <= _YES | _NO or column.null_count:
        return None
    return sorted(values & _YES) if values & _YES and values & _NO else None


def feature_seen(name: str, column: pa.ChunkedArray, is_user: bool) -> FeatureSeen:
    """What becomes of a column of users or items, by its values."""
    present, kind = pc.drop_null(column), column.type
    if not len(present) or pa.types.is_null(kind):
        return FeatureSeen(note="no value")
    if is_list(kind):
        return _list_feature(present)
    if pa.types.is_nested(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return FeatureSeen(note=f"no feature is of type {kind}")
    distinct = pc.count_distinct(present).as_py()
    if distinct < 2:
        return FeatureSeen(note="one value only")
    if pa.types.is_string(kind):
        return _text_feature(name, present, distinct, is_user)
    return _plain_feature(name, present, distinct)


def _plain_feature(name: str, column: pa.ChunkedArray, distinct: int) -> FeatureSeen:
    """Of dates, booleans and numbers."""
    kind = column.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return FeatureSeen({"kind": "numeric"}, "a date as days", is_day=True)
    if pa.types.is_boolean(kind):
        return FeatureSeen({"kind": "categorical"})
    is_code = distinct <= FEW_NUMBERS or re.fullmatch(_CODE_NAMES, words(name)) is not None
    if pa.types.is_integer(kind) and is_code:
        return _category(distinct, len(column))
    return FeatureSeen(_numeric(column))


def _numeric(column: pa.ChunkedArray) -> dict[str, Any]:
    """Numbers that span orders of magnitude get a logarithm."""
    values = column.cast(pa.float64())
    low, middle, high = pc.quantile(values, [0.0, 0.5, 0.99]).to_pylist()
    is_wide = low >= 0 and high > 8 * max(middle, 1e-9)
    return {"kind": "numeric", "transform": "log"} if is_wide else {"kind": "numeric"}


def _category(distinct: int, rows: int) -> FeatureSeen:
    if distinct > max(rows // 2, FEW_NUMBERS):
        return FeatureSeen(note="nearly every row has its own value")
    return FeatureSeen({"kind": "categorical"})


def _list_feature(column: pa.ChunkedArray) -> FeatureSeen:
    kind = column.type.value_type
    lengths = pc.unique(pc.list_value_length(column))
    if pa.types.is_floating(kind):
        if len(lengths) == 1 and lengths[0].as_py():
            return FeatureSeen({"kind": "vector", "size": lengths[0].as_py()})
        return FeatureSeen(note="lists of numbers of different lengths")
    if pa.types.is_nested(kind):
        return FeatureSeen(note="lists of lists")
    return FeatureSeen({"kind": "multi_categorical"})


def _text_feature(name: str, column: pa.ChunkedArray, distinct: int, is_user: bool) -> FeatureSeen:
    said = words(name)
    if name.endswith(":token_seq"):
        return FeatureSeen({"kind": "multi_categorical", "separator": " "}, "a list separated by spaces")
    if any(pc.all(pc.match_substring_regex(column, pattern)).as_py() for pattern in (_MONEY, _THOUSANDS)):
        return FeatureSeen(_numeric(as_numbers(column, name)), "text of numbers", is_number_in_text=True)
    separator = _separator(column)
    if separator is not None and not re.fullmatch(_TEXT_NAMES, said):
        spec = {"kind": "multi_categorical", "separator": separator}
        return FeatureSeen(spec, f"a list separated by {separator!r}")
    if is_user and re.search(r"mail|phone|address|name|邮箱|电话|地址|姓名", said):
        return FeatureSeen(note="says who it is, nothing of a taste")
    length = pc.mean(pc.utf8_length(column)).as_py() or 0
    if length > _LONG_TEXT or (re.fullmatch(_TEXT_NAMES, said) and distinct > len(column) // 4):
        return FeatureSeen(note="text: kept to be shown; a vector of it can be a feature")
    return _category(distinct, len(column))


def _separator(column: pa.ChunkedArray) -> str | None:
    """What separates the values of lists: their parts repeat, those of sentences do not."""
    for separator in _SEPARATORS:
        has = pc.sum(pc.match_substring(column, separator)).as_py() or 0
        if 5 * has < len(column):
            continue
        parts = pc.list_flatten(pc.split_pattern(column, separator))
        repeats = 3 * pc.count_distinct(parts).as_py() < len(parts) or (len(column) < 30 and has > len(column) // 2)
        if repeats and (pc.mean(pc.utf8_length(parts)).as_py() or 0) <= 25:
            return separator
    return None
