"""The tutorial notebooks run, hold what they claim, and show what they show in the repository."""

import importlib.util
import re
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from tests.helpers import TOP
from tests.helpers.notebooks import NOTEBOOKS, execute, texts_of, without_bars
from tests.helpers.pages import agrees

TUTORIALS = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "results")
LARGEST = 600_000  # bytes, so that GitHub shows it
MOST_CELLS = 26


def test_there_are_three_tutorials_and_the_list_of_pages_has_them():
    listed = (TOP / "docs" / "README.md").read_text(encoding="utf-8")
    assert len(TUTORIALS) == 3
    assert all(f"(notebooks/{name}.ipynb)" in listed for name in TUTORIALS)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_is_executed_and_shows_what_is_stored(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    stored = nbformat.read(path, as_version=4)
    assert path.stat().st_size < LARGEST and len(stored.cells) <= MOST_CELLS
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("assert " in cell.source for cell in code[1:]) >= 5

    executed = without_bars(execute(path))
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    kinds = [output.output_type for output in outputs]
    assert "error" not in kinds and "stderr" not in [output.get("name") for output in outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 3
    for old, new in zip(texts_of(stored), texts_of(executed), strict=True):
        assert len(old) == len(new) and all(map(agrees, new, old)), (old, new)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_asks_before_it_answers_and_its_links_lead_somewhere(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    asked = answered = 0
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        answered += cell.source.count("**Answer.**")
        assert answered <= asked  # an answer is in a later cell than its question
        asked += len(re.findall(r"\*\*Question( \d)?\.\*\*", cell.source))
        for link in re.findall(r"\]\((?!http)([^)#]+)", cell.source):
            assert (NOTEBOOKS / link).is_file(), link
    assert asked == answered >= 2


def test_the_first_cell_installs_a_clone_beside_the_notebook_or_says_what_to_do(
    tmp_path, monkeypatch
):
    notebooks = [nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in TUTORIALS]
    (cell,) = {each.cells[1].source for each in notebooks}
    code = TransformerManager().transform_cell(cell)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as on a new machine
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no clone of the package in .* put one there"):
        exec(code, {})

    lines = []
    kernel = SimpleNamespace(run_line_magic=lambda name, line: lines.append((name, line)))
    (tmp_path / "clone").symlink_to(TOP)
    for folder in (tmp_path, NOTEBOOKS):  # a clone beside the notebook, and one around it
        monkeypatch.chdir(folder)
        names = {"get_ipython": lambda: kernel}
        exec(code, names)
        assert [clone.samefile(TOP) for clone in names["clones"]] == [True]
    assert lines == [("pip", 'install --quiet "{clones[0]}"')] * 2
