"""The page in a real browser, against a real server."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from twotower.datasets.workspace import open_workspace

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SIZES = {"desktop": (1280, 800), "mobile": (390, 844)}
POLL_MS = 3000
"""How often the page asks for the version."""
ROWS = "#recommendation-items > .item"
HISTORY = "#history-items > .item"

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is not installed: apt-get install chromium")


@pytest.fixture(scope="module")
def url(options: list[str]) -> Iterator[str]:
    """Address of a running server."""
    ports = ["--set", "serve.port=0", "--set", "serve.admin_port=0"]
    with as_file(files("twotower.cli") / "examples" / "demo.toml") as config:
        command = [sys.executable, "-m", "twotower", "serve", "-c", str(config), *options, *ports]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
            server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS.split())
        yield browser
        browser.close()


@dataclass
class Seen:
    """What went on behind a page."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Errors on the console, failed requests, and requests to anywhere but the server."""


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Callable[..., Seen]]:
    """Opens pages, and closes them after the test."""
    with ExitStack() as stack:

        def open_page(path: str = "/", size: str = "desktop", scheme: str = "light", before: Any = None) -> Seen:
            width, height = SIZES[size]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            stack.callback(page.close)
            page.set_default_timeout(10_000)
            seen = Seen(page)
            page.on("console", lambda m: seen.complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: seen.complaints.append(str(error)))
            page.on("requestfailed", lambda request: seen.complaints.append(f"failed: {request.url}"))
            page.on("response", lambda r: seen.complaints.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
            page.on(
                "request",
                lambda r: None if r.url.startswith((url, "data:")) else seen.complaints.append(f"external: {r.url}"),
            )
            if before:
                before(page)
            page.goto(url + path)
            return seen

        yield open_page


@pytest.fixture(scope="module")
def some_users(url: str) -> list[int]:
    with urllib.request.urlopen(f"{url}/console/users?n=20") as response:
        users: list[int] = json.load(response)["users"]
    return users


def ids(page: Page, rows: str) -> list[str]:
    return [str(row.get_attribute("data-item")) for row in page.locator(rows).all()]


def shoot(page: Page, name: str) -> None:
    if folder := os.environ.get("TWOTOWER_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_a_click_changes_history_and_recommendations(
    opened: Callable[..., Seen], some_users: list[int], workspace: Path, size: str, scheme: str
) -> None:
    user = some_users[2 * list(SIZES).index(size) + (scheme == "dark")]
    seen = opened(f"/?user={user}", size, scheme)
    page = seen.page
    expect(page.get_by_role("heading", level=1)).to_have_text(f"User {user}")
    expect(page.locator(ROWS)).to_have_count(20)
    before, history = ids(page, ROWS), ids(page, HISTORY)
    assert len(history) >= 5
    titles = dict(open_workspace(workspace).items().select(["item_id", "title"]).to_pandas().to_numpy().tolist())
    assert page.locator(f"{ROWS} .title").all_text_contents() == [titles[item] for item in before]
    assert page.locator(f"{HISTORY} .title").all_text_contents() == [titles[item] for item in history]

    page.locator(ROWS).nth(1).get_by_role("button", name="Click").click()
    expect(page.locator("#change")).to_contain_text(f"After the click on “{titles[before[1]]}”")
    after = ids(page, ROWS)
    assert before[1] not in after
    entered = [item for item in after if item not in before]
    left = [item for item in before if item not in after]
    expect(page.locator("#change")).to_contain_text(f"{len(entered)} entered, {len(left)} left")
    assert ids(page, f"{ROWS}.fresh") == entered
    assert ids(page, HISTORY) == [before[1], *history][:30]
    expect(page.locator(HISTORY).first).to_contain_text("live")
    assert ids(page, f"{HISTORY}.fresh") == [before[1]]
    expect(page.locator("#recommendations-took")).to_have_text(re.compile(r"^[\d.]+ ms$"))

    page.locator(ROWS).first.get_by_role("button", name="Items similar to").click()
    expect(page.locator(".similar .item")).to_have_count(8)
    page.wait_for_timeout(100)  # for the picture: transitions end
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    shoot(page, f"{size}-{scheme}")
    assert seen.complaints == []


def test_the_channels_are_a_legend_that_counts_and_chooses(opened: Callable[..., Seen], some_users: list[int]) -> None:
    seen = opened(f"/?user={some_users[5]}")
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    for place, name in enumerate(["two_tower", "item_cf", "popular"]):
        label = page.locator("#channels label", has=page.get_by_role("radio", name=name))
        brought = page.locator(f"{ROWS} .why .channel-{place}")
        assert brought.all_text_contents() == [name] * brought.count()
        expect(label.locator(".tally")).to_have_text(str(brought.count()))
        colours = [one.evaluate("e => getComputedStyle(e, '::before').backgroundColor") for one in brought.all()]
        swatch = label.locator(".channel").evaluate("e => getComputedStyle(e, '::before').backgroundColor")
        assert set(colours) <= {swatch}
    assert page.locator(f"{ROWS} .why .channel-0").count()
    page.get_by_role("radio", name="item_cf").check()
    expect(page.locator("#channels .tally", has_text=re.compile(r"\d"))).to_have_count(0)
    expect(page.locator(ROWS)).not_to_have_count(0)
    assert set(page.locator(f"{ROWS} .why .channel").all_text_contents()) == {"item_cf"}
    page.get_by_role("radio", name="fused").check()
    expect(page.locator(f"{ROWS} .why .channel-0")).not_to_have_count(0)
    assert seen.complaints == []


@pytest.mark.parametrize("size", list(SIZES))
def test_similar_items_are_shown_by_each_channel(
    opened: Callable[..., Seen], url: str, some_users: list[int], size: str
) -> None:
    seen = opened(f"/?user={some_users[6]}", size)
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    item = ids(page, ROWS)[0]
    with urllib.request.urlopen(f"{url}/v1/items/{item}/similar?k=8") as response:
        neighbours = {
            name: [one["item_id"] for one in items] for name, items in json.load(response)["channels"].items()
        }
    assert list(neighbours) == ["two_tower", "item_cf"]
    page.locator(ROWS).first.get_by_role("button", name="Items similar to").click()
    panel = page.locator(".similar")
    for name, items in neighbours.items():
        panel.get_by_role("radio", name=name).check()
        expect(panel.locator(".item")).to_have_count(len(items))
        assert ids(page, ".similar .item") == items
        for line, other in zip(panel.locator(".item").all(), items, strict=True):
            both = [name] + [also for also in neighbours if also != name and other in neighbours[also]]
            assert line.locator(".channel").all_text_contents() == both
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        panel.scroll_into_view_if_needed()
        shoot(page, f"similar-{name}-{size}")
    page.locator(ROWS).first.get_by_role("button", name="Items similar to").click()
    expect(panel).to_have_count(0)
    assert seen.complaints == []


@pytest.mark.parametrize("size", list(SIZES))
def test_the_page_of_the_funnel_is_shown_explained_and_clicked_within_its_request(
    opened: Callable[..., Seen], some_users: list[int], size: str
) -> None:
    seen = opened(f"/?user={some_users[8 + list(SIZES).index(size)]}", size)
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    with page.expect_response("**/v1/recommend") as answered:
        page.get_by_role("radio", name="page", exact=True).check()
    answer = answered.value.json()
    shown = [item["item_id"] for item in answer["items"]]
    expect(page.locator("#change")).to_contain_text(f"Of {answer['counts']['retrieved']} candidates")
    assert ids(page, ROWS) == shown
    page.locator(ROWS).nth(2).get_by_role("button", name="Why").click()
    panel = page.locator(".explained")
    expect(panel.locator(".message")).to_contain_text("In the funnel:")
    expect(panel.locator("tr")).to_contain_text(["two_tower", "item_cf", "popular", "fused"])
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    panel.scroll_into_view_if_needed()
    shoot(page, f"why-{size}")
    with page.expect_request("**/v1/events") as posted:
        page.locator(ROWS).first.get_by_role("button", name="Click").click()
    event = posted.value.post_data_json["events"][0]
    assert (event["request_id"], event["item_id"]) == (answer["request_id"], shown[0])
    expect(page.locator("#change")).to_contain_text("After the click")
    assert seen.complaints == []


def test_the_delta_that_learned_from_a_click_is_shown_and_what_it_moved(
    opened: Callable[..., Seen], some_users: list[int]
) -> None:
    seq = 0

    def version(route: Route) -> None:
        told = route.fetch().json()
        hours = [{"ts_ms": 1_767_600_000_000 + 3_600_000 * n, "recall": 0.1 * n, "positives": 50} for n in range(5)]
        figures = {"recall_next": hours, "unknown_user_share": 0.25, "unknown_item_share": 0.0, "popularity_drift": 0.5}
        monitors = {**told["monitors"], "freshness_s": 2.4, "gated": 1, **figures}
        route.fulfill(json={**told, "delta_seq": seq, "monitors": monitors})

    page = opened(f"/?user={some_users[12]}", before=lambda page: page.route("**/v1/version", version)).page
    expect(page.locator(ROWS)).to_have_count(20)
    expect(page.locator("#delta")).to_have_text("0")
    expect(page.locator("#learning")).to_be_hidden()
    page.locator(ROWS).first.get_by_role("button", name="Click").click()
    expect(page.locator("#change")).to_contain_text("After the click")
    seq = 3
    expect(page.locator("#change")).to_contain_text(
        "After delta 3, which learned from the click", timeout=3 * POLL_MS + 5000
    )
    expect(page.locator("#delta")).to_have_text("3")
    for name, text in {"freshness": "2 s", "unknown-users": "25.0 %", "drift": "0.50", "gated": "1"}.items():
        expect(page.locator(f"#{name}")).to_have_text(text)
    expect(page.locator("#hours li")).to_have_count(5)
    shoot(page, "learning")


def test_a_channel_that_was_left_out_is_marked(opened: Callable[..., Seen]) -> None:
    def late(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), "failed_channels": ["item_cf"]})

    page = opened(before=lambda page: page.route("**/v1/retrieve", late)).page
    expect(page.locator("#change")).to_have_text("Failed or too slow, and left out: item_cf.")
    expect(page.locator("#channels .failed")).to_have_text("item_cfleft out")
    shoot(page, "left-out")


