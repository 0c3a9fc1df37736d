import dataclasses
import re
from pathlib import Path

from twotower.config.reference import reference
from twotower.config.settings import Settings
from twotower.features.options import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_of_options_is_the_generated_one() -> None:
    """After a change: python -c "from twotower.config.reference import reference; print(reference(), end='')"."""
    assert PAGE.read_text(encoding="utf-8") == reference()


def test_every_section_and_kind_is_on_the_page() -> None:
    sections = re.findall(r"^## `\[(\w+)\]`$", reference(), re.MULTILINE)
    assert sections == [*(field.name for field in dataclasses.fields(Settings)), "import"]
    assert re.findall(r"^### `kind = \"(\w+)\"`$", reference(), re.MULTILINE) == list(KINDS)


def test_every_key_says_what_it_does_and_has_a_default() -> None:
    rows = re.findall(r"^\| `(.*)$", reference(), re.MULTILINE)
    assert len(rows) > 60
    for row in rows:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert len(cells) == 5, row
        assert all(cells[:4]), row


def test_nested_keys_stand_under_their_dotted_names() -> None:
    page = reference()
    assert "| `negatives.easy.in_batch` | number, 0 to 1 | `1.0` | The other positives of the batch. |" in page
    assert "| `last_day` | day, `YYYY-MM-DD` | absent | Last day of positives and of histories; " in page
    assert "| `size` | integer > 0 | must be given | Its length. |" in page
