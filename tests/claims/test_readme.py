"""Every Python snippet of the README and of each page of the docs runs, in order, as printed."""

import re
from pathlib import Path

import pytest

from tests.helpers import TOP

PAGES = sorted((TOP / "docs").glob("*.md"))


def snippets_of(page: Path) -> list[str]:
    """A page's code; what it says is printed as ``# True`` is asserted."""
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    said = re.compile(r"^( *)print\((.+)\) +# True$", re.MULTILINE)
    return [said.sub(r"\1print(\2)\n\1assert \2", snippet) for snippet in snippets]


def test_what_a_page_says_is_true_is_asserted():
    pages = "".join("".join(snippets_of(page)) for page in PAGES)
    assert pages.count("# True") == 0 and pages.count("\nassert torch.equal(") >= 2


def test_the_snippets_of_the_readme_run(capsys):
    snippets = snippets_of(TOP / "README.md")
    assert len(snippets) == 3
    names: dict = {}
    exec(snippets[0], names)
    assert "O Romeo, Romeo" in capsys.readouterr().out
    names["x_0"] = names["bridge"].to_tokens("To be, or not to be")
    names["x_t"] = names["x_0"].clone()
    names["x_t"][0, 3] = names["bridge"].cfg.mask_token_id
    for snippet in snippets[1:]:
        exec(snippet, names)
    assert names["bridge"].cfg.block_size == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_the_docs_run(page, capsys):
    snippets = snippets_of(page)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    assert capsys.readouterr().out, "a page shows something"
