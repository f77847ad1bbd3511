"""Every public name stands in a page, and the list of names is what the docstrings say."""

import re

import pytest

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP
from tests.helpers.api import PAGE, reference

PAGES = "".join(
    page.read_text()
    for page in (TOP / "README.md", *sorted((TOP / "docs").glob("*.md")))
    if page != PAGE
)


def mentioned(name: str) -> bool:
    return re.search(rf"\bbd3lm\.{name}\b|`{name}[`(.]", PAGES) is not None


@pytest.mark.parametrize("name", sorted({*bd3lm.__all__, *bd3lm.results.__all__} - {"Result"}))
def test_a_public_name_is_explained_in_a_page(name):
    assert mentioned(name)


def test_a_name_that_no_page_has_is_noticed():
    assert not mentioned("denoise_backwards") and not mentioned("xact")


def test_the_list_of_public_names_is_what_the_docstrings_say():
    assert PAGE.read_text() == reference(), "run python -m tests.helpers.api"


def test_every_public_name_has_a_row_and_a_first_line():
    rows = re.findall(r"^\| `(\w+).*` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted([*bd3lm.__all__, *bd3lm.results.__all__])
    assert all(line.strip() for _, line in rows)
