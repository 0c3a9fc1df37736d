"""Whatever stands in a configuration or behind --set is accepted or refused with a sentence, never with a traceback."""

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.config import Settings, load, parse
from twotower.config.available import check_available
from twotower.config.load import as_dict
from twotower.schema.errors import ConfigError


def keys(section: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every section and key of a configuration."""
    for field in dataclasses.fields(section):
        yield (*above, field.name)
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, (*above, field.name))


KEYS = list(keys(Settings()))
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, -(10**30), 1e308, 1e-320, float("inf"), float("nan"), 0.5])
PLAIN = st.one_of(st.booleans(), st.integers(), st.floats(), NUMBERS, st.text(max_size=8), st.dates(), st.times())
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
FEATURES = st.dictionaries(
    st.text(max_size=6),
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["categorical", "numeric", "sequence", "vector", "multi_categorical", "text"])},
        optional=dict.fromkeys(("last", "size", "table", "dimension", "separator", "encoder", "heads"), VALUES),
    ),
    max_size=3,
)


def document(key: tuple[str, ...], value: Any) -> dict[str, Any]:
    for name in reversed(key):
        value = {name: value}
    return value


def accepted_or_refused(content: dict[str, Any]) -> None:
    refusal, found = None, Settings()
    try:
        found = parse(content)
    except ConfigError as error:
        refusal = str(error)
    assert refusal is None or 0 < len(refusal) < 5000
    json.dumps(as_dict(found), allow_nan=False)
    assert parse(as_dict(found)) == found
    with contextlib.suppress(ConfigError):
        check_available(found)


@settings(max_examples=600, deadline=None)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_of_any_key_is_accepted_or_refused(key: tuple[str, ...], value: Any) -> None:
    accepted_or_refused(document(key, value))


@settings(max_examples=200, deadline=None)
@given(side=st.sampled_from(["user", "item", "context"]), features=FEATURES)
def test_any_feature_is_accepted_or_refused(side: str, features: dict[str, Any]) -> None:
    accepted_or_refused({"features": {side: features}})


@settings(max_examples=300, deadline=None)
@given(
    override=st.one_of(
        st.text(max_size=30),
        st.builds(lambda key, value: f"{'.'.join(key)}={value}", st.sampled_from(KEYS), st.text(max_size=12)),
    )
)
def test_any_override_is_accepted_or_refused(override: str) -> None:
    with contextlib.suppress(ConfigError):
        parse({}, [override])


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_no_number_without_end_is_accepted(key: tuple[str, ...]) -> None:
    for value in (float("inf"), float("-inf"), float("nan"), 10**40, 1e300):
        with pytest.raises(ConfigError):
            parse(document(key, value))


FILES: list[tuple[bytes, str]] = [
    (bytes(range(256)), "is not TOML"),
    (b"[train]\nepochs=1\n[train]\nepochs=2", "is not TOML: Cannot declare"),
    (b"[train]\nepochs=1\nepochs=2", "is not TOML: Cannot overwrite"),
    ("[train]".encode("utf-16"), "is not TOML"),
    (b"a=" + b"[" * 100_000, "is not TOML"),
    (b"[" + b"a." * 50_000 + b"a]", "cannot be read: maximum recursion"),
    (b"[train]\nepochs=" + b"9" * 5000, "is not TOML: Exceeds the limit"),
    (b"[train]\ntemperature=1e400", "train.temperature = inf: input should be a finite number"),
    (b"[workspace]\npath=''", "workspace.path: '' is no text that can be printed"),
    (b'[workspace]\npath="a\\u0000"', r"workspace.path: 'a\x00' is no text"),
    (b"[train]\nepochs=3000000000", "train.epochs: 3e+09 is too large: at most 2147483647"),
    (b"[models]\nchannels=['" + b"x" * 100_000 + b"']", "..."),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_that_is_no_configuration_is_refused_with_a_sentence(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf[train]\r\nepochs=3\r\n", b"[train]\nepochs=3"])
def test_a_byte_order_mark_and_other_ends_of_lines_are_no_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(content)
    assert load(tmp_path / "my.toml").train.epochs == 3


def test_an_override_is_one_value() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs = '1"):
        parse({}, ["train.epochs=1\n[serve]\nport=3"])
    assert parse({}, ["samples.last_day=2020-01-31"]).samples.last_day == str(datetime.date(2020, 1, 31))
    with pytest.raises(ConfigError):
        parse({}, ["workspace.path=\udcff"])


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("channel", "joined events have a column channel of their own"),
        ("Position", "joined events have a column position of their own"),
        ("", "features.context has the name ''"),
        ("a\nb", r"features.context has the name 'a\\nb'"),
        ("USER_ID", "joined events have a column user_id of their own"),
        ("Age", "features.user.age and features.context.Age differ in upper and lower case alone"),
        ("seen.length", "features.user.seen takes the name seen.length too"),
    ],
)
def test_names_that_are_ours_or_no_names_are_refused(context: str, message: str) -> None:
    one = {"kind": "categorical"}
    with pytest.raises(ConfigError, match=message):
        parse({"features": {"user": {"age": one, "seen": {"kind": "sequence"}}, "context": {context: one}}})


@pytest.mark.parametrize("name", ["item_row", "day", "rank", "ts", "ts_ms", "__x", "a.b", 'say "hi"', "ü", "keys"])
def test_other_names_are_the_users_own(name: str) -> None:
    one = {"kind": "categorical"}
    features = {side: {name: one} for side in ("user", "item")}
    assert name in parse({"features": features}).features.user
    assert name in parse({"features": {"context": {name: one}}}).features.context
