"""Every Python snippet of the README and of each page of the docs runs, in order, as printed."""

import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
PAGES = sorted((TOP / "docs").glob("*.md"))


def snippets_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


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
