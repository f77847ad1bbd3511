"""A notebook that shows every type of result is executed in a real kernel: tables, no clutter."""

import re
from typing import Any

import pytest

import transformer_lens_bd3lm as bd3lm
from tests.helpers import TOP
from tests.helpers.notebooks import execute
from transformer_lens_bd3lm.result import Result

GALLERY = TOP / "docs" / "notebooks" / "results.ipynb"
# Bars of one cell share an output; a short computation shows none.
BARS = """
from transformer_lens_bd3lm import progress
progress._AFTER = progress._EVERY = 0.0
for label in ("reading", "writing <b>"):
    with progress.progress_bar(label, 3) as update:
        update(advance=2)
        update(completed=3)
"""
SHORT = """
progress._AFTER = 60.0
with progress.progress_bar("reading", 3) as update:
    update(advance=3)
bd3lm.denoise(model, max_new_tokens=4, progress=True).text[0][:5]
"""
TABLE = "exact.table()"
STOPPED = """
progress._AFTER = 0.0
try:
    with progress.progress_bar("reading", in_bytes=True) as update:
        update(completed=2_000_000)
        1 // 0
except ZeroDivisionError:
    pass
"""
BROKEN = """
class Broken(bd3lm.results.Result):
    def _figures(self):
        return 1 // 0

Broken()
"""


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The code cells of the executed gallery, and behind them those above."""
    notebook = execute(GALLERY, BARS, SHORT, TABLE, STOPPED, BROKEN)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def shown(cells) -> dict[str, dict[str, str]]:
    """What is shown of each type of result, by the name of the type."""
    kinds = {}
    for cell in cells[:-5]:
        for output in cell.outputs:
            if output.output_type == "execute_result":
                kinds.setdefault(output.data["text/plain"].split("(")[0], output.data)
    return kinds


def test_every_type_of_result_is_shown(shown):
    assert set(shown) >= set(bd3lm.results.__all__) - {"Result"}


def test_every_result_is_a_table_with_its_numbers_and_one_line(shown):
    for name in set(bd3lm.results.__all__) - {"Result"}:
        line = shown[name]["text/plain"]
        assert "\n" not in line and len(line) <= 120 and "no figures" not in line
        if issubclass(getattr(bd3lm.results, name), Result):
            page = shown[name]["text/html"]
            if name == "Run":
                assert page.startswith("<iframe") and re.search(r"tokens in \d+ steps", page)
                continue
            words = re.sub(r"<[^>]*>", " ", page)
            assert name == "Contract" or re.search(r"\d", words), name
            assert page.count("<td") >= 2 and "<table" in page, name


def test_no_cell_leaves_an_empty_output_or_codes_of_a_terminal_or_noise(cells):
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > 40
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        texts = [output.text] if output.output_type == "stream" else list(output.data.values())
        assert texts and all(str(text).strip() and "\x1b" not in str(text) for text in texts)
        page = output.get("data", {}).get("text/html", "no page")
        assert re.sub(r"<[^>]*>", "", page).strip() or page.startswith("<iframe")


def test_bars_of_a_cell_leave_one_line_and_short_ones_none(cells):
    bars, short, _, stopped, _ = cells[-5:]
    (output,) = bars.outputs
    assert "writing &lt;b&gt;: 3 of 3 in 0 s" in output.data["text/html"]
    assert output.data["text/plain"] == "writing <b>: 3 of 3 in 0 s"
    assert "<progress" not in output.data["text/html"]
    assert [output.output_type for output in short.outputs] == ["execute_result"]
    (output,) = stopped.outputs
    assert "reading: 2 MB in 0 s" in output.data["text/html"]


def test_a_table_itself_is_html_too_and_a_result_that_cannot_be_shown_is_its_line(cells):
    *_, table, _, broken = cells[-5:]
    (output,) = table.outputs
    assert "<table" in output.data["text/html"] and "NELBO" in output.data["text/plain"]
    (output,) = broken.outputs
    assert output.data == {"text/plain": "Broken(no figures: ZeroDivisionError)"}
