from pathlib import Path

from twotower_lab.reference import BEGIN, END, reference

PAGE = Path(__file__).parents[2] / "docs" / "lab.md"


def test_the_list_of_claims_on_the_page_is_the_generated_one() -> None:
    """After a change: put what `python -m twotower_lab.reference` prints between the marks."""
    page = PAGE.read_text(encoding="utf-8")
    assert page[page.index(BEGIN) : page.index(END)] == reference()[: reference().index(END)]