def test_someone_new_starts_empty_and_their_click_counts(opened: Callable[..., Seen]) -> None:
    seen = opened()
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    page.get_by_role("button", name="New user").click()
    expect(page.locator("#history-empty")).to_contain_text("No clicks yet")
    expect(page.locator("#user-about")).to_have_text("Unknown to this version.")
    shoot(page, "new-user")
    clicked = ids(page, ROWS)[0]
    page.locator(ROWS).first.get_by_role("button", name="Click").click()
    expect(page.locator(HISTORY)).to_have_count(1)
    assert ids(page, HISTORY) == [clicked]
    assert clicked not in ids(page, ROWS)
    address = page.url
    page.reload()
    expect(page.locator(HISTORY)).to_have_count(1)
    assert page.url == address
    assert seen.complaints == []


def test_an_id_that_javascript_would_round_stays_exact(opened: Callable[..., Seen]) -> None:
    seen = opened(f"/?user={2**62 + 1}")
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    page.locator(ROWS).first.get_by_role("button", name="Click").click()
    expect(page.locator(HISTORY)).to_have_count(1)
    assert seen.complaints == []


def test_markup_in_a_title_is_text(opened: Callable[..., Seen], workspace: Path) -> None:
    items = open_workspace(workspace).items()
    [title] = [title for title in items["title"].to_pylist() if "<" in title]
    seen = opened()
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    page.get_by_role("button", name="New user").click()
    page.get_by_label("Number of items").select_option("100")
    page.get_by_role("radio", name="popular").check()
    expect(page.locator(f"{ROWS} .title", has_text="<script>")).to_have_text(title)
    assert page.locator("main script, main b").count() == 0
    assert "broken" not in page.title()
    assert seen.complaints == []


