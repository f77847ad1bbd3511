"""The Python snippets of the README and of the pages in docs/ run, and print what they say.

A comment behind ``print(...)`` is what that line prints: words and whole numbers as they are, other
numbers to one unit of the last digit that is quoted. Only names of axes, as in ``# [batch, pos]``,
are not compared.
"""

import re

import pytest

from tests.helpers import TOP
from tests.helpers.pages import PAGES, agrees, prints, snippets_of

CARDS = sorted((TOP / "transformer_lens_bd3lm" / "checkpoint").glob("*/README.md"))


@pytest.mark.parametrize(
    ("printed", "comment", "agree"),
    [
        ("True", "True", True),
        ("False", "True", False),
        ("3.7312 -> 0.9071", "3.73 -> 0.91", True),
        ("3.75 -> 0.9071", "3.73 -> 0.91", False),
        ("(2, 1)", "(2, 1)", True),
        ("(2, 0)", "(2, 1)", False),
        ("torch.Size([1, 6, 12, 12])", "torch.Size([1, 6, 12, 13])", False),
        ("4.1e-07", "4e-07", True),
        ("9.9e-07", "4e-07", False),
        ("0.5 nats", "0.5 bits", False),
    ],
)
def test_a_comment_is_compared_with_what_is_printed(printed, comment, agree):
    assert agrees(printed, comment) == agree


def test_a_page_that_quotes_a_wrong_figure_fails(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 0.5\nif x:\n    print(x, 2)  # 0.8 2\n```\n")
    (snippet,) = snippets_of(page)
    with pytest.raises(AssertionError, match=r"the page says '0\.8 2', the code prints '0\.5 2'"):
        exec(snippet, {"prints": prints})
    assert capsys.readouterr().out == "0.5 2\n"


def test_pages_quote_figures_that_are_asserted():
    asserted = sum(code.count("prints(") for page in PAGES for code in snippets_of(page))
    assert asserted >= 12


def test_the_snippets_of_the_readme_run(capsys):
    snippets = snippets_of(TOP / "README.md")
    assert len(snippets) == 3
    names: dict = {"prints": prints}
    exec(snippets[0], names)
    assert "O Romeo, Romeo" in capsys.readouterr().out
    for snippet in snippets[1:]:
        exec(snippet, names)
    assert names["bridge"].cfg.block_size == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_snippets_of_the_docs_run(page, capsys):
    snippets = snippets_of(page)
    assert snippets
    names: dict = {"prints": prints}
    for snippet in snippets:
        exec(snippet, names)
    assert capsys.readouterr().out, "a page shows something"


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_first_snippet_of_a_model_card_runs(card, capsys):
    exec(snippets_of(card)[0], {"prints": prints})
    assert capsys.readouterr().out


ALL = [TOP / "README.md", TOP / "contributing.md", *sorted((TOP / "docs").glob("*.md")), *CARDS]


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(TOP)))
def test_a_link_to_a_file_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text())
    # The site writes docs/reference/ when it is built, and test_site.py follows its links.
    missing = [
        t
        for t in targets
        if "://" not in t and not t.startswith("reference/") and not (page.parent / t).exists()
    ]
    assert not missing


def test_the_readme_is_short():
    assert len((TOP / "README.md").read_text().splitlines()) < 150


def test_one_line_develops_and_contributing_has_the_same():
    readme = (TOP / "README.md").read_text()
    block = re.search(r"^## Develop$.*?```bash\n(.*?)```", readme, re.MULTILINE | re.DOTALL)
    assert block is not None
    (line,) = block[1].splitlines()
    assert line in (TOP / "contributing.md").read_text()
    for command in ("pip install", "ruff check", "lint-imports", "pyright", "pytest"):
        assert command in line
