import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from twotower_lab.page import plot, report
from twotower_lab.run import results

LOADING = {"src", "srcset", "data", "action", "poster", "background"}


class References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attributes if name in LOADING or name.endswith("href")]


def test_the_report_asks_nothing_of_any_other_place(networks: Path) -> None:
    page = (networks / "report.html").read_text()
    parser = References()
    parser.feed(page)
    assert parser.found
    assert all(reference.startswith("#") for reference in parser.found)
    assert not {"script", "link", "img", "iframe", "object"} & set(parser.tags)
    assert not re.search(r"url\((?!#)|@import", page)


def test_every_link_of_the_report_leads_somewhere(networks: Path) -> None:
    page = (networks / "report.html").read_text()
    assert set(re.findall(r'<a href="#([^"]+)"', page)) == set(re.findall(r'<h2 id="([^"]+)"', page))


def test_the_report_says_how_it_was_made_and_shows_every_arm(networks: Path) -> None:
    result = results(networks)["networks"]
    page = report([result])
    assert "Parts of this page come from a smoke run" in page
    for words in (
        result["made"]["when"],
        result["made"]["machine"],
        "kuairand: left out, a smoke run has worlds alone",
    ):
        assert words in page
    for arm, changes in result["arms"].items():
        assert arm in page
        assert all(change.replace('"', "&#34;") in page for change in changes)
    whole = report([{**result, "made": {**result["made"], "smoke": False}}])
    assert "smoke run on tiny worlds" not in whole


def test_a_plot_is_whole_and_has_a_row_for_every_arm_but_the_first(networks: Path) -> None:
    drawn = (networks / "networks" / "plot.svg").read_text()
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "DCN-v2" in texts
    assert "difference to “DNN”" in texts
    [panel] = [one for one in results(networks)["networks"]["panels"] if one["data"] == "world"]
    assert {f"{row['value']:+.4f}" for row in panel["rows"]["DCN-v2"].values()} <= set(texts)
    width, height = (float(number) for number in root.get("viewBox").split()[2:])
    marks = list(root.iter("{http://www.w3.org/2000/svg}use"))
    assert marks
    for element in marks:
        assert 0 < float(element.get("x")) < width
        assert 0 < float(element.get("y")) < height


def test_names_cannot_break_the_page(networks: Path) -> None:
    result = results(networks)["networks"]
    odd = {**result, "question": "a < b & 'c'?"}
    assert "a &lt; b &amp; &#39;c&#39;?" in report([odd])
    ElementTree.fromstring(plot(odd))