def test_the_keyboard_is_enough(opened: Callable[..., Seen], some_users: list[int]) -> None:
    seen = opened()
    page = seen.page
    expect(page.locator(ROWS)).to_have_count(20)
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the recommendations")).to_be_focused()
    page.get_by_label("User id").fill(str(some_users[-1]))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"User {some_users[-1]}")
    expect(page.locator("#columns")).not_to_have_attribute("aria-busy", "true")
    page.get_by_role("radio", name="fused").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="two_tower")).to_be_checked()
    expect(page.locator(f"{ROWS} .channel-1")).to_have_count(0)
    page.locator(ROWS).first.get_by_role("button", name="Click").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#change")).to_contain_text("After the click")
    expect(page.locator("#recommendations")).to_be_focused()
    page.go_back()
    expect(page.locator(ROWS)).to_have_count(20)
    assert seen.complaints == []


def test_errors_are_sentences(opened: Callable[..., Seen]) -> None:
    page = opened("/?user=abc").page
    expect(page.locator("#user-error")).to_have_text("User ids are whole numbers here, and “abc” is none.")
    page.get_by_role("button", name="New user").click()
    expect(page.locator(ROWS)).to_have_count(20)
    page.route("**/v1/events", lambda route: route.fulfill(status=503, json={"error": "the disk is full"}))
    page.locator(ROWS).first.get_by_role("button", name="Click").click()
    expect(page.locator("#problem")).to_have_text("The server could not answer (503): the disk is full")
    page.route("**/v1/retrieve", lambda route: route.abort())
    page.get_by_role("radio", name="item_cf").check()
    expect(page.locator("#problem")).to_have_text("The server does not answer. Is it still running?")
    expect(page.locator(ROWS)).to_have_count(0)
    shoot(page, "problem")


def test_another_version_and_a_refused_one_are_told(opened: Callable[..., Seen]) -> None:
    told: dict[str, Any] = {}

    def answer(route: Route) -> None:
        route.fulfill(json={**route.fetch().json(), **told})

    def before(page: Page) -> None:
        page.clock.install()
        page.route("**/v1/version", answer)

    page = opened(before=before).page
    expect(page.locator("#state")).to_have_text("live")
    expect(page.locator(ROWS)).to_have_count(20)
    live = page.locator("#version").text_content()
    told["refused"] = {"version": "20990101T000000000-bad", "problem": "index.faiss does not have its SHA-256"}
    page.clock.fast_forward(POLL_MS)
    expect(page.locator(".notice.refused")).to_contain_text(
        f"Version 20990101T000000000-bad was refused: index.faiss does not have its SHA-256. Version {live} stays live."
    )
    shoot(page, "refused")
    told.update(refused=None, version="20990101T000000000-good")
    page.clock.fast_forward(POLL_MS)
    expect(page.locator(".notice.switched")).to_contain_text(f"20990101T000000000-good is live in place of {live}")
    expect(page.locator(".notice.refused")).to_have_count(0)
    expect(page.locator("#change")).to_have_text("After the switch of versions: the list is the same.")
