"""The index of errors has each public error and warning, and the messages that they have."""

import inspect
import re

import pytest

from tests.helpers.errors_page import PAGE, messages
from transformer_lens_bd3lm import errors

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value)]
NAMES = [each.__name__ for each in CLASSES if each.__module__ == errors.__name__]


def section_of(name: str, page: str) -> str:
    """What the page says under the heading of an error; empty without one."""
    match = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return match[1] if match else ""


@pytest.mark.parametrize("name", NAMES)
def test_an_error_has_a_section_with_a_message_and_a_way_out(name):
    page = PAGE.read_text()
    section = section_of(name, page)
    assert f"bd3lm.{name}" in section and "```text\n" in section
    if name != "BD3LMError":
        (row,) = re.findall(rf"^\| \[`{name}`\]\(#{name.lower()}\) (\|.*\|.*\|.*\|)$", page, re.M)
        assert all(cell.strip() for cell in row.strip("|").split("|"))


def test_an_error_without_a_section_would_be_noticed():
    assert len(NAMES) >= 10
    assert section_of("NoSuchError", PAGE.read_text()) == ""


def test_the_messages_are_those_of_the_code():
    pairs = messages()
    assert sum(bool(said) for said, _ in pairs) == len(NAMES)
    assert all(said == printed for said, printed in pairs), "python -m tests.helpers.errors_page"
